"""The ops as functions, callable directly. The replacements of the patterns call them too.

Every function takes plain tensors, returns new tensors and supports first derivatives. Half precision in, half
precision out: ops compute in float32, and round where the docstring states it; float64 inputs are computed in float64.
An ambient autocast changes nothing. The file of each op in liger_compile/ops/ states what it computes and saves.

Letters: D model width or head dimension, R rotated channels, I inner width of an MLP, N tokens, H hidden size, V
vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import linear_softmax, validation  # also imports the ops, which register themselves
from .ops.precision import accumulation_dtype
from .torch_internals import dtensor

__all__ = [
    "cross_entropy",
    "geglu",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_log_probability",
    "norm_rotary",
    "pre_norm",
    "rms_norm",
    "rotary",
    "rotary_complex",
    "swiglu",
]


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    offset: float = 0.0,
    casting: Literal["llama", "gemma"] = "gemma",
) -> Tensor:
    """Returns the root mean square normalization of x over the last dimension.

    It has kernels, for code that is not compiled. backend="liger" does not choose it: the kernels of all norms gave no
    clear gain in a step of a 4-layer Llama on an H200 (45.8 ms and 2.93 GiB, instead of 46.2 ms and 2.68 GiB by
    Inductor's code, the lower quartiles of both 45.3 ms; patterns/rms_norm.py).

    Args:
        x: (..., D), any floating dtype. Statistics are computed in float32.
        weight: (D), or None for no weight.
        eps: added to the mean of squares. None means the same as in `F.rms_norm`: the machine epsilon of the dtype
            of the statistics.
        offset: added to the weight, 1.0 for Gemma. Only with casting="gemma".
        casting: where it rounds. "gemma": `(x / rms * (offset + weight)).to(x.dtype)`, as `F.rms_norm` with offset 0,
            and as GemmaRMSNorm. "llama": `weight * (x / rms).to(x.dtype)`, as Hugging Face's LlamaRMSNorm.

    Returns:
        (..., D), in x.dtype; with "llama" in the dtype that x and weight promote to.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    validation.check_norm("rms_norm", x, weight, offset, casting)
    if eps is None:
        eps = torch.finfo(accumulation_dtype(x.dtype)).eps
    y, _ = torch.ops.liger_compile.rms_norm.default(x, weight, eps, offset, casting)
    return y


def pre_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: Literal["llama", "gemma"] = "gemma",
) -> Tensor:
    """Returns the `rms_norm` of a residual stream, in models that backend="liger" compiles for a GPU.

    Inductor fuses its forward with the adjacent operators. Its backward adds the incoming gradients and the gradient of
    the residual stream, and recomputes the result. Elsewhere it is plain PyTorch, and `rms_norm` is faster. Arguments
    and result are those of `rms_norm`; eps must be a number.

    x may be a DTensor of which each rank has whole rows, with a replicated weight: sequence parallel. The result is
    divided as x is, and the gradient of weight is a sum over the ranks, as DTensor computes it.
    """
    validation.check_norm("pre_norm", x, weight, offset, casting)
    if dtensor.is_dtensor(x):
        validation.check_whole_rows("pre_norm", x, weight)
        shared = None if weight is None else dtensor.shared_by_rows(weight, x)
        y = pre_norm(dtensor.local_part(x), shared, eps, offset=offset, casting=casting)
        return dtensor.divided_like(y, x)
    rstd = torch.ops.liger_compile.pre_norm_statistics.default(x, eps)
    return torch.ops.liger_compile.pre_norm.default(x, rstd, weight, offset, casting)


