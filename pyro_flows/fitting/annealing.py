"""Modes and evidence of a posterior, by a population annealed from the prior and a guide that covers its modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide import AutoGuide

from ..arguments import check_flags, check_integers, check_program
from ..guides import AutoFlow
from ..programs import Program
from ..programs.density import Density
from ..programs.model_and_guide import Task
from ..programs.plate_nesting import runs_programs
from ..sampling.annealed_population import ISLANDS
from ..training.loop import Fit
from .mode_covering import Annealed, cover
from .propriety import check_proper
from .svi import fit_svi

CALLER = "anneal"


@runs_programs
def anneal(
    model: Callable[..., Any],
    *args: Any,
    num_particles: int = 2048,
    fit: bool = True,
    progress: bool = True,
    **kwargs: Any,
) -> Annealed:
    """Find the modes of a posterior, their weights, and the evidence.

    Particles start as draws of the prior, or of a wide Gaussian if the prior is flat.  They are annealed to the
    posterior p(z | x) in steps of temperature (Del Moral, Doucet, Jasra 2006)::

        r(z)¹⁻ᵝ p(z, x)ᵝ,    β from 0 to 1

    At each temperature they are weighted, resampled on 16 islands, and moved by Hamiltonian Monte Carlo with adaptive
    steps.  Places whose climbs end at one connected top are one mode.  Then an :class:`AutoFlow` is built over a base
    with these modes, and fitted to the particles and by the ELBO.

    Args:
        model: A Pyro model; discrete latents of finite support are summed out.
        *args: The model's arguments.
        num_particles: The number of particles, rounded up to a multiple of 16; more particles find smaller modes.
        fit: Whether to fit a guide.  Without one the evidence of a centred hierarchy may be several standard errors too
            low, since particles enter the neck of a funnel slowly.
        progress: Whether to show the progress bars of the fit.
        **kwargs: The model's keyword arguments.

    Returns:
        The :class:`~pyro_flows.fitting.Annealed`.

    Raises:
        TypeError: If a guide is given.
        ValueError: If a number is out of its range, ``AutoFlow`` refuses the model, or hardly a draw of the prior has a
            density.  If the posterior is detectably improper; the error names the sites.

    Warns:
        UserWarning: If the model runs one draw at a time, or its log-density is a visibly noisy estimate.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> pyro.set_rng_seed(0)
        >>> found = anneal(model, torch.tensor(2.0), num_particles=512, fit=False)
        >>> abs(found.log_evidence + 2.27) < 5 * found.log_evidence_se  # log Normal(2; 0, 2**0.5)
        True
    """
    check_integers(CALLER, ISLANDS * 4, num_particles=num_particles)
    check_flags(CALLER, fit=fit, progress=progress)
    check_program(model=model)
    if guides := [type(value).__name__ for value in args if isinstance(value, AutoGuide)]:
        must = f"the arguments after the model must be the model's own, got a guide, {guides[0]}"
        raise TypeError(f"{CALLER}: {must}. Leave it out: {CALLER}(model, ...) builds its own guide.")
    program = Program(model, kwargs=kwargs)
    guide = AutoFlow(program).setup(*args)

    def fit_once(guide: AutoFlow, **settings: Any) -> Fit:
        return fit_svi(program, guide, *args, progress=progress, **settings)

    task = Task(program, guide, args, {})
    check_proper(CALLER, Density(task), guide.start[0])
    return cover(task, num_particles, fit_once if fit else None)
