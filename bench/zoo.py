"""What is found in each of many model families: `python -m bench.zoo` trains them all and writes docs/coverage.md.

`python -m bench.zoo llama gemma2` tries these and writes nothing. SPECIMENS has one line a family: how the model is
made, how many sites there are in it, as read from its source, and which of them are left, and why. Nothing of this
comes from the matcher; `present` counts the sites once more, by the modules and functions that run in eager mode.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import inspect
import logging
import multiprocessing
import os
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_map

import liger_compile
from bench.common import ROOT
from liger_compile.backend import liger
from liger_compile.patterns import DEFAULT_PATTERNS
from liger_compile.testing import assert_no_worse
from tests.models.families import (
    BY_NAME,
    HEADS,
    INNER,
    LAYERS,
    VOCAB,
    WIDTH,
    Family,
    config,
    has_experts,
    hf,
    hf_loss,
)
from tests.models.harness import Step, batch, errors, step
from tests.models.own_styles import STYLES, Styled

KINDS = ("norms", "rotary", "mlps", "loss")
WAYS = ("float32", "bfloat16", "autocast")
PAGE = ROOT / "docs" / "coverage.md"
EXACT = 1e-5
OPTIONS = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}


@dataclass(frozen=True)
class Left:
    """Sites that are not found, how many of them in each of WAYS, and a sentence that says why."""

    why: str
    float32: int = 0
    bfloat16: int = 0
    autocast: int = 0


def _never(count: int, why: str) -> Left:
    return Left(why, *(count,) * len(WAYS))


@dataclass(frozen=True)
class Specimen:
    """A family, and what there is in it.

    A site of rotary is one tensor that is turned, so q and k are two. `inner` is "eager" where AOTAutograd fails on the
    model with any backend, and `note` says what is to be known of the family beside what is left.
    """

    family: Family
    norms: int = 0
    rotary: int = 0
    mlps: int = 0
    loss: int = 1
    left: Mapping[str, Left] = field(default_factory=dict)
    inner: str = "aot_eager"
    note: str = ""
    ways: Sequence[str] = WAYS  # those in which eager mode runs
    is_as_dynamo: bool = (
        False  # Dynamo itself computes something else than eager mode, which is then no measure
    )

    def __str__(self) -> str:
        return self.family.name

    @property
    def is_own(self) -> bool:
        return str(self) in STYLES or (str(self) in BY_NAME and self.family.loss is not hf_loss)

    @property
    def present(self) -> dict[str, int]:
        return {kind: getattr(self, kind) for kind in KINDS}

    def expected(self, way: str) -> dict[str, int]:
        missed = {kind: getattr(left, way) for kind, left in self.left.items()}
        return {kind: count - missed.get(kind, 0) for kind, count in self.present.items()}


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TWO_ROPES = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CONV = {"layer_types": ["conv", "full_attention"]}
_MHA = {"num_key_value_heads": HEADS}
_DENSE_FIRST = {"first_k_dense_replace": 1}
_GATED = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}

_NO_HALF = "Eager mode itself fails in bfloat16 unless some of its parameters or buffers stay in float32."

_EINSUM = Left("Under autocast einsum takes the sum of squares in bfloat16, as no op does.", autocast=5)
_BIASED_LOGITS = _never(1, "A buffer is added to the logits between head and loss: no pattern has that.")
_LEFT: Mapping[str, Mapping[str, Left]] = {
    "hrm_text": {"mlps": _never(6, "Six run without gradients, where nothing is kept for backward.")},
    "inkling2_text": {
        "mlps": _never(
            2, "Gate and up are each capped by a tanh, but not the gate in its sigmoid: no pattern has that."
        )
    },
    "longt5": {
        "loss": _never(
            1, "Dynamo cannot trace the local mask, and runs head and loss in eager mode, with any backend."
        )
    },
    "marian": {"loss": _BIASED_LOGITS},
    "mbart": {"loss": _BIASED_LOGITS},
    "own_chunks": {
        "loss": _never(2, "Each loss takes a row of logits of one matmul, and is not fused with it.")
    },
    "own_gptj": {"norms": _EINSUM},
    "own_roll": {
        "norms": _EINSUM,
        "rotary": _never(4, "A row of signs, times what torch.roll gives, is not read as a rotation."),
    },
}


def _of(name: str, model: str, *counts: int, of: Any = None, **overrides: Any) -> Specimen:
    """A family of transformers with (norms, rotary, mlps)."""
    more = {key: overrides.pop(key) for key in ("inner", "note", "ways", "is_as_dynamo") if key in overrides}
    return Specimen(hf(name, model, of=of, **overrides), *counts, left=_LEFT.get(name, {}), **more)


def _own(name: str, losses: int = 1) -> Specimen:
    sizes = {"vocab": VOCAB, "width": WIDTH, "inner": INNER, "layers": LAYERS, "heads": HEADS}
    family = Family(name, lambda: Styled(STYLES[name], **sizes), lambda model, *inputs: model(*inputs), {})
    return Specimen(family, 5, 4, 2, losses, left=_LEFT.get(name, {}))


class _BiasedHead(transformers.LlamaForCausalLM):
    """A Llama whose head has a bias of its own, beside the weight of the embedding."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head.bias = nn.Parameter(torch.zeros(config.vocab_size))


