"""The models that the tests train: one line a family, with how many sites of each pattern must be rewritten.

All have two layers. The models of transformers are its own classes, unmodified; the others are spelled as
people spell theirs. A key of the counts is an op ("rms_norm": any pattern of it) or a pattern's full name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import transformers.integrations.moe  # registers its operators
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.models.meta_llama_style import MetaLlama
from tests.models.nanogpt_style import NanoGPT
from tests.models.packed_style import Packed, packed_loss
from tests.models.torchtitan_style import Titan, cross_entropy_loss

VOCAB, WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 128, 64, 96, 2, 4, 2


# In a compiled graph and float32, transformers computes the grouped product of experts by an operator of its own, whose
# backward AOTAutograd can trace, with any backend, since it is an operator too. Before, experts' weights are gathered
# for each token.
_GROUPED_CAN_BE_TRACED = hasattr(torch.ops.transformers, "grouped_mm_fallback_backward")


def has_experts(model: nn.Module) -> bool:
    return any("Experts" in type(module).__name__ for module in model.modules())


@dataclass(frozen=True)
class Family:
    name: str
    make: Callable[..., nn.Module]  # keywords are overrides of the config
    loss: Callable[..., Tensor]  # of (model, ids, labels)
    counts: Mapping[
        str, int
    ]  # what must be replaced, or marked for recompute, where only the loss is returned
    ignore_index: int = -100
    is_here: bool = True  # False for a model of transformers that the installed release has not

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
        """The same weights each time, in `dtype`; buffers keep theirs."""
        torch.manual_seed(0)
        model = self.make(**overrides).train()
        if dtype is torch.float32 and has_experts(model) and not _GROUPED_CAN_BE_TRACED:
            model.set_experts_implementation("batched_mm")
        random = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            # Weights as large as in life, and no norm's weight 1 or bias 0, which would hide a mistake with it.
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.dim() == 1:
                parameter.data = (parameter.data + 0.1 * noise).to(dtype)
            else:
                parameter.data = (noise * parameter.shape[-1] ** -0.5).to(dtype)
        return model


def hf_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return model(input_ids=ids, labels=labels, use_cache=False).loss


def nanogpt_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return model(ids, labels)[1]


def meta_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(ids)
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


def titan_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy_loss(model(ids), labels)


def titan_positions_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Two documents packed into each row, so the rotary table is gathered."""
    positions = torch.arange(ids.shape[1]).remainder(ids.shape[1] // 2).expand(ids.shape)
    return cross_entropy_loss(model(ids, positions), labels)


# What transformers' configs call sizes, whatever the family: each takes those that it has.
_TRANSFORMERS_SIZES = {
    "vocab_size": VOCAB,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), INNER),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"), LAYERS
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    # Every token takes every expert, so that rounding cannot send one elsewhere.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    "num_key_value_heads": KV_HEADS,
    "patch_size": 4,
    "image_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(kind: Any, **overrides: Any) -> Any:
    """A config of transformers, by its class or model_type, small and without dropout, and its inner ones alike."""
    cls = CONFIG_MAPPING[kind] if isinstance(kind, str) else kind
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    made = {name: size for name, size in _TRANSFORMERS_SIZES.items() if name in fields}
    made |= {name: 0.0 for name, value in fields.items() if "drop" in name and isinstance(value, float)}
    for name, inner in cls.sub_configs.items():
        if inner is not transformers.AutoConfig:
            made[name] = config(inner)
    return cls(**{**made, **overrides})


def hf(
    name: str, model: str, counts: Mapping[str, int] | None = None, of: Any = None, **overrides: Any
) -> Family:
    """A model of transformers; `of` is its config's class where that is not the model's own."""

    def make(**more: Any) -> nn.Module:
        cls = getattr(transformers, model)
        given = {key: value() if callable(value) else value for key, value in {**overrides, **more}.items()}
        return cls(config(of or cls.config_class, **given))

    return Family(name, make, hf_loss, counts or {}, is_here=hasattr(transformers, model))


_SIZES = {"vocab": VOCAB, "width": WIDTH, "layers": LAYERS, "heads": HEADS}
_GQA = {"inner": INNER, "kv_heads": KV_HEADS}

