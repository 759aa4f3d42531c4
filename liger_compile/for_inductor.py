"""use_for_inductor(): torch.compile uses backend="liger" where a program asks for the backend "inductor".

For frameworks that accept only the backends of a fixed list, or none. In: a line of the user's program, or the
environment variable LIGER_COMPILE_FOR_INDUCTOR. Out: a change in torch, which `torch_internals/inductor.py` makes.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

from liger_compile.options import PREFIX, parse
from liger_compile.torch_internals import inductor
from liger_compile.torch_internals.dynamo import lookup_backend

VARIABLE = "LIGER_COMPILE_FOR_INDUCTOR"
MODE = f"{PREFIX}mode"

_log = logging.getLogger("liger_compile")
_lock = threading.Lock()
_in_effect: list[ForInductor] = []  # the last one decides


class ForInductor:
    """What use_for_inductor() returns: ends its effect by `undo()`, or at the end of a `with` block."""

    def __init__(self, options: Mapping[str, Any], source: str) -> None:
        self.options = dict(options)
        self.source = source

    def undo(self) -> None:
        """Ends the effect of this call. An earlier call that is still in effect decides again. Once is enough."""
        with _lock:
            if self in _in_effect:
                _in_effect.remove(self)
                _decide()

    def __enter__(self) -> ForInductor:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def use_for_inductor(options: Mapping[str, Any] | None = None) -> ForInductor:
    """Makes torch.compile use backend="liger" where a program asks for "inductor", by name or by default.

    For frameworks that accept only the backends of a fixed list: `TrainingArguments(torch_compile=True)`,
    `Accelerator(dynamo_backend="inductor")`. The calls of `torch.compile` and `Module.compile` that follow are
    affected, in all threads of this process. A function that was compiled before stays with Inductor. A function that
    is compiled now stays with this backend, also if it is compiled again after the end. The Trainer calls torch.compile
    in `train()`, so the effect must last until then.

    Not affected: other backends, torch.export and AOTInductor, and code that calls Inductor without torch.compile. The
    environment variable LIGER_COMPILE_FOR_INDUCTOR=1 has the same effect from the import of torch on, without options.

    Calls may be nested or repeated: the last one that is in effect decides, with its options only.

    Args:
        options: those of `torch.compile(backend="liger")`: "liger.*" and Inductor's. A call of torch.compile may have
            options of both kinds itself, which override these; its mode overrides "liger.mode".

    Returns:
        An object that ends the effect: `undo()`, or `with use_for_inductor(): ...`.

    Raises:
        ValueError: for an unknown option "liger.*" or a wrong value.
        RuntimeError: for a wrong mode, or an unknown option of Inductor.
    """
    begun = ForInductor(options or {}, "use_for_inductor()")
    given = _settings(begun, None, {})
    inductor.patches_of(given.mode, given.options)  # raises for what Inductor does not accept
    lookup_backend("liger")  # raises if the package is not installed
    return _begin(begun)


def is_used_for_inductor() -> str | None:
    """Returns what makes torch.compile use this backend for "inductor": a call or a variable; None if nothing does."""
    return _in_effect[-1].source if _in_effect else None


def follow_environment() -> None:
    """Does what the environment variable says. Call it once, after the import of this package."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"environment variable {VARIABLE}: expected 1 or 0, got {value!r}")
    if value == "1":
        _begin(ForInductor({}, f"{VARIABLE}=1"))


def _begin(begun: ForInductor) -> ForInductor:
    with _lock:
        _in_effect.append(begun)
        _decide()
    return begun


def _decide() -> None:
    """Brings torch in line with what is in effect."""
    if not _in_effect:
        inductor.restore()
        _log.info('liger_compile  torch.compile(backend="inductor") is Inductor again')
        return
    deciding = _in_effect[-1]
    inductor.replace("liger", partial(_settings, deciding))
    _log.info(
        'liger_compile  %s: torch.compile(backend="inductor") uses backend="liger" from now on',
        deciding.source,
    )


def _settings(deciding: ForInductor, mode: str | None, options: Mapping[str, Any]) -> inductor.Settings:
    """Returns the arguments of the backend for one call of torch.compile, which has this mode and these options."""
    together = {**deciding.options, **options}
    if mode not in (None, "default"):  # torch.compile without a mode and options passes "default"
        together[MODE] = mode
    chosen, inductors = parse(None, together)
    ours = {key: value for key, value in together.items() if key.startswith(PREFIX) and key != MODE}
    note = f'torch.compile was called for the backend "inductor", which {deciding.source} replaces by "liger"'
    return inductor.Settings(chosen.mode, inductors, {"options": ours, "notes": (note,)})
