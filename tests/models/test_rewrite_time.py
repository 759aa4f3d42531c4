"""The rewrite takes time in proportion to the number of layers."""

from __future__ import annotations

import pytest
import torch

import liger_compile
from tests.models.families import BY_NAME
from tests.models.harness import batch, compiled


@pytest.mark.slow
def test_linear_in_layers() -> None:
    # Four times the layers; twice as much per layer would be a factor of 8, quadratic growth one of 16.
    assert rewrite_seconds(16) <= 6 * rewrite_seconds(4)


def rewrite_seconds(layers: int) -> float:
    """The shortest of three, since whatever else runs on the machine only adds."""
    family = BY_NAME["llama"]
    model, inputs = family.build(num_hidden_layers=layers), batch(family)
    found = []
    for _ in range(3):
        torch._dynamo.reset()
        compiled(family.loss, "eager")(model, *inputs)
        found.append(liger_compile.reports()[-1].seconds)
    return min(found)
