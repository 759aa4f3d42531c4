"""Attention with a mask for an input, and how tests of such inputs compare it with eager code."""

import torch
import torch.nn.functional as F

import liger_compile
from tests.helpers.gradients import gradients_of

BATCH, LENGTH = 2, 12
OPTIONS = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}


def attend(q, k, v, mask):
    """Two heads of eight channels, whatever the number of channels is symbolic."""
    heads = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask)


def causal(q, k, v, padding):
    """As Hugging Face's decoders."""
    i = torch.arange(q.shape[1], device=q.device)
    rows = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    mask = (i[None, None, None, :] <= i[None, None, :, None]) & padding.to(torch.bool)[rows, i]
    return attend(q, k, v, mask)


def inputs(length=LENGTH, requires_grad=True):
    generator = torch.Generator().manual_seed(length)
    shape = (BATCH, length, 16)
    return [torch.randn(shape, generator=generator, requires_grad=requires_grad) for _ in range(3)]


def masks(length=LENGTH, dtype=torch.int64):
    """All ones; with the first keys of one row hidden; with the last of the other."""
    ones = torch.ones(BATCH, length, dtype=dtype)
    left, right = ones.clone(), ones.clone()
    left[1, :5], right[0, -3:] = 0, 0
    return ones, left, right


def assert_as_in_eager(compiled, function, *args, **tolerance):
    torch.testing.assert_close(gradients_of(compiled, *args), gradients_of(function, *args), **tolerance)


def found():
    """Each report so far: its variant, and how often attention was replaced by a kernel that reads no padding."""
    return [
        (
            report.variant,
            sum(site.kind == "replace" and ".padded" not in site.pattern for site in report.sites),
        )
        for report in liger_compile.reports()
    ]


def compiled(function, **options):
    kwargs = {name: options.pop(name) for name in ("dynamic", "fullgraph") if name in options}
    settings = {**OPTIONS, **{f"liger.{name}": value for name, value in options.items()}}
    return torch.compile(function, backend="liger", options=settings, **kwargs)
