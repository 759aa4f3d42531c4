"""Runs an example of docs/examples: `python -m tests.helpers.examples WAY SAVED PROGRAM [ARGUMENT ...]`."""

from __future__ import annotations

import runpy
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import liger_compile
from liger_compile.for_inductor import is_used_for_inductor


def trained(program: str, way: str) -> dict[str, Tensor]:
    """The parameters of the model that a program trains, and their gradients. What it prints is printed.

    `way` is "eager", or "liger", which compiles without Inductor.
    """
    compile = torch.compile

    def without_inductor(*args: Any, backend: Any = "inductor", options: Any = None, **kwargs: Any) -> Any:
        if backend == "liger" or (backend == "inductor" and is_used_for_inductor()):
            options = {**(options or {}), "liger.inner": "aot_eager"}
        return compile(*args, backend=backend, options=options, **kwargs)

    def eager(*args: Any, backend: Any = "inductor", **kwargs: Any) -> Any:
        # What a framework compiles for itself, by stock torch.compile, is no matter of the program.
        if backend == "liger" or is_used_for_inductor():
            return args[0] if args else lambda function: function
        return compile(*args, backend=backend, **kwargs)

    def reports() -> Any:
        return (SimpleNamespace(sites=(), count=len),)  # a program prints the last one

    is_eager = way == "eager"
    with (
        mock.patch.object(torch, "compile", eager if is_eager else without_inductor),
        mock.patch.object(liger_compile, "reports", reports if is_eager else liger_compile.reports),
    ):
        names = runpy.run_path(program, run_name="__main__")

    model = getattr(names["model"], "module", names["model"])  # of DeepSpeed's engine
    model = getattr(model, "_orig_mod", model)
    tensors = {name: getattr(each, "ds_tensor", each) for name, each in model.named_parameters()}
    gradients = {f"{name}.grad": each.grad for name, each in tensors.items() if each.grad is not None}
    return {name: whole(each) for name, each in (tensors | gradients).items()}


def whole(tensor: Any) -> Tensor:
    """A copy of the values of all processes, in float32."""
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone().float()


if __name__ == "__main__":
    how, saved, *sys.argv = sys.argv[1:]
    torch.save(trained(sys.argv[0], how), saved)