def rotary(
    q: Tensor,
    k: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    layout: Literal["half", "interleaved", "interleaved_to_half"] = "half",
    half_tables: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Rotates the first R channels of q, and of k if given, and copies the other channels.

    A pair of channels (a, b) becomes (a * cos_a - b * sin_a, b * cos_b + a * sin_b). Computed in float32, rounded once.

    Args:
        q: (..., D).
        k: (..., D), or None. Its heads and leading dimensions may differ from those of q.
        cos, sin: (..., R) with R even and at most D, broadcastable against q and k without enlarging them, in the
            layout of the result. Any numbers are valid: the two halves of a table may differ. They get no gradient.
        layout: the pairs of channels. "half": i and R/2 + i. "interleaved": 2i and 2i + 1.
            "interleaved_to_half": read from 2i and 2i + 1, written to i and R/2 + i, as in DeepSeek-V3.
        half_tables: cos and sin are (..., R/2) and have one number for each pair.
        out_dtype: dtype of the result; None is the dtype that x and cos promote to.

    Returns:
        q', or (q', k') if k is given.

    Source: Su et al. 2021, arXiv 2104.09864.
    """
    validation.check_rotary("rotary", q, k, cos, sin, layout, half_tables)
    q, rotated_k = torch.ops.liger_compile.rotary.default(q, k, cos, sin, layout, half_tables, out_dtype)
    return q if k is None else (q, rotated_k)


# Many parameters because users pass them by name, as to torch's own functions.
def norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: Literal["llama", "gemma"] = "gemma",
) -> tuple[Tensor, Tensor]:
    """Returns `rotary(rms_norm(q, q_weight, ...), rms_norm(k, k_weight, ...), cos, sin)`, in one pass over q and k.

    Args:
        q, k: (..., D). The numbers of heads may differ.
        q_weight, k_weight: (D), or None for no weight.
        cos, sin: (..., D) with D even, as in `rotary`, layout "half". They get no gradient.
        eps, offset, casting: as in `rms_norm`; eps must be a number.

    Returns:
        q' and k', each in the dtype that its norm and cos promote to.
    """
    for x, weight in ((q, q_weight), (k, k_weight)):
        validation.check_norm("norm_rotary", x, weight, offset, casting)
    validation.check_norm_rotary(q, k, cos, sin)
    return torch.ops.liger_compile.norm_rotary.default(
        q, k, q_weight, k_weight, cos, sin, eps, offset, casting
    )


def rotary_complex(q: Tensor, k: Tensor | None = None, freqs: Tensor | None = None) -> Any:
    """Rotates interleaved pairs by complex numbers, as Meta's Llama code does.

    Equals `view_as_real(view_as_complex(q.float().unflatten(-1, (-1, 2))) * freqs).flatten(-2).type_as(q)`.

    Args:
        q, k: as in `rotary`, with equal dtypes.
        freqs: (..., R/2), complex.

    Returns:
        q', or (q', k') if k is given, in the dtype of q.
    """
    validation.check_rotary_complex(q, k, freqs)
    assert freqs is not None
    cos, sin = torch.view_as_real(freqs.resolve_conj()).unbind(-1)
    return rotary(q, k, cos, sin, layout="interleaved", half_tables=True, out_dtype=q.dtype)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Returns `F.silu(gate) * up`, in plain PyTorch.

    Inductor's code is as fast as a kernel of our own was, and backend="liger" recomputes the result in backward.

    Args:
        gate: (..., I); or, if up is None, (..., 2I) with the gate in its first half and up in its second half.
        up: (..., I), or None.

    Returns:
        (..., I), in the dtype that gate and up promote to.

    Source: Shazeer 2020, arXiv 2002.05202.
    """
    gate, up = _gate_and_up("swiglu", gate, up)
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """Returns `F.gelu(gate, approximate=approximate) * up`; otherwise as `swiglu`."""
    gate, up = _gate_and_up("geglu", gate, up)
    return F.gelu(gate, approximate=approximate) * up


def _gate_and_up(name: str, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    if gate.shape[-1] % 2:
        raise ValueError(
            f"{name}: expected an even last dimension of gate without up, got {gate.shape[-1]}; pass up"
        )
    packed_gate, packed_up = gate.chunk(2, -1)
    return packed_gate, packed_up


# Many parameters because users pass them by name, as to F.cross_entropy.
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Returns `F.cross_entropy(softcap * tanh(logit_scale * logits.float() / softcap), target, ...)`, plus z-loss.

    Saves the logits and two numbers per token, and makes no float32 copy of the logits.

    Args:
        logits: (..., V), any floating dtype. Classes are the last dimension, unlike in `F.cross_entropy`.
        target: (...) or (N), or of any shape if logits is (N, V): class indices, int64, one for each row of logits.
        weight: (V), a weight for each class, or None. It gets no gradient.
        ignore_index: the target of tokens that are ignored.
        reduction: "mean" divides by the number of tokens not ignored, or by the sum of the weights of their classes.
        label_smoothing: the share of the target that is spread evenly over all classes.
        logit_scale: multiplies the logits.
        softcap: bounds the logits by a tanh, after the scale; None for no bound.
        z_loss: adds z_loss * logsumexp^2 to the loss of a token, weighted by the weight of its class.

    Returns:
        The loss, in float32 (float64 for float64 logits): a scalar, or for "none" a tensor with the shape of target. A
        mean over no tokens is NaN, with gradients of 0.

    Raises:
        IndexError: a target is not a valid class, on a CPU. A GPU stops with a device-side assertion, as in
            `F.cross_entropy`: the error is raised at the next synchronization.
    """
    name = "cross_entropy"
    validation.check_target(name, "logits", logits, target)
    validation.check_loss(name, reduction, label_smoothing, softcap)
    validation.check_class_weight(name, weight, logits.shape[-1])
    rows = logits.reshape(-1, logits.shape[-1])
    loss, _, _ = torch.ops.liger_compile.cross_entropy.default(
        rows,
        target.reshape(-1),
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        logit_scale,
        softcap,
        z_loss,
    )
    return loss.reshape(target.shape) if reduction == "none" else loss


# Many parameters because users pass them by name, as to F.cross_entropy.
# Long because the docstring of a public function describes each of them.
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    memory: int | None = None,
) -> Tensor:
    """Returns `cross_entropy(F.linear(x, weight, bias), target, ...)`, with at most a chunk of the logits in memory.

    With reduction "mean" or "sum", forward computes the gradients of the inputs that require one.

    A vocabulary that is divided over ranks: weight, and bias if any, are DTensors with the placement Shard(0) on a
    one-dimensional mesh, x is a replicated DTensor, and target and class_weight are equal on all ranks. Reductions
    "mean" and "sum"; no label smoothing or z-loss. All ranks have to call the function, with as many rows. Each rank
    has at most a chunk of its own columns of the logits. The gradient of x is reduced once.

    Args:
        x: (..., H).
        weight: (V, H), in the dtype of x.
        target: (...) or (N), or of any shape if x is (N, H): class indices, int64, one for each row of x.
        bias: (V), in the dtype of x, or None.
        class_weight: (V), or None; `weight` of `cross_entropy`. Its other arguments have the same meaning here.
        memory: bytes for a chunk of the logits, or None for a default: 600 MiB on a GPU, and 800 MiB where this is
            room for all logits. A chunk has at least 128 tokens. In half precision it has more tokens where longer
            chunks avoid a float32 sum of the gradient of weight and take less memory than that sum. In float16 an
            eighth of it is for float32 matmuls.

    Returns:
        The loss, as in `cross_entropy`. Logits are rounded to the dtype of x, as `F.linear` rounds them. For DTensors,
        a plain tensor, equal on all ranks.

    Raises:
        IndexError: a target is not a valid class, on a CPU. A GPU stops with a device-side assertion, as in
            `F.cross_entropy`: the error is raised at the next synchronization.
        RuntimeError: in a backward with create_graph=True.
        ValueError: DTensors of other placements, or with arguments that a divided vocabulary does not support.

    Source: Hsu et al. 2024, arXiv 2410.10989.
    """
    name = "linear_cross_entropy"
    validation.check_one_dtype(name, x, weight, bias)
    validation.check_linear(name, "weight", weight, x.shape[-1])
    validation.check_vector(name, "bias", bias, weight.shape[0])
    validation.check_target(name, "x", x, target)
    validation.check_loss(name, reduction, label_smoothing, softcap)
    validation.check_class_weight(name, class_weight, weight.shape[0])
    validation.check_memory(name, memory)
    if any(map(dtensor.is_dtensor, (x, weight, target, bias, class_weight))):
        has_others = label_smoothing != 0 or z_loss != 0
        validation.check_sharded_loss(name, x, weight, target, bias, class_weight, reduction, has_others)
        return _sharded_loss(
            x, weight, target, bias, class_weight, ignore_index, reduction, logit_scale, softcap, memory or 0
        )
    in_forward = torch.is_grad_enabled() and reduction != "none"
    loss, *_ = torch.ops.liger_compile.linear_cross_entropy.default(
        x.reshape(-1, x.shape[-1]),
        weight,
        target.reshape(-1),
        bias,
        class_weight,
        ignore_index,
        reduction,
        label_smoothing,
        logit_scale,
        softcap,
        z_loss,
        in_forward and x.requires_grad,
        in_forward and weight.requires_grad,
        in_forward and bias is not None and bias.requires_grad,
        memory or 0,
    )
    return loss.reshape(target.shape) if reduction == "none" else loss


# Many parameters because they are those of linear_cross_entropy that a divided vocabulary supports.
def _sharded_loss(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    logit_scale: float,
    softcap: float | None,
    memory: int,
) -> Tensor:
    """Returns linear_cross_entropy of a replicated x and a weight that is divided over the ranks by classes."""
    with_gradients = torch.is_grad_enabled()
    group_name, _ = dtensor.group_of(weight)
    loss, *_ = torch.ops.liger_compile.sharded_linear_cross_entropy.default(
        dtensor.local_copy(x).reshape(-1, x.shape[-1]),
        dtensor.local_part(weight),
        (dtensor.local_part(target) if dtensor.is_dtensor(target) else target).reshape(-1),
        None if bias is None else dtensor.local_part(bias),
        dtensor.local_part(class_weight) if dtensor.is_dtensor(class_weight) else class_weight,
        ignore_index,
        reduction,
        logit_scale,
        softcap,
        group_name,
        weight.shape[0],
        with_gradients and x.requires_grad,
        with_gradients and weight.requires_grad,
        with_gradients and bias is not None and bias.requires_grad,
        memory,
    )
    return loss


# Many parameters because users pass them by name, as to F.cross_entropy.
# Long because the docstring of a public function describes each of them.
def linear_log_probability(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    memory: int | None = None,
) -> Any:
    """Returns the log-probability of each target, `F.log_softmax(F.linear(x, weight, bias).float(), -1)` at target.

    At most a chunk of the logits is in memory. Each log-probability, and each entropy, may have a gradient of its own:
    backward computes the logits again. Inputs that require no gradient cost no matmul.

    Args:
        x: (..., H).
        weight: (V, H), in the dtype of x.
        target: (...) or (N), or of any shape if x is (N, H): class indices, int64, one for each row of x.
        bias: (V), in the dtype of x, or None.
        ignore_index: the target of tokens that have none. Their log-probability is 0, without a gradient.
        logit_scale: multiplies the logits: 1 / temperature.
        softcap: bounds the logits by a tanh, after the scale; None for no bound.
        with_entropy: also return the entropy of each row, -sum(p * log(p)), in nats; for ignored targets too.
        memory: bytes for a chunk of the logits, or None for a default, as in `linear_cross_entropy`.

    Returns:
        The log-probabilities, with the shape of target, in float32 (float64 for float64 inputs); or a tuple of these
        and the entropies. Logits are rounded to the dtype of x, as `F.linear` rounds them.

    Raises:
        RuntimeError: a target is not a valid class, on a CPU. A GPU stops with a device-side assertion, as in
            `torch.gather`: the error is raised at the next synchronization. Also in a backward with create_graph=True.

    Source: the algorithm is our own; linear_cross_entropy has the source of the chunks.
    """
    name = "linear_log_probability"
    validation.check_one_dtype(name, x, weight, bias)
    validation.check_linear(name, "weight", weight, x.shape[-1])
    validation.check_vector(name, "bias", bias, weight.shape[0])
    validation.check_target(name, "x", x, target)
    validation.check_loss(name, "none", 0.0, softcap)
    validation.check_memory(name, memory)
    is_ignored = target == ignore_index
    index = target.masked_fill(is_ignored, 0).reshape(-1, 1)
    questions = {"log_probabilities", "entropy"} if with_entropy else {"log_probabilities"}
    found = linear_softmax.answers(
        x.reshape(-1, x.shape[-1]),
        weight,
        bias,
        questions,
        index=index,
        logit_scale=logit_scale,
        softcap=softcap,
        memory=memory or 0,
    )
    of_target = found.log_probabilities.reshape(target.shape).masked_fill(is_ignored, 0)
    return (of_target, found.entropy.reshape(target.shape)) if with_entropy else of_target


# Many parameters because users pass them by name, as to F.kl_div.
# Long because the docstring of a public function describes each of them.
def linear_divergence(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    kind: Literal["forward", "reverse", "jensen_shannon", "cross"] = "forward",
    beta: float = 0.5,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_scale: float | None = None,
    teacher_softcap: float | None = None,
    memory: int | None = None,
) -> Tensor:
    """Returns the divergence of a student's distribution from a teacher's, for each row, without the logits of either.

    At most a chunk of both logits is in memory. Each divergence may have a gradient of its own: backward computes the
    logits again. Only the student's inputs get gradients.

    Args:
        x: (..., H), of the student.
        weight: (V, H), in the dtype of x.
        teacher_x: (..., I), with the leading dimensions of x; the dtype may differ.
        teacher_weight: (V, I), in the dtype of teacher_x.
        bias: (V), in the dtype of x, or None.
        teacher_bias: (V), in the dtype of teacher_x, or None.
        kind: with the distributions p of the student and q of the teacher, "forward": sum(q * log(q / p)); "reverse":
            sum(p * log(p / q)); "jensen_shannon": beta * sum(q * log(q / m)) + (1 - beta) * sum(p * log(p / m)), with
            m = beta * q + (1 - beta) * p; "cross": sum(q * log(p)), minus the cross-entropy.
        beta: the weight of the teacher, above 0 and below 1; for "jensen_shannon" only.
        logit_scale: multiplies the student's logits: 1 / temperature.
        softcap: bounds the student's logits by a tanh, after the scale; None for no bound.
        teacher_scale: the same for the teacher's logits; None for logit_scale.
        teacher_softcap: the same for the teacher's logits.
        memory: bytes for a chunk of the logits of both, or None for a default, as in `linear_cross_entropy`.

    Returns:
        (...), in nats, in float32 (float64 if x or teacher_x is float64). Logits are rounded to the dtype of their x,
        as `F.linear` rounds them.

    Raises:
        ValueError: the teacher requires a gradient.
        RuntimeError: in a backward with create_graph=True.

    Source: Agarwal et al. 2023, arXiv 2306.13649, for the generalized Jensen-Shannon divergence.
    """
    name = "linear_divergence"
    validation.check_one_dtype(name, x, weight, bias)
    validation.check_one_dtype(name, teacher_x, teacher_weight, teacher_bias)
    validation.check_linear(name, "weight", weight, x.shape[-1])
    validation.check_linear(name, "teacher_weight", teacher_weight, teacher_x.shape[-1])
    validation.check_vector(name, "bias", bias, weight.shape[0])
    validation.check_vector(name, "teacher_bias", teacher_bias, weight.shape[0])
    validation.check_divergence(name, kind, beta)
    validation.check_teacher(name, x, weight, teacher_x, teacher_weight, teacher_bias)
    for cap in (softcap, teacher_softcap):
        validation.check_loss(name, "none", 0.0, cap)
    validation.check_memory(name, memory)
    teacher = linear_softmax.TeacherOf(
        teacher_x.reshape(-1, teacher_x.shape[-1]),
        teacher_weight,
        teacher_bias,
        kind,
        beta,
        logit_scale if teacher_scale is None else teacher_scale,
        teacher_softcap,
    )
    found = linear_softmax.answers(
        x.reshape(-1, x.shape[-1]),
        weight,
        bias,
        set(),
        logit_scale=logit_scale,
        softcap=softcap,
        teacher=teacher,
        memory=memory or 0,
    )
    return found.divergence.reshape(x.shape[:-1])
