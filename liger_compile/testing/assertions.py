"""Assertions for tests of a pattern: places are replaced, a place is refused, and results are as accurate as eager's.

All three compile with torch.compile(backend="liger") after a reset of Dynamo, and raise errors of the rewriter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from liger_compile.pattern import Pattern
from liger_compile.registry import patterns_in_use
from liger_compile.report import GraphReport, Site, reports
from liger_compile.testing import precision
from liger_compile.torch_internals import typed
from liger_compile.torch_internals.pytree import tree_leaves, tree_map


def assert_rewrites(
    function: Callable[..., Any],
    *args: Any,
    expect: Mapping[str, int],
    patterns: Iterable[Pattern] = (),
    policy: str = "always",
    dynamic: bool | None = None,
    **kwargs: Any,
) -> tuple[GraphReport, ...]:
    """Asserts how many places of function(*args, **kwargs) are replaced, and returns the reports.

    Args:
        expect: a count for each pattern, `{"rms_norm.llama": 2}`, or op, `{"rms_norm": 2}`. Nothing else is replaced.
        patterns: patterns to use besides the registered ones.
        policy: "always" skips profit, so that a test does not depend on the device; "auto" calls profit.
    """
    compiled = _compiled(function, patterns, policy, dynamic)
    made, _ = _with_reports(lambda: compiled(*args, **kwargs))
    left, found = Counter(site.pattern for site in _sites(made, "replace")), {}
    for name in sorted(expect, key=lambda name: "." not in name):  # names of patterns before names of ops
        names = [counted for counted in left if counted == name or counted.split(".")[0] == name]
        found[name] = sum(left.pop(counted) for counted in names)
    assert found == dict(expect) and not left, (
        f"expected {dict(expect)} to be replaced, got {found | left}\n" + "\n".join(map(str, made))
    )
    return made


def assert_refuses(
    function: Callable[..., Any],
    *args: Any,
    pattern: str,
    reason: str = "",
    patterns: Iterable[Pattern] = (),
    policy: str = "always",
    dynamic: bool | None = None,
    **kwargs: Any,
) -> tuple[GraphReport, ...]:
    """Asserts that function(*args, **kwargs) has no place where `pattern` is replaced, and returns the reports.

    Args:
        pattern: the name of a pattern, `"rms_norm.llama"`, or of an op, `"rms_norm"`.
        reason: a regular expression that must match the reason in a report of such a place: a match that is left, or
            a near miss. Empty: no such place is required.
        patterns, policy: as in `assert_rewrites`; all patterns but `pattern` are skipped, so that none replaces it.
    """

    def is_meant(name: str) -> bool:
        return pattern in (name, name.split(".")[0])

    patterns = tuple(patterns)
    others = tuple(pattern.name for pattern in patterns_in_use(patterns) if not is_meant(pattern.name))
    compiled = _compiled(function, patterns, policy, dynamic, skip=others)
    made, _ = _with_reports(lambda: compiled(*args, **kwargs))
    text = "\n".join(map(str, made))

    replaced = [site.pattern for site in _sites(made, "replace") if is_meant(site.pattern)]
    assert not replaced, f"expected no {pattern} to be replaced, got {replaced}\n{text}"
    refused = [*_sites(made, "leave"), *(near for report in made for near in report.near_misses)]
    reasons = [site.reason for site in refused if is_meant(site.pattern)]
    assert not reason or any(re.search(reason, text) for text in reasons), (
        f"expected {pattern} to be refused because of {reason!r}, got {reasons or 'no such place'}\n{text}"
    )
    return made


def assert_close_to_eager(
    function: Callable[..., Any],
    *args: Any,
    patterns: Iterable[Pattern] = (),
    inner: str = "aot_eager",
    policy: str = "always",
    dynamic: bool | None = None,
    factor: float = 2.0,
    **kwargs: Any,
) -> tuple[GraphReport, ...]:
    """Asserts that results and gradients have an error of at most `factor` times eager's, and returns the reports.

    The error is relative to a run in float64; see `precision.assert_no_worse`. Gradients are those of every argument
    that requires one and of every parameter of `function` or of an argument, for random gradients of the results.

    Args:
        function: a module, or a function that reads tensors and modules from its arguments only.
        inner: the compiler of the rewritten graph: "aot_eager", "inductor" or "eager".
    """
    exact = precision.as_double((function, args, kwargs))
    with precision.in_double():
        true = _outcome(*exact)
    eager = _outcome(*precision.copied((function, args, kwargs)))
    ours, arguments, named = precision.copied((function, args, kwargs))
    leaves = _leaves((ours, arguments, named))
    compiled = _compiled(ours, patterns, policy, dynamic, inner)
    made, outcome = _with_reports(lambda: _outcome(compiled, arguments, named, leaves))
    try:
        precision.assert_no_worse(outcome, eager, true, factor=factor)
    except AssertionError as error:
        raise AssertionError("\n".join([str(error), *map(str, made)])) from None
    return made


def _compiled(
    function: Callable[..., Any],
    patterns: Iterable[Pattern],
    policy: str,
    dynamic: bool | None,
    inner: str = "eager",
    skip: tuple[str, ...] = (),
) -> Callable[..., Any]:
    options: dict[str, Any] = {"inner": inner, "strict": True, "policy": policy, "patterns": tuple(patterns)}
    options["skip"] = skip
    options = {f"liger.{name}": value for name, value in options.items()}
    torch.compiler.reset()
    return typed.compile(function, backend="liger", dynamic=dynamic, options=options)


def _with_reports(run: Callable[[], Any]) -> tuple[tuple[GraphReport, ...], Any]:
    earlier = reports()
    result = run()
    return tuple(report for report in reports() if report not in earlier), result


def _sites(made: Iterable[GraphReport], kind: str) -> list[Site]:
    return [site for report in made for site in report.sites if site.kind == kind]


def _outcome(function: Any, args: Any, kwargs: Any, leaves: list[Tensor] | None = None) -> Any:
    """Returns the results, detached, and the gradients."""
    leaves = _leaves((function, args, kwargs)) if leaves is None else leaves
    typed.manual_seed(0)
    results = function(*args, **kwargs)
    gradients = precision.gradients(results, leaves)
    return {"result": tree_map(_detached, results), "gradients": gradients}


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _leaves(tree: Any) -> list[Tensor]:
    """Returns the tensors and parameters in a tree that require a gradient, each once."""
    found: dict[int, Tensor] = {}
    for leaf in tree_leaves(tree):
        for tensor in leaf.parameters() if isinstance(leaf, nn.Module) else [leaf]:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                found[id(tensor)] = tensor
    return list(found.values())
