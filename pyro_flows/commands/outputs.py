"""The two files of a run: what a run that Ctrl-C ended has trained goes beside those of whole runs, which stay."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

from ..atomic_files import try_path
from ..training import Fit, distributed
from ..training.interrupts import hold_interrupts
from ..training.loop import AGAIN
from . import Refused

NOTICE = "\nInterrupted: finishing what is at hand, to keep what was trained; Ctrl-C again ends at once.\n"


class Interrupted(KeyboardInterrupt):
    """A run that Ctrl-C has ended; its text is a line that says what was kept."""


def hold_ctrl_c() -> contextlib.AbstractContextManager[Callable[[], bool]]:
    """Let a first Ctrl-C wait from the start of training until all is written."""
    return hold_interrupts(AGAIN if "RANK" in os.environ else 0.0, NOTICE)


def with_picture(out: Path, suffix: str) -> tuple[Path, Path]:
    """Return a file and that of the picture beside it.

    Raises:
        Refused: If its name does not end with its format.
    """
    if out.suffix != suffix:
        raise Refused(f"argument --out: {str(out)!r} must end with {suffix}")
    return out, out.with_suffix(".png")


def check_writable(paths: tuple[Path, Path]) -> None:
    """Raise Refused unless two files of one folder can be written, and those that an interrupted run leaves.

    The folder is made where it is missing.
    """
    folder = paths[0].parent
    task = f"write into {str(folder)!r}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for files, words in ((paths, ""), (_beside(paths), ", as an interrupted run does")):
            for path in files:
                task = f"write {str(path)!r}{words}"
                try_path(path)
    except OSError as error:
        raise Refused(f"argument --out: cannot {task}: {error.strerror or error}") from error


def places_for(fit: Fit, paths: tuple[Path, Path]) -> tuple[Path, Path]:
    """Return where to write what was fitted: free names beside the files of whole runs if the fit was interrupted.

    Raises:
        Interrupted: If Ctrl-C came before there was anything to write.
    """
    if fit.stopped != "interrupted":
        return paths
    if not fit.best_step:
        raise Interrupted("interrupted before there was anything to keep; nothing was written")
    return _beside(paths)


def _beside(paths: tuple[Path, Path]) -> tuple[Path, Path]:
    """Return free names for the files of an interrupted run: no earlier run loses its files to it."""

    def free() -> tuple[Path, Path]:
        marks = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        return next(pair for pair in map(marked, marks) if not any(map(os.path.lexists, pair)))

    def marked(mark: str) -> tuple[Path, Path]:
        first, second = (path.with_name(f"{path.stem}.interrupted{mark}{path.suffix}") for path in paths)
        return first, second

    return distributed.broadcast(free)


def what_was_kept(paths: tuple[Path, Path], *wrote: Path) -> str:
    """Say which files an interrupted run has written, and that those of whole runs are untouched."""
    said = f"wrote {' and '.join(map(str, wrote))}"
    if wrote[0] == paths[0]:
        return f"interrupted after the training; {said}"
    old = [str(path) for path in paths if path.exists()]
    left = f", and left {' and '.join(old)} as {'they were' if old[1:] else 'it was'}" if old else ""
    return f"interrupted; {said}{left}"
