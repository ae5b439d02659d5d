"""Neural posterior estimation: one flow that answers for all data sets, trained on simulations from the model itself.

Minimises the expected forward KL, E_p(x) KL(p(θ | x) ‖ q(θ | x)) = -E_p(θ, x) log q(θ | x) + const, which needs no
likelihood.  Fast ε-free Inference of Simulation Models with Bayesian Conditional Density Estimation (Papamakarios,
Murray 2016, arXiv:1605.06376); Automatic Posterior Transformation (Greenberg, Nonnenmacher, Macke 2019,
arXiv:1905.07488).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_choice, check_integers, check_numbers, joined
from ..data.batches import Batch, Rows, suited_size, sum_of
from ..guides import AutoFlow
from ..guides.encoding import initialize
from ..guides.guide_call import Call
from ..objectives import Likelihood
from ..programs.nesting import runs_programs
from ..programs.simulations import Simulations, check_draws, check_given
from ..programs.simulator import Simulator
from ..training import checkpoint as checkpoints
from ..training import distributed
from ..training.loop import Fit
from ..training.losses import checked, shown
from ..training.output_files import Attempts, check_path
from .program_checks import fingerprint
from .row_training import train_on_rows
from .truncated import Truncated

CALLER = "fit_amortized"


@distributed.collective
@runs_programs
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
    kwargs = joined(CALLER, kwargs, model_kwargs)
    check_integers(CALLER, 20, num_simulations=num_simulations)
    check_integers(CALLER, rounds=rounds, patience=patience, simulation_batch_size=simulation_batch_size)
    check_integers(CALLER, optional=True, max_epochs=max_epochs, batch_size=batch_size)
    if not isinstance(guide, AutoFlow) or guide.encoder is None:
        raise ValueError(
            f"{CALLER}: the guide must be an AutoFlow with an encoder, AutoFlow(model, encoder=...), got "
            f"{type(guide).__name__}{' without one' if isinstance(guide, AutoFlow) else ', which fit_svi trains'}."
        )
    check_numbers(CALLER, above=0, below=1, held_out=held_out)
    loss = checked(CALLER, objective, Likelihood)
    check_numbers(CALLER, above=0, lr=lr, clip_norm=clip_norm)
    check_choice(CALLER, ("skip", "raise"), on_nonfinite=on_nonfinite)
    ends = f".{rounds}.simulations" if rounds > 1 else ".simulations"
    file = check_path(CALLER, "checkpoint", checkpoint, ends)
    simulator = Simulator(CALLER, model, args, kwargs)
    _check_rounds(simulator, rounds, observed, vectorize)
    if simulations is not None:
        given = simulations
        simulations = distributed.broadcast(lambda: given)  # each may have drawn its own
        check_given(CALLER, simulations, simulator.sites, rounds)
        num_simulations = len(simulations)
    known: Simulations | None = None
    for number in range(rounds):
        size = num_simulations * (number + 1) // rounds - num_simulations * number // rounds
        part = file.with_name(f"{file.name}.{number + 1}") if file and rounds > 1 else file

        def draw(size: int = size, first: bool = known is None) -> Simulations:
            truncated = None if first or not observed else Truncated(simulator, guide, observed)

            def own() -> Simulations:
                number = -(-size // distributed.size())
                latents = truncated.draw(number) if truncated else None
                return simulator.draw(number, latents, batch_size=simulation_batch_size, vectorize=vectorize)

            distributed.seed()
            parts = distributed.all_gather(own)
            distributed.sync()
            return functools.reduce(Simulations.join, parts).take(slice(size))

        key = {"data": fingerprint((*args, *kwargs.values(), *(observed or {}).values())), "number": size}
        new = simulations or _kept(part, draw, {"steps": 0, **key})
        known = known.join(new) if known else new
        rows = _Rows(simulator, guide, known, loss, held_out, batch_size)
        fit = train_on_rows(
            guide,
            [parameter for parameter in guide.parameters() if parameter.requires_grad],
            rows.source,
            rows.loss,
            rows.loss_held_out,
            max_epochs=max_epochs or max(10, round(200 * min(1.0, math.sqrt(10_000 / len(known))))),
            patience=patience,
            lr=lr,
            clip_norm=clip_norm,
            on_nonfinite=on_nonfinite,
            progress=progress,
            diagnose=lambda: "the guide's density of simulated latents",
            checkpoint=part,
            settings={"data": rows.mark, "batch_size": rows.source.epochs.size, "objective": repr(loss)},
            show=shown(loss),
            caller=CALLER,
        )
        if fit.stopped == "interrupted":
            break
    return fit


def _check_rounds(simulator: Simulator, rounds: int, observed: dict[str, Tensor] | None, vectorize: str) -> None:
    """Refuse data to draw simulations for that are missing, or not those of one data set."""
    if (rounds > 1 or observed) and (observed is None or observed.keys() != simulator.sites.keys()):
        raise ValueError(
            f"{CALLER}: rounds={rounds} needs observed={{{', '.join(f'{n!r}: ...' for n in simulator.sites)}}}, "
            f"the data to draw simulations for, got {observed!r:.100}."
        )
    if rounds > 1 and vectorize == "loop":
        raise ValueError(f"{CALLER}: rounds={rounds} draws many latents at once; it needs another vectorize.")
    for name, value in (observed or {}).items():
        shape = simulator.model.single.nodes[simulator.sites[name]]["value"].shape
        if value.shape != shape:
            raise ValueError(f"{CALLER}: observed[{name!r}] must have shape {tuple(shape)}, got {tuple(value.shape)}.")


def _kept(file: Path | None, draw: Callable[[], Simulations], settings: dict[str, Any]) -> Simulations:
    """Return the simulations beside a checkpoint, drawn and put there where there are none."""
    if file is None:
        return draw()
    beside = file.with_name(f"{file.name}.simulations")
    kept = checkpoints.read(beside, settings, CALLER)
    if kept is not None:
        return Simulations(kept["latents"], kept["data"])
    new = draw()
    state = {"settings": settings, "latents": new.latents, "data": new.data}
    Attempts(CALLER, "checkpoint", beside).note(checkpoints.write(beside, state))
    return new


class _Rows:
    """Simulations in batches, with latents and data standardised, a share of which is held out; and their loss."""

    def __init__(
        self,
        simulator: Simulator,
        guide: AutoFlow,
        simulations: Simulations,
        objective: nn.Module,
        share: float,
        batch_size: int | None,
    ) -> None:
        self._simulator, self._guide, self._objective = simulator, guide, objective
        # Those of others may come in an order; the same one each time, so that a run goes on with the same held out.
        order = torch.randperm(len(simulations), generator=torch.Generator().manual_seed(0))
        self._simulations = simulations.take(order)
        self._z, self._log_det = _standardise(simulator, guide, self._simulations)
        self.mark = fingerprint((self._z, *self._simulations.data.values()))
        number = max(1, len(order) - math.ceil(share * len(order)))
        train, judge = torch.arange(len(order)).unsqueeze(-1).tensor_split([number])
        self.source, self._judge = Rows(train, None, suited_size(number, batch_size)), Rows(judge, None)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch: the numbers of some simulations, ``(N, 1)``."""
        index = batch[0][:, 0]
        args, kwargs = self._simulator.arguments(self._simulations.take(index).data)
        context = self._guide.context(*args, **kwargs)
        if context is None or context.shape[:-1] != index.shape:
            shape = None if context is None else tuple(context.shape)
            raise ValueError(f"{CALLER}: the encoder must return shape ({len(index)}, context_dim), got {shape}.")
        loss = self._objective(self._guide.flow, self._z[index], context)
        return loss - self._log_det[index].mean() if getattr(self._objective, "in_nats", False) else loss

    def loss_held_out(self, _: int) -> float:
        """Return the mean loss of the simulations held out."""
        return sum_of(self.loss, self._judge) / len(self._judge.x)


