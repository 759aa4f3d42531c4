"""A linear layer to logits, and a loss that is computed from answers about each row: three matmuls, and no logits.

    answers of linear_softmax.py; loss () = program(answers, others), as in row_program.py

    x, weight, bias, teacher_x, teacher_weight, teacher_bias, index as in linear_softmax.py; others: any tensors that
    the program reads, such as advantages (B, T), a mask, or log-probabilities of another model
    -> Answers, columns, statistics, loss, dx (N, H), dweight (V, H), dbias (V), token_scales (N), of_others (M),
       reached_others (M)

If the gradient of the loss at a row depends on the answers of this row alone, the gradient of the logits of a chunk is
known as soon as the chunk is answered. Forward therefore computes all gradients, for an incoming gradient of 1, chunk
by chunk, as linear_cross_entropy.py does: three matmuls, two if weight needs no gradient. Backward only scales them.
of_others has the gradients of the other operands, flattened one after the other. For each chunk the program runs on
all rows, of which the chunk reads its own: a program of some vectors costs the same for a chunk as for all rows.

If the gradient at a row depends on other rows, which shapes may decide at run time, all rows are answered before the
first gradient is computed: one matmul more.

The answers may have incoming gradients too, for which backward computes the logits again. An incoming gradient of the
loss that is infinite or NaN, such as that of a mean over no tokens, reaches the rows that eager code multiplies by 0,
and not the rows that it leaves out by a condition. token_scales is 1 for rows that it reaches, and reached_others is
True for elements of of_others that it reaches.

Dtypes: as in linear_softmax.py; the loss has the dtype that the program gives it. Not for float16, whose range is too
small for the gradient of the logits before the incoming gradient of a GradScaler restores its size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import row_program
from .linear_cross_entropy import (
    Gradients,
    check_made,
    chunks_of,
    empty_gradients,
    gradients_by_chunk,
    scaled,
)
from .linear_softmax import TeacherOf, backward_of_answers, check_teacher, with_top
from .registration import opaque_op
from .softmax_chunks import (
    Answers,
    Asking,
    Made,
    empty_made,
    gradient_of_chunk,
    heads_of,
    names_of,
    share_of,
)
from .softmax_questions import QUESTIONS, STATISTICS, coefficients


# Long because an operator has one list of arguments and one of results.
@opaque_op
def linear_softmax_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    index: Tensor | None,
    others: Sequence[Tensor],
    questions: str,
    top: int,
    logit_scale: float,
    softcap: float | None,
    kind: str,
    beta: float,
    teacher_scale: float,
    teacher_softcap: float | None,
    program: str,
    lead: Sequence[int],
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    memory: int = 0,
) -> tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
]:
    """Return the outputs above. `lead`: the leading sizes of x before it was flattened, for sizes of the program."""
    asked = names_of(questions)
    made = empty_made(x, index, teacher_x, asked, top)
    for tensor in made.tensors:
        tensor.zero_()
    tensors = x, weight, bias, teacher_x, teacher_weight, teacher_bias
    student, teacher = heads_of(tensors, kind, beta, (logit_scale, teacher_scale), (softcap, teacher_softcap))
    asking = Asking(student, teacher, index, asked, top)
    sizes = (*lead, weight.shape[0])
    dims = (*sizes, *(size for other in others for size in other.shape))
    run = row_program.Run(row_program.read(program), made.answers._asdict(), others, dims)
    share = share_of(x, memory, 1 if teacher is None else 2 + bool(asked))
    forms = row_program.forms_of(run.values[: len(run.program.answers)]), row_program.forms_of(others)
    if row_program.why_not_by_rows(program, *forms, sizes) is not None:
        aligned = student.aligned()
        for chunk in chunks_of(aligned.x, weight, False, share):
            asking.answer(chunk, aligned.logits(chunk), made)

    def on_chunk(chunk: slice, rows: Tensor, weight: Tensor, dbias_sum: Tensor) -> Tensor:
        dlogits = _gradient_of_rows(asking, run, made, chunk, (rows, weight))
        if dbias_sum.numel():
            dbias_sum.add_(dlogits.sum(0, dtype=dbias_sum.dtype))
        return dlogits

    needs = needs_dx, needs_dweight, needs_dbias
    gradients = gradients_by_chunk(x, weight, 1.0, needs, share, on_chunk)
    of_answers, of_others = run.program.gradients.values(), run.program.of_others.values()
    loss, *found = run.results(run.program.loss, *of_others, *of_answers)
    reached = run.reached(*of_others, *of_answers)
    gradients.token_scales.copy_(_any_by_row(reached[len(of_others) :], x))
    flat = _empty_of_others(x, run.program, others)
    of_reach = x.new_empty(flat.shape, dtype=torch.bool)
    _write_flat(flat, found[: len(of_others)])
    _write_flat(of_reach, reached[: len(of_others)])
    return *made.tensors, loss, *gradients[:4], flat, of_reach  # pyright: ignore[reportReturnType]


def _any_by_row(flags: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return (N): whether one of the flags of a row is set."""
    found = x.new_zeros(x.shape[:1], dtype=torch.bool)
    for each in flags:
        found |= each.any(-1) if each.dim() > 1 else each
    return found


def _write_flat(out: Tensor, parts: Sequence[Tensor]) -> None:
    torch.cat([out[:0], *(part.reshape(-1).to(out.dtype) for part in parts)], out=out)


