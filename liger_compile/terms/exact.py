"""The numbers that a dtype represents exactly, on which proofs about positions and flags rely.

Positions are whole numbers. Arithmetic on them is exact while every result stays in the range in which the dtype
represents every whole number. Outside it, integers wrap around and floating-point numbers are rounded, from 2048 in
float16 and from 256 in bfloat16.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from liger_compile.terms.term import Term

# No mask has more queries or keys: it would have 2**44 entries. A symbolic size without a bound is assumed to be no
# larger where an integer dtype of 32 bits or more could wrap around.
MOST_TOKENS = 2**22
EXACT = 2**53  # terms store numbers as Python floats, which represent every integer up to here
WIDE_INTEGERS = (torch.int32, torch.int64)


@functools.cache
def whole_numbers(dtype: torch.dtype) -> tuple[int, int]:
    """Returns the first and last of the whole numbers that a dtype represents without a gap; none for complex."""
    if dtype is torch.bool:
        return 0, 1
    if dtype.is_complex:
        return 0, -1
    if dtype.is_floating_point:
        last = int(2 / torch.finfo(dtype).eps)
        return -last, last
    info = torch.iinfo(dtype)
    return max(info.min, -EXACT), min(info.max, EXACT)


def is_whole(number: float) -> bool:
    return math.isfinite(number) and number == int(number)


@functools.cache
def stored(dtype: torch.dtype | None, number: float) -> float:
    """Returns a number rounded to a floating-point dtype, possibly to infinity; unchanged for other dtypes and None."""
    if dtype is None or not dtype.is_floating_point or math.isnan(number):
        return number
    return torch.tensor(number, dtype=torch.float64).to(dtype).item()


def holds(dtype: torch.dtype | None, number: float) -> bool:
    """Returns whether a dtype represents a number without rounding or wraparound."""
    if dtype is None or dtype.is_floating_point:
        return stored(dtype, number) == number
    first, last = whole_numbers(dtype)
    return is_whole(number) and first <= number <= last


def promoted(*operands: Any) -> torch.dtype | None:
    """Returns the dtype in which torch computes with terms, numbers and symbolic sizes; None if a term has none."""
    if any(isinstance(operand, Term) and operand.dtype is None for operand in operands):
        return None
    return torch.result_type(*map(_example, operands))


def _example(operand: Any) -> Any:
    if isinstance(operand, Term):  # type promotion ranks zero-dimensional tensors lower
        return torch.empty((1,) * len(operand.shape), dtype=operand.dtype, device="meta")
    return 1 if isinstance(operand, torch.SymInt) else operand
