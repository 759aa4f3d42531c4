"""Inductor: its options, its passes, and its way in. It is imported when a graph is compiled, not before.

torch.compile has no registry for the backend "inductor": it makes an object of one class, by the name of the class in
torch. So another backend takes the place of that name.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.fx import Graph, GraphModule

from liger_compile.torch_internals.dynamo import lookup_backend

Patches = dict[str, Any]  # values of Inductor's config, by name

Stock = torch._TorchCompileInductorWrapper  # kept, because `replace` changes the name


def patches_of(mode: str | None, options: Mapping[str, Any] | None) -> Patches:
    """Returns the values of Inductor's config that mode and options of torch.compile choose.

    Raises:
        RuntimeError: for a wrong mode or option, as torch.compile(backend="inductor") raises it.
    """
    # torch's wrapper turns mode and options into patches, validates them, and sets the environment that CUDA graphs
    # need. It never reads `dynamic`.
    return dict(Stock(mode, dict(options or {}), None).config)


class Settings(NamedTuple):
    """The arguments of another backend that compiles in the place of Inductor.

    Args:
        mode: a mode of torch.compile.
        options: Inductor's options.
        keywords: what the backend receives besides Inductor's options; its "options" are added to them.
    """

    mode: str | None
    options: Mapping[str, Any]
    keywords: Mapping[str, Any]


def replace(name: str, settings: Callable[[str | None, Mapping[str, Any]], Settings]) -> None:
    """Makes torch.compile use the backend of this name where the backend "inductor" is asked for, until `restore`.

    It concerns later calls of torch.compile only, in all threads.

    Args:
        settings: from the mode and the options of a call of torch.compile, which raises its errors.
    """
    torch._TorchCompileInductorWrapper = _replacement(name, settings)


def restore() -> None:
    """Makes torch.compile use Inductor again."""
    torch._TorchCompileInductorWrapper = Stock


class _OfStock(type):
    """The classes that replace torch's. Under its name, torch asks them whether an object calls Inductor."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Stock)


def _replacement(backend: str, settings: Callable[[str | None, Mapping[str, Any]], Settings]) -> type[Stock]:
    class Replacement(metaclass=_OfStock):
        def __new__(cls, mode: str | None, options: Any, dynamic: bool | None, *name: Any) -> Any:
            return InPlaceOfInductor(backend, settings(mode, options or {}), dynamic, *name)

    return cast("type[Stock]", Replacement)


class InPlaceOfInductor(Stock):
    """What Dynamo calls with a graph where another backend has taken the place of Inductor.

    torch's class makes patches of mode and options, and reads them in `reset`. Compiled models are pickled with it.
    """

    def __init__(self, backend: str, given: Settings, dynamic: bool | None, *name: Any) -> None:
        super().__init__(given.mode, dict(given.options), dynamic, *name)
        self.compiler_fn = lookup_backend(backend)  # `unwrapped` finds the backend by this name
        self.kwargs = {**given.keywords, "options": {**self.config, **given.keywords.get("options", {})}}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, InPlaceOfInductor) or not super().__eq__(other):
            return False
        return self.compiler_fn is other.compiler_fn and self.kwargs == other.kwargs

    __hash__ = None  # as torch's  # pyright: ignore[reportAssignmentType]

    def __call__(self, model_: Any, inputs_: Any, *, config_patches: Patches | None = None) -> Any:
        options = {**self.kwargs["options"], **(config_patches or {})}
        return self.compiler_fn(model_, inputs_, **{**self.kwargs, "options": options})


def uses_cudagraphs(patches: Patches) -> bool:
    """Returns whether compiled graphs run as CUDA graphs."""
    from torch._inductor import config

    return patches.get("triton.cudagraphs", config.triton.cudagraphs)


def uses_freezing(patches: Patches) -> bool:
    """Returns whether parameters become constants where no gradients are computed."""
    from torch._inductor import config

    return patches.get("freezing", config.freezing)


def with_cache_key(patches: Patches, names: Iterable[str], digest: str) -> Patches:
    """Returns patches that put a digest into the keys of AOTAutograd's and Inductor's caches, beside those of users.

    Changing a value of this entry is the documented way to change the keys. Graphs that call functions of these names
    (module.function) are cached.
    """
    from torch._inductor import config

    entry = "unsafe_marked_cacheable_functions"
    return {**patches, entry: {**patches.get(entry, getattr(config, entry)), **dict.fromkeys(names, digest)}}


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
