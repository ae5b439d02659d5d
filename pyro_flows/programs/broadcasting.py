"""A model as a program that broadcasts: what objectives run where the model itself does not.

Its latents are the model's own but for those that are summed out, in the model's plates, so that any guide's trace can
be replayed; all of its density is one factor, which an engine computes.  So Pyro's ELBOs, which know nothing of
engines, train a guide under an outer plate of particles, whatever shapes the model uses.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
from pyro import poutine
from torch.distributions import constraints

from .engines import Values, plate_like
from .nesting import plates_of
from .program import Program


class Lifted:
    """A Pyro program with the density of a model.

    Args:
        model: The model.
        latents: Its latents, but those that are summed out.
    """

    def __init__(self, model: Program, latents: list[str]) -> None:
        self._model = model
        if model.enumerated:
            model.enumeration  # noqa: B018 - found once, for all copies that take other rows
        self._sites = {name: model.single.nodes[name] for name in latents}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Take the latents from a guide's trace, and add the model's log-density of each draw."""
        rows, plates = self._plates()
        values: Values = {}
        for name, site in self._sites.items():
            with ExitStack() as stack:
                for frame in plates_of(site):
                    stack.enter_context(plates[frame.name])
                shape = site["value"].shape
                batch = shape[: len(shape) - site["fn"].event_dim]
                flat = dist.ImproperUniform(constraints.real, batch, shape[len(batch) :])
                values[name] = pyro.sample(name, flat.mask(False))
        by_draw = [name for name, value in values.items() if value.dim() > self._sites[name]["value"].dim()]
        size = len(values[by_draw[0]]) if by_draw else 1
        held = {}
        for name, value in values.items():
            shape = self._sites[name]["value"].shape
            rows_of = value.reshape(len(value), *shape) if name in by_draw else value
            held[name] = rows_of.expand(size, *shape)  # some are the same for all draws
        log_prob = self._model.with_(rows=rows).log_prob(held, size)
        dims = max(value.dim() - self._sites[name]["fn"].event_dim for name, value in values.items())
        pyro.factor("_pyro_flows_log_density", log_prob.reshape(size, *(1,) * (dims - 1)) if by_draw else log_prob[0])

    def _plates(self) -> tuple[Values, dict[str, Any]]:
        """Return the rows of subsampled plates, and the plates that latents lie in."""
        plates, hidden = {}, self._model.given
        for frame in {frame for site in self._sites.values() for frame in plates_of(site)}:
            with poutine.block(hide=hidden):
                plates[frame.name] = plate_like(frame)
        for name, fn in self._model.subsamples.items():
            if name not in plates:
                plates[name] = pyro.plate(name, fn.size, fn.subsample_size)
        return {name: plates[name].indices for name in self._model.subsamples}, plates
