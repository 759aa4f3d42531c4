"""Inductor: its options, its passes, and its way in. It is imported when a graph is compiled, not before.

part                                                    torch           can go
torch._TorchCompileInductorWrapper                      2.11 to 2.13    no public name
torch._inductor.config                                  2.11 to 2.13    no public name for its values
torch._inductor.compile_fx                              2.11 to 2.13    no public name that takes decompositions
torch._inductor.decomposition                           2.11 to 2.13    no public name
torch._inductor.custom_graph_pass                       2.11 to 2.13    no public name; in 2.11, Inductor runs one pass
torch._inductor.utils.get_donated_idxs                  2.11 to 2.13    no public name
torch._inductor.cudagraph_trees                         2.11 to 2.13    no public name
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule

Patches = dict[str, Any]  # values of Inductor's config, by name


def patches_of(mode: str | None, options: Mapping[str, Any] | None) -> Patches:
    """Returns the values of Inductor's config that mode and options of torch.compile choose.

    Raises:
        RuntimeError: for a wrong mode or option, as torch.compile(backend="inductor") raises it.
    """
    # torch's wrapper turns mode and options into patches, validates them, and sets the environment that CUDA graphs
    # need. It never reads `dynamic`.
    return dict(torch._TorchCompileInductorWrapper(mode, dict(options or {}), None).config)


def uses_cudagraphs(patches: Patches) -> bool:
    """Returns whether compiled graphs run as CUDA graphs."""
    from torch._inductor import config

    return patches.get("triton.cudagraphs", config.triton.cudagraphs)


def uses_freezing(patches: Patches) -> bool:
    """Returns whether parameters become constants where no gradients are computed."""
    from torch._inductor import config

    return patches.get("freezing", config.freezing)


def with_cache_key(patches: Patches, name: str, digest: str) -> Patches:
    """Returns patches that put a digest into the keys of AOTAutograd's and Inductor's caches, beside those of users.

    Changing a value of this entry is the documented way to change the keys.
    """
    from torch._inductor import config

    entry = "unsafe_marked_cacheable_functions"
    return {**patches, entry: {**patches.get(entry, getattr(config, entry)), name: digest}}


def in_effect(patches: Patches) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which Inductor's config has these values."""
    from torch._inductor import config

    return config.patch(patches)


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Returns the decompositions of Inductor, by operator; they depend on its config."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def compile_fx(
    gm: GraphModule,
    inputs: Sequence[Any],
    patches: Patches,
    decompositions: Mapping[Any, Callable[..., Any]] | None,
) -> Callable[..., Any]:
    """Compiles a graph with these patches; `decompositions` None means Inductor's own."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(
        gm,
        inputs,  # pyright: ignore[reportArgumentType]
        config_patches=patches,
        decompositions=decompositions,  # pyright: ignore[reportArgumentType]
    )
    return compiled


def user_passes() -> Any:
    """Returns the passes that users run over AOTAutograd's graphs at the end; None if there are none."""
    from torch._inductor import config

    return config.post_grad_custom_post_pass


def graph_pass(run: Callable[[Graph], None], key: Callable[[], Any]) -> Any:
    """Returns a pass over AOTAutograd's graphs, of forward and of backward.

    Args:
        run: changes a graph.
        key: returns the key of the pass for the caches; called for each graph.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            run(graph)

        def uuid(self) -> Any:
            return key()

    return Pass()


def in_sequence(first: Any, then: Any) -> Any:
    """Returns passes that run one after the other, where `first` may be None; None if torch runs one pass only."""
    from torch._inductor import custom_graph_pass

    if first is None:
        return then
    listed = getattr(custom_graph_pass, "get_custom_graph_passes", None)
    return (*listed(first), then) if listed else None


def donated_inputs() -> Sequence[int] | None:
    """Returns the positions of the inputs of a backward that it may overwrite; None if donation is switched off."""
    from torch._inductor.utils import get_donated_idxs

    return get_donated_idxs()


def free_cudagraphs() -> None:
    """Frees the recorded CUDA graphs, as torch's backend "inductor" does in torch.compiler.reset()."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()
