"""liger_compile: `torch.compile(model, backend="liger")` trains unmodified models with fused ops.

The backend is found by its name; nothing has to be imported for it. What is here is for those who want to
look at what it did (explain, reports), to check it (verify), to teach it patterns (Pattern, register_pattern),
or to call its ops (functional). Start reading at backend.py.
"""

from __future__ import annotations

from liger_compile import functional
from liger_compile.explanation import Explanation, explain
from liger_compile.pattern import Annotate, Match, Pattern
from liger_compile.registry import register_pattern, unregister_pattern
from liger_compile.report import GraphReport, clear_reports, reports
from liger_compile.verification import Verification, verify

__version__ = "0.1.0"  # the only place: pyproject.toml reads this line

__all__ = [
    "Annotate",
    "Explanation",
    "GraphReport",
    "Match",
    "Pattern",
    "Verification",
    "__version__",
    "clear_reports",
    "explain",
    "functional",
    "register_pattern",
    "reports",
    "unregister_pattern",
    "verify",
]
