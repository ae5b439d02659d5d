"""An error of a user's program in words: its kind and message, and the line of the program that it came from."""

from __future__ import annotations

import linecache
import sys
import traceback
from pathlib import Path

INNER = {"pyro", "torch", __name__.partition(".")[0], *sys.stdlib_module_names} - {"__main__"}


def quoted(error: BaseException) -> str:
    """Return an error's place, kind and message: ``models.py:7, `assert x.dim() == 1`: AssertionError``.

    An error without a place, as that of a log-density, has only kind and message.
    """
    words = " ".join(str(error).partition("Trace Shapes:")[0].split())
    place = place_of(error)
    return f"{f'{place}: ' if place else ''}{type(error).__name__}{f': {words:.300}' if words else ''}"


def place_of(error: BaseException) -> str:
    """Return the innermost line of an error that is neither of Python itself nor of torch, Pyro or this package."""
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        if frame.f_globals.get("__name__", "").partition(".")[0] not in INNER:
            file = frame.f_code.co_filename
            line = linecache.getline(file, number, frame.f_globals).strip()
            return f"{Path(file).name}:{number}{f', `{line}`' if line else ''}"
    return ""
