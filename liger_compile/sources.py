"""Computes digests of functions and their dependencies: their code, and the functions and classes they reach by name.

A cache on disk that holds results of a function needs a key that changes with the function. A function reaches the
names in its code (globals, attributes of modules, imports within it), its closure and its defaults; a class reaches its
bases and its members; containers, partials and methods reach their contents. A function counts by its bytecode and its
file; numbers, strings and dtypes count by value.

Not covered: names found at run time only (getattr with a computed name), attributes of objects, the contents of
tensors, and code in C. Installed packages count by their version. This package counts as a whole, elsewhere
(`compile.package_hash`).
"""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import importlib.metadata
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from liger_compile.torch_internals.operators import CUSTOM_OPS, definition_of

LARGEST = 256  # members of a container that are inspected

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_HELD = (
    "fn",
    "__wrapped__",
)  # attributes in which decorated objects hold functions: triton.jit, functools.wraps
_INSTALLED = ("/site-packages/", "/dist-packages/")
_STANDARD = sysconfig.get_path("stdlib") + "/"
_OURS = __name__.partition(".")[0]


def digests(functions: Iterable[Any]) -> list[str]:
    """Returns digests of `functions` and of all that they reach, sorted. Stable between processes."""
    stack = [function for function in functions if function is not None]
    found: set[str] = set()
    for function in stack:  # passed by the caller, so their files count wherever they are installed
        code = code_of(function)
        if code is not None and not _is_ours(function):
            found.update(_file(code.co_filename))
    seen: dict[int, Any] = {}  # keeps objects alive, since ids are unique only among living objects
    while stack:
        value = stack.pop()
        if id(value) not in seen and not isinstance(value, _PLAIN):
            seen[id(value)] = value
            found.update(_own(value))
            stack.extend(_reached(value))
    return sorted(found)


