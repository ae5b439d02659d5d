"""Neural posterior estimation: one flow that answers for all data sets, trained on simulations from the model itself.

Minimises the expected forward KL, E_p(x) KL(p(θ | x) ‖ q(θ | x)) = -E_p(θ, x) log q(θ | x) + const, which needs no
likelihood.  Fast ε-free Inference of Simulation Models with Bayesian Conditional Density Estimation (Papamakarios,
Murray 2016, arXiv:1605.06376); Automatic Posterior Transformation (Greenberg, Nonnenmacher, Macke 2019,
arXiv:1905.07488).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checks import check_choice, check_integers, check_numbers, joined
from ..guides import AutoFlow
from ..objectives import Likelihood
from ..programs.nesting import takes_nesting
from ..programs.simulations import Simulations, check_given
from ..programs.simulator import Simulator
from ..training import checkpoint as checkpoints
from ..training import processes
from ..training.attempts import Attempts, check_path
from ..training.loop import Fit
from ..training.losses import checked
from .inspect import fingerprint
from .simulated import train
from .truncated import Truncated


@processes.together
@takes_nesting
def fit_amortized(
    model: Callable[..., Any],
    guide: AutoFlow,
    *args: Any,
    num_simulations: int = 10_000,
    simulations: Simulations | None = None,
    rounds: int = 1,
    observed: dict[str, Tensor] | None = None,
    objective: nn.Module | None = None,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float = 2e-3,
    clip_norm: float = 5.0,
    held_out: float = 0.1,
    patience: int = 20,
    vectorize: str = "auto",
    simulation_batch_size: int = 10_000,
    on_nonfinite: str = "skip",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    max_plate_nesting: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Fit:
    """Train a guide with an encoder on data that the model itself simulates: q(latents | data) for any data.

    The model takes its data by arguments that are None by default, and draws them where they are: ``def model(x=None)``
    with ``pyro.sample("x", ..., obs=x)``.  No likelihood is evaluated, so x may be what a simulator returns:
    ``pyro.sample("x", dist.Delta(simulator(theta), event_dim=1), obs=x)``.  The guide covers the latents that its model
    shows; nuisance latents can be hidden from it: ``AutoFlow(poutine.block(model, hide=["noise"]), encoder=...)``.

    The loss is a mean over simulations (Papamakarios, Murray 2016, arXiv:1605.06376; Greenberg, Nonnenmacher, Macke
    2019, arXiv:1905.07488), and least where q is the posterior of each data set::

        loss = -E log q(latents | data),    (latents, data) drawn from the model

    Latents are standardised by the guide's fixed affine map, whose Jacobian is part of the density, and data by each
    ``Standardize`` in the encoder, which those of ``pyro_flows.encoders`` begin with.

    Afterwards ``guide.sample(n, x)`` answers for any data, :func:`~pyro_flows.calibrate` says whether the answers are
    calibrated, ``resample(model, guide, x)`` weighs draws against the model's own likelihood where it has one, and
    ``fit_svi(model, guide.bind(x), x, steps=...)`` goes on for one data set.

    Args:
        model: A Pyro model whose data arguments are None by default.
        guide: An ``AutoFlow`` of it with an encoder.
        *args: The model's arguments without the data.
        num_simulations: How many simulations to draw, in all rounds together, at least 20.
        simulations: Simulations made before, such as by :func:`~pyro_flows.simulate`, in place of those of one round.
        rounds: With more than one, those after the first draw latents from the prior cut off to where the guide's
            posterior of ``observed`` has its mass, so that simulations serve that data set: truncated sequential neural
            posterior estimation (Deistler, Goncalves, Macke 2022, arXiv:2210.04815).
        observed: The data of interest, by the names of the model's arguments; for more than one round.
        objective: The loss of latents, ``objective(guide.flow, z, context)``, by default ``objectives.Likelihood()``.
            With ``objectives.FlowMatching()`` and a continuous flow, ``AutoFlow(model, flow=flows.cnf, encoder=...)``,
            this is flow matching posterior estimation (Dax et al. 2023, arXiv:2305.17161).
        max_epochs: How often to go through the simulations in a round; the step size falls to zero by then.  By default
            200, and fewer beyond 10,000 simulations.
        batch_size: How many simulations to take in each step; by default 256, and fewer where there are few.  Several
            processes share them, as they do the simulations to draw.
        lr: The largest step size.
        clip_norm: The largest norm of a gradient.
        held_out: The share of the simulations that are not trained on and judge the states.
        patience: After how many epochs without an improvement on these to stop.
        vectorize: The way to run many draws: ``"plate"``, ``"vmap"`` or ``"loop"``; by default the first of these that
            does to draws what single runs do (*Any Pyro program* in the docs).
        simulation_batch_size: How many run at once.
        on_nonfinite: ``"skip"`` passes over steps whose loss or gradient is not finite, and ends with an error when
            there are 100 in a row; ``"raise"`` ends at the first.
        checkpoint: A file for the state of the run, from which the same call goes on, as for :func:`fit_svi`; the
            simulations are kept beside it.
        progress: Whether to show a progress bar.
        max_plate_nesting: How many dimensions the model's plates take; by default what one run shows.
        model_kwargs: Keyword arguments of the model whose names clash with those above.
        **kwargs: The model's other keyword arguments.

    Returns:
        The :class:`~pyro_flows.Fit` of the (last) round; its losses are -log q(latents | data), in nats of the latents
        as the model has them, or what the objective says.  The guide is left, in evaluation mode, at its best averaged
        state.

    Raises:
        TypeError: If ``objective`` is no module of rows.
        ValueError: If an argument is out of its range, the guide has no encoder, the model cannot be simulated, as for
            :func:`~pyro_flows.simulate`, what it draws is constant or not finite, or the checkpoint is of another run;
            the error names the argument or site.
        FloatingPointError: If the loss or gradients stay non-finite.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow
        >>> from pyro_flows.encoders import MLPEncoder
        >>> def model(x=None):
        ...     theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1).to_event(1))
        ...     return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)
        >>> guide = AutoFlow(model, encoder=MLPEncoder(2, context_dim=8))
        >>> fit = fit_amortized(model, guide, num_simulations=200, max_epochs=2, progress=False)
        >>> guide.sample(5, torch.tensor([1.0, -1.0]))["theta"].shape
        torch.Size([5, 2])
    """
    kwargs = joined("fit_amortized", kwargs, model_kwargs)
    check_integers("fit_amortized", 20, num_simulations=num_simulations)
    check_integers("fit_amortized", rounds=rounds, patience=patience, simulation_batch_size=simulation_batch_size)
    check_integers("fit_amortized", optional=True, max_epochs=max_epochs, batch_size=batch_size)
    _check(guide, held_out)
    loss = checked("fit_amortized", objective, Likelihood)
    check_numbers("fit_amortized", above=0, lr=lr, clip_norm=clip_norm)
    check_choice("fit_amortized", ("skip", "raise"), on_nonfinite=on_nonfinite)
    ends = f".{rounds}.simulations" if rounds > 1 else ".simulations"
    file = check_path("fit_amortized", "checkpoint", checkpoint, ends)
    simulator = Simulator("fit_amortized", model, args, kwargs)
    if (rounds > 1 or observed) and (observed is None or observed.keys() != simulator.sites.keys()):
        raise ValueError(
            f"fit_amortized: rounds={rounds} needs observed={{{', '.join(f'{n!r}: ...' for n in simulator.sites)}}}, "
            f"the data to draw simulations for, got {observed!r:.100}."
        )
    if rounds > 1 and vectorize == "loop":
        raise ValueError(
            f"fit_amortized: rounds={rounds} draws many latents for each that it keeps, all at once; it needs "
            "another vectorize."
        )
    for name, value in (observed or {}).items():
        shape = simulator.model.single.nodes[simulator.sites[name]]["value"].shape
        if value.shape != shape:
            raise ValueError(
                f"fit_amortized: observed[{name!r}] must be one data set of shape {tuple(shape)}, got "
                f"{tuple(value.shape)}."
            )
    if simulations is not None:
        given = simulations
        simulations = processes.first(lambda: given)  # each may have drawn its own
        check_given("fit_amortized", simulations, simulator.sites, rounds)
        num_simulations = len(simulations)
    sizes = [num_simulations * (r + 1) // rounds - num_simulations * r // rounds for r in range(rounds)]
    known: Simulations | None = None
    for number, size in enumerate(sizes, 1):
        part = file.with_name(f"{file.name}.{number}") if file and rounds > 1 else file

        def draw(size: int = size, known: Simulations | None = known) -> Simulations:
            truncated = Truncated(simulator, guide, observed) if known is not None and observed else None

            def own() -> Simulations:
                number = -(-size // processes.size())
                latents = truncated.draw(number) if truncated else None
                return simulator.draw(number, latents, batch_size=simulation_batch_size, vectorize=vectorize)

            processes.apart()
            parts = processes.each(own)
            processes.as_one()
            return functools.reduce(Simulations.join, parts).take(slice(size)) if parts[1:] else parts[0]

        key = {"data": fingerprint((*args, *kwargs.values(), *(observed or {}).values())), "number": size}
        new = simulations or (draw() if part is None else _kept(part, draw, key))
        known = new if known is None else known.join(new)
        fit = train(
            simulator,
            guide,
            known,
            loss,
            max_epochs=max_epochs,
            batch_size=batch_size,
            lr=lr,
            clip_norm=clip_norm,
            share=held_out,
            patience=patience,
            on_nonfinite=on_nonfinite,
            checkpoint=part,
            progress=progress,
        )
        if fit.stopped == "interrupted":
            break
    return fit


def _kept(file: Path, draw: Callable[[], Simulations], settings: dict[str, Any]) -> Simulations:
    """The simulations beside a checkpoint, drawn and put there where there are none."""
    beside = file.with_name(f"{file.name}.simulations")
    kept = checkpoints.read(beside, {"steps": 0, **settings}, "fit_amortized")
    if kept is not None:
        return Simulations(kept["latents"], kept["data"])
    new, attempts = draw(), Attempts("fit_amortized", "checkpoint", beside)
    state = {"settings": {"steps": 0, **settings}, "latents": new.latents, "data": new.data}
    attempts.note(checkpoints.write(beside, state))
    return new


def _check(guide: Any, held_out: float) -> None:
    """Raise one clear error that names the argument and its value."""
    if not isinstance(guide, AutoFlow) or guide.encoder is None:
        raise ValueError(
            "fit_amortized: the guide must be an AutoFlow with an encoder, AutoFlow(model, encoder=...), got "
            f"{type(guide).__name__}{' without one' if isinstance(guide, AutoFlow) else ', which fit_svi trains'}."
        )
    check_numbers("fit_amortized", above=0, below=1, held_out=held_out)
