"""The posteriors of many datasets by one amortised guide: contexts, draws, and their coordinates in the flow's base."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..encoders.base import at_rest
from ..guides import AutoFlow
from ..programs.engines import Values
from ..programs.quantities import labels_of
from ..programs.simulator import Simulator
from ..transforms.base import chained


class Amortised:
    """An amortised guide as a distribution of packed, unconstrained latents z = T(u; context of the data).

    All calls of the guide by the checks of one observation are here.

    Args:
        caller: The name of the public function, for errors.
        guide: An ``AutoFlow`` with an encoder.
        simulator: Its model.

    Attributes:
        sites: The latent sites of the guide.
        names: The names of the K numbers of the latents.

    Raises:
        ValueError: If the guide has no encoder or was never trained.
    """

    def __init__(self, caller: str, guide: Any, simulator: Simulator) -> None:
        if not isinstance(guide, AutoFlow) or guide.encoder is None:
            kind = type(guide).__name__ + (" without an encoder" if isinstance(guide, AutoFlow) else "")
            raise ValueError(f"{caller}: guide must be an AutoFlow with an encoder, got {kind}.")
        if guide.prototype_trace is None:
            raise ValueError(f"{caller}: the guide was never trained. Fit it first: fit_amortized(model, guide).")
        self.guide, self.simulator = guide, simulator
        latents = dict(guide.prototype_trace.iter_stochastic_nodes())
        self.sites = list(latents)
        self.names = [label for name in latents for label in labels_of(name, latents[name]["value"].shape)]

    def contexts(self, data: dict[str, Tensor]) -> Tensor:
        """Return the contexts of N datasets, ``(N, context_dim)``."""
        args, kwargs = self.simulator.arguments(data)
        with at_rest(self.guide.encoder):
            return cast(Tensor, self.guide.context(*args, **kwargs))

    def base(self, *shape: int, wide: float = 1.0) -> tuple[Tensor, Tensor]:
        """Sample the flow's base, scaled by ``wide``; return draws ``(*shape, D)`` and their log-density."""
        base = self.guide.flow.base()
        u = base.sample(shape)
        return wide * u, base.log_prob(u)

    def place(self, u: Tensor, contexts: Tensor) -> Tensor:
        """Map base coordinates ``(*batch, D)`` to latents, given contexts that broadcast with them."""
        posterior = self.guide.flow(contexts)
        return chained(posterior.runs, u, posterior.context)[0]

    def coordinates(self, z: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the base coordinates of latents, ``(*batch, D)``, and log|det du/dz|, ``(*batch)`` in nats."""
        posterior = self.guide.flow(contexts)
        return chained(posterior.runs, z, posterior.context, inverse=True)

    def log_prob(self, z: Tensor, contexts: Tensor, wide: float = 1.0) -> Tensor:
        """Return the log-density of latents, ``(*batch)``, with the base scaled by ``wide``, up to a constant."""
        u, log_det = self.coordinates(z, contexts)
        found: Tensor = self.guide.flow.base().log_prob(u / wide) + log_det
        return found

    def values(self, z: Tensor) -> Values:
        """Return the values of the sites, ``(*batch, *site_shape)``."""
        return self.guide.unpack(z)

    def pack(self, values: Values) -> tuple[Tensor, Tensor]:
        """Return the latents ``(*batch, D)`` of values, and log|det dz/dvalues| in nats."""
        return self.guide.pack({name: values[name] for name in self.sites})

    def numbers(self, z: Tensor) -> Tensor:
        """Return the numbers of the sites as columns, ``(*batch, K)``."""
        values, batch = self.values(z), z.shape[:-1]
        return torch.cat([values[name].reshape(*batch, -1) for name in self.sites], -1)

    @property
    def width(self) -> int:
        """The number D of packed latents."""
        return int(self.guide.latent_dim)

    @property
    def is_bounded(self) -> bool:
        """True if the base has angles, whose draws cannot be scaled."""
        return self.guide.has_circles
