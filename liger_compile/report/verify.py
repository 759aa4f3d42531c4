"""verify(): runs one training step of a model in eager mode and compiled, and compares all results.

In: a model and the arguments of one call. Out: a Verification, which prints as a table. If a result differs by more
than rounding, the Verification names the first rewrite that causes the difference.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from liger_compile.report import SCHEMA, GraphReport, Site, reports
from liger_compile.testing import precision
from liger_compile.torch_internals import typed
from liger_compile.torch_internals.dynamo import is_compiled
from liger_compile.torch_internals.pytree import keystr, tree_flatten_with_path, tree_leaves

FACTOR = 2.0  # the numerics bar, as a multiple of the error of eager mode
NUDGES = 3  # eager runs on nudged parameters, where the model does not run in float64
NOISE = 4.0  # the bar in that case, as a multiple of the change that nudging causes
SHOWN = 12  # rows of the table; to_dict() has all of them


@dataclass(frozen=True)
class Row:
    """One tensor of the step. Errors are L2 norms of the difference from the reference, relative to its norm.

    Args:
        name: "output['loss']", "gradient of model.norm.weight", "model.mean after the step".
        shape, dtype: of the compiled result; empty if there is none.
        eager_error: the error of eager mode in the model's dtype.
        error: the error of the compiled step.
        allowed: the bound of the error.
        problem: a sentence if the two cannot be compared, or differ in shape, dtype or requires_grad.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    eager_error: float = 0.0
    error: float = 0.0
    allowed: float = 0.0
    problem: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the error is within its bound and there is no other problem."""
        return not self.problem and self.error <= self.allowed

    @property
    def share(self) -> float:
        """The error as a share of its bound."""
        if self.problem:
            return float("inf")
        return self.error / self.allowed if self.allowed else (0.0 if self.error == 0 else float("inf"))


@dataclass(frozen=True)
class Verification:
    """The result of `verify`. True if all rows are right; `str()` is for people, `to_dict()` for programs."""

    rows: tuple[Row, ...]
    reference: str  # the reference of the errors, in words
    reports: tuple[GraphReport, ...]  # of the compiled step
    fuel: int | None = None  # the fewest rewrites with which the step differs
    culprits: tuple[Site, ...] = ()  # the last of these rewrites, one for each graph
    note: str = ""  # further facts about a difference

    @property
    def is_right(self) -> bool:
        """Whether every row is right."""
        return all(row.is_right for row in self.rows)

    def __bool__(self) -> bool:
        return self.is_right

    def to_dict(self) -> dict[str, Any]:
        """Returns values that json.dumps accepts; docs/report_schema.md lists the fields."""
        content = {
            "schema": SCHEMA,
            "is_right": self.is_right,
            "reference": self.reference,
            "rows": [asdict(row) | {"is_right": row.is_right} for row in self.rows],
            "fuel": self.fuel,
            "culprits": [asdict(site) for site in self.culprits],
            "note": self.note,
            "reports": [report.to_dict() for report in self.reports],
        }
        return json.loads(json.dumps(content))

    def __str__(self) -> str:
        wrong = sum(not row.is_right for row in self.rows)
        replaced = sum(report.count("replace") for report in self.reports)
        verdict = "right" if self.is_right else f"WRONG: {wrong} of {len(self.rows)} differ"
        lines = [
            f"liger_compile verify: {verdict}; {len(self.rows)} tensors compared, {replaced} rewrites",
            *textwrap.wrap(self.reference, 110),
            "",
            *self._table(),
        ]
        if self.culprits:
            lines += ["", f"The first rewrite that causes a difference (liger.fuel={self.fuel}):"]
            lines += [f"  {site.pattern}   {_where(site)}" for site in self.culprits]
            names = ", ".join(repr(name) for name in dict.fromkeys(site.pattern for site in self.culprits))
            lines += [
                f'  options={{"liger.skip": ({names},)}} leaves it out; please report it with this text.'
            ]
        if self.note:
            lines += ["", *textwrap.wrap(self.note, 110)]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        wrong = sum(not row.is_right for row in self.rows)
        rows = sorted(self.rows, key=lambda row: -row.share)[: max(SHOWN, wrong)]
        width = max((len(row.name) for row in rows), default=0)
        lines = [f"{'':<{width}}   {'error':>9}   {'eager':>9}   {'allowed':>9}"]
        for row in rows:
            figures = f"{row.error:>9.2e}   {row.eager_error:>9.2e}   {row.allowed:>9.2e}"
            mark = "" if row.is_right else "   WRONG"
            lines.append(f"{row.name:<{width}}   {row.problem or figures}{mark}")
        if len(rows) < len(self.rows):
            lines.append(f"and {len(self.rows) - len(rows)} more, each closer to its bound")
        return lines


def _where(site: Site) -> str:
    return "  ".join(filter(None, (site.place.module, site.place.source, site.result)))


def verify(
    model: Callable[..., Any],
    /,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Verification:
    """Compares one forward and backward of model(*args, **kwargs) in eager mode and under backend="liger".

    The comparison covers outputs, the gradient of every parameter and floating argument that requires one, and in-place
    writes into parameters, buffers and arguments. The reference is a float64 run of the same step: the error may be
    twice that of eager mode, plus a few units of rounding. If the model does not run in float64, the reference is eager
    mode, and the difference may be four times the change that a unit of rounding in the parameters causes. Backward
    starts at the loss: the output `loss`, else the first output if it is a scalar, else all outputs with a random
    incoming gradient.

    The model, its gradients and the state of the random generators do not change: verify runs copies. Three copies of
    parameters and gradients are alive at a time, one of them in float64.

    Args:
        model: a module, or a function that reads modules and tensors from its arguments only; not compiled.
        options: of torch.compile(backend="liger").

    Returns:
        A Verification: true if all is right. If not, it names the first rewrite that causes a difference.

    Raises:
        TypeError: the model is compiled already.
        Exception: any exception that the model raises in eager mode.
    """
    if is_compiled(model):
        raise TypeError(
            "expected a model that is not compiled, got the result of torch.compile; pass the model itself"
        )
    call = _Call(model, args, kwargs)
    with typed.fork_rng(devices=range(torch.cuda.device_count())):
        reference = _Reference.of(call)
        settings = {"liger.strict": True, **(options or {})}
        rows, made = _compare(call, reference, settings)
        if all(row.is_right for row in rows):
            return Verification(rows, reference.description, made)
        return _bisected(call, reference, settings, Verification(rows, reference.description, made))


@dataclass(frozen=True)
class _Call:
    model: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(
        self, change: Callable[[Any], Any], compile: Callable[[Any], Any] = lambda model: model
    ) -> dict[str, Any]:
        """Returns the results of one step by name. It runs on copies that `change` makes of model and arguments."""
        model, args, kwargs = change((self.model, self.args, dict(self.kwargs)))
        named = _named((model, args, kwargs))
        typed.manual_seed(0)
        outputs = compile(model)(*args, **kwargs)
        flat = [(f"output{keystr(path)}", leaf) for path, leaf in tree_flatten_with_path(outputs)[0]]
        seen: dict[str, Any] = {name: leaf for name, leaf in flat if isinstance(leaf, Tensor)}
        leaves = {name: tensor for name, tensor in named.items() if tensor.requires_grad and tensor.is_leaf}
        gradients = precision.gradients(_loss_in(outputs), list(leaves.values()))
        for name, gradient in zip(leaves, gradients, strict=True):
            seen[f"gradient of {name}"] = gradient
        seen.update({f"{name} after the step": tensor.detach() for name, tensor in named.items()})
        return seen


def _named(tree: Any) -> dict[str, Tensor]:
    """Returns the tensors of a step before it runs, each once, by name."""
    model, args, kwargs = tree
    named: dict[str, Tensor] = {}
    for prefix, part in (("", model), ("argument", args), ("argument", kwargs)):
        for path, leaf in tree_flatten_with_path(part)[0]:
            if isinstance(leaf, nn.Module):
                named.update(
                    {f"{prefix}{keystr(path)}.{n}".lstrip("."): t for n, t in leaf.named_parameters()}
                )
                named.update({f"{prefix}{keystr(path)}.{n}".lstrip("."): t for n, t in leaf.named_buffers()})
            elif isinstance(leaf, Tensor):
                named[f"{prefix}{keystr(path)}"] = leaf
    return named


def _loss_in(outputs: Any) -> Any:
    """Returns the value at which backward starts."""
    is_mapping = isinstance(outputs, Mapping)
    loss: object = (
        cast(Mapping[str, Any], outputs).get("loss") if is_mapping else getattr(outputs, "loss", None)
    )
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss
    first = next((leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)), None)
    return first if first is not None and first.requires_grad and first.dim() == 0 else outputs


@dataclass(frozen=True)
class _Reference:
    """The results of eager mode, and the reference of the errors."""

    eager: Mapping[str, Any]
    exact: Mapping[str, Any] | None  # in float64; None where the model does not run in float64
    nudged: Sequence[Mapping[str, Any]]
    description: str

    @staticmethod
    def of(call: _Call) -> _Reference:
        eager = call.run(precision.copied)
        try:
            with precision.in_double():
                exact = call.run(precision.as_double)
            return _Reference(eager, exact, (), "Errors are differences from a float64 run, relative (L2).")
        except Exception as error:
            nudged = [call.run(partial(_nudged, seed=seed)) for seed in range(NUDGES)]
            why = str(error).strip().splitlines()[:1]
            return _Reference(
                eager,
                None,
                nudged,
                "Errors are differences from eager mode, relative (L2), since the model does not run in float64 "
                f"({type(error).__name__}: {''.join(why)}).",
            )

    def row(self, name: str, actual: Any) -> Row:
        """Compares `actual`, a result of the compiled step, with the reference."""
        eager = self.eager[name]
        if eager is None or actual is None:
            problem = (
                ""
                if eager is actual
                else f"eager gives {_described(eager)}, the compiled step {_described(actual)}"
            )
            return Row(name, problem=problem)
        described = Row(name, tuple(actual.shape), str(actual.dtype).removeprefix("torch."))
        if _described(eager) != _described(actual):
            return replace(
                described, problem=f"eager gives {_described(eager)}, the compiled step {_described(actual)}"
            )
        if not (eager.is_floating_point() or eager.is_complex()):
            return replace(described, problem="" if torch.equal(eager, actual) else "differs from eager's")
        exact = self.exact[name] if self.exact is not None else eager
        if exact is None:
            return replace(described, problem="there is no such gradient in float64")
        norm = typed.norm(torch.where(exact.isfinite(), exact, 0).double()) or 1.0
        eager_error, allowed = precision.error_of(eager, eager, exact), precision.bound(eager, exact, FACTOR)
        if self.exact is None:
            others = [precision.error_of(run[name], eager, eager) for run in self.nudged]
            eager_error = max(others)
            allowed = NOISE * eager_error + precision.bound(eager, eager)
        return replace(
            described,
            eager_error=eager_error / norm,
            error=precision.error_of(actual, eager, exact) / norm,
            allowed=allowed / norm,
        )


def _described(value: Tensor | None) -> str:
    if value is None:
        return "none"
    gradient = ", requires_grad" if value.requires_grad else ""
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{gradient}"


def _nudged(tree: Any, seed: int) -> Any:
    """Returns a copy in which each floating number is a unit of rounding larger, or smaller, or unchanged."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(tensor: Tensor) -> None:
        if tensor.is_floating_point():
            way = torch.randint(-1, 2, tensor.shape, generator=generator).to(tensor.device)
            with torch.no_grad():
                tensor.mul_((1 + way * torch.finfo(tensor.dtype).eps).to(tensor.dtype))

    copied = precision.copied(tree)
    for tensor in {id(tensor): tensor for tensor in _named(copied).values()}.values():
        nudge(tensor)
    return copied


