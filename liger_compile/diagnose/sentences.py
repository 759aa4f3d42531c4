"""Formats a Difference as a sentence for the author of a model: terms as formulas, with the standard names.

The sentence states the found and the expected computation, from the terms that differ. Terms record neither the name of
a computation nor the reason why it is not the expected one; the table FACTS at the end of this file adds both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from liger_compile.diagnose.compare import Difference
from liger_compile.diagnose.formula import Formula
from liger_compile.diagnose.roundings import Moved
from liger_compile.terms.term import Scalar, Term

SHOWN = 2  # most differences in one sentence


def reported_differences(differences: Sequence[Difference], formula: Formula) -> Sequence[Difference]:
    """Returns the differences that have a fact in FACTS, or all of them if none has."""
    return [difference for difference in differences if _fact(difference, formula)] or differences


def sentence(differences: Sequence[Difference], formula: Formula) -> str:
    """Returns the text of the differences, with their facts."""
    facts = [(_general(difference, formula), _fact(difference, formula)) for difference in differences]
    return _joined([f"{general}: {fact}" if fact else general for general, fact in facts])


def rounding_sentence(different: Sequence[Moved]) -> str:
    """Returns the text of the values that are rounded differently."""
    return "rounds elsewhere: " + _joined(list(map(_moved, different)))


def _joined(texts: Sequence[str]) -> str:
    texts = list(dict.fromkeys(texts))
    more = f"; and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return "; ".join(texts[:SHOWN]) + more


def _fact(difference: Difference, formula: Formula) -> str | None:
    return next(filter(None, (fact(difference, formula) for fact in FACTS)), None)


def _general(difference: Difference, formula: Formula) -> str:
    return _GENERAL[difference.kind](difference, formula)


# Sentences that apply to any term.


def _op(diff: Difference, formula: Formula) -> str:
    return f"{formula(diff.have)} is found where {formula(diff.want)} is expected"


def _between(diff: Difference, formula: Formula) -> str:
    return f"{_noun(diff.have, formula)} is between {_noun(diff.want, formula)} and {_noun(diff.around, formula)}"


def _noun(term: Term, formula: Formula) -> str:
    if term.op == "mul" and len(term.args) == 1:
        return "a scaling"
    return {"add": "a sum", "mul": "a product", "where": "a mask"}.get(term.op) or formula.name(term)


def _constant(diff: Difference, formula: Formula) -> str:
    op = formula.name(diff.have)
    if diff.name == "dims":
        return f"the {op} is taken over {_dims(diff.found)}, expected over {_dims(diff.expected)}"
    if op == "slice":
        return f"{formula(diff.have)} is found where {formula(diff.want)} is expected"
    if diff.name == "shape":
        return f"its elements are in the shape {tuple(diff.found)}, expected {tuple(diff.expected)}"
    return f"{op} has {diff.name or 'a constant'} {diff.found!r}, expected {diff.expected!r}"


def _dims(dims: Sequence[int]) -> str:
    return f"dimension{'s' if len(dims) > 1 else ''} {', '.join(map(str, dims))}"


def _numbers(diff: Difference, formula: Formula) -> str:
    words = "scaled by" if diff.want.op == "mul" else "shifted by"
    if isinstance(diff.expected, Scalar):
        return f"{formula(diff.have)} is {words} {diff.found:g}, expected a number that float32 represents exactly"
    if diff.found == -diff.expected:
        return f"{formula(diff.have)} has the other sign, expected {formula(diff.want)}"
    return f"{formula(diff.have)} is {words} {diff.found:g}, expected {diff.expected:g}"


def _powers(diff: Difference, formula: Formula) -> str:
    found, expected = formula.power(diff.have, diff.found), formula.power(diff.want, diff.expected)
    return f"{found} is found where {expected} is expected"


def _missing(diff: Difference, formula: Formula) -> str:
    if isinstance(diff.expected, Scalar):
        return f"nothing is added to {formula(diff.have)}, expected {formula.number(diff.expected)}"
    return f"{formula(diff.have)} lacks {formula.power(diff.want, diff.expected)}"


def _extra(diff: Difference, formula: Formula) -> str:
    text = formula.power(diff.have, diff.found)
    if diff.want.op == "add" and diff.expected.powers:
        return f"{text} is added, expected a number, {formula.number(diff.expected)}"
    return f"{text} is one {'addend' if diff.want.op == 'add' else 'factor'} more than expected"


def _capture(diff: Difference, formula: Formula) -> str:
    plain, capture = Formula(formula.name, formula.is_call, {}), diff.want.consts[0]
    return (
        f"{plain(diff.found)} and {plain(diff.expected)} are found where {capture}, one tensor, is expected"
    )


def _rest(diff: Difference, formula: Formula) -> str:
    plain = Formula(formula.name, formula.is_call, {})
    product = " * ".join(
        sorted((plain.power(*factor) for factor in diff.found), key=lambda text: (len(text), text))
    )
    return (
        f"{product} is found where {diff.want.consts[0]}, one tensor, is expected, and no node computes it as one "
        "value; multiply these factors first"
    )


def _moved(rounding: Moved) -> str:
    expected, found = rounding.expected, rounding.found
    if expected and found and expected.computed != found.computed:
        return f"{rounding.value} is computed in {_dtype(found.computed)}, expected in {_dtype(expected.computed)}"
    if found and found.rounded:
        instead = f"to {_dtype(expected.rounded)}" if expected and expected.rounded else "not to be"
        return f"{rounding.value} is rounded to {_dtype(found.rounded)}, expected {instead}"
    assert expected is not None, "one of them rounds"
    return f"{rounding.value} is not rounded to {_dtype(expected.rounded)}, expected to be"


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


def _known_words(diff: Difference, formula: Formula) -> str | None:
    if diff.kind != "op" or _slope_of_gate(diff, formula):
        return None
    if _is_squared(diff.have, diff.around):
        return f"this gates with the square of {formula.name(diff.have)}"
    return WORDS.get((diff.want.op, formula.name(diff.have)))


def _is_squared(term: Term, around: Term) -> bool:
    return around.op == "mul" and (term, 2) in zip(around.args, around.consts[1:], strict=True)


# The definition of an op of this project, where the graph has something similar.
_DEFINITIONS: Mapping[str, str] = {
    "rotate_half": "a rotation has cat((-second_half, first_half)) there",
    "rotate_pairs": "a rotation has stack((-x[..., 1::2], x[..., ::2]), -1) there",
}


def _l2_norm(diff: Difference, formula: Formula) -> str | None:
    is_square = diff.have.args and diff.have.args[0].op == "mul" and 2 in diff.have.args[0].consts[1:]
    if diff.kind == "op" and (diff.want.op, diff.have.op) == ("mean", "sum") and is_square:
        return "this is an L2 norm, which does not divide by the number of channels"
    return None


def _slope_of_gate(diff: Difference, formula: Formula) -> str | None:
    if diff.kind != "op" or diff.want.op not in ("silu", "gelu") or diff.have.op != "sigmoid":
        return None
    inner = diff.have.args[0]
    is_scaled = inner.op == "mul" and len(inner.args) == 1 and inner.args[0] in diff.around.args
    return f"this is the quick GELU, silu with a slope of {inner.consts[0].value:g}" if is_scaled else None


def _outside_the_root(diff: Difference, formula: Formula) -> str | None:
    if diff.kind != "power" or diff.have.op != "add" or (diff.expected, diff.found) != (-0.5, -1):
        return None
    is_root = any(arg.op == "mul" and 0.5 in arg.consts[1:] for arg in diff.have.args)
    return "eps is added to the root, not under it" if is_root else "the root is missing"


def _centered(diff: Difference, formula: Formula) -> str | None:
    if diff.kind != "capture":
        return None
    for term, other in ((diff.found, diff.expected), (diff.expected, diff.found)):
        if _takes_mean_off(term, other):
            return "the mean is subtracted in one of them only; LayerNorm subtracts it in both"
    return None


def _takes_mean_off(term: Any, x: Any) -> bool:
    if not isinstance(term, Term) or term.op != "add" or x not in term.args:
        return False
    others = [arg for arg in term.args if arg is not x]
    return len(others) == 1 and others[0].op == "mul" and others[0].args[0].op == "mean"


def _no_rotation(diff: Difference, formula: Formula) -> str | None:
    if diff.kind != "op" or diff.want.op not in _DEFINITIONS:
        return None
    definition = _DEFINITIONS[diff.want.op]
    joined = diff.have.args[0] if diff.have.op == "view" else diff.have
    signs = [part.op == "mul" and part.consts[0].value < 0 for part in joined.args]
    if any(signs) or not (joined.op == "cat" or formula.name(joined) == "roll"):
        return definition
    plain = Formula(formula.name, formula.is_call, {})
    others = (
        [plain(arg) for arg in diff.around.args if arg is not diff.have] if diff.around.op == "mul" else []
    )
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


# Dynamo's names of inputs: l_self_modules_head_parameters_weight_ for self.head.weight. Of a class that defines
# __getattr__, as those of PEFT do: l_self_dict_modules_head_parameters_weight_.
_NAMING = re.compile(
    r"^[lg]_(self_|kwargs_)?(modules_|parameters_|buffers_)?|(?P<inner>_(modules|parameters|buffers)_)|_+$"
)
_THROUGH_DICT = re.compile(r"(?<=_)dict_(?=(modules|parameters|buffers)_)")


def input_name(name: str) -> str:
    """Returns the name of an input for people: head.weight for l_self_modules_head_parameters_weight_."""
    if name.startswith("l_self_dict_"):
        name = _THROUGH_DICT.sub("", name)
    return _NAMING.sub(lambda found: "." if found["inner"] else "", name)
