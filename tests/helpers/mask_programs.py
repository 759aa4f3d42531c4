"""Random masks as Python expressions of their size n, what is proven of them, and whether that is so.

An expression is a string, so that what Hypothesis shrinks a fault to can be read and run. It is traced on fake tensors,
by the tables that graphs go through, and evaluated on real ones.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from liger_compile.terms import identities, normalize
from liger_compile.terms.build import Recorder
from liger_compile.terms.indices import HIDES, Meaning, mask_meaning
from liger_compile.terms.term import Size, Space, Term, size_of
from liger_compile.torch_internals.fake_tensors import FakeTensorMode

# Expressions


def _filled(template: str, **parts: Any) -> st.SearchStrategy[str]:
    return st.builds(lambda **drawn: template.format(**drawn), **parts)


def _any_of(*templates: str, **parts: Any) -> st.SearchStrategy[str]:
    return st.sampled_from(templates).flatmap(
        lambda template: _filled(
            template, **{n: each for n, each in parts.items() if "{" + n + "}" in template}
        )
    )


_SMALL = st.sampled_from(("0", "1", "2", "-1", "3", "-2"))
_WHOLE = st.one_of(
    _SMALL, st.sampled_from(("127", "250", "2045", "-255", "2**24 - 3", "2**31 - 4", "-(2**31)", "16", "n"))
)
_NUMBER = st.one_of(_SMALL, st.sampled_from(("0.5", "1.0", "0.999", "1e-50", "0.1", "-0.5", "255.5", "1e30")))
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
_FLOATS = ("float32", "bfloat16", "float16", "float64")
_DTYPE = st.sampled_from([f"torch.{name}" for name in (*_INTEGERS, *_FLOATS)])
_FLOAT = st.sampled_from([f"torch.{name}" for name in _FLOATS])
_COMPARED = st.sampled_from((">=", "<=", ">", "<", "==", "!="))

_FIRST_POSITIONS = _any_of(
    "torch.arange(n)",
    "torch.arange(n)",
    "torch.arange(n, dtype={d})",
    "torch.arange({c}, end=n + {c})",
    "torch.arange(start={c}, end=n + {c})",
    "torch.arange({c}, n + {c})",
    "torch.arange(end=n)",
    "torch.arange(0, 2 * n, step=2)",
    "torch.arange(n - 1, -1, -1)",
    "torch.arange(0.0, n)",
    "torch.arange(2 * n)[n:]",
    "torch.arange(64 + n)[-n:]",
    "torch.ones(n, dtype={d}).cumsum(0)",
    c=_SMALL,
    d=_DTYPE,
)


def _more_positions(inner):
    return _any_of(
        *("({p} + {c})", "({p} - {c})", "({p} * {c})", "({c} - {p})", "(-{p})", "{p}.abs()", "{p}.to({d})"),
        *(
            "{p}.to({d})",
            "({p} // {s})",
            "({p} % {s})",
            "({p} / {s})",
            "{p}.flip(0)",
            "{p}.roll(1)",
            "{p}[{q}]",
        ),
        *("{p}.cumsum(0)", "({p} {o} {s}).long().cumsum(0)[-1:].expand(n)", "({p} {o} {s}).cumsum(0)"),
        *("torch.diff({p}, prepend={p}[:1] - {s})", "torch.where({p} {o} {s}, {p}, {s})"),
        *("{p}.masked_fill({p} {o} {s}, {s})", "torch.cat(({p}[:1], {p}))[:n]", "F.pad({p}, (1, 0))[:n]"),
        *("({p} + {q})", "({p} - {q})", "({p} * {q})", "{p}.narrow(0, -1, 1)", "{p}[-1:]", "{p}[:1]"),
        *("torch.add({p}, {q}, alpha=2)", "{p}.clamp(min=0)"),
        p=inner,
        q=inner,
        c=_WHOLE,
        s=_SMALL,
        d=_DTYPE,
        o=_COMPARED,
    )


POSITIONS = st.recursive(_FIRST_POSITIONS, _more_positions, max_leaves=3)
# Mostly the same positions for queries and keys, in one or in two spellings: else few masks mean anything.
_PAIRS = st.one_of(
    POSITIONS.map(lambda p: (p, p)),
    st.tuples(_FIRST_POSITIONS, _FIRST_POSITIONS),
    POSITIONS.flatmap(
        lambda p: st.tuples(st.just(p), _FIRST_POSITIONS.map(lambda q: p.replace("torch.arange(n)", q)))
    ),
)
_COMPARISONS = st.builds(
    lambda pair, o, c: f"({pair[0]}[:, None] {o} {pair[1]}[None, :]{c})",
    _PAIRS,
    st.sampled_from((">=", ">=", ">=", "<=", ">", "<", "==", "!=")),
    st.sampled_from(("", "", "", " + 1", " - 1", " - 3", " + 0.0")),
)
_CAUSAL = st.sampled_from(
    (
        "torch.ones(n, n, dtype=torch.bool).tril()",
        "(torch.arange(n)[:, None] >= torch.arange(n))",
        "~torch.ones(n, n, dtype=torch.bool).triu(1)",
    )
)
_ONE_SIDED = (
    _any_of(  # conditions of queries or of keys, that hold for all or for none if they are to mean anything
        *("({p} {o} {s})[:, None]", "({p} {o} {s})[None, :]", "({v}.long().cumsum(0)[{at}] {o} {s})"),
        *("({v}.cumsum(0) {o} {s})[None, :]", "(torch.ones(n, dtype={d}) * {h} {o} {h})[None, :]"),
        p=POSITIONS,
        v=_filled("({p} {o} {s})", p=_FIRST_POSITIONS, o=_COMPARED, s=_SMALL),
        at=st.sampled_from(("-1:", ":1", "-1:, None", "None, :")),
        d=_DTYPE,
        o=_COMPARED,
        s=_SMALL,
        h=_NUMBER,
    )
)
_NEARLY_CAUSAL = _any_of(
    *(
        "({m} & {v})",
        "({m} | {v})",
        "({m}.to({d}) {o} {f})",
        "((~{m}).to({d}) {o} {f})",
        "({m}.to({d}) {o} {f})",
    ),
    m=_CAUSAL,
    v=_ONE_SIDED,
    d=_DTYPE,
    o=_COMPARED,
    f=st.sampled_from(("0.999", "0.5", "0", "1", "1e-3", "1.001", "1e-50", "0.1")),
)
_TRIANGLES = _any_of(
    "torch.ones(n, n, dtype=torch.bool).tril()",
    "torch.ones(n, n, dtype=torch.bool).tril({c})",
    "torch.ones(n, n, dtype=torch.bool).triu({c})",
    "torch.ones(2 * n, 2 * n, dtype=torch.bool).tril()[n:, n:]",
    "(torch.ones(n, n, dtype={d}).tril() {o} {f})",
    "(torch.full((n, n), {f}, dtype={d}).tril() {o} {f})",
    "torch.ones(n, n, dtype=torch.bool)",
    c=_SMALL,
    d=_DTYPE,
    o=_COMPARED,
    f=_NUMBER,
)


def _more_masks(inner):
    return _any_of(
        *("({m} & {w})", "({m} & {w})", "({m} | {w})", "(~{m})", "({m} ^ {w})", "({m} * {w})", "({m} + {w})"),
        *("{m}.logical_not()", "torch.logical_and({m}, {w})", "torch.where({m}, {w}, {m})", "{m}.t()"),
        *("{m}.masked_fill({w}, False)", "{m}.masked_fill({w}, True)", "{m}.flip(0)", "{m}.to({d}).bool()"),
        *("({m}.to({d}) {o} {f})", "({m}.to({d}) * {f} {o} {f})", "({m}.to({d}) + {f} {o} {f})", "{m}[:1]"),
        *("((1 - {m}.to({d})) {o} {f})", "(-{m}.to({d})).long().bool()", "((-{m}.to({d})).to({e}) {o} {f})"),
        *("({m}.cumsum(-1) {o} {s})", "({m}.to({d}).tril({s}) != 0)", "{m}[None].expand(2, n, n)"),
        *("{m}[:, :1]", "F.pad({m}[1:, 1:], (1, 0, 1, 0), value=True)", "torch.cat(({m}[:1], {m}[1:]))"),
        *("({m} {o} {w})", "(({m}.to({d}) + {f} - {f}) {o} {f})"),
        m=inner,
        w=inner,
        d=_DTYPE,
        e=_DTYPE,
        o=_COMPARED,
        f=_NUMBER,
        s=_SMALL,
    )


TRUTHS = st.recursive(
    st.one_of(_COMPARISONS, _TRIANGLES, _NEARLY_CAUSAL, _NEARLY_CAUSAL), _more_masks, max_leaves=3
)

_FILL = st.sampled_from(
    (
        *("float('-inf')", "float('-inf')", "torch.finfo(torch.float32).min"),
        *("torch.finfo(torch.bfloat16).min", "-1e30", "-1e38", "-1e4", "-65504.0"),
        *("-1e31", "-1e9", "float('nan')", "float('inf')", "-1e300"),
    )
)
_SCALE = st.sampled_from(("1e-40", "0.5", "2.0", "1e-30", "1e30", "0.0", "-1.0", "1e-50", "10.0", "1e4"))
_FIRST_FLOATS = _any_of(
    *("torch.where({m}, 0.0, {f})", "torch.where({c}, 0.0, {f})", "torch.zeros(n, n).masked_fill(~{c}, {f})"),
    *("torch.where({m}, 0.0, {f})", "torch.where({m}, torch.tensor(0.0, dtype={d}), {f})"),
    *("torch.zeros(n, n, dtype={d}).masked_fill(~{m}, {f})", "((1.0 - {m}.to({d})) * {f})"),
    *("torch.full((n, n), {f}, dtype={d}).triu(1)", "torch.zeros(n, n, dtype={d})"),
    "torch.full((n, n), {f}, dtype={d}).masked_fill({m}, 0)",
    m=TRUTHS,
    c=_CAUSAL,
    d=_FLOAT,
    f=_FILL,
)


def _more_floats(inner):
    return _any_of(
        *(
            "({a} * {x})",
            "({a} / {x})",
            "({a} + {b})",
            "{a}.to({d})",
            "({a} + {x} - {x})",
            "({a} * {x} * {y})",
        ),
        *("({a} * {b})", "torch.where({a} == 0, {a}, {f})", "(-{a})", "{a}.triu(1)", "{a}.clamp(min=-1e4)"),
        a=inner,
        b=inner,
        x=_SCALE,
        y=_SCALE,
        d=_FLOAT,
        f=_FILL,
    )


ADDED = st.recursive(_FIRST_FLOATS, _more_floats, max_leaves=2)
MASKS = st.one_of(TRUTHS, TRUTHS, ADDED)

# Documents: d is a row of n integers that only the call knows.
IDS = st.recursive(
    st.sampled_from(
        (
            *("d", "d", "d", "(torch.diff(d, prepend=d[:1] - 1) != 1).cumsum(0)", "(d == 0).cumsum(0)"),
            *("(torch.arange(n) // 2)", "torch.arange(n)", "(torch.diff(d, prepend=d[:1]) != 1).cumsum(0)"),
        )
    ),
    lambda inner: _any_of(
        *("({i} + {c})", "({i} - {c})", "({i} * {c})", "(-{i})", "{i}.to({d})", "{i}.flip(0)", "{i}.roll(1)"),
        *(
            "({i} // {s})",
            "({i} + torch.arange(n))",
            "({i} - {j})",
            "({i} {o} {s}).cumsum(0)",
            "{i}.cumsum(0)",
        ),
        *(
            "torch.where({i} {o} {s}, {i}, {s})",
            "torch.diff({i}, prepend={i}[:1] - 1)",
            "{i}[torch.arange(n)]",
        ),
        *(
            "torch.cat(({i}, {i}))[1 : n + 1]",
            "{i}.clamp(min=1)",
            "(torch.diff({i}, prepend={i}[:1]) != 1).cumsum(0)",
        ),
        i=inner,
        j=inner,
        c=_WHOLE,
        s=_SMALL,
        d=_DTYPE,
        o=_COMPARED,
    ),
    max_leaves=2,
)
_SAME = st.one_of(
    IDS.map(lambda i: f"({i}[:, None] == {i}[None, :])"),
    IDS.map(lambda i: f"({i}[:, None] - {i}[None, :] == 0)"),
    st.builds(lambda i, j, o: f"({i}[:, None] {o} {j}[None, :])", IDS, IDS, _COMPARED),
    st.builds(lambda i, c: f"({i}[:, None] + {c} == {i}[None, :] + {c})", IDS, _WHOLE),
)
_POSITIONS_OF_DOCUMENTS = st.sampled_from(
    (
        *("(d[None, :] <= d[:, None])", "(d[None, :] < d[:, None] + 1)", "(d[None, :] > d[:, None] - 2)"),
        *("(d[None, :] - d[:, None] <= 0)", "(d.int()[None, :] <= d.int()[:, None])", "(d[None, :] < 2)"),
    )
)
_BY_POSITIONS = _any_of(  # as transformers, and nearly so
    "({m} & (({f} {o} {s}).cumsum(0)[:, None] == ({f} {o} {s}).cumsum(0)))",
    "(({f} != 1).cumsum(0)[:, None] == ({f} != 1).cumsum(0)) & {m}",
    m=st.one_of(_POSITIONS_OF_DOCUMENTS, st.builds("({} & {})".format, *(2 * (_POSITIONS_OF_DOCUMENTS,)))),
    f=st.sampled_from(
        (
            *("torch.diff(d, prepend=d[:1] - 1)", "torch.diff(d, prepend=d[:1])"),
            *("torch.diff(d, prepend=d[:1] - 1)", "torch.diff(2 * d, prepend=d[:1])", "d"),
        )
    ),
    o=_COMPARED,
    s=_SMALL,
)
# Padding: flags of keys, made of d.
_FLAGS = _any_of(
    *(
        "(d != {s})",
        "(d == {s})",
        "(d {o} {s})",
        "d.bool()",
        "~d.bool()",
        "({i} {o} {s})",
        "d.to({e}).bool()",
    ),
    *(
        "(1 - d).bool()",
        "torch.where(d {o} {s}, True, False)",
        "(d > 0).float().bool()",
        "d.clamp(min=0).bool()",
    ),
    *(
        "(d.float() {o} {s})",
        "({i} {o} {i})",
        "(d[:1] {o} {s})",
        "(d[-1:] == d)",
        "d.bool().cumsum(0).bool()",
    ),
    i=IDS,
    s=_SMALL,
    o=_COMPARED,
    e=_DTYPE,
)
PADDED = _any_of(
    *(
        "({m} & {f}[None, :])",
        "({f} & {m})",
        "({f}[None, :] & {m})",
        "~(~{m} | ~{f}[None, :])",
        "({m} & {f}[:, None])",
    ),
    *(
        "torch.where({m} & {f}[None, :], 0.0, {x})",
        "((1.0 - ({m} & {f}).float()) * {x})",
        "({m} & {f} & {g})",
    ),
    *("{f}[None, :].expand(n, n)", "({m} | {f})", "{m}.masked_fill(~{f}, False)", "({m} & {s} & {f})"),
    *(
        "torch.where({m}, 0.0, {x}) + torch.where({f}, 0.0, {x})",
        "({m} & torch.roll({f}, 1))",
        "({m} & {f}.flip(0))",
    ),
    m=st.one_of(_CAUSAL, _CAUSAL, _COMPARISONS, _POSITIONS_OF_DOCUMENTS, TRUTHS),
    f=_FLAGS,
    g=_FLAGS,
    s=_SAME,
    x=_FILL,
)

DOCUMENTS = st.one_of(
    _BY_POSITIONS,
    _any_of(
        *("({m} & {s})", "({s} & {m})", "({m} & {s})", "~(~{m} | ~{s})", "({m} | {s})", "({m} & {s} & {t})"),
        *(
            "{s}",
            "torch.where({m} & {s}, 0.0, float('-inf'))",
            "((1.0 - ({m} & {s}).float()) * -1e38)",
            "({m} & ~{s})",
        ),
        m=st.one_of(_CAUSAL, _CAUSAL, _COMPARISONS, _POSITIONS_OF_DOCUMENTS, TRUTHS),
        s=_SAME,
        t=st.one_of(_SAME, _POSITIONS_OF_DOCUMENTS, TRUTHS),
    ),
)

# Scores of queries and keys on their way to a softmax
_SCORES = st.recursive(
    st.just("(q @ k.mT)"),
    lambda inner: _any_of(
        *("({s} * {x})", "({s} / {x})", "({s} + {a})", "{s}.masked_fill(~{m}, {f})", "({a} + {s})"),
        *("torch.where({m}, {s}, {f})", "{s}.to({d})", "torch.tanh({s})", "({s} * torch.tensor({x}))"),
        *("{s}.masked_fill(~{m}, torch.tensor({f}))", "({s} + {m})", "({s} * {m})"),
        s=inner,
        x=_SCALE,
        a=ADDED,
        m=_TRIANGLES,
        f=_FILL,
        d=_FLOAT,
    ),
    max_leaves=3,
)
ATTENTION = _filled("torch.softmax({s}, -1).to(v.dtype) @ v", s=_SCORES)

# What they give, and what is proven


def evaluated(expression: str, n: Any, **values: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return eval(expression, {"torch": torch, "F": F, "n": n, **values})


def rows_of(n: int) -> tuple[torch.Tensor, ...]:
    """Rows of n integers: positions that begin again, ids that recur, one id, and numbers where arithmetic ends.

    No row has positions at the ends of 64 bits, since positions are assumed not to wrap around; twice an id may.
    """
    generator = torch.Generator().manual_seed(n)
    few = torch.randint(0, 3, (n,), generator=generator)
    ends = torch.tensor([2**62, -(2**62), 2**31 - 1, -(2**31), 2**53, 2**53 + 1, 0, 255, -1])
    return (
        torch.arange(n) % 4,
        few,
        few.sort().values,
        torch.ones_like(few),
        ends[few * 3 + torch.arange(n) % 3],
    )


def is_a_mask(expression: str, sizes: tuple[int, ...], **values: Any) -> bool:
    """Whether eager code can compute it of these sizes, and it is one."""
    try:
        shapes = [
            evaluated(expression, n, **{name: value(n) for name, value in values.items()}).shape[-2:]
            for n in sizes
        ]
    except (RuntimeError, IndexError, TypeError, ValueError, OverflowError):
        return False
    return all(size in (1, n) for n, shape in zip(sizes, shapes, strict=True) for size in shape)


@dataclass(frozen=True)
class Traced:
    """An expression of one size, or of a symbolic one, and what it computes."""

    space: Space
    term: Term
    size: Size
    value: torch.Tensor
    recorder: Recorder


def traced(expression: str, n: int | None, **values: torch.Tensor) -> Traced:
    """The term of an expression of size n, or of a symbolic size where n is None."""
    space, recorder, size, mode = identities.new_space(), None, n, contextlib.nullcontext()
    if n is None:
        env = ShapeEnv()
        symbol = env.create_symbol(7, ConstantSource("n"), DimDynamic.DYNAMIC)
        size = env.create_symintnode(symbol, hint=7, source=ConstantSource("n"))
        space.shape_env, mode = env, FakeTensorMode(shape_env=env)
    recorder = Recorder(space)
    with mode, recorder:
        if n is None and "d" in values:
            values = {**values, "d": torch.empty(size, dtype=torch.int64)}
        for value in values.values():
            recorder.value_of(value)
        value = evaluated(expression, size, **values)
        term = recorder.value_of(value)
    return Traced(space, term, size_of(size), value, recorder)


def proven(expression: str, n: int | None) -> Meaning:
    """What the mask means, of size n or of all sizes."""
    mask = traced(expression, n)
    return mask_meaning(mask.space, mask.term, mask.size, mask.size)


def lets_through(meaning: Meaning, n: int) -> torch.Tensor:
    """The mask of this meaning."""
    mask = torch.ones(n, n, dtype=torch.bool)
    if meaning.kind == "all":
        return mask
    mask = mask.tril()
    return mask if meaning.kind == "causal" else mask.triu(1 - int(meaning.window))


def assert_is_so(expression: str, meaning: Meaning, n: int) -> None:
    """That the mask of size n is what it was proven to be: hidden entries are as low as no score is."""
    mask = evaluated(expression, n)
    expected = lets_through(meaning, n).expand(torch.broadcast_shapes(mask.shape, (n, n)))
    if mask.dtype is torch.bool:
        assert torch.equal(mask.expand_as(expected), expected), f"{expression} for n = {n}: {meaning}"
        return
    seen, hidden = mask.expand_as(expected)[expected], mask.expand_as(expected)[~expected]
    assert bool((seen == 0).all()), f"{expression} for n = {n} adds to what is seen: {meaning}"
    assert bool((hidden.double() <= HIDES * 0.99).all()), f"{expression} for n = {n} lets through: {meaning}"


def tried(expression: str, sizes: tuple[int, ...]) -> set[str]:
    """Compares what is proven of each size, and of all, with the masks themselves. Returns the proven kinds."""
    kinds = set()
    for n in sizes:
        meaning = proven(expression, n)
        if meaning.kind != "unknown":
            kinds.add(meaning.kind)
            assert_is_so(expression, meaning, n)
    if kinds:
        with contextlib.suppress(
            RuntimeError, TypeError, ValueError
        ):  # not all operators take symbolic sizes
            meaning = proven(expression, None)
            for n in sizes if meaning.kind != "unknown" else ():
                if n > 1:  # a symbolic size is at least 2
                    assert_is_so(expression, meaning, n)
    return kinds


def tried_of_documents(expression: str, sizes: tuple[int, ...]) -> set[str]:
    """Compares what is proven of masks of documents, of each size and of all, with the masks of several rows."""
    kinds = set()
    for n in sizes:
        for d in rows_of(n):
            found = traced(expression, n, d=d)
            meaning = mask_meaning(found.space, found.term, found.size, found.size)
            if meaning.keys is not None and (at := _place(found, meaning)) is not None:
                assert not bool((_seen(found.value, n) & ~_flags(found, meaning, at, n)).any()), (
                    f"{expression}, {d}"
                )
                kinds.add("keys")
            if meaning.kind == "unknown":
                break
            kinds.add(meaning.kind)
            _assert_documents(expression, meaning, n, d, _place(found, meaning))
    if kinds:
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            found = traced(expression, None, d=rows_of(2)[0])
            meaning = mask_meaning(found.space, found.term, found.size, found.size)
            for n in sizes if meaning.kind != "unknown" else ():
                for d in rows_of(n) if n > 1 else ():
                    _assert_documents(expression, meaning, n, d, _place(found, meaning))
    return kinds


def _place(found: Traced, meaning: Meaning) -> int | None:
    """Which of the tensors that a program computes are the ids, or the flags of keys or their negation.

    None if it is none of them, or there are none.
    """
    wanted = meaning.documents or meaning.keys
    if wanted is None:
        return None
    negated = (
        (normalize.apply(found.space, "not", (wanted,), (), torch.bool, wanted.shape),)
        if meaning.keys
        else ()
    )
    for at, tensor in enumerate(found.recorder.alive):
        term = found.recorder.values[id(tensor)]
        if not isinstance(term, Term) or len(term.shape) > 2:
            continue
        is_row = term.shape in ((found.size,), (1, found.size))
        row = normalize.view(found.space, term, 1, found.size) if is_row else term
        if row is wanted or row in negated:
            return at
    return None


def _flags(found: Traced, meaning: Meaning, at: int, n: int) -> torch.Tensor:
    """The n flags of keys."""
    flags = found.recorder.alive[at].reshape(-1).expand(n)
    term = found.recorder.values[id(found.recorder.alive[at])]
    is_negated = (term.op == "not") != (meaning.keys.op == "not")
    return ~flags if is_negated else flags


def _seen(mask: torch.Tensor, n: int) -> torch.Tensor:
    """Where a mask lets through."""
    seen = mask if mask.dtype is torch.bool else mask > HIDES * 0.99
    return seen.expand(torch.broadcast_shapes(mask.shape, (n, n)))


def _assert_documents(expression: str, meaning: Meaning, n: int, d: torch.Tensor, at: int | None) -> None:
    """That the mask lets through what its meaning does, of these integers."""
    found = traced(expression, n, d=d)
    mask = found.value
    expected = lets_through(Meaning(meaning.within or meaning.kind, window=meaning.window), n)
    if meaning.documents is not None:
        if at is None:
            return
        ids = found.recorder.alive[at]
        expected = expected & (ids[:, None] == ids)
    if meaning.keys is not None:
        if at is None:
            return
        expected = expected & _flags(found, meaning, at, n)
    shape, seen = torch.broadcast_shapes(mask.shape, (n, n)), _seen(mask, n)
    expected = expected.expand(shape)
    if mask.dtype is not torch.bool:
        assert bool((mask.expand(shape)[expected] == 0).all()), (
            f"{expression} for n = {n}, d = {d}: {meaning}"
        )
    assert torch.equal(seen, expected), f"{expression} for n = {n}, d = {d}: {meaning}"


# Attention


def is_attention(expression: str, sizes: tuple[int, ...]) -> bool:
    """Whether eager code can compute it of these sizes."""
    try:
        for n in sizes:
            row = torch.zeros(1, 1, n, 4)
            values = torch.eye(n)[None, None]
            if evaluated(expression, n, q=row, k=row, v=values).shape != values.shape:
                return False
    except (RuntimeError, IndexError, TypeError, ValueError, OverflowError):
        return False
    return True


def attended(expression: str, n: int) -> str:
    """The term of the mask that is proven of attention that is written out; nothing where it stays as it is.

    Traces attention that is written out, and compares its weights with those of the mask that is proven.

    The values are the identity, so that the result is the weights: those of hidden keys have to be zero, and no less.
    """
    generator = torch.Generator().manual_seed(n)
    q, k = (torch.randn(1, 1, n, 4, generator=generator) / 4 for _ in range(2))
    found = traced(expression, n, q=q, k=k, v=torch.eye(n)[None, None])
    term, weights = found.term, found.value[0, 0]
    kind = term.args[0].op if term.op == "attention" else ""
    if kind not in _SEEN:
        return ""
    seen = lets_through(Meaning(_SEEN[kind], window=(*term.args[0].consts, None)[0]), n)
    assert bool((weights[~seen] == 0).all()), f"{expression} for n = {n} sees what {term} hides"
    _, _, scale, *cap = term.consts
    scale = 0.5 if scale is None else scale
    if abs(scale) < 100 and not cap:
        expected = (q @ k.mT * scale)[0, 0].masked_fill(~seen, -torch.inf).softmax(-1)
        assert torch.allclose(weights, expected, atol=0.02), f"{expression} for n = {n} is not {term}"
    return kind


_SEEN = {"causal_mask": "causal", "no_mask": "all", "window_mask": "window"}
