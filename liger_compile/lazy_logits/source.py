"""Source: what the values of a lazy tensor are, in terms of the rows and the classes of a head.

    scores     z, a scale and a cap of the logits                log_softmax    log(softmax(z))
    softmax    softmax(z)                                        the products   of two of these, element by element
    divergence the elements of a divergence from a second head, its teacher

Each is multiplied by a number, `factor` (that of scores is part of the form). A source has no values: operations that
stay lazy (`steps.py`) make one source of another, and questions (`questions.py`) are asked of a source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from liger_compile.lazy_logits.answers import Asked, Form, Head, Side, ask, divergence
from liger_compile.ops.precision import accumulation_dtype
from liger_compile.runtime.lazy import Gradient
from liger_compile.terms.scalars import is_bindable, merged
from liger_compile.terms.term import Scalar
from liger_compile.torch_internals.dispatch import is_transformed

# The kinds of products, by the kinds of the two factors.
PRODUCTS: Mapping[frozenset[str], str] = {
    frozenset(("softmax", "log_softmax")): "softmax * log_softmax",
    frozenset(("softmax", "scores")): "softmax * scores",
    frozenset(("softmax",)): "softmax * softmax",
}


def one_number(a: float, b: float, dtype: torch.dtype) -> float | None:
    """Return the number that replaces a and b in x * a * b, computed in `dtype`; None if both stay."""
    found = merged(Scalar(a), Scalar(b), dtype)
    return found.value if found is not None and is_bindable(found, dtype) else None


@dataclass(frozen=True, eq=False)
class Source:
    """A kind of values at some rows and classes of a head.

    Args:
        rows: int64 on the CPU, in the leading shape of the tensor: rows of the flattened hidden state.
        inner, outer: scores are outer * tanh(inner * logits), or outer * inner * logits without a cap.
        start, stop: the classes.
        is_exact: the tensor has the values of the kind in full precision; False if it has rounded them on the way.
        teacher: the second source of a divergence.
        report: called once with the function that needed values, in place of an answer.
    """

    head: Head
    rows: Tensor
    start: int
    stop: int
    report: Callable[[Any], None]
    inner: float = 1.0
    outer: float = 1.0
    is_capped: bool = False
    kind: str = "scores"
    factor: float = 1.0
    is_exact: bool = True
    teacher: Source | None = None
    divergence: str = ""  # from the teacher, a kind of ops/divergence.py

    @property
    def gradients(self) -> tuple[Gradient, ...]:
        return (self.head.gradient,)

    @property
    def classes(self) -> int:
        return self.stop - self.start

    @property
    def form(self) -> Form:
        scale = self.inner * self.outer
        return Form(scale, self.outer if self.is_capped else None, self.start, self.stop)

    def call(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        from liger_compile.lazy_logits import questions, steps  # these modules import this one

        handler = questions.HANDLERS.get(function) or steps.HANDLERS.get(function)
        if handler is None or not (args or "input" in kwargs) or is_transformed():
            return NotImplemented
        if not args:
            args, kwargs = (kwargs["input"],), {name: kwargs[name] for name in kwargs if name != "input"}
        return handler(function, args, kwargs)

    def without_gradients(self) -> Source:
        """Return the source for a tensor without gradients, which must not keep the graph of autograd alive."""
        return replace(self, head=self.head.detached()) if self.head.requires_grad else self

    def is_alike(self, other: Source) -> bool:
        """Return whether both are about the same scores at the same rows."""
        return (
            self.head.promise is other.head.promise
            and self.form == other.form
            and (self.rows is other.rows or torch.equal(self.rows, other.rows))
        )

    def times(self, number: float, dtype: torch.dtype) -> Source | None:
        """Return the source of a multiple, computed in `dtype`; None if one number does not have its values."""
        if self.kind != "scores":
            factor = one_number(self.factor, number, dtype)
            return None if factor is None else replace(self, factor=factor)
        is_exact = self.is_exact and (number == 1 or accumulation_dtype(dtype) is dtype)
        if self.is_capped:  # the cap is positive, and tanh is odd
            inner, outer = self.inner * math.copysign(1.0, number), one_number(self.outer, abs(number), dtype)
        else:
            inner, outer = one_number(self.inner, number, dtype), self.outer
        if inner is None or outer is None:
            return None
        return replace(self, inner=inner, outer=outer, is_exact=is_exact)

    def in_shape(self, lead: torch.Size) -> Source:
        """Return the source of the same rows in another leading shape."""
        teacher = None if self.teacher is None else self.teacher.in_shape(lead)
        return replace(self, rows=self.rows.reshape(lead), teacher=teacher)

    def ask_divergence(self, lazy: Tensor) -> Tensor:
        """Return the divergence of each row (n) of `lazy`, which has this source, without the factor."""
        assert self.teacher is not None, "a divergence has a teacher"
        sides = [Side(each.head, each.form, each.rows.reshape(-1)) for each in (self, self.teacher)]
        replay = Replay("divergence", self.factor, ["sum"], None, None, 0)
        return divergence(sides[0], sides[1], self.divergence, lazy, replay)

    def ask(
        self,
        lazy: Tensor,
        questions: Sequence[str],
        *,
        positions: Tensor | None = None,
        index: Tensor | None = None,
        top: int = 0,
    ) -> tuple[Tensor, ...]:
        """Return raw answers for the rows of `lazy`, which has this source: (n), (n, K) or (n, top).

        Args:
            positions: (n) int64 on the CPU, among the flattened rows of the tensor; None for all rows.
            index: (n, K), classes counted from `start`.
        """
        rows = self.rows.reshape(-1)
        rows = rows if positions is None else rows[positions]
        index = None if index is None else index.detach().clone()
        asked = Asked(
            rows,
            tuple(questions),
            index,
            top,
            Replay(self.kind, self.factor, questions, positions, index, top),
        )
        return ask(self.head, self.form, lazy, asked)


@dataclass(frozen=True)
class Replay:
    """The raw answers from the values of a tensor of this kind (..., V)."""

    kind: str
    factor: float
    questions: Sequence[str]
    positions: Tensor | None
    index: Tensor | None
    top: int

    def __call__(self, values: Tensor) -> tuple[Tensor, ...]:
        of_rows = values.reshape(-1, values.shape[-1]).to(accumulation_dtype(values.dtype)) / self.factor
        if self.positions is not None:
            of_rows = of_rows[self.positions.to(values.device)]
        found: list[Tensor] = []
        for question in self.questions:
            if question == "top":
                found.extend(of_rows.topk(self.top))
            else:
                found.append(_FROM_VALUES[self.kind, question](of_rows, self.index))
        return tuple(found)


# The answer to a question from values of a kind (n, V) and an index (n, K).
_FROM_VALUES: Mapping[tuple[str, str], Callable[[Tensor, Any], Tensor]] = {
    ("scores", "scores"): lambda z, index: z.gather(-1, index),
    ("scores", "log_probabilities"): lambda z, index: z.log_softmax(-1).gather(-1, index),
    ("scores", "logsumexp"): lambda z, index: z.logsumexp(-1),
    ("scores", "argmax"): lambda z, index: z.argmax(-1),
    ("scores", "score_sum"): lambda z, index: z.sum(-1),
    ("scores", "log_probability_sum"): lambda z, index: z.log_softmax(-1).sum(-1),
    ("log_softmax", "log_probabilities"): lambda logp, index: logp.gather(-1, index),
    ("log_softmax", "log_probability_sum"): lambda logp, index: logp.sum(-1),
    ("log_softmax", "argmax"): lambda logp, index: logp.argmax(-1),
    ("softmax", "log_probabilities"): lambda p, index: p.gather(-1, index).log(),
    ("softmax * log_softmax", "entropy"): lambda product, index: -product.sum(-1),
    ("softmax * scores", "mean_score"): lambda product, index: product.sum(-1),
    ("divergence", "sum"): lambda elements, index: elements.sum(-1),
    ("softmax * softmax", "collision"): lambda product, index: product.sum(-1),
}
