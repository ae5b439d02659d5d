"""The numbers that a person reads off a model: its latents, and what it derives from them by ``pyro.deterministic``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from .engines import Values, is_deterministic
from .task import Task

MOST = 1000  # numbers of a deterministic site; larger ones are not looked at


class Quantities:
    """Reads K numbers off draws of a model.

    Args:
        task: The model and its guide.

    Attributes:
        names: The names of the K quantities; angles count as their cosine and sine.
        sites: The site of each.
        derived: The deterministic sites among these, but where discrete latents are summed out: they may follow from
            such.
        angles: The latents that are angles, along which densities are periodic.
        plain_angles: Those of them whose values are in radians.
    """

    def __init__(self, task: Task) -> None:
        nodes, latents = task.model.single.nodes, task.latents
        can_follow = not task.model.enumerated
        small = [name for name, site in nodes.items() if is_deterministic(site) and site["value"].numel() <= MOST]
        self.derived = small if can_follow else []
        read = [name for name in nodes if name in latents or name in self.derived]
        self._turns = {name: _turn_of(nodes[name]) for name in read}
        labels = [(name, label) for name in read for label in self._labels(name, nodes[name]["value"].shape)]
        self.names = [label for _, label in labels]
        self.sites = [name for name, _ in labels]
        self.angles = {name for name in latents if self._turns[name] is not None}
        self.plain_angles = {
            n for n in self.angles if isinstance(innermost(nodes[n]["fn"]), torch.distributions.VonMises)
        }

    @property
    def has_angles(self) -> bool:
        """Whether some latents are angles."""
        return bool(self.angles)

    def numbers(self, values: Values) -> Tensor:
        """All of them as columns, ``(N, K)``, given the values of their sites, ``(N, *shape)``."""
        columns = []
        for name, turn in self._turns.items():
            value = values[name]
            parts = (value,) if turn is None else ((value * turn).cos(), (value * turn).sin())
            columns += [part.reshape(len(part), -1) for part in parts]
        return torch.cat(columns, -1)

    def _labels(self, name: str, shape: torch.Size) -> list[str]:
        own = labels_of(name, shape)
        return own if self._turns[name] is None else [f"{part} {label}" for part in ("cos", "sin") for label in own]


def labels_of(name: str, shape: torch.Size) -> list[str]:
    """Names for the numbers that a site holds: theta[0, 1]; the site's own where it holds one."""
    return [f"{name}[{', '.join(map(str, place))}]" if place else name for place in np.ndindex(*shape)]


def innermost(fn: Any) -> Any:
    """A distribution without what makes events of its batch, or masks it."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _turn_of(site: dict[str, Any]) -> Tensor | None:
    """What turns an angle's values into radians; None where a site is no angle."""
    fn = innermost(site["fn"])
    if isinstance(fn, torch.distributions.VonMises):
        return torch.ones(())
    if site["infer"].get("periodic"):
        return 2 * math.pi / torch.as_tensor(fn.support.upper_bound - fn.support.lower_bound)
    return None
