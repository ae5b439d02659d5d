"""Ctrl-C in a command: what was trained is written beside the files of whole runs, which stay as they are."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

from ..training import processes
from ..training.interrupts import hold_interrupts
from ..training.loop import AGAIN

NOTICE = "\nInterrupted: finishing what is at hand, to keep what was trained; Ctrl-C again ends at once.\n"
NOTHING = "interrupted before there was anything to keep; nothing was written"


class Interrupted(KeyboardInterrupt):
    """A run that Ctrl-C has ended; its text is a line that says what was kept."""


def hold_ctrl_c() -> contextlib.AbstractContextManager[Callable[[], bool]]:
    """Let a first Ctrl-C wait from the start of training until all is written."""
    return hold_interrupts(AGAIN if "RANK" in os.environ else 0.0, NOTICE)


def beside(paths: tuple[Path, Path]) -> tuple[Path, Path]:
    """Return free names for the files of an interrupted run: no earlier run loses its files to it."""

    def free() -> tuple[Path, Path]:
        for number in itertools.count(1):
            mark = ".interrupted" if number == 1 else f".interrupted-{number}"
            first, second = (path.with_name(f"{path.stem}{mark}{path.suffix}") for path in paths)
            if not (os.path.lexists(first) or os.path.lexists(second)):
                return first, second
        raise AssertionError("there are more numbers than files")

    return processes.first(free)


def what_was_kept(paths: tuple[Path, Path], *wrote: Path) -> str:
    """Say which files an interrupted run has written, and that those of whole runs are untouched."""
    said = f"wrote {' and '.join(map(str, wrote))}"
    if wrote[0] == paths[0]:
        return f"interrupted after the training; {said}"
    old = [str(path) for path in paths if path.exists()]
    left = f", and left {' and '.join(old)} as {'they were' if old[1:] else 'it was'}" if old else ""
    return f"interrupted; {said}{left}"
