"""A look beforehand whether files can be written."""

from __future__ import annotations

from pathlib import Path

from ..files import try_path
from .interrupts import beside


def why_not_writable(paths: tuple[Path, Path]) -> str:
    """Say why two files of one folder, or those that an interrupted run leaves beside them, cannot be written.

    The folder is made where it is missing.
    """
    folder = paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot write into {str(folder)!r}: {error.strerror or error}"
    for path in paths:
        try:
            try_path(path)
        except OSError as error:
            return f"cannot write {str(path)!r}: {error.strerror or error}"
    try:
        for path in beside(paths):
            try_path(path)
    except OSError as error:
        return f"cannot write {str(path)!r}, as an interrupted run does: {error.strerror or error}"
    return ""
