"""A model as a program that broadcasts: the program that objectives run if the model itself does not broadcast.

Its latents are the model's latents except those that are summed out, in the model's plates, so that any guide's trace
can be replayed.  All of its density is one factor, which an engine computes.  So Pyro's ELBOs, which do not know
engines, train a guide under an outer plate of particles, whatever shapes the model uses.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
from pyro import poutine
from torch.distributions import constraints

from .engines import Site, Values, plate_like
from .nesting import plates_of
from .program import Program


class Lifted:
    """A Pyro program with the density of a model.

    Args:
        model: The model.
        latents: The names of its latents except those that are summed out.
    """

    def __init__(self, model: Program, latents: list[str]) -> None:
        self._model = model
        if model.enumerated:
            model.enumeration  # noqa: B018 - found once, for all copies that take other rows
        self._sites = {name: model.single.nodes[name] for name in latents}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Take the latents from a guide's trace, and add the model's log-density of each draw."""
        rows, plates = self._plates()
        values = {name: self._sample(name, site, plates) for name, site in self._sites.items()}
        shapes = {name: site["value"].shape for name, site in self._sites.items()}
        by_draw = [len(value) for name, value in values.items() if value.dim() > len(shapes[name])]
        size = by_draw[0] if by_draw else 1
        held = {name: value.reshape(-1, *shapes[name]).expand(size, *shapes[name]) for name, value in values.items()}
        log_prob = self._model.with_rows(rows).log_prob(held, size)
        dims = max(value.dim() - self._sites[name]["fn"].event_dim for name, value in values.items())
        pyro.factor("_pyro_flows_log_density", log_prob.reshape(size, *(1,) * (dims - 1)) if by_draw else log_prob[0])

    def _sample(self, name: str, site: Site, plates: dict[str, Any]) -> Any:
        with ExitStack() as stack:
            for frame in plates_of(site):
                stack.enter_context(plates[frame.name])
            shape = site["value"].shape
            depth = len(shape) - site["fn"].event_dim
            return pyro.sample(name, dist.ImproperUniform(constraints.real, shape[:depth], shape[depth:]).mask(False))

    def _plates(self) -> tuple[Values, dict[str, Any]]:
        """Return the rows of subsampled plates, and the plates that latents lie in."""
        plates: dict[str, Any] = {}
        for frame in {frame for site in self._sites.values() for frame in plates_of(site)}:
            with poutine.block(hide=self._model.given):
                plates[frame.name] = plate_like(frame)
        for name, fn in self._model.subsamples.items():
            if name not in plates:
                plates[name] = pyro.plate(name, fn.size, fn.subsample_size)
        return {name: plates[name].indices for name in self._model.subsamples}, plates
