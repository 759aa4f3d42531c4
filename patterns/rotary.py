"""Rotary position embedding: pairs of channels of each head, rotated by an angle that grows with the position.

Formula  (a, b) -> (a * cos - b * sin, b * cos + a * sin)
Shapes   x (..., D), a head's channels last; cos and sin broadcast to x[..., :R], or to half of that; R <= D
Sources  Su et al. 2021, "RoFormer". The sources differ in the pairs of channels and in the layout of the table:
         half           channel i with i + R/2, full tables       Llama, GPT-NeoX and most others
         interleaved    channel 2i with 2i + 1, full tables       GPT-J, Cohere, GLM-4
         half_tables    as half, tables for half of the channels  GPT-OSS
         interleaved_tables  as interleaved, tables for half of the channels
         to_half        reads interleaved, writes halves          DeepSeek-V3
         complex        as interleaved, one complex table         Meta's Llama, torchtitan

If both q and k are present, one op rotates both by the same tables. Each layout is one function. Its variants differ in
where the code rounds, in whether some channels pass through, and in whether there are one or two tensors.
"""

from collections.abc import Callable
from itertools import product

import torch

from liger_compile import functional
from liger_compile.pattern import Match, Pattern


def half(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def interleaved(x, cos, sin):
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


def half_tables(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def interleaved_tables(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def to_half(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def complex_(x, freqs):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs).flatten(-2).to(x.dtype)


# Arguments of functional.rotary for each layout.
LAYOUTS = {
    half: {"layout": "half"},
    interleaved: {"layout": "interleaved"},
    half_tables: {"layout": "half", "half_tables": True},
    interleaved_tables: {"layout": "interleaved", "half_tables": True},
    to_half: {"layout": "interleaved_to_half", "half_tables": True},
}


def check(match: Match) -> str | None:
    """Require tables that need no gradient."""
    for name in ("cos", "sin", "freqs"):
        if name in match.captures and match[name].requires_grad:
            return f"{name} requires a gradient, which the op does not compute"
    return None


def _check_width(is_half: bool, is_partial: bool) -> Callable[[Match], str | None]:
    """Require one angle for each pair: tables that broadcast along the channels are not tables of angles."""

    def check_width(match: Match) -> str | None:
        cos, sin, channels = match["cos"].shape[-1], match["sin"].shape[-1], match["q"].shape[-1]
        turned = 2 * cos if is_half else cos
        if cos != sin or turned % 2 or (turned > channels if is_partial else turned != channels):
            return f"cos and sin have {cos} and {sin} channels, which is not one angle for each pair of {channels}"
        return check(match)

    return check_width


def check_complex(match: Match) -> str | None:
    """Require one angle for each pair, for one complex table."""
    angles, channels = match["freqs"].shape[-1], match["q"].shape[-1]
    if 2 * angles != channels:
        return f"freqs has {angles} angles, which is not one for each pair of {channels} channels"
    return check(match)


def _keeping_dtype(rotation: Callable) -> Callable:
    """Compute in float32 and round to the dtype of x."""
    return lambda x, cos, sin: rotation(x.float(), cos.float(), sin.float()).to(x.dtype)


def _partial(rotation: Callable) -> Callable:
    """Rotate the first channels, as many as the tables have, and pass the others through."""

    def partial(x, cos, sin):
        width = cos.shape[-1]
        return torch.cat((rotation(x[..., :width], cos, sin), x[..., width:]), -1)

    return partial


def _pattern(layout: Callable, keeps_dtype: bool, is_partial: bool, is_pair: bool) -> Pattern:
    rotation = _keeping_dtype(layout) if keeps_dtype else layout
    rotation = _partial(rotation) if is_partial else rotation

    def search(q, cos, sin):
        return rotation(q, cos, sin)

    def search_pair(q, k, cos, sin):
        turned = rotation(k, cos, sin)  # the op returns both in one dtype
        return rotation(q, cos, sin), turned.to(q.dtype) if keeps_dtype else turned

    def replace(q, cos, sin, k=None):
        out_dtype = q.dtype if keeps_dtype else None
        return functional.rotary(q, k, cos, sin, out_dtype=out_dtype, **LAYOUTS[layout])

    table = torch.empty(8) if is_partial or "half_tables" in LAYOUTS[layout] else torch.empty(16)
    heads = {"q": torch.empty(3, 5, 16), **({"k": torch.empty(3, 7, 16)} if is_pair else {})}
    traits = {"keeps_dtype": keeps_dtype, "partial": is_partial, "pair": is_pair}
    return Pattern(
        name="rotary." + "_".join([layout.__name__, *(trait for trait, has in traits.items() if has)]),
        search=search_pair if is_pair else search,
        replace=replace,
        check=_check_width("half_tables" in LAYOUTS[layout], is_partial),
        saves=lambda match: 0,
        examples={**heads, "cos": table, "sin": table},
    )


def _complex_pattern(is_pair: bool) -> Pattern:
    def search(q, freqs):
        return complex_(q, freqs)

    def search_pair(q, k, freqs):
        return complex_(q, freqs), complex_(k, freqs).to(q.dtype)

    def replace(q, freqs, k=None):
        return functional.rotary_complex(q, k, freqs)

    heads = {"q": torch.empty(3, 5, 16), **({"k": torch.empty(3, 7, 16)} if is_pair else {})}
    return Pattern(
        name="rotary.complex_pair" if is_pair else "rotary.complex",
        search=search_pair if is_pair else search,
        replace=replace,
        check=check_complex,
        saves=lambda match: 0,
        examples={**heads, "freqs": torch.empty(8, dtype=torch.complex64)},
    )


PATTERNS = (
    *(
        _pattern(layout, keeps_dtype, is_partial, is_pair)
        for layout, keeps_dtype, is_partial, is_pair in product(
            LAYOUTS, (False, True), (False, True), (True, False)
        )
        if not (is_partial and "half_tables" in LAYOUTS[layout])
    ),
    *map(_complex_pattern, (True, False)),
)
