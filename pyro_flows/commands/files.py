"""A look beforehand whether files can be written."""

from __future__ import annotations

import os
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
