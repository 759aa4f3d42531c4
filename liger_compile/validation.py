"""validate(): checks a pattern with its examples; if it cannot be right, raises a sentence that states what to change.

In: a Pattern. Out: nothing, or a TypeError for a field of the wrong type, a ValueError for any other fault. Search and
replace run on fake tensors here, so their errors are reported with their own traceback (`raise ... from`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, NoReturn, cast

import torch
from torch.fx import Graph, GraphModule

from liger_compile.graphs.regions import without_modes
from liger_compile.pattern import Pattern
from liger_compile.steps.callbacks import described, in_one_line
from liger_compile.steps.recording import Recorder, autograd_function, faults_of
from liger_compile.terms.build import trace
from liger_compile.terms.term import ConstVar, Scalar, Term, sizes_of
from liger_compile.torch_internals.fake_tensors import NEEDS_VALUES, FakeTensorMode, errors_not_logged

DTYPES = (torch.float32, torch.bfloat16)  # represent any floating dtype
_RETURNS = "it must return a tensor or a tuple of tensors, computed by torch functions from its parameters"
_NUMBERS = {"float": float, "int": int, "str": str}


@functools.lru_cache(maxsize=1024)
def validate(pattern: Pattern) -> None:
    """Raises TypeError or ValueError, with a sentence that states what to change, for a pattern that is invalid."""
    _check_fields(pattern)
    _check_parameters(pattern)
    for name, example in pattern.examples.items():
        _check_example(pattern, name, example)
    for dtype in DTYPES:
        with _tracing():
            captures = _captures(pattern, dtype)
            expected = _check_run(pattern, "search", captures, dtype)
            _check_terms(pattern, captures)
            if pattern.replace is not None:
                got = _check_run(pattern, "replace", captures, dtype, expected)
                _check_results(pattern, expected, got, dtype)
    if pattern.replace is not None:
        _check_backward(pattern, pattern.replace)


def _refuse(pattern: Pattern, sentence: str) -> NoReturn:
    raise ValueError(f"pattern {pattern.name!r}: {sentence}")


@contextlib.contextmanager
def _tracing() -> Generator[None, None, None]:
    with errors_not_logged(), FakeTensorMode(), without_modes():
        yield


# Fields ----------------------------------------------------------------------------------------------------


def _are_names(keys: Iterable[object]) -> bool:
    return all(isinstance(key, str) for key in keys)


# The requirement of each field: a test, and text that completes "expected ...".
_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda value: isinstance(value, str) and bool(value.strip()), "a name such as 'rms_norm.llama'"),
    "search": (callable, "a function"),
    "replace": (lambda value: value is None or callable(value), "a function or None"),
    "examples": (
        lambda value: isinstance(value, Mapping) and _are_names(cast(Mapping[object, object], value)),
        "a dictionary from the names of the parameters of search to example values",
    ),
    **dict.fromkeys(
        ("check", "profit", "saves"),
        (lambda value: value is None or callable(value), "a function of a match, or None"),
    ),
    **dict.fromkeys(("is_cheap", "is_loss"), (lambda value: isinstance(value, bool), "True or False")),
    "has_near_misses": (lambda value: value is None or isinstance(value, bool), "True, False or None"),
}


def _check_fields(pattern: Pattern) -> None:
    for field, (is_right, expected) in _FIELDS.items():
        value = getattr(pattern, field)
        if not is_right(value):
            raise TypeError(
                f"pattern {pattern.name!r}: {field} is {described(value)}; expected {expected}, so pass that"
            )


def _check_parameters(pattern: Pattern) -> None:
    """Checks that each capture has a name in search, in examples and in replace: captures are passed by name."""
    try:
        parameters = pattern.parameters
    except (TypeError, ValueError):
        _refuse(pattern, "search has no signature to read the captures from; write it as a Python function")
    for _name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            _refuse(
                pattern,
                f"search has the parameter {str(parameter).partition(':')[0]!r}, {_KINDS[parameter.kind]}; "
                "write a parameter with a name for each capture",
            )
    names, examples = set(parameters), set(pattern.examples)
    if not names:
        _refuse(pattern, "search has no parameters; it needs one for each capture")
    if missing := sorted(names - examples):
        _refuse(
            pattern,
            f"search has the parameter {missing[0]!r} and examples does not; add an example value for it",
        )
    if surplus := sorted(examples - names):
        _refuse(pattern, f"examples has {surplus[0]!r} and search has no such parameter; rename or remove it")
    if pattern.replace is not None:
        _check_parameters_of_replace(pattern, pattern.replace)


_KINDS = {
    inspect.Parameter.VAR_POSITIONAL: "which takes any number of values",
    inspect.Parameter.VAR_KEYWORD: "which takes any names",
    inspect.Parameter.POSITIONAL_ONLY: "which cannot be passed by name",
}


def _check_parameters_of_replace(pattern: Pattern, replace: Callable[..., Any]) -> None:
    try:
        parameters = inspect.signature(replace).parameters.values()
    except (TypeError, ValueError):  # a function in C; running it shows its faults
        return
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    positional = {p.name for p in parameters if p.kind is p.POSITIONAL_ONLY}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if (missing := sorted(set(pattern.parameters) - named)) and not takes_all:
        has = "accepts it by position only" if missing[0] in positional else "does not"
        _refuse(
            pattern,
            f"search has the parameter {missing[0]!r} and replace {has}; replace is called with all captures by "
            "name, so give it a parameter of this name",
        )
    has_value = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = {p.name for p in parameters if p.default is p.empty and p.kind not in has_value}
    if surplus := sorted(required - set(pattern.parameters)):
        _refuse(
            pattern,
            f"replace has the parameter {surplus[0]!r} and search does not, so nothing is passed for it; "
            "rename it, remove it, or give it a default",
        )


# Examples --------------------------------------------------------------------------------------------------


def _check_example(pattern: Pattern, name: str, example: Any) -> None:
    annotation = pattern.parameters[name].annotation
    text = (
        getattr(annotation, "__name__", str(annotation)) if isinstance(annotation, type) else str(annotation)
    )
    kind = type(example).__name__
    given: object = example
    if not isinstance(given, (torch.Tensor, float, int, str)) or isinstance(given, bool):
        _refuse(
            pattern,
            f"the example for {name!r} is a {kind}; expected a tensor, a float, an int or a str",
        )
    if isinstance(example, torch.Tensor):
        if text in _NUMBERS:
            _refuse(
                pattern,
                f"the example for {name!r} is a tensor and the parameter is annotated as {text}; pass an example "
                f"that is one, or write {name} without the annotation",
            )
    elif text in _NUMBERS and not isinstance(example, _NUMBERS[text]):
        _refuse(
            pattern,
            f"the example for {name!r} is a {kind}, {example!r}, and the parameter is annotated as {text}; pass a "
            f"{text}",
        )
    elif kind not in text:
        _refuse(
            pattern,
            f"the example for {name!r} is a {kind} and the parameter is not annotated as one; write {name}: {kind}",
        )


def _captures(pattern: Pattern, dtype: torch.dtype, needs_grad: bool = False) -> dict[str, Any]:
    """Returns the examples with float32 replaced by `dtype`."""
    captures: dict[str, Any] = {}
    for name, example in pattern.examples.items():
        captures[name] = example
        if isinstance(example, torch.Tensor):
            tensor = torch.empty(
                example.shape, dtype=dtype if example.dtype == torch.float32 else example.dtype
            )
            captures[name] = tensor.requires_grad_(
                needs_grad and (tensor.is_floating_point() or tensor.is_complex())
            )
    return captures


# What the functions compute --------------------------------------------------------------------------------


def _check_terms(pattern: Pattern, captures: Mapping[str, Any]) -> None:
    with _errors_named(pattern, "search"):
        terms = trace(pattern.search, captures)
    if unused := sorted(set(pattern.parameters) - set().union(*(_used(term) for term in terms))):
        _refuse(
            pattern,
            f"search never uses its parameter {unused[0]!r}, so nothing would bind it; "
            "remove it, or pass it to a torch function (an int or str as an option, such as "
            "ignore_index: sizes and dimensions are read from the tensors)",
        )
    if any(not term.args for term in terms):
        _refuse(pattern, "search returns one of its parameters, which every graph contains; return a result")


def _check_run(
    pattern: Pattern,
    function: str,
    captures: Mapping[str, Any],
    dtype: torch.dtype,
    originals: tuple[torch.Tensor, ...] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Runs search or replace, refuses effects besides computing new tensors, and returns the results."""
    graph = Graph()
    inputs = {name: graph.placeholder(name) for name in captures}
    end = graph.output(None)
    recorder = Recorder(GraphModule({}, graph).graph, end, end)
    arguments = dict(captures)
    for name, value in captures.items():
        if isinstance(value, torch.Tensor):
            inputs[name].meta["example_value"] = value
            arguments[name] = recorder.knows(name, value, inputs[name])
    with _errors_named(pattern, function), recorder.watching(), recorder:
        returned = getattr(pattern, function)(**arguments)
    results = _check_returned(pattern, function, returned)
    for fault in _faults(function, results, recorder, originals):
        _refuse(
            pattern,
            f"for {dtype} examples {function} {fault}; it has to compute new tensors from its arguments and "
            "nothing else",
        )
    return results


