"""Prints a row of docs/tested_versions.md: versions, and the numbers of a run of pytest.

python .ci/row.py RESULTS [arguments of pytest]; RESULTS is the file of `pytest --junitxml`.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import sys
import xml.etree.ElementTree as ElementTree


def row(results: str, arguments: list[str]) -> str:
    """Returns the row of a run: torch, Python, transformers, tests, passed, skipped, failed, date."""
    suites = ElementTree.parse(results).getroot().iter("testsuite")
    counts = [{name: int(suite.get(name, 0)) for name in COUNTS} for suite in suites]
    total = {name: sum(each[name] for each in counts) for name in COUNTS}
    failed = total["failures"] + total["errors"]
    passed = total["tests"] - total["skipped"] - failed
    versions = [version_of("torch"), platform.python_version(), version_of("transformers")]
    tests = f"`{' '.join(arguments)}`" if arguments else "all but the slow ones"
    cells = [*versions, tests, f"{passed:,}", total["skipped"], failed, datetime.date.today()]
    return f"| {' | '.join(map(str, cells))} |"


COUNTS = ("tests", "failures", "errors", "skipped")


def version_of(package: str) -> str:
    """Returns the installed version of a package, without the name of its build."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    print(row(sys.argv[1], sys.argv[2:]))
