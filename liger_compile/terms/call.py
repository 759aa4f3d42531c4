"""The inputs of a table function: the call, and its arguments as terms, numbers and constants.

While a search function is traced, its number and string captures are NumberVar, IntVar and StrVar: torch sees numbers
and strings, terms see names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from liger_compile.terms.scalars import EXACT
from liger_compile.terms.term import MADE_HERE, ConstVar, Scalar, Space, Term, size_of, sizes_of

Value = Any  # a Term, a tuple of Values, or a constant

# The kinds of arguments, as annotations of table functions: binding.py compares the arguments with them.
Operand = Term | torch.SymInt | int | float
SizeArgument = int | torch.SymInt
Dims = int | Sequence[int] | None


class UnsupportedError(Exception):
    """A call does not fit the table function of its operator; its value is opaque."""


class Call:
    """The properties of a call that a table function needs besides the arguments."""

    def __init__(self, space: Space, out: Any) -> None:
        self.space, self.out = space, out

    @property
    def result(self) -> torch.Tensor:
        """The example of the result. Raises UnsupportedError for a call that returns several tensors."""
        if not isinstance(self.out, torch.Tensor):
            raise UnsupportedError(
                f"expected a call that returns one tensor, got a {type(self.out).__name__}"
            )
        return self.out

    @property
    def dtype(self) -> torch.dtype:
        return self.result.dtype

    @property
    def shape(self) -> tuple[Any, ...]:
        return sizes_of(self.result.shape)


def scalar_of(value: Any) -> Scalar | None:
    """Returns a number as a Scalar; None for other values, and for integers beyond the exact range of floats."""
    if isinstance(value, NumberVar):
        return value.scalar
    if isinstance(value, IntVar):
        return Scalar(1.0, ((value.var.name, 1),))
    if isinstance(value, int) and abs(value) > EXACT:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Scalar(float(value))
    return None


def term_of(call: Call, value: Any) -> Term:
    """Returns the term of an operand: a tensor's term, a number or a symbolic size.

    Raises:
        UnsupportedError: the value is something else.
    """
    if isinstance(value, Term):
        return value
    if isinstance(value, torch.SymInt):
        return call.space.intern("leaf", (), (size_of(value),), None, ())
    scalar = scalar_of(value)
    if scalar is None:
        raise UnsupportedError(f"expected a tensor or a number, got {value!r}")
    return call.space.number(scalar)


def const_of(value: Any) -> Any:
    """Returns a constant in the form that `consts` holds.

    Raises:
        UnsupportedError: the value is a number capture that was multiplied.
    """
    if isinstance(value, (IntVar, StrVar)):
        return value.var
    if isinstance(value, NumberVar):
        ((name, power),) = value.scalar.powers
        if power != 1 or value.scalar.value != 1:
            raise UnsupportedError(f"expected {name} itself, got a product with it")
        return ConstVar(name)
    return value


def negative(dim: int, rank: int) -> int:
    """Returns a dimension counted from the end.

    Raises:
        UnsupportedError: there is no such dimension; torch takes 0 and -1 for a zero-dimensional tensor.
    """
    counted = dim - rank if dim >= 0 else dim
    if not -rank <= counted < 0:
        raise UnsupportedError(f"expected a dimension of a tensor with {rank} dimensions, got {dim}")
    return counted


def flat(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the sizes of x.view(2, 3) and of x.view((2, 3)) as one tuple."""
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list, torch.Size)) else args


class NumberVar(float):
    """A float capture while a search function is traced; records the factors that multiply it."""

    scalar: Scalar

    def __new__(cls, value: float, scalar: Scalar) -> NumberVar:
        self = super().__new__(cls, value)
        self.scalar = scalar
        return self

    def _times(self, other: Any, power: float = 1) -> Any:
        scalar = scalar_of(other)
        if scalar is None:
            return NotImplemented
        return NumberVar(float(self) * float(other) ** power, self.scalar * scalar**power)

    def __mul__(self, other: Any) -> Any:
        return self._times(other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._times(other, -1)

    def __rtruediv__(self, other: Any) -> Any:
        scalar = scalar_of(other)
        if scalar is None:
            return NotImplemented
        return NumberVar(float(other) / float(self), scalar * self.scalar**-1)

    def __neg__(self) -> NumberVar:
        return NumberVar(-float(self), self.scalar * Scalar(-1.0))


class Draw(float):
    """A dropout probability that equals only itself: two calls of one dropout drop different values."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class IntVar(int):
    """An int capture while a search function is traced."""

    var: ConstVar


class StrVar(str):
    """A str capture while a search function is traced."""

    var: ConstVar


def opaque(space: Space, example: Any, name: str, *, is_made: bool = False) -> Value:
    """Returns a value that is identified by its name only.

    Tensors and symbolic numbers become leaf terms; a dictionary lookup of a symbolic number would add a guard. Plain
    constants stay as they are.

    Args:
        is_made: whether the graph computes the value, so that it is not an input.
    """
    consts = (name, MADE_HERE) if is_made else (name,)
    if isinstance(example, torch.Tensor):
        return space.intern("leaf", (), consts, example.dtype, sizes_of(example.shape))
    if isinstance(example, (tuple, list)):
        return tuple(opaque(space, part, f"{name}[{i}]", is_made=is_made) for i, part in enumerate(example))
    if isinstance(example, (torch.SymFloat, torch.SymInt, torch.SymBool)):
        return space.intern("leaf", (), consts, None, ())
    return example
