"""Questions about the softmax of a head: log-probabilities, entropy, logsumexp, argmax, ..., without its logits.

Formula  z = softcap * tanh(scale * (x @ weight.T + bias) / softcap), and any set of: log_softmax(z) at given columns, z
         at given columns, logsumexp(z), entropy, sum(p * z), sum(z), sum(log p), sum(p^2), argmax(z), topk(z)
Shapes   x (..., H), weight (V, H), bias (V,); indices (..., K); each result as the graph has it
Sources  TRL, OpenRLHF and verl (log-probabilities in loops over sequences, entropy by three formulas), transformers
         (LabelSmoother, accuracy by argmax), PaLM's z-loss

steps/questions.py finds the places: any set of questions that are all readers of the logits of a head. One op answers
them, so that the logits never exist as a whole. A single cross-entropy is left to linear_cross_entropy.py, whose op
computes its gradients in forward.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from liger_compile.ops.answer_plan import (
    WHOLE,
    Addend,
    Columns,
    Form,
    Output,
    Part,
    Plan,
    Tail,
    kept_for_backward,
    run,
    run_with_loss,
)
from liger_compile.pattern import Match, Pattern
from liger_compile.patterns.linear_cross_entropy import saved_bytes
from liger_compile.patterns.profit import few_logits, needs_kernel
from liger_compile.steps.questions import LEAST_CLASSES, find_losses, find_questions


def profit(match: Match) -> str | None:
    """Reject few classes, where the logits are no larger than the hidden states, and few logits.

    H200, torch 2.11.0, bf16, 2026-11-30, 8192 x 2048 x 151936, forward and backward, Inductor's and ours: a policy loss
    27.2 and 22.1 ms, with a frozen head 20.4 and 15.4 ms, a divergence from a teacher 39.5 and 36.2 ms; with the logits
    kept 24.2, 15.5 and 38.0 ms (ops_nvidia_h200.csv).
    """
    classes, width = match["weight"].shape
    if classes < LEAST_CLASSES * width:
        return f"{classes} classes are few for a hidden size of {width}: the logits are no larger than other values"
    return needs_kernel(match) or few_logits(match.result.device, saved_bytes(match))


def saves(match: Match) -> int | None:
    """Return the bytes of the logits, unless they are kept for backward."""
    head = match["x"], match["weight"], match["bias"]
    keeps = kept_for_backward(match["plan"], head, None)
    return 0 if keeps == "logits" else saved_bytes(match)


def search(x, weight, bias: torch.Tensor | None, index):
    logp = F.log_softmax(F.linear(x, weight, bias).float(), -1)
    return logp.gather(-1, index), -(logp.exp() * logp).sum(-1)


_EXAMPLE = Plan(
    form=Form(),
    columns=(Columns(1, (Part(0, WHOLE, 0, None, 0, None),)),),
    outputs=(
        Output((Addend("log_probabilities", columns=0),), 0, None, (), is_detached=False),
        Output((Addend("entropy"),), 0, None, (), is_detached=False),
    ),
)


# Many parameters because they are the captures.
def replace(
    x,
    weight,
    bias,
    teacher_x=None,
    teacher_weight=None,
    teacher_bias=None,
    plan=_EXAMPLE,
    loss_memory=None,
    index=None,
    **inputs,
):
    """Carry out a plan; `inputs` are input_0, input_1, ..., of which its columns are made."""
    indices = _numbered("input", inputs) if index is None else [index]
    teacher = _teacher(teacher_x, teacher_weight, teacher_bias)
    return run(plan, (x, weight, bias), teacher, indices, loss_memory)


def _numbered(name: str, values: Mapping[str, Any]) -> list[Any]:
    """Return the values of NAME_0, NAME_1, ..., in order."""
    return [values[key] for key in (f"{name}_{at}" for at in range(len(values))) if key in values]


def _teacher(x, weight, bias) -> Any:
    return None if x is None else (_detached(x), _detached(weight), _detached(bias))


def _detached(tensor):
    """AOTAutograd cannot detach in inference mode."""
    return tensor if tensor is None or not torch.is_grad_enabled() else tensor.detach()


def search_loss(x, weight, bias: torch.Tensor | None, index):
    logp, entropy = search(x, weight, bias, index)
    return logp, entropy, logp.sum()


# The loss is the sum of the log-probabilities, whose gradients are ones.
_EXAMPLE_TAIL = Tail(
    '{"answers":["log_probabilities","entropy"],"others":0,"steps":[["aten.sum.default",[{"value":[0]}],{}],'
    '["aten.ones_like.default",[{"value":[0]}],{}]],"dtype":"float32","loss":[2],"seed":[3],'
    '"gradients":{"log_probabilities":[3]},"of_others":{}}'
)


# Many parameters because they are the captures.
def replace_loss(
    x,
    weight,
    bias,
    teacher_x=None,
    teacher_weight=None,
    teacher_bias=None,
    plan=_EXAMPLE,
    tail=_EXAMPLE_TAIL,
    loss_memory=None,
    index=None,
    **values,
):
    """Carry out a plan and its loss; `values` are input_0, ..., as above, and other_0, ..., which the tail reads."""
    indices = _numbered("input", values) if index is None else [index]
    teacher, others = _teacher(teacher_x, teacher_weight, teacher_bias), _numbered("other", values)
    return run_with_loss(plan, (x, weight, bias), teacher, indices, loss_memory, tail, others)


def check_loss(match: Match) -> str | None:
    """Reject float16, whose range is too small for gradients before they are scaled."""
    if match["x"].dtype == torch.float16:
        return (
            "float16 has too small a range for gradients that are computed in forward, before they are scaled"
        )
    return None


_INPUTS = {
    "x": torch.empty(6, 8),
    "weight": torch.empty(11, 8),
    "bias": torch.empty(11),
    "index": torch.empty(6, 1, dtype=torch.int64),
}

PATTERNS = (
    Pattern(
        name="linear_softmax.loss",
        search=search_loss,
        replace=replace_loss,
        examples=_INPUTS,
        check=check_loss,
        profit=profit,
        saves=saved_bytes,
        finds=find_losses,
        is_loss=True,
        detaches=True,
    ),
    Pattern(
        name="linear_softmax.questions",
        search=search,
        replace=replace,
        examples=_INPUTS,
        profit=profit,
        saves=saves,
        finds=find_questions,
        detaches=True,
    ),
)
