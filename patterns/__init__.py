"""The patterns that backend="liger" knows, one op a file: DEFAULT_PATTERNS, in no special order.

find_matches tries larger patterns first, and of two equally large ones the earlier. Import this package as
liger_compile.patterns: from the repository's root `import patterns` would make a second copy.
"""

from liger_compile.pattern import Pattern
from liger_compile.patterns import (
    add_rms_norm,
    attention,
    cross_entropy,
    gated_mlp,
    layer_norm,
    linear_cross_entropy,
    mlp,
    norm_rotary,
    rms_norm,
    rotary,
)

DEFAULT_PATTERNS: tuple[Pattern, ...] = (
    *add_rms_norm.PATTERNS,
    *rms_norm.PATTERNS,
    *rotary.PATTERNS,
    *norm_rotary.PATTERNS,
    *layer_norm.PATTERNS,
    *gated_mlp.PATTERNS,
    *mlp.PATTERNS,
    *linear_cross_entropy.PATTERNS,
    *cross_entropy.PATTERNS,
    *attention.PATTERNS,
)
