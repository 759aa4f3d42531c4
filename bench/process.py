"""A process that measures, seen from the one that hands out the turns: it answers in lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from bench.common import ROOT, Row

PROGRESS = "  size "  # how a line begins that is passed on while the answer is awaited
_LOOK = 0.2  # seconds until the process is looked at again, in case it has died
_LAST_LINES = 30  # of stderr, in the message of an error


class Process:
    """A process, or several of which the first answers. None of them outlives `close`.

    Args:
        command: run in the folder of the repository.
        variables: of the environment, beside those of this process.
        folder: of the file with what it writes to stderr; made if it is missing.
        ranks: how many run the command, with RANK in their environment.
    """

    def __init__(
        self, command: Sequence[str], variables: Mapping[str, str], folder: Path, ranks: int = 1
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._errors = (folder / "stderr").open("a+")  # several may write
        self._processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **variables, "RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=self._errors if rank else subprocess.PIPE,
                stderr=self._errors,
                text=True,
                start_new_session=True,  # so that what it starts ends with it
            )
            for rank in range(ranks)
        ]
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        stdout = self._processes[0].stdout
        assert stdout is not None
        threading.Thread(target=_read, args=(stdout, self._lines), daemon=True).start()

    def answer(self, deadline: float | None = None) -> Row:
        """The next that the first says, awaited until `deadline` on time.monotonic.

        Raises RuntimeError with its last words if it ends instead, and TimeoutError.
        """
        while (found := self.poll(_LOOK)) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError("no answer in time")
        return found

    def poll(self, seconds: float = 0) -> Row | None:
        """What it says within `seconds`, or None. Raises RuntimeError if it has ended."""
        # Looked at first, for then all that it said is in the pipe, which others may hold open.
        has_ended = self._processes[0].poll() is not None
        with contextlib.suppress(queue.Empty):
            while True:
                line = self._lines.get(timeout=1 if has_ended else seconds)
                if line.startswith("{"):  # libraries print too
                    return json.loads(line)
                if line.startswith(PROGRESS):
                    print(line, end="", flush=True)
        if has_ended:
            raise RuntimeError(self._last_words())
        return None

    def ask(self, line: str | int) -> None:
        """Raises OSError if it has ended."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{line}\n")
            process.stdin.flush()

    def close(self, patience: float = 30) -> None:
        """Ends it by the end of its input, or by force after `patience` seconds."""
        if self._errors.closed:
            return
        for process in self._processes:
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=patience)
            with contextlib.suppress(ProcessLookupError):  # also what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._errors.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        return "\n".join(lines[-_LAST_LINES:]) or f"ended with {self._processes[0].returncode} and no word"


@contextlib.contextmanager
def failing_into(facts: dict[str, Row], name: str) -> Iterator[None]:
    """A variant that fails is reported in its row, and the others go on."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        print(f"  {name} failed:\n{error}", flush=True)
        facts[name] = {"error": reason(error)}


def reason(error: Exception) -> str:
    """The last line of its message, which is that of a traceback too."""
    return str(error).splitlines()[-1][:200]


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The names from another one on, so that each comes after each other one."""
    by %= max(len(names), 1)
    return [*names[by:], *names[:by]]


def _read(stdout: TextIO, lines: queue.SimpleQueue[str]) -> None:
    with contextlib.suppress(ValueError, OSError):  # closed meanwhile
        for line in stdout:
            lines.put(line)
