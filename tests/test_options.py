"""The options: what is ours and what is Inductor's, and what a person reads who got one wrong."""

from dataclasses import fields

import pytest
import torch

from liger_compile.options import Options, describe, parse
from liger_compile.pattern import Pattern

DOUBLE = Pattern(
    "double.mine", search=lambda x: x + x, replace=lambda x: 2 * x, examples={"x": torch.ones(2)}
)


def test_without_options_everything_has_its_default():
    assert parse(None, None) == (Options(), {})
    assert parse(None, {}) == (Options(), {})


def test_ours_are_taken_and_the_rest_is_left_as_it_came():
    given = {"liger.policy": "never", "max_autotune": True, "triton.cudagraphs": False, "liger.strict": True}
    options, inductors = parse(None, given)
    assert options == Options(policy="never", strict=True)
    assert inductors == {"max_autotune": True, "triton.cudagraphs": False}
    assert len(given) == 4  # torch.compile compares it with that of other calls: it is not ours to change


@pytest.mark.parametrize(
    "key, value",
    [
        *(("policy", value) for value in ("auto", "always", "never")),
        *(("inner", value) for value in ("inductor", "aot_eager", "eager")),
        *(("mode", value) for value in (None, "default", "reduce-overhead")),
        *(("patterns", value) for value in ((), (DOUBLE,))),
        *(("skip", value) for value in ((), ("rms_norm", "rotary.llama"))),
        *(("fuel", value) for value in (None, 0, 3)),
        *(("loss_memory", value) for value in (None, 1, 2**20)),
        *(("padding", value) for value in ("auto", "general")),
        *(("strict", value) for value in (True, False)),
    ],
)
def test_accepted(key, value):
    options, _ = parse(None, {f"liger.{key}": value})
    assert getattr(options, key) == value
    assert hash(options) == hash(parse(None, {f"liger.{key}": value})[0])


@pytest.mark.parametrize(
    "key, value",
    [
        ("policy", "sometimes"),
        ("padding", "none"),
        ("loss_memory", 0),
        ("loss_memory", 1.5),
        ("policy", ["auto"]),
        ("inner", "tvm"),
        ("mode", 3),
        ("patterns", DOUBLE),
        ("patterns", ("rms_norm",)),
        ("skip", "rms_norm"),
        ("skip", (DOUBLE,)),
        ("fuel", -1),
        ("fuel", 1.5),
        ("fuel", True),
        ("strict", 1),
    ],
)
def test_a_wrong_value_raises_expected_received_and_advice(key, value):
    with pytest.raises(ValueError) as error:
        parse(None, {f"liger.{key}": value})
    message = str(error.value)
    assert message.startswith(f"option 'liger.{key}': expected ")
    assert f"got {tuple(value) if isinstance(value, list) else value!r}; " in message
    assert message.endswith(f"leave it out for the default, {getattr(Options(), key)!r}")


def test_an_unknown_option_raises_the_closest_and_all_names():
    with pytest.raises(
        ValueError, match=r"unknown option 'liger.polcy'; did you mean 'liger.policy'\?"
    ) as error:
        parse(None, {"liger.polcy": "never"})
    assert describe() in str(error.value)
    with pytest.raises(ValueError, match=r"unknown option 'liger.xyz'; use one of the options below"):
        parse(None, {"liger.xyz": 1})


def test_describe_names_every_option():
    for one in fields(Options):
        assert f"liger.{one.name}: " in describe()
    assert "Environment: LIGER_FUEL." in describe()


def test_lists_do_for_tuples():
    options, _ = parse(None, {"liger.skip": ["rms_norm"], "liger.patterns": [DOUBLE]})
    assert options == Options(skip=("rms_norm",), patterns=(DOUBLE,))


def test_skip_names_a_pattern_or_an_op():
    options = Options(skip=("rms_norm", "rotary.llama"))
    assert (
        options.skips("rms_norm.llama") and options.skips("rms_norm.gemma") and options.skips("rotary.llama")
    )
    assert not options.skips("rotary.glm") and not options.skips("rms_norm_gated.mamba")


def test_fuel_comes_from_the_environment_too(monkeypatch):
    monkeypatch.setenv("LIGER_FUEL", "2")
    assert parse(None, None)[0].fuel == 2
    assert parse(None, {"liger.fuel": 5})[0].fuel == 5  # what stands in the program is more deliberate
    monkeypatch.setenv("LIGER_FUEL", "")
    assert parse(None, None)[0].fuel is None
    monkeypatch.setenv("LIGER_FUEL", "two")
    with pytest.raises(
        ValueError, match=r"environment variable LIGER_FUEL: expected a whole number .* got 'two'"
    ):
        parse(None, None)


def test_mode_can_be_given_next_to_options():
    with pytest.raises(RuntimeError, match="Either mode or options"):
        torch.compile(lambda x: x, backend="eager", mode="max-autotune", options={"liger.policy": "never"})
    assert parse(None, {"liger.mode": "max-autotune", "liger.policy": "never"})[0].mode == "max-autotune"
    assert parse("max-autotune", None)[0].mode == "max-autotune"
    assert parse("max-autotune", {"liger.mode": "max-autotune"})[0].mode == "max-autotune"
    with pytest.raises(
        ValueError, match=r"mode='lite' and liger.mode='max-autotune' differ; give one of the two"
    ):
        parse("lite", {"liger.mode": "max-autotune"})


def test_repr_is_the_same_in_every_process():
    options = Options(patterns=(DOUBLE,), skip=("rms_norm",))
    assert " at 0x" not in repr(options)
    assert "double.mine" in repr(options)
