"""Programs that tests run on several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def rows_of(program: Path, size: int, *arguments: str) -> list[dict[str, Any]]:
    """The lines of JSON that rank 0 of `size` processes of a program prints.

    The program gets its rank as under torchrun, which would be one more process that imports torch, and the address of
    the store where the processes meet in STORE.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
        environment["STORE"] = f"file://{folder}/store"
        processes = [
            subprocess.Popen(
                [sys.executable, str(program), *arguments],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                stderr=subprocess.DEVNULL if rank else subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            printed, errors = processes[0].communicate(timeout=500)
            codes = [process.wait(timeout=60) for process in processes]
            assert codes == [0] * size, errors[-3000:]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
