"""The spelling fuzzer: random spellings of a pattern must match, random mutants must be refused or be right.

Both start with the graph that Dynamo captures of a pattern's search function, change its calls one by one, and run the
backend's steps. The Random argument makes all random choices. With a seed, any Random will do; a property-based test
can shrink `Choices`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from liger_compile.graphs.aliasing import storages_of
from liger_compile.pattern import Pattern
from liger_compile.testing import graphs, precision
from liger_compile.testing.graphs import Recorder, Rewriting, Value, again, name_of, replay
from liger_compile.testing.mutations import MUTATIONS, ON_PURPOSE, WRITES, Call, Mutation, NotApplicable
from liger_compile.testing.spellings import neutral_to, spellings_of
from liger_compile.torch_internals import typed
from liger_compile.torch_internals.fx import LazyGraphModule
from liger_compile.torch_internals.modes import SET_GRAD_ENABLED
from liger_compile.torch_internals.pytree import tree_leaves
from liger_compile.torch_internals.tensors import storage_of

DTYPES = (torch.float32, torch.bfloat16)
# Times eager's error: a mutant may be ill-conditioned, and a wrong meaning differs by far more than rounding does.
MUTANT_FACTOR = 16
ROUNDS = 3  # how often an identity may be applied to the result of another
TRIES = 8  # mutations to try until one applies to a call
# The errors of a mutation that does not apply to a call, when the call runs again on fake tensors.
_DOES_NOT_FIT = (
    NotApplicable,
    AssertionError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
Values = Mapping[str, Sequence[Any]]

_samples: dict[Any, Sample] = {}


def assert_respelling_matches(
    pattern: Pattern, random: Random, *, values: Values | None = None, frozen: Collection[str] = ()
) -> Rewriting:
    """Asserts that a random spelling of `pattern` is replaced, and that its results are no worse.

    Args:
        random: makes the choices.
        values: for a capture, the values to choose from instead of its example: numbers, strings, tensors (used
            unchanged), or None. Floating examples become random numbers in float32 or bfloat16, integers indices.
        frozen: the captures that require no gradient.
    """
    written = sample(pattern, random, values or {}, frozen)
    spelled = respelled(written.gm, random)
    exact = outcome(spelled, written.inputs, double=True)
    _assert_same_meaning(exact, written.exact)
    rewriting = graphs.rewrite(copy_of(spelled), _new(pattern))
    expected = _replaced(written, _new(pattern), graphs.patterns_in_use())
    if rewriting.replaced != expected:
        reasons = "\n".join(rewriting.reasons) or "nothing came near"
        raise AssertionError(
            f"this spelling of {pattern.name!r} is replaced by {rewriting.replaced}, not by {expected}:\n"
            f"{spelled.code}\n{reasons}"
        )
    with_gradients = random.randrange(4) == 0
    actual, eager = (
        outcome(function, written.inputs, with_gradients=with_gradients)
        for function in (rewriting.gm, spelled)
    )
    if not with_gradients:
        exact = exact._replace(gradients=[])
    _assert_right(spelled, rewriting, actual, eager, exact)
    return rewriting


def assert_mutant_is_safe(
    pattern: Pattern,
    random: Random,
    *,
    values: Values | None = None,
    frozen: Collection[str] = (),
    mutations: Sequence[Mutation] = (),
) -> bool:
    """Asserts that a random mutant of `pattern` is left or gives no worse numbers. Returns whether a mutant was made.

    `mutations` are the mutations to choose from instead of all of them. The other arguments are those of
    `assert_respelling_matches`.
    """
    written = sample(pattern, random, values or {}, frozen)
    inputs = written.inputs
    mutant = mutated(respelled(written.gm, random), random, mutations or (*MUTATIONS, *AROUND))
    if mutant is None:
        return False
    rewriting = graphs.rewrite(copy_of(mutant), _new(pattern))
    if rewriting.replaced:
        try:
            eager, exact = outcome(mutant, inputs), outcome(mutant, inputs, double=True)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False  # the mutant does not run in eager
        try:
            actual = outcome(rewriting.gm, inputs)
        except RuntimeError as error:
            if (
                "modified by an inplace" in str(error)
                or "leaf Variable" in str(error)
                or "modified inplace" in str(error)
            ):
                return False  # backward reads an overwritten value; AOTAutograd would functionalize the graph before
            raise
        _assert_right(mutant, rewriting, actual, eager, exact, factor=MUTANT_FACTOR)
    return True


def fuzz(
    pattern: Pattern,
    *,
    respellings: int = 200,
    mutants: int = 200,
    seed: int = 0,
    values: Values | None = None,
    frozen: Collection[str] = (),
) -> None:
    """Runs both assertions on random respellings and mutants of `pattern`. For other arguments see the assertions."""
    for number in range(respellings):
        assert_respelling_matches(pattern, Random(f"{seed} {number}"), values=values, frozen=frozen)
    made = tried = 0
    while made < mutants and tried < 20 * mutants:
        tried += 1
        made += assert_mutant_is_safe(pattern, Random(f"{seed} mutant {tried}"), values=values, frozen=frozen)
    assert made == mutants, f"only {made} of {mutants} mutants of {pattern.name!r} could be made"


class Choices(Random):
    """A Random that reads its choices from bytes, two for each, and chooses the first option for 0 or past the end.

    The first option is always the original, so shrinking the bytes shrinks the graph:
    `hypothesis.strategies.binary(min_size=1024, max_size=1024).map(Choices)`.
    """

    def __init__(self, tape: bytes) -> None:
        super().__init__(0)
        self._tape = iter(tape)

    def _randbelow(self, n: int) -> int:
        return (256 * next(self._tape, 0) + next(self._tape, 0)) % n


# Samples: a graph and inputs


@dataclass(frozen=True, eq=False)
class Sample:
    """The graph of a search function, and inputs for it. Properties that every spelling needs are computed once."""

    gm: GraphModule
    inputs: tuple[Any, ...]

    @functools.cached_property
    def exact(self) -> Outcome:
        return outcome(self.gm, self.inputs, double=True)


def sample(pattern: Pattern, random: Random, values: Values, frozen: Collection[str]) -> Sample:
    """Returns the graph of search with a random choice of dtype and values, and inputs for it."""
    dtype = random.choice(DTYPES)
    chosen = {name: random.randrange(len(values.get(name) or (0,))) for name in pattern.parameters}
    absent = {name for name in _optional(pattern) if name not in values and random.randrange(2)}
    key = (pattern, dtype, *chosen.values(), *sorted(absent), *sorted(frozen), id(values) if values else 0)
    if key not in _samples:
        examples = {
            name: values[name][at] if name in values else pattern.examples[name]
            for name, at in chosen.items()
        }
        ints = [example for example in examples.values() if isinstance(example, int)]
        classes = min([e.shape[-1] for e in examples.values() if _is_floating(e)], default=2)
        generator = torch.Generator().manual_seed(0)
        inputs = {
            name: None if name in absent
            else value if name in values
            else _drawn(value, dtype, classes, ints, generator)
            for name, value in examples.items()
        }  # fmt: skip
        for name, value in inputs.items():
            if isinstance(value, Tensor) and _is_floating(value) and name not in frozen:
                value.requires_grad_()
        _samples[key] = Sample(*graphs.capture(pattern.search, **inputs))
    return _samples[key]


def _drawn(
    example: Any, dtype: torch.dtype, classes: int, ints: Sequence[int], generator: torch.Generator
) -> Any:
    """Returns random numbers, or indices, of the shape of `example`. A captured number may stand for an index."""
    if not isinstance(example, Tensor):
        return example
    if example.dtype.is_floating_point:
        kept = dtype if example.dtype == torch.float32 else example.dtype
        return torch.randn(example.shape, generator=generator).to(kept)
    if example.dtype.is_complex:
        return torch.randn(example.shape, generator=generator, dtype=example.dtype)
    if example.dtype is torch.bool:  # flags of keys: at least one key of a row is seen
        flags = torch.randint(2, example.shape, generator=generator).bool()
        flags[..., :1] = True
        return flags
    drawn = torch.randint(classes, example.shape, generator=generator, dtype=example.dtype)
    if ints and drawn.numel():
        drawn.view(-1)[0] = ints[0]
    return drawn


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _optional(pattern: Pattern) -> list[str]:
    return [name for name, parameter in pattern.parameters.items() if "None" in str(parameter.annotation)]


def _new(pattern: Pattern) -> tuple[Pattern, ...]:
    known = graphs.patterns_in_use()
    return () if pattern in known else (pattern,)


@functools.cache
def _replaced(written: Sample, new: tuple[Pattern, ...], known: tuple[Pattern, ...]) -> list[str]:
    """Returns the patterns that are replaced in a sample, with `new` patterns besides the `known` ones."""
    return graphs.rewrite(copy_of(written.gm), new).replaced


# Changes to a graph


def respelled(gm: GraphModule, random: Random) -> GraphModule:
    """Returns `gm` with calls in other spellings, some of them respelled several times."""
    for _ in range(1 + random.randrange(ROUNDS)):
        gm = replay(gm, functools.partial(_spelled, random))
    return gm


def _spelled(
    random: Random, recorder: Recorder, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    name = name_of(node)
    choices = [None, *spellings_of(name, args, kwargs)]
    chosen = random.choice(choices)
    try:
        result = chosen.spelled(*args, **kwargs) if chosen else again(recorder, node, args, kwargs)
    except (
        RuntimeError,
        TypeError,
    ):  # view() of a tensor that must be copied, or a module that rejects a Value
        result = again(recorder, node, args, kwargs)
    if isinstance(result, Value) and isinstance(result.fake, Tensor) and random.randrange(10) == 9:
        result = random.choice([_unchanged, *(spelling.spelled for spelling in neutral_to(result))])(result)
    return result


def _unchanged(value: Value) -> Value:
    return value


def mutated(gm: GraphModule, random: Random, mutations: Sequence[Mutation]) -> GraphModule | None:
    """Returns `gm` with one change; None if none of several mutations applied to the chosen call."""
    chosen = random.choice([node for node in gm.graph.nodes if node.op.startswith("call")])
    mutation: Mutation

    def visit(recorder: Recorder, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node is not chosen:
            return again(recorder, node, args, kwargs)
        return mutation(Call(recorder, node, args, kwargs), random)

    log = logging.getLogger("torch._subclasses.fake_tensor")  # it would log the errors of mutations
    disabled, log.disabled = log.disabled, True
    try:
        for _ in range(TRIES):
            mutation = random.choice(mutations)
            with contextlib.suppress(*_DOES_NOT_FIT):
                return replay(gm, visit)
    finally:
        log.disabled = disabled
    return None


def written(call: Call, random: Random) -> Any:
    """Writes into a tensor of the graph before or after the call."""
    values = [
        Value(node, call.recorder)
        for node in call.recorder.graph.nodes
        if _is_floating(node.meta["example_value"])
    ]
    write = random.choice(WRITES)
    if random.randrange(2):
        result = call()
        if isinstance(result, Value) and random.randrange(2):
            values = [result]
        write(random.choice(values))
        return result
    write(random.choice(values))
    return call()


def without_grad(call: Call, random: Random) -> Any:
    """Runs the call with grad mode off."""
    call.recorder.create_proxy("call_function", SET_GRAD_ENABLED, (False,), {})
    try:
        result = call()
    finally:
        torch.set_grad_enabled(True)
    call.recorder.create_proxy("call_function", SET_GRAD_ENABLED, (True,), {})
    return result


AROUND = (*[written] * 12, *[without_grad] * 4)


# Numbers


class Outcome(NamedTuple):
    """The results of a graph, the gradients of its inputs, and the inputs after in-place writes."""

    results: list[Any]
    gradients: list[Any]
    arguments: list[Any]


def outcome(
    gm: GraphModule, inputs: tuple[Any, ...], *, double: bool = False, with_gradients: bool = True
) -> Outcome:
    inputs = precision.copied(inputs, double=double)
    leaves = [tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.requires_grad]
    arguments = [
        tensor.view_as(tensor) if isinstance(tensor, Tensor) and tensor.requires_grad else tensor
        for tensor in inputs
    ]
    typed.manual_seed(0)
    if double:
        with precision.in_double():
            outputs = _InDouble(gm).run(*arguments)
    else:
        outputs = gm(*arguments)
    gradients = precision.gradients(outputs, leaves) if with_gradients else []
    return Outcome(_detached(outputs), gradients, _detached(arguments))


class _InDouble(Interpreter):
    """Runs a graph in float64, except for nodes that round on purpose: they run in their own dtypes.

    A cast between floating dtypes changes nothing in float64, but its result stays a copy.
    """

    def run_node(self, n: Node) -> Any:
        if n.meta.get(ON_PURPOSE):
            return self._rounded(n)
        result = super().run_node(n)
        inputs = [self.env[node] for node in n.all_input_nodes if isinstance(self.env[node], Tensor)]
        shares = isinstance(result, Tensor) and storage_of(result) in map(storage_of, inputs)
        if shares and not any(storages_of(n) & storages_of(node) for node in n.all_input_nodes):
            return result.clone()
        return result

    def _rounded(self, n: Node) -> Any:
        """Returns the result in its own dtype, and computes its gradient, which must not round, in float64."""

        def narrowed(arg: Node) -> Any:
            value, example = self.env[arg], arg.meta["example_value"]
            return value.to(example.dtype) if isinstance(example, Tensor) else value

        with torch.DisableTorchFunction():
            args, kwargs = map_arg((n.args, n.kwargs), narrowed)
            result = getattr(self, n.op)(n.target, args, kwargs)
        if not _is_floating(result):
            return result
        exact = super().run_node(n)
        return _with_gradient_of(exact, result.detach().double()) if exact.requires_grad else result.double()


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, result: Tensor) -> Tensor:
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


def _with_gradient_of(exact: Tensor, result: Tensor) -> Tensor:
    """Returns `result`, whose gradient goes to `exact`."""
    return cast(Any, _WithGradientOf).apply(exact, result)


def _detached(values: Any) -> list[Any]:
    return [value.detach() if isinstance(value, Tensor) else value for value in values]


def _assert_same_meaning(spelled: Outcome, written: Outcome) -> None:
    """Asserts that the identities hold, up to the error of constants with ten digits."""
    for left, other in zip(tree_leaves(spelled), tree_leaves(written), strict=True):
        if isinstance(left, Tensor):
            torch.testing.assert_close(left, other, rtol=1e-6, atol=1e-6, equal_nan=True)


def _assert_right(
    original: GraphModule,
    rewriting: Rewriting,
    actual: Outcome,
    eager: Outcome,
    exact: Outcome,
    *,
    factor: float = 2.0,
) -> None:
    try:
        precision.assert_no_worse(actual, eager, exact, factor=factor)
    except AssertionError as error:
        raise AssertionError(
            f"replacing {', '.join(rewriting.replaced)} changes the result: {error}\n{original.code}\n"
            f"became\n{rewriting.gm.code}"
        ) from None


def copy_of(gm: GraphModule) -> GraphModule:
    """Returns a graph with new nodes and the same fake tensors."""
    graph = Graph()
    outputs = graph.graph_copy(gm.graph, {})
    graph.output(outputs).meta.update(gm.graph.output_node().meta)
    return LazyGraphModule(torch.nn.Module(), graph)
