"""What versions of torch cannot do, as parameters of tests."""

from __future__ import annotations

import pytest
import torch

INFERENCE_MODE = pytest.param(
    torch.inference_mode,
    marks=pytest.mark.xfail(
        torch.__version__ < (2, 13),
        reason="torch 2.11's FunctionalTensor knows no base of what views an input in inference mode: a KeyError while "
        "AOTAutograd traces, with any backend",
        raises=torch._dynamo.exc.BackendCompilerFailed,
        strict=True,
    ),
)
