"""The program fuzzer: what it sees, that it finds and shrinks a planted fault, and that no program it draws is wrong.

Other programs every day; `--fuzz-seed` repeats a day. A longer run is
`python -m liger_compile.testing.programs --programs 20000 --processes 2`.
"""

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, seed, settings
from hypothesis import strategies as st

from liger_compile import Pattern
from liger_compile.testing.programs.differential import Outcome, check, differences, run
from liger_compile.testing.programs.grammar import BY_KERNEL, TEMPLATES
from liger_compile.testing.programs.program import Call, Program, Statement
from liger_compile.testing.programs.strategies import programs

BOUNDED = settings(
    max_examples=10,  # of which about two thirds run in eager mode; longer runs are the program's
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=tuple(HealthCheck),
)

MODEL = Program((Statement("rms_norm"), Statement("head"), Statement("loss")), outputs=(0, 1, 2))


def test_no_program_is_wrong(fuzz_seed):
    @seed(fuzz_seed)
    @BOUNDED
    @given(programs, st.sampled_from(("auto", "always", "never")))
    def is_right(program, policy):
        verdict = check(program, (policy,))
        assert verdict.kind != "wrong", "\n".join(map(str, (program, *verdict.findings)))

    is_right()


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "end"])
def test_every_statement_makes_a_program(name):
    program = Program(
        (Statement("head"), Statement("loss"), Statement("tanh"), Statement(name), Statement("squares"))
    )
    compile(program.source, name, "exec")
    assert TEMPLATES[name].text.split("{")[0] in program.source


def test_the_text_of_a_program_gives_the_program():
    text = str(MODEL)
    assert (
        eval(text.splitlines()[-1].removeprefix("# "), vars(__import__(Program.__module__, fromlist=["*"])))
        == MODEL
    )
    namespace = {"torch": torch, "F": torch.nn.functional}
    exec(text, namespace)
    assert callable(namespace["program"])


def test_written_out_attention_has_a_kernel_with_its_value():
    program = Program((Statement("written_out"),), outputs=(0,))
    plain, other = (run(program, program.function(others)) for others in ("", BY_KERNEL))
    assert not plain.error and not differences(plain, other)


@pytest.mark.parametrize("policy", ["auto", "always", "never"])
def test_a_model_is_right(policy):
    calls = (Call(), Call(length=4), Call(mode="no_grad"), Call(after_backward="fused"))
    verdict = check(MODEL.__class__(MODEL.statements, (0, 1), calls=calls), (policy,))
    assert verdict.kind == "right" and (verdict.replaced > 0) == (policy != "never")


PLANTED = Pattern(
    "tanh.wrong", lambda x: torch.tanh(x), lambda x: torch.tanh(x) * 1.01, examples={"x": torch.empty(2, 4)}
)


def test_a_planted_fault_is_found_and_shrunk():
    names = ["relu", "scaled", "tanh", "residual", "rms_norm", "detached"]
    drawn = st.lists(st.builds(Statement, st.sampled_from(names)), min_size=1, max_size=6).map(tuple)

    def is_wrong(program):
        return check(program, ("auto",), options={"liger.patterns": (PLANTED,)}).kind == "wrong"

    found = find(
        st.builds(Program, drawn), is_wrong, settings=settings(BOUNDED, derandomize=True, max_examples=40)
    )
    assert [statement.template for statement in found.statements] == ["tanh"]


def _as(change):
    """The outcomes of MODEL in eager mode, and where `change` is made to what it returns."""
    function = MODEL.function()
    return run(MODEL, function), run(MODEL, lambda *args: change(*function(*args)))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda loss, logits, norm: (loss * 1.001, logits, norm), "output 0:"),
        (lambda loss, logits, norm: (loss, logits.detach(), norm), "output 1 is"),
        (lambda loss, logits, norm: (loss, logits, norm.double()), "output 2 is"),
        (lambda loss, logits, norm: (loss, logits, logits[..., :8]), "sharing"),
        (lambda loss, logits, norm: (loss.detach().requires_grad_(), logits, norm), "gradient of head"),
        (lambda loss, logits, norm: (loss, logits[0, 0], norm), "output 1 is"),
        (lambda loss, logits, norm: [][0], "raises IndexError"),
    ],
)
def test_what_differs_is_said(change, seen):
    eager, other = _as(change)
    assert not differences(eager, eager)
    assert any(seen in each for each in differences(eager, other)), differences(eager, other)
    assert not any(seen in each for each in differences(eager, other, others=(other,)))  # stock has it too


