"""Every refusal is a sentence: what was expected, what came, what to do."""

from __future__ import annotations

import re

import pytest
import torch

from liger_compile import functional as L

x, w = torch.randn(2, 3, 8), torch.randn(8)
q, tables = torch.randn(2, 4, 3, 8), (torch.randn(3, 8), torch.randn(3, 8))
head, target = torch.randn(11, 8), torch.zeros(2, 3, dtype=torch.int64)
freqs = torch.randn(3, 4, dtype=torch.complex64)

REFUSED = [
    (TypeError, "expected x in a floating dtype, got torch.int64", lambda: L.rms_norm(target, None)),
    (ValueError, "expected a weight of shape (8,), got (4,)", lambda: L.rms_norm(x, w[:4])),
    (ValueError, "expected casting 'llama' or 'gemma', got 'none'", lambda: L.rms_norm(x, w, casting="none")),
    (
        ValueError,
        "expected offset 0 with casting 'llama', got 1.0",
        lambda: L.rms_norm(x, w, offset=1.0, casting="llama"),
    ),
    (
        ValueError,
        "expected offset 0 with no weight, got 1.0",
        lambda: L.rms_norm(x, offset=1.0, casting="gemma"),
    ),
    (ValueError, "layout to be one of half, interleaved", lambda: L.rotary(q, None, *tables, layout="neox")),
    (
        TypeError,
        "expected real tables cos and sin, got torch.float32 and None",
        lambda: L.rotary(q, q, tables[0]),
    ),
    (
        TypeError,
        "expected real tables cos and sin, got torch.complex64",
        lambda: L.rotary(q, None, freqs, freqs),
    ),
    (
        ValueError,
        "expected cos and sin of one shape, got (3, 8) and (3, 4)",
        lambda: L.rotary(q, None, tables[0], tables[1][:, :4]),
    ),
    (
        ValueError,
        "expected tables for an even number of channels, 8 at most, got tables for 16",
        lambda: L.rotary(q, None, *tables, half_tables=True),
    ),
    (
        ValueError,
        "expected tables for an even number of channels, 8 at most, got tables for 7",
        lambda: L.rotary(q, None, *(t[:, :7] for t in tables)),
    ),
    (
        ValueError,
        "expected tables that broadcast against k of shape (2, 4, 1, 8), got (3, 8)",
        lambda: L.rotary(q, q[:, :, :1], *tables),
    ),
    (
        ValueError,
        "expected cos and sin that need no gradient",
        lambda: L.rotary(q, None, tables[0].clone().requires_grad_(), tables[1]),
    ),
    (
        ValueError,
        "expected a weight of shape (8,), got (4,)",
        lambda: L.norm_rotary(q, q, w, w[:4], *tables),
    ),
    (
        ValueError,
        "expected tables that broadcast against k of shape (2, 4, 1, 8), got (3, 8)",
        lambda: L.norm_rotary(q, q[:, :, :1], w, w, *tables),
    ),
    (
        ValueError,
        "expected tables for all 8 channels of q, got tables for 4",
        lambda: L.norm_rotary(q, q, w, w, *(t[:, :4] for t in tables)),
    ),
    (
        ValueError,
        "expected cos and sin that need no gradient",
        lambda: L.norm_rotary(q, q, w, w, tables[0].clone().requires_grad_(), tables[1]),
    ),
    (TypeError, "expected complex freqs, got torch.float32", lambda: L.rotary_complex(q, None, tables[0])),
    (
        TypeError,
        "expected q and k of one dtype, got torch.float32 and torch.bfloat16",
        lambda: L.rotary_complex(q, q.bfloat16(), freqs),
    ),
    (TypeError, "expected logits in a floating dtype", lambda: L.cross_entropy(target, target)),
    (
        TypeError,
        "expected class indices in int64 as target, got torch.float32",
        lambda: L.cross_entropy(x, x),
    ),
    (
        ValueError,
        "expected one target for each row of logits, shape (2, 3), got (2, 2)",
        lambda: L.cross_entropy(x, target[:, :2]),
    ),
    (
        ValueError,
        "expected reduction 'mean', 'sum' or 'none', got 'avg'",
        lambda: L.cross_entropy(x, target, reduction="avg"),
    ),
    (
        ValueError,
        "expected label_smoothing from 0 to 1, got 1.5",
        lambda: L.cross_entropy(x, target, label_smoothing=1.5),
    ),
    (ValueError, "expected softcap above 0, got 0.0", lambda: L.cross_entropy(x, target, softcap=0.0)),
    (
        ValueError,
        "expected a class weight of shape (8,), got (7,)",
        lambda: L.cross_entropy(x, target, w[:7]),
    ),
    (
        ValueError,
        "expected class weights that need no gradient",
        lambda: L.cross_entropy(x, target, w.clone().requires_grad_()),
    ),
    (
        TypeError,
        "expected x, weight and bias of one dtype, got torch.float32 and torch.bfloat16",
        lambda: L.linear_cross_entropy(x, head.bfloat16(), target),
    ),
    (
        ValueError,
        "expected a weight of shape (outputs, 8), got (8, 11)",
        lambda: L.linear_cross_entropy(x, head.t(), target),
    ),
    (
        ValueError,
        "expected a bias of shape (11,), got (8,)",
        lambda: L.linear_cross_entropy(x, head, target, w),
    ),
    (
        ValueError,
        "expected one target for each row of x, shape (2, 3), got (5,)",
        lambda: L.linear_cross_entropy(x, head, target.flatten()[1:]),
    ),
]


@pytest.mark.parametrize("error, message, call", REFUSED, ids=[message for _, message, _ in REFUSED])
def test_refused_in_a_sentence(error, message, call):
    with pytest.raises(error, match=re.escape(message)) as raised:
        call()
    name, _, sentence = str(raised.value).partition(": expected ")
    assert hasattr(L, name) and ", got " in sentence and "; " in sentence
