"""A step of a model that is measured in turns: what the processes of bench.train_step and bench.families share."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from bench.common import Row
from bench.timing import peak_bytes

LOCK = "BENCH_LOCK"  # variable of the environment: a file that processes lock
SLOT = "BENCH_SLOT"  # likewise: a number that a process shares with some of the others
SLOTS = 4  # such numbers: the step that compiles, or an eager one, needs as much memory as any
WARMUP = 2  # steps that are not measured: after the first, which compiles, and in each turn
LAUNCHED = 11  # steps whose launch is timed


@contextlib.contextmanager
def alone(slot: str = "") -> Iterator[None]:
    """Of the processes that are started at once, only one is in here; with a slot, one of those that share it.

    The system releases the lock of a process that dies.
    """
    if LOCK not in os.environ:
        yield
        return
    with open(os.environ[LOCK] + slot, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def one_of_few() -> contextlib.AbstractContextManager[None]:
    """Of the processes that are started at once, at most SLOTS are in here."""
    return alone(f".{os.environ.get(SLOT)}")


@contextlib.contextmanager
def suppressing_out_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:  # cuBLAS has one of its own, and a compiler wraps it
        if not any(words in str(error) for words in ("ALLOC_FAILED", "out of memory")):
            raise


class Turns:
    """A step: what a subclass does in `run_marked`, with `model` on `device`."""

    model: Any
    device: torch.device

    def run_marked(self, mark: Callable[[], Any]) -> torch.Tensor:
        """A step from no gradients on, with a mark at its begin, between forward and backward, and at its end.

        Returns the loss.
        """
        raise NotImplementedError

    def run(self) -> float:
        """A step without marks; returns the loss."""
        return self.run_marked(lambda: None).item()

    def turn(self, steps: int) -> Row:
        """Milliseconds of some steps and of their forwards, after some that are not measured."""
        marks = [self._marked() for _ in range(WARMUP + steps)][WARMUP:]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            marks = [(0.0, a.elapsed_time(b), a.elapsed_time(c)) for a, b, c in marks]
        return {
            "forward_ms": [forward - begin for begin, forward, _ in marks],
            "step_ms": [end - begin for begin, _, end in marks],
        }

    def settle(self) -> Row:
        """Warms up: seconds of a step, the loss, the norm of all gradients, and the most memory in bytes.

        The last is "" on a CPU.
        """
        seconds = [self._clocked() for _ in range(WARMUP)]
        loss, grad_norm = self.run(), self._grad_norm()
        self.clear()
        return {"step_s": seconds[-1], "loss": loss, "grad_norm": grad_norm, "peak": self.peak()}

    def peak(self) -> int | str:
        """The most memory of a step above weights and inputs, in bytes; "" on a CPU."""
        if self.device.type != "cuda":
            return ""
        peak = peak_bytes(self.run)
        self.clear()
        return peak

    def launch_ms(self) -> float | str:
        """Milliseconds that the CPU needs to launch a step, while the GPU waits for it; "" on a CPU.

        A step whose GPU time is shorter is as long as this.
        """
        if self.device.type != "cuda":
            return ""
        found = []
        for _ in range(LAUNCHED):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            self.run_marked(lambda: None)
            found.append(1000 * (time.perf_counter() - begin))
        torch.cuda.synchronize()
        return statistics.median(found)

    def clear(self) -> None:
        """Leaves the GPU's memory to the next process, but for the weights."""
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _grad_norm(self) -> float:
        norms = [_norm(p.grad) for p in self.model.parameters() if p.grad is not None]
        return torch.stack(norms).norm().item() if norms else 0.0

    def _marked(self) -> tuple[Any, ...]:
        marks: list[Any] = []

        def mark() -> None:
            if self.device.type == "cuda":
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            else:
                marks.append(1000 * time.perf_counter())

        self.run_marked(mark)  # the CPU may run ahead, as it does in training: no loss is read
        return tuple(marks)

    def _clocked(self) -> float:
        begin = time.perf_counter()
        self.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    norm = gradient.float().norm()
    return norm.full_tensor() if isinstance(norm, dist.tensor.DTensor) else norm
