"""Neural posterior estimation: one guide for the posteriors of all datasets, trained on simulations of the model.

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
from torch import Tensor

from ..arguments import (
    check_integers,
    check_program,
    is_integer,
    quoted,
)
from ..data.batches import Batch, divided
from ..encoders.training_record import recorded
from ..guides import AutoFlow, AutoPlateFlow
from ..guides.amortised import Packed
from ..guides.guide_call import Call
from ..guides.left_out import hidden_names
from ..programs.latents import named
from ..programs.plate_nesting import runs_programs
from ..programs.program import bound_values
from ..programs.simulations import Simulations, check_draws, check_given
from ..programs.simulator import Simulator
from ..training import Fit, Training, distributed
from ..training.checkpoint import Checkpoint, check_path, fingerprint
from ..user_code import warn_user
from .plate_rows import PlateRows
from .row_training import RowFit, checked, format_of, objective_of, train_on_rows
from .truncated import Observed, Truncated

CALLER = "fit_amortized"
NUMBERS = 10_000_000  # numbers of data from which encoders are standardised


@distributed.collective(CALLER)
@runs_programs
@recorded()
def fit_amortized(
    model: Callable[..., Any],
    guide: AutoFlow | AutoPlateFlow,
    *args: Any,
    num_simulations: int = 10_000,
    simulations: Simulations | None = None,
    datasets: Observed | tuple[int, int] | None = None,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float = 5e-3,
    training: Training | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Fit:
    """Train a guide with an encoder on data that the model itself simulates: q(latents | data) for any data.

    The model takes its data by arguments that are None by default, and then draws them: ``def model(x=None)`` with
    ``pyro.sample("x", ..., obs=x)``.  No likelihood is evaluated, so x may be the output of a simulator:
    ``pyro.sample("x", dist.Delta(simulator(theta), event_dim=1), obs=x)``.  The guide covers the latents that its model
    shows.  Nuisance latents can be hidden: ``AutoFlow(poutine.block(model, hide=["noise"]), encoder=...)``.

    The loss is a mean over simulations (Papamakarios, Murray 2016; Greenberg, Nonnenmacher, Macke 2019).  It is least
    if q is the posterior of each dataset::

        loss = -E log q(latents | data),    (latents, data) drawn from the model

    A hierarchy takes an ``AutoPlateFlow`` with an encoder of the rows of its plate and a ``global_encoder``.  One guide
    then serves datasets with any number of rows: each step sees a random part of the simulated rows.  The loss counts
    the latents outside of the plate, and of those inside the latents of one row::

        loss = -E [log q(g | data) + log q(l_i | data, g)],    row i at random

    The guide's fixed affine map standardises latents, and its Jacobian is part of the density.  ``Standardize`` layers
    standardise data; the encoders of ``pyro_flows.encoders`` begin with one.

    Afterwards ``guide.sample(n, x)`` samples the posterior of any data, and :func:`~pyro_flows.calibrate` tests its
    calibration.  ``resample(model, guide, x)`` weighs draws by the model's own likelihood, if it has one.
    ``fit_svi(model, guide.bind(x), x, steps=...)`` trains further on one dataset.

    Args:
        model: A Pyro model whose data arguments are None by default.
        guide: An ``AutoFlow`` of it with an encoder, or an ``AutoPlateFlow`` with a ``global_encoder`` too.
        *args: The model's arguments without the data.
        num_simulations: The number of simulations to draw, at least 20.
        simulations: Existing simulations in their place, such as those of :func:`~pyro_flows.simulate`.
        datasets: The datasets that the guide shall serve; by default all that the model draws.  For one dataset,
            :class:`~pyro_flows.fitting.Observed` draws simulations near it, in rounds.  For an ``AutoPlateFlow``, the
            smallest and the largest number of rows, ``(least, most)``, by default from 1 to all rows of a simulation.
            The guide warns if it is used for other numbers.  Tensors among the arguments whose first dimension has one
            entry for each simulated row are cut to the rows of a step.
        max_epochs: The largest number of passes through the simulations in a round; the step size falls to zero by
            then.  By default 200, and fewer beyond 10,000 simulations.
        batch_size: The number of simulations per step; by default 256, or 64 hierarchies, and fewer if there are few.
            Several processes share them, and also the simulations to draw.
        lr: The largest step size.
        training: Further options, such as ``Training(patience=5)``: see :class:`~pyro_flows.training.Training`.  Its
            objective is that of latents, ``objective(flow, z, context)`` for each flow of the guide.
            ``objectives.FlowMatching()`` with a continuous flow, ``AutoFlow(model, flow=flows.cnf, encoder=...)``, is
            flow matching posterior estimation (Dax et al. 2023, arXiv:2305.17161).
        checkpoint: A file for the state of the run, from which the same call resumes, as for :func:`fit_svi`.  The
            simulations are kept in a second file, in the same folder.
        progress: Whether to show a progress bar.
        **kwargs: The model's keyword arguments.

    Returns:
        The :class:`~pyro_flows.Fit` of the last round.  Its losses are -log q(latents | data), in nats of the model's
        latents, or values of the objective.  The guide is left in evaluation mode, at its best averaged state.

    Raises:
        TypeError: If ``model`` is a guide, or ``simulations`` are of another class.
        ValueError: If an argument is out of its range, the guide has no encoder, the model cannot be simulated, as for
            :func:`~pyro_flows.simulate`, its draws are constant or not finite, or the checkpoint is of another run; the
            error names the argument or site.
        FloatingPointError: If the loss or gradients stay non-finite.

    Warns:
        UserWarning: If the model has discrete latents.  Their posterior is not learned, and that of the others is
            marginal over them.

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
    check_integers(CALLER, 20, num_simulations=num_simulations)
    most = 1 if max_epochs is None else max_epochs
    training = checked(CALLER, training, max_epochs=most, batch_size=batch_size, lr=lr, progress=progress)
    check_program(model=model, guide=guide)
    _check_guide(guide, datasets)
    observed = datasets if isinstance(datasets, Observed) else None
    rounds = observed.rounds if observed else 1
    file = check_path(CALLER, "checkpoint", checkpoint, f".{rounds}.simulations" if observed else ".simulations")
    simulator = Simulator(CALLER, model, args, kwargs)
    _check_data(simulator, simulations, observed)
    given = distributed.broadcast(lambda: simulations)  # each process may have drawn its own
    data = fingerprint((*bound_values(model, args, kwargs), *(observed.data.values() if observed else ())))
    parts, total = list[Simulations](), num_simulations if given is None else len(given)
    for number in range(rounds):
        size = total * (number + 1) // rounds - total * number // rounds
        part = file.with_name(f"{file.name}.{number + 1}") if file and observed else file
        draw = functools.partial(_draw, simulator, guide, observed if parts else None, size)
        settings = {"steps": 0, "data": data, "number": size}
        parts.append(given or _kept(part, draw, settings))
        known = functools.reduce(Simulations.join, parts)
        epochs = max_epochs or max(10, round(200 * min(1.0, math.sqrt(10_000 / len(known)))))
        rows = _rows(simulator, guide, known, datasets, training, batch_size)
        fit = train_on_rows(rows, training, max_epochs=epochs, lr=lr, checkpoint=part, progress=progress)
        if fit.stopped == "interrupted":
            break
    return fit


