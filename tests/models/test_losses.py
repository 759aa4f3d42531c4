"""Ways to get a loss out of a Llama: its own with a count of items, one of the user's, the whole model compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liger_compile
from tests.models.families import BY_NAME, of_one_layer
from tests.models.harness import (
    Step,
    assert_replaced,
    assert_within,
    batch,
    by_default,
    compiled,
    gradients,
    step,
)

EXACT = 1e-5
LLAMA = of_one_layer(BY_NAME["llama"])
REPLACED = by_default(LLAMA.counts)


def assert_all_replaced(function: Any, *inputs: Any, by: str = "linear_cross_entropy") -> None:
    model = LLAMA.build()
    expected = step(function, model, *inputs)
    assert_within(step(compiled(function, "eager"), model, *inputs), expected, EXACT)
    others = {op: count for op, count in REPLACED.items() if op != "linear_cross_entropy"}
    assert_replaced({**others, by: REPLACED["linear_cross_entropy"]})


@pytest.mark.parametrize("items", [torch.tensor(37), 37], ids=["tensor", "int"])
def test_num_items_in_batch(items: Any) -> None:
    def loss(model: nn.Module, ids: Tensor, labels: Tensor, items: Any) -> Tensor:
        return model(input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=items).loss

    assert_all_replaced(loss, *batch(LLAMA), items)


def test_label_smoothing() -> None:
    def loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[..., :-1, :]
        labels = labels[..., 1:].reshape(-1)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels, label_smoothing=0.1)

    assert_all_replaced(loss, *batch(LLAMA))


def test_class_dimension_in_the_middle() -> None:
    def loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.float().transpose(1, 2), labels)

    assert_all_replaced(loss, *batch(LLAMA))


def test_weights_of_tokens() -> None:
    def loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        losses = F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), reduction="none")
        weights = torch.linspace(0, 1, labels.shape[1])
        return (losses.view(labels.shape) * weights).sum() / weights.sum()

    assert_all_replaced(loss, *batch(LLAMA), by="linear_softmax")


@pytest.mark.parametrize("logits", ["auto", "eager"])
def test_the_whole_model(logits: str) -> None:
    model, inputs = LLAMA.build(), batch(LLAMA)
    expected = step(LLAMA.loss, model, *inputs)
    model.zero_grad()
    loss = LLAMA.loss(compiled(model, options={"liger.logits": logits}), *inputs)
    loss.backward()
    assert_within(Step(loss.detach(), gradients(model)), expected, EXACT)
    is_fused = logits == "auto"
    assert_replaced({**REPLACED, "linear_cross_entropy": int(is_fused)})
    (report,) = liger_compile.reports()
    left = [site for site in report.sites if site.kind == "leave"]
    (note,) = report.notes
    assert [site.pattern for site in left] == ([] if is_fused else ["linear_cross_entropy.plain"])
    assert ("computed on the first read" if is_fused else "liger.logits is 'eager'") in note
    assert is_fused or "the graph returns them" in left[0].reason
