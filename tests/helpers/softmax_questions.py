"""Questions about the softmax of a head in plain PyTorch, as people write them, and as liger_compile answers them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_compile.ops import linear_softmax as op
from liger_compile.ops.softmax_questions import QUESTIONS

DIFFERENTIABLE = tuple(question for question in QUESTIONS if question != "argmax")
SETS = (
    ("log_probabilities",),
    ("scores", "logsumexp"),
    ("log_probabilities", "entropy"),
    ("mean_score", "collision", "argmax"),
    ("log_probabilities", "log_probability_sum"),
    ("score_sum", "logsumexp", "entropy"),
    QUESTIONS,
)
FORMS = ({}, {"logit_scale": 0.5}, {"logit_scale": 0.7, "softcap": 2.0})


def eager(x, weight, bias, index, questions, top=0, logit_scale=1.0, softcap=None) -> dict[str, Tensor]:
    """The answers from all logits."""
    z = F.linear(x, weight, bias).float() * logit_scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    logp, p = z.log_softmax(-1), z.softmax(-1)
    every = {
        "log_probabilities": lambda: logp.gather(-1, index),
        "scores": lambda: z.gather(-1, index),
        "logsumexp": lambda: z.logsumexp(-1),
        "entropy": lambda: -(p * logp).sum(-1),
        "mean_score": lambda: (p * z).sum(-1),
        "score_sum": lambda: z.sum(-1),
        "log_probability_sum": lambda: logp.sum(-1),
        "collision": lambda: p.square().sum(-1),
        "argmax": lambda: z.argmax(-1),
    }
    found = {question: every[question]() for question in questions}
    if top:
        found["top"], found["top_columns"] = z.topk(top)
    return found


def ours(x, weight, bias, index, questions, top=0, memory=0, keeps="", **form) -> dict[str, Tensor]:
    made = op.answers(
        x, weight, bias, set(questions), index=index, top=top, memory=memory, keeps=keeps, **form
    )
    names = (*questions, *(("top", "top_columns") if top else ()))
    return {name: getattr(made, name) for name in names}


def outcome(answers: dict[str, Tensor], leaves) -> tuple:
    """The answers, and the gradients for incoming gradients that differ in every element."""
    generator = torch.Generator().manual_seed(0)
    outputs = [answer for answer in answers.values() if answer.is_floating_point()]
    upstream = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    leaves = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    return {name: answer.detach() for name, answer in answers.items()}, gradients


def tensors(rows, dtype, device, classes=37, width=16, columns=1, has_bias=True):
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    index = torch.randint(classes, (rows, columns), generator=generator).to(device)
    return randn(rows, width), randn(classes, width), randn(classes) if has_bias else None, index
