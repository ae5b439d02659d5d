"""The state of all random numbers of a process."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from pyro.util import get_rng_state, set_rng_state


def random_state() -> dict[str, Any]:
    """Return the state of all random numbers of this process, in types that ``torch.load`` accepts as safe."""
    state = get_rng_state()
    kind, keys, *rest = state["numpy"]
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {**state, "numpy": (kind, keys.tolist(), *rest), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Set all random numbers of this process to a state."""
    set_rng_state(state)
    for device, own in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(own, device)


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Restore all random numbers afterwards."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
