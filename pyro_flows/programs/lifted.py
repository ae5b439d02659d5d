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
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from .engines import Site, Values, plate_like
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
                for frame in site["cond_indep_stack"]:
                    if frame.vectorized:
                        stack.enter_context(plates[frame.name])
                shape = site["value"].shape
                batch = shape[: len(shape) - site["fn"].event_dim]
                flat = dist.ImproperUniform(constraints.real, batch, shape[len(batch) :])
                values[name] = pyro.sample(name, flat.mask(False))
        extra = {name: value.dim() - self._sites[name]["value"].dim() for name, value in values.items()}
        model = self._model.with_(rows=rows)
        dims = max(value.dim() - self._sites[name]["fn"].event_dim for name, value in values.items())
        if not any(extra.values()):
            log_prob = model.log_prob({name: value.unsqueeze(0) for name, value in values.items()}, 1)[0]
        else:
            size = next(values[name].shape[0] for name, more in extra.items() if more)
            held = {name: _by_draw(self._sites[name], value, size) for name, value in values.items()}
            log_prob = model.log_prob(held, size).reshape(size, *(1,) * (dims - 1))
        pyro.factor("_pyro_flows_log_density", log_prob)

    def _plates(self) -> tuple[Values, dict[str, Any]]:
        """Return the rows of subsampled plates, and the plates that latents lie in."""
        plates, hidden = {}, self._model.given
        for frame in {f for site in self._sites.values() for f in site["cond_indep_stack"] if f.vectorized}:
            with poutine.block(hide=hidden):
                plates[frame.name] = plate_like(frame)
        for name, fn in self._model.subsamples.items():
            if name not in plates:
                plates[name] = pyro.plate(name, fn.size, fn.subsample_size)
        return {name: plates[name].indices for name in self._model.subsamples}, plates


def _by_draw(site: Site, value: Tensor, size: int) -> Tensor:
    """Return a latent's values as ``(size, *site_shape)``, expanded if they are the same for all draws."""
    shape = site["value"].shape
    if value.dim() > len(shape):
        return value.reshape(size, *shape) if len(value) == size else value.reshape(1, *shape).expand(size, *shape)
    return value.expand(size, *torch.Size(shape))
