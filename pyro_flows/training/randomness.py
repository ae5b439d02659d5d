"""The state of all random numbers of a process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of all random numbers of this process."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  (the generator that Pyro seeds)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "random": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set all random numbers of this process to a state."""
    torch.set_rng_state(state["torch"])
    for device, own in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(own, device)
    version, keys, gauss = state["random"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Restore all random numbers afterwards."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
