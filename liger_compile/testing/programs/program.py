"""A random program as a plain value, and its source text, which a person can read and Python can run.

A statement names its operands by how many variables of their kind ago they were made, so any list of statements is a
program: whatever shrinking takes out, the rest still runs.
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
        template: its name.
        operands: for each variable that it takes, how many of that kind were made since.
        constant: an index into CONSTANTS and RARE_CONSTANTS.
    """

    template: str
    operands: tuple[int, ...] = (0, 0)
    constant: int = 0


@dataclass(frozen=True)
class Call:
    """One call of a program, and what eager code does after it.

    Args:
        length: the sequence length.
        mode: the mode around the call: "grad", "no_grad", "inference" or "autocast".
        labels: "some" are ignored, or "all".
        mask: "ones" or "padded".
        before_backward: what is done to outputs, each (action, which output); actions are keys of OUTPUT_ACTIONS.
        roots: which outputs backward begins at, as bits; 0 is the first that has a gradient.
        upstream: the incoming gradients: "random", "inf" or "zero".
        after_backward: a key of STEPS: who changes the parameters before the outputs are read.
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
        outputs: which variables are returned, counted from the last; scalars come first.
        views: which outputs are returned a second time, as a view.
        dtype: of parameters and floating inputs: "float32", "bfloat16" or "float16".
        frozen: names of parameters (and "x") without a gradient.
        is_tied: the head is the embedding's table.
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

    def function(self) -> Callable[..., Any]:
        """The function, compiled from `source`, which tracebacks and torch.compile can show."""
        name = f"<program {next(_serial)}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        namespace: dict[str, Any] = {"torch": torch, "F": F, "checkpoint": checkpoint}
        exec(compile(self.source, name, "exec"), namespace)
        return namespace["program"]

    def __str__(self) -> str:
        calls = "\n".join(f"#   {call}" for call in self.calls)
        settings = f"dtype={self.dtype}, batch={self.batch}, frozen={self.frozen}, is_tied={self.is_tied}"
        return f"{self.source}\n# {settings}, dynamic={self.dynamic}\n{calls}\n# {self!r}"


_serial = itertools.count()
_WEIGHT = re.compile(r"\{w:(\w+)\}")


def _lines(program: Program) -> Iterator[str]:
    made: dict[str, list[str]] = {"hidden": ["x", "e"], "logits": [], "scalar": []}
    order: list[tuple[str, str]] = []  # (kind, name) of what the statements make
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
    dtype = (
        f".to({operands[0]}.dtype)" if casts and operands else ""
    )  # weights as they are, where all has one dtype
    return _WEIGHT.sub(lambda found: f"p['{found[1]}']{dtype}", text)


def _helpers(body: str) -> str:
    """The helpers that a text calls, and those that they call."""
    needed: set[str] = set()
    texts = [body]
    while texts:
        text = texts.pop()
        for name in HELPERS:
            if name not in needed and re.search(rf"\b{name}\b", text):
                needed.add(name)
                texts.append(HELPERS[name])
    return "".join(text for name, text in HELPERS.items() if name in needed)
