"""The operator table: a call that does not fit it is opaque; a rule that fails is a failure, and never silent."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import liger_compile
from liger_compile.graphs.guards import GuardError
from liger_compile.terms import identities, operators
from liger_compile.terms.build import Recorder, trace
from liger_compile.terms.term import RuleError, Space, Term

x, y, scalar = torch.randn(4, 4), torch.randn(4, 4), torch.tensor(2.0)
at = torch.tensor([[0, 1, 2, 3]])

# Calls that torch takes and a table function does not: other names or kinds of arguments, and no dimensions.
ODD = {
    "a keyword of numpy": lambda: x.sum(axis=0, keepdims=True),
    "a keyword that the function lacks": lambda: torch.norm(x, out=torch.empty(())),
    "a flag in arithmetic": lambda: x + True,
    "an integer that floats cannot represent": lambda: at + (2**53 + 1),
    "two results": lambda: x.max(dim=-1),
    "a sum over the dimension of a number": lambda: scalar.sum(0),
    "a mean over the dimension of a number": lambda: scalar.mean(-1, keepdim=True),
    "a softmax of a number": lambda: scalar.softmax(0),
    "a transposed number": lambda: scalar.transpose(0, -1),
    "a start that is a tensor": lambda: torch.narrow(x, 0, torch.tensor(1), 2),
    "a bound that is a tensor": lambda: x[: torch.tensor(2)],
    "an einsum without a result": lambda: torch.einsum("ij,jk", x, y),
    "an einsum of one tensor": lambda: torch.einsum("ij->ji", x),
    "an einsum of three tensors": lambda: torch.einsum("ij,jk,kl->il", x, y, x),
    "an einsum with a number": lambda: torch.einsum(",ij->ij", scalar, x),
    "an einsum of a list": lambda: torch.einsum("ij,kj->ik", [x, y]),
    "an einsum with indices as lists": lambda: torch.einsum(x, [0, 1], y, [1, 2], [0, 2]),
    "where without values": lambda: torch.where(x > 0),
    "a fill with a tensor": lambda: x.masked_fill(x > 0, scalar),
    "repeats by a tensor": lambda: x.repeat_interleave(torch.tensor([1, 2, 1, 1]), dim=0),
    "a list of sections": lambda: x.tensor_split([1, 3]),
}  # fmt: skip


def test_the_largest_values_with_and_without_their_dimension_have_their_shapes():
    """One graph may have both; terms are found by operation and arguments, and not by shape."""

    def both(x):
        return x.max(-1).values, x.max(-1, keepdim=True).values, x.argmax(-1), x.argmax(-1, keepdim=True)

    result = trace(both, {"x": torch.empty(3, 4)})
    assert [term.shape for term in result] == [(3,), (3, 1), (3,), (3, 1)]


@pytest.mark.parametrize("called", ODD.values(), ids=ODD)
def test_a_call_that_does_not_fit_is_no_failure(called: Callable[[], Any]):
    with Recorder(identities.new_space(strict=True)):
        called()


@pytest.mark.parametrize(
    "called", [ODD["a flag in arithmetic"], ODD["a mean over the dimension of a number"]]
)
def test_a_call_that_does_not_fit_is_opaque(called: Callable[[], torch.Tensor]):
    recorder = Recorder(identities.new_space())
    with recorder:
        out = called()
    value = recorder.values[id(out)]
    assert isinstance(value, Term) and value.op == "leaf"


# Rules with faults.


def wrong_softmax(call: Any, input: Term, dim: Any = None, dtype: Any = None) -> Term:
    first, second = input.args  # a fault where the operand has another number of operands
    return first or second


def wrong_cos(space: Space, term: Term) -> Term:
    return term.args[1]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax((q @ k.transpose(-1, -2) * 0.5).tanh(), -1) @ v


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (8,), weight, 1e-6)


def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return attend(q, k, v) + attend(k, q, v).cos() + normed(q, weight)


def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return (
        *(torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3)),
        torch.ones(8, requires_grad=True),
    )


OPTIONS = {"liger.inner": "aot_eager", "liger.policy": "always"}
BY_OPERATOR = "the rule of operator 'softmax' failed: ValueError: not enough values to unpack"
BY_IDENTITY = "the rule of operator 'cos' failed: IndexError: tuple index out of range"


def plant(monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    """Plants a rule with a fault. Returns the start of the sentence about it."""
    if name == "operator":
        monkeypatch.setitem(operators.TABLE, "softmax", wrong_softmax)  # pyright: ignore[reportArgumentType]
        return BY_OPERATOR
    rules = (wrong_cos, *identities.RULES.get("cos", ()))
    monkeypatch.setitem(identities.RULES, "cos", rules)  # pyright: ignore[reportArgumentType]
    return BY_IDENTITY


@pytest.mark.parametrize("where", ["operator", "identity"])
def test_a_rule_that_fails_is_a_note_and_a_warning(monkeypatch: pytest.MonkeyPatch, where: str):
    sentence = plant(monkeypatch, where)
    torch.compiler.reset()
    liger_compile.clear_reports()
    args = inputs()
    with pytest.warns(UserWarning, match=re.escape(sentence)):
        out = torch.compile(program, backend="liger", options=OPTIONS)(*args)
    torch.testing.assert_close(out, program(*args))
    (report,) = liger_compile.reports()
    assert [site.pattern for site in report.sites if site.kind == "replace"] == ["rms_norm.llama"]
    (note,) = [note for note in report.notes if " failed: " in note]
    count = "2 calls are left as they are" if where == "operator" else "1 call is left as it is"
    assert note.startswith(sentence) and note.endswith(count)


@pytest.mark.parametrize("where", ["operator", "identity"])
def test_a_rule_that_fails_raises_under_strict(monkeypatch: pytest.MonkeyPatch, where: str):
    sentence = plant(monkeypatch, where)
    torch.compiler.reset()
    compiled = torch.compile(program, backend="liger", options=OPTIONS | {"liger.strict": True})
    with pytest.raises(Exception, match=re.escape(sentence)):
        compiled(*inputs())


def test_a_rule_that_fails_on_a_pattern_raises(monkeypatch: pytest.MonkeyPatch):
    """A pattern that matches nothing would say nothing."""
    sentence = plant(monkeypatch, "operator")
    with pytest.raises(RuleError, match=re.escape(sentence)):
        trace(lambda q: torch.softmax(q, -1), {"q": torch.randn(2, 2)})


def test_a_size_that_is_not_known_is_no_fault(monkeypatch: pytest.MonkeyPatch):
    """Who forbids guards handles it: the report says that the computation is not known for all sizes."""

    def asks(call: Any, input: Term, dim: Any = None) -> Term:
        raise GuardError("it depends on a size")

    monkeypatch.setitem(operators.TABLE, "softmax", asks)  # pyright: ignore[reportArgumentType]
    with pytest.raises(GuardError), Recorder(identities.new_space(strict=False)):
        x.softmax(-1)


def test_a_term_whose_rule_failed_is_made_anew():
    """Half a term, without `uncast`, would make every later use of the same operation fail."""
    space, (q, *_) = identities.new_space(strict=False), inputs()
    fails = [True]

    def once(space: Space, term: Term) -> None:
        if fails:
            fails.pop()
            raise KeyError("a fault")

    space.rules = {"cos": (once,)}
    recorder = Recorder(space)
    with recorder:
        first, second = q.cos(), q.cos()
    assert [recorder.values[id(out)].op for out in (first, second)] == ["leaf", "cos"]
    assert recorder.values[id(second)].uncast.op == "cos"
    assert len({term.serial for term in space.in_order()}) == len(space.in_order())
