"""Which patterns are in use, and what is said of one that cannot be right."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings

import pytest
import torch
import torch.nn.functional as F

import liger_compile
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
BUILT_IN = (
    "gated_mlp.swiglu_product",
    "annotate",
)  # under a compiler that follows marks, where gradients are computed


def pattern(search, replace=None, **examples) -> Pattern:
    return Pattern("mine.other", search, replace or search, examples)


def patterns_of(report) -> list[tuple[str, str]]:
    return [(site.pattern, site.kind) for site in report.sites]


@pytest.fixture(autouse=True)
def _nothing_stays_registered():
    before = dict(registry.REGISTERED)
    yield
    registry.REGISTERED.clear()
    registry.REGISTERED.update(before)


@pytest.fixture
def installed(monkeypatch):
    """install(*loaded): what the entry points of installed packages load to."""

    class Entry:
        def __init__(self, loaded):
            self.loaded = loaded

        def load(self):
            return self.loaded

    def install(*loaded):
        registry.installed_patterns.cache_clear()
        monkeypatch.setattr(
            registry, "entry_points", lambda group: {registry.GROUP: [*map(Entry, loaded)]}[group]
        )

    yield install
    registry.installed_patterns.cache_clear()  # monkeypatch puts the real entry points back


def unused_number(a, eps: float):
    return torch.relu(a)


def scaled(a, scale: float):
    return torch.relu(a) * scale


def filled(a):
    result = torch.zeros_like(a)
    result[...] = torch.relu(a)
    return result


def without_gradients(a):
    with torch.no_grad():
        return torch.relu(a)


class Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        return torch.relu(a)

    @staticmethod
    def backward(ctx, grad):
        return grad


READS_A_VALUE = (
    "(DataDependentOutputException: aten._local_scalar_dense.default); it reads a value out of a tensor (item(), or an "
    "if or a size that depends on one), and is run on tensors without values; compute with tensors instead, for "
    "example by torch.where"
)
RETURNS = "it must return a tensor or a tuple of tensors, computed by torch functions from its parameters"
NOTHING_ELSE = "it has to compute new tensors from its arguments and nothing else"
SWITCHES = "switches gradients on or off (detach() leaves one value without)"


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
    "int for a float": (
        pattern(scaled, a=torch.empty(2), scale=1),
        "the example for 'scale' is a int, 1, and the parameter is annotated as float; pass a float",
    ),
    "tensor for a float": (
        pattern(scaled, a=torch.empty(2), scale=torch.empty(2)),
        "the example for 'scale' is a tensor and the parameter is annotated as float; pass an example that is one, or "
        "write scale without the annotation",
    ),
    "any number of captures": (
        pattern(lambda *a: torch.relu(a[0]), a=torch.empty(2)),
        "search has the parameter '*a', which takes any number of values; write a parameter with a name for each "
        "capture",
    ),
    "captures of any name": (
        pattern(lambda **a: torch.relu(a["a"]), a=torch.empty(2)),
        "search has the parameter '**a', which takes any names; write a parameter with a name for each capture",
    ),
    "captures without a name": (
        pattern(lambda a, /: torch.relu(a), a=torch.empty(2)),
        "search has the parameter 'a', which cannot be passed by name; write a parameter with a name for each capture",
    ),
    "no captures": (
        pattern(lambda: torch.ones(2)),
        "search has no parameters; it needs one for each capture",
    ),
    "another name in replace": (
        pattern(lambda a: torch.relu(a), lambda x: torch.relu(x), a=torch.empty(2)),
        "search has the parameter 'a' and replace does not; replace is called with all captures by name, so give it a "
        "parameter of this name",
    ),
    "by position in replace": (
        pattern(lambda a: torch.relu(a), lambda a, /: torch.relu(a), a=torch.empty(2)),
        "search has the parameter 'a' and replace accepts it by position only; replace is called with all captures by "
        "name, so give it a parameter of this name",
    ),
    "one more in replace": (
        pattern(lambda a: torch.relu(a), lambda a, loss_memory: torch.relu(a), a=torch.empty(2)),
        "replace has the parameter 'loss_memory' and search does not, so nothing is passed for it; rename it, remove "
        "it, or give it a default",
    ),
    "search that raises": (
        pattern(lambda a: {}["x"], a=torch.empty(2)),
        "search could not be traced (KeyError: 'x'); it must run on tensors of the shapes of the examples, with torch "
        "functions only",
    ),
    "examples of shapes that do not fit": (
        pattern(lambda a, b: a @ b, a=torch.empty(2, 3), b=torch.empty(2, 3)),
        "search could not be traced (RuntimeError: a and b must have same reduction dim, but got [2, 3] X [2, 3].); "
        "it must run on tensors of the shapes of the examples, with torch functions only",
    ),
    "search that reads a value": (
        pattern(lambda a: a * a.sum().item(), a=torch.empty(2)),
        f"search could not be traced {READS_A_VALUE}",
    ),
    "replacement that depends on a value": (
        pattern(lambda a: torch.relu(a), lambda a: torch.relu(a) if a.sum() > 0 else a, a=torch.empty(2)),
        f"replace could not be traced {READS_A_VALUE}",
    ),
    "search that returns a list": (
        pattern(lambda a: [torch.relu(a)], a=torch.empty(2)),
        f"search could not be traced (it returns a value of type list); {RETURNS}",
    ),
    "search that returns nothing": (
        pattern(lambda a: None, a=torch.empty(2)),
        f"search could not be traced (it returns None); {RETURNS}",
    ),
    "replacement that returns a number": (
        pattern(lambda a: torch.relu(a), lambda a: 3, a=torch.empty(2)),
        f"replace could not be traced (it returns 3, a value of type int); {RETURNS}",
    ),
    "replacement that returns tuples in tuples": (
        pattern(lambda a: torch.relu(a), lambda a: ((torch.relu(a),),), a=torch.empty(2)),
        f"replace could not be traced (it returns a value of type tuple in a tuple); {RETURNS}",
    ),
    "replacement that returns an empty tuple": (
        pattern(lambda a: torch.relu(a), lambda a: (), a=torch.empty(2)),
        f"replace could not be traced (it returns an empty tuple); {RETURNS}",
    ),
    "replacement on another device": (
        pattern(lambda a: torch.relu(a), lambda a: torch.empty_like(a, device="meta"), a=torch.empty(2)),
        "for torch.float32 examples search returns (2,) torch.float32 on cpu and replace (2,) torch.float32 on meta; "
        "return the same shape and dtype from both",
    ),
    "random search": (
        pattern(lambda a: F.dropout(a, 0.5), a=torch.empty(2)),
        f"for torch.float32 examples search draws random numbers, by bernoulli_; {NOTHING_ELSE}",
    ),
    "search that writes into what it has made": (
        pattern(lambda a: F.relu(a + 1, inplace=True), a=torch.empty(2)),
        f"for torch.float32 examples search writes in place, by relu; {NOTHING_ELSE}",
    ),
    "search that fills a tensor": (
        pattern(filled, lambda a: torch.relu(a), a=torch.empty(2)),
        f"for torch.float32 examples search writes in place, by setitem; {NOTHING_ELSE}",
    ),
    "search that switches gradients off": (
        pattern(without_gradients, lambda a: torch.relu(a), a=torch.empty(2)),
        f"for torch.float32 examples search {SWITCHES}; {NOTHING_ELSE}",
    ),
    "replacement that switches gradients off": (
        pattern(lambda a: torch.relu(a), without_gradients, a=torch.empty(2)),
        f"for torch.float32 examples replace {SWITCHES}; {NOTHING_ELSE}",
    ),
    "replacement by an autograd.Function": (
        pattern(lambda a: torch.relu(a), lambda a: Relu.apply(a), a=torch.empty(2)),
        "replace calls Relu, an autograd.Function, whose backward cannot be part of a graph; make it an op by "
        "torch.library.custom_op and register_autograd",
    ),
    "search that returns a capture": (
        pattern(lambda a, b: (a * b, a), a=torch.empty(2), b=torch.empty(2)),
        "search returns one of its parameters, which every graph contains; return a result",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_an_invalid_pattern_is_refused_with_advice(case):
    wrong, sentence = REFUSALS[case]
    with pytest.raises(ValueError) as error:
        register_pattern(wrong)
    assert str(error.value) == f"pattern 'mine.other': {sentence}"
    assert wrong not in patterns_in_use()  # nor is it half registered


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        (
            "name",
            3,
            "pattern 3: name is 3, a value of type int; expected a name such as 'rms_norm.llama', so pass that",
        ),
        ("name", "", "name is '', a value of type str; expected a name such as"),
        ("search", None, "search is None; expected a function"),
        ("replace", "op", "replace is 'op', a value of type str; expected a function or None"),
        (
            "examples",
            [torch.empty(2)],
            "examples is a value of type list; expected a dictionary from the names",
        ),
        ("check", True, "check is True, a value of type bool; expected a function of a match, or None"),
        ("saves", 12, "saves is 12, a value of type int; expected a function of a match, or None"),
        ("is_loss", 1, "is_loss is 1, a value of type int; expected True or False"),
        (
            "has_near_misses",
            "no",
            "has_near_misses is 'no', a value of type str; expected True, False or None",
        ),
    ],
)
def test_a_field_of_the_wrong_type_is_refused(field, value, sentence):
    with pytest.raises(TypeError, match=re.escape(sentence)):
        register_pattern(dataclasses.replace(MINE, **{field: value}))


@pytest.mark.parametrize("given", [swish_gate, (MINE,), None])
def test_a_value_that_is_no_pattern_is_refused(given):
    with pytest.raises(TypeError, match=r"register_pattern: expected a Pattern, got .*; write Pattern"):
        register_pattern(given)


def test_a_tensor_of_a_closure_is_refused():
    table = torch.ones(2)
    sentence = (
        r"it uses a tensor that is none of its parameters; make it a parameter, or create it in the function$"
    )
    with pytest.raises(ValueError, match=sentence):
        register_pattern(pattern(lambda a: a * table, a=torch.empty(2)))


def test_what_search_raises_keeps_its_traceback():
    with pytest.raises(ValueError) as error:
        register_pattern(REFUSALS["search that raises"][0])
    cause = error.value.__cause__
    assert isinstance(cause, KeyError) and cause.__traceback__ is not None


@pytest.mark.parametrize(
    "accepted",
    [
        pattern(lambda a: torch.relu(a), torch.relu, a=torch.empty(2)),
        pattern(lambda *, a: torch.relu(a), lambda **captures: torch.relu(**captures), a=torch.empty(2)),
        pattern(lambda self: torch.relu(self), torch.ops.aten.relu.default, self=torch.empty(2)),
        pattern(lambda a: torch.relu(a), filled, a=torch.empty(2)),
        pattern(lambda a: torch.relu(a), a=torch.empty(2, requires_grad=True)),
        pattern(lambda a: torch.relu(a), a=torch.empty(2, device="meta")),
    ],
    ids=["torch's own", "keywords", "overload", "fills what it has made", "requires_grad", "another device"],
)
def test_other_ways_to_write_a_pattern_are_accepted(accepted):
    validate(accepted)


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
        f"pattern 'mine.gate': the name is taken by the pattern that searches for {__name__}.swish_gate, and this "
        f"one searches for {__name__}.in_a_row; choose another name, or replace the other one: "
        "register_pattern(..., replace_existing=True), or unregister_pattern('mine.gate') first"
    )
    assert patterns_in_use().count(MINE) == 1
    assert other not in patterns_in_use()


def test_a_cell_that_runs_twice_may_put_its_pattern_in_the_place_of_the_first(run_liger):
    register_pattern(MINE)
    again = dataclasses.replace(MINE)
    register_pattern(again, replace_existing=True)
    assert MINE not in patterns_in_use() and again in patterns_in_use()
    unregister_pattern("mine.gate")
    register_pattern(MINE, replace_existing=True)  # there is none to replace
    assert MINE in patterns_in_use()


def test_what_takes_the_place_of_another_has_to_be_right_itself():
    register_pattern(MINE)
    with pytest.raises(ValueError, match="search never uses its parameter 'b'"):
        register_pattern(dataclasses.replace(MINE, search=lambda a, b: a.relu()), replace_existing=True)
    assert MINE in patterns_in_use()


def test_a_built_in_name_is_taken_for_good():
    name = registry.default_patterns()[0].name
    with pytest.raises(ValueError, match=r"choose another name$"):
        register_pattern(dataclasses.replace(MINE, name=name), replace_existing=True)


def test_a_built_in_name_is_taken():
    name = registry.default_patterns()[0].name
    with pytest.raises(ValueError, match=f"pattern '{name}': the name is taken by .*; choose another name"):
        register_pattern(dataclasses.replace(MINE, name=name))


def test_two_options_of_one_name_are_refused():
    with pytest.raises(ValueError, match="the name is taken"):
        patterns_in_use((MINE, dataclasses.replace(MINE, search=in_a_row)))


def test_unregistering_an_unknown_name_lists_the_registered_names():
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
    _, (report,) = run_liger(in_a_row, X.clone().requires_grad_(), Y, inner="aot_eager")
    assert patterns_of(report) == [BUILT_IN]


def test_a_registered_pattern_wins_over_a_built_in_one_of_equal_size(run_liger):
    register_pattern(MINE)
    result, (report,) = run_liger(in_a_row, X, Y)
    assert patterns_of(report) == [("mine.gate", "replace")]
    torch.testing.assert_close(result, in_a_row(X, Y))
    unregister_pattern("mine.gate")
    torch._dynamo.reset()
    _, (report,) = run_liger(in_a_row, X.clone().requires_grad_(), Y, inner="aot_eager")
    assert patterns_of(report) == [BUILT_IN]


def test_what_a_registered_pattern_refuses_is_left_to_the_built_in_one(run_liger):
    def check(match: Match) -> str | None:
        return "never"

    register_pattern(dataclasses.replace(MINE, check=check))
    _, (report,) = run_liger(in_a_row, X.clone().requires_grad_(), Y, inner="aot_eager")
    assert patterns_of(report) == [BUILT_IN]


def test_an_option_holds_for_one_compilation(run_liger):
    _, (report,) = run_liger(in_a_row, X, Y, patterns=(MINE,))
    assert patterns_of(report) == [("mine.gate", "replace")]
    torch._dynamo.reset()
    _, (report,) = run_liger(in_a_row, X.clone().requires_grad_(), Y, inner="aot_eager")
    assert patterns_of(report) == [BUILT_IN]


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


# What a replacement does besides computing its results


def writes_by(write):
    """A replacement that computes the product, and writes."""

    def replace(a, b):
        result = torch.relu(a) * torch.sigmoid(b)
        write(a, b)
        return result

    return replace


@torch.library.custom_op("test_registry::double", mutates_args=("x",))
def double(x: torch.Tensor) -> None:
    x.mul_(2)


def gated(a, b):
    return torch.relu(a) * torch.sigmoid(b)


def gated_and_tanh(a, b):
    return gated(a, b), torch.tanh(a)


def twice(x):
    return x, x.view(-1).view_as(x)


WRITES = {
    "in place": writes_by(lambda a, b: a.mul_(2)),
    "through a view": writes_by(lambda a, b: a[:1].t().add_(1)),
    "an item": writes_by(lambda a, b: a.__setitem__(0, 1.0)),
    "out=": lambda a, b: torch.mul(torch.relu(a), torch.sigmoid(b), out=a),
    "inplace=True": lambda a, b: F.relu(a, inplace=True) * torch.sigmoid(b),
    "data": writes_by(lambda a, b: a.data.mul_(2)),
    "a list": writes_by(lambda a, b: torch._foreach_add_([a, b], 1.0)),
    "a custom op": writes_by(lambda a, b: double(a)),
    "its shape": writes_by(lambda a, b: a.unsqueeze_(0)),
    "in bfloat16": writes_by(lambda a, b: a.mul_(2) if a.dtype == torch.bfloat16 else None),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_replacement_that_writes_into_a_capture_is_refused(write):
    dtype = "torch.bfloat16" if write == "in bfloat16" else "torch.float32"
    sentence = f"for {dtype} examples replace writes into its argument 'a', by "
    with pytest.raises(ValueError, match=sentence):
        validate(Pattern("mine.writes", gated, WRITES[write], EXAMPLES))


@pytest.mark.parametrize(
    ("search", "replace", "sentence"),
    [
        (gated, lambda a, b: a, "returns its argument 'a', or a view of it"),
        (gated, lambda a, b: b.t().t(), "returns its argument 'b', or a view of it"),
        (gated_and_tanh, lambda a, b: twice(gated(a, b)), "returns results 0 and 1 in the same memory"),
        (lambda a, b: twice(gated(a, b)), gated_and_tanh, "returns results 0 and 1 in different memory"),
    ],
)
def test_a_replacement_whose_results_share_memory_otherwise_is_refused(search, replace, sentence):
    with pytest.raises(ValueError, match=f"replace {sentence}.*; it has to compute new tensors"):
        validate(Pattern("mine.alias", search, replace, EXAMPLES))


def late(replace):
    """A replacement that does as `replace` for two rows, which the examples do not have."""
    return lambda a, b: replace(a, b) if a.shape[0] == 2 else gated(a, b)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        (WRITES["through a view"], "writes into "),
        (WRITES["a custom op"], "writes into "),
        (lambda a, b: a, "returns its argument 'a', or a view of it"),
        (lambda a, b: [gated(a, b)], "returns a value of type list; expected a tensor"),
    ],
)
def test_what_shows_in_some_shapes_only_is_refused_there(run_liger, replace, reason, needs_grad):
    def f(x, y):
        u = x * 2
        return gated(u, y).sin() + u

    x, y = torch.randn(2, 4, requires_grad=needs_grad), torch.randn(2, 4)
    result, (report,) = run_liger(f, x, y, patterns=(Pattern("mine.late", gated, late(replace), EXAMPLES),))
    ((site),) = report.sites
    assert site.kind == "leave" and site.reason.startswith(f"the replacement {reason}"), site.reason
    torch.testing.assert_close(result, f(x, y))


def test_a_replacement_may_fill_a_tensor_of_its_own(run_liger, liger_is_as_right_as_eager):
    def replace(a, b):
        result = torch.empty_like(a)
        result[...] = torch.relu(a)
        result[1:].mul_(1.0)
        return result * torch.sigmoid(b)

    register_pattern(Pattern("mine.fills", gated, replace, EXAMPLES))
    _, (report,) = run_liger(gated, X, Y)
    assert patterns_of(report) == [("mine.fills", "replace")]
    torch._dynamo.reset()
    liger_is_as_right_as_eager(gated, X, Y)


@pytest.mark.parametrize("name", ["loss_memory", "inner"])
def test_a_capture_may_have_the_name_of_a_setting(run_liger, name):
    namespace = {"torch": torch}
    exec(f"def search(a, {name}: float):\n    return torch.relu(a) * {name}", namespace)
    search = namespace["search"]
    mine = Pattern("mine.named", search, search, {"a": torch.empty(2), name: 0.5})
    result, (report,) = run_liger(lambda x: torch.relu(x) * 3.0, X, patterns=(mine,))
    assert patterns_of(report) == [("mine.named", "replace")]
    torch.testing.assert_close(result, torch.relu(X) * 3.0)


# What fails costs one pattern one place


def fails(*_):
    raise KeyError("a bug of mine")


def late_failure(a, b):
    return fails() if a.shape[0] == 2 else gated(a, b)


EXPECTED_OF_SAVES = "expected a number of bytes, 0 or more, or None if it is not known"
FAILURES = {
    "check": ({"check": fails}, "check of pattern 'mine.fails' fails here: KeyError: 'a bug of mine'"),
    "profit": ({"profit": fails}, "profit of pattern 'mine.fails' fails here: KeyError: 'a bug of mine'"),
    "replace": (
        {"replace": late_failure},
        "replace of pattern 'mine.fails' fails here: KeyError: 'a bug of mine'",
    ),
    "search": (
        {"search": late_failure},
        "search of pattern 'mine.fails' fails here: KeyError: 'a bug of mine'",
    ),
    "saves": ({"saves": fails}, "saves of pattern 'mine.fails' fails here: KeyError: 'a bug of mine'"),
    "check without arguments": (
        {"check": lambda: None},
        "check of pattern 'mine.fails' fails here: TypeError: <lambda>() takes 0 positional arguments but 1 was given",
    ),
    "check that is true": (
        {"check": lambda match: True},
        "check of pattern 'mine.fails' returned True, a value of type bool; expected None to accept, or a sentence "
        "with the reason",
    ),
    "check of an empty string": (
        {"check": lambda match: " "},
        "check of pattern 'mine.fails' returned ' ', a value of type str; expected None to accept, or a sentence "
        "with the reason",
    ),
    "profit that is false": (
        {"profit": lambda match: False},
        "profit of pattern 'mine.fails' returned False, a value of type bool; expected None to accept, a sentence "
        "with the reason, or an Annotate",
    ),
    **{
        f"saves {value!r}": (
            {"saves": lambda match, value=value: value},
            f"saves of pattern 'mine.fails' returned {value!r}, a value of type {type(value).__name__}; "
            f"{EXPECTED_OF_SAVES}",
        )
        for value in ("much", float("nan"), float("inf"), -1, True)
    },
    "saves a tensor": (
        {"saves": lambda match: match["a"]},
        f"saves of pattern 'mine.fails' returned a value of type FakeTensor; {EXPECTED_OF_SAVES}",
    ),
}


def with_a_norm(x, y, w):
    h = gated(x, y).sin()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("case", FAILURES)
def test_a_function_that_fails_costs_its_pattern_this_place_alone(case):
    fields, sentence = FAILURES[case]
    failing = Pattern(
        **{"name": "mine.fails", "search": gated, "replace": gated, "examples": EXAMPLES, **fields}
    )
    x, y, w = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4), torch.rand(4)
    options = {"liger.inner": "aot_eager", "liger.patterns": (failing,)}
    compiled = torch.compile(with_a_norm, backend="liger", options=options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(compiled(x, y, w), with_a_norm(x, y, w))
    (report,) = liger_compile.reports()
    told = [site.reason for site in report.sites] + [near.reason for near in report.near_misses]
    assert sentence in told and sentence in str(report).replace("\n      ", " ")
    assert ("rms_norm.llama", "annotate") in patterns_of(report)
    assert (("mine.fails", "replace") in patterns_of(report)) == case.startswith("saves")
    told = [str(warning.message) for warning in caught if "liger_compile" in str(warning.message)]
    assert told == (
        [] if case == "search" else [f"liger_compile: {sentence}; liger.strict=True raises instead"]
    )
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("case", ["check", "profit", "replace", "search", "saves", "check that is true"])
def test_strict_raises_what_fails_and_names_it(case):
    fields, sentence = FAILURES[case]
    failing = Pattern(
        **{"name": "mine.fails", "search": gated, "replace": gated, "examples": EXAMPLES, **fields}
    )
    options = {"liger.inner": "eager", "liger.patterns": (failing,), "liger.strict": True}
    compiled = torch.compile(gated, backend="liger", options=options)
    with pytest.raises(Exception, match=re.escape(sentence)):
        compiled(torch.randn(2, 4, requires_grad=True), torch.randn(2, 4))


def test_what_fails_leaves_its_place_to_a_smaller_pattern(run_liger):
    """The larger one is tried first, and takes the place of the smaller one only if it holds."""

    def search(a, b):
        return (F.silu(a) * b).sin()

    larger = Pattern("mine.larger", search, late(lambda a, b: fails()), EXAMPLES)
    larger = dataclasses.replace(larger, replace=lambda a, b: fails() if a.shape[0] == 2 else search(a, b))
    x, y = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
    with pytest.warns(UserWarning, match="replace of pattern 'mine.larger' fails here"):
        result, (report,) = run_liger(search, x, y, patterns=(larger,), strict=False, inner="aot_eager")
    assert patterns_of(report) == [("mine.larger", "leave"), BUILT_IN]
    torch.testing.assert_close(result, search(x, y))


def test_an_op_refuses_by_a_value_error_also_under_strict(run_liger):
    def replace(a, b):
        if a.shape[0] == 2:
            raise ValueError("expected more than two rows")
        return gated(a, b)

    _, (report,) = run_liger(gated, X[:2], Y[:2], patterns=(Pattern("mine.op", gated, replace, EXAMPLES),))
    ((site),) = report.sites
    assert (site.kind, site.reason) == ("leave", "the replacement refuses: expected more than two rows")
