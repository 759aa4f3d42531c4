"""The patterns of backend="liger", one op per file: DEFAULT_PATTERNS, in no particular order.

find_matches tries larger patterns first, and of two equally large patterns the earlier one. Import this package as
liger_compile.patterns: `import patterns` from the repository's root would create a second copy.
"""

from liger_compile.pattern import Pattern
from liger_compile.patterns import (
    attention,
    cross_entropy,
    gated_mlp,
    layer_norm,
    linear_cross_entropy,
    linear_softmax,
    lora,
    mlp,
    norm_rotary,
    rms_norm,
    rotary,
)

DEFAULT_PATTERNS: tuple[Pattern, ...] = (
    *rms_norm.PATTERNS,
    *rotary.PATTERNS,
    *norm_rotary.PATTERNS,
    *layer_norm.PATTERNS,
    *gated_mlp.PATTERNS,
    *mlp.PATTERNS,
    *linear_softmax.PATTERNS,
    *linear_cross_entropy.PATTERNS,
    *cross_entropy.PATTERNS,
    *attention.PATTERNS,
    *lora.PATTERNS,
)