# A layer has two norms, and there is one at the end.
_PRE_NORM = {"rms_norm": 5}
# Two more a layer, on attention's and the MLP's outputs (Gemma 2, GLM-4).
_TWO_MORE = {"rms_norm": 9}
_LOSS = {"linear_cross_entropy": 1}
_NORM_ROTARY = {"norm_rotary.llama_half_pair": 2}
_ROTARY, _SWIGLU, _GEGLU = {"rotary": 2}, {"gated_mlp.swiglu": 2}, {"gated_mlp.geglu": 2}
_LLAMA = {**_PRE_NORM, **_ROTARY, **_SWIGLU, **_LOSS}
# Where no padding is given, transformers' masks are causal for any length. Gemma 2 writes its attention out:
# earlier releases of transformers take SDPA by default, which leaves out the cap.
_CAUSAL, _CAPPED = {"attention.causal": 2}, {"attention.capped_causal": 2}
# Attention written out, as transformers does where it has to.
_EAGER = {"attn_implementation": "eager"}
_GPT2 = {"n_inner": INNER, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_PACKED = {"gated_mlp.swiglu_packed": 2}

FAMILIES = (
    hf("llama", "LlamaForCausalLM", {**_LLAMA, **_CAUSAL}),
    hf("mistral", "MistralForCausalLM", {**_LLAMA, **_CAUSAL}),
    hf("mistral_window", "MistralForCausalLM", {**_LLAMA, "attention.window": 2}, sliding_window=5),
    # Experts' down projection is a grouped product, so the gate and up are multiplied alone.
    hf(
        "mixtral",
        "MixtralForCausalLM",
        {**_PRE_NORM, **_ROTARY, "gated_mlp.swiglu_product": 2, **_CAUSAL, **_LOSS},
    ),
    hf("qwen2", "Qwen2ForCausalLM", {**_LLAMA, **_CAUSAL}),
    # q and k are normed a head, and rotated: before their heads go in front of the tokens, and after.
    hf("qwen3", "Qwen3ForCausalLM", {**_PRE_NORM, **_NORM_ROTARY, **_SWIGLU, **_CAUSAL, **_LOSS}),
    hf("gemma", "GemmaForCausalLM", {**_PRE_NORM, **_ROTARY, **_GEGLU, **_CAUSAL, **_LOSS}),
    # The cap is low, so that it bends these logits.
    hf(
        "gemma2",
        "Gemma2ForCausalLM",
        {**_TWO_MORE, **_ROTARY, **_GEGLU, **_CAPPED, **_LOSS},
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
        **_EAGER,
    ),
    # Every other layer sees the last few tokens only.
    hf(
        "gemma2_window",
        "Gemma2ForCausalLM",
        {
            **_TWO_MORE,
            **_ROTARY,
            **_GEGLU,
            "attention.capped_window": 1,
            "attention.capped_causal": 1,
            **_LOSS,
        },
        sliding_window=5,
        attn_logit_softcapping=2.0,
        **_EAGER,
    ),
    hf(
        "gemma3",
        "Gemma3ForCausalLM",
        {**_TWO_MORE, "norm_rotary.gemma_half_pair_as_it_is": 2, **_GEGLU, **_CAUSAL, **_LOSS},
    ),
    # LayerNorm and an MLP without a gate.
    hf("phi", "PhiForCausalLM", {**_ROTARY, **_CAUSAL, **_LOSS}, num_key_value_heads=HEADS),
    hf("phi3", "Phi3ForCausalLM", {**_PRE_NORM, **_ROTARY, **_PACKED, **_CAUSAL, **_LOSS}),
    # One norm a layer: LayerNorm without a bias, which is RMSNorm of what is left when the mean is taken off.
    hf("cohere", "CohereForCausalLM", {"rms_norm": 3, **_ROTARY, **_SWIGLU, **_CAUSAL, **_LOSS}),
    # LayerNorm without weights.
    hf("olmo", "OlmoForCausalLM", {**_ROTARY, **_SWIGLU, **_CAUSAL, **_LOSS}),
    hf("glm4", "Glm4ForCausalLM", {**_TWO_MORE, **_ROTARY, **_PACKED, **_CAUSAL, **_LOSS}),
    hf(
        "stablelm",
        "StableLmForCausalLM",
        {**_ROTARY, **_SWIGLU, **_CAUSAL, **_LOSS},
        num_key_value_heads=HEADS,
    ),
    # Encoder 2 x 2 + 1 norms and decoder 2 x 3 + 1; no rotary.
    # The decoder's own attention has a learned bias, and its attention to the encoder a mask of zeros.
    hf(
        "t5",
        "T5ForConditionalGeneration",
        {"rms_norm": 12, "gated_mlp.geglu": 4, "attention.unmasked": 2, **_LOSS},
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    ),
    Family("nanogpt", lambda **more: NanoGPT(**{**_SIZES, **more}), nanogpt_loss, _LOSS, ignore_index=-1),
    Family(
        "nanogpt_written_out",
        lambda **more: NanoGPT(**{**_SIZES, **more}, is_written_out=True),
        nanogpt_loss,
        {**_CAUSAL, **_LOSS},
        ignore_index=-1,
    ),
    hf("llama_written_out", "LlamaForCausalLM", {**_LLAMA, **_CAUSAL}, **_EAGER),
    hf(
        "phi_written_out",
        "PhiForCausalLM",
        {**_ROTARY, **_CAUSAL, **_LOSS},
        num_key_value_heads=HEADS,
        **_EAGER,
    ),
    hf("gpt2_written_out", "GPT2LMHeadModel", {**_CAUSAL, **_LOSS}, **_GPT2, **_EAGER),
    Family(
        "meta_llama",
        lambda **more: MetaLlama(**{**_SIZES, **_GQA, **more}),
        meta_loss,
        {**_LLAMA, **_CAUSAL},
    ),
    Family("torchtitan", lambda **more: Titan(**{**_SIZES, **_GQA, **more}), titan_loss, _LLAMA),
    Family("packed", lambda **more: Packed(**{**_SIZES, **_GQA, **more}), packed_loss, _LLAMA),
    Family(
        "torchtitan_packed", lambda **more: Titan(**{**_SIZES, **_GQA, **more}), titan_positions_loss, _LLAMA
    ),
)

BY_NAME = {family.name: family for family in FAMILIES}


def of_one_layer(family: Family) -> Family:
    """The model with one layer, for what does not differ from layer to layer: half the time.

    Of the sites of a pattern, both layers have equally many, and one more may be at the end.
    """

    layers = "num_hidden_layers" if family.loss is hf_loss else "layers"

    def make(**overrides: Any) -> nn.Module:
        return family.make(**{layers: 1, **overrides})

    counts = {name: (count + 1) // 2 for name, count in family.counts.items()}
    return dataclasses.replace(family, make=make, counts=counts)
