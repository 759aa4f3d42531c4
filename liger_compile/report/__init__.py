"""Reports: values (`report.py`), their text (`render.py`), and what makes some on demand: `explain.py`, `verify.py`."""

from __future__ import annotations

from liger_compile.report.report import (
    HERE,
    SCHEMA,
    BackwardReport,
    GraphReport,
    Near,
    Paths,
    Place,
    Site,
    clear_reports,
    record,
    reports,
    site_of_pass,
)

__all__ = [
    "HERE",
    "SCHEMA",
    "BackwardReport",
    "GraphReport",
    "Near",
    "Paths",
    "Place",
    "Site",
    "clear_reports",
    "record",
    "reports",
    "site_of_pass",
]
