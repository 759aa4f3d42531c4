"""AOTAutograd: its autograd.Function, and its cache.

part                                            torch           can go
Function._aot_id                                2.11 to 2.13    no public name; AOTAutograd's functions have it
Function._compiled_autograd_key                 2.11 to 2.13    no public name
torch._functorch._aot_autograd.autograd_cache   2.11 to 2.13    no public name
torch._dynamo.utils.counters                    2.11 to 2.13    no public name
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from liger_compile.torch_internals.autograd import function_of


def is_backward(node: Any) -> bool:
    """Returns whether a node of autograd's graph is the backward of a graph that AOTAutograd compiled."""
    return hasattr(function_of(node), "_aot_id")


def before_compiled_autograd(function: Any, call: Callable[[Any], None]) -> None:
    """Makes compiled autograd call `call(ctx)` before it captures the backward of an autograd.Function."""
    theirs = function._compiled_autograd_key

    @functools.wraps(theirs)
    def key(ctx: Any) -> Any:
        call(ctx)
        return theirs(ctx)

    function._compiled_autograd_key = staticmethod(key)


def why_not_cached(gm: GraphModule) -> str | None:
    """Returns AOTAutograd's reason for not caching the artifact of `gm`, in its own words; None if there is none."""
    from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache, check_cacheable

    try:
        check_cacheable(gm)
    except BypassAOTAutogradCache as refusal:
        return str(refusal)
    return None


def cache_counts() -> dict[str, int]:
    """Returns the number of lookups in AOTAutograd's cache in this process, by outcome: "hit", "miss", "bypass"."""
    from torch._dynamo.utils import counters

    counts = counters["aot_autograd"]
    return {outcome: counts[f"autograd_cache_{outcome}"] for outcome in ("hit", "miss", "bypass")}
