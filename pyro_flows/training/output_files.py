"""Files that a run writes while it trains: tried before it begins; what fails later is told, and tried again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..arguments import as_path
from ..atomic_files import try_path
from . import distributed


def check_path(caller: str, argument: str, value: Any, ends: str = "") -> Path | None:
    """Return the path of a file that process 0 can write, or None for None.

    Args:
        caller: The public function that asks.
        argument: Its argument that names the file.
        value: The file; a folder is left to what reads it.
        ends: The longest of the words that names of files made from this one end with.

    Raises:
        TypeError: If the value is no path.
        ValueError: If the file cannot be written.
    """
    path = as_path(caller, argument, value)
    if path is None:
        return None

    def problem() -> str:
        if not os.path.isdir(path.parent):  # which, unlike Path's, takes names that are too long
            return "lies in a folder that does not exist."
        if os.path.isdir(path) and not ends:
            return ""
        if why := why_not(lambda: try_path(path.with_name(f"{path.name}{ends}"))):
            longest = f" with {ends!r} at its end" if ends else ""
            return f"cannot be written{longest} ({why}). Name another file."
        return ""

    if words := distributed.broadcast(problem):
        raise ValueError(f"{caller}: {argument}={os.fspath(path)!r} {words}")
    return path


def why_not(write: Callable[[], object]) -> str:
    """Write something; return why the system refused, or nothing."""
    try:
        write()
    except OSError as error:
        return error.strerror or str(error)
    return ""


class Attempts:
    """Writes of one file while training goes on.

    A failure is a warning, the first time and where the cause changes; that it lasts to the end is another.

    Args:
        caller: The public function that asks.
        argument: Its argument that names the file.
        path: The file.
    """

    def __init__(self, caller: str, argument: str, path: Path) -> None:
        self._file = f"{caller}: {argument}={os.fspath(path)!r}"
        self._told: set[str] = set()
        self.problem = ""  # of the last attempt

    def note(self, problem: str) -> None:
        """Take down how an attempt went."""
        self.problem = problem
        if problem and problem not in self._told:
            self._told.add(problem)
            warnings.warn(
                f"{self._file} could not be written ({problem}). Training goes on, and the file is tried again; until "
                "then it is as it was before.",
                stacklevel=3,
            )

    def conclude(self) -> None:
        """Warn where the last attempt failed."""
        if self.problem:
            warnings.warn(
                f"{self._file} could not be written at the end ({self.problem}): it lacks what was trained last. The "
                "fit itself is whole.",
                stacklevel=3,
            )
