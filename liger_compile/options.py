"""The options of `torch.compile(model, backend="liger", options={...})`.

In: the `mode` and the `options` that torch.compile passes to a backend. Out: our options, whose names begin with
"liger.", validated once; and Inductor's options, unchanged and not inspected.

`Options` is the single list of the options. Parsing, the error texts, `describe()` and
docs/options.md all read its fields.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, NamedTuple, cast

from liger_compile.pattern import Pattern

PREFIX = "liger."


@dataclass(frozen=True)
class _Kind:
    """The values that an option accepts: `accepts` completes "expected ..."."""

    accepts: str
    contains: Callable[[Any], bool]


def _one_of(*values: str) -> _Kind:
    names = ", ".join(repr(value) for value in values)
    return _Kind(f"one of {names}", lambda value: isinstance(value, str) and value in values)


def _tuple_of(kind: type, accepts: str) -> _Kind:
    return _Kind(
        accepts, lambda value: isinstance(value, tuple) and _all_are(kind, cast(tuple[object, ...], value))
    )


def _all_are(kind: type, values: Iterable[object]) -> bool:
    return all(isinstance(value, kind) for value in values)


_COUNT = _Kind(
    "a whole number from 0, or None", lambda value: value is None or (type(value) is int and value >= 0)
)
_BYTES = _Kind(
    "a whole number of bytes above 0, or None",
    lambda value: value is None or (type(value) is int and value > 0),
)
_FLAG = _Kind("True or False", lambda value: isinstance(value, bool))
_MODE = _Kind('a mode of torch.compile such as "max-autotune"', lambda value: isinstance(value, str | None))
_PATTERNS = _tuple_of(Pattern, "a tuple of Pattern objects")
_NAMES = _tuple_of(str, 'a tuple of names such as ("rms_norm.llama", "rotary")')


def _option(default: Any, kind: _Kind, help: str, env: str = "") -> Any:
    """Returns a field of Options. The environment variable `env` sets its value where the option is not given."""
    return field(default=default, metadata={"kind": kind, "help": help, "env": env})


@dataclass(frozen=True)
class Options:
    """The options that a user can set. Hashable; `repr(options)` is the same in every process."""

    policy: str = _option(
        "auto",
        _one_of("auto", "always", "never"),
        "The matches to replace: those that pay, all that are proven equal, or none.",
    )
    inner: str = _option(
        "inductor",
        _one_of("inductor", "aot_eager", "eager", "report"),
        "The compiler of the rewritten graph. 'aot_eager' and 'eager' are for debugging. Under 'report' the rewritten "
        "graph runs without a compiler, and the report is that of 'inductor'.",
    )
    mode: str | None = _option(
        None,
        _MODE,
        "The mode of torch.compile. torch.compile accepts either mode or options; with options, give the mode here.",
    )
    patterns: tuple[Pattern, ...] = _option(
        (), _PATTERNS, "Patterns for this compilation, in addition to the registered patterns."
    )
    skip: tuple[str, ...] = _option(
        (),
        _NAMES,
        'Patterns and passes to leave out: a name, all patterns of an op ("rotary"), or all passes over backward '
        '("backward").',
    )
    fuel: int | None = _option(
        None,
        _COUNT,
        "The number of rewrites in a graph after which the rewriter stops, first in forward, then in backward; to "
        "bisect a difference.",
        env="LIGER_FUEL",
    )
    loss_memory: int | None = _option(
        None,
        _BYTES,
        "The memory for a chunk of logits in linear_cross_entropy and linear_softmax, which then keeps no logits for "
        "backward. Less memory costs time. None selects a default.",
    )
    logits: str = _option(
        "auto",
        _one_of("auto", "lazy", "eager", "none"),
        "Logits that are returned beside their loss: 'auto' computes them on the first read, 'eager' computes them in "
        "the compiled graph, 'none' returns None instead. 'lazy' is 'auto' for logits without a loss in the graph too, "
        "and where gradients are off.",
    )
    recompute: str = _option(
        "auto",
        _one_of("auto", "off"),
        "'auto' recomputes the results of norms and activations in backward instead of keeping them; 'off' leaves the "
        "choice to Inductor.",
    )
    padding: str = _option(
        "auto",
        _one_of("auto", "general"),
        "'auto' compiles a specialization for calls without padding, or with causal masks, and a generic graph for "
        "other calls; 'general' compiles one graph for all calls.",
    )
    rows: str = _option(
        "all",
        _one_of("auto", "all"),
        "The rows of a padded batch that are computed: 'auto' leaves out padding without a label where all operations "
        "are proven row-wise, and compiles one graph for the first number of live rows and one for all others; outputs "
        "with all rows are computed on the first read. 'all', the default, computes every row.",
    )
    backward_passes: str = _option(
        "auto",
        _one_of("auto", "always", "never"),
        "Passes over the graph of backward: on GPUs, on every device (for debugging), or on none.",
    )
    outline: str = _option(
        "off",
        _one_of("auto", "off"),
        "'auto' compiles equal layers once and calls the result for each of them: a shorter first step. The default is "
        "'off', because a step that the CPU launches takes longer: 1.2 times for a small GPT-2.",
    )
    strict: bool = _option(
        False,
        _FLAG,
        "Raise if the rewriter fails, instead of compiling the captured graph unchanged with a warning.",
    )

    @property
    def compiler(self) -> str:
        """The compiler of the rewritten graph, by its name in torch."""
        return "eager" if self.inner == "report" else self.inner

    @property
    def reported_inner(self) -> str:
        """The compiler that the report describes."""
        return "inductor" if self.inner == "report" else self.inner

    def skips(self, name: str) -> bool:
        """Returns whether `skip` names this pattern or pass, or its op: "rms_norm" is the op of "rms_norm.llama"."""
        return name in self.skip or name.partition(".")[0] in self.skip

    def notes_on_skip(self, known: Iterable[str]) -> list[str]:
        """A sentence for each name in `skip` that is neither a known pattern or pass nor a group of them."""
        names = {part for name in known for part in (name, name.partition(".")[0])}
        unknown = [name for name in self.skip if name not in names]
        close = {name: difflib.get_close_matches(name, sorted(names), n=1) for name in unknown}
        return [
            f"liger.skip names {name!r}, which is no pattern and no pass"
            + (f"; did you mean {close[name][0]!r}?" if close[name] else "")
            for name in unknown
        ]


_FIELDS: Mapping[str, Field[Any]] = {PREFIX + option.name: option for option in fields(Options)}


def parse(mode: str | None, options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Splits the arguments of torch.compile into ours and Inductor's. Raises ValueError for an invalid one of ours."""
    ours = {key: value for key, value in (options or {}).items() if key.startswith(PREFIX)}
    inductors = {key: value for key, value in (options or {}).items() if key not in ours}

    chosen = _from_environment()
    for key, value in ours.items():
        if key not in _FIELDS:
            raise ValueError(_unknown(key))
        value = tuple(cast(list[Any], value)) if isinstance(value, list) else value
        chosen[_FIELDS[key].name] = _validated(f"option {key!r}", value, _FIELDS[key])

    if mode is not None and chosen.get("mode") not in (None, mode):
        raise ValueError(f"mode={mode!r} and liger.mode={chosen['mode']!r} differ; give one of the two")
    chosen["mode"] = chosen.get("mode") or mode
    return Options(**chosen), inductors