def _standardise(simulator: Simulator, guide: AutoFlow, simulations: Simulations) -> tuple[Tensor, Tensor]:
    """Set the guide up and standardise; return the packed latents ``(N, latent_dim)`` and log|det| of the packing."""
    for name, value in simulations.data.items():
        check_draws(CALLER, "data argument", name, value)
    args, kwargs = simulator.arguments(simulations.row(0))
    guide.setup(*args, **kwargs)
    for name, _ in guide.prototype_trace.iter_stochastic_nodes():
        if name not in simulations.latents:
            raise ValueError(f"{CALLER}: latent site {name!r} of the guide is not drawn by the model without data.")
        check_draws(CALLER, "latent site", name, simulations.latents[name])
    args, kwargs = simulator.arguments(simulations.row(1))
    guide.check_same(Call(CALLER, simulator.model.call, args, kwargs, guide.prototype_trace))
    with torch.no_grad():
        z, log_det = guide.pack(simulations.latents)
        for name, column in zip(guide.coordinates, z.T, strict=True):
            if bad := int((~column.isfinite()).sum()):
                raise ValueError(
                    f"{CALLER}: latent site {name!r} has {bad} of {len(z)} draws at an end of its support."
                )
            check_draws(CALLER, "latent site", name, column)
        if guide.is_fresh:
            guide.start_at(z.median(0).values, torch.diag(_spread(z)))
            args, kwargs = simulator.arguments(simulations.data)
            initialize(Call(CALLER, simulator.model.call, args, kwargs), guide.encoder)
    return z, log_det


def _spread(z: Tensor) -> Tensor:
    """The standard deviation of each column, from its quartiles, which heavy tails leave alone, where they differ."""
    quarter = max(1, len(z) // 4)
    width = z.kthvalue(len(z) - quarter, 0).values - z.kthvalue(quarter, 0).values
    return torch.where(width > 0, width / 1.349, z.std(0))
