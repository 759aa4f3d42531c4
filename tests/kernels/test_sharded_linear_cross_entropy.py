"""The op for a vocabulary that ranks divide, by kernels and by its reference: all ranks in this process, in turn.

tests/models/test_tensor_parallel.py has real processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from liger_compile.ops import sharded_linear_cross_entropy as op
from liger_compile.ops import vocabulary_shard
from liger_compile.ops.linear_cross_entropy import chunks_of
from liger_compile.ops.softmax_loss import SoftmaxLoss
from liger_compile.testing import precision
from tests.helpers.pairwise import parametrize

pytest.importorskip("triton")

HIDDEN, TOKENS = 16, 9


@dataclass
class Group:
    """A process group of which this process is each rank in turn."""

    ranks: int
    current: int = 0

    def size(self):
        return self.ranks

    def rank(self):
        return self.current


@pytest.fixture
def on_ranks(monkeypatch):
    """Calls a function for each rank, and returns the results; what ranks exchange does not depend on what they get."""

    def run(size, function):
        group, sent = Group(size), [[] for _ in range(size)]
        monkeypatch.setattr(vocabulary_shard, "process_group", lambda _: group)

        def record(gathered, values, _):
            sent[group.current].append(values.clone())
            gathered.zero_()

        def answer(gathered, values, _):
            (every,) = {len(one) for one in sent}  # all ranks run the same number of collectives
            gathered.copy_(torch.cat([one[at[group.current]] for one in sent]))
            at[group.current] += 1
            assert at[group.current] <= every

        results = []
        for gather in (record, answer):
            at = [0] * size
            monkeypatch.setattr(vocabulary_shard, "all_gather_into", gather)
            results = []
            for group.current in range(size):
                results.append(function(group.current))
        return results

    return run


def sharded(on_ranks, ranks, x, weight, bias, target, *numbers, class_weight=None, memory=0):
    """Loss and gradients of all ranks: the gradients of x added, the others put together."""
    classes = len(weight)
    most = -(-classes // ranks)

    def of_rank(rank):
        part = slice(min(rank * most, classes), min((rank + 1) * most, classes))
        leaves = [each.detach().clone().requires_grad_() for each in (x, weight[part], bias[part])]
        loss, *_ = torch.ops.liger_compile.sharded_linear_cross_entropy(
            leaves[0],
            leaves[1],
            target,
            leaves[2],
            class_weight,
            -100,
            *numbers,
            "",
            classes,
            True,
            True,
            True,
            memory,
        )
        loss.backward()
        return loss.detach(), *(leaf.grad for leaf in leaves)

    losses, dx, *others = zip(*on_ranks(ranks, of_rank), strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    total = torch.stack([each.double() for each in dx]).sum(0).to(x.dtype)
    return losses[0], total, *map(torch.cat, others)


def eager(x, weight, bias, target, reduction, scale, softcap, class_weight=None):
    leaves = [each.detach().clone().requires_grad_() for each in (x, weight, bias)]
    z = F.linear(*leaves).to(torch.float64 if x.dtype == torch.float64 else torch.float32) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    class_weight = None if class_weight is None else class_weight.to(z.dtype)
    loss = F.cross_entropy(z, target, class_weight, reduction=reduction)
    loss.backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


@parametrize(
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    ranks=[1, 2, 3],
    classes=[1, 31, 256],  # a rank may have no class
    reduction=["mean", "sum"],
    softcap=[None, 5.0],
    weighted=[False, True],
)
def test_no_worse_than_eager_code(device, on_ranks, dtype, ranks, classes, reduction, softcap, weighted):
    torch.manual_seed(0)
    shapes = (TOKENS, HIDDEN), (classes, HIDDEN), (classes,)
    operands = [torch.randn(shape).to(device, dtype) for shape in shapes]
    target = torch.randint(classes, (TOKENS,), device=device)
    target[::4] = -100
    numbers = reduction, 0.7, softcap
    weights = {"class_weight": (torch.rand(classes) * 3).to(device, dtype)} if weighted else {}
    exact = eager(*(each.double() for each in operands), target, *numbers, **weights)
    ours = sharded(on_ranks, ranks, *operands, target, *numbers, **weights)
    precision.assert_no_worse(ours, eager(*operands, target, *numbers, **weights), exact)


def test_all_ranks_have_the_chunks_of_the_largest_shard(device, on_ranks):
    """Rank 0 has 3 classes and 2 chunks; rank 1 has 2, and would have 1."""
    torch.manual_seed(0)
    tokens = 400
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((tokens, 4), (5, 4), (5,)))
    target = torch.randint(5, (tokens,))
    memory = 8 * 3 * 399
    ours = sharded(on_ranks, 2, x, weight, bias, target, "mean", 1.0, None, memory=memory)
    for found, wanted in zip(ours, eager(x, weight, bias, target, "mean", 1.0, None), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("device_type", ["cpu", "meta"])  # meta: as on a GPU
@pytest.mark.parametrize("memory", [0, 2**20])
@pytest.mark.parametrize("tokens", [100, 2048, 40000])
def test_the_length_of_chunks_does_not_depend_on_the_rank(device_type, memory, tokens):
    x = torch.empty(tokens, 64, dtype=torch.bfloat16, device=device_type)
    weights = [
        torch.empty(classes, 64, dtype=torch.bfloat16, device=device_type) for classes in (50000, 7, 0)
    ]
    assert len({str(chunks_of(x, weight, True, memory, 50000)) for weight in weights}) == 1


@pytest.mark.parametrize("statistics", [op.statistics_of, op.statistics_by_kernel])
def test_logits_that_are_not_finite(device, on_ranks, statistics):
    """A shard of -inf alone has no part in the softmax; infinite logits and rows of -inf give NaN, as in eager code."""
    logits = torch.randn(4, 6)
    logits[0, :3] = -torch.inf
    logits[1] = -torch.inf
    logits[2, 1] = torch.inf
    logits, target = logits.to(device), torch.tensor([4, 2, 3, 5], device=device)
    loss = SoftmaxLoss(None, vocabulary_shard.IGNORED, 0.0, 1.0, None, 0.0, is_shard=True)

    def of_rank(rank):
        shard = vocabulary_shard.VocabularyShard.of("", 6)
        part = logits[:, 3 * rank : 3 * rank + 3].contiguous()
        row_max, log_sum, z_label = shard.combined(*statistics(loss, part, shard.labels(target, -100)))
        return log_sum - (z_label - row_max)

    for losses in on_ranks(2, of_rank):
        torch.testing.assert_close(losses, F.cross_entropy(logits, target, reduction="none"), equal_nan=True)


def test_an_ignored_class_is_ignored_on_all_ranks(device, on_ranks):
    target = torch.tensor([0, 3, 4, 5], device=device)

    def of_rank(_):
        return vocabulary_shard.VocabularyShard.of("", 6).labels(target, 4).tolist()

    assert on_ranks(2, of_rank) == [[0, -1, -100, -1], [-1, 0, -100, 2]]


def test_a_weight_of_another_size_is_refused(device, on_ranks):
    x, target = torch.randn(2, 4), torch.tensor([0, 1])

    def of_rank(_):
        arguments = (
            x,
            torch.randn(4, 4),
            target,
            None,
            None,
            -100,
            "mean",
            1.0,
            None,
            "",
            6,
            True,
            True,
            False,
        )
        with pytest.raises(ValueError, match="expected 3 rows of weight on rank"):
            torch.ops.liger_compile.sharded_linear_cross_entropy(*arguments)

    on_ranks(2, of_rank)
