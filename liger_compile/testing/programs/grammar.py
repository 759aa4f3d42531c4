"""The statements of random programs, as data: their operands, their result and their text.

`TEMPLATES` is the grammar. To add a new kind of statement to the fuzzer, add an entry; if its text calls a helper of
the preamble, add the helper to `HELPERS`.

Kinds of variables: "hidden" is (batch, length, WIDTH), "logits" is (batch, length, CLASSES), "scalar" has no dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WIDTH, INNER, CLASSES, HEADS = 8, 12, 11, 2

# Finite and not finite, exact and rounded, below and above the range of half precision, and from rounding tricks.
CONSTANTS = (
    "1.0",
    "2.0",
    "0.5",
    "0.0",
    "-1.0",
    "3.0",
    "0.1",
    "1e-8",
    "1e8",
    "12582912.0",
    "1e-30",
    "1e30",
    "384.0",
)
RARE_CONSTANTS = ("float('inf')", "float('nan')", "-0.0")


@dataclass(frozen=True)
class Template:
    """One kind of statement.

    Args:
        text: Python. {0}, {1} are the variables that it takes, {c} is a constant, and {w:NAME} is parameter NAME in
            the dtype of {0}.
        takes: the kinds of its operands.
        gives: the kind of its result; empty for a statement without a result.
        opens: it begins a block, which the template "end" ends.
        weight: how often it is drawn, relative to other templates.
    """

    text: str
    takes: tuple[str, ...] = ("hidden",)
    gives: str = "hidden"
    opens: bool = False
    weight: int = 2


HELPERS: Mapping[str, str] = {
    "rms_norm": """
def rms_norm(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype)
""",
    "gemma_norm": """
def gemma_norm(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + weight.float())).type_as(x)
""",
    "mlp": """
def mlp(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
""",
    "rotate": """
def rotate(x):
    t = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    frequencies = torch.outer(t, torch.tensor([1.0, 0.1], device=x.device))
    angles = torch.cat((frequencies, frequencies), -1)
    half = torch.cat((-x[..., 2:], x[..., :2]), -1)
    return x * angles.cos().to(x.dtype) + half * angles.sin().to(x.dtype)
""",
    "heads_of": """
def heads_of(x):
    return x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
""",
    "attention": """
def attention(x, q, k, v, mask=None):
    q, k, v = heads_of(F.linear(x, q)), heads_of(F.linear(x, k)), heads_of(F.linear(x, v))
    out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2).reshape(x.shape)
""",
    "written_out": """
def written_out(x, q, k, v):
    q, k, v = heads_of(F.linear(x, q)), heads_of(F.linear(x, k)), heads_of(F.linear(x, v))
    scores = (rotate(q) @ rotate(k).transpose(-1, -2)) * 0.5
    above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    weights = scores.masked_fill(above, torch.finfo(scores.dtype).min).float().softmax(-1).to(v.dtype)
    return (weights @ v).transpose(1, 2).reshape(x.shape)
""",
    "causal": """
def causal(x):
    i = torch.arange(x.shape[1], device=x.device)
    return i[None, :] <= i[:, None]
""",
    "padded": """
def padded(x, mask):
    return causal(x) & mask.bool()[:, None, None, :]
""",
    "soft_cap": """
def soft_cap(x, cap):
    return cap * torch.tanh(x / cap)
""",
    "rows": """
def rows(logits, labels):
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
""",
    "loss": """
def loss(logits, labels, **settings):
    return F.cross_entropy(*rows(logits.float(), labels), **settings)
""",
    "next_token_loss": """
def next_token_loss(logits, labels):
    return F.cross_entropy(*rows(logits[:, :-1].float(), labels[:, 1:]))
""",
    "gathered": """
def gathered(logits, labels):
    log_probability = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(log_probability * (labels >= 0)).sum()
""",
}

# written_out by another kernel: its gradients depend on how scores are rounded, if softmax is saturated
BY_KERNEL = """
def written_out(x, q, k, v):
    q, k, v = heads_of(F.linear(x, q)), heads_of(F.linear(x, k)), heads_of(F.linear(x, v))
    out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, scale=0.5)
    return out.transpose(1, 2).reshape(x.shape)
"""

# the same, and attention by the causal flag: on a CPU, rows whose scores are all NaN are then 0
BY_FLAG = (
    BY_KERNEL
    + """
def causal(x):
    return None

def padded(x, mask):
    above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    return None if mask.all() else ~above & mask.bool()[:, None, None, :]
