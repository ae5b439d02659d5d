"""The annealed ELBO, for posteriors with modes far apart: E_q [β log p(z, x) - log q(z)] while β rises to 1.

The ELBO forgives a guide that covers one mode and misses the others, and its gradient at one mode knows nothing of the
rest.  A tempered posterior p^β is wide enough for its modes to touch: the guide covers all of it, and keeps what it
covers as β rises.  The modes' shares change with β, though, and once they lie apart no draw moves from one to another.
So, until well after β = 1, half of the loss is the standard deviation of log q - β log p over the draws: it compares
modes directly, however far apart, and vanishes with its noise where the guide is right.

Annealing: Variational Inference with Normalizing Flows (Rezende, Mohamed 2015, arXiv:1505.05770).  The variance of the
log-ratio: VarGrad (Richter, Boustati, Nüsken, Ruiz, Akyildiz 2020, arXiv:2010.10436); its root makes the size of the
gradient independent of how far off the guide is.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ..arguments import check_integers, check_numbers
from .particles import ParticleObjective
from .path import PathGradient

# The shares of the steps after which β begins to rise, is 1, and modes are compared no more.
HOLD, RISEN, COMPARED = 0.05, 0.55, 0.9


class TemperedELBO(PathGradient, ParticleObjective):
    """An ELBO whose target is flattened at first, so that a flow finds modes that lie apart, and their shares.

    The loss, in nats, is that of a posterior to the power of β, which rises to 1::

        loss = E_q [log q(z) - β log p(z, x)]

    For a twentieth of the steps β stays at ``start``, then rises to 1, geometrically, in half of them (annealing:
    Rezende, Mohamed 2015, arXiv:1505.05770).  Until nine tenths, half of what is minimised is the standard deviation of
    log q - β log p over the draws, which compares modes however far apart (after Richter et al. 2020,
    arXiv:2010.10436); the last tenth are steps of a plain :class:`PathELBO`.  The density is flattened in the space in
    which the guide draws, for an ``AutoFlow`` the unconstrained one.  ``fit_svi`` lets an ``AutoFlow`` start from a
    Gaussian of the flattened posterior.

    Each call with gradients enabled counts as a step, so an object serves one fit.  A step costs about 1.6 times one of
    a ``PathELBO``.  Latents must be reparameterised in the guide.

    Args:
        num_steps: How many steps the fit takes.
        start: β at the start, above 0; the further the modes lie apart, the smaller.
        num_particles: The number of draws in each step, at least 2.
        max_plate_nesting: How many dimensions the plates of the model take; by default that is found out.
        vectorize_particles: Whether draws run side by side, for which the model must broadcast to the left of its
            plates.

    Raises:
        ValueError: If a number is out of its range; and in use, naming the site, if a latent is not in the guide or not
            reparameterised.

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

    least_particles = 2

    def __init__(
        self,
        num_steps: int,
        start: float = 0.05,
        num_particles: int = 256,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(num_particles, max_plate_nesting, vectorize_particles)
        check_integers("TemperedELBO", num_steps=num_steps)
        check_numbers("TemperedELBO", start=start)
        if not 0 < start <= 1:
            raise ValueError(f"TemperedELBO: start must lie above 0 and not above 1, got {start}.")
        self.num_steps, self.start, self.step = num_steps, start, 0

    @property
    def beta(self) -> float:
        """The power of the posterior at the present step."""
        risen = (self.step / self.num_steps - HOLD) / (RISEN - HOLD)
        return self.start ** (1 - min(max(risen, 0.0), 1.0))

    @property
    def settled(self) -> bool:
        """Whether β has been 1 for a while, so that losses can be compared."""
        return self.step >= COMPARED * self.num_steps

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        beta, compares = self.beta, self.step < COMPARED * self.num_steps
        self.step += torch.is_grad_enabled()
        elbos, ratios = [], []
        for model_trace, guide_trace in self._traces(model, guide, args, kwargs):
            self._check_reparameterised(guide_trace)
            # What a guide's Delta adds is the change of variables from the space in which it draws.
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
        mixed = (loss + (torch.cat(ratios).var() + 1e-12).sqrt()) / 2  # a root has no slope at 0
        return loss.detach() + mixed - mixed.detach()

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taken."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after as many steps as a :meth:`state_dict` tells of."""
        self.step = state["step"]
