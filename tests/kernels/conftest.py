"""Kernels run on the GPU if there is one, else interpreted on the CPU: the same tests, the same bar."""

import pytest
import torch


@pytest.fixture
def device(interpreted):
    return "cuda" if torch.cuda.is_available() else "cpu"
