"""Notes on graphs that are compiled apart from their loss: layers one by one, logits that are returned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import liger_compile

ARGUMENTS = {"backend": "liger", "options": {"liger.inner": "eager"}}
LAYER, LOGITS = "one layer of a model", "may be logits"
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    use_cache=False,
)


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(CONFIG)


def batch(num_padded=0):
    ids = torch.arange(32).view(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :num_padded] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}


def notes(text):
    return [note for report in liger_compile.reports() for note in report.notes if text in note]


def in_place(model):
    for layer in model.model.layers:
        layer.compile(**ARGUMENTS)


def as_accelerate_does(model):
    """accelerate's compile_regions: each layer of the list, and each module beside it."""
    layers = [torch.compile(layer, **ARGUMENTS) for layer in model.model.layers]
    model.model.layers = nn.ModuleList(layers)
    model.model.embed_tokens = torch.compile(model.model.embed_tokens, **ARGUMENTS)
    model.lm_head = torch.compile(model.lm_head, **ARGUMENTS)


@pytest.mark.parametrize("compiled", [in_place, as_accelerate_does])
@pytest.mark.parametrize("num_padded", [0, 3])
def test_layers_that_are_compiled_one_by_one_have_one_note(compiled, num_padded):
    model = llama()
    compiled(model)
    model(**batch(num_padded)).loss.backward()
    (note,) = notes(LAYER)  # the two layers share their graph
    assert "with its attention in self_attn (LlamaAttention)" in note and "compile the whole model" in note
    assert ("with a mask from outside" in note) == bool(num_padded)
    assert len(notes(LOGITS)) == (compiled is as_accelerate_does)


def test_layers_behind_frozen_layers_have_the_note():
    """As LoRA trains them: what comes out of the embedding needs no gradient."""
    model = llama()
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.requires_grad_()
    in_place(model)
    model(**batch()).loss.backward()
    assert len(liger_compile.reports()) == 2 and len(notes(LAYER)) == 1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class DecoderBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.q, self.kv = Block(), nn.Linear(16, 16), nn.Linear(16, 32)

    def forward(self, x, memory):
        x = self.own(x)
        q, k, v = (
            each.unflatten(-1, (2, 8)).transpose(1, 2) for each in (self.q(x), *self.kv(memory).chunk(2, -1))
        )
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_of_a_decoder_has_two_attentions(dynamic):
    layer = torch.compile(DecoderBlock(), dynamic=dynamic, **ARGUMENTS)
    layer(torch.randn(2, 5, 16, requires_grad=True) * 1, torch.randn(2, 7, 16)).sum().backward()
    (note,) = notes(LAYER)
    assert "attention in own (Block)" in note


def whole():
    torch.compile(llama(), **ARGUMENTS)(**batch()).loss.backward()


def whole_with_padding():
    torch.compile(llama(), **ARGUMENTS)(**batch(3)).loss.backward()


def whole_of_embeddings():
    """As prompt tuning calls a model: the hidden states that come in need gradients."""
    given = batch()
    embeddings = torch.randn(2, 16, 32, requires_grad=True) * 1
    torch.compile(llama(), **ARGUMENTS)(inputs_embeds=embeddings, labels=given["labels"]).loss.backward()


def without_gradients():
    model = llama()
    in_place(model)
    with torch.no_grad():
        model(**batch())


def frozen():
    model = llama().requires_grad_(False)
    in_place(model)
    model(**batch())


def a_block_alone():
    torch.compile(Block(), **ARGUMENTS)(torch.randn(2, 5, 16, requires_grad=True)).sum().backward()


def a_block_with_its_loss():
    block, head = Block(), nn.Linear(16, 64)

    def step(x, labels):
        return F.cross_entropy(head(block(x)).flatten(0, 1), labels)

    x = torch.randn(2, 5, 16, requires_grad=True) * 1
    torch.compile(step, **ARGUMENTS)(x, torch.zeros(10, dtype=torch.long)).backward()


def a_stack_of_many():
    """An encoder without a loss of classes, called from eager code."""
    stack = nn.Sequential(*(Block() for _ in range(3)))
    torch.compile(stack, **ARGUMENTS)(torch.randn(2, 5, 16, requires_grad=True) * 1).sum().backward()


def attention_between_graph_breaks():
    """As where weights are gathered before each linear layer: a piece of a layer."""

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = (torch.randn(2, 2, 5, 8, requires_grad=True) * 1 for _ in range(3))
    torch.compile(attend, **ARGUMENTS)(q, k, v).sum().backward()


def an_mlp():
    mlp = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 16))
    torch.compile(mlp, **ARGUMENTS)(torch.randn(2, 5, 16, requires_grad=True) * 1).sum().backward()


ALARMS = [
    whole,
    whole_with_padding,
    whole_of_embeddings,
    without_gradients,
    frozen,
    a_block_alone,
    a_block_with_its_loss,
    a_stack_of_many,
    attention_between_graph_breaks,
    an_mlp,
]


@pytest.mark.parametrize("program", ALARMS)
def test_other_programs_have_no_note(program):
    program()
    assert liger_compile.reports() and not notes(LAYER) and not notes(LOGITS)


# Logits that are returned to a loss in other code.


def own_loss(model, labels, **given):
    logits = model(**given).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_the_note_on_logits_says_what_to_do():
    model, given = llama(), batch()
    compiled = torch.compile(model, **ARGUMENTS)
    own_loss(compiled, **given).backward()
    (note,) = notes(LOGITS)
    assert "pass the labels to a model that returns its loss, or compile a function that calls both" in note
    assert "linear_cross_entropy" not in str(liger_compile.reports()[-1])


@pytest.mark.parametrize("way", ["labels", "function"])
def test_what_the_note_on_logits_says_helps(way):
    model, given = llama(), batch()
    if way == "labels":
        torch.compile(model, **ARGUMENTS)(**given).loss.backward()
    else:
        torch.compile(own_loss, **ARGUMENTS)(model, **given).backward()
    assert not notes(LOGITS)
    assert any(site.pattern.startswith("linear_cross_entropy") for site in liger_compile.reports()[-1].sites)


def test_an_evaluation_has_no_note_on_its_logits():
    given = batch()
    del given["labels"]
    with torch.no_grad():
        torch.compile(llama(), **ARGUMENTS)(**given)
    assert not notes(LOGITS)
