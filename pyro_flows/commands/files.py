"""Files that are written whole or not at all, and a look beforehand whether they can be written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def why_not_writable(paths: tuple[Path, ...]) -> str:
    """Why files, all of one folder, cannot be written, or an empty string; the folder is made where it is missing."""
    for path in paths:
        if path.is_dir():
            return f"cannot write {str(path)!r}: it is a folder"
    folder = paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".pyro_flows-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"cannot write into {str(folder)!r}: {error.strerror or error}"
    return ""


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Let ``write`` fill a file beside ``path`` that then takes its place: no half-written file is ever seen."""
    draft = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(str(draft))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