def _check_guide(guide: Any, datasets: Any) -> None:
    """Raise ValueError for a guide that is not amortised, or datasets that suit only another guide."""
    if not (isinstance(guide, AutoFlow | AutoPlateFlow) and guide.is_amortised):
        got = f"{type(guide).__name__}{' without one' if isinstance(guide, AutoFlow) else ', which fit_svi trains'}"
        if isinstance(guide, AutoPlateFlow):
            got += " without a global_encoder. Give both, AutoPlateFlow(..., encoder=..., global_encoder=...)"
        raise ValueError(
            f"{CALLER}: the guide must be an AutoFlow with an encoder, AutoFlow(model, encoder=...), got {got}."
        )
    if datasets is None or isinstance(datasets, Observed):
        wanted, fits = "a pair (least, most) for an AutoPlateFlow", datasets is None or isinstance(guide, AutoFlow)
    else:
        wanted = "Observed({'x': x}) for an AutoFlow, and integers (least, most) of at least 1 for an AutoPlateFlow"
        pair = isinstance(datasets, tuple | list) and len(datasets) == 2 and all(is_integer(n, 1) for n in datasets)
        fits = isinstance(guide, AutoPlateFlow) and pair and datasets[0] <= datasets[1]
    if not fits:
        got = f"got {quoted(datasets)} for {type(guide).__name__}"
        raise ValueError(f"{CALLER}: datasets must be {wanted}, {got}. Give datasets=(1, 20), for example.")


def _check_data(simulator: Simulator, simulations: Any, observed: Observed | None) -> None:
    """Raise an error unless existing simulations, or data of interest, fit the model, and only one of them is given."""
    if simulations is not None:
        check_given(CALLER, simulations, simulator.sites)
        if observed:
            raise ValueError(f"{CALLER}: give either simulations or Observed(...), which draws its own.")
    if observed:
        if simulator.vectorize == "loop":
            raise ValueError(f"{CALLER}: Observed draws many latents at once; give another vectorize.")
        simulator.check_data("observed", observed.data)


