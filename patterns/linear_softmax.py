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
    kept_for_backward,
    run,
)
from liger_compile.pattern import Match, Pattern
from liger_compile.patterns.linear_cross_entropy import saved_bytes
from liger_compile.patterns.profit import few_logits, needs_kernel
from liger_compile.steps.questions import LEAST_CLASSES, find_questions


def profit(match: Match) -> str | None:
    """Reject few classes, where the logits are no larger than the hidden states, and few logits.

    By arithmetic, not measured yet: training takes the three matmuls of Inductor's code, and keeps the logits once.
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
    named = [inputs[f"input_{at}"] for at in range(len(inputs))] if index is None else [index]
    teacher: Any = None
    if teacher_x is not None:
        teacher = _detached(teacher_x), _detached(teacher_weight), _detached(teacher_bias)
    return run(plan, (x, weight, bias), teacher, named, loss_memory)


def _detached(tensor):
    """AOTAutograd cannot detach in inference mode."""
    return tensor if tensor is None or not torch.is_grad_enabled() else tensor.detach()


PATTERNS = (
    Pattern(
        name="linear_softmax.questions",
        search=search,
        replace=replace,
        examples={
            "x": torch.empty(6, 8),
            "weight": torch.empty(11, 8),
            "bias": torch.empty(11),
            "index": torch.empty(6, 1, dtype=torch.int64),
        },
        profit=profit,
        saves=saves,
        finds=find_questions,
        detaches=True,
    ),
)