def _check_backward(pattern: Pattern, replace: Callable[..., Any]) -> None:
    """Refuses an autograd.Function in replace: a graph would have its forward only."""
    with _tracing(), torch.enable_grad():
        captures = _captures(pattern, DTYPES[0], needs_grad=True)
        try:
            returned = replace(**captures)
        except Exception:  # an op may require that some captures need no gradient
            return
    tensors = [result for result in _as_tuple(returned) if isinstance(result, torch.Tensor)]
    if name := autograd_function(tensors):
        _refuse(
            pattern,
            f"replace calls {name}, an autograd.Function, whose backward cannot be part of a graph; make it an op by "
            "torch.library.custom_op and register_autograd",
        )


def _faults(
    function: str, results: tuple[torch.Tensor, ...], recorder: Recorder, originals: tuple[torch.Tensor, ...] | None
) -> Iterator[str]:  # fmt: skip
    if function == "search":  # terms include no writes, and its results are compared with nothing
        yield from recorder.faults
        yield from (f"writes in place, by {name}" for name in recorder.writers)
        yield from (f"draws random numbers, by {name}" for name in recorder.random)
    elif originals is not None and len(results) == len(originals):
        yield from faults_of(results, recorder, originals)


def _check_returned(pattern: Pattern, function: str, returned: Any) -> tuple[torch.Tensor, ...]:
    results = _as_tuple(returned)
    tensors = tuple(result for result in results if isinstance(result, torch.Tensor))
    if not results or len(tensors) < len(results):
        wrong = next((result for result in results if not isinstance(result, torch.Tensor)), None)
        words = described(wrong) if results else "an empty tuple"
        within = " in a tuple" if isinstance(returned, tuple) and results else ""
        _refuse(pattern, f"{function} could not be traced (it returns {words}{within}); {_RETURNS}")
    return tensors


