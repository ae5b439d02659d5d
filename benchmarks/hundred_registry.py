"""Registry of the posteriors of ``hundred.py``.

Their models are Pyro programs as users write them.  The files of models import ``numpy``, ``pyro``,
``pyro.distributions`` and ``torch`` alone, so that ``hundred_numpyro.py`` can load the same files for NumPyro.
"""

import hashlib
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Build = Callable[[], tuple[Callable[..., None], tuple[Any, ...]]]
Exact = Callable[[np.random.Generator, int], dict[str, np.ndarray]]


class Entry(NamedTuple):
    """Posterior.

    Attributes:
        family: The family of its model, for tables.
        build: The function that returns the model and its arguments: NumPy arrays, or Python numbers.
        exact: The function that samples the posterior, by site, if it is known.
        eased: Location-scale sites that a reference sampler may decentre, since the latents are the same.
    """

    family: str
    build: Build
    exact: Exact | None
    eased: tuple[str, ...]


ENTRIES: dict[str, Entry] = {}


def entry(family: str, exact: Exact | None = None, eased: tuple[str, ...] = ()) -> Callable[[Build], Build]:
    """Register the builder of a posterior under its name."""

    def register(build: Build) -> Build:
        if build.__name__ in ENTRIES:
            raise ValueError(f"entry: two posteriors have the name {build.__name__}. Rename one.")
        ENTRIES[build.__name__] = Entry(family, build, exact, eased)
        return build

    return register


def is_reported(name: str) -> bool:
    """True if a posterior is in the half that is only reported; the code is tuned on the other half."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 1


def rng(name: str) -> np.random.Generator:
    """Return the random numbers of the data of a posterior, which are the same on every machine."""
    return np.random.default_rng(zlib.crc32(name.encode()))