def _draw(simulator: Simulator, guide: AutoFlow, observed: Observed | None, size: int) -> Simulations:
    """Draw simulations, a part in each process; if data are observed, with latents from the truncated prior."""
    truncated = Truncated(simulator, guide, observed.data) if observed else None
    number = -(-size // distributed.size())

    def own() -> Simulations:
        return simulator.draw(number, truncated.draw(number) if truncated else None)

    distributed.seed()
    parts = distributed.all_gather(own)
    distributed.sync()
    return functools.reduce(Simulations.join, parts).take(slice(size))


def _kept(file: Path | None, draw: Callable[[], Simulations], settings: dict[str, Any]) -> Simulations:
    """Return the simulations that are kept with a checkpoint, or draw and keep them."""
    beside = Checkpoint(CALLER, file and file.with_name(f"{file.name}.simulations"), settings)
    kept = beside.read()
    if kept is not None:
        return Simulations(kept["latents"], kept["data"])
    new = draw()
    beside.save({"latents": new.latents, "data": new.data})
    return new


def _rows(
    simulator: Simulator,
    guide: AutoFlow | AutoPlateFlow,
    known: Simulations,
    datasets: Any,
    training: Training,
    size: int | None,
) -> RowFit:
    """Return the fit to simulations, with a share held out.

    A batch holds the indices of some simulations, ``(N, 1)``.
    """
    packed = _standardise(simulator, guide, known)
    objective = objective_of(training)
    in_nats = getattr(objective, "in_nats", False)
    plate_rows: PlateRows | None = None
    if isinstance(guide, AutoPlateFlow):
        plate_rows = PlateRows(CALLER, simulator, guide, datasets)
        guide.row_range = plate_rows.least, plate_rows.most
        size = size or min(64, max(1, len(known) // 20))

    def loss(batch: Batch) -> Tensor:
        index = batch[0][:, 0]
        data, part = known.take(index).data, [(z[index], log_det[index]) for z, log_det in packed]
        args, kwargs = simulator.arguments(data)
        if plate_rows is not None:
            args, kwargs, part = plate_rows.some(data, part)
        terms = []
        for flow, z, context, log_det in guide.scored(part, *args, **kwargs):
            found = objective(flow, z, context)
            terms.append(found - log_det.mean() if in_nats else found)
        return sum(terms[1:], terms[0])

    indices = torch.arange(len(known)).unsqueeze(-1), None
    train, judge = divided(indices, training.share or 0.0, size)
    marks = {
        "data": fingerprint((*(z for z, _ in packed), *known.data.values())),
        "datasets": repr(datasets) if isinstance(guide, AutoPlateFlow) else "",
    }
    words = "the guide's density of simulated latents"
    return RowFit(CALLER, guide, train, judge, loss, marks, diagnose=lambda: words, show=format_of(objective))


def _standardise(simulator: Simulator, guide: AutoFlow | AutoPlateFlow, simulations: Simulations) -> Packed:
    """Set up and standardise the guide; return the packed latents and log|det| of the packing."""
    for name, value in simulations.data.items():
        check_draws(CALLER, "data argument", name, value)
    args, kwargs = simulator.arguments(simulations.row(0))
    guide.setup(*args, **kwargs)
    for name, _ in guide.prototype_trace.iter_stochastic_nodes():
        if name not in simulations.latents:
            raise ValueError(f"{CALLER}: latent site {name!r} of the guide is not drawn by the model without data.")
        check_draws(CALLER, "latent site", name, simulations.latents[name])
    args, kwargs = simulator.arguments(simulations.row(1))
    guide.check_same(Call(CALLER, simulator.model.call, args, kwargs, guide.prototype_trace, guide.row_plates))
    with torch.no_grad():
        packed = guide.packed(simulations.latents)
        flat = [z.flatten(0, -2) for z, _ in packed]
        for packing, vectors in zip(guide.packings.values(), flat, strict=True):
            for name, column in zip(packing.coordinates, vectors.T, strict=True):
                if bad := int((~column.isfinite()).sum()):
                    raise ValueError(
                        f"{CALLER}: latent site {name!r} has {bad} of {len(column)} draws at an end of its support."
                    )
                check_draws(CALLER, "latent site", name, column)
        if guide.is_fresh:
            _warn_of_discrete(guide, hidden_names(guide.model) - {*simulator.sites.values()})
            guide.start_at_draws(flat)
            some = simulations.take(slice(max(20, NUMBERS // simulations.numbers)))
            args, kwargs = simulator.arguments(some.data)
            guide.initialize_encoders(Call(CALLER, simulator.model.call, args, kwargs))
    return packed


def _warn_of_discrete(guide: AutoFlow | AutoPlateFlow, names: set[str]) -> None:
    """Warn of discrete latents of the model, which a flow cannot represent."""
    if names:
        fault = f"the posterior of discrete latents is not learned, here {named(sorted(names))}"
        hidden = f"{type(guide).__name__}(poutine.block(model, hide={sorted(names)}), ...)"
        warn_user(f"{CALLER}: {fault}. That of the other latents is marginal over them. To silence this: {hidden}.")