def code_of(function: Any) -> CodeType | None:
    """Returns None for a function in C: it belongs to torch, whose version is in torch's keys."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    return getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)


def _own(value: Any) -> Iterator[str]:
    """Yields the digests of a value itself."""
    if isinstance(value, (FunctionType, type, ModuleType)):
        if package := _installed_package(value):
            yield _digest([package, _version(package)])
        elif (path := _path(value)) and not _is_foreign(value):
            yield from _file(path)
        if isinstance(value, FunctionType) and not _is_foreign(value):
            yield _digest(_bytecode(value.__code__))
    elif plain := sorted(
        f"{key!r} {member!r}" for key, member in _members(value) if isinstance(member, _PLAIN)
    ):
        yield _digest(plain)


def _reached(value: Any) -> Iterator[Any]:
    """Yields the values that a value reaches."""
    if isinstance(value, FunctionType):
        if not _is_foreign(value):
            yield from (_named(value), value.__defaults__, value.__kwdefaults__)
            yield getattr(value, "__wrapped__", None)
    elif isinstance(value, type):
        if not _is_foreign(value):
            yield from (*value.__bases__, dict(vars(value)))
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, (staticmethod, classmethod)):
        yield value.__func__
    elif isinstance(value, property):
        yield value.fget
    elif not isinstance(value, (ModuleType, torch.Tensor)):
        yield from (member for _, member in _members(value))
        yield from (type(value), *(getattr(value, name, None) for name in _HELD), *definition_of(value))


def _members(value: Any) -> Iterable[tuple[Any, Any]]:
    """Returns keys and values of a container."""
    if isinstance(value, Mapping):
        return list(value.items())[:LARGEST]
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))[:LARGEST]
    if isinstance(value, (set, frozenset)):
        return [(member if isinstance(member, _PLAIN) else "", member) for member in list(value)[:LARGEST]]
    return ()


def _named(function: FunctionType) -> dict[str, Any]:
    """Returns by name the values that a function's code and closure reach. `module.name` has the key "module.name"."""
    names, space = sorted(set(_names(function.__code__))), function.__globals__
    found = {name: space[name] for name in names if name in space}
    for name in _imports(function.__code__, str(space.get("__package__") or "")):
        found[name] = sys.modules[name] if name in sys.modules else tuple(_files_behind(name))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    found |= {op: definition for op, definition in CUSTOM_OPS.items() if set(op.split("::")) <= set(names)}
    modules = {name: value for name, value in found.items() if isinstance(value, ModuleType)}
    seen: set[str] = set()
    while modules:
        path, module = modules.popitem()
        if module.__name__ in seen or _is_foreign(module):
            continue
        seen.add(module.__name__)
        within = {f"{path}.{name}": vars(module)[name] for name in names if name in vars(module)}
        found |= within
        modules |= {name: value for name, value in within.items() if isinstance(value, ModuleType)}
    return found


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _imports(code: CodeType, package: str) -> Iterator[str]:
    """Yields the modules that a function imports when it runs."""
    before: list[Any] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            level, parts = before[-2:]
            base = package.rsplit(".", level - 1)[0] + "." if level else ""
            module = (base + instruction.argval).rstrip(".")
            yield from (module, *(f"{module}.{part}" for part in parts or () if level))
        before.append(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _imports(constant, package)


def _files_behind(name: str) -> Iterator[str]:
    """Yields digests of a module not yet loaded and of all that its source imports, without installed packages."""
    stack, seen = [name], set()
    while stack:
        name = stack.pop()
        path = None if name in seen else _found(name)
        seen.add(name)
        if path is None or path.startswith(_STANDARD) or any(part in path for part in _INSTALLED):
            continue
        yield from _file(path)
        package = name if Path(path).name == "__init__.py" else name.rpartition(".")[0]
        with contextlib.suppress(SyntaxError, ValueError):
            stack.extend(_imports(compile(Path(path).read_text(), path, "exec"), package))


def _found(name: str) -> str | None:
    """Returns the source file of a module, without importing its packages."""
    path, spec, parts = None, None, name.split(".")
    for end in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: end + 1]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec.origin if spec and str(spec.origin).endswith(".py") else None


def _path(value: FunctionType | type | ModuleType) -> str | None:
    """Returns the file that a value was defined in."""
    if isinstance(value, FunctionType):
        return value.__code__.co_filename
    return getattr(_module(value), "__file__", None)


def _module(value: FunctionType | type | ModuleType) -> ModuleType | None:
    return value if isinstance(value, ModuleType) else sys.modules.get(value.__module__)


def _is_foreign(value: FunctionType | type | ModuleType) -> bool:
    """Returns whether to ignore what a value reaches: it is Python's, installed, in C, or this package's."""
    path = _path(value)
    if path is None:
        return getattr(_module(value), "__name__", "") != "__main__"
    return _is_ours(value) or path.startswith(_STANDARD) or any(part in path for part in _INSTALLED)


def _is_ours(value: Any) -> bool:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return str(name).partition(".")[0] == _OURS


def _installed_package(value: FunctionType | type | ModuleType) -> str | None:
    """Returns the name of the installed package of a value; None if it is not installed."""
    if _is_ours(value) or not any(part in (_path(value) or "") for part in _INSTALLED):
        return None
    return getattr(_module(value), "__name__", "").partition(".")[0]


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", ""))


def _bytecode(code: CodeType) -> Iterator[str]:
    yield from (code.co_code.hex(), repr(code.co_names))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _bytecode(constant)
        else:  # the order of a set of strings differs between processes
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)


def _file(path: str) -> Iterator[str]:
    """Yields the digest of a file; yields nothing if there is no file, as for a notebook cell."""
    try:
        stat = Path(path).stat()
    except OSError:
        return
    yield _file_hash(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4096)
def _file_hash(path: str, modified: int, size: int) -> str:
    """Returns the digest of a file; the arguments make it read the file again if its time or size has changed."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
