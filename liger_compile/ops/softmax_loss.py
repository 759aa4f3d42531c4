"""The softmax cross-entropy of a block of logits and its gradient, shared by both cross-entropy ops.

    z    = softcap * tanh(logit_scale * logits / softcap)         without softcap: logit_scale * logits
    logp = log_softmax(z)                                         = (z - row_max) - log_sum
    loss = w[t] * ((1 - e) * -logp[t] + z_loss * lse^2) + e/V * sum_c(w[c] * -logp[c])

    logits (C, V), t target (C), w class weights (V) or 1, e label_smoothing, lse = row_max + log_sum

With `is_shard`, the V columns are a part of all classes, and a target that is ELSEWHERE is a class of another part: its
token counts, and no column is its class.

A token whose target is ignore_index has loss 0 and gradient 0. All computation is in float32 (float64 for float64
logits), from the rounded logits. A block has few enough rows that a wide copy of it is cheap.

Sources: torch.nn.functional.cross_entropy; Szegedy et al. 2015 (label smoothing, arXiv 1512.00567);
Chowdhery et al. 2022 (z-loss, arXiv 2204.02311); Gemma Team 2024 (softcap, arXiv 2408.00118).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import accumulation_dtype

ELSEWHERE = -1


@dataclass(frozen=True, eq=False)
class SoftmaxLoss:
    class_weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    logit_scale: float
    softcap: float | None
    z_loss: float
    is_shard: bool = False

    @property
    def terms(self) -> tuple[Tensor | None, int, float, float, float | None, float]:
        return (
            self.class_weight,
            self.ignore_index,
            self.label_smoothing,
            self.logit_scale,
            self.softcap,
            self.z_loss,
        )

    def scores(self, logits: Tensor) -> Tensor:
        """Return z in the accumulation dtype; `logits` themselves if z equals them."""
        z = logits.to(accumulation_dtype(logits.dtype))
        if self.logit_scale != 1.0:
            z = z * self.logit_scale
        if self.softcap is not None:
            z = torch.tanh(z / self.softcap) * self.softcap
        return z

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return dz / dlogits, from a new tanh: near the bound, z / softcap has lost the remainder 1 - tanh^2."""
        if self.softcap is None:
            return self.logit_scale
        scaled = logits.to(accumulation_dtype(logits.dtype)) * self.logit_scale
        return (1 - torch.tanh(scaled / self.softcap).square()) * self.logit_scale

    def check(self, target: Tensor, classes: int, by_kernel: bool) -> None:
        """Reject a target that is no class, as F.cross_entropy does.

        On a CPU this raises an IndexError. On other devices an assertion on the device fails, because nothing waits for
        the device. Without a kernel of ours, `gather` has that assertion.
        """
        if target.device.type == "cpu":
            wrong = target[(target != self.ignore_index) & ((target < 0) | (target >= classes))]
            if wrong.numel():
                raise IndexError(f"Target {wrong[0].item()} is out of bounds.")
        elif by_kernel:
            from ..kernels import softmax_loss as kernels

            kernels.assert_classes(target, classes, self.ignore_index)

    def counted(self, target: Tensor) -> Tensor:
        return target != self.ignore_index

    def index(self, target: Tensor) -> Tensor:
        """Return the targets (C, 1), with a valid class for targets that are ignored or elsewhere."""
        is_none = target < 0 if self.is_shard else target == self.ignore_index
        return target.masked_fill(is_none, 0).unsqueeze(-1)

    def token_weight(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """Return w[t] (C), 0 where the target is ignored. reduction="mean" divides by its sum.

        Where a target is no class, the value is arbitrary; `check` reports such a target.
        """
        if self.class_weight is None:
            return self.counted(target).to(dtype)
        index = self.index(target).squeeze(-1).clamp(0, len(self.class_weight) - 1)
        weight = self.class_weight.to(dtype)[index]
        return weight.masked_fill(~self.counted(target), 0)

    def largest_gradient(self, like: Tensor, classes: int, largest_logit: Tensor | None) -> Tensor:
        """Return an upper bound () of |d loss / d logits| of a token, in like's dtype; a z-loss needs largest_logit."""
        weights = like.new_ones(1) if self.class_weight is None else self.class_weight.to(like.dtype).abs()
        through_p = weights.amax() * (1 - self.label_smoothing)
        if largest_logit is not None:
            lse = largest_logit * abs(self.logit_scale) if self.softcap is None else self.softcap
            through_p = through_p + 2 * abs(self.z_loss) * (lse + math.log(classes)) * weights.amax()
        spread = self.label_smoothing * (weights.mean() + weights.amax() / classes)
        return (through_p + spread) * abs(self.logit_scale)

    def statistics(self, z: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        """Return (row_max, log_sum) (C). Where z is largest, logp is -log_sum."""
        return z.amax(-1), -logp.amax(-1)

    def lse(self, z: Tensor, logp: Tensor) -> Tensor | None:
        """Return row_max + log_sum (C) for a z-loss; without a z-loss return None, which saves a pass over z."""
        if not self.z_loss:
            return None
        row_max, log_sum = self.statistics(z, logp)
        return row_max + log_sum

    def losses(self, logp: Tensor, lse: Tensor | None, target: Tensor) -> Tensor:
        """Return the loss of each token (C)."""
        index, weight = self.index(target), self.token_weight(target, logp.dtype)
        loss = -logp.gather(-1, index).squeeze(-1) * (1 - self.label_smoothing)
        if lse is not None:
            loss = loss + self.z_loss * lse.square()
        loss = loss * weight
        if self.label_smoothing:
            smooth = logp if self.class_weight is None else logp * self.class_weight.to(logp.dtype)
            loss = loss - smooth.sum(-1) * (self.label_smoothing / logp.shape[-1])
        # A fill, not a multiplication: the logits of an ignored token may have a loss that is not finite.
        return loss.masked_fill(~self.counted(target), 0)

    def gradient_(
        self, logp: Tensor, logits: Tensor, lse: Tensor | None, target: Tensor, upstream: Tensor
    ) -> Tensor:
        """Return the gradient of (losses * upstream).sum() with respect to the logits. Overwrites logp."""
        classes = logp.shape[-1]
        upstream = upstream.masked_fill(~self.counted(target), 0)
        weight = self.token_weight(target, logp.dtype) * upstream
        onehot = weight * (1 - self.label_smoothing)
        through_p = onehot
        if lse is not None:
            through_p = through_p + 2 * self.z_loss * lse * weight
        spread = upstream * (self.label_smoothing / classes)
        if self.label_smoothing:
            mass = classes if self.class_weight is None else self.class_weight.to(logp.dtype).sum()
            through_p = through_p + spread * mass
        grad = logp.exp_()
        if grad.device.type != "cpu" or not (through_p == 1).all():  # saves a pass over grad where all are 1
            grad.mul_(through_p.unsqueeze(-1))
        if self.label_smoothing and self.class_weight is None:
            grad.sub_(spread.unsqueeze(-1))
        elif self.label_smoothing and self.class_weight is not None:
            grad.addcmul_(spread.unsqueeze(-1), self.class_weight.to(logp.dtype), value=-1)
        if self.is_shard:
            onehot = onehot.masked_fill(target == ELSEWHERE, 0)
        grad.scatter_add_(-1, self.index(target), -onehot.unsqueeze(-1))
        slope = self.slope(logits)
        return grad if isinstance(slope, float) and slope == 1.0 else grad.mul_(slope)

    def reduce(self, losses: Tensor, weight: Tensor, reduction: str) -> Tensor:
        """Return the reduced loss; "mean" divides by the sum of the tokens' weights.

        Where all weights are 0 the mean is NaN, as in F.cross_entropy. Label smoothing gives a token a loss also if the
        weight of its own class is 0, and that loss divided by 0 would be infinite.
        """
        if reduction == "none":
            return losses
        total = losses.sum()
        if reduction == "sum":
            return total
        if self.class_weight is not None and self.label_smoothing:
            total = total * weight.any()
        return total / weight.sum()
