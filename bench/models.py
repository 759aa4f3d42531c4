"""The models that whole training steps are measured with: transformers' own classes, random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Model:
    """A family by the name that transformers and liger-kernel have for it, and its sizes."""

    family: str
    config: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    is_causal: bool = True  # else it predicts masked tokens

    def build(
        self, device: torch.device, dtype: torch.dtype, layers: int | None = None, seed: int = 0
    ) -> nn.Module:
        """The same weights for a seed in every process, also where other classes stand in for some of transformers'."""
        import transformers

        more = {} if layers is None else {"num_hidden_layers": layers}
        config = getattr(transformers, self.config)(**{**self.sizes, **more})
        with device:
            auto = transformers.AutoModelForCausalLM if self.is_causal else transformers.AutoModelForMaskedLM
            model = auto.from_config(config, dtype=dtype).train()
            random = torch.Generator(device).manual_seed(seed)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=config.initializer_range, generator=random)
        return model


def _llama(
    hidden: int, inner: int, layers: int, vocabulary: int, heads: int, kv_heads: int, tied: bool
) -> Model:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }
    return Model("llama", "LlamaConfig", sizes)


MODELS: Mapping[str, Model] = {
    "tiny": _llama(64, 96, 2, 128, 4, 2, tied=True),
    "small": _llama(512, 1536, 6, 10240, 8, 4, tied=True),  # trains in seconds
    "llama-1b": _llama(2048, 8192, 16, 128256, 32, 8, tied=True),  # Llama 3.2
    "llama-8b-6l": _llama(4096, 14336, 6, 128256, 32, 8, tied=False),  # Llama 3, of 32 layers
    "qwen3-0.6b": Model(
        "qwen3",
        "Qwen3Config",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
    "modernbert": Model("modernbert", "ModernBertConfig", is_causal=False),
    "gemma2-2b-8l": Model(
        "gemma2", "Gemma2Config", {"num_hidden_layers": 8}
    ),  # of 26; the config's own sizes
}
