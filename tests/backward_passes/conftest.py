"""What tests of passes over backward can ask for."""

from __future__ import annotations

import pytest
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config


@pytest.fixture
def uncached():
    """Graphs are compiled anew, because a cached graph runs no passes; compiled C++ is kept from test to test."""
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield
