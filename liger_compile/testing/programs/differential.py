"""Runs a random program in eager mode, under stock "aot_eager" and under backend="liger", and compares the outcomes.

A caller sees: values, shapes, dtypes, requires_grad, memory shared by outputs, every gradient, in-place writes into
inputs, parameters and buffers, and errors. `check` returns the differences from eager that are neither stock's nor
noise.

Dynamo traces a program once: `_Backends` compiles the captured graph for each variant when that variant runs.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from liger_compile.backend import liger
from liger_compile.forward_passes.specialize import copied
from liger_compile.report import clear_reports, reports
from liger_compile.testing.programs.grammar import BY_FLAG, BY_KERNEL, CLASSES, PARAMETERS, WIDTH
from liger_compile.testing.programs.program import Call, Program
from liger_compile.torch_internals.dynamo import lookup_backend
from liger_compile.torch_internals.modes import restored_if_raised

POLICIES = ("auto", "always", "never")
# Relative distances (L2) up to which two runs count as equal without a further check.
NEAR = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# Factors of incoming gradients with which eager mode shows whether an intermediate value overflowed in its backward.
SCALES = (2.0**-40, 2.0**-120)
NOISE = 8.0  # times the effect of one unit of rounding in the inputs on eager's own results
DOCUMENTED = "cannot be computed any more"  # the error of values that can no longer be computed
# torch.compile may save any value for backward, outputs too; eager code may then not write into it.
KEPT = "modified by an inplace operation"


def _double(x: Tensor) -> None:
    x.mul_(2)


def _double_all(xs: Sequence[Tensor]) -> None:
    for x in xs:
        x.mul_(2)


# Operators as users define them, which write into their arguments.
_library = torch.library.Library("liger_fuzz", "FRAGMENT")
if not hasattr(torch.ops.liger_fuzz, "double_"):
    _library.define("double_(Tensor(a!) x) -> ()")
    _library.define("double_all_(Tensor(a!)[] xs) -> ()")
    for key in ("CPU", "CUDA"):
        _library.impl("double_", _double, key)
        _library.impl("double_all_", _double_all, key)
    for name in ("double_", "double_all_"):
        _library.impl(name, lambda _: None, "Meta")


def _write(output: Tensor) -> None:
    output.mul_(2)


def _write_without_grad(output: Tensor) -> None:
    with torch.no_grad():
        output.add_(1)


def _write_item(output: Tensor) -> None:
    with torch.no_grad():
        output.view(-1)[:1] = 3.0


def _read(output: Tensor) -> None:
    output.detach().sum()


def _print(output: Tensor) -> None:
    repr(output)


OUTPUT_ACTIONS: Mapping[str, Callable[[Tensor], None]] = {
    "write": _write,
    "write without grad": _write_without_grad,
    "write an item": _write_item,
    "copy, then write": _write_without_grad,
    "read": _read,
    "print": _print,
}


def _sgd(parameters: Sequence[Tensor]) -> None:
    torch.optim.SGD(parameters, lr=0.5, foreach=False).step()


def _adamw_foreach(parameters: Sequence[Tensor]) -> None:
    torch.optim.AdamW(parameters, lr=0.1, eps=0.1, foreach=True).step()


def _adamw_fused(parameters: Sequence[Tensor]) -> None:
    torch.optim.AdamW(parameters, lr=0.1, eps=0.1, fused=True).step()


def _data(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.data.mul_(0.5)


STEPS: Mapping[str, Callable[[Sequence[Tensor]], None] | None] = {
    "nothing": None,
    "SGD": _sgd,
    "foreach": _adamw_foreach,
    "fused": _adamw_fused,
    ".data": _data,
}
# After these, the documented error may replace values. It may not after an optimizer's step, which is detected.
MAY_RAISE = (".data", "write", "write without grad", "write an item", "copy, then write")


@dataclass
class Outcome:
    """Everything that a caller saw of all calls: a value for each name, in the order in which it was seen."""

    seen: dict[str, Any] = field(default_factory=dict)
    error: str = ""  # the type and the text of the error that ended the run


@dataclass(frozen=True)
class Finding:
    """The differences of one variant."""

    variant: str
    differences: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.variant}: " + "\n    ".join(self.differences)


@dataclass
class Verdict:
    """The result of a check of a program."""

    kind: str  # "right", "invalid" in eager mode, "stock" differs as well, "noise", or "wrong"
    findings: tuple[Finding, ...] = ()
    replaced: int = 0  # the number of replaced places


# Running


def run(
    program: Program,
    function: Callable[..., Any],
    device: str = "cpu",
    nudge: int = 0,
    dtype: str | None = None,
    scale: float = 1.0,
    with_zeros: bool = False,
) -> Outcome:
    """Makes the calls of a program with `function`, which is the program's function or a compiled one.

    Args:
        nudge: changes floating inputs and parameters by up to a unit of rounding, differently for each number.
        dtype: the dtype of parameters and inputs instead of the program's.
        scale: a factor of the incoming gradients.
        with_zeros: outputs of which no gradient is taken get an incoming gradient of zeros, as AOTAutograd gives them.
    """
    outcome = Outcome()
    kind = getattr(torch, dtype or program.dtype)
    parameters = _parameters(program, kind, device, nudge)
    with _no_warnings():
        try:
            for position, call in enumerate(program.calls):
                inputs = _inputs(program, call, kind, device, nudge)
                backward = functools.partial(_backward, call, device, scale, with_zeros)
                _run_call(outcome, f"call {position}: ", call, function, parameters, inputs, backward)
        except Exception as error:
            outcome.error = f"{type(error).__name__}: {error}"
    return outcome


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _parameters(program: Program, dtype: torch.dtype, device: str, nudge: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made, unit = {}, _unit(program)
    for name, shape in PARAMETERS.items():
        value = torch.randn(shape, generator=generator) * 0.5
        value = _nudged(value.to(dtype), nudge, unit).to(device)
        made[name] = value if name == "buffer" else torch.nn.Parameter(value, name not in program.frozen)
    if program.is_tied:
        made["head"] = made["embed"]
    return made


def _unit(program: Program) -> float:
    """Returns the unit of rounding of the coarsest dtype that values of the program pass through."""
    text = program.source + program.dtype + " ".join(call.mode for call in program.calls)
    if "bfloat16" in text or "autocast" in text:
        return torch.finfo(torch.bfloat16).eps
    return torch.finfo(torch.float16 if "half" in text or "float16" in text else torch.float32).eps


def _nudged(value: Tensor, nudge: int, unit: float) -> Tensor:
    """Returns `value` with each number changed by `unit` up or down or not at all."""
    if not nudge:
        return value
    direction = torch.randint(-1, 2, value.shape, generator=torch.Generator().manual_seed(nudge))
    return (value.double() * (1 + direction * unit)).to(value.dtype)


def _inputs(program: Program, call: Call, dtype: torch.dtype, device: str, nudge: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    size = (program.batch, call.length)
    ids = torch.randint(CLASSES, size, generator=generator)
    x = _nudged(torch.randn(*size, WIDTH, generator=generator).to(dtype), nudge, _unit(program))
    labels = torch.randint(CLASSES, size, generator=generator)
    labels[:, :1] = -100
    if call.labels == "all":
        labels.fill_(-100)
    mask = torch.ones(size, dtype=torch.long)
    if call.mask == "padded":
        mask[:1, call.length // 2 :] = 0
    x = x.to(device).requires_grad_("x" not in program.frozen)
    return {"ids": ids.to(device), "x": x, "labels": labels.to(device), "mask": mask.to(device)}


@contextlib.contextmanager
def _mode(name: str, device: str) -> Iterator[None]:
    if name == "no_grad":
        with torch.no_grad():
            yield
    elif name == "inference":
        with torch.inference_mode():
            yield
    elif name == "autocast":
        with torch.autocast(device, torch.bfloat16):
            yield
    else:
        yield


def _run_call(
    outcome: Outcome,
    prefix: str,
    call: Call,
    function: Callable[..., Any],
    parameters: dict[str, Tensor],
    inputs: dict[str, Tensor],
    backward: Callable[[Sequence[Tensor]], None],
) -> None:
    see, device = outcome.seen, inputs["x"].device.type
    for tensor in parameters.values():
        tensor.grad = None
    torch.manual_seed(0)
    with _mode(call.mode, device):
        outputs = function(parameters, *inputs.values())
    for i, output in enumerate(outputs):
        see[f"{prefix}output {i} is"] = (tuple(output.shape), str(output.dtype), output.requires_grad)
    copies: dict[str, Tensor] = {}
    for action, which in call.before_backward:
        output = outputs[which % len(outputs)]
        if action == "copy, then write":
            copies[f"copy {len(copies)}"] = output.float() if output.dtype != torch.float32 else output.half()
        OUTPUT_ACTIONS[action](output)
    backward(outputs)
    step = STEPS[call.after_backward]
    trained = {id(parameter): parameter for parameter in parameters.values() if parameter.grad is not None}
    if step and trained:
        step(list(trained.values()))
    for name, tensor in {**parameters, **inputs}.items():
        see[f"{prefix}gradient of {name}"] = None if tensor.grad is None else tensor.grad.detach().clone()
    for name, tensor in copies.items():
        see[f"{prefix}{name}"] = tensor.detach().clone()
    for i, output in enumerate(outputs):
        try:
            see[f"{prefix}output {i}"] = output.detach().clone()
        except RuntimeError as error:
            done = (call.after_backward, *(action for action, _ in call.before_backward))
            if not (DOCUMENTED in str(error) and any(name in MAY_RAISE for name in done)):
                raise
            see[f"{prefix}output {i}"] = DOCUMENTED
            return
    for name, tensor in {**parameters, **inputs}.items():
        see[f"{prefix}{name} after it"] = tensor.detach().clone()
    see[f"{prefix}sharing"] = _sharing(outputs, {**parameters, **inputs})


def _backward(call: Call, device: str, scale: float, with_zeros: bool, outputs: Sequence[Tensor]) -> None:
    roots = [output for output in outputs if output.requires_grad and output.is_floating_point()]
    chosen = [i for i in range(len(roots)) if call.roots >> i & 1] or [*range(len(roots))][:1]
    if not chosen:
        return
    generator = torch.Generator().manual_seed(3)
    gradients = {}
    for i in chosen:
        gradient = torch.randn(roots[i].shape, generator=generator).to(roots[i].dtype)
        if call.upstream != "random":
            gradient = torch.full_like(gradient, {"inf": float("inf"), "zero": 0.0}[call.upstream])
        gradients[i] = (gradient * scale).to(device)
    if with_zeros:
        gradients = {i: gradients.get(i, torch.zeros_like(root)) for i, root in enumerate(roots)}
    torch.autograd.backward([roots[i] for i in gradients], [*gradients.values()])


def _sharing(outputs: Sequence[Tensor], others: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Returns the pairs of outputs, and of outputs and inputs, that share memory."""
    named = [(f"output {i}", output) for i, output in enumerate(outputs)]
    pairs = []
    for i, (name, tensor) in enumerate(named):
        for other_name, other in [*named[:i], *others.items()]:
            if tensor.numel() and tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr():
                pairs.append(f"{name} and {other_name}")
    return tuple(pairs)


# Compiling


class _Backends:
    """A Dynamo backend that compiles each graph for every variant from one trace."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.variant, self.options = "", options

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        wanted = [*self._variants]
        compiled = {}
        for variant in wanted:
            graph = copied(gm)
            if "/" not in variant:  # stock
                with restored_if_raised():  # otherwise a program that fails here also breaks the later ones
                    compiled[variant] = lookup_backend(variant)(graph, list(example_inputs))
            else:
                policy, inner = variant.split("/")
                options = {"liger.policy": policy, "liger.inner": inner, "liger.strict": True, **self.options}
                compiled[variant] = liger(graph, example_inputs, options=options)
        return lambda *inputs: compiled[self.variant](*inputs)

    _variants: tuple[str, ...] = ()

    def of(self, variants: Sequence[str]) -> _Backends:
        self._variants = tuple(variants)
        return self


def _compiled(
    program: Program,
    function: Callable[..., Any],
    variants: Sequence[str],
    options: Mapping[str, Any],
    device: str,
) -> dict[str, Outcome]:
    """Returns an outcome for each variant. If the compilation of one fails, each variant runs separately."""
    torch.compiler.reset()
    backends = _Backends(options).of(variants)
    compiled = torch.compile(function, backend=backends, dynamic=program.dynamic)
    outcomes = {}
    for variant in variants:
        backends.variant = variant
        outcomes[variant] = run(program, compiled, device)
        if len(variants) > 1 and "Backend" in outcomes[variant].error:
            return {
                label: outcome
                for variant in variants
                for label, outcome in _compiled(program, function, [variant], options, device).items()
            }
    return outcomes


def check(
    program: Program,
    policies: Sequence[str] = POLICIES,
    inner: str = "aot_eager",
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> Verdict:
    """Compares a program under backend="liger" with eager mode.

    Args:
        policies: the policies to run under.
        inner: the compiler of the rewritten graph.
        options: more options of the backend, such as "liger.patterns".
    """
    function = program.function()
    eager = run(program, function, device)
    if eager.error:
        return Verdict("invalid")
    variants = [f"{policy}/{inner}" for policy in policies]
    clear_reports()
    outcomes = _compiled(program, function, variants, options or {}, device)
    replaced = sum(report.count("replace") for report in reports())
    found = [(variant, differences(eager, outcome)) for variant, outcome in outcomes.items()]
    suspicious = [(variant, names) for variant, names in found if names]
    if not suspicious:
        return Verdict("right", replaced=replaced)
    stock = _compiled(program, function, [inner], {}, device)[inner]
    others = [stock, run(program, function, device, with_zeros=True)]
    if all(
        KEPT in other.error for other in others
    ):  # AOTAutograd's backward is no valid program in eager mode
        return Verdict("stock", replaced=replaced)
    attends = "attention(" in program.source or "written_out(" in program.source
    if attends:
        others.append(run(program, program.function(BY_FLAG), device))
    nudged = [run(program, function, device, nudge=seed) for seed in (1, 2, 3, 4)]
    if "written_out(" in program.source:
        nudged.append(run(program, program.function(BY_KERNEL), device))
    scaled = {scale: run(program, function, device, scale=scale) for scale in SCALES}
    scaled[1.0] = run(program, function, device, dtype="float64")
    in_half = [f"call {i}" for i, call in enumerate(program.calls) if call.mode == "autocast"]
    kind, wrong = "stock", []
    for variant, _ in suspicious:
        names = differences(eager, outcomes[variant], others=others)
        if not names:
            continue
        kind = "noise"
        names = differences(
            eager,
            outcomes[variant],
            others=others,
            nudged=nudged,
            scaled=scaled,
            in_half=in_half,
            attends=attends,
        )
        if names:
            wrong.append(Finding(variant, tuple(names)))
    return Verdict("wrong" if wrong else kind, tuple(wrong), replaced)


# Comparing


def differences(
    eager: Outcome,
    ours: Outcome,
    *,
    others: Sequence[Outcome] = (),
    nudged: Sequence[Outcome] = (),
    scaled: Mapping[float, Outcome] = MappingProxyType({}),
    in_half: Collection[str] = (),
    attends: bool = False,
) -> list[str]:
    """Returns the differences from eager, in words.

    Args:
        others: runs whose values `ours` may have instead of eager's; that of stock torch.compile first.
        nudged: eager runs on inputs that differ by a unit of rounding; distances up to NOISE times theirs are no
            difference.
        scaled: eager runs, in other dtypes or by the factor of their incoming gradients. Where one has a finite
            gradient and eager mode has not, a value of eager mode overflowed. `ours` may then have the finite one.
        attends: whether the program contains attention. torch's kernels for a CPU give 0 for a row of scores that are
            all NaN if there is no mask, and ours need none (docs/never_wrong.md).
        in_half: the calls under autocast, whose gradients in float32 are sums of gradients in bfloat16.
    """
    if others and others[0].error and ours.error.split(":")[0] == others[0].error.split(":")[0]:
        return []
    found = []
    if KEPT in ours.error:
        return []
    if ours.error:
        found.append(f"raises {ours.error[:300]}")
    last = ""  # the beginning of the last names to compare
    for name, value in eager.seen.items():
        if not name.startswith(last):
            break
        if name not in ours.seen:
            if ours.error or DOCUMENTED in ours.seen.values():
                break
            found.append(f"{name}: missing")
            continue
        mine = ours.seen[name]
        if isinstance(mine, str) and mine == DOCUMENTED:
            break  # later values do not exist
        call = name.partition(": ")[0]
        if name.endswith("after it") and isinstance(value, Tensor) and not value.isfinite().all():
            last = call  # weights that are not finite: docs/never_wrong.md has the limits of the next calls
        if _same(value, mine):
            continue
        alike = next(
            (other for other in others if name in other.seen and _same(other.seen[name], mine)), None
        )
        if alike is not None:
            if alike.error:  # before the next calls, and its weights may differ from eager's
                last = call
            continue
        if "gradient of" in name and _is_lost(name, value, mine, scaled):
            last = f"{call}: gradient of"  # a step with such a gradient gives weights that are not finite
            continue
        runs = (eager, *(other for other in others if name in other.seen))
        if not any(_is_accepted(name, run, mine, eager, nudged, in_half, attends) for run in runs):
            found.append(f"{name}: eager {_words(value)}, ours {_words(mine)}")
    return found


def _is_accepted(
    name: str,
    run: Outcome,
    mine: Any,
    eager: Outcome,
    nudged: Sequence[Outcome],
    in_half: Collection[str],
    attends: bool,
) -> bool:
    """Whether a value is as close to that of a run as rounding allows, or differs as documented; see `differences`."""
    value, (call, _, seen) = run.seen[name], name.partition(": ")
    if attends and _are_zeros_for_nan(value, mine):
        return True
    distance = _distance(value, mine)
    if seen.startswith("gradient of"):
        if call in in_half and distance <= NEAR[torch.bfloat16]:
            return True
        if nudged and _is_cancelled(value, mine, _gradients(run, call)):
            return True
    noise = max(
        (_distance(eager.seen[name], run.seen[name]) for run in nudged if name in run.seen), default=0.0
    )
    return distance <= NOISE * noise


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _distance(a, b) <= NEAR.get(a.dtype, 0.0)
    return a == b if not isinstance(a, Tensor) and not isinstance(b, Tensor) else False


def _distance(a: Any, b: Any) -> float:
    """Returns the L2 distance of the finite entries relative to `a`.

    The distance is infinite if shape or dtype differ, or if an entry is infinite or NaN in one and not the same in the
    other.
    """
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or (a.shape, a.dtype) != (b.shape, b.dtype):
        return float("inf")
    a, b = a.double(), b.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(
        a[~finite].nan_to_num(), b[~finite].nan_to_num()
    ):
        return float("inf")
    a, b = a[finite], b[finite]
    # Scaled, so that the squares of very large and very small numbers neither overflow nor underflow.
    scale = float(max(a.abs().max(), b.abs().max())) if a.numel() else 0.0
    if scale == 0.0:
        return 0.0
    return float((a / scale - b / scale).norm() / (a / scale).norm().clamp(min=1e-300))


def _gradients(outcome: Outcome, call: str) -> list[Tensor]:
    values = [value for name, value in outcome.seen.items() if name.startswith(f"{call}: gradient of")]
    return [value for value in values if isinstance(value, Tensor)]


def _is_cancelled(a: Any, b: Any, gradients: Sequence[Tensor]) -> bool:
    """Whether a gradient whose terms cancel exactly in eager mode is small next to the other gradients of the call.

    The gradient of a softmax over one element is 0 in eager mode, and a rounding error in a fused kernel.
    """
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.any():
        return False
    largest = max((float(gradient.abs().max()) for gradient in gradients if gradient.numel()), default=0.0)
    return float(b.abs().max()) <= NEAR.get(b.dtype, 0.0) * largest


def _are_zeros_for_nan(a: Any, b: Any) -> bool:
    """Whether `b` has zeros in place of some NaN of `a`, and is equal elsewhere."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    return _same(a.masked_fill(a.isnan(), 0.0), b.masked_fill(a.isnan() & b.isnan(), 0.0))


def _is_lost(name: str, a: Any, b: Any, scaled: Mapping[float, Outcome]) -> bool:
    """Whether a gradient is not finite in eager mode, and `b` may be it as well."""
    runs = ((scale, run.seen.get(name)) for scale, run in scaled.items())
    return _lost_alike(a, b) or any(_overflowed(a, b, gradient, scale) for scale, gradient in runs)


def _lost_alike(a: Any, b: Any) -> bool:
    """Whether the same entries are infinite or NaN, and the finite ones are equal.

    A gradient that eager mode makes infinite may be NaN: the order of a sum decides between inf and inf - inf.
    """
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape:
        return False
    either = a.isnan() | b.isnan()
    if not torch.equal(a.isfinite(), b.isfinite()) or not either.any():
        return False
    return _same(a.masked_fill(either, 0.0), b.masked_fill(either, 0.0))


def _overflowed(a: Any, b: Any, scaled: Any, scale: float) -> bool:
    """Whether `b` has the finite entries of `a`, and elsewhere those of `scaled` without its factor."""
    if not all(isinstance(tensor, Tensor) and tensor.shape == a.shape for tensor in (a, b, scaled)):
        return False
    finite, unscaled = a.isfinite(), (scaled.double() / scale).to(a.dtype)
    return not finite.all() and _same(torch.where(finite, a, unscaled), b)


def _words(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    numbers = ", ".join(f"{number:.5g}" for number in value.double().flatten()[:4].tolist())
    rest = ", ..." if value.numel() > 4 else ""
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} [{numbers}{rest}]"
