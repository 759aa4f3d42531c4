"""The command line: `python -m liger_compile demo | explain MODULE:FACTORY | verify MODULE:FACTORY | doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

from liger_compile import demo
from liger_compile.explanation import explain
from liger_compile.ops.dispatch import has_kernel
from liger_compile.report import reports
from liger_compile.verification import Verification, verify

MIN_TORCH = (2, 11)

EXPLAIN_HELP = """\
Print what backend="liger" does with a model of yours, without training or compiling it.
"""

VERIFY_HELP = """\
Run one training step of a model of yours in eager mode and under backend="liger", and compare outputs,
gradients and what the step writes. Exit code 0 if all is right; if not, the first rewrite that makes a
difference is named.
"""

FACTORY_HELP = """
FACTORY is a function of no arguments in MODULE, which is imported from the current directory or the
Python path. It returns what to call and what to call it with:

    def factory():
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2))
        ids = torch.zeros(1, 64, dtype=torch.long)
        return model, {"input_ids": ids, "labels": ids}      # or: return model, (ids,), {"labels": ids}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m liger_compile",
        description='torch.compile(model, backend="liger"): what it does, on this machine, to a model.',
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo_parser = commands.add_parser(
        "demo",
        help="train a small Llama three ways and compare losses and memory (about three minutes)",
        description="Train a small Llama on the source of Python's standard library three ways: eager, "
        "stock torch.compile and backend='liger'. Prints the losses, the peak memory of each and what was "
        "rewritten. Exit code 0 if the losses agree.",
    )
    for field in dataclasses.fields(demo.Sizes):
        demo_parser.add_argument(f"--{field.name}", type=int, default=field.default, help=argparse.SUPPRESS)
    demo_parser.add_argument("--compiler", default="inductor", help=argparse.SUPPRESS)

    explain_parser = commands.add_parser(
        "explain",
        help="print what is recognised and replaced in a model of yours",
        description=EXPLAIN_HELP + FACTORY_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify_parser = commands.add_parser(
        "verify",
        help="compare one training step of a model of yours with eager mode",
        description=VERIFY_HELP + FACTORY_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for of_model in (explain_parser, verify_parser):
        of_model.add_argument("target", metavar="MODULE:FACTORY", help="for example my_model:factory")
        of_model.add_argument("--json", action="store_true", help="for programs")

    commands.add_parser(
        "doctor", help="print versions, device, and what will run here (exit code 0 if usable)"
    )

    chosen = parser.parse_args(arguments)
    if chosen.command == "demo":
        if not importlib.util.find_spec("transformers"):
            parser.error("the demo needs transformers; install it with: pip install 'liger-compile[demo]'")
        sizes = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(demo.Sizes)}
        return demo.main(demo.Sizes(**sizes), chosen.compiler)
    if chosen.command in ("explain", "verify"):
        try:
            model, args, kwargs = _call_of(chosen.target)
        except ValueError as error:
            commands.choices[chosen.command].error(str(error))
        found = (explain if chosen.command == "explain" else verify)(model, *args, **kwargs)
        print(json.dumps(found.to_dict(), indent=1) if chosen.json else found)
        return int(isinstance(found, Verification) and not found.is_right)
    return doctor()


def _call_of(target: str) -> tuple[Any, Sequence[Any], dict[str, Any]]:
    module_name, _, factory_name = target.partition(":")
    if not factory_name:
        raise ValueError(f"expected MODULE:FACTORY, got {target!r}; for example my_model:factory")
    sys.path.insert(0, "")  # as with `python -m`, a module of the current directory can be named
    if importlib.util.find_spec(module_name) is None:
        raise ValueError(f"there is no module {module_name!r} here or on the Python path")
    factory = getattr(importlib.import_module(module_name), factory_name, None)
    if not callable(factory):
        raise ValueError(f"module {module_name!r} has no function {factory_name!r}")
    match factory():
        case (model, dict() as kwargs) if callable(model):
            return model, (), kwargs
        case (model, tuple() | list() as args, dict() as kwargs) if callable(model):
            return model, args, kwargs
        case other:
            raise ValueError(
                f"{target} returned {type(other).__name__}; return (model, kwargs) or (model, args, kwargs)"
            )


def doctor() -> int:
    """Prints what will run on this machine and what will not; 0 if the backend can be used."""
    has_cuda = torch.cuda.is_available()
    facts = {
        "liger-compile": _version("liger-compile"),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "device": torch.cuda.get_device_name() if has_cuda else f"CPU ({platform.machine()})",
    }
    print("\n".join(f"{name:<14} {fact}" for name, fact in facts.items()), end="\n\n")

    problems = [_torch_problem(), _discovery_problem()]
    if not any(problems):
        problems += [_backend_problem(), _inductor_problem()]
    for problem in filter(None, problems):
        print(f"NO   {problem}")
    if any(problems):
        return 1
    print("ok   torch.compile finds backend='liger' by name")
    print("ok   it recognises and replaces an RMSNorm, and the numbers agree with eager")
    print("ok   Inductor can compile for this device")
    if has_cuda and has_kernel(torch.empty(0, device="cuda")):
        print("ok   the ops' Triton kernels run on this device")
    else:
        why = (
            "no CUDA device" if not has_cuda
            else "triton is not installed" if not importlib.util.find_spec("triton")
            else "they are for NVIDIA GPUs from compute capability 8.0 on"
        )  # fmt: skip
        print(f"--   no Triton kernels ({why}): the ops run as their references in plain PyTorch")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch_problem() -> str | None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    wanted = ".".join(map(str, MIN_TORCH))
    return f"torch {torch.__version__} is too old; install {wanted} or newer" if version < MIN_TORCH else None


def _discovery_problem() -> str | None:
    if "liger" in torch._dynamo.list_backends(exclude_tags=()):
        return None
    return "torch.compile does not know backend='liger'; install the package with pip (not only on the path)"


def _backend_problem() -> str | None:
    def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    x, weight = torch.randn(4, 64), torch.randn(64)
    options = {"liger.inner": "eager", "liger.policy": "always", "liger.strict": True}
    found = torch.compile(rms_norm, backend="liger", options=options)(x, weight)
    if not torch.allclose(found, rms_norm(x, weight), rtol=1e-5, atol=1e-6):
        return "a compiled RMSNorm gives other numbers than eager; please report this with the lines above"
    if not reports() or not reports()[-1].count("replace"):
        return "an RMSNorm was not recognised; please report this with the lines above"
    return None


def _inductor_problem() -> str | None:
    missing = demo.inductor_needs()
    return f"Inductor cannot compile here: {missing}" if missing else None


if __name__ == "__main__":
    sys.exit(main())
