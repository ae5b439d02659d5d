"""Neural posterior estimation: one guide for the posteriors of all datasets, trained on simulations of the model.

Minimises the expected forward KL, E_p(x) KL(p(θ | x) ‖ q(θ | x)) = -E_p(θ, x) log q(θ | x) + const, which needs no
likelihood.  Fast ε-free Inference of Simulation Models with Bayesian Conditional Density Estimation (Papamakarios,
Murray 2016, arXiv:1605.06376); Automatic Posterior Transformation (Greenberg, Nonnenmacher, Macke 2019,
arXiv:1905.07488).

Rounds for one dataset truncate the prior to the region of the guide's posterior: θ ~ p(θ) given log q(θ | x) > τ.  All
but a share ε of the guide's own draws exceed the threshold τ.  Within the region the draws follow the prior, so they
are training data like all others.  Truncated proposals for scalable and hassle-free simulation-based inference
(Deistler, Goncalves, Macke 2022, arXiv:2210.04815).
"""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_integers, check_kind, check_program, check_tensors, is_integer, quoted
from ..data.batches import Batch, divided
from ..encoders.training_record import recorded
from ..guides import AutoFlow, AutoPlateFlow
from ..guides.amortised import LatentPrior, Packed
from ..guides.guide_call import Call, frame_of
from ..guides.left_out import hidden_names
from ..programs.engines import in_batches
from ..programs.program import bound_values, runs_programs
from ..programs.simulator import Simulations, Simulator, check_draws
from ..programs.sites import Values, named
from ..training import Fit, Training, distributed
from ..training.checkpoint import Checkpoint, fingerprint
from ..user_code import warn_user
from .row_training import RowTraining

EPSILON = 1e-4


@dataclass(frozen=True)
class Observed:
    """Data of interest, near which ``fit_amortized`` draws its simulations.

    Later rounds draw latents from the prior truncated to the region of the guide's posterior of the data: truncated
    sequential neural posterior estimation (Deistler, Goncalves, Macke 2022, arXiv:2210.04815).

    Args:
        data: The data, by the names of the model's arguments.
        rounds: The number of rounds, at least 2, which share the simulations.

    Raises:
        TypeError: If the data are no tensors by name.
        ValueError: If there are fewer rounds.

    Example::

        >>> Observed({"x": torch.zeros(3)}, rounds=3).rounds
        3
    """

    data: dict[str, Tensor]
    rounds: int = 2

    def __post_init__(self) -> None:
        check_tensors("Observed", "data", self.data)
        check_integers("Observed", 2, rounds=self.rounds)


class Truncated:
    """Truncated prior of the latents.

    Args:
        simulator: The model.
        guide: A guide trained on it.
        observed: The data, by the model's arguments.
    """

    @torch.no_grad()
    def __init__(self, simulator: Simulator, guide: AutoFlow, observed: dict[str, Tensor]) -> None:
        self.guide = guide
        self.names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
        self.prior, self.given = LatentPrior(simulator, self.names), simulator.arguments(observed)
        own = self._log_q(guide.sample(10_000, *self.given[0], **self.given[1]))
        self.threshold = distributed.broadcast(lambda: torch.quantile(own, EPSILON).cpu()).to(own.device)

    @torch.no_grad()
    def draw(self, number: int, batch_size: int = 10_000) -> dict[str, Tensor]:
        """Draw ``number`` values of each latent of the guide, and of each latent before it that the guide hides.

        They are drawn from the prior by rejection.  If less than one in a thousand is kept, they are resampled from
        draws of the guide.
        """
        kept: list[dict[str, Tensor]] = []
        tried = found = 0
        while found < number and (tried < 10 * batch_size or found > tried / 1000):
            values, _ = self.prior.run(batch_size)
            inside = self._log_q(values) > self.threshold
            kept.append({name: value[inside] for name, value in values.items()})
            tried, found = tried + batch_size, found + int(inside.sum())
        if found >= number:
            return {name: torch.cat([values[name] for values in kept])[:number] for name in kept[0]}
        if hidden := kept[0].keys() - set(self.names):
            raise ValueError(
                "fit_amortized: too few of the prior's draws are near the posterior of observed to draw anew the "
                f"latent site {min(hidden)!r}, which the guide does not show. Use one that shows it, or all datasets."
            )
        return self._resampled(number)

    def _resampled(self, number: int, each: int = 1024) -> dict[str, Tensor]:
        """Draw from many draws of the guide in the region, with probabilities in proportion to prior / guide."""

        def step(_: Values, rows: int) -> Values:
            values = self.guide.sample(rows * each, *self.given[0], **self.given[1])
            log_q = self._log_q(values)
            _, log_p = self.prior.run(rows * each, values)
            weights = (log_p - log_q).where(log_q > self.threshold, -torch.inf).reshape(rows, each)
            weights = weights.where(weights.isfinite().any(1, keepdim=True), 0.0)
            first = each * torch.arange(rows, device=weights.device)
            picked = torch.distributions.Categorical(logits=weights).sample() + first
            return {name: values[name][picked] for name in self.names}

        return in_batches(step, {}, number, 100)

    def _log_q(self, values: dict[str, Tensor]) -> Tensor:
        return self.guide.log_prob(values, *self.given[0], **self.given[1])