"""
)

_QKV = "{w:q}, {w:k}, {w:v}"
_MLP = "{w:gate}, {w:up}, {w:down}"

TEMPLATES: Mapping[str, Template] = {
    # Computations that the built-in patterns match.
    "rms_norm": Template("rms_norm({0}, {w:norm})", weight=8),
    "gemma_norm": Template("gemma_norm({0}, {w:norm})", weight=3),
    "f_rms_norm": Template(f"F.rms_norm({{0}}, ({WIDTH},), {{w:norm}}, 1e-6)"),
    "layer_norm": Template(f"F.layer_norm({{0}}, ({WIDTH},), {{w:norm}}, None)"),
    "mlp": Template(f"mlp({{0}}, {_MLP})", weight=6),
    "geglu": Template("F.linear(F.gelu(F.linear({0}, {w:gate})) * F.linear({0}, {w:up}), {w:down})"),
    "attention": Template(f"attention({{0}}, {_QKV})", weight=4),
    "masked": Template(f"attention({{0}}, {_QKV}, causal({{0}}))", weight=4),
    "padded": Template(f"attention({{0}}, {_QKV}, padded({{0}}, mask))", weight=4),
    "written_out": Template(f"written_out({{0}}, {_QKV})", weight=3),
    "head": Template("F.linear({0}, {w:head})", gives="logits", weight=14),
    "head_with_bias": Template("F.linear({0}, {w:head}, {w:bias})", gives="logits", weight=4),
    "matmul_head": Template("{0} @ {w:head}.t()", gives="logits", weight=3),
    "loss": Template("loss({0}, labels)", ("logits",), "scalar", weight=24),
    "loss_sum": Template("loss({0}, labels, reduction='sum')", ("logits",), "scalar", weight=5),
    "loss_per_label": Template(
        "loss({0}, labels, reduction='sum') / (labels != -100).sum()", ("logits",), "scalar", weight=5
    ),
    "loss_rows": Template("loss({0}, labels, reduction='none').mean()", ("logits",), "scalar", weight=3),
    "loss_smoothed": Template("loss({0}, labels, label_smoothing=0.1)", ("logits",), "scalar", weight=3),
    "next_token_loss": Template("next_token_loss({0}, labels)", ("logits",), "scalar", weight=6),
    "gathered": Template("gathered({0}, labels)", ("logits",), "scalar", weight=3),
    "z_loss": Template("{0}.float().logsumexp(-1).square().mean()", ("logits",), "scalar"),
    # Algebraic rewrites that a rewriter could wrongly perform.
    "residual": Template("{0} + {1}", ("hidden", "hidden"), weight=6),
    "product": Template("{0} * {1}", ("hidden", "hidden")),
    "scaled": Template("{0} * {c}", weight=3),
    "shifted": Template("{0} + {c}", weight=2),
    "divided": Template("{0} / {c}"),
    "shifted_back": Template("({0} + {c}) - {c}", weight=4),
    "scaled_back": Template("({0} * {c}) * (1 / {c} if {c} else 1.0)", weight=4),
    "divided_back": Template("{0} / {c} * {c}", weight=2),
    "quotient": Template("{0} * {1} / {1}", ("hidden", "hidden"), weight=1),
    "rooted_square": Template("torch.sqrt({0}) ** 2"),
    "squared_root": Template("torch.sqrt({0} ** 2)"),
    "negated_twice": Template("-(-{0})", weight=1),
    "logits_scaled": Template("{0} * {c}", ("logits",), "logits", weight=3),
    "logits_shifted_back": Template("({0} + {c}) - {c}", ("logits",), "logits", weight=2),
    "logits_capped": Template("soft_cap({0}, 5.0)", ("logits",), "logits", weight=3),
    "log_loss": Template("torch.log({0})", ("scalar",), "scalar"),
    "root_loss": Template("torch.sqrt({0})", ("scalar",), "scalar"),
    "scalar_scaled": Template("{0} * {c}", ("scalar",), "scalar"),
    "scalar_sum": Template("{0} + {1}", ("scalar", "scalar"), "scalar", weight=3),
    # Roundings.
    "to_float": Template("{0}.float()", weight=2),
    "to_bfloat16": Template("{0}.bfloat16()", weight=2),
    "through_bfloat16": Template("{0}.bfloat16().to({0}.dtype)"),
    "through_half": Template("{0}.half().to({0}.dtype)"),
    "through_double": Template("{0}.double().to({0}.dtype)", weight=1),
    "logits_to_float": Template("{0}.float()", ("logits",), "logits", weight=3),
    "logits_to_bfloat16": Template("{0}.bfloat16()", ("logits",), "logits"),
    # Other computations.
    "tanh": Template("torch.tanh({0})", weight=2),
    "relu": Template("torch.relu({0})"),
    "dropped": Template("F.dropout({0}, 0.0)", weight=1),
    "where": Template("torch.where({0} > {c}, {0}, {1})", ("hidden", "hidden")),
    "vmapped": Template("torch.vmap(lambda row: row.cumsum(-1))({0})", weight=1),
    "detached": Template("{0}.detach()", weight=2),
    "cloned": Template("{0}.clone()", weight=1),
    "viewed": Template("{0}.view_as({0})", weight=2),
    "transposed_twice": Template("{0}.transpose(0, 1).transpose(0, 1)", weight=1),
    "logits_viewed": Template("{0}.view_as({0})", ("logits",), "logits"),
    "logits_detached": Template("{0}.detach()", ("logits",), "logits"),
    "checkpointed_mlp": Template(f"checkpoint(mlp, {{0}}, {_MLP}, use_reentrant=False)"),
    "checkpointed_attention": Template(f"checkpoint(attention, {{0}}, {_QKV}, use_reentrant=False)"),
    "checkpointed_norm": Template("checkpoint(rms_norm, {0}, {w:norm}, use_reentrant=False)"),
    "squares": Template("{0}.float().square().mean()", gives="scalar", weight=3),
    "scalar_detached": Template("{0}.detach()", ("scalar",), "scalar", weight=1),
    # In-place writes: by a method, an operator, an item, a keyword argument, a user's operator.
    "mul_": Template("{0}.mul_({c})", gives="", weight=3),
    "add_": Template("{0}.add_({1})", ("hidden", "hidden"), gives=""),
    "iadd": Template("{0} += {c}", gives=""),
    "set_item": Template("{0}[..., 0] = {c}", gives="", weight=2),
    "set_row": Template("{0}[:1].zero_()", gives="", weight=1),
    "copy_": Template("{0}.copy_({1})", ("hidden", "hidden"), gives=""),
    "relu_": Template("F.relu({0}, True)", gives=""),
    "foreach_mul_": Template("torch._foreach_mul_([{0}], {c})", gives=""),
    "out": Template("torch.mul({0}.detach(), {c}, out={0}.detach())", gives=""),
    "detached_mul_": Template("{0}.detach().mul_({c})", gives=""),
    "logits_mul_": Template("{0}.mul_({c})", ("logits",), gives=""),
    "logits_set_item": Template("{0}[..., 3] = {c}", ("logits",), gives="", weight=2),
    "user_packet": Template("torch.ops.liger_fuzz.double_({0}.detach())", gives="", weight=3),
    "user_overload": Template("torch.ops.liger_fuzz.double_.default({0}.detach())", gives="", weight=1),
    "user_keyword": Template("torch.ops.liger_fuzz.double_(x={0}.detach())", gives=""),
    "user_list": Template("torch.ops.liger_fuzz.double_all_([{0}.detach()])", gives=""),
    "buffer_mul_": Template("p['buffer'].mul_({c})", (), gives="", weight=2),
    "buffer_user": Template("torch.ops.liger_fuzz.double_(p['buffer'])", (), gives="", weight=2),
    "buffered": Template("{0} * p['buffer'].to({0}.dtype)", weight=3),
    # Modes.
    "no_grad": Template("with torch.no_grad():", (), gives="", opens=True),
    "enable_grad": Template("with torch.enable_grad():", (), gives="", opens=True, weight=1),
    "inference_mode": Template("with torch.inference_mode():", (), gives="", opens=True, weight=1),
    "autocast": Template("with torch.autocast(x.device.type, torch.bfloat16):", (), gives="", opens=True),
    "no_autocast": Template(
        "with torch.autocast(x.device.type, enabled=False):", (), "", opens=True, weight=1
    ),
    "end": Template("", (), gives="", weight=5),
    "graph_break": Template("torch._dynamo.graph_break()", (), gives="", weight=1),
}

# Statements after which the dtype of values may differ from that of the parameters.
CASTS = ("to_float", "to_bfloat16", "autocast", "no_autocast")

# name -> shape of the parameters that programs read; the buffer requires no gradient.
PARAMETERS: Mapping[str, tuple[int, ...]] = {
    "embed": (CLASSES, WIDTH),
    "norm": (WIDTH,),
    "gate": (INNER, WIDTH),
    "up": (INNER, WIDTH),
    "down": (WIDTH, INNER),
    "q": (WIDTH, WIDTH),
    "k": (WIDTH, WIDTH),
    "v": (WIDTH, WIDTH),
    "head": (CLASSES, WIDTH),
    "bias": (CLASSES,),
    "buffer": (WIDTH,),
}
