"""The modes that each node of a graph runs in: gradients, autocast, inference mode, torch.func transforms, and others.

Dynamo's graphs switch modes by calls that take no tensors, such as torch._C._set_grad_enabled(False). `Regions` reads
all of them. Nodes with equal regions run in the same modes, regardless of the switches in between. A call that may
switch an unknown mode begins a region that is equal to no other.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from liger_compile.graphs.effects import effect_of
from liger_compile.torch_internals.operators import qualified_name
from liger_compile.torch_internals.pytree import tree_iter

Settings = tuple[tuple[str, Any], ...]  # sorted by name


@dataclass(frozen=True)
class Region:
    """The modes that a node runs in.

    Args:
        grad_mode: as torch.is_grad_enabled().
        inference_mode: as torch.is_inference_mode_enabled().
        autocast: (device type, dtype) of each device with autocast enabled.
        transforms: (name, position of the start) of the torch.func transforms around the node, outermost first.
        settings: (name, value) of the other settings that calls in the graph change.
        kernels: (name, value) of settings that only choose between kernels and change no meaning.
        stream: the stream that the function chose for the node; None for the current one.
        unknown: name and position of the last call that may have switched an unknown mode.
    """

    grad_mode: bool
    inference_mode: bool
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    transforms: tuple[tuple[str, int], ...] = ()
    settings: Settings = ()
    kernels: Settings = ()
    stream: Any = None
    unknown: tuple[str, int] | None = None

    @property
    def has_gradients(self) -> bool:
        """Whether autograd records operations for backward."""
        return self.grad_mode and not self.inference_mode

    @property
    def meaning(self) -> Region:
        """The region without the settings that only choose between kernels."""
        return replace(self, kernels=())

    def autocast_on(self, device: str) -> tuple[str, torch.dtype] | None:
        """Returns (device type, dtype) of autocast on a device type; None if it is disabled."""
        return next((setting for setting in self.autocast if setting[0] == device), None)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Enters the grad mode and autocast of this region, for code that runs while a graph is rewritten."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.has_gradients))
            for device in _devices_with_autocast():
                _, dtype = self.autocast_on(device) or (device, None)
                if dtype is not None or torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=dtype is not None))
            yield


def around() -> Region:
    """Returns the modes around the compiled code: Dynamo restores them before it calls a backend."""
    on = [device for device in _devices_with_autocast() if torch.is_autocast_enabled(device)]
    autocast = tuple((device, torch.get_autocast_dtype(device)) for device in on)
    return Region(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)


def without_modes() -> contextlib.AbstractContextManager[None]:
    """Returns a context without gradients and autocast, for functions that run only for their output shapes."""
    return Region(grad_mode=False, inference_mode=False).entered()


@functools.cache
def _devices_with_autocast() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    devices = {"cpu", "cuda", *([accelerator.type] if accelerator else [])}
    return tuple(sorted(filter(torch.amp.is_autocast_available, devices)))


class Regions:
    """The region of every node of a graph."""

    def __init__(self, graph: Graph, calls: Sequence[Region] = ()) -> None:
        """Reads the switches. `calls`: for a subgraph, the regions of its calls."""
        self.of: dict[Node, Region] = {}
        self._switches: list[tuple[int, Node, Region]] = []  # position, call, and the region after the call
        self.why_uncertain: str | None = None  # a sentence, if the modes of the graph are not known
        entered: dict[Node, Region] = {}
        region = calls[0] if calls else around()
        if len({_modes(region) for region in calls}) > 1:
            self.why_uncertain = "the calls of its subgraph run in several modes"
        for position, node in enumerate(graph.nodes):
            self.of[node] = replace(region, stream=_stream_of(node))
            if is_switch(node):
                entered[node] = region
                region = _after(node, region, position, entered)
                self._switches.append((position, node, region))
        switches = {switch for _, switch, _ in self._switches}
        modes = {region.has_gradients for node, region in self.of.items() if node not in switches}
        self.differ_in_gradients = len(modes) > 1

    def change_between(self, first: int, last: int) -> tuple[int, Node] | None:
        """Returns position and node of the first call between two positions that changes the region, or None."""
        before = next((after for at, _, after in reversed(self._switches) if at <= first), None)
        for at, switch, after in self._switches:
            if first < at < last and after.meaning != (before or self.of[switch]).meaning:
                return at, switch
        return None


def _modes(region: Region) -> Any:
    """Returns the modes that must be equal for all calls of a subgraph."""
    transforms = tuple(name for name, _ in region.transforms)
    return region.grad_mode, region.inference_mode, region.autocast, transforms


def _stream_of(node: Node) -> Any:
    custom = node.meta.get("custom")
    return custom.get("stream") if isinstance(custom, Mapping) else None


# Switches: calls that change the modes of the nodes that follow.

_HARMLESS = frozenset(
    (
        *(
            "lazy_load_decompositions",
            "_maybe_load_decompositions",
            "_backend_from_string",
            "_log_api_usage_once",
        ),
        *("_record_function_enter", "_record_function_enter_new", "_record_function_exit"),
        "_record_function_exit._RecordFunction",
    )
)
_KERNEL_CHOICES = ("sdpa", "sdp_", "deterministic", "flush_denormal")
_DEFAULTS = {"set_inplace_requires_grad_allowed": False, "_set_fwd_grad_enabled": True}


def is_switch(node: Node) -> bool:
    """Returns whether a node is a call without tensor inputs and outputs that may have side effects."""
    if node.op not in ("call_function", "call_method") or _name(node) in _HARMLESS:
        return False
    if any(_holds_tensor(other.meta.get("example_value")) for other in (node, *node.all_input_nodes)):
        return False
    namespace = getattr(node.target, "namespace", None) or qualified_name(node.target)
    if namespace and not namespace.startswith("aten"):
        return True  # a custom operator: its schema declares effects on tensors only
    return not effect_of(node).is_nothing


def is_harmless(node: Node) -> bool:
    """Returns whether a node is a call without a result that has no effect on results: of a profiler, or of a log."""
    return node.op in ("call_function", "call_method") and _name(node) in _HARMLESS


def _holds_tensor(value: Any) -> bool:
    """Returns whether a value has a tensor; stops at the first, since a split has as many parts as users."""
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_iter(value))


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _after(switch: Node, region: Region, position: int, entered: Mapping[Node, Region]) -> Region:
    """Returns the region after a switch. `entered`: the region before each earlier switch."""
    effect = _effect(_name(switch))
    if effect is None:
        return replace(region, unknown=(_name(switch), position))
    return effect(switch, region, position, entered)


def _set_grad_mode(switch: Node, region: Region, *_: Any) -> Region:
    return replace(region, grad_mode=bool(switch.args[0]))


def _enter_inference_mode(switch: Node, region: Region, *_: Any) -> Region:
    is_on = bool(switch.args[0]) if switch.args else True
    return replace(region, inference_mode=is_on, grad_mode=not is_on)


def _exit_inference_mode(switch: Node, region: Region, _: int, entered: Mapping[Node, Region]) -> Region:
    before = _begun(switch, region, entered)
    return replace(region, inference_mode=before.inference_mode, grad_mode=before.grad_mode)


def _enter_autocast(switch: Node, region: Region, *_: Any) -> Region:
    device, dtype, is_on, *_cache = switch.args
    others = [setting for setting in region.autocast if setting[0] != device]
    own = [(device, dtype or torch.get_autocast_dtype(str(device)))] if is_on else []
    return replace(region, autocast=tuple(sorted([*others, *own], key=str)))


def _exit_autocast(switch: Node, region: Region, _: int, entered: Mapping[Node, Region]) -> Region:
    return replace(region, autocast=_begun(switch, region, entered).autocast)


def _begun(switch: Node, region: Region, entered: Mapping[Node, Region]) -> Region:
    """Returns the region before the call that a switch receives as its argument and ends."""
    return next((entered[source] for source in switch.all_input_nodes if source in entered), region)


def _begin_transform(switch: Node, region: Region, position: int, _: Any) -> Region:
    return replace(region, transforms=(*region.transforms, (_name(switch), position)))


def _end_transform(_: Node, region: Region, *__: Any) -> Region:
    return replace(region, transforms=region.transforms[:-1])


def _set(switch: Node, region: Region, *_: Any) -> Region:
    name, value = _name(switch), _resolved((switch.args, switch.kwargs))
    if switch.args and switch.args[0] is _DEFAULTS.get(name, ...):
        value = None
    return _with_setting(region, name, value)


def _push(switch: Node, region: Region, *_: Any) -> Region:
    values = dict(region.settings).get("pushed", ())
    return _with_setting(region, "pushed", (*values, _resolved((_name(switch), switch.args))))


def _pop(_: Node, region: Region, position: int, __: Any) -> Region:
    values = dict(region.settings).get("pushed")
    return _with_setting(region, "pushed", values[:-1] or None if values else (f"popped at {position}",))


def _with_setting(region: Region, name: str, value: Any) -> Region:
    """Returns the region with a setting; None removes the setting."""
    slot = "kernels" if any(choice in name for choice in _KERNEL_CHOICES) else "settings"
    values = {**dict(getattr(region, slot)), name: value}
    return replace(region, **{slot: tuple(sorted((k, v) for k, v in values.items() if v is not None))})


def _resolved(value: Any) -> str:
    """Returns arguments as text, so that two calls can be compared; a node is shown as the call that it makes."""
    return repr(map_arg(value, lambda node: (_name(node), _resolved(node.args))))


_Effect = Callable[[Node, Region, int, Mapping[Node, Region]], Region]
# By a part of the name; the first match applies. Torch's names for one switch differ between devices and versions.
_EFFECTS: Mapping[str, _Effect] = {
    "_set_grad_enabled": _set_grad_mode,
    "_enter_inference_mode": _enter_inference_mode,
    "_exit_inference_mode": _exit_inference_mode,
    "_enter_autocast": _enter_autocast,
    "_exit_autocast": _exit_autocast,
    "_increment_nesting": _begin_transform,
    "_decrement_nesting": _end_transform,
    "_enter_dual_level": _begin_transform,
    "_exit_dual_level": _end_transform,
    "_hooks_disable": _push,
    "_hooks_enable": _pop,
    "maybe_exchange_device": _pop,
    "_maybeExchangeDevice": _pop,
    "exchange_device": _push,
    "_exchangeDevice": _push,
    "push_": _push,
    "pop_": _pop,
    "sdpa_kernel": _set,
    "set_": _set,
}


@functools.cache
def _effect(name: str) -> _Effect | None:
    return next((effect for part, effect in _EFFECTS.items() if part in name), None)


def in_words(switch: Node) -> str:
    """Returns a description of a switch."""
    name = _name(switch)
    if name == "_set_grad_enabled":
        return f"gradients are switched {'on' if switch.args[0] else 'off'}"
    change = "begins" if _effect(name) in _BEGINNINGS else "ends"
    if "inference" in name:
        return f"inference mode {change}"
    if "autocast" in name:
        enter = switch.args[0] if isinstance(switch.args[0], Node) else switch
        _, dtype, is_on, *_ = enter.args
        if not is_on:
            return f"a region without autocast {change}"
        return f"autocast to {str(dtype).removeprefix('torch.')} {change}" if dtype else f"autocast {change}"
    if _effect(name) in (_begin_transform, _end_transform):
        return f"a transform of torch.func {change}"
    if _effect(name) is None:
        return f"{name} is called, which may change the modes of later operations,"
    return f"{name} changes the modes of later operations"


_BEGINNINGS = (_enter_inference_mode, _enter_autocast, _begin_transform)
