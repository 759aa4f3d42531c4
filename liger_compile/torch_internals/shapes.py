"""Symbolic sizes: their guards, and symbols of our own in place of those of a captured graph.

part                                    torch           can go
torch._dynamo.source.ConstantSource     2.11 to 2.13    no public name to make a symbolic size
ShapeEnv._check_frozen                  2.11 to 2.13    no public name; ShapeEnv calls it before it adds a guard
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from liger_compile.torch_internals.fake_tensors import FakeTensorMode

Check = Callable[
    [Any, Any], None
]  # receives the expression and its current value; raises to refuse the guard


def guard_check(shape_env: Any) -> Check | None:
    """Returns the function that `checking_guards` made a shape environment call; None if it calls none."""
    return vars(shape_env).get("_check_frozen")


@contextlib.contextmanager
def checking_guards(shape_env: Any, check: Check) -> Iterator[None]:
    """Makes a shape environment call `check` before it adds a guard, and then restores the outer function."""
    before = guard_check(shape_env)
    shape_env._check_frozen = check
    try:
        yield
    finally:
        del shape_env._check_frozen
        if before is not None:
            shape_env._check_frozen = before


# Symbols


def unify_sizes(examples: Iterable[Any]) -> None:
    """Makes batch and length of integer matrices one symbol each, where they are equal in the first call.

    Dynamo may trace token ids, mask and labels with symbols of their own, and needs no more than equal products. This
    adds the guards that Dynamo's duck shapes imply: a call in which the sizes differ is compiled anew.
    """
    first: dict[tuple[int, int], torch.SymInt] = {}
    for example in examples:
        if isinstance(example, torch.Tensor) and example.dim() == 2 and not example.is_floating_point():
            for dim, size in enumerate(example.shape):
                if isinstance(size, torch.SymInt):
                    bool(first.setdefault((dim, size.node.hint), size) == size)


_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def symbols_of(value: Any) -> set[sympy.Symbol]:
    """Returns the symbols in the layout of a tensor, or in a number."""
    numbers = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
    return {s for number in numbers if isinstance(number, _SYMBOLIC) for s in number.node.expr.free_symbols}


def shape_env_of(values: Iterable[Any]) -> Any:
    """Returns the shape environment of the sizes among these values; None if there are none."""
    return next((value.node.shape_env for value in values if isinstance(value, torch.SymInt)), None)


class Places:
    """Where the inputs of a graph have the numbers that are symbols in it."""

    def __init__(self, examples: Sequence[Any]) -> None:
        """Takes the values of the inputs in the trace of the graph: fake tensors and sizes."""
        self._of: dict[sympy.Symbol, tuple[int, int | None]] = {}
        for at, example in enumerate(examples):
            is_tensor = isinstance(example, torch.Tensor)
            for dim, size in enumerate(example.shape if is_tensor else (example,)):
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    self._of.setdefault(size.node.expr, (at, dim if is_tensor else None))

    def __bool__(self) -> bool:
        return bool(self._of)

    def have(self, value: Any) -> bool:
        """Returns whether the symbols of a tensor or of a number have places.

        A number without symbols, which is read from a tensor, has none: a new trace would not know it.
        """
        symbols = symbols_of(value)
        return self._of.keys() >= symbols and bool(symbols or not isinstance(value, _SYMBOLIC))

    def numbers(self, inputs: Sequence[Any]) -> dict[sympy.Symbol, int]:
        """Returns the number of each symbol in a call; in the trace of the graph, that of the first call."""
        found = {}
        for symbol, (at, dim) in self._of.items():
            number = inputs[at] if dim is None else inputs[at].shape[dim]
            found[symbol] = number.node.hint if isinstance(number, torch.SymInt) else number
        return found


def number_of(size: int | sympy.Expr | torch.SymInt, numbers: Mapping[sympy.Symbol, int]) -> int:
    """Returns what a size is if its symbols are these numbers."""
    expr: Any = size
    if isinstance(size, torch.SymInt):
        expr = size.node.expr
    return expr if isinstance(expr, int) else int(expr.xreplace(numbers))


def new_size(shape_env: Any, number: int, name: str) -> int | torch.SymInt:
    """Returns a size with a new symbol, which is `number` in the trace; 0 and 1 have no symbols."""
    source = ConstantSource(name)
    symbol = shape_env.create_symbol(number, source, dynamic_dim=DimDynamic.DYNAMIC, positive=number >= 0)
    return shape_env.create_symintnode(symbol, hint=number, source=source)


class NewSymbols:
    """A new trace in which the sizes of a captured graph have new symbols, and the guards that it needs.

    The trace of the captured graph is over, and would take no guards.
    """

    def __init__(self, numbers: Mapping[sympy.Symbol, int]) -> None:
        """Takes the symbols of the captured graph, with their numbers in this call."""
        self._shape_env = ShapeEnv()
        self.fake_mode = FakeTensorMode(shape_env=self._shape_env)
        self._numbers = dict(numbers)
        made = {
            symbol: new_size(self._shape_env, number, f"number_{at}")
            for at, (symbol, number) in enumerate(numbers.items())
        }
        self._sizes = {symbol: size for symbol, size in made.items() if isinstance(size, torch.SymInt)}
        self._constants = {symbol: size for symbol, size in made.items() if symbol not in self._sizes}
        self._expression: tuple[int, str | None] = (-1, None)  # with the number of its guards

    def input_like(self, example: Any, value: Any) -> Any:
        """Returns an input for the new trace: `value`, or if sizes of `example` are symbols, a fake of it."""
        if not symbols_of(example):
            return value
        if not isinstance(example, torch.Tensor):
            return self._size_like(example)
        sizes, strides = (tuple(map(self._size_like, x)) for x in (example.shape, example.stride()))
        with self.fake_mode:
            made = torch.empty_strided(sizes, strides, dtype=example.dtype, device=example.device)
        return made.requires_grad_(example.requires_grad)

    def _size_like(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        new = {symbol: mine.node.expr for symbol, mine in self._sizes.items()}
        expression = size.node.expr.xreplace({**self._constants, **new})
        return self._shape_env.create_symintnode(expression, hint=number_of(size, self._numbers))

    def hold(self, numbers: Mapping[sympy.Symbol, int]) -> bool:
        """Returns whether the guards of the trace hold for these numbers of the captured graph's symbols."""
        if any(numbers[symbol] != constant for symbol, constant in self._constants.items()):
            return False
        if not self._sizes:
            return True
        count = len(self._shape_env.guards)
        if self._expression[0] != count:  # a backward that was compiled meanwhile has added some
            found = self._shape_env.produce_guards_expression(list(self._sizes.values()))
            self._expression = count, found
        given = [numbers[symbol] for symbol in self._sizes]
        expression = self._expression[1]
        return expression is None or bool(self._shape_env.evaluate_guards_expression(expression, given))
