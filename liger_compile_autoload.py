"""Reads LIGER_COMPILE_FOR_INDUCTOR when torch is imported, so that no line of a program has to import liger_compile.

torch calls the entry points of the group "torch.backends" at the end of its import. This module is beside the package,
because the import of a module in the package imports the package: without the variable, nothing is imported.
"""

import os


def autoload() -> None:
    """Imports liger_compile, which reads the variable, if the variable is set."""
    if os.environ.get("LIGER_COMPILE_FOR_INDUCTOR", "0") not in ("", "0"):
        import liger_compile  # noqa: F401
