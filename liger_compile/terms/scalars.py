"""Decides which numbers of a product merge into one, and in which dtypes factors may be reordered.

Input: two numbers as in the code. Output: the merged number, or None if both stay, because the value between them may
lose part of x. A multiplication rounds to a few eps of its result. Products of numbers are therefore equal up to
rounding, as long as no intermediate value is too large or too small for its dtype:

    x * 0.5 * 0.25             0.125
    x * 1e-8 * 1e8             two numbers: x * 1e-8 is 0 in half precision
    x * 1e4 * 1e4              1e8, but two numbers in float16, which cannot represent 1e8
    x * 7 * (1 / 7), x / 0     two numbers: no number vanishes, and nonfinite numbers stay in place
"""

from __future__ import annotations

import math

import torch

from liger_compile.terms.term import Scalar, close

# Numbers between 1 / ORDINARY and ORDINARY move no value out of the range of a dtype, unless it was near a limit.
ORDINARY = 1e5
# float16 ends at 65504 and is exact from 6e-5 on. Unfused GELU multiplies by 0.5; scores are scaled and capped.
ORDINARY_IN_HALF = 4.0
LARGEST_IN_HALF = 256.0  # larger factors soon make values infinite in float16
EXACT = 2.0**53  # floats represent every integer up to here


def is_whole(power: float) -> bool:
    """Returns whether a power is a positive whole number."""
    return power >= 1 and power % 1 == 0


def is_integer(dtype: torch.dtype | None) -> bool:
    """Returns whether arithmetic in `dtype` wraps around and never rounds."""
    return dtype is not None and not (dtype.is_floating_point or dtype.is_complex)


def is_normal(scalar: Scalar, dtype: torch.dtype | None) -> bool:
    """Returns whether `dtype` represents a number with all its digits.

    Number captures count as such numbers. An uncast term counts as float32.
    """
    if scalar.powers or is_integer(dtype):
        return True
    limits = torch.finfo(dtype or torch.float32)
    return limits.tiny <= abs(scalar.value) <= limits.max


def is_ordinary(scalar: Scalar, dtype: torch.dtype | None) -> bool:
    """Returns whether a number may be multiplied earlier or later among factors."""
    if scalar.powers or is_integer(dtype):
        return True
    most = ORDINARY if regroups_tensors(dtype) else ORDINARY_IN_HALF
    return 1 / most <= abs(scalar.value) <= most


def is_bindable(scalar: Scalar, dtype: torch.dtype | None) -> bool:
    """Returns whether an op may multiply by a number in float32 where the code multiplies in `dtype`."""
    is_safe = dtype is not torch.float16 or abs(scalar.value) <= LARGEST_IN_HALF
    return is_safe and is_normal(scalar, dtype)


def regroups_tensors(dtype: torch.dtype | None) -> bool:
    """Returns whether (a * b) * c is a * (b * c); in float16 one of the two soon overflows or underflows."""
    return dtype is not torch.float16


def merged(a: Scalar, b: Scalar, dtype: torch.dtype | None) -> Scalar | None:
    """Returns the number that replaces a and b in x * a * b, computed in `dtype`; None if both stay."""
    both = a * b
    if is_integer(dtype):
        return both if abs(both.value) < EXACT else None
    if _is_sign(a) or _is_sign(b):
        return both
    if a.powers or b.powers:
        names = {name for name, _ in both.powers}
        return both if all(name in names for name, _ in (*a.powers, *b.powers)) else None
    if close(abs(both.value), 1.0) or not all(is_normal(number, dtype) for number in (a, b, both)):
        return None
    if any(_rounds_away(number, dtype) for number in (a, b)):
        return None
    same_way = (abs(a.value) > 1) == (abs(b.value) > 1)
    return both if same_way or (is_ordinary(a, dtype) and is_ordinary(b, dtype)) else None


def _is_sign(scalar: Scalar) -> bool:
    return abs(scalar.value) == 1 and not scalar.powers


def _rounds_away(scalar: Scalar, dtype: torch.dtype | None) -> bool:
    """Returns whether a number is so close to 1 that x * scalar may be x."""
    return dtype is not None and abs(abs(scalar.value) - 1) < torch.finfo(dtype).eps


def rounded(value: float, dtype: torch.dtype | None) -> float:
    """Returns a number as a tensor of `dtype` stores it; the number must be within the range of the dtype."""
    if not dtype or not dtype.is_floating_point or not math.isfinite(value):
        return value
    mantissa, exponent = math.frexp(value)
    digits = 2 / torch.finfo(dtype).eps
    return math.ldexp(round(mantissa * digits) / digits, exponent)
