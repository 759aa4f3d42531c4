"""The loss on the CPU needs at most a quarter of the memory that it needs under stock torch.compile."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VOCABULARY = 32_000
_CPU = Path("/proc/cpuinfo")
MULTIPLIES_BFLOAT16 = _CPU.exists() and re.search("avx512_bf16|amx_bf16", _CPU.read_text()) is not None


@pytest.mark.slow  # tests/ops/test_cross_entropy.py measures the op alone
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param(
            "bfloat16",
            marks=pytest.mark.skipif(
                not MULTIPLIES_BFLOAT16,
                reason="the CPU's library multiplies float32 copies of the weight here, under either compiler",
            ),
        ),
    ],
)
def test_peak_memory(dtype: str) -> None:
    assert peak("liger", dtype) <= 0.25 * peak("inductor", dtype)


def peak(variant: str, dtype: str) -> int:
    """Bytes that head + cross-entropy, forward and backward, add at 2048 x 256 x VOCABULARY. The bench measures
    in a process of its own; its module is in the repository, not in the package."""
    command = [sys.executable, "-m", "bench.loss_memory", "one", variant, dtype, str(VOCABULARY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
