"""The annealed ELBO, for posteriors with separated modes: E_q [β log p(z, x) - log q(z)] while β rises to 1.

The ELBO hardly penalises a guide that covers one mode and misses the others, and its gradient at one mode has no
information about the rest.  The modes of a tempered posterior p^β overlap if β is small.  The guide first covers all of
it, and keeps its modes as β rises.

The weights of the modes change with β, but once the modes are separated no draw moves from one to another.  Therefore,
until well after β = 1, half of the loss is the standard deviation of log q - β log p over the draws.  It compares modes
at any distance, and vanishes, with its noise, if the guide is right.  The standard deviation, unlike the variance, has
a gradient whose size does not depend on the guide's error.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ..arguments import check_integers, check_numbers
from .base import ParticleObjective
from .path_gradient import PathGradient

# Shares of all steps: β begins to rise after the first, is 1 after the second; modes are compared until the third.
HOLD, RISEN, COMPARED = 0.05, 0.55, 0.9


class TemperedELBO(PathGradient, ParticleObjective):
    """The ELBO of a tempered posterior, so that a flow finds separated modes and their weights.

    The loss, in nats, for a power β that rises to 1::

        loss = E_q [log q(z) - β log p(z, x)]

    β stays at ``start`` for 5 % of the steps, then rises geometrically to 1 within the next half of them (Rezende,
    Mohamed 2015, arXiv:1505.05770).  During the first 90 % of the steps, half of the loss is the standard deviation of
    log q - β log p over the draws (Richter, Boustati, Nüsken, Ruiz, Akyildiz 2020, arXiv:2010.10436).  The last 10 %
    are steps of a plain :class:`PathELBO`.  The density is tempered in the space of the guide's draws, for an
    ``AutoFlow`` the unconstrained space.  ``fit_svi`` starts an ``AutoFlow`` from a Gaussian approximation of the
    tempered posterior.

    Each call with gradients enabled counts as a step, so use an object for one fit.  A step costs about 1.6 steps of a
    ``PathELBO``.  Latents must be reparameterised in the guide.

    Args:
        num_steps: The number of steps of the fit.
        start: β at the start, above 0 and at most 1.  Modes that are further apart need a smaller value.
        num_particles: The number of draws in each step, at least 2.
        max_plate_nesting: The number of dimensions that the model's plates take; found by a run by default.
        vectorize_particles: Whether all draws run at once.  The model must then broadcast to the left of its plates.

    Raises:
        ValueError: If a number is out of its range.  In use, naming the site: if a latent is missing from the guide or
            not reparameterised.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow, fit_svi
        >>> def model():  # x is near 4 or near -4
        ...     x = pyro.sample("x", dist.Normal(0.0, 5.0))
        ...     pyro.sample("y", dist.Normal(x**2, 1.0), obs=torch.tensor(16.0))
        >>> objective = TemperedELBO(10)
        >>> fit = fit_svi(model, AutoFlow(model), objective=objective, progress=False)
        >>> fit.steps, objective.beta
        (10, 1.0)
    """

    def __init__(
        self,
        num_steps: int,
        start: float = 0.05,
        num_particles: int = 256,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(num_particles, max_plate_nesting, vectorize_particles, least=2)
        check_integers("TemperedELBO", num_steps=num_steps)
        check_numbers("TemperedELBO", start=start)
        if not 0 < start <= 1:
            raise ValueError(f"TemperedELBO: start must be above 0 and at most 1, got {start}.")
        self.num_steps, self.start, self.step = num_steps, start, 0

    @property
    def beta(self) -> float:
        """The power of the posterior at the current step."""
        risen = (self.step / self.num_steps - HOLD) / (RISEN - HOLD)
        return self.start ** (1 - min(max(risen, 0.0), 1.0))

    @property
    def settled(self) -> bool:
        """True in the last steps, whose losses can be compared because they are plain ELBOs."""
        return self.step >= COMPARED * self.num_steps

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        beta, compares = self.beta, self.step < COMPARED * self.num_steps
        self.step += torch.is_grad_enabled()
        elbos, ratios = [], []
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            self._check_reparameterised(guide_trace)
            # The density of a guide's Delta is the change of variables from the space of its draws.
            change = self._log_density(guide_trace, dist.Delta)
            log_q = self._log_density(guide_trace) - change
            log_p = beta * (self._log_density(model_trace) - change)
            elbos.append(log_p - log_q)  # (rows,)
            if compares:
                held = self._score(guide, self._draws_of(guide_trace), args, kwargs)
                ratios.append(self._log_density(held) - self._log_density(held, dist.Delta) - log_p.detach())  # (rows,)
        loss = -torch.cat(elbos).mean()
        if not compares:
            return loss
        mixed = (loss + (torch.cat(ratios).var() + 1e-12).sqrt()) / 2  # because a root has no slope at 0
        return loss.detach() + mixed - mixed.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps taken."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the steps of a ``state_dict``."""
        self.step = state["step"]
