"""What every test can ask for: a clean process, and what the backend did with a function."""

import os

# Two cores, small tensors: threads cost more than they bring, and results do not depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import liger_compile


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _clean():
    """No test sees what another compiled."""
    torch._dynamo.reset()
    liger_compile.clear_reports()
    torch.manual_seed(0)


@pytest.fixture
def run_liger():
    """run(function, *args, **options) -> (result, reports) of one call under backend="liger"."""

    def run(function, *args, **options):
        liger_compile.clear_reports()
        settings = {"liger.inner": "eager", "liger.strict": True}
        settings.update({f"liger.{name}": value for name, value in options.items()})
        result = torch.compile(function, backend="liger", options=settings)(*args)
        return result, liger_compile.reports()

    return run
