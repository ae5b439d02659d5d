"""Draws that are better than the guide's own: moved towards the posterior by short Markov chains, many at once.

The chains start from the guide's draws and move in the coordinates of its base, in which a good guide's posterior is
nearly a normal, and in whitened ones.  What few transitions do not reach, a mode that the guide misses above all, they
do not mend.  NeuTra (Hoffman et al. 2019, arXiv:1903.03704); A Contrastive Divergence for Combining Variational
Inference and MCMC (Ruiz, Titsias 2019, arXiv:1905.04062).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from ..arguments import check_integers, joined
from ..programs.latent_space import sound_space
from ..programs.log_density import or_nan
from ..programs.nesting import runs_programs
from ..programs.task import Task, check_trained
from ..sampling.chains import FROZEN, Chains
from ..sampling.coordinates import guide_coordinates
from .drift import Drift, DriftMeter

BATCH = 500  # chains that run at once


@dataclass(frozen=True)
class Refined:
    """Draws that short chains have moved: the result of :func:`~pyro_flows.refine`.

    Attributes:
        draws: Refined draws of latents and deterministic sites: name -> ``(num_samples, *site_shape)``.
        acceptance: The mean acceptance of the last transition, between 0 and 1, in each of the coordinates.
        drift: The guide's errors, for each of K quantities, as the chains see them: ``error``, that of the mean in
            standard deviations of the posterior, and ``ratio``, the guide's standard deviation over the posterior's,
            with the standard errors ``error_se`` and ``ratio_se``, each ``(K,)``.
        names: The names of the K quantities, number by number.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> found = refine(model, model, num_samples=100, transitions=4)
        >>> found.draws["x"].shape, found.names, found.drift.error.shape
        (torch.Size([100, 2]), ['x[0]', 'x[1]'], torch.Size([2]))
    """

    draws: dict[str, Tensor]
    acceptance: list[float]
    drift: Drift
    names: list[str]

    def __repr__(self) -> str:
        accepted = ", ".join(f"{value:.2f}" for value in self.acceptance)
        size = len(next(iter(self.draws.values())))
        return f"Refined({size} draws, acceptance={accepted}; the guide's own: {self.drift.worst(self.names).moment})"


@runs_programs
def refine(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    transitions: int = 20,
    vectorize: str = "auto",
    max_plate_nesting: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Refined:
    """Move draws of any Pyro guide towards the posterior, for a fraction of the cost of training.

    Short Markov chains (Hamiltonian Monte Carlo) start from them, many at once, and move in the coordinates of the
    guide's base and in whitened ones (Hoffman et al. 2019, arXiv:1903.03704; Ruiz, Titsias 2019, arXiv:1905.04062).
    What few transitions do not reach, a mode that the guide misses above all, they do not mend.  This is the short form
    of :func:`~pyro_flows.sample`, whose chains run until they have converged.

    Args:
        model: A Pyro model; discrete latents that the guide lacks are summed out.
        guide: A trained guide of the same latents: best an ``AutoContinuous``, whose base makes chains move fast.
        *args: The model's arguments.
        num_samples: The number of draws, each the end of a chain of its own, so that they are independent.
        transitions: How often each chain moves, in all coordinates, at least 4.  Step sizes are adapted in the first
            quarter.
        vectorize: The way to run many draws: ``"plate"``, ``"vmap"`` or ``"loop"``; by default the first of these that
            does to draws what single runs do (*Any Pyro program* in the docs).
        max_plate_nesting: How many dimensions the plates of model and guide take; by default what one run shows.
        model_kwargs: Keyword arguments of the model whose names clash with those above.
        **kwargs: The model's other keyword arguments.

    Returns:
        The :class:`~pyro_flows.diagnostics.Refined`.

    Raises:
        ValueError: If a number is out of its range; if the guide was never trained, is a point, of another model, or
            has no density over its draws; or if a discrete latent of infinite support is left to the model, or a plate
            is subsampled.

    Warns:
        UserWarning: If the chains hardly move, the model runs one draw at a time, or its log-density is an estimate
            whose noise shows.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> def narrow():
        ...     pyro.sample("x", dist.Normal(0.5, 0.5))
        >>> draws = refine(model, narrow, num_samples=4000).draws["x"]
        >>> bool(draws.mean().abs() < 0.1), bool((draws.std() - 1).abs() < 0.1)
        (True, True)
    """
    kwargs = joined("refine", kwargs, model_kwargs)
    check_integers("refine", num_samples=num_samples)
    check_integers("refine", 4, transitions=transitions)
    check_trained("refine", guide)
    with pyro.validation_enabled(False):  # a draw of no density is for the chains to shun
        space = sound_space(Task(model, guide, args, kwargs, vectorize))
        reference = space.draw(max(4 * BATCH, 10 * space.dim))
        charts, _ = guide_coordinates(space, reference.z)
        began = space.draw(num_samples)
        meter = DriftMeter(reference.quantities, began.quantities)
        batches = [Chains(or_nan(space.log_p), charts, z) for z in began.z.split(BATCH)]
        for transition in range(transitions):
            for chains in batches:
                chains.sweep(adapt=transition < transitions // 4)
            if transition >= transitions // 2:
                meter.record(torch.cat([space.quantities(chains.z) for chains in batches]))
        ends = [space.values(chains.z) for chains in batches]
    draws = {name: torch.cat([values[name] for values in ends]) for name in ends[0]}
    acceptance = batches[-1].acceptance
    if max(acceptance) < FROZEN:
        warnings.warn(
            f"refine: the chains hardly move (acceptance {max(acceptance):.2f}), and the draws are the guide's own. "
            "Is the gradient of the model's density finite?",
            stacklevel=3,
        )
    return Refined(draws, acceptance, meter.drift(), space.read.names)
