"""The numbers that a person reads off a model: its latents, and what it derives from them by ``pyro.deterministic``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .alongside import rows_of

MOST = 1000  # numbers of a deterministic site; larger ones are not looked at


class Quantities:
    """Reads K numbers off traces of a model.

    Args:
        model: The model.
        single: Its trace of a single draw.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Attributes:
        names: The names of the K quantities; angles count as their cosine and sine.
        sites: The site of each.
        latents: The model's latent sites.
        has_angles: Whether some latents are angles, along which densities are periodic.
    """

    def __init__(self, model: Callable[..., Any], single: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.latents = [name for name, _ in single.iter_stochastic_nodes()]
        held = {name: single.nodes[name]["value"] for name in self.latents}
        with poutine.block(), torch.no_grad():  # the marks on latents are lost where a guide is replayed
            marked = poutine.trace(poutine.condition(model, data=held)).get_trace(*args, **kwargs).nodes
        read = [name for name, site in single.nodes.items() if name in held or _is_derived(site)]
        self._turns = {name: _turn_of(marked[name]) for name in read}
        self._shapes = {name: single.nodes[name]["value"].shape for name in read}
        labels = {name: self._labels(name) for name in read}
        self.names = [label for name in read for label in labels[name]]
        self.sites = [name for name in read for _ in labels[name]]
        self.has_angles = any(self._turns[name] is not None for name in self.latents)

    def values(self, trace: Trace, size: int) -> dict[str, Tensor]:
        """The values in a trace of N draws at once: for each site ``(N, *shape)``."""
        return {name: rows_of(name, trace.nodes[name]["value"], shape, size) for name, shape in self._shapes.items()}

    def numbers(self, trace: Trace, size: int) -> Tensor:
        """All of them as columns, ``(N, K)``."""
        columns = []
        for name, value in self.values(trace, size).items():
            turn = self._turns[name]
            parts = (value,) if turn is None else ((value * turn).cos(), (value * turn).sin())
            columns += [part.reshape(size, -1) for part in parts]
        return torch.cat(columns, -1)

    def _labels(self, name: str) -> list[str]:
        own = labels_of(name, self._shapes[name])
        return own if self._turns[name] is None else [f"{part} {label}" for part in ("cos", "sin") for label in own]


def labels_of(name: str, shape: torch.Size) -> list[str]:
    """Names for the numbers that a site holds: theta[0, 1]; the site's own where it holds one."""
    return [f"{name}[{', '.join(map(str, place))}]" if place else name for place in np.ndindex(*shape)]


def innermost(fn: Any) -> Any:
    """A distribution without what makes events of its batch, or masks it."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _is_derived(site: dict[str, Any]) -> bool:
    """Whether a site is deterministic and of numbers that a person can read."""
    derived = site["type"] == "sample" and site["infer"].get("_deterministic")
    return bool(derived) and isinstance(site["value"], Tensor) and site["value"].numel() <= MOST


def _turn_of(site: dict[str, Any]) -> Tensor | None:
    """What turns an angle's values into radians; None where a site is no angle."""
    fn = innermost(site["fn"])
    if isinstance(fn, torch.distributions.VonMises):
        return torch.ones(())
    if site["infer"].get("periodic"):
        return 2 * math.pi / torch.as_tensor(fn.support.upper_bound - fn.support.lower_bound)
    return None
