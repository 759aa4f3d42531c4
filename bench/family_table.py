"""The cases of bench.families, as data: a model of transformers, its sizes, its batch, and what is special in its step.

Sizes are those of a published model but for the number of layers, unless `shows` says otherwise. With `tiny`, sizes
that TINY names are replaced, so that a step takes less than a second on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
IGNORED = -100  # a label without a loss


@dataclass(frozen=True)
class Case:
    """A step of a model, as its users write it.

    Args:
        name: of the row.
        shows: what this case has and the others have not, in words.
        model: a class of transformers.
        tokens: batch x length of what the model reads (batch alone for images).
        config: arguments of the model's config class.
        batch: the keyword arguments of a call, of (config, batch, length).
        text_config: arguments of the config of the text model inside, if that is what the sizes are for.
        tiny: arguments instead of, or beside, those of `config` with `--tiny`.
        tiny_tokens: `tokens` with `--tiny`.
        prepare: makes what is trained out of the model.
        weights: dtype of the weights.
        autocast: dtype of torch.autocast around the forward.
        scaler: whether torch.amp.GradScaler scales the loss.
        is_trained: False for a forward without gradients, in evaluation mode.
        reads_logits: whether logits are read after the forward, outside of the compiled code.
        mode: of torch.compile.
        tolerance: the largest relative difference of a loss from eager code's.
    """

    name: str
    shows: str
    model: str
    tokens: str
    config: Mapping[str, Any]
    batch: Callable[[Any, int, int], Inputs]
    text_config: Mapping[str, Any] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    tiny_tokens: str = "2x32"
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    weights: torch.dtype = torch.bfloat16
    autocast: torch.dtype | None = None
    scaler: bool = False
    is_trained: bool = True
    reads_logits: bool = False
    mode: str | None = None
    tolerance: float = 1e-2

    def config_of(self, tiny: bool) -> Any:
        """An instance of the model's config class."""
        import transformers

        cls = getattr(transformers, self.model).config_class
        given = dict(self.config)
        if self.text_config:
            given["text_config"] = dict(self.text_config)
        if tiny:
            given.update(_tiny_sizes(cls(), self.config), **self.tiny)
            if self.text_config:
                text = cls().text_config
                given["text_config"].update(_tiny_sizes(text, self.text_config), **self.tiny)
        return cls(**given)

    def build(self, config: Any, device: torch.device) -> nn.Module:
        """The model with random weights, the same in every process on that device."""
        import transformers

        torch.manual_seed(0)
        cls = getattr(transformers, self.model)
        with device:
            model = cls._from_config(config, dtype=self.weights)
        return self.prepare(model).train(self.is_trained)

    def inputs(self, config: Any, device: torch.device, tiny: bool) -> Inputs:
        """The same batch in every process."""
        torch.manual_seed(1)
        sizes = (self.tiny_tokens if tiny else self.tokens).split("x")
        batch, length = int(sizes[0]), int(sizes[-1])
        inputs = self.batch(config, batch, length)
        return {name: self._moved(value, device) for name, value in inputs.items()}

    def _moved(self, value: Any, device: torch.device) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, self.weights) if value.is_floating_point() else value.to(device)


# Batches.


def _ids(config: Any, batch: int, length: int) -> Tensor:
    return torch.randint(10, config.get_text_config().vocab_size, (batch, length))


def causal(config: Any, batch: int, length: int) -> Inputs:
    ids = _ids(config, batch, length)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def padded(config: Any, batch: int, length: int) -> Inputs:
    """Rows of lengths between half and all, filled on the right."""
    inputs = causal(config, batch, length)
    lengths = torch.linspace(length // 2, length, batch).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    labels = inputs["labels"].masked_fill(mask == 0, IGNORED)
    return {**inputs, "labels": labels, "attention_mask": mask}


def packed(config: Any, batch: int, length: int) -> Inputs:
    """Four documents in each row, known by positions that begin anew."""
    positions = torch.arange(length).remainder(length // 4).expand(batch, length).contiguous()
    return {**causal(config, batch, length), "position_ids": positions}


def masked_words(config: Any, batch: int, length: int) -> Inputs:
    """A label for 15 of 100 words."""
    ids = _ids(config, batch, length)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape) > 0.15, IGNORED)}


def two_texts(config: Any, batch: int, length: int) -> Inputs:
    """A text for the encoder, and another as long for the decoder."""
    ids, labels = _ids(config, batch, length), _ids(config, batch, length)
    return {"input_ids": ids, "labels": labels, "use_cache": False}


def images(config: Any, batch: int, length: int) -> Inputs:
    pixels = torch.randn(batch, config.num_channels, config.image_size, config.image_size)
    return {"pixel_values": pixels, "labels": torch.randint(config.num_labels, (batch,))}


def speech(config: Any, batch: int, length: int) -> Inputs:
    """Half a minute of sound in a row, and a text."""
    features = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": features, "labels": _ids(config, batch, length), "use_cache": False}


# What is made of a model.