def _tied_with_bias(**more: Any) -> nn.Module:
    return _BiasedHead(config("llama", tie_word_embeddings=True, **more))


SPECIMENS: tuple[Specimen, ...] = (
    _of("afmoe", "AfmoeForCausalLM", 13, 4, 3),
    _of("apertus", "ApertusForCausalLM", 9, 4, 0),
    _of("arcee", "ArceeForCausalLM", 5, 4, 0),
    _of("aya_vision", "AyaVisionForConditionalGeneration", 3, 4, 2,
        text_config=lambda: config("cohere2"), vision_config=lambda: config("siglip_vision_model")),
    _of("bert", "BertLMHeadModel", is_decoder=True),
    _of("bert_mlm", "BertForMaskedLM"),
    _of("camembert", "CamembertForCausalLM", is_decoder=True),
    _of("cohere", "CohereForCausalLM", 3, 4, 2),
    _of("cohere_compass_text", "CohereCompassForCausalLM", 3, 4, 2, rope_parameters=_TWO_ROPES, **_MIXED),
    _of("deepseek_v3", "DeepseekV3ForCausalLM", 9, 4, 3, **_MHA, **_DENSE_FIRST),
    _of("deepseek_v32", "DeepseekV32ForCausalLM", 9, 8, 3, **_MHA, **_DENSE_FIRST,
        index_head_dim=16, index_n_heads=2, index_topk=8),
    _of("dots1", "Dots1ForCausalLM", 9, 4, 3, **_DENSE_FIRST),
    _of("electra_mlm", "ElectraForMaskedLM"),
    _of("emu3", "Emu3ForCausalLM", 5, 4, 2, of=transformers.Emu3TextConfig),
    _of("flint", "FlintForCausalLM", 9, 2, 3, mlp_only_layers=[0], **_MIXED),
    _of("gemma", "GemmaForCausalLM", 5, 4, 2),
    _of("gemma2", "Gemma2ForCausalLM", 9, 4, 2, final_logit_softcapping=3.0, attn_implementation="eager"),
    Specimen(BY_NAME["gemma3"], 13, 4, 2),
    _of("gemma3n", "Gemma3nForCausalLM", 24, 4, 4, num_kv_shared_layers=0, laurel_rank=8,
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=VOCAB,
        activation_sparsity_pattern=[0.0, 0.0], **_MIXED),
    _of("gemma4_text", "Gemma4ForCausalLM", 18, 4, 4, hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCAB, final_logit_softcapping=3.0, **_MIXED),
    _of("glm4", "Glm4ForCausalLM", 9, 4, 2),
    _of("glm4_moe", "Glm4MoeForCausalLM", 5, 4, 3, **_DENSE_FIRST),
    _of("glm4_moe_lite", "Glm4MoeLiteForCausalLM", 9, 4, 3, **_MHA),
    _of("glm4v", "Glm4vForConditionalGeneration", 9, 4, 2, text_config=lambda: config(
        "glm4v_text", rope_parameters={**_ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5})),
    _of("gpt2", "GPT2LMHeadModel"),
    _of("gpt_bigcode", "GPTBigCodeForCausalLM"),
    _of("gpt_neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]]),
    _of("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", 0, 4),
    _of("gpt_oss", "GptOssForCausalLM", 5, 4, 2),
    _of("gptj", "GPTJForCausalLM", 0, 4, rotary_dim=8),
    _of("gte_mlm", "GteForMaskedLM", 0, 4, 2),
    _of("helium", "HeliumForCausalLM", 5, 4, 2),
    _of("hrm_text", "HrmTextForCausalLM", 40, 32, 16),
    _of("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", 9, 4, 2),
    _of("hy_v3", "HYV3ForCausalLM", 9, 4, 3),
    _of("hyperclovax", "HyperCLOVAXForCausalLM", 9, 4, 2),
    _of("inkling2_text", "Inkling2ForCausalLM", 16, 0, 2, sliding_window_size=16, swa_num_attention_heads=4,
        swa_num_key_value_heads=2, swa_head_dim=16, d_rel=8, rel_extent=16, unpadded_vocab_size=VOCAB,
        final_logit_softcapping=3.0, ways=("float32", "autocast"), note=_NO_HALF, **_MIXED),
    _of("internvl", "InternVLForConditionalGeneration", 5, 4, 2, text_config=lambda: config("qwen2")),
    _of("jais2", "Jais2ForCausalLM", 0, 4),
    _of("kolibri1", "Kolibri1ForCausalLM", 13, 4, 4),
    _of("laguna", "LagunaForCausalLM", 9, 4, 3),
    _of("lfm2", "Lfm2ForCausalLM", 7, 2, 2, **_CONV),
    _of("lfm3", "Lfm3ForCausalLM", 11, 2, 2, **_CONV),
    _of("llama", "LlamaForCausalLM", 5, 4, 2),
    _of("llama_yarn", "LlamaForCausalLM", 5, 4, 2, rope_parameters={
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}),
    _of("llama_llama3", "LlamaForCausalLM", 5, 4, 2, rope_parameters={
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    _of("llama_gelu", "LlamaForCausalLM", 5, 4, 2, hidden_act="gelu", mlp_bias=True, attention_bias=True),
    Specimen(Family("llama_tied_bias", _tied_with_bias, hf_loss, {}), 5, 4, 2),
    _of("llama_eager", "LlamaForCausalLM", 5, 4, 2, tie_word_embeddings=True, attn_implementation="eager"),
    _of("llava", "LlavaForConditionalGeneration", 5, 4, 2,
        text_config=lambda: config("llama"), vision_config=lambda: config("clip_vision_model")),
    _of("longt5", "LongT5ForConditionalGeneration", 12, 0, 4, local_radius=7, **_GATED),
    _of("m2m_100", "M2M100ForConditionalGeneration", ways=("float32", "autocast"), note=_NO_HALF),
    _of("mamba2", "Mamba2ForCausalLM", 5, 0, 2, num_heads=8, head_dim=16, state_size=16, n_groups=2, chunk_size=8),
    _of("marian", "MarianMTModel", decoder_start_token_id=0),
    _of("mbart", "MBartForConditionalGeneration"),
    _of("minicpm3", "MiniCPM3ForCausalLM", 9, 4, 2, **_MHA),
    _of("mistral", "MistralForCausalLM", 5, 4, 2, sliding_window=16),
    _of("mixtral", "MixtralForCausalLM", 5, 4, 2),
    _of("modernbert_decoder", "ModernBertDecoderForCausalLM", 0, 4, 2),
    _of("modernbert_mlm", "ModernBertForMaskedLM", 0, 4, 2),
    _of("nanochat", "NanoChatForCausalLM", 10, 4, final_logit_softcapping=3.0),
    _of("olmo", "OlmoForCausalLM", 0, 4, 2),
    _of("olmo_hybrid", "OlmoHybridForCausalLM", 8, 2, 3, inner="eager", **_LINEAR),
    _of("olmoe", "OlmoeForCausalLM", 9, 4, 2),
    _of("paligemma", "PaliGemmaForConditionalGeneration", 5, 4, 2,
        is_as_dynamo=True,
        note="Dynamo itself computes another loss than eager mode, with any backend; ours is Dynamo's.",
        text_config=lambda: config("gemma"), vision_config=lambda: config("siglip_vision_model")),
    _of("phi", "PhiForCausalLM", 0, 4, **_MHA),
    _of("phi3", "Phi3ForCausalLM", 5, 4, 2),
    _of("phimoe", "PhimoeForCausalLM", 0, 4, 2),
    _of("qwen2", "Qwen2ForCausalLM", 5, 4, 2),
    _of("qwen2_moe", "Qwen2MoeForCausalLM", 5, 4, 4),
    _of("qwen2_vl", "Qwen2VLForConditionalGeneration", 5, 4, 2, text_config=lambda: config(
        "qwen2_vl_text", rope_parameters={**_ROPE, "mrope_section": [2, 3, 3]})),
    _of("qwen3", "Qwen3ForCausalLM", 9, 4, 2),
    _of("qwen3_5_text", "Qwen3_5ForCausalLM", 8, 2, 3, inner="eager", **_LINEAR),
    _of("roberta_mlm", "RobertaForMaskedLM"),
    _of("seed_oss", "SeedOssForCausalLM", 5, 4, 2),
    _of("smolvlm", "SmolVLMForConditionalGeneration", 5, 4, 2, text_config=lambda: config("llama")),
    _of("stablelm", "StableLmForCausalLM", 0, 4, 2),
    _of("t5", "T5ForConditionalGeneration", 12, 0, 4, **_GATED),
    _of("t5gemma", "T5GemmaForConditionalGeneration", 22, 8, 4),
    _of("xglm", "XGLMForCausalLM", ways=("float32", "autocast"), note=_NO_HALF),
    _of("zamba2", "Zamba2ForCausalLM", 7, 2, 3, layers_block_type=["linear_attention", "hybrid"],
        n_mamba_heads=8, mamba_d_state=16, mamba_ngroups=2, chunk_size=8, use_mem_rope=True,
        use_shared_attention_adapter=True, adapter_rank=8, **_MHA),
    Specimen(BY_NAME["nanogpt"]),
    Specimen(BY_NAME["meta_llama"], 5, 4, 2),
    Specimen(BY_NAME["torchtitan"], 5, 4, 2),
    Specimen(BY_NAME["torchtitan_packed"], 5, 4, 2),
    _own("own_gptj"),
    _own("own_unbind"),
    _own("own_roll"),
    _own("own_chunks", losses=2),
)  # fmt: skip


# What is present, seen in eager mode.

_NORM = re.compile(r"rsqrt|-0\.5|rms_norm|\b_norm\(")
_ACT = r"(?:\w*act_fn|activation_fn|act|silu|gelu|activations|hidden_gelu)"
_MLP = re.compile(rf"{_ACT}\([^*]*\) ?\* ?|\* ?(?:self\.|F\.)?{_ACT}\(|\b{_ACT} \* ")


def present(specimen: Specimen) -> dict[str, int]:
    """Counts norms and MLPs by the classes that run, and rotations by transformers' functions for them."""
    found: Counter[str] = Counter()
    model, inputs = specimen.family.build(), batch(specimen.family)
    for module in model.modules():
        kinds = _kinds(module)
        module.register_forward_hook(lambda *_, kinds=kinds: found.update(kinds))
    with _counted_rotations(model, found):
        specimen.family.loss(model, *inputs)
    return {kind: found[kind] for kind in ("norms", "rotary", "mlps")}


def _kinds(module: nn.Module) -> list[str]:
    """What there is in a module itself: a norm, a gated MLP, both (a gated norm) or none."""
    cls = type(module)
    if cls.__module__.startswith("torch."):
        return ["norms"] if cls is nn.RMSNorm else []
    source = " ".join(inspect.getsource(cls.forward).split())
    if "Norm" in cls.__name__:
        return [*(["norms"] if _NORM.search(source) else []), *(["mlps"] if " gate" in source else [])]
    is_gate = "Experts" in cls.__name__ or hasattr(module, "per_layer_input_gate")
    return ["mlps"] if is_gate or _MLP.search(source) else []


@contextlib.contextmanager
def _counted_rotations(model: nn.Module, found: Counter[str]) -> Iterator[None]:
    depth = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                result = function(*args, **kwargs)
            finally:
                depth -= 1
            if not depth:
                found["rotary"] += len(result) if isinstance(result, tuple) else 1
            return result

        return call

    replaced = []
    for name in {type(module).__module__ for module in model.modules()}:
        space = vars(sys.modules[name])
        for key, value in list(space.items()):
            if re.match(r"apply.*(rotary|rope)", key) and inspect.isfunction(value):
                replaced.append((space, key, value))
                space[key] = counting(value)
    try:
        yield
    finally:
        for space, key, value in replaced:
            space[key] = value


# What is found.


@dataclass
class Runs:
    """A backend that remembers which graphs ran, so that one that runs for each layer counts as often."""

    inner: str = "aot_eager"
    reports: list[liger_compile.GraphReport] = field(default_factory=list)
    attentions: list[int] = field(
        default_factory=list
    )  # calls of scaled_dot_product_attention, graph by graph
    num_graphs: int = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.num_graphs += 1
        attention = torch.nn.functional.scaled_dot_product_attention
        attentions = sum(node.target is attention for node in gm.graph.nodes)
        compiled = liger(gm, inputs, options={**OPTIONS, "liger.inner": self.inner})
        report = liger_compile.reports()[-1]

        def run(*args: Any) -> Any:
            self.reports.append(report)
            self.attentions.append(attentions)
            return compiled(*args)

        return run

    @property
    def patterns(self) -> Counter[str]:
        sites = (site for report in self.reports for site in report.sites)
        is_marked = "liger.inner='eager' ignores marks"  # they are found all the same
        return Counter(site.pattern for site in sites if site.kind != "leave" or is_marked in site.reason)

    @property
    def found(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for pattern, count in self.patterns.items():
            for kind, worth in _worth(pattern).items():
                total[kind] += worth * count
        return {kind: total[kind] for kind in KINDS}

    @property
    def attention(self) -> str:
        """What became of the calls of attention."""
        patterns = self.patterns
        found = {p.partition(".")[2]: n for p, n in sorted(patterns.items()) if p.startswith("attention.")}
        found["left"] = sum(count for _, _, count in self.notes_on_attention)
        found["as it is"] = max(0, sum(self.attentions) - sum(found.values()))
        return ", ".join(f"{n} {name}" for name, n in found.items() if n)

    @property
    def notes_on_attention(self) -> list[tuple[str, str, int]]:
        """What calls do that are left, why, and how many of them."""
        notes = [_NOTE.fullmatch(note) for report in self.reports for note in report.notes]
        return [(note["what"], note["why"], int(note["count"])) for note in notes if note]

    @property
    def why_left(self) -> list[str]:
        """A sentence for each reason why attention is left; its numbered inputs are one."""
        notes = ((what, re.sub(r"_\d+\b", "", why)) for what, why, _ in self.notes_on_attention)
        return [f"Attention {what}: {why}." for what, why in dict.fromkeys(notes)]


_NOTE = re.compile(r"attention (?P<what>.*) (?P<count>\d+)x: (?P<why>.*)")


def _worth(pattern: str) -> dict[str, int]:
    op = pattern.partition(".")[0]
    turned = 2 if "pair" in pattern else 1
    return {
        "rms_norm": {"norms": 1},
        "norm_rotary": {"norms": 2, "rotary": 2},
        "rotary": {"rotary": turned},
        "gated_mlp": {"mlps": 1},
        "linear_cross_entropy": {"loss": 1},  # fused with the head; cross_entropy alone does not count
        "linear_softmax": {"loss": 1}
        if pattern == "linear_softmax.loss"
        else {},  # in the chunks of the head
    }.get(op, {})


def fresh() -> None:
    torch.compiler.reset()
    liger_compile.clear_reports()
    gc.collect()


BATCHES = 8  # a loss, or a small gradient, is right by luck in one


def trained(specimen: Specimen, way: str) -> tuple[Runs, list[str]]:
    """What was found in a step, and what is wrong with its numbers.

    In float32 loss and gradients have to be eager's. In half precision, or where they are not, they have to be as close
    to what is exact, over some batches, by the numerics bar (liger_compile/testing/precision.py).
    """
    fresh()
    family, runs = specimen.family, Runs(specimen.inner if way == "float32" else "eager")
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    context = torch.autocast("cpu", torch.bfloat16) if way == "autocast" else contextlib.nullcontext()
    model, compiled = family.build(dtype), torch.compile(family.loss, backend=runs)
    plainly = torch.compile(family.loss, backend="eager") if specimen.is_as_dynamo else family.loss
    seen = 0
    if way == "float32":
        inputs = batch(family)
        got, expected = step(compiled, model, *inputs), step(plainly, model, *inputs)
        seen = len(runs.reports)
        if max(errors(got, expected).values()) <= EXACT:
            return runs, []
    ours, eager, exact, problems = [], [], [], []
    wide = model if way == "autocast" else float64(family, dtype)
    for seed in range(BATCHES):
        inputs = batch(family, seed=2 + seed)
        exact.append(step(plainly, wide, *inputs))
        with context:
            ours.append(step(compiled, model, *inputs))
            eager.append(step(plainly, model, *inputs))
        seen = seen or len(runs.reports)
        if not (problems := _worse(ours, eager, exact)):
            break
    del runs.reports[seen:], runs.attentions[seen:]
    return runs, problems


def _worse(*of: Sequence[Step]) -> list[str]:
    """What is wrong with our steps by the numerics bar, over all batches: of (ours, eager's, exact ones)."""
    stacked = (tree_map(lambda *each: torch.stack(each), *map(tuple, steps)) for steps in of)
    try:
        for values in zip(*stacked, strict=True):  # losses, then gradients: a loss has a dtype of its own
            assert_no_worse(*values)
    except AssertionError as error:
        return [str(error)]
    return []


def float64(family: Family, dtype: torch.dtype) -> nn.Module:
    """The model with the very weights of the one in `dtype`, in float64."""
    model = family.build(dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    if has_experts(model):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    return model


def stock_graphs(specimen: Specimen, way: str) -> int:
    """How many graphs Dynamo makes of a step with another backend."""
    fresh()
    count = 0

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return gm.forward

    family = specimen.family
    model = family.build(torch.bfloat16 if way == "bfloat16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16) if way == "autocast" else contextlib.nullcontext():
        step(torch.compile(family.loss, backend=backend), model, *batch(family))
    return count


# The page.


@dataclass
class Row:
    specimen: Specimen
    runs: dict[str, Runs]  # by way
    problems: list[str]
    seconds: float

    def found(self, kind: str) -> str:
        return counted(
            self.specimen.present[kind], {way: runs.found[kind] for way, runs in self.runs.items()}
        )


def counted(present: int, found: Mapping[str, int]) -> str:
    """ "4/4", or what it is in each way where that differs; nothing where there is nothing."""
    if not present and not any(found.values()):
        return ""
    if len(set(found.values())) == 1:
        return f"{next(iter(found.values()))}/{present}"
    return ", ".join(f"{way} {number}/{present}" for way, number in found.items())


def examine(specimen: Specimen, ways: Sequence[str] = WAYS) -> Row:
    """Everything about a family; an exception is a problem like others."""
    start = time.perf_counter()
    problems: list[str] = []
    every: dict[str, Runs] = {}
    try:
        problems += _miscounted(specimen)
        for way in specimen.ways:
            if way not in ways:
                continue
            runs, wrong = trained(specimen, way)
            every[way] = runs
            problems += [f"{way}: {each}" for each in wrong]
            if runs.found != specimen.expected(way):
                problems.append(f"{way}: found {runs.found}, expected {specimen.expected(way)}")
            if runs.num_graphs > 1 and runs.num_graphs > (stock := stock_graphs(specimen, way)):
                problems.append(f"{way}: {runs.num_graphs} graphs, without us {stock}")
    except Exception as error:
        problems.append("".join(traceback.format_exception(error, limit=-3)))
    return Row(specimen, every, problems, time.perf_counter() - start)


def _miscounted(specimen: Specimen) -> list[str]:
    """Whether the table and eager mode disagree about a model of transformers."""
    if specimen.is_own:
        return []
    seen = present(specimen)
    told = {kind: specimen.present[kind] for kind in seen}
    return [] if seen == told else [f"the table has {told}, and eager mode runs {seen}"]


def page(rows: Sequence[Row]) -> str:
    """docs/coverage.md"""
    lines = [
        "# What is found in which model",
        "",
        f"{len(rows)} families, tiny and with random weights, trained a step in float32, in bfloat16 and under "
        f'autocast, with `liger.policy="always"` (torch {torch.__version__}, '
        f"transformers {transformers.__version__}). `python -m bench.zoo` does that and writes this page. Loss and "
        "every gradient are eager's in float32, and in half precision at most twice as far from what is exact as "
        "eager's; and Dynamo makes no more graphs than for another backend.",
        "",
        "A number is sites found / sites present, the same in all three ways unless each is given. What is present was "
        "counted in the models' source and by the modules that run in eager mode, not by the matcher. Rotary counts "
        "tensors: q and k are two. A gated MLP is an activation times another projection, so experts and the gates of "
        "gated norms are some. LayerNorm is none of the norms, but for Cohere's, which is an RMSNorm of what is left "
        "when the mean is taken off. Loss counts losses that are fused with the head. "
        "Attention counts by pattern what was replaced: `scaled_dot_product_attention` "
        "with a mask, or attention that is written out; what is left of either, for the reasons in the last column; "
        "and calls without a mask, in which there is nothing to replace (`as it is`).",
        "",
        "| | " + " | ".join(TITLES.values()) + " |",
        "|---" * (len(KINDS) + 1) + "|",
    ]
    for way in WAYS:
        found, present = Counter(), Counter()
        for row in rows:
            if way in row.runs:
                found.update(row.runs[way].found)
                present.update(row.specimen.present)
        cells = [f"{found[kind]}/{present[kind]} ({found[kind] / present[kind]:.1%})" for kind in KINDS]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    ops = Counter(pattern.name.partition(".")[0] for pattern in DEFAULT_PATTERNS)
    searches = Counter(
        {op: len({_source(p) for p in DEFAULT_PATTERNS if p.name.startswith(op + ".")}) for op in ops}
    )
    lines += [
        "",
        "Search functions of each op, and in brackets the patterns made of them with a norm, a layout, a rounding or "
        "one tensor or two as parameters: "
        + ", ".join(f"{op} {searches[op]} ({ops[op]})" for op in ops)
        + ". "
        "Each pattern is another computation, another layout of memory or another rounding; none is another spelling.",
        "",
        "| family | " + " | ".join(TITLES.values()) + " | attention | graphs | what is left, and why |",
        "|---" * (len(KINDS) + 4) + "|",
    ]
    for row in rows:
        specimen, runs = row.specimen, next(iter(row.runs.values()), Runs())
        why = " ".join(
            [*(left.why for left in specimen.left.values()), specimen.note, *runs.why_left]
        ).strip()
        cells = [
            str(specimen),
            *(row.found(kind) for kind in KINDS),
            runs.attention,
            str(runs.num_graphs),
            why,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


TITLES = {"norms": "norms", "rotary": "rotary", "mlps": "gated MLP", "loss": "loss"}


def _source(pattern: Any) -> Any:
    return pattern.search.__code__


def _start() -> None:
    """In each process."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def _examined(index: int, ways: Sequence[str]) -> tuple[dict[str, Runs], list[str], float]:
    """What goes from one process to another: a specimen does not."""
    row = examine(SPECIMENS[index], ways)
    return row.runs, row.problems, row.seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help="families to try; if none, all are, and the page is written")
    parser.add_argument("--way", choices=WAYS, help="in this way only")
    parser.add_argument("--report", action="store_true", help="print what happened to each site")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    chosen = [i for i, s in enumerate(SPECIMENS) if not arguments.names or str(s) in arguments.names]
    ways = [arguments.way] if arguments.way else WAYS
    rows = []
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, spawned, initializer=_start) as pool:
        for index, found in zip(chosen, pool.map(_examined, chosen, [ways] * len(chosen)), strict=True):
            row = Row(SPECIMENS[index], *found)
            rows.append(row)
            counts = "  ".join(f"{kind} {row.found(kind)}" for kind in KINDS if row.found(kind))
            print(f"{row.specimen!s:20} {counts}  ({row.seconds:.0f} s)", flush=True)
            for problem in row.problems:
                print("   ", problem, flush=True)
            if arguments.report:
                for runs in row.runs.values():
                    for report in dict.fromkeys(runs.reports):
                        print(report)
    if not arguments.names and not arguments.way:
        PAGE.write_text(page(rows))
    sys.exit(any(row.problems for row in rows))


if __name__ == "__main__":
    main()