def _compare(
    call: _Call, reference: _Reference, options: Mapping[str, Any], backend: str = "liger"
) -> tuple[tuple[Row, ...], tuple[GraphReport, ...]]:
    torch.compiler.reset()
    earlier = reports()
    actual = call.run(
        precision.copied, lambda model: typed.compile(model, backend=backend, options=dict(options) or None)
    )
    rows = tuple(reference.row(name, actual.get(name)) for name in reference.eager)
    return rows, tuple(report for report in reports() if report not in earlier)


def _bisected(
    call: _Call, reference: _Reference, options: Mapping[str, Any], found: Verification
) -> Verification:
    """Returns `found` with the first rewrite that makes the step differ."""

    def with_fuel(amount: int) -> tuple[bool, tuple[GraphReport, ...]]:
        rows, made = _compare(call, reference, {**options, "liger.fuel": amount})
        return all(row.is_right for row in rows), made

    low, high = 0, max((_rewrites(report) for report in found.reports), default=0)
    is_right, before = with_fuel(0)
    if not is_right:
        return _without_culprit(call, reference, found)
    after = found.reports
    while high - low > 1:
        middle = (low + high) // 2
        is_right, made = with_fuel(middle)
        low, high = (middle, high) if is_right else (low, middle)
        before, after = (made, after) if is_right else (before, made)
    return Verification(found.rows, found.reference, found.reports, high, _more(after, before))


