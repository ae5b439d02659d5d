"""Refinement: short Markov chains that move a guide's draws towards the posterior, many chains at once."""

from dataclasses import dataclass
from typing import Any

import pyro
from torch import Tensor

from ..arguments import check_integers
from ..programs.checks import check_trained
from ..programs.density import Density
from ..programs.model_and_guide import Task
from ..programs.program import Function, runs_programs
from ..sampling.chains import MOVES, Chains
from ..user_code import warn_user
from .drift import Drift, DriftMeter
from .findings import worst_moment
from .guide_space import guide_coordinates
from .unreached import check_reach


@dataclass(frozen=True)
class Refined:
    """Draws moved by short chains: the result of :func:`~pyro_flows.refine`.

    Attributes:
        draws: Refined draws of latents and deterministic sites: name -> ``(num_samples, *site_shape)``.
        acceptance: The mean acceptance of the last transition, between 0 and 1, in each set of coordinates.
        drift: The guide's errors for each of K quantities, estimated by the chains.  ``error`` is the error of the mean
            in standard deviations of the posterior, ``ratio`` the guide's standard deviation over the posterior's;
            ``error_se`` and ``ratio_se`` are their standard errors, each ``(K,)``.
        names: The names of the K quantities, element by element.

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
        largest = worst_moment(self.drift, self.names).moment
        return f"Refined({size} draws, acceptance={accepted}; the guide's own: {largest})"


@runs_programs
def refine(
    model: Function, guide: Function, *args: Any, num_samples: int = 1000, transitions: int = 20, **kwargs: Any
) -> Refined:
    """Move draws of any Pyro guide towards the posterior, at a fraction of the cost of training.

    Many short Hamiltonian Monte Carlo chains start from the draws.  They move in the guide's base coordinates, where
    the posterior of a good guide is nearly normal, and in whitened coordinates (Hoffman et al. 2019, arXiv:1903.03704;
    Ruiz, Titsias 2019, arXiv:1905.04062).  Errors that need long chains remain, above all missing modes.
    :func:`~pyro_flows.sample` runs chains until they have converged.

    Args:
        model: A Pyro model; discrete latents that the guide lacks are summed out.
        guide: A trained guide of the same latents.  Chains mix fastest for an ``AutoContinuous``, which has a base.
        *args: The model's arguments.
        num_samples: The number of draws.  Each is the end of a separate chain, so they are independent.
        transitions: The number of moves of each chain in all coordinates, at least 4.  Step sizes are adapted in the
            first quarter.
        **kwargs: The model's keyword arguments.

    Returns:
        The :class:`~pyro_flows.diagnostics.Refined`.

    Raises:
        ValueError: If a number is out of its range.  If the guide is untrained, is a point, belongs to another model or
            has no density at its draws, or if its support leaves out more than 1 % of the posterior's mass.  If the
            model has a subsampled plate, or a discrete latent of infinite support that the guide lacks.

    Warns:
        UserWarning: If the chains hardly move, the model runs one draw at a time, or its log-density is an estimate
            with visible noise.

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
    check_integers("refine", num_samples=num_samples)
    check_integers("refine", 4, transitions=transitions)
    check_trained("refine", guide)
    task = Task(model, guide, args, kwargs)
    with pyro.validation_enabled(False):  # because chains reject points without a density
        space = Density.sound(task)
        check_reach("refine", space.task)
        reference = space.draw(max(2000, 10 * space.dim))
        charts, _ = guide_coordinates(space, reference.z)
        began = space.draw(num_samples)
        meter = DriftMeter(reference.quantities, began.quantities)
        chains = Chains(space.log_prob, charts, began.z)
        for transition in range(transitions):
            chains.sweep(adapt=transition < transitions // 4)
            if transition >= transitions // 2:
                meter.record(space.quantities(chains.z))
        draws, acceptance = space.values(chains.z), chains.acceptance
    if max(acceptance) < MOVES.frozen:
        warn_user(
            f"refine: the chains hardly move (acceptance {max(acceptance):.2f}), so the draws are still the guide's. "
            "Check that the gradient of the model's density is finite."
        )
    return Refined(draws, acceptance, meter.drift(), space.read.names)
