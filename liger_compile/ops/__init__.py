"""The ops in namespace `liger_compile::`, one family per file: schema, reference, fake, autograd.

Importing this package registers the ops. The reference of an op is plain PyTorch. It defines the op, and it is the
implementation wherever dispatch.py finds no kernel. The ops that a pattern inserts into a graph are functional: they
mutate no input, and no output aliases an input. Call them through liger_compile.functional; a graph contains them as
`torch.ops.liger_compile.<name>.default`.

There are two kinds of op (registration.py). AOTAutograd traces through rms_norm, rotary and norm_rotary, so that
Inductor fuses them with their neighbors. cross_entropy and linear_cross_entropy stay opaque, because their bodies loop
over blocks of rows (blocks.py). embedding_backward and scale are used in backward only. Their in-place variants,
add_embedding_backward and scale_in_place, are for backward_passes/. The backwards of rotary and norm_rotary have
variants that backward_passes/ inlines late, and variants with a packed output (packed.py).

This package does not import Triton.
"""

from . import (
    adapters,
    cross_entropy,
    embedding,
    linear_cross_entropy,
    linear_softmax,
    linear_softmax_loss,
    norm_rotary,
    packed,
    pre_norm,
    rms_norm,
    rotary,
    rounded,
    scale,
    sharded_linear_cross_entropy,
    varlen,
)

__all__ = [
    "adapters",
    "cross_entropy",
    "embedding",
    "linear_cross_entropy",
    "linear_softmax",
    "linear_softmax_loss",
    "norm_rotary",
    "packed",
    "pre_norm",
    "rms_norm",
    "rotary",
    "rounded",
    "scale",
    "sharded_linear_cross_entropy",
    "varlen",
]
