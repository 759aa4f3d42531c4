"""`python -m liger_compile doctor`: prints versions, device and settings, and whether the backend works here.

The checks run in the order of CHECKS. A check that finds a fault ends the run, because the later checks depend on it.
One check compiles a training step of a small model and compares it with eager mode.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liger_compile
from liger_compile.for_inductor import VARIABLE, is_used_for_inductor
from liger_compile.ops.dispatch import has_kernel
from liger_compile.options import Options, parse
from liger_compile.report.verify import Verification, verify
from liger_compile.torch_internals import typed

OLDEST_TORCH = (2, 11)
NEWEST_TESTED_TORCH = (2, 14)
BACKENDS = "torch_dynamo_backends"  # the group of entry points that torch.compile reads
EXTENSIONS = "torch.backends"  # the group that the import of torch reads

# Environment variables that change what is compiled, or where it runs.
PREFIXES = (
    "CUDA_",
    "LIGER_",
    "PYTORCH_",
    "TORCHDYNAMO_",
    "TORCHINDUCTOR_",
    "TORCH_COMPILE",
    "TORCH_LOGS",
    "TRITON_",
)
SET_BY_TORCH = ("TORCHINDUCTOR_CACHE_DIR",)  # on import
DISABLING = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")


@dataclass(frozen=True)
class Finding:
    """The result of a check: `ok` and `NO` are verdicts, `--` is information and not a fault."""

    mark: Literal["ok", "--", "NO"]
    sentence: str

    def __str__(self) -> str:
        return f"{self.mark}   {self.sentence}"


def doctor(inner: str = "inductor") -> int:
    """Prints what works on this machine and what does not.

    Args:
        inner: the compiler of the small model, as in the option liger.inner.

    Returns:
        The exit code: 0 if the backend works, 1 if not.
    """
    for name, fact in _facts():
        print(f"{name:<14} {fact}")
    print()
    for check in CHECKS:
        for finding in check(inner):
            print(finding, flush=True)
            if finding.mark == "NO":
                return 1
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    yield "liger-compile", f"{liger_compile.__version__} ({os.path.dirname(liger_compile.__file__)})"
    yield "python", f"{platform.python_version()} ({platform.platform()})"
    for package in ("torch", "triton", "transformers"):
        yield package, _version(package)
    yield "device", _device()
    yield "CUDA", f"torch is built for {torch.version.cuda or 'none'}, the driver takes {_driver() or 'none'}"
    yield (
        "backend",
        ", ".join(f"{entry.name} = {entry.value}" for entry in _backends()) or "no entry point",
    )
    yield "environment", f"\n{'':<15}".join(f"{name}={value}" for name, value in _settings()) or "nothing set"


def _settings() -> list[tuple[str, str]]:
    """Returns the environment variables that change what is compiled, in alphabetical order."""
    return [
        (name, value)
        for name, value in sorted(os.environ.items())
        if name.startswith(PREFIXES) and name not in SET_BY_TORCH
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    if not torch.cuda.is_available():
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    found = typed.device_properties(torch.cuda.current_device())
    capability = f"compute capability {found.major}.{found.minor}"
    return f"{found.name} ({capability}, {found.total_memory / 2**30:.0f} GiB), {torch.cuda.device_count()} in all"


def _driver() -> str | None:
    """Returns the newest CUDA version that the NVIDIA driver supports, as "13.0"; None if there is no driver."""
    version = ctypes.c_int()
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else None


def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
    """Returns the entry points of a group, of all installed packages."""
    return list(importlib.metadata.entry_points(group=group))


def _backends() -> list[importlib.metadata.EntryPoint]:
    return [entry for entry in entry_points(BACKENDS) if entry.name == "liger"]


def _torch(_: str) -> Iterator[Finding]:
    version = _version("torch")
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < OLDEST_TORCH:
        yield Finding("NO", f"torch {version} is too old; install torch {_dotted(OLDEST_TORCH)} or later")
    elif found > NEWEST_TESTED_TORCH:
        newest = _dotted(NEWEST_TESTED_TORCH)
        yield Finding("--", f"torch {version} is later than {newest}, the latest version that was tested")
    else:
        yield Finding("ok", f"torch {version} is supported")


def _dotted(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def _environment(_: str) -> Iterator[Finding]:
    known = {field.metadata["env"] for field in dataclasses.fields(Options)}
    for name in sorted(name for name in os.environ if name.startswith("LIGER_") and name != VARIABLE):
        if name in known:
            yield Finding("--", f"{name}={os.environ[name]} applies to every compilation in this environment")
        else:
            yield Finding(
                "--",
                f"{name} is set, but no option reads it; the options read {', '.join(filter(None, known))}",
            )
    try:
        parse(None, {})
    except ValueError as error:
        yield Finding("NO", str(error))


def _for_inductor(_: str) -> Iterator[Finding]:
    if (source := is_used_for_inductor()) is not None:
        yield Finding("--", f'torch.compile uses backend="liger" for "inductor" too: {source}')
    if os.environ.get(VARIABLE, "0") in ("", "0"):
        return
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
        why = "TORCH_DEVICE_BACKEND_AUTOLOAD is 0"
    elif not any(entry.value.startswith("liger_compile") for entry in entry_points(EXTENSIONS)):
        why = "no installed package has the entry point; install liger-compile again"
    else:
        return
    yield Finding("--", f"{VARIABLE} takes effect only where a program imports liger_compile: {why}")


def _discovery(_: str) -> Iterator[Finding]:
    entries = _backends()
    if "liger" not in typed.list_backends(()):
        yield Finding(
            "NO",
            'torch.compile does not find backend="liger": no installed package has the entry point; install '
            "liger-compile with pip, a folder on the Python path is not enough",
        )
    elif values := sorted({entry.value for entry in entries} - {"liger_compile.backend:liger"}):
        yield Finding(
            "NO", f'another package has the backend name "liger" too ({values[0]}); uninstall one of the two'
        )
    else:
        yield Finding("ok", 'torch.compile finds backend="liger" by name')
    if (installed := _version("liger-compile")) not in ("not installed", liger_compile.__version__):
        yield Finding(
            "--",
            f"pip installed version {installed}, but Python imports {liger_compile.__version__}; install again",
        )


def inductor_needs() -> str | None:
    """Returns what Inductor lacks on this machine, or None."""
    if torch.cuda.is_available():
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "clang++", "cl")):
        return "there is no C++ compiler (g++ or clang++)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's C headers (Python.h) are not installed"
    return None


def _compiler(inner: str) -> Iterator[Finding]:
    if inner != "inductor":
        return
    missing = inductor_needs()
    yield (
        Finding("NO", f"Inductor cannot compile: {missing}")
        if missing
        else Finding("ok", "Inductor has its compiler")
    )


def _training_step(inner: str) -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    typed.manual_seed(0)
    model, tokens = TinyModel().to(device), torch.arange(64, device=device).view(2, 32)
    options = {"liger.inner": inner, "liger.policy": "always", "liger.fuel": None}
    try:
        found = verify(model, tokens, tokens.roll(-1, 1), options=options)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        yield Finding("NO", f"a small model does not compile: {type(error).__name__}: {lines[0]}")
        return
    yield _verdict(found, inner)


def _verdict(found: Verification, inner: str) -> Finding:
    """Returns the result of the comparison of the small model."""
    if not found.reports:
        disabling = [name for name in DISABLING if os.environ.get(name, "0") not in ("", "0")]
        why = f": {disabling[0]} is set" if disabling else ""
        return Finding("NO", f"torch.compile passed no graph to the backend{why}")
    if not found.is_right:
        return Finding(
            "NO", f"a small model gives other numbers than eager mode; please report this text\n\n{found}"
        )
    names = sorted(
        {site.pattern for report in found.reports for site in report.sites if site.kind == "replace"}
    )
    if not names:
        report = "\n".join(map(str, found.reports))
        return Finding("NO", f"nothing was replaced in a small model; please report this text\n\n{report}")
    return Finding(
        "ok", f"a training step, compiled by {inner}, agrees with eager; replaced: {', '.join(names)}"
    )


def _kernels(_: str) -> Iterator[Finding]:
    if torch.cuda.is_available() and has_kernel(torch.empty(0, device="cuda")):
        yield Finding("ok", "the Triton kernels run on this device")
        return
    why = (
        _why_no_cuda() if not torch.cuda.is_available()
        else "triton is not installed" if not importlib.util.find_spec("triton")
        else "they are for NVIDIA GPUs from compute capability 8.0 on"
    )  # fmt: skip
    yield Finding("--", f"no Triton kernels ({why}): the ops run as their references in plain PyTorch")


def _why_no_cuda() -> str:
    if not torch.version.cuda:
        return "this build of torch has no CUDA"
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).strip().split(". ")[0].splitlines()[0].rstrip(".")
    return "no CUDA device is visible"


class TinyModel(nn.Module):
    """An embedding, an RMSNorm, a gated MLP, and a head with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.norm = nn.Parameter(torch.rand(32) + 0.5)
        self.gate, self.up = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down, self.head = nn.Linear(48, 32, bias=False), nn.Linear(32, 64, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of predicting `targets`, int64 (B, T), from `tokens`, int64 (B, T)."""
        x = self.embedding(tokens)
        h = self.norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


CHECKS: tuple[Callable[[str], Iterator[Finding]], ...] = (
    _torch,
    _environment,
    _for_inductor,
    _discovery,
    _compiler,
    _training_step,
    _kernels,
)
