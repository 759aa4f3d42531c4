"""Formats a Difference as a sentence for the author of a model: terms as formulas, with the standard names.

The sentence states the found and the expected computation, from the terms that differ. Terms record neither the name of
a computation nor the reason why it is not the expected one; the table FACTS at the end of this file adds both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from liger_compile.diagnose.compare import Difference
from liger_compile.diagnose.formula import Formula
from liger_compile.diagnose.roundings import Moved
from liger_compile.terms.term import Scalar, Term

TOLD = 2  # most differences in one sentence


def telling(differences: Sequence[Difference], formula: Formula) -> Sequence[Difference]:
    """Returns the differences that have a fact in FACTS, or all of them if none has."""
    return [each for each in differences if _fact(each, formula)] or differences


def sentence(differences: Sequence[Difference], formula: Formula) -> str:
    """Returns the text of the differences, with their facts."""
    facts = [(_general(each, formula), _fact(each, formula)) for each in differences]
    return _joined([f"{general}: {fact}" if fact else general for general, fact in facts])


def rounding_sentence(different: Sequence[Moved]) -> str:
    """Returns the text of the values that are rounded differently."""
    return "rounds elsewhere: " + _joined(list(map(_moved, different)))


def _joined(texts: Sequence[str]) -> str:
    texts = list(dict.fromkeys(texts))
    more = f"; and {len(texts) - TOLD} more" if len(texts) > TOLD else ""
    return "; ".join(texts[:TOLD]) + more


def _fact(difference: Difference, formula: Formula) -> str | None:
    return next(filter(None, (fact(difference, formula) for fact in FACTS)), None)


def _general(difference: Difference, formula: Formula) -> str:
    return _GENERAL[difference.kind](difference, formula)


# Sentences that apply to any term.


def _op(it: Difference, formula: Formula) -> str:
    return f"{formula(it.have)} is found where {formula(it.want)} is expected"


def _between(it: Difference, formula: Formula) -> str:
    return f"{_noun(it.have, formula)} is between {_noun(it.want, formula)} and {_noun(it.around, formula)}"


def _noun(term: Term, formula: Formula) -> str:
    if term.op == "mul" and len(term.args) == 1:
        return "a scaling"
    return {"add": "a sum", "mul": "a product", "where": "a mask"}.get(term.op) or formula.name(term)


def _constant(it: Difference, formula: Formula) -> str:
    op = formula.name(it.have)
    if it.name == "dims":
        return f"the {op} is taken over {_dims(it.found)}, expected over {_dims(it.expected)}"
    if op == "slice":
        return f"{formula(it.have)} is found where {formula(it.want)} is expected"
    if it.name == "shape":
        return f"its elements are in the shape {tuple(it.found)}, expected {tuple(it.expected)}"
    return f"{op} has {it.name or 'a constant'} {it.found!r}, expected {it.expected!r}"


def _dims(dims: Sequence[int]) -> str:
    return f"dimension{'s' if len(dims) > 1 else ''} {', '.join(map(str, dims))}"


def _numbers(it: Difference, formula: Formula) -> str:
    what = "scaled by" if it.want.op == "mul" else "shifted by"
    if isinstance(it.expected, Scalar):
        return f"{formula(it.have)} is {what} {it.found:g}, expected a number that float32 represents exactly"
    if it.found == -it.expected:
        return f"{formula(it.have)} has the other sign, expected {formula(it.want)}"
    return f"{formula(it.have)} is {what} {it.found:g}, expected {it.expected:g}"


def _powers(it: Difference, formula: Formula) -> str:
    return (
        f"{formula.power(it.have, it.found)} is found where {formula.power(it.want, it.expected)} is expected"
    )


def _missing(it: Difference, formula: Formula) -> str:
    if isinstance(it.expected, Scalar):
        return f"nothing is added to {formula(it.have)}, expected {formula.number(it.expected)}"
    return f"{formula(it.have)} lacks {formula.power(it.want, it.expected)}"


def _extra(it: Difference, formula: Formula) -> str:
    text = formula.power(it.have, it.found)
    if it.want.op == "add" and it.expected.powers:
        return f"{text} is added, expected a number, {formula.number(it.expected)}"
    return f"{text} is one {'addend' if it.want.op == 'add' else 'factor'} more than expected"


def _capture(it: Difference, formula: Formula) -> str:
    plain = Formula(formula.name, formula.is_call, {})
    return f"{plain(it.found)} and {plain(it.expected)} are found where {it.want.consts[0]}, one tensor, is expected"


def _rest(it: Difference, formula: Formula) -> str:
    plain = Formula(formula.name, formula.is_call, {})
    product = " * ".join(
        sorted((plain.power(*factor) for factor in it.found), key=lambda text: (len(text), text))
    )
    return (
        f"{product} is found where {it.want.consts[0]}, one tensor, is expected, and no node computes it as one value; "
        "multiply these factors first"
    )


def _moved(it: Moved) -> str:
    expected, found = it.expected, it.found
    if expected and found and expected.computed != found.computed:
        return f"{it.value} is computed in {_dtype(found.computed)}, expected in {_dtype(expected.computed)}"
    if found and found.rounded:
        instead = f"to {_dtype(expected.rounded)}" if expected and expected.rounded else "not to be"
        return f"{it.value} is rounded to {_dtype(found.rounded)}, expected {instead}"
    assert expected is not None, "one of them rounds"
    return f"{it.value} is not rounded to {_dtype(expected.rounded)}, expected to be"


def _dtype(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


_GENERAL: Mapping[str, Callable[[Difference, Formula], str]] = {
    "op": _op,
    "between": _between,
    "constant": _constant,
    "number": _numbers,
    "power": _powers,
    "missing": _missing,
    "extra": _extra,
    "capture": _capture,
    "rest": _rest,
}


# Facts: each function returns a few words about a difference, or None.

# (expected op, found op) -> the name of the found computation.
WORDS: Mapping[tuple[str, str], str] = {
    ("mean", "var"): "this is LayerNorm, which subtracts the mean first",
    ("mean", "std"): "this is LayerNorm, which subtracts the mean first",
    ("mean", "amax"): "it normalizes by the largest channel, not by the root mean square",
    ("mean", "median"): "it normalizes by a median, not by the root mean square",
    ("silu", "sigmoid"): "this is GLU, or an output gate; SwiGLU gates with x * sigmoid(x)",
    ("silu", "relu"): "this is ReGLU",
    ("silu", "tanh"): "this is a tanh gate, as of an LSTM",
    ("silu", "mish"): "this gates with Mish",
    ("gelu", "sigmoid"): "this is GLU, or an output gate; GeGLU gates with gelu(x)",
    ("gelu", "relu"): "this is ReGLU",
}


def _known_words(it: Difference, formula: Formula) -> str | None:
    if it.kind != "op" or _slope_of_gate(it, formula):
        return None
    if _is_squared(it.have, it.around):
        return f"this gates with the square of {formula.name(it.have)}"
    return WORDS.get((it.want.op, formula.name(it.have)))


def _is_squared(term: Term, around: Term) -> bool:
    return around.op == "mul" and (term, 2) in zip(around.args, around.consts[1:], strict=True)


# The definition of an op of this project, where the graph has something similar.
_DEFINITIONS: Mapping[str, str] = {
    "rotate_half": "a rotation has cat((-second_half, first_half)) there",
    "rotate_pairs": "a rotation has stack((-x[..., 1::2], x[..., ::2]), -1) there",
}


def _l2_norm(it: Difference, formula: Formula) -> str | None:
    is_square = it.have.args and it.have.args[0].op == "mul" and 2 in it.have.args[0].consts[1:]
    if it.kind == "op" and (it.want.op, it.have.op) == ("mean", "sum") and is_square:
        return "this is an L2 norm, which does not divide by the number of channels"
    return None


def _slope_of_gate(it: Difference, formula: Formula) -> str | None:
    if it.kind != "op" or it.want.op not in ("silu", "gelu") or it.have.op != "sigmoid":
        return None
    inner = it.have.args[0]
    is_scaled = inner.op == "mul" and len(inner.args) == 1 and inner.args[0] in it.around.args
    return f"this is the quick GELU, silu with a slope of {inner.consts[0].value:g}" if is_scaled else None


def _outside_the_root(it: Difference, formula: Formula) -> str | None:
    if it.kind != "power" or it.have.op != "add" or (it.expected, it.found) != (-0.5, -1):
        return None
    is_root = any(arg.op == "mul" and 0.5 in arg.consts[1:] for arg in it.have.args)
    return "eps is added to the root, not under it" if is_root else "the root is missing"


def _centered(it: Difference, formula: Formula) -> str | None:
    if it.kind != "capture":
        return None
    for term, other in ((it.found, it.expected), (it.expected, it.found)):
        if _takes_mean_off(term, other):
            return "the mean is subtracted in one of them only; LayerNorm subtracts it in both"
    return None


def _takes_mean_off(term: Any, x: Any) -> bool:
    if not isinstance(term, Term) or term.op != "add" or x not in term.args:
        return False
    others = [arg for arg in term.args if arg is not x]
    return len(others) == 1 and others[0].op == "mul" and others[0].args[0].op == "mean"


def _no_rotation(it: Difference, formula: Formula) -> str | None:
    if it.kind != "op" or it.want.op not in _DEFINITIONS:
        return None
    definition = _DEFINITIONS[it.want.op]
    joined = it.have.args[0] if it.have.op == "view" else it.have
    signs = [part.op == "mul" and part.consts[0].value < 0 for part in joined.args]
    if any(signs) or not (joined.op == "cat" or formula.name(joined) == "roll"):
        return definition
    plain = Formula(formula.name, formula.is_call, {})
    others = [plain(arg) for arg in it.around.args if arg is not it.have] if it.around.op == "mul" else []
    if len(others) > 1:
        rows = " or ".join(sorted(others))
        return f"nothing in it is negated, and whether {rows} has the signs is not known; {definition}"
    return (
        "nothing in it is negated, so pairs are mirrored instead of rotated, unless the table has the signs"
    )


FACTS: tuple[Callable[[Difference, Formula], str | None], ...] = (
    _known_words,
    _l2_norm,
    _slope_of_gate,
    _outside_the_root,
    _centered,
    _no_rotation,
)
