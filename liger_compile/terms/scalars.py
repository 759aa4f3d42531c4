"""Which numbers of a product make one number, and in which dtypes factors may change places.

In: numbers as they stand in code. Out: the number that two of them are together, or None: then both stay as they
are, for something is left of x between them. Multiplying rounds to a few eps of what it gives, so products of numbers
are equal up to rounding, as long as nothing on the way is too large or too small for its dtype:

    x * 0.5 * 0.25             0.125
    x * 1e-8 * 1e8             two numbers: x * 1e-8 is 0 in half precision
    x * 1e4 * 1e4              1e8, but two numbers in float16, which has no 1e8
    x * 7 * (1 / 7), x / 0     two numbers: no number vanishes, and what is not finite stays where it stands
"""

from __future__ import annotations

import math

import torch

from liger_compile.terms.term import Scalar, close

# Numbers up to this, and down to one over it, take nothing out of the range of a dtype that had not been at its end.
ORDINARY = 1e5
# float16 ends at 65504 and is exact from 6e-5 on. GELU that is written out halves; scores are scaled and capped.
ORDINARY_IN_HALF = 4.0
LARGEST_IN_HALF = 256.0  # what code multiplies by more soon becomes infinite there
EXACT = 2.0**53  # a float counts up to here


def is_whole(power: float) -> bool:
    """A positive whole number."""
    return power >= 1 and power % 1 == 0


def is_integer(dtype: torch.dtype | None) -> bool:
    """Arithmetic in `dtype` wraps around and never rounds."""
    return dtype is not None and not (dtype.is_floating_point or dtype.is_complex)


def is_normal(scalar: Scalar, dtype: torch.dtype | None) -> bool:
    """A number that `dtype` has with all its digits. A number capture is taken for one, and a bare term for float32."""
    if scalar.powers or is_integer(dtype):
        return True
    limits = torch.finfo(dtype or torch.float32)
    return limits.tiny <= abs(scalar.value) <= limits.max


def is_ordinary(scalar: Scalar, dtype: torch.dtype | None) -> bool:
    """A number that may be multiplied earlier or later among factors."""
    if scalar.powers or is_integer(dtype):
        return True
    most = ORDINARY if regroups_tensors(dtype) else ORDINARY_IN_HALF
    return 1 / most <= abs(scalar.value) <= most


def is_bindable(scalar: Scalar, dtype: torch.dtype | None) -> bool:
    """A number that an op may multiply by in float32 where the code does it in `dtype`."""
    is_safe = dtype is not torch.float16 or abs(scalar.value) <= LARGEST_IN_HALF
    return is_safe and is_normal(scalar, dtype)


def regroups_tensors(dtype: torch.dtype | None) -> bool:
    """Whether (a * b) * c is a * (b * c): in float16 one of the two is soon too large or too small."""
    return dtype is not torch.float16


def merged(a: Scalar, b: Scalar, dtype: torch.dtype | None) -> Scalar | None:
    """The number that x * a * b is multiplied by, computed in `dtype`; None where it stays two."""
    both = a * b
    if is_integer(dtype):
        return both if abs(both.value) < EXACT else None
    if _is_sign(a) or _is_sign(b):
        return both
    if a.powers or b.powers:
        names = {name for name, _ in both.powers}
        return both if all(name in names for name, _ in (*a.powers, *b.powers)) else None
    if close(abs(both.value), 1.0) or not all(is_normal(each, dtype) for each in (a, b, both)):
        return None
    if any(_rounds_away(each, dtype) for each in (a, b)):
        return None
    same_way = (abs(a.value) > 1) == (abs(b.value) > 1)
    return both if same_way or (is_ordinary(a, dtype) and is_ordinary(b, dtype)) else None


def _is_sign(scalar: Scalar) -> bool:
    return abs(scalar.value) == 1 and not scalar.powers


def _rounds_away(scalar: Scalar, dtype: torch.dtype | None) -> bool:
    """So near to 1 that x * scalar may be x."""
    return dtype is not None and abs(abs(scalar.value) - 1) < torch.finfo(dtype).eps


def rounded(value: float, dtype: torch.dtype | None) -> float:
    """A number as a tensor of `dtype` holds it, within the range of the dtype."""
    if not dtype or not dtype.is_floating_point or not math.isfinite(value):
        return value
    mantissa, exponent = math.frexp(value)
    digits = 2 / torch.finfo(dtype).eps
    return math.ldexp(round(mantissa * digits) / digits, exponent)