def _as_tuple(returned: object) -> tuple[object, ...]:
    return cast(tuple[object, ...], returned) if isinstance(returned, tuple) else (returned,)


def _check_results(
    pattern: Pattern, expected: tuple[torch.Tensor, ...], got: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> None:
    if len(expected) != len(got):
        _refuse(
            pattern,
            f"search returns {len(expected)} tensors and replace {len(got)}; return as many from both",
        )
    for a, b in zip(expected, got, strict=True):
        if sizes_of(a.shape) != sizes_of(b.shape) or a.dtype != b.dtype or a.device != b.device:
            on = ("", "") if a.device == b.device else (f" on {a.device}", f" on {b.device}")
            _refuse(
                pattern,
                f"for {dtype} examples search returns {tuple(a.shape)} {a.dtype}{on[0]} "
                f"and replace {tuple(b.shape)} {b.dtype}{on[1]}; return the same shape and dtype from both",
            )


@contextlib.contextmanager
def _errors_named(pattern: Pattern, function: str) -> Generator[None, None, None]:
    """Adds to an error of search or replace the name of the function, and advice."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"pattern {pattern.name!r}: {function} could not be traced ({in_one_line(error)}); {_advice(error)}"
        ) from error


def _advice(error: Exception) -> str:
    if isinstance(error, NEEDS_VALUES):
        return (
            "it reads a value out of a tensor (item(), or an if or a size that depends on one), and is run on tensors "
            "without values; compute with tensors instead, for example by torch.where"
        )
    if "convert all Tensors to FakeTensors" in str(error):
        return "it uses a tensor that is none of its parameters; make it a parameter, or create it in the function"
    return "it must run on tensors of the shapes of the examples, with torch functions only"


def _used(term: Term) -> Iterator[str]:
    """Yields the captures that a term contains."""
    stack, seen = [term], set[Term]()
    while stack:
        term = stack.pop()
        if term in seen:
            continue
        seen.add(term)
        stack.extend(term.args)
        if term.op == "var":
            yield term.consts[0]
        for const in term.consts:
            if isinstance(const, ConstVar):
                yield const.name
            elif isinstance(const, Scalar):
                yield from (name for name, _ in const.powers)
