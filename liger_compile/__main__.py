"""The command line: `python -m liger_compile demo | explain MODULE:FACTORY | verify MODULE:FACTORY | doctor`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from liger_compile import __version__
from liger_compile.cli import demo
from liger_compile.cli.doctor import doctor
from liger_compile.report.explain import Explanation, explain
from liger_compile.report.verify import Verification, verify

EXPLAIN_HELP = """\
Print what backend="liger" does with your model, without training or compiling it.
"""

VERIFY_HELP = """\
Run one training step of your model in eager mode and under backend="liger", and compare outputs,
gradients and what the step writes. Exit code 0 if all is right; if not, the first rewrite that makes a
difference is named.
"""

FACTORY_HELP = """
FACTORY is a function of no arguments in MODULE, which is imported from the current directory or the
Python path. It returns the model and its arguments:

    def factory():
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2))
        ids = torch.zeros(1, 64, dtype=torch.long)
        return model, {"input_ids": ids, "labels": ids}      # or: return model, (ids,), {"labels": ids}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command == "demo":
        if missing := [name for name in ("transformers", "rich") if not importlib.util.find_spec(name)]:
            needs = " and ".join(missing)
            parser.error(f"the demo needs {needs}; install with: pip install 'liger-compile[demo]'")
        sizes = demo.Sizes(*(getattr(chosen, name) for name in demo.Sizes._fields))
        return demo.main(sizes, chosen.compiler)
    if chosen.command in ("explain", "verify"):
        try:
            model, args, kwargs = _call_of(chosen.target)
        except ValueError as error:
            of_command: argparse.ArgumentParser = chosen.parser
            of_command.error(str(error))
        found = (explain if chosen.command == "explain" else verify)(model, *args, **kwargs)
        if isinstance(found, Explanation) and chosen.html:
            Path(chosen.html).write_text(found.to_html(), encoding="utf-8")
            return 0
        print(json.dumps(found.to_dict(), indent=1) if chosen.json else found)
        return int(isinstance(found, Verification) and not found.is_right)
    return doctor(chosen.inner)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m liger_compile",
        description='torch.compile(model, backend="liger"): what it does, on this machine, to a model.',
    )
    parser.add_argument("--version", action="version", version=f"liger-compile {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo_parser = commands.add_parser(
        "demo",
        help="train a small Llama in three ways and compare losses and memory (about three minutes)",
        description="Train a small Llama on the source of Python's standard library in three ways: eager, "
        "stock torch.compile and backend='liger'. Prints the losses, the peak memory of each and what was "
        "rewritten. Exit code 0 if the losses agree.",
    )
    for name, size in demo.Sizes()._asdict().items():
        demo_parser.add_argument(f"--{name}", type=int, default=size, help=argparse.SUPPRESS)
    demo_parser.add_argument("--compiler", default="inductor", help=argparse.SUPPRESS)

    explain_parser = commands.add_parser(
        "explain",
        help="print what is recognized and replaced in your model",
        description=EXPLAIN_HELP + FACTORY_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify_parser = commands.add_parser(
        "verify",
        help="compare one training step of your model with eager mode",
        description=VERIFY_HELP + FACTORY_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for of_model in (explain_parser, verify_parser):
        of_model.add_argument("target", metavar="MODULE:FACTORY", help="for example my_model:factory")
        of_model.set_defaults(parser=of_model)  # for its errors
        of_model.add_argument("--json", action="store_true", help="for programs")
    explain_parser.add_argument("--html", metavar="FILE", help="write a page to look at, instead of text")

    doctor_parser = commands.add_parser(
        "doctor",
        help="print versions and device, and whether the backend works here (exit code 0 if it does)",
        description="Print versions, device and settings, then compile a training step of a small model and compare "
        "it with eager mode. Exit code 0 if the backend works on this machine, 1 with the reason if not.",
    )
    doctor_parser.add_argument(
        "--inner",
        choices=("inductor", "aot_eager", "eager"),
        default="inductor",
        help="what compiles the small model, as in the option liger.inner",
    )
    return parser


def _call_of(target: str) -> tuple[Any, Sequence[Any], dict[str, Any]]:
    module_name, _, factory_name = target.partition(":")
    if not factory_name:
        raise ValueError(f"expected MODULE:FACTORY, got {target!r}; for example my_model:factory")
    sys.path.insert(0, "")  # as with `python -m`, modules of the current directory can be imported
    if importlib.util.find_spec(module_name) is None:
        raise ValueError(f"there is no module {module_name!r} here or on the Python path")
    factory = getattr(importlib.import_module(module_name), factory_name, None)
    if not callable(factory):
        raise ValueError(f"module {module_name!r} has no function {factory_name!r}")
    returned: object = factory()
    if isinstance(returned, tuple) and len(cast(tuple[Any, ...], returned)) in (2, 3):
        model, *rest, kwargs = cast(tuple[Any, ...], returned)
        args = rest[0] if rest else ()
        if callable(model) and isinstance(args, (tuple, list)) and isinstance(kwargs, dict):
            return model, cast(Sequence[Any], args), cast(dict[str, Any], kwargs)
    kind = type(cast(object, returned)).__name__
    raise ValueError(f"{target} returned {kind}; return (model, kwargs) or (model, args, kwargs)")


if __name__ == "__main__":
    sys.exit(main())
