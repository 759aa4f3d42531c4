"""A vocabulary that is divided over the ranks of a process group: the classes of each rank, and softmax over all.

Rank r of R has the classes r * ceil(V / R) to (r + 1) * ceil(V / R) - 1 of V, as the placement Shard(0) of a DTensor
divides the rows of a weight. The last ranks may have fewer classes, or none.

The softmax of a row needs its largest logit, the sum of its exponentials, and the logit of its class. Each rank
computes the three numbers for its classes. One all_gather brings those of all ranks to every rank. Every rank combines
them in the same order, so that all ranks have the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liger_compile.torch_internals.distributed import all_gather_into, process_group

from .softmax_loss import ELSEWHERE

IGNORED = -100  # the label of ignored tokens


@dataclass(frozen=True, eq=False)
class VocabularyShard:
    """The part of `classes` classes that this rank of `group` has."""

    group: Any
    classes: int

    @classmethod
    def of(cls, group_name: str, classes: int) -> VocabularyShard:
        return cls(process_group(group_name), classes)

    @property
    def most(self) -> int:
        """The classes of rank 0, which has as many as any rank."""
        return -(-self.classes // self.group.size())

    @property
    def first(self) -> int:
        return min(self.group.rank() * self.most, self.classes)

    @property
    def own(self) -> int:
        """The number of classes of this rank."""
        return min(self.most, self.classes - self.first)

    def check(self, weight: Tensor) -> None:
        """Reject a weight that has not the rows of this rank."""
        if weight.shape[0] != self.own:
            raise ValueError(
                f"sharded_linear_cross_entropy: expected {self.own} rows of weight on rank {self.group.rank()} of "
                f"{self.group.size()} for {self.classes} classes, got {weight.shape[0]}; shard the weight by "
                "distribute_tensor(weight, mesh, [Shard(0)])"
            )

    def labels(self, target: Tensor, ignore_index: int) -> Tensor:
        """Return the targets (N) as columns of this rank, IGNORED, or ELSEWHERE for classes of other ranks."""
        column = target - self.first
        column = column.masked_fill((column < 0) | (column >= self.own), ELSEWHERE)
        return column.masked_fill(target == ignore_index, IGNORED)

    def combined(self, row_max: Tensor, log_sum: Tensor, z_label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return row_max, log_sum and z_label (C) of all classes, from those of this rank. A collective.

        Args:
            row_max, log_sum: (C), both -inf for a rank without classes.
            z_label: (C), 0 where the class of the token is elsewhere.
        """
        of_all = self._gathered(torch.stack((row_max, log_sum, z_label)))
        highs, log_sums, z_labels = of_all.unbind(1)
        row_max = highs.amax(0)
        return row_max, (log_sums + (highs - row_max)).exp().sum(0).log(), z_labels.sum(0)

    def _gathered(self, values: Tensor) -> Tensor:
        """Return the values (...) of all ranks (R, ...)."""
        of_all = values.new_empty((self.group.size(), *values.shape))
        all_gather_into(of_all.flatten(0, 1), values, self.group)
        return of_all