def _gradient_of_rows(
    asking: Asking,
    run: row_program.Run,
    made: Made,
    chunk: slice,
    operands: tuple[Tensor, Tensor],
) -> Tensor:
    """Answer a chunk, and return the gradient of its logits. `operands` are its rows of x, and weight."""
    x, weight = operands
    student = asking.student._replace(x=x, weight=weight)
    logits = student.logits(slice(None))
    of_teacher = asking.answer(chunk, logits, made)
    program, statistics = run.program, made.statistics[:, chunk]
    found = zip(program.gradients, run.results(*program.gradients.values()), strict=True)
    upstream = {name: gradient[chunk].to(statistics.dtype) for name, gradient in found}
    of_questions = {name: gradient for name, gradient in upstream.items() if name in QUESTIONS}
    parts = coefficients(of_questions, statistics[:STATISTICS], weight.shape[0])
    columns = made.columns if asking.top else asking.index
    columns = None if columns is None else columns[chunk]
    parts = parts._replace(columns=with_top(parts.columns, upstream.get("top"), columns))
    both = logits, of_teacher
    of_pair = upstream.get("divergence")
    return gradient_of_chunk(student, asking.teacher, both, columns, statistics, parts, of_pair)


def _empty_of_others(x: Tensor, program: row_program.Program, others: Sequence[Tensor]) -> Tensor:
    """Return a tensor without values for the gradients of the other operands that the program has gradients of."""
    learned = [others[at] for at in program.of_others]
    wide = functools.reduce(torch.promote_types, (each.dtype for each in learned), torch.float32)
    return x.new_empty(sum(each.numel() for each in learned), dtype=wide)


@linear_softmax_loss.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    teacher_x: Any,
    teacher_weight: Any,
    teacher_bias: Any,
    index: Any,
    others: Sequence[Tensor],
    questions: str,
    top: int,
    logit_scale: float,
    softcap: Any,
    kind: str,
    beta: float,
    teacher_scale: float,
    teacher_softcap: Any,
    program: str,
    lead: Sequence[int],
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    memory: int = 0,
) -> tuple[Tensor, ...]:
    made, read = empty_made(x, index, teacher_x, names_of(questions), top), row_program.read(program)
    gradients = empty_gradients(x, weight, (needs_dx, needs_dweight, needs_dbias))
    loss = x.new_empty((), dtype=getattr(torch, read.dtype))
    flat = _empty_of_others(x, read, others)
    return *made.tensors, loss, *gradients[:4], flat, flat.new_empty(flat.shape, dtype=torch.bool)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, index, others, questions, top, scale, cap, kind, beta, teacher_scale, teacher_cap = inputs[:16]
    program, _, *made, memory = inputs[16:]
    answers, (columns, statistics, _, *gradients) = Answers(*output[:12]), output[12:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(answers.argmax, answers.top_columns, columns, statistics, *gradients)
    ctx.terms = scale, cap, kind, beta, teacher_scale, teacher_cap
    ctx.asked, ctx.memory, ctx.made = names_of(questions), memory, tuple(made)
    ctx.others = {at: (others[at].shape, others[at].dtype) for at in row_program.read(program).of_others}
    ctx.count = len(others)
    saved = (*tensors, columns if top else index, statistics)
    ctx.save_for_backward(*saved, *gradients)


def _backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
    *saved, dx, dweight, dbias, token_scales, of_others, reached = ctx.saved_tensors
    of, dloss = Answers(*incoming[:12]), incoming[14]  # pyright: ignore[reportArgumentType]
    needs = ctx.needs_input_grad[:3]
    check_teacher("linear_softmax_loss", ctx.needs_input_grad)
    found: tuple[Tensor | None, ...] = (None, None, None)
    to_others: list[Tensor | None] = [None] * ctx.count
    if dloss is not None:
        check_made("linear_softmax_loss", ctx.made, needs)
        dloss = dloss.to(token_scales.dtype)
        gradients = Gradients(dx, dweight, dbias, token_scales, token_scales.new_empty(0))
        made = scaled(dloss, gradients, saved[0].dtype)
        found = tuple(grad if needed else None for grad, needed in zip(made, needs, strict=True))
        of_others, start = torch.where(reached, of_others * dloss, of_others), 0
        for at, (shape, dtype) in ctx.others.items():
            count = math.prod(shape)
            to_others[at] = of_others[start : start + count].to(dtype).reshape(shape)
            start = start + count
    if any(gradient is not None for gradient in of):
        again = backward_of_answers(saved, of, (None, None), ctx.asked, ctx.terms, needs, ctx.memory)
        found = tuple(b if a is None or b is None else a + b for a, b in zip(found, again, strict=True))
    heads = *found, None, None, None, None
    return *heads, to_others, *(None,) * (len(ctx.needs_input_grad) - 8)


linear_softmax_loss.register_autograd(_backward, setup_context=_setup_context)


# Many parameters because callers pass the few that they need by name.
def loss_of_answers(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    questions: set[str],
    program: str,
    others: Sequence[Tensor],
    *,
    lead: Sequence[int],
    index: Tensor | None = None,
    top: int = 0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher: TeacherOf | None = None,
    memory: int = 0,
) -> tuple[Answers, Tensor]:
    """Return the answers and the loss (). Arguments as in linear_softmax.answers, and as above."""
    names = ",".join(question for question in QUESTIONS if question in questions)
    second = (None, None, None) if teacher is None else teacher[:3]
    terms = ("", 0.5, 1.0, None) if teacher is None else teacher[3:]
    heads, scores = (x, weight, bias, *second), (logit_scale, softcap)
    needs = [torch.is_grad_enabled() and part is not None and part.requires_grad for part in heads[:3]]
    found = torch.ops.liger_compile.linear_softmax_loss.default(
        *heads, index, others, names, top, *scores, *terms, program, lead, *needs, memory
    )
    return Answers(*found[:12]), found[14]
