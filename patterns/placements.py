"""Checks of the placements of DTensors that several patterns share."""

import torch

from liger_compile.pattern import Match
from liger_compile.torch_internals import dtensor


def whole_rows(match: Match) -> str | None:
    """Reject DTensors unless each rank computes its rows of x alone, with operands that all ranks have.

    So no collective is between the matched operations, and a rank may compute them again.
    """
    operands = {name: match[name] for name in match.captures if isinstance(match[name], torch.Tensor)}
    values = [node.meta.get("example_value") for node in match.nodes]
    computed = [value for value in values if isinstance(value, torch.Tensor)]
    if not any(map(dtensor.is_dtensor, (*operands.values(), *computed))):
        return None
    x = operands.pop("x")
    if dtensor.is_dtensor(x) and dtensor.have_whole_rows(x, operands.values(), computed):
        return None
    return "its DTensors are not whole rows on each rank with weights that all ranks have"
