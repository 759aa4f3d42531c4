"""Makes the modules beside the tests importable (pytest's importlib mode does not), and isolates the tests."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before is left, and no report."""
    import liger_compile

    torch._dynamo.reset()
    liger_compile.clear_reports()
    with warnings.catch_warnings():
        # Said of transformers' own functions, whatever the backend.
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        yield
    torch._dynamo.reset()