class Description(NamedTuple):
    """An option in words: its key, default (as `repr`), accepted values and effect."""

    key: str
    default: str
    accepts: str
    effect: str


def descriptions() -> list[Description]:
    """Returns the options in words, in order."""
    described: list[Description] = []
    for key, option in _FIELDS.items():
        kind, text, env = (option.metadata[name] for name in ("kind", "help", "env"))
        effect = f"{text} Environment: {env}." if env else text
        described.append(Description(key, repr(option.default), kind.accepts, effect))
    return described


def describe() -> str:
    """Returns the options as text, two lines each."""
    return "\n".join(
        f"{option.key}: {option.accepts}; default {option.default}.\n    {option.effect}"
        for option in descriptions()
    )


def _from_environment() -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for option in _FIELDS.values():
        variable = option.metadata["env"]
        text = os.environ.get(variable) if variable else None
        if text:
            value = int(text) if text.isdecimal() else text
            chosen[option.name] = _validated(f"environment variable {variable}", value, option)
    return chosen


def _validated(where: str, value: Any, option: Field[Any]) -> Any:
    kind: _Kind = option.metadata["kind"]
    if kind.contains(value):
        return value
    raise ValueError(
        f"{where}: expected {kind.accepts}, got {value!r}; "
        f"pass an accepted value, or leave it out for the default, {option.default!r}"
    )


def _unknown(key: str) -> str:
    names = [option.name for option in fields(Options)]
    close = difflib.get_close_matches(key.removeprefix(PREFIX), names, n=1)
    advice = f"did you mean {PREFIX + close[0]!r}?" if close else "use one of the options below."
    return f"unknown option {key!r}; {advice}\n{describe()}"
