"""Benchmarks: `python -m bench.NAME`. See README.md."""

import os

# What is measured as stock torch.compile is stock: with this variable it would be backend="liger".
os.environ.pop("LIGER_COMPILE_FOR_INDUCTOR", None)
