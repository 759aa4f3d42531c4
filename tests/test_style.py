"""Functions are short and take few parameters, or a comment gives the reason."""

import ast
from pathlib import Path

import liger_compile
import liger_compile.patterns

PACKAGE, PATTERNS = (Path(each.__path__[0]) for each in (liger_compile, liger_compile.patterns))
FILES = [path for root in (PACKAGE, PATTERNS) for path in sorted(root.rglob("*.py"))]

MOST_LINES, MOST_PARAMETERS = 60, 8
# What these decorate has the schema of an op as its parameters, and torch.library takes no classes of ours in a schema.
OF_SCHEMAS = ("opaque_op", "traceable_op", "late_op", "backward_op", "register_fake")


def functions(source: str):
    return [each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.FunctionDef)]


def number_of_lines(function: ast.FunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def number_of_parameters(function: ast.FunctionDef) -> int:
    of = function.args
    return len([*of.posonlyargs, *of.args, *of.kwonlyargs, *filter(None, (of.vararg, of.kwarg))])


def has_reason(source: str, function: ast.FunctionDef, start: str) -> bool:
    """Whether a comment that begins in this way is directly above a function, or the first line of its body."""
    lines = source.splitlines()
    first = min([function.lineno, *(each.lineno for each in function.decorator_list)])
    above, within = first - 1, function.body[0].lineno - 1
    while above and lines[above - 1].startswith(" " * function.col_offset + "#"):
        above -= 1
    return any(line.strip().startswith(start) for line in (*lines[above : first - 1], lines[within - 1]))


def has_given_parameters(path: Path, function: ast.FunctionDef) -> bool:
    """Whether others determine them: a kernel's pointers and sizes, a schema, a pattern's captures."""
    is_of_schema = any(ast.unparse(each).endswith(OF_SCHEMAS) for each in function.decorator_list)
    is_search = path.parent == PATTERNS and function.name.startswith("search")
    return path.parent.name == "kernels" or is_of_schema or is_search


def test_functions_are_short():
    for path in FILES:
        source = path.read_text()
        for each in functions(source):
            lines = number_of_lines(each)
            is_right = lines <= MOST_LINES or has_reason(source, each, "# Long because ")
            assert is_right, (
                f"{path}:{each.lineno}: {each.name} has {lines} lines; split it, or write '# Long because ...' above it"
            )


def test_functions_take_few_parameters():
    for path in FILES:
        source = path.read_text()
        for each in functions(source):
            count = number_of_parameters(each)
            is_right = count <= MOST_PARAMETERS or has_given_parameters(path, each)
            is_right = is_right or has_reason(source, each, "# Many parameters because ")
            assert is_right, (
                f"{path}:{each.lineno}: {each.name} has {count} parameters; pass a value that has several of them, or "
                "write '# Many parameters because ...' above it"
            )