def checkpointed(model: Any) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def with_lora(model: Any, targets: Sequence[str] | str = ("q_proj", "v_proj")) -> nn.Module:
    """Adapters of rank 16 beside the projections that `targets` names. Raises ImportError if peft is not installed."""
    import peft

    # Not the zeros that an adapter begins with, which would hide a mistake.
    adapters = peft.LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, adapters)


def with_lora_everywhere(model: Any) -> nn.Module:
    """Adapters beside all projections of the layers."""
    return with_lora(model, "all-linear")


def with_lora_checkpointed(model: Any) -> nn.Module:
    return with_lora_everywhere(checkpointed(model))


# Sizes.

# By the names that transformers' configs have for them: a config takes those that it has.
TINY: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 64),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("d_kv", "v_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "sliding_window": 16,
    "local_attention": 16,
    "image_size": 32,
    "num_mel_bins": 8,
    "max_source_positions": 32,
}
TINY_VOCABULARY, ROUND = 256, 64
HEAD_DIM = 16


def _tiny_sizes(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of TINY that a config has, and a vocabulary with the same remainder as the case's."""
    sizes = {name: size for name, size in TINY.items() if getattr(config, name, None) is not None}
    if "head_dim" in given:
        sizes["head_dim"] = HEAD_DIM
    if "vocab_size" in given or hasattr(config, "vocab_size"):
        sizes["vocab_size"] = TINY_VOCABULARY + given.get("vocab_size", config.vocab_size) % ROUND
    special = [name for name, value in vars(config).items() if name.endswith("token_id") and value]
    return sizes | dict.fromkeys(special, 1)


def _decoder(
    width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """The sizes of a decoder by the names that most configs have for them."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **more,
    }


_LLAMA_1B = _decoder(2048, 8192, 4, 32, 8, 128256, head_dim=64, tie_word_embeddings=True)
_LLAMA_3B = _decoder(3072, 8192, 4, 24, 8, 128256, head_dim=128, tie_word_embeddings=True)
_LLAMA_8B = _decoder(4096, 14336, 6, 32, 8, 128256, head_dim=128)
_LLAMA_32000 = _decoder(2048, 5632, 4, 32, 4, 32000, head_dim=64)
_GPT2 = {"n_layer": 4}
_BERT = {"num_hidden_layers": 4}


_NO_VISION = {"depth": 1, "embed_dim": 64, "num_heads": 4}  # it is not run


def _dropout(rate: float, *names: str) -> dict[str, float]:
    return dict.fromkeys(names, rate)


_GPT2_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_BERT_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_DROPPED_TOLERANCE = 4e-2
_ROUNDED_TOLERANCE = 2e-2  # of a loss that is itself computed in bfloat16


def _llama(
    name: str, shows: str, tokens: str = "4x2048", of: Mapping[str, Any] = _LLAMA_1B, **more: Any
) -> Case:
    return Case(name, shows, "LlamaForCausalLM", tokens, of, more.pop("batch", causal), **more)


_BERT_CASE = Case("bert", "a masked language model, V = 30522, without dropout", "BertForMaskedLM", "32x512",
    {**_BERT, **_dropout(0.0, *_BERT_DROPOUT)}, masked_words, tolerance=_ROUNDED_TOLERANCE)  # fmt: skip
_GPT2_CASE = Case("gpt2", "V = 50257: rows of logits that are not aligned; without dropout", "GPT2LMHeadModel",
    "8x1024", {**_GPT2, **_dropout(0.0, *_GPT2_DROPOUT)}, causal)  # fmt: skip

# Cases that take about as long to compile stand together, for they are compiled together.
CASES: Sequence[Case] = (
    _llama("llama-tied", "Llama-3.2-1B: head and embedding are one"),
    _llama("llama-8x256", "few tokens, V = 32000", "8x256", _LLAMA_32000),
    _llama("llama-1x128", "a short step, V = 32000", "1x128", _LLAMA_32000),
    _llama("llama-1x512", "few tokens, V = 128256", "1x512"),
    _llama("llama-added-token", "one more token: V = 128257", of={**_LLAMA_1B, "vocab_size": 128257}),
    _llama("llama-padded", "right-padded, with an attention_mask", "4x1024", batch=padded),
    _llama("llama-packed", "four documents in each row, by position_ids", "2x2048", batch=packed),
    _llama("llama-checkpointed", "gradient_checkpointing_enable()", "2x2048", prepare=checkpointed),
    _llama("llama-autocast", "float32 weights, autocast to bfloat16", "2x2048",
        weights=torch.float32, autocast=torch.bfloat16),
    _llama("llama-fp16-scaler", "float32 weights, autocast to float16, GradScaler", "2x2048",
        weights=torch.float32, autocast=torch.float16, scaler=True),
    _llama("llama-evaluation", "no_grad, only the loss is read", "2x2048", is_trained=False),
    _llama("llama-evaluation-logits", "no_grad, the logits are read", "2x2048", is_trained=False, reads_logits=True),
    _llama("llama-reduce-overhead", 'mode="reduce-overhead": CUDA graphs', "2x2048", mode="reduce-overhead"),
    _llama("lora", "frozen Llama-3.2-3B with peft's adapters beside q and v", "2x2048", _LLAMA_3B, prepare=with_lora),
    _llama("lora-everywhere", "frozen Llama-3.2-1B with peft's adapters beside all projections", "4x2048",
        prepare=with_lora_everywhere),
    _llama("lora-8b", "frozen Llama-3.1-8B with peft's adapters beside all projections", "2x4096", _LLAMA_8B,
        prepare=with_lora_everywhere),
    _llama("lora-8b-checkpointed", "the same, with gradient_checkpointing_enable()", "2x4096", _LLAMA_8B,
        prepare=with_lora_checkpointed),
    Case("qwen3", "Qwen3-0.6B: norms of q and k", "Qwen3ForCausalLM", "8x1024",
        _decoder(1024, 3072, 4, 16, 8, 151936, head_dim=128, tie_word_embeddings=True), causal),
    Case("qwen2-vl", "text model of Qwen2-VL-2B: rotary of three axes", "Qwen2VLForConditionalGeneration", "2x2048",
        {"tie_word_embeddings": True, "vision_config": _NO_VISION}, causal,
        text_config=_decoder(1536, 8960, 4, 12, 2, 151936, rope_parameters={
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}),
        tiny={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}),
    Case("mistral", "Mistral-7B: a window of 4096 of 8192 tokens", "MistralForCausalLM", "1x8192",
        _decoder(4096, 14336, 2, 32, 8, 32000, head_dim=128, sliding_window=4096), causal),
    Case("phi3", "Phi-3-mini: one matmul for q, k, v, one for gate and up", "Phi3ForCausalLM", "2x2048",
        _decoder(3072, 8192, 4, 32, 32, 32064), causal),
    _GPT2_CASE,
    dataclasses.replace(_GPT2_CASE, name="gpt2-dropout", shows="the same with dropout",
        config={**_GPT2, **_dropout(0.1, *_GPT2_DROPOUT)}, tolerance=_DROPPED_TOLERANCE),
    _BERT_CASE,
    dataclasses.replace(_BERT_CASE, name="bert-dropout", shows="the same with dropout",
        config={**_BERT, **_dropout(0.1, *_BERT_DROPOUT)}, tolerance=_DROPPED_TOLERANCE),
    Case("vit", "ViT-base: an encoder without text, 1000 classes", "ViTForImageClassification", "128",
        {"num_hidden_layers": 4, "num_labels": 1000}, images, tiny_tokens="4",
        tolerance=_ROUNDED_TOLERANCE),
    Case("modernbert", "ModernBERT-base: windows of 128, a masked language model", "ModernBertForMaskedLM", "32x512",
        {"num_hidden_layers": 6}, masked_words),
    Case("t5", "T5-base: encoder and decoder with position biases, without dropout", "T5ForConditionalGeneration",
        "16x512", {"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": 3, "num_decoder_layers": 3,
        "dropout_rate": 0.0, "decoder_start_token_id": 0}, two_texts, tolerance=_ROUNDED_TOLERANCE),
    Case("whisper", "Whisper-small: sound to text, V = 51865", "WhisperForConditionalGeneration", "16x448",
        {"d_model": 768, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "encoder_attention_heads": 12,
        "decoder_attention_heads": 12, "encoder_layers": 3, "decoder_layers": 3}, speech, tolerance=_ROUNDED_TOLERANCE),
    Case("gemma3", "Gemma-3-1B: five windows of 512 to one full layer, V = 262144", "Gemma3ForCausalLM", "2x2048",
        _decoder(1152, 6912, 6, 4, 1, 262144, head_dim=256, sliding_window=512), causal),
    Case("gemma2", "Gemma-2-2B with windows of 1024: capped scores and logits", "Gemma2ForCausalLM", "2x2048",
        _decoder(2304, 9216, 4, 8, 4, 256000, head_dim=256, sliding_window=1024), causal),
    Case("gpt-oss", "8 of gpt-oss-20b's 32 experts, attention with sinks", "GptOssForCausalLM", "2x2048",
        _decoder(2880, 2880, 2, 64, 8, 201088, head_dim=64, num_local_experts=8), causal),
    Case("qwen3-moe", "32 of Qwen3-30B-A3B's 128 experts, 8 for a token", "Qwen3MoeForCausalLM", "2x2048",
        _decoder(2048, 6144, 3, 32, 4, 151936, head_dim=128, moe_intermediate_size=768, num_experts=32,
        num_experts_per_tok=8), causal),
    Case("deepseek-v3", "latent attention, experts in groups and a shared one, narrower than the published",
        "DeepseekV3ForCausalLM", "2x2048",
        _decoder(2048, 6144, 3, 16, 16, 129280, moe_intermediate_size=1024, n_routed_experts=32, n_group=4,
        topk_group=2, num_experts_per_tok=8, first_k_dense_replace=1), causal,
        tiny={"num_key_value_heads": 4}),
)  # fmt: skip
BY_NAME: Mapping[str, Case] = {case.name: case for case in CASES}