CALLER = "fit_amortized"
NUMBERS = 10_000_000  # numbers of data from which encoders are standardised


@distributed.collective(CALLER)
@runs_programs
@recorded()
def fit_amortized(
    model: Callable[..., Any],
    guide: AutoFlow | AutoPlateFlow,
    *args: Any,
    simulations: int | Simulations = 10_000,
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
        simulations: The number of simulations to draw, at least 20; or existing ones in their place, such as those of
            :func:`~pyro_flows.simulate`.
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
        TypeError: If ``model`` is a guide, or ``simulations`` are neither a number nor of their class.
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
        >>> fit = fit_amortized(model, guide, simulations=200, max_epochs=2, progress=False)
        >>> guide.sample(5, torch.tensor([1.0, -1.0]))["theta"].shape
        torch.Size([5, 2])
    """
    check_program(model=model, guide=guide)
    _check_guide(guide, datasets)
    observed = datasets if isinstance(datasets, Observed) else None
    rounds, most = observed.rounds if observed else 1, 1 if max_epochs is None else max_epochs
    ends = f".{rounds}.simulations" if observed else ".simulations"
    run = RowTraining(CALLER, training, most, batch_size, lr, checkpoint, progress, ends=ends)
    simulator = Simulator(CALLER, model, args, kwargs)
    _check_simulations(simulations, simulator, observed)
    if observed:
        if simulator.vectorize == "loop":
            raise ValueError(f"{CALLER}: Observed draws many latents at once; give another vectorize.")
        simulator.check_data("observed", observed.data)
    data = fingerprint((*bound_values(model, args, kwargs), *(observed.data.values() if observed else ())))
    file, parts = run.file, list[Simulations]()
    for number in range(rounds):
        if file and observed:
            run.file = file.with_name(f"{file.name}.{number + 1}")
        if isinstance(simulations, Simulations):
            parts.append(distributed.broadcast(lambda: simulations))  # each process may have drawn its own
        else:
            size = simulations * (number + 1) // rounds - simulations * number // rounds
            parts.append(_drawn(simulator, guide, observed if parts else None, run.file, data, size))
        known = functools.reduce(Simulations.join, parts)
        run.epochs = max_epochs or max(10, round(200 * min(1.0, math.sqrt(10_000 / len(known)))))
        fit = _train(run, simulator, guide, known, datasets, batch_size)
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


def _check_simulations(simulations: Any, simulator: Simulator, observed: Observed | None) -> None:
    """Raise an error unless simulations are a number of them, or fit the model and no data are observed."""
    words = "a number, a pf.Simulations(latents, data), or the result of pf.simulate(model)"
    check_kind(CALLER, (Integral, Simulations), words, simulations=simulations)
    if not isinstance(simulations, Simulations):
        check_integers(CALLER, 20, simulations=simulations)
        return
    if simulations.data.keys() != simulator.sites.keys() or len(simulations) < 20:
        must = f"simulations must hold at least 20 draws of the data arguments {sorted(simulator.sites)}"
        raise ValueError(f"{CALLER}: {must}, got {len(simulations)} of {sorted(simulations.data)}.")
    if observed:
        raise ValueError(f"{CALLER}: give either simulations or Observed(...), which draws its own.")


def _drawn(
    simulator: Simulator, guide: AutoFlow, observed: Observed | None, file: Path | None, data: list[str], size: int
) -> Simulations:
    """Return the simulations that are kept with a checkpoint, or draw and keep them, a part in each process.

    If data are observed, latents are drawn from the truncated prior.
    """
    settings = {"steps": 0, "data": data, "number": size}
    beside = Checkpoint(CALLER, file and file.with_name(f"{file.name}.simulations"), settings)
    if (kept := beside.read()) is not None:
        return Simulations(kept["latents"], kept["data"])
    truncated = Truncated(simulator, guide, observed.data) if observed else None
    number = -(-size // distributed.size())
    distributed.seed()
    parts = distributed.all_gather(lambda: simulator.draw(number, truncated.draw(number) if truncated else None))
    distributed.sync()
    new = functools.reduce(Simulations.join, parts).take(slice(size))
    beside.save({"latents": new.latents, "data": new.data})
    return new


def _train(
    run: RowTraining,
    simulator: Simulator,
    guide: AutoFlow | AutoPlateFlow,
    known: Simulations,
    datasets: Any,
    size: int | None,
) -> Fit:
    """Train on simulations, with a share held out; a batch holds the indices of some simulations, ``(N, 1)``."""
    packed, plate_rows = _standardise(simulator, guide, known), None
    if isinstance(guide, AutoPlateFlow):
        plate_rows = PlateRows(CALLER, simulator, guide, datasets)
        guide.row_range = plate_rows.numbers
        size = size or min(64, max(1, len(known) // 20))

    def loss(batch: Batch) -> Tensor:
        index = batch[0][:, 0]
        data, part = known.take(index).data, [(z[index], log_det[index]) for z, log_det in packed]
        args, kwargs = simulator.arguments(data)
        if plate_rows:
            args, kwargs, part = plate_rows.some(data, part)
        terms = []
        for flow, z, context, log_det in guide.scored(part, *args, **kwargs):
            found = run.objective(flow, z, context)
            terms.append(found - log_det.mean() if run.in_nats else found)
        return sum(terms[1:], terms[0])

    rows = divided((torch.arange(len(known)).unsqueeze(-1), None), run.training.share or 0.0, size)
    data = fingerprint((*(z for z, _ in packed), *known.data.values()))
    marks = {"data": data, "datasets": repr(datasets) if plate_rows else ""}
    return run.fit(guide, rows, loss, lambda: "the guide's density of simulated latents", marks)


class PlateRows:
    """The rows of the guide's plate in simulated datasets; each step of training sees some of them.

    Rows of a plate are independent given the latents outside, so rows that nobody sees change nothing: a random part of
    them is a dataset of the same model.  One set of simulations thus serves to train a guide for any number of rows.

    Args:
        caller: The name of the public function, for errors.
        simulator: The model.
        guide: The guide, set up.
        numbers: The smallest and the largest number of rows in a step; by default any.

    Raises:
        ValueError: If there are more rows than in the simulations, or data outside of the plate have as many entries as
            the plate has rows.
    """

    def __init__(
        self, caller: str, simulator: Simulator, guide: AutoPlateFlow, numbers: tuple[int, int] | None
    ) -> None:
        packing, nodes = guide.posterior.blocks[-1].packing, simulator.model.single.nodes
        self.simulator, self.axis = simulator, packing.dims[0]
        self.full: int = frame_of(nodes[next(iter(packing.parts))], guide.plate).size
        self.axes: dict[str, int] = {}
        for argument, site in simulator.sites.items():
            if frame := frame_of(nodes[site], guide.plate):
                self.axes[argument] = frame.dim - nodes[site]["fn"].event_dim
            elif self.full in nodes[site]["value"].shape:
                fault = f"data argument {argument!r} has {self.full} entries, as many as plate {guide.plate!r} has rows"
                way = "Draw it inside of the plate if it belongs to the rows, or simulate another number of rows"
                raise ValueError(f"{caller}: {fault}, but is drawn outside of the plate. {way}.")
        self.numbers = numbers or (1, self.full)
        if self.numbers[1] > self.full:
            wanted = f"(least, most), from 1 to the {self.full} rows of plate {guide.plate!r} in the simulations"
            raise ValueError(f"{caller}: datasets must be {wanted}, got {quoted(numbers)}. Simulate more rows.")

    def some(self, data: dict[str, Tensor], packed: Packed) -> tuple[tuple[Any, ...], dict[str, Any], Packed]:
        """Return the arguments and the latents of datasets with a random number of their rows, the same rows in all.

        Small numbers are as frequent as large ones on the scale of their logarithm.

        Args:
            data: The data of N datasets, by the names of the model's arguments.
            packed: Their latents.
        """
        least, most = self.numbers
        low, high = math.log(least), math.log(most + 1)
        number = min(most, int(math.exp(low + (high - low) * float(torch.rand(())))))
        rows = torch.randperm(self.full)[:number]

        def take(value: Tensor, axis: int) -> Tensor:
            return value.index_select(axis, rows.to(value.device))

        data = {name: take(value, self.axes[name]) if name in self.axes else value for name, value in data.items()}
        given = {n: v for n, v in self.simulator.given.items() if isinstance(v, Tensor) and v.dim()}
        fixed = {name: take(value, 0) for name, value in given.items() if len(value) == self.full}
        shared, (z, log_det) = packed
        args, kwargs = self.simulator.arguments({**fixed, **data})
        return args, kwargs, [shared, (take(z, self.axis - 1), take(log_det, self.axis))]


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
            if names := sorted(hidden_names(guide.model) - {*simulator.sites.values()}):
                fault = f"the posterior of discrete latents is not learned, here {named(names)}"
                hidden = f"{type(guide).__name__}(poutine.block(model, hide={names}), ...)"
                words = "That of the other latents is marginal over them. To silence this"
                warn_user(f"{CALLER}: {fault}. {words}: {hidden}.")
            guide.start_at_draws(flat)
            some = simulations.take(slice(max(20, NUMBERS // simulations.numbers)))
            args, kwargs = simulator.arguments(some.data)
            guide.initialize_encoders(Call(CALLER, simulator.model.call, args, kwargs))
    return packed
