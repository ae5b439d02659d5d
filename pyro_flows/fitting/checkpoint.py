"""Checkpoints: what a run needs to go on as if it had never stopped, in one file that is never half written."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import write_atomically

FORMAT = 4
WAY_OUT = "Use the same settings, name another file, or remove this one."


def write(path: Path, state: dict[str, Any]) -> None:
    """Put a state, and that of the random numbers, in a file, which takes its place at once or not at all."""
    content = {"format": FORMAT, **state, "random": random_state()}
    write_atomically(path, lambda draft: torch.save(content, Path(draft)))


def read(path: Path, settings: dict[str, Any], caller: str = "fit_svi") -> dict[str, Any] | None:
    """The state in a file, with the random numbers set as they were; None where there is no file.

    Raises:
        ValueError: If the file is no checkpoint, or one of a run with other settings.
    """
    if not path.exists():
        return None
    state = _load(path, caller)
    kept = state["settings"]
    if kept != settings:
        other = [f"{k}={kept.get(k)!r} and not {v!r}" for k, v in settings.items() if kept.get(k) != v]
        raise ValueError(f"{caller}: checkpoint={str(path)!r} is of another run ({', '.join(other)}). {WAY_OUT}")
    set_random_state(state["random"])
    return state


def steps_of(path: Path) -> int | None:
    """How many steps the run in a file was to take, None where there is no file; errors as in :func:`read`."""
    return int(_load(path, "fit_svi")["settings"]["steps"]) if path.exists() else None


def _load(path: Path, caller: str) -> dict[str, Any]:
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        version, _ = state["format"], state["settings"]["steps"]
    except Exception as error:
        raise ValueError(
            f"{caller}: checkpoint={str(path)!r} is not a checkpoint ({error!s:.100}). {WAY_OUT}"
        ) from error
    if version != FORMAT:
        raise ValueError(f"{caller}: checkpoint={str(path)!r} is of another run (another format). {WAY_OUT}")
    return state


def random_state() -> dict[str, Any]:
    """The state of all random numbers of this process."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  (the generator that Pyro seeds)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "random": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set them to a state."""
    torch.set_rng_state(state["torch"])
    for device, own in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(own, device)
    version, keys, gauss = state["random"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
