"""The same numbers, and the same sites, in every way that people train and evaluate a model; see also test_ways.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import liger_compile
from liger_compile.runtime import shared_zeros
from liger_compile.torch_internals.aot_autograd import cache_counts
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
LENGTHS = (24, 40, 17)
LLAMA = of_one_layer(BY_NAME["llama"])
REPLACED = by_default(LLAMA.counts)
GRAPH = (
    "eager"  # the graph alone; the others have AOTAutograd, which decides what backward keeps and computes
)


def check(
    function: Callable[..., Tensor], model: nn.Module, *inputs: Any, counts: Any = None, **kwargs: Any
) -> None:
    """A step of `function` is as in eager mode, with all sites of Llama (or `counts`) replaced in one graph."""
    expected = step(function, model, *inputs)
    assert_within(step(compiled(function, **kwargs), model, *inputs), expected, EXACT)
    assert_replaced(REPLACED if counts is None else counts)
    assert len(liger_compile.reports()) == 1


def test_gradient_checkpointing_under_inductor() -> None:
    model, inputs = LLAMA.build(), batch(LLAMA)  # test_ways.py has two layers: two checkpoints
    expected = step(LLAMA.loss, model, *inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_within(step(compiled(LLAMA.loss, "inductor"), model, *inputs), expected, EXACT)
    assert_replaced(REPLACED)


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("glm4", "phi")), "torchtitan"]
)
def test_dynamic(name: str) -> None:
    family = BY_NAME[name]
    model, function = (
        family.build(),
        compiled(family.loss, GRAPH, dynamic=True),
    )  # test_ways.py has AOTAutograd
    for length in LENGTHS:
        inputs = batch(family, length)
        assert_within(step(function, model, *inputs), step(family.loss, model, *inputs), EXACT)
    assert_replaced(by_default(family.counts))  # and so compiled once


@pytest.mark.slow
def test_dynamic_where_not_all_sites_are_found() -> None:
    family = BY_NAME["t5"]
    model, function = family.build(), compiled(family.loss, dynamic=True)
    for length in LENGTHS:
        inputs = batch(family, length)
        assert_within(step(function, model, *inputs), step(family.loss, model, *inputs), EXACT)


def test_retain_graph() -> None:
    model, inputs = LLAMA.build(), batch(LLAMA)

    def run(function: Callable[..., Tensor]) -> Step:
        model.zero_grad()
        loss = function(model, *inputs)
        loss.backward(retain_graph=True)
        loss.backward(torch.tensor(0.5))
        return Step(loss.detach(), gradients(model))

    assert_within(run(compiled(LLAMA.loss)), run(LLAMA.loss), EXACT)
    assert_replaced(REPLACED)


def test_frozen_head() -> None:
    model = LLAMA.build()
    model.lm_head.weight.requires_grad_(False)
    check(LLAMA.loss, model, *batch(LLAMA))


def test_only_head_trained() -> None:
    model = LLAMA.build().requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    check(LLAMA.loss, model, *batch(LLAMA))


def test_tied_embeddings() -> None:
    model = LLAMA.build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check(LLAMA.loss, model, *batch(LLAMA))


def test_all_labels_ignored() -> None:
    model, (ids, labels) = LLAMA.build(), batch(LLAMA)
    labels = torch.full_like(labels, LLAMA.ignore_index)
    expected = step(LLAMA.loss, model, ids, labels)
    got = step(compiled(LLAMA.loss, GRAPH), model, ids, labels)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert_replaced(REPLACED)


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_evaluation(no_gradients: Any) -> None:
    model, inputs = LLAMA.build().eval(), batch(LLAMA)
    with no_gradients():
        expected, got = LLAMA.loss(model, *inputs), compiled(LLAMA.loss)(model, *inputs)
    torch.testing.assert_close(got, expected, rtol=EXACT, atol=0)
    assert_replaced(REPLACED)


def test_twice_with_warm_caches() -> None:
    model, inputs = LLAMA.build(), batch(LLAMA)
    expected = step(LLAMA.loss, model, *inputs)
    for _ in range(2):
        torch._dynamo.reset()
        liger_compile.clear_reports()
        hits = cache_counts()["hit"]
        assert_within(step(compiled(LLAMA.loss, "inductor"), model, *inputs), expected, EXACT)
        assert_replaced(REPLACED)
    assert cache_counts()["hit"] == hits + 1


def test_gradient_accumulation() -> None:
    model = LLAMA.build()

    def run(function: Callable[..., Tensor]) -> Step:
        model.zero_grad()
        total = torch.zeros(())
        for seed in range(3):
            loss = function(model, *batch(LLAMA, seed=seed)) / 3
            loss.backward()
            total += loss.detach()
        return Step(total, gradients(model))

    assert_within(run(compiled(LLAMA.loss, GRAPH)), run(LLAMA.loss), EXACT)
    assert_replaced(REPLACED)


def test_default_use_cache() -> None:
    model, (ids, _) = LLAMA.build(), batch(LLAMA)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    check(loss, model, ids, counts={**REPLACED, **attention_with_masks(loss, model, ids)})


def attention_with_masks(function: Callable[..., Any], *inputs: Any) -> dict[str, int]:
    """How many calls of attention Dynamo captures with a mask; the others have nothing to replace. In some modes, one
    release of transformers makes a mask and another asks for `is_causal`."""
    targets: list[Node] = []

    def backend(gm: GraphModule, _: Any) -> Callable[..., Any]:
        targets.extend(gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention))
        return gm.forward

    torch.compile(function, backend=backend)(*inputs)
    torch._dynamo.reset()
    return {"attention.causal": sum(node.kwargs.get("attn_mask") is not None for node in targets)}


RETURNED = {
    "nothing else": lambda outputs: outputs.loss,
    "keys alone": lambda outputs: outputs.past_key_values.layers[0].keys.square().sum(),
    "logits too": lambda outputs: outputs.loss + outputs.logits.square().mean(),
}


@pytest.mark.parametrize("used", RETURNED)
def test_a_cache_that_is_returned(used: str) -> None:
    """Two outputs a layer that nobody uses, or somebody does (runtime/shared_zeros.py)."""
    model, (ids, _) = LLAMA.build(), batch(LLAMA)

    def trained(function: Callable[..., Any]) -> tuple[Any, Step]:
        outputs = function(input_ids=ids, labels=ids)
        value, parameters = RETURNED[used](outputs), dict(model.named_parameters())
        found = torch.autograd.grad(
            value, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        return outputs, Step(value.detach(), dict(zip(parameters, found, strict=True)))

    _, expected = trained(model)
    outputs, found = trained(compiled(model))
    assert_within(found, expected, EXACT)
    assert hasattr(outputs.loss.grad_fn, shared_zeros.STRIDES)  # its backward makes the zeros


def test_fullgraph() -> None:
    check(LLAMA.loss, LLAMA.build(), *batch(LLAMA), inner=GRAPH, fullgraph=True)


def test_reduce_overhead() -> None:
    model, inputs = LLAMA.build(), batch(LLAMA)
    function = torch.compile(LLAMA.loss, backend="liger", mode="reduce-overhead")
    expected = step(LLAMA.loss, model, *inputs)
    for _ in range(3):
        assert_within(step(function, model, *inputs), expected, EXACT)
    assert_replaced(REPLACED)
    (report,) = liger_compile.reports()
    marked = ("gated_mlp.swiglu", "rms_norm")
    assert report.count("annotate") == sum(LLAMA.counts[op] for op in marked)


_SIZES = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"n_layer": 1, "n_head": 4, "n_embd": 64, "n_positions": 64}
_BERT = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 96}
_NO_DROPOUT_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_NO_DROPOUT_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_warning_between_logits_and_loss_does_not_break_the_graph(name: str) -> None:
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(**_SIZES, **_GPT2, **_NO_DROPOUT_GPT2)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(**_SIZES, **_BERT, **_NO_DROPOUT_BERT, is_decoder=True)
        model = transformers.BertLMHeadModel(config)
    counts = dict(BY_NAME["nanogpt"].counts)
    counts |= attention_with_masks(LLAMA.loss, model.train(), *batch(LLAMA))
    check(LLAMA.loss, model, *batch(LLAMA), counts=counts, inner=GRAPH)
