"""The test kit for authors of patterns: assertions for tests of a pattern, and the spelling fuzzer.

    assert_rewrites(model, x, expect={"rms_norm.llama": 2})
    assert_refuses(model, x, pattern="rms_norm", reason="one number a channel")
    assert_close_to_eager(model, x)
    fuzz(pattern)

It needs torch only, and no test framework. docs/writing_a_pattern.md shows how to use it.
"""

from liger_compile.testing.assertions import assert_close_to_eager, assert_refuses, assert_rewrites
from liger_compile.testing.fuzzer import assert_mutant_is_safe, assert_respelling_matches, fuzz
from liger_compile.testing.precision import assert_no_worse

__all__ = [
    "assert_close_to_eager",
    "assert_mutant_is_safe",
    "assert_no_worse",
    "assert_refuses",
    "assert_respelling_matches",
    "assert_rewrites",
    "fuzz",
]
