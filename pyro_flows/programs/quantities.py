"""Quantities of a model: the numbers in its latents and in the sites that ``pyro.deterministic`` derives from them."""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import VonMises

from .engines import Site, Values
from .latents import innermost
from .masks import is_deterministic

MOST = 1000  # numbers of a deterministic site; larger ones are left out


class Quantities:
    """The K numbers to read off draws of a model.

    Args:
        nodes: The model's sites, by name.
        latents: The names of its latents.
        enumerated: The discrete latents that are summed out.

    Attributes:
        names: The names of the K quantities; angles count as their cosine and sine, and complex
            numbers as their real and imaginary parts.
        sites: The site of each.
        derived: The deterministic sites among them.  They are left out if discrete latents are summed out, since they
            may depend on these latents.
        angles: The latents that are angles, along which densities are periodic.
        plain_angles: The angles whose values are in radians.
    """

    def __init__(self, nodes: dict[str, Site], latents: list[str], enumerated: Collection[str] = ()) -> None:
        small = [name for name, site in nodes.items() if is_deterministic(site) and site["value"].numel() <= MOST]
        self.derived = [] if enumerated else small
        read = [name for name in nodes if name in latents or name in self.derived]
        self._turns = {name: _turn_of(nodes[name]) for name in read}
        self.names, self.sites = [], []
        for name, turn in self._turns.items():
            own = labels_of(name, nodes[name]["value"].shape)
            parts = ("re", "im") if nodes[name]["value"].is_complex() else ("cos", "sin")
            plain = turn is None and parts[0] == "cos"
            labels = own if plain else [f"{part} {label}" for part in parts for label in own]
            self.names += labels
            self.sites += [name] * len(labels)
        self.angles = {name for name in latents if self._turns[name] is not None}
        self.plain_angles = {name for name in self.angles if isinstance(innermost(nodes[name]["fn"]), VonMises)}
        self._kept = torch.arange(len(self.names))

    def keep(self, used: Tensor) -> None:
        """Leave out the quantities for which ``used``, ``(K,)`` of bool, is False."""
        self._kept = self._kept[used.cpu()]
        self.names, self.sites = (list(compress(of, used.tolist())) for of in (self.names, self.sites))

    def numbers(self, values: Values) -> Tensor:
        """Return all quantities as columns, ``(N, K)``, given the values of their sites, ``(N, *shape)``."""
        columns = []
        for name, turn in self._turns.items():
            value = values[name]
            if value.is_complex():
                parts: tuple[Tensor, ...] = value.real, value.imag
            else:
                parts = (value,) if turn is None else ((value * turn).cos(), (value * turn).sin())
            columns += [part.reshape(len(part), -1) for part in parts]
        return torch.cat(columns, -1)[:, self._kept]


def labels_of(name: str, shape: torch.Size) -> list[str]:
    """Return names for the numbers of a site: theta[0, 1], or the site's own name for a single number."""
    return [f"{name}[{', '.join(map(str, place))}]" if place else name for place in np.ndindex(*shape)]


def _turn_of(site: dict[str, Any]) -> Tensor | None:
    """Return the factor that turns an angle's values into radians, or None if a site is no angle."""
    fn = innermost(site["fn"])
    if isinstance(fn, VonMises):
        return torch.ones(())
    if site["infer"].get("periodic"):
        return 2 * math.pi / torch.as_tensor(fn.support.upper_bound - fn.support.lower_bound)
    return None
