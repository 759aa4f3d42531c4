"""The device of the demo: its name, and the memory that tensors take on it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def device_name() -> str:
    """Returns the name of the GPU; without one, the CPU with its number of threads."""
    is_gpu = torch.cuda.is_available()
    return torch.cuda.get_device_name() if is_gpu else f"a CPU (number of threads: {torch.get_num_threads()})"


def peak_bytes(run: Callable[[], object]) -> int:
    """Returns the peak of the bytes that tensors take while `run` runs, above what is allocated before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of the profiler
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profiled.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")
