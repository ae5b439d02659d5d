"""The call of a guide as a value: which guide answers, for which model, and with which arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Transform, biject_to

from ..programs.traces import trace_at


class Call(NamedTuple):
    """The call of a guide.

    Attributes:
        owner: The class of the guide, or a function that calls it, for errors.
        model: The model; None for a guide that was saved.
        args: The model's arguments.
        kwargs: Its keyword arguments.
        prototype: A trace of the model, with the latents that the guide was built for.
        plate: The plate whose rows have a flow of their own, if there is one.
    """

    owner: str
    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prototype: Any = None
    plate: str | None = None

    @property
    def latents(self) -> dict[str, dict[str, Any]]:
        """The latent sites of the prototype, by name."""
        return dict(self.prototype.iter_stochastic_nodes())

    @property
    def start(self) -> dict[str, Tensor]:
        """The values of the prototype's latents."""
        return {name: site["value"].detach() for name, site in self.latents.items()}

    @property
    def transforms(self) -> dict[str, Transform]:
        """The maps from real numbers onto the supports of the prototype's latents."""
        return {name: biject_to(site["fn"].support) for name, site in self.latents.items()}

    def trace_at(self, values: dict[str, Tensor]) -> Trace:
        """Return the trace of a run of the model with some sites held at values, as :func:`trace_at` does."""
        return trace_at(self.model, values, self.args, self.kwargs)

    @contextmanager
    def same_draws(self) -> Iterator[None]:
        """Leave the random numbers as they are, those of the latents' devices included."""
        devices = {value.device.index for value in self.start.values() if value.device.type == "cuda"}
        with torch.random.fork_rng(devices):
            yield