def _rewrites(report: GraphReport) -> int:
    return len(_rewritten(report))


def _rewritten(report: GraphReport) -> list[Site]:
    """Returns the rewrites that fuel counts, in its order."""
    return [*(site for site in report.sites if site.kind != "leave"), *report.backward.sites]


def _more(after: Sequence[GraphReport], before: Sequence[GraphReport]) -> tuple[Site, ...]:
    """Returns the sites that are rewritten in `after` and not in `before`."""
    earlier = Counter((site.pattern, site.place) for report in before for site in _rewritten(report))
    found: list[Site] = []
    for site in (site for report in after for site in _rewritten(report)):
        earlier[site.pattern, site.place] -= 1
        found += [site] if earlier[site.pattern, site.place] < 0 else []
    return tuple(found)


def _without_culprit(call: _Call, reference: _Reference, found: Verification) -> Verification:
    rows, _ = _compare(call, reference, {}, "inductor")
    note = (
        "The step also differs without any rewrite, and under stock torch.compile: the difference is Inductor's."
        if not all(row.is_right for row in rows)
        else "The step also differs without any rewrite, but not under stock torch.compile: please report it."
    )
    if choices := sorted({name for report in found.reports for name in report.backward.choices}):
        names = ", ".join(map(repr, choices))
        note += f' Fuel does not count the choices for backward ({names}); "liger.skip" leaves them out.'
    return Verification(found.rows, found.reference, found.reports, 0, (), note)