def test_a_rounding_is_noise_and_a_constant_that_vanishes_is_not():
    rounding = Program(
        (Statement("shifted_back", constant=9), Statement("squares"))
    )  # 12582912, which rounds
    function = rounding.function()
    eager, nudged = run(rounding, function), [run(rounding, function, nudge=seed) for seed in (1, 2)]
    assert not differences(eager, nudged[0], nudged=nudged)
    plain = Program((Statement("scaled"), Statement("squares")))
    assert differences(eager, run(plain, plain.function()), nudged=nudged)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("name", "eager", "ours", "is_right"),
    [
        ("gradient of head", (INF, 1.0), (NAN, 1.0), True),
        ("gradient of head", (NAN, 1.0), (-INF, 1.0), True),
        ("gradient of head", (INF, 1.0), (-INF, 1.0), False),
        ("gradient of head", (INF, 1.0), (NAN, NAN), False),
        ("gradient of head", (INF, 1.0), (NAN, 2.0), False),
        ("gradient of head", (INF, 1.0), (0.0, 1.0), False),
        ("output 0", (INF, 1.0), (NAN, 1.0), False),
    ],
)
def test_only_gradients_may_be_nan_where_eager_mode_has_infinity(name, eager, ours, is_right):
    outcomes = [Outcome({f"call 0: {name}": torch.tensor(values)}) for values in (eager, ours)]
    assert (not differences(*outcomes)) == is_right


def test_after_an_infinite_gradient_only_the_gradients_of_the_call_are_compared():
    def outcome(first, second, weight):
        values = {"gradient of head": first, "gradient of x": second, "head after it": weight}
        return Outcome({f"call 0: {name}": torch.tensor(value) for name, value in values.items()})

    eager = outcome(INF, 1.0, -INF)
    assert not differences(eager, outcome(NAN, 1.0, NAN))
    assert differences(eager, outcome(NAN, 2.0, NAN))
    assert differences(eager, outcome(INF, 1.0, NAN))


def test_a_gradient_that_cancels_in_eager_mode_may_be_a_rounding_error():
    def outcome(cancelled):
        values = {"call 0: gradient of q": cancelled, "call 0: gradient of v": 2.0}
        return Outcome({name: torch.tensor(value) for name, value in values.items()})

    eager = outcome(0.0)
    assert not differences(eager, outcome(1e-5), nudged=[eager])
    assert differences(eager, outcome(1e-2), nudged=[eager])
    assert differences(outcome(1e-9), outcome(1e-5), nudged=[eager])


def test_gradients_under_autocast_are_compared_in_its_dtype():
    eager, ours = (Outcome({"call 0: gradient of bias": torch.tensor(value)}) for value in (1.2656, 1.2715))
    assert not differences(eager, ours, in_half=["call 0"])
    assert differences(eager, ours, in_half=["call 1"])
    assert differences(eager, Outcome({"call 0: gradient of bias": torch.tensor(1.4)}), in_half=["call 0"])


def test_attention_may_give_zero_for_nan():
    eager, ours, wrong = (Outcome({"call 0: output 0": torch.tensor([x, 1.0])}) for x in (NAN, 0.0, 2.0))
    assert not differences(eager, ours, attends=True)
    assert differences(eager, ours)
    assert differences(eager, wrong, attends=True)
    assert differences(ours, eager, attends=True)


def test_weights_that_are_not_finite_end_the_comparison_after_their_call():
    def outcome(weight, output, later):
        values = {"call 0: head after it": weight, "call 0: output 0": output, "call 1: output 0": later}
        return Outcome({name: torch.tensor(value) for name, value in values.items()})

    assert not differences(outcome(NAN, 1.0, NAN), outcome(NAN, 1.0, 0.0))
    assert differences(outcome(NAN, 1.0, NAN), outcome(NAN, 2.0, NAN))
    assert differences(outcome(2.0, 1.0, NAN), outcome(2.0, 1.0, 0.0))


def test_calls_after_stock_has_failed_are_not_compared_if_its_weights_differ_from_eager_mode():
    def outcome(weight, later, error=""):
        values = {"call 0: head after it": weight, "call 1: output 0": later}
        return Outcome({name: torch.tensor(value) for name, value in values.items() if value}, error)

    eager, stock = outcome(1.0, 5.0), outcome(2.0, None, "RuntimeError: one")
    assert not differences(eager, outcome(2.0, 6.0), others=(stock,))
    assert differences(eager, outcome(3.0, 6.0), others=(stock,))
    assert differences(eager, outcome(2.0, 6.0), others=(outcome(2.0, 5.0),))


def test_a_value_may_be_within_rounding_of_that_of_another_run():
    """Such as eager mode with gradients of zeros for the outputs of which the caller takes none."""

    def outcome(value):
        return Outcome({"call 0: gradient of x": torch.tensor(value)})

    eager, nudged = outcome([1.0, 2.0]), outcome([1.001, 2.0])
    zeros, ours, wrong = outcome([NAN, 2.0]), outcome([NAN, 2.001]), outcome([NAN, 2.5])
    assert not differences(eager, ours, others=(zeros,), nudged=[nudged])
    assert differences(eager, ours, nudged=[nudged])
    assert differences(eager, wrong, others=(zeros,), nudged=[nudged])


@pytest.mark.parametrize(("ours", "is_right"), [((8.0, 1.0), True), ((9.0, 1.0), False), ((8.0, 2.0), False)])
def test_a_gradient_may_be_finite_where_eager_mode_overflows(ours, is_right):
    def outcome(*values):
        return Outcome({"call 0: gradient of x": torch.tensor(values)})

    eager, scaled = outcome(NAN, 1.0), {0.25: outcome(2.0, 0.25)}
    assert (not differences(eager, outcome(*ours), scaled=scaled)) == is_right
    assert differences(eager, outcome(*ours))
