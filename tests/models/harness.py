"""What the tests of whole models share: a batch, loss and gradients of a step, how far apart two are, counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

import liger_compile
from tests.models.families import VOCAB, Family

BATCH, LENGTH = 2, 24

# A gradient that is far smaller than those around it is what is left of terms that cancel (a key's bias, which
# softmax does not see): relative to itself its error says nothing. So no tensor counts as smaller than this
# share of the root mean square of all entries of all gradients.
SMALL = 1e-2


class Step(NamedTuple):
    """What one forward and backward gave."""

    loss: Tensor
    gradients: Mapping[str, Tensor]


def skip_if_missing(family: Family) -> None:
    """Skips the test where the installed release of transformers is older than the model."""
    if not family.is_here:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")


def batch(family: Family, length: int = LENGTH, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Token ids, and labels that are other tokens, some of them ignored."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (BATCH, length), generator=random)
    labels = torch.randint(3, VOCAB, (BATCH, length), generator=random)
    labels[0, :3] = labels[1, -2] = family.ignore_index
    return ids, labels


ALWAYS = {"liger.policy": "always"}  # an option of `compiled`: all sites are replaced, whether it pays or not


def compiled(function: Callable[..., Any], inner: str = "aot_eager", **kwargs: Any) -> Callable[..., Any]:
    """`function` under backend="liger" with the default policy, which raises if the rewriting fails."""
    options = {"liger.inner": inner, "liger.strict": True, **kwargs.pop("options", {})}
    return torch.compile(function, backend="liger", options=options, **kwargs)


def step(function: Callable[..., Tensor], model: nn.Module, *inputs: Any) -> Step:
    """Loss and gradients of function(model, *inputs)."""
    model.zero_grad(set_to_none=True)
    loss = function(model, *inputs)
    loss.backward()
    return Step(loss.detach(), gradients(model))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def errors(got: Step, expected: Step) -> dict[str, float]:
    """The distance of the loss and of each gradient (L2), relative to what is expected."""
    assert got.gradients.keys() == expected.gradients.keys()
    entries = torch.cat([g.double().flatten() for g in expected.gradients.values()])
    rms = entries.square().mean().sqrt()
    found = {"loss": _relative(got.loss, expected.loss, 0.0)}
    for name, reference in expected.gradients.items():
        floor = SMALL * rms * reference.numel() ** 0.5
        found[name] = _relative(got.gradients[name], reference, floor)
    return found


def _relative(got: Tensor, expected: Tensor, floor: Any) -> float:
    assert got.shape == expected.shape and got.dtype is not None
    distance = (got.double() - expected.double()).norm()
    return (distance / expected.double().norm().clamp_min(floor)).item()


def assert_within(got: Step, expected: Step, bound: float) -> None:
    far = {name: error for name, error in errors(got, expected).items() if not error <= bound}
    assert not far, f"further from eager than {bound:g}: {far}"


def replaced(
    counts: Mapping[str, int], reports: Sequence[liger_compile.GraphReport] | None = None
) -> dict[str, int]:
    """How many sites were replaced in these reports, or all of this process, under the keys of `counts` if they fit.

    Marks count as well if `counts` has a key for them, also where liger.inner='eager' takes none.
    """
    reports = liger_compile.reports() if reports is None else reports
    found: Counter[str] = Counter()
    for site in (site for report in reports for site in report.sites):
        op = site.pattern.partition(".")[0]
        key = next((key for key in (site.pattern, op) if key in counts), None)
        is_marked = site.kind == "annotate" or "liger.inner='eager' ignores marks" in site.reason
        if site.kind == "replace" or (is_marked and key):
            found[key or site.pattern] += 1
    return dict(found)


def by_default(counts: Mapping[str, int]) -> dict[str, int]:
    """Those of these sites that the default policy replaces on a CPU. It marks norms and MLPs for recompute, takes
    a norm and its rotation for two, and leaves windows and capped scores to a GPU."""
    found: Counter[str] = Counter()
    for name, count in counts.items():
        op = name.partition(".")[0]
        if op in ("rotary", "norm_rotary"):
            found["rotary"] += count
        elif name in ("attention.causal", "attention.unmasked", "linear_cross_entropy"):
            found[name] += count
    return dict(found)


def assert_replaced(counts: Mapping[str, int]) -> None:
    """Exactly these sites are replaced or marked, in all graphs together."""
    text = "\n".join(map(str, liger_compile.reports()))
    assert replaced(counts) == {op: count for op, count in counts.items() if count}, text
