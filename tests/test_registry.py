"""Which patterns are in use, and what is said of one that cannot be right."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F

from liger_compile import Match, Pattern, registry
from liger_compile.registry import patterns_in_use, register_pattern, unregister_pattern, validate


def swish_gate(a, b):
    """The same mathematics as the search function of the built-in gated_mlp.swiglu_product."""
    return a * torch.sigmoid(a) * b


def in_a_row(a, b):
    return F.silu(a) * b


EXAMPLES = {"a": torch.empty(3, 4), "b": torch.empty(3, 4)}
MINE = Pattern("mine.gate", search=swish_gate, replace=in_a_row, examples=EXAMPLES)
X, Y = torch.randn(5, 8), torch.randn(5, 8)


def pattern(search, replace=None, **examples) -> Pattern:
    return Pattern("mine.other", search, replace or search, examples)


def patterns_of(report) -> list[tuple[str, str]]:
    return [(site.pattern, site.kind) for site in report.sites]


@pytest.fixture(autouse=True)
def _nothing_stays_registered():
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


@pytest.fixture
def installed(monkeypatch):
    """install(*loaded): what the entry points of installed packages load to."""

    class Entry:
        def __init__(self, loaded):
            self.loaded = loaded

        def load(self):
            return self.loaded

    def install(*loaded):
        registry._installed.cache_clear()
        monkeypatch.setattr(
            registry, "entry_points", lambda group: {registry.GROUP: [*map(Entry, loaded)]}[group]
        )

    yield install
    registry._installed.cache_clear()  # monkeypatch puts the real entry points back


def unused_number(a, eps: float):
    return torch.relu(a)


# What validation refuses. Each sentence is whole: somebody who wrote the pattern has only that.

REFUSALS = {
    "builtin without signature": (
        pattern(torch.relu_, lambda a: a, a=torch.empty(2)),
        "search has no signature to read the captures from; write it as a Python function",
    ),
    "replacement of another shape": (
        pattern(lambda a: torch.relu(a), lambda a: torch.relu(a).sum(-1), a=torch.empty(2, 3)),
        "for torch.float32 examples search returns (2, 3) torch.float32 and replace (2,) torch.float32; "
        "return the same shape and dtype from both",
    ),
    "replacement of another dtype in bfloat16 only": (
        pattern(lambda a: torch.relu(a), lambda a: torch.relu(a).float(), a=torch.empty(2, 3)),
        "for torch.bfloat16 examples search returns (2, 3) torch.bfloat16 and replace (2, 3) torch.float32; "
        "return the same shape and dtype from both",
    ),
    "other number of outputs": (
        pattern(
            lambda a, b: (torch.relu(a + b), a + b),
            lambda a, b: torch.relu(a + b),
            a=torch.empty(2),
            b=torch.empty(2),
        ),
        "search returns 2 tensors and replace 1; return as many from both",
    ),
    "unused tensor": (
        pattern(lambda a, b: torch.relu(a), a=torch.empty(2), b=torch.empty(2)),
        "search never uses its parameter 'b', so nothing would bind it; "
        "remove it, or pass it to a torch function (an int or str as an option, such as ignore_index: sizes and "
        "dimensions are read from the tensors)",
    ),
    "unused number": (
        pattern(unused_number, a=torch.empty(2), eps=1e-6),
        "search never uses its parameter 'eps', so nothing would bind it; "
        "remove it, or pass it to a torch function (an int or str as an option, such as ignore_index: sizes and "
        "dimensions are read from the tensors)",
    ),
    "missing example": (
        pattern(lambda a, b: a * b, a=torch.empty(2)),
        "search has the parameter 'b' and examples does not; add an example value for it",
    ),
    "surplus example": (
        pattern(lambda a: torch.relu(a), a=torch.empty(2), c=torch.empty(2)),
        "examples has 'c' and search has no such parameter; rename or remove it",
    ),
    "float without annotation": (
        pattern(lambda a, eps: torch.relu(a + eps), a=torch.empty(2), eps=1e-6),
        "the example for 'eps' is a float and the parameter is not annotated as one; write eps: float",
    ),
    "int without annotation": (
        pattern(lambda a, n: a.sum(n), a=torch.empty(2, 3), n=1),
        "the example for 'n' is a int and the parameter is not annotated as one; write n: int",
    ),
    "str without annotation": (
        pattern(lambda a, kind: F.gelu(a, approximate=kind), a=torch.empty(2), kind="tanh"),
        "the example for 'kind' is a str and the parameter is not annotated as one; write kind: str",
    ),
    "example of another type": (
        pattern(lambda a, flag: a.sum(-1, keepdim=flag), a=torch.empty(2), flag=True),
        "the example for 'flag' is a bool; expected a tensor, a float, an int or a str",
    ),
    "search that returns a capture": (
        pattern(lambda a, b: (a * b, a), a=torch.empty(2), b=torch.empty(2)),
        "search returns one of its parameters, which every graph contains; return a result",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_pattern_that_cannot_be_right_is_told_what_to_change(case):
    wrong, sentence = REFUSALS[case]
    with pytest.raises(ValueError) as error:
        register_pattern(wrong)
    assert str(error.value) == f"pattern 'mine.other': {sentence}"
    assert wrong not in patterns_in_use()  # nor is it half registered


def test_a_search_that_returns_no_tensor_is_refused():
    with pytest.raises(ValueError, match=r"pattern 'mine.other': search could not be traced \(.*\); it must"):
        register_pattern(pattern(lambda a: [a.shape], a=torch.empty(2)))


def test_a_wrong_pattern_is_refused_as_an_option_too(run_liger):
    wrong, sentence = REFUSALS["unused tensor"]
    with pytest.raises(Exception, match=re.escape(sentence)):
        run_liger(in_a_row, X, Y, patterns=(wrong,))


@pytest.mark.parametrize("default", registry.default_patterns(), ids=lambda default: default.name)
def test_the_built_in_patterns_pass(default):
    validate(default)


# Names


def test_a_name_is_taken_once():
    other = dataclasses.replace(MINE, search=in_a_row)
    register_pattern(MINE)
    register_pattern(MINE)  # the very same is no conflict: a module that registers may be reloaded
    with pytest.raises(ValueError) as error:
        register_pattern(other)
    assert str(error.value) == (
        "pattern 'mine.gate': the name is taken by the pattern that searches for "
        f"{__name__}.swish_gate; choose another name"
    )
    assert patterns_in_use().count(MINE) == 1
    assert other not in patterns_in_use()


def test_a_built_in_name_is_taken():
    name = registry.default_patterns()[0].name
    with pytest.raises(ValueError, match=f"pattern '{name}': the name is taken by .*; choose another name"):
        register_pattern(dataclasses.replace(MINE, name=name))


def test_two_options_of_one_name_are_refused():
    with pytest.raises(ValueError, match="the name is taken"):
        patterns_in_use((MINE, dataclasses.replace(MINE, search=in_a_row)))


def test_unregistering_says_what_is_registered():
    with pytest.raises(KeyError, match=r"no registered pattern is named 'mine.gate'; registered are: none"):
        unregister_pattern("mine.gate")
    register_pattern(MINE)
    with pytest.raises(KeyError, match=r"named 'rms_norm.llama'; registered are: mine.gate"):
        unregister_pattern("rms_norm.llama")
    unregister_pattern("mine.gate")
    assert MINE not in patterns_in_use()


# Ways in, and order


def test_the_users_come_first(installed):
    at_hand, option = (dataclasses.replace(MINE, name=name) for name in ("mine.installed", "mine.option"))
    installed(at_hand)
    register_pattern(MINE)
    assert patterns_in_use((option,)) == (option, MINE, at_hand, *registry.default_patterns())


def test_without_a_pattern_of_ones_own_the_built_in_one_is_used(run_liger):
    _, (report,) = run_liger(in_a_row, X, Y)
    assert patterns_of(report) == [("gated_mlp.swiglu_product", "replace")]


def test_a_registered_pattern_wins_over_a_built_in_one_of_equal_size(run_liger):
    register_pattern(MINE)
    result, (report,) = run_liger(in_a_row, X, Y)
    assert patterns_of(report) == [("mine.gate", "replace")]
    torch.testing.assert_close(result, in_a_row(X, Y))
    unregister_pattern("mine.gate")
    torch._dynamo.reset()
    _, (report,) = run_liger(in_a_row, X, Y)
    assert patterns_of(report) == [("gated_mlp.swiglu_product", "replace")]


def test_what_a_registered_pattern_refuses_is_left_to_the_built_in_one(run_liger):
    def check(match: Match) -> str | None:
        return "never"

    register_pattern(dataclasses.replace(MINE, check=check))
    _, (report,) = run_liger(in_a_row, X, Y)
    assert patterns_of(report) == [("gated_mlp.swiglu_product", "replace")]


def test_an_option_holds_for_one_compilation(run_liger):
    _, (report,) = run_liger(in_a_row, X, Y, patterns=(MINE,))
    assert patterns_of(report) == [("mine.gate", "replace")]
    torch._dynamo.reset()
    _, (report,) = run_liger(in_a_row, X, Y)
    assert patterns_of(report) == [("gated_mlp.swiglu_product", "replace")]


@pytest.mark.parametrize("loaded", [MINE, (MINE,), [MINE]], ids=["pattern", "tuple", "list"])
def test_an_installed_package_brings_patterns(run_liger, installed, loaded):
    installed(loaded)
    _, (report,) = run_liger(in_a_row, X, Y)
    assert patterns_of(report) == [("mine.gate", "replace")]


def test_an_installed_package_is_validated(installed):
    wrong, sentence = REFUSALS["missing example"]
    installed((MINE, wrong))
    with pytest.raises(ValueError, match=sentence):
        patterns_in_use()


def test_two_packages_cannot_take_one_name(installed):
    installed(MINE, dataclasses.replace(MINE, search=in_a_row))
    with pytest.raises(ValueError, match=r"pattern 'mine.gate': the name is taken"):
        patterns_in_use()


def test_an_installed_name_is_taken_for_registration(installed):
    installed(MINE)
    with pytest.raises(ValueError, match=r"pattern 'mine.gate': the name is taken"):
        register_pattern(dataclasses.replace(MINE, search=in_a_row))


# What a pattern of one's own does to the numbers: nothing


def relu_squared(u, weight, bias: torch.Tensor | None):
    return F.linear(torch.relu(u).square(), weight, bias)


RELU_SQUARED = Pattern(
    "mine.relu_squared",
    relu_squared,
    lambda u, weight, bias: F.linear(torch.relu(u) * torch.relu(u), weight, bias),
    {"u": torch.empty(3, 5, 8), "weight": torch.empty(6, 8), "bias": torch.empty(6)},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_numbers_and_gradients_stay(run_liger, liger_is_as_right_as_eager, dtype, has_bias):
    register_pattern(RELU_SQUARED)
    args = [torch.randn(2, 7, 16).to(dtype), torch.randn(4, 16).to(dtype), torch.randn(4).to(dtype)]
    if not has_bias:
        args[2] = None
    result, (report,) = run_liger(relu_squared, *args)
    assert patterns_of(report) == [("mine.relu_squared", "replace")]
    assert torch.equal(result, relu_squared(*args))
    torch._dynamo.reset()
    liger_is_as_right_as_eager(relu_squared, *args)
