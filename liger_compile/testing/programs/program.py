"""A random program as a plain value, and its source text, which people can read and Python can run.

A statement refers to an operand by the number of variables of its kind made since. So any list of statements is a
program: whatever statements shrinking removes, the rest still runs.
"""

from __future__ import annotations

import itertools
import linecache
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from liger_compile.testing.programs.grammar import CASTS, CONSTANTS, HELPERS, RARE_CONSTANTS, TEMPLATES


@dataclass(frozen=True)
class Statement:
    """A template of the grammar with its operands.

    Args:
        template: the name of the template.
        operands: for each operand, the number of variables of its kind made since.
        constant: an index into CONSTANTS and RARE_CONSTANTS.
    """

    template: str
    operands: tuple[int, ...] = (0, 0)
    constant: int = 0


@dataclass(frozen=True)
class Call:
    """One call of a program, and the eager code after it.

    Args:
        length: the sequence length.
        mode: the mode around the call: "grad", "no_grad", "inference" or "autocast".
        labels: whether "some" or "all" labels are ignored.
        mask: "ones" or "padded".
        before_backward: actions on outputs, each (action, index of the output); actions are keys of OUTPUT_ACTIONS.
        roots: the outputs that backward starts at, as bits; 0 is the first that requires a gradient.
        upstream: the incoming gradients: "random", "inf" or "zero".
        after_backward: a key of STEPS: the change to the parameters before the outputs are read.
    """

    length: int = 3
    mode: str = "grad"
    labels: str = "some"
    mask: str = "ones"
    before_backward: tuple[tuple[str, int], ...] = ()
    roots: int = 0
    upstream: str = "random"
    after_backward: str = "nothing"


@dataclass(frozen=True)
class Program:
    """A function of parameters and inputs, and the calls of it.

    Args:
        outputs: the variables that are returned, counted from the last; scalars come first.
        views: the outputs that are returned a second time, as a view.
        dtype: of parameters and floating inputs: "float32", "bfloat16" or "float16".
        frozen: names of parameters (and "x") that require no gradient.
        is_tied: whether the head is the embedding's table.
        dynamic: as in torch.compile.
    """

    statements: tuple[Statement, ...]
    outputs: tuple[int, ...] = (0,)
    views: tuple[int, ...] = ()
    dtype: str = "float32"
    batch: int = 2
    frozen: tuple[str, ...] = ()
    is_tied: bool = False
    dynamic: bool | None = None
    calls: tuple[Call, ...] = (Call(),)

    @property
    def source(self) -> str:
        """The text of the function, after the helpers that it calls."""
        body = "\n".join(_lines(self))
        return f"{_helpers(body)}\ndef program(p, ids, x, labels, mask):\n{body}\n"

    def function(self, others: str = "") -> Callable[..., Any]:
        """Returns the function compiled from `source`, so that tracebacks and torch.compile can show the source.

        Args:
            others: definitions in place of those of `source`.
        """
        name = f"<program {next(_serial)}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        namespace: dict[str, Any] = {"torch": torch, "F": F, "checkpoint": checkpoint}
        exec(compile(self.source, name, "exec"), namespace)
        exec(others, namespace)
        return namespace["program"]

    def __str__(self) -> str:
        calls = "\n".join(f"#   {call}" for call in self.calls)
        settings = f"dtype={self.dtype}, batch={self.batch}, frozen={self.frozen}, is_tied={self.is_tied}"
        return f"{self.source}\n# {settings}, dynamic={self.dynamic}\n{calls}\n# {self!r}"


_serial = itertools.count()
_WEIGHT = re.compile(r"\{w:(\w+)\}")


def _lines(program: Program) -> Iterator[str]:
    made: dict[str, list[str]] = {"hidden": ["x", "e"], "logits": [], "scalar": []}
    order: list[tuple[str, str]] = []  # (kind, name) of the results of the statements
    indent = "    "
    casts = any(statement.template in CASTS for statement in program.statements)
    yield indent + "e = F.embedding(ids, p['embed'])"
    for statement in program.statements:
        template = TEMPLATES[statement.template]
        if statement.template == "end":
            indent = indent[4:] if len(indent) > 4 else indent
            continue
        if any(not made[kind] for kind in template.takes) or (template.opens and len(indent) > 12):
            continue
        operands = [
            made[kind][-1 - ago % len(made[kind])]
            for kind, ago in zip(template.takes, statement.operands, strict=False)
        ]
        text = _text(template.text, operands, statement.constant, casts)
        if template.opens:
            yield indent + text
            indent += "    "
            yield indent + "pass"
        elif template.gives:
            name = f"v{len(order)}"
            made[template.gives].append(name)
            order.append((template.gives, name))
            yield f"{indent}{name} = {text}"
        else:
            yield indent + text
    names = [name for _, name in reversed(order)] or ["e"]
    scalars = [name for kind, name in reversed(order) if kind == "scalar"]
    names = [*scalars, *(name for name in names if name not in scalars)]
    returned = list(dict.fromkeys(names[which % len(names)] for which in program.outputs))
    returned += [f"{returned[which % len(returned)]}.view(-1)" for which in program.views]
    yield f"    return ({', '.join(returned)},)"


def _text(text: str, operands: Sequence[str], constant: int, casts: bool) -> str:
    constants = (*CONSTANTS, *RARE_CONSTANTS)
    text = text.replace("{c}", constants[constant % len(constants)])
    for at, operand in enumerate(operands):
        text = text.replace(f"{{{at}}}", operand)
    dtype = f".to({operands[0]}.dtype)" if casts and operands else ""  # no cast if all values have one dtype
    return _WEIGHT.sub(lambda found: f"p['{found[1]}']{dtype}", text)


def _helpers(body: str) -> str:
    """Returns the helpers that a text calls, and the helpers that they call."""
    needed: set[str] = set()
    texts = [body]
    while texts:
        text = texts.pop()
        for name in HELPERS:
            if name not in needed and re.search(rf"\b{name}\b", text):
                needed.add(name)
                texts.append(HELPERS[name])
    return "".join(text for name, text in HELPERS.items() if name in needed)
