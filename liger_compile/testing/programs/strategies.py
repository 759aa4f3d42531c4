"""Hypothesis strategies for programs. They shrink to fewer statements, latest operands, plain constants and calls."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from liger_compile.testing.programs.differential import OUTPUT_ACTIONS, STEPS
from liger_compile.testing.programs.grammar import CONSTANTS, PARAMETERS, RARE_CONSTANTS, TEMPLATES, Template
from liger_compile.testing.programs.program import Call, Program, Statement

_CONSTANTS = [i for i in range(len(CONSTANTS)) for _ in range(4)] + [
    len(CONSTANTS) + i for i in range(len(RARE_CONSTANTS))
]
_AGO = st.sampled_from((0, 0, 0, 0, 1, 1, 2, 3))


def _statements(is_wanted: Callable[[str, Template], bool]) -> st.SearchStrategy[Statement]:
    """Returns statements of the wanted templates, as often as their weights."""
    names = [
        name
        for name, template in TEMPLATES.items()
        if is_wanted(name, template)
        for _ in range(template.weight)
    ]
    return st.builds(Statement, st.sampled_from(names), st.tuples(_AGO, _AGO), st.sampled_from(_CONSTANTS))


_any = _statements(lambda name, template: True)
_trunk = _statements(
    lambda name, template: template.takes[:1] in ((), ("hidden",)) and template.gives != "logits"
)
_head = _statements(lambda name, template: template.takes == ("hidden",) and template.gives == "logits")
_logits = _statements(
    lambda name, template: template.takes == ("logits",) and template.gives in ("logits", "")
)
_loss = _statements(lambda name, template: template.takes == ("logits",) and template.gives == "scalar")

# A language model, random statements, or both.
_model = st.tuples(
    st.lists(_trunk, max_size=6), _head, st.lists(_logits, max_size=2), _loss, st.lists(_any, max_size=4)
)
statements = st.one_of(
    _model.map(lambda parts: (*parts[0], parts[1], *parts[2], parts[3], *parts[4])),
    st.lists(_any, min_size=1, max_size=12).map(tuple),
)

calls = st.builds(
    Call,
    length=st.sampled_from((3, 3, 3, 4, 4, 5, 1, 0)),
    mode=st.sampled_from(("grad",) * 8 + ("no_grad", "inference", "autocast", "autocast")),
    labels=st.sampled_from(("some",) * 5 + ("all",)),
    mask=st.sampled_from(("ones", "ones", "padded")),
    before_backward=st.lists(
        st.tuples(st.sampled_from(tuple(OUTPUT_ACTIONS)), st.integers(0, 3)), max_size=2
    ).map(tuple),
    roots=st.sampled_from((0, 0, 0, 1, 2, 3, 7, 15)),
    upstream=st.sampled_from(("random",) * 10 + ("inf", "zero")),
    after_backward=st.sampled_from(("nothing", "nothing", "nothing", *STEPS)),
)

programs = st.builds(
    Program,
    statements=statements,
    outputs=st.lists(st.integers(0, 5), min_size=1, max_size=5).map(tuple),
    views=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    dtype=st.sampled_from(("float32",) * 4 + ("bfloat16", "float16")),
    batch=st.sampled_from((2, 2, 2, 2, 1, 0)),
    frozen=st.lists(st.sampled_from(("x", *PARAMETERS)), max_size=3, unique=True).map(tuple),
    is_tied=st.sampled_from((False, False, False, True)),
    dynamic=st.sampled_from((None, None, None, None, None, True)),
    calls=st.lists(calls, min_size=1, max_size=3).map(tuple),
)
