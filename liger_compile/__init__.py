"""liger_compile: `torch.compile(model, backend="liger")` trains unmodified models with fused ops.

torch.compile finds the backend by its name; no import is needed. This package exports functions to inspect the
rewrites (explain, reports), to check them (verify), to add patterns (Pattern, register_pattern), and to call the ops
(functional). Start reading at backend.py.
"""

from __future__ import annotations

from liger_compile import functional
from liger_compile.for_inductor import ForInductor, follow_environment, use_for_inductor
from liger_compile.pattern import Annotate, Match, Pattern
from liger_compile.registry import register_pattern, unregister_pattern
from liger_compile.report import GraphReport, clear_reports, reports
from liger_compile.report.explain import Explanation, explain
from liger_compile.report.verify import Verification, verify

__version__ = "0.1.0"  # defined only here: pyproject.toml reads this line

__all__ = [
    "Annotate",
    "Explanation",
    "ForInductor",
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
    "use_for_inductor",
    "verify",
]

follow_environment()
