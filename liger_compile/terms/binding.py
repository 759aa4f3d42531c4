"""Binds the arguments of a torch call to the parameters of a table function.

A call fits a table function if its arguments bind to the signature and have the annotated kinds; a parameter without an
annotation takes any value. Whether a call fits is decided here, before the function runs: an exception of the function
itself is then a fault.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from liger_compile.terms.call import Call, UnsupportedError


def bound(
    function: Callable[..., Any], call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """Returns the arguments by the parameters of a table function.

    Raises:
        UnsupportedError: the signature does not take the arguments, or an argument is of another kind.
    """
    signature, kinds = _signature(function)
    try:
        arguments = signature.bind(call, *args, **kwargs)
    except TypeError as error:
        raise UnsupportedError(str(error)) from None
    for name, kind in kinds.items():
        if name in arguments.arguments and not _is_of(arguments.arguments[name], kind):
            value = arguments.arguments[name]
            raise UnsupportedError(
                f"expected {kind} for {name}, got {value!r} of type {type(value).__name__}"
            )
    return arguments


@functools.cache
def _signature(function: Callable[..., Any]) -> tuple[inspect.Signature, Mapping[str, Any]]:
    """Returns the signature of a function, and the kinds of the parameters that have an annotation."""
    kinds = get_type_hints(function)
    signature = inspect.signature(function)
    checked = {
        name: Sequence[kinds[name]] if parameter.kind is parameter.VAR_POSITIONAL else kinds[name]
        for name, parameter in signature.parameters.items()
        if kinds.get(name, Any) is not Any
    }
    return signature, checked


def _is_of(value: Any, kind: Any) -> bool:
    """Returns whether a value is of a kind: a class, a union of kinds, or a list or tuple of values of one kind."""
    if kind is Any:
        return True
    origin = get_origin(kind)
    if origin in (types.UnionType, Union):
        return any(_is_of(value, part) for part in get_args(kind))
    if origin is Sequence:
        (part,) = get_args(kind)
        return isinstance(value, (list, tuple)) and all(_is_of(item, part) for item in value)
    return isinstance(value, kind)
