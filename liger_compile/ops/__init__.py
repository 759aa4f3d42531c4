"""The ops, namespace `liger_compile::`, one family a file: schema, reference, fake, autograd.

Importing this package registers them. An op's reference is plain PyTorch: it is the definition, and the
implementation wherever dispatch.py has no kernel for it. Those that a pattern puts into a graph are functional: they
mutate no input and no output aliases an input. liger_compile.functional is the way to call them; a graph holds them as
`torch.ops.liger_compile.<name>.default`.

Two kinds (registration.py). AOTAutograd traces through rms_norm, add_rms_norm, rotary, norm_rotary and
gated_activation, so that Inductor fuses them with their neighbours. gated_mlp, cross_entropy and linear_cross_entropy
stay opaque: their bodies loop over blocks of rows (blocks.py). embedding_backward and scale are for backward alone, and
have twins that write in place, add_embedding_backward and scale_in_place, for backward_passes/. The backwards of rotary
and norm_rotary have twins that are kept whole until backward_passes/ has seen them, and others for more gradients
(joined.py).

No Triton is imported here.
"""

from . import (
    add_rms_norm,
    cross_entropy,
    embedding,
    gated_mlp,
    joined,
    linear_cross_entropy,
    norm_rotary,
    pre_norm,
    rms_norm,
    rotary,
    scale,
)

__all__ = [
    "add_rms_norm",
    "cross_entropy",
    "embedding",
    "gated_mlp",
    "joined",
    "linear_cross_entropy",
    "norm_rotary",
    "pre_norm",
    "rms_norm",
    "rotary",
    "scale",
]
