"""Reports: values (`report.py`), their text (`render.py`), and what makes some on demand: `explain.py`, `verify.py`."""

from __future__ import annotations

from liger_compile.report.report import (
    SCHEMA,
    BackwardReport,
    GraphReport,
    Near,
    Place,
    Site,
    clear_reports,
    record,
    reports,
    site_of_pass,
)

__all__ = [
    "SCHEMA",
    "BackwardReport",
    "GraphReport",
    "Near",
    "Place",
    "Site",
    "clear_reports",
    "record",
    "reports",
    "site_of_pass",
]
