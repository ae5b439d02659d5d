"""Neural likelihood estimation: the density of a simulator's output, learned from simulations, for any Pyro model.

Maximises E log q(x | θ) over parameters θ of a proposal and their simulations x.  Sequential Neural Likelihood
(Papamakarios, Sterratt, Murray 2018, arXiv:1805.07226), in one round.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..arguments import check_integers, is_integer, quoted, suggests_keywords
from ..data.batches import Batch, divided
from ..data.columns import spikes_of, tied_columns
from ..data.row_statistics import warn_of_ties
from ..data.table import as_table, listed
from ..encoders import Standardize
from ..flows import Flow
from ..flows.mixed import Mixed
from ..guides.default_flows import built, likelihood_flow
from ..programs.simulations import check_draws
from ..training import Training, distributed
from ..training.checkpoint import Checkpoint, check_path, design, fingerprint
from ..user_code import warn_user
from .initialization import start
from .row_training import RowFit, checked, objective_of, train_on_rows

CALLER = "fit_likelihood"
SIMULATE = 10_000  # parameters to simulate at once
MOST = 1000  # categories of an entry


@distributed.collective
@suggests_keywords
def fit_likelihood(
    simulator: Callable[[Tensor], Tensor] | None = None,
    prior: Distribution | None = None,
    *,
    num_simulations: int = 10_000,
    simulations: tuple[Tensor, Tensor] | None = None,
    flow: Callable[[int, int], Flow] | None = None,
    discrete: Sequence[int] = (),
    positive: Sequence[int] = (),
    max_epochs: int = 50,
    batch_size: int | None = None,
    lr: float = 1e-2,
    training: Training | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Flow | Mixed:
    """Learn the likelihood of a simulator, and return it as a conditional distribution for any Pyro model.

    The loss is a mean over simulations, least if q is the likelihood at each parameter that the prior draws::

        loss = -E log q(x | θ),    θ ~ prior,  x ~ simulator(θ)

    The likelihood then stands in a model as any other distribution does, also in plates and with other sites around it:
    ``pyro.sample("x", likelihood(theta), obs=x)``, with ``theta`` of shape ``(*batch, P)``.  Use single trials as rows:
    a plate multiplies them, and errors of their density add up over the rows.

    The prior here is where simulations are spent; the model may have another.  Outside of the region that it covers the
    likelihood is an extrapolation, so choose it wider than any posterior.

    Args:
        simulator: A function from parameters ``(N, P)`` to one draw of data for each, ``(N, D)`` or ``(N,)``.
        prior: The distribution of the parameters, of event shape ``(P,)``; independent parameters may be a batch.
        num_simulations: The number N of simulations, at least 20.
        simulations: Existing parameters ``(N, P)`` and data ``(N, D)``, in place of ``simulator`` and ``prior``.
        flow: A recipe, called with the number of entries that are not discrete and with the width of the context, such
            as ``flows.nsf``.  By default autoregressive splines, and then an affine map that depends on the parameters;
            its matrix is triangular for two to four such entries.
        discrete: The entries of x that are categories 0, 1, …, by index.
        positive: The entries of x that are positive, such as durations, by index.
        max_epochs: The largest number of passes through the simulations; the step size falls to zero by then.
        batch_size: The number of simulations per step; by default 256, and fewer if there are few.
        lr: The largest step size.
        training: Further options, such as ``Training(patience=5)``: see :class:`~pyro_flows.training.Training`.
        checkpoint: A file for the state of the run, from which the same call resumes; the simulations are kept in a
            second file beside it.
        progress: Whether to show a progress bar.

    Returns:
        A :class:`~pyro_flows.flows.Flow`, or a :class:`~pyro_flows.flows.Mixed` if some entries are discrete or
        positive.  ``likelihood(theta)`` is a distribution over ``(D,)``, with densities in nats of x as given.  Its
        parameters are frozen, so that no fit of a model changes them; ``requires_grad_(True)`` lets them be trained.

    Raises:
        TypeError: If the data are no tensors, ``flow`` is no recipe or fails, or ``discrete`` or ``positive`` hold no
            indices.
        ValueError: If an argument is out of its range, there are both a simulator and ``simulations``, or the simulator
            returns another number of rows.  If data are complex, constant or not finite, a discrete entry holds other
            numbers than 0, 1, … or a positive one is not positive.  If the recipe's flow has another size.
        FloatingPointError: If the loss or gradients stay non-finite.

    Warns:
        UserWarning: If entries that are not discrete hold integers or other values that repeat, or determine one
            another or the parameters, so that densities grow without bound.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow
        >>> def simulator(theta):  # one draw for each row of theta
        ...     return theta + 0.5 * torch.randn(theta.shape)
        >>> prior = dist.Uniform(torch.full((1,), -3.0), 3.0)
        >>> likelihood = fit_likelihood(simulator, prior, num_simulations=200, max_epochs=2, progress=False)
        >>> def model(x):
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("row", len(x)):
        ...         pyro.sample("x", likelihood(theta.expand(len(x))[..., None]), obs=x)
        >>> guide = AutoFlow(model).setup(torch.randn(10, 1))
    """
    check_integers(CALLER, 20, num_simulations=num_simulations)
    training = checked(CALLER, training, max_epochs=max_epochs, batch_size=batch_size, lr=lr, progress=progress)
    _check_entries(flow, discrete, positive)
    file = check_path(CALLER, "checkpoint", checkpoint, ".simulations")
    if simulations is not None and (simulator is not None or prior is not None):
        raise ValueError(f"{CALLER}: give either simulator and prior, or simulations, got both. Leave one out.")
    theta, x = _given(simulations) if simulations is not None else _kept(file, simulator, prior, num_simulations)
    for name, value in (("theta", theta), ("x", x)):
        for place, column in enumerate(value.T):
            check_draws(CALLER, "the simulated", f"{name}[:, {place}]", column)
    _warn_of_columns(theta, x, discrete)
    made = _build(flow, theta, x, tuple(discrete), tuple(positive))
    train, judge = divided((x, theta), training.share or 0.0, batch_size)
    objective = objective_of(training)

    def loss(batch: Batch) -> Tensor:
        return objective(made, *batch)

    marks = {"model": design(made), "data": fingerprint((theta, x))}
    run = RowFit(CALLER, made, train, judge, loss, marks, diagnose=lambda: "the density of the simulations")
    train_on_rows(run, training, max_epochs=max_epochs, lr=lr, checkpoint=file, progress=progress)
    return made.requires_grad_(False)


def _check_entries(recipe: Any, discrete: Any, positive: Any) -> None:
    """Raise an error unless the recipe can be called, and entries are named by different indices."""
    if not (recipe is None or callable(recipe)) or isinstance(recipe, torch.nn.Module):
        raise TypeError(f"{CALLER}: flow must be a recipe such as flows.nsf, got {quoted(recipe)}.")
    for name, chosen in (("discrete", discrete), ("positive", positive)):
        if not isinstance(chosen, tuple | list) or not all(is_integer(place) and place >= 0 for place in chosen):
            wanted = f"a tuple of indices of at least 0, such as {name}=(0,)"
            raise TypeError(f"{CALLER}: {name} must be {wanted}, got {quoted(chosen)}.")
    if both := {*discrete} & {*positive}:
        raise ValueError(f"{CALLER}: entry {min(both)} must be discrete or positive, got both. Take it out of one.")


def _warn_of_columns(theta: Tensor, x: Tensor, discrete: Sequence[int]) -> None:
    """Warn of entries of x without a density: values that repeat, and linear functions of other entries or of theta."""
    own = [place for place in range(x.shape[1]) if place not in discrete]
    if spikes := spikes_of(x, None, own):
        integers = tuple(spike.column for spike in spikes if spike.kind == "integers")
        fault = f"{CALLER}: of x, {listed([str(spike) for spike in spikes])}. Its density grows without bound there"
        way = "Mark a value that repeats by a further entry of 0 and 1, or add uniform noise to rounded numbers"
        warn_user(f"{fault}. {f'Give integers as discrete={integers}. ' if integers else ''}{way}.")
    columns = {f"theta[:, {place}]": column for place, column in enumerate(theta.to("cpu", torch.float64).T)}
    entries = {f"x[:, {place}]": column for place, column in enumerate(x.to("cpu", torch.float64).T)}
    given = [*columns, *(name for place, name in enumerate(entries) if place in discrete)]
    columns |= entries
    while tied := tied_columns(torch.stack([columns[name] for name in given], 1)):
        del given[tied[0]]  # parameters and categories may have relations of their own
    names = [*given, *(name for place, name in enumerate(entries) if place in own)]
    warn_of_ties(CALLER, torch.stack([columns[name] for name in names], 1), names)


def _given(simulations: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return existing parameters and data as tables, or raise an error that names the fault."""
    if not (isinstance(simulations, tuple | list) and len(simulations) == 2):
        raise ValueError(f"{CALLER}: simulations must be (theta, x), got {quoted(simulations)}.")
    theta, x = (_table("simulations", name, value) for name, value in zip(("theta", "x"), simulations, strict=True))
    if len(theta) != len(x) or len(x) < 20:
        raise ValueError(
            f"{CALLER}: simulations must hold as many theta as x, at least 20, got {len(theta)}, {len(x)}."
        )
    return theta, x


def _table(source: str, name: str, value: Any) -> Tensor:
    """Return values ``(N,)`` or ``(N, D)`` of theta or x, from an argument, as a floating table ``(N, D)``."""
    if not isinstance(value, Tensor):
        fault = f"draws of {source} must be tensors, got {type(value).__name__}"
        raise TypeError(f"{CALLER}: {fault}. Use torch.as_tensor(...).")
    value, _ = as_table(CALLER, name, value)
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    value = value.unsqueeze(-1) if value.dim() == 1 else value
    if value.dim() != 2:
        raise ValueError(f"{CALLER}: {source} must have shape (N, D), got {tuple(value.shape)}. Flatten each row.")
    return value


def _kept(
    file: Any, simulator: Callable[[Tensor], Tensor] | None, prior: Distribution | None, number: int
) -> tuple[Tensor, Tensor]:
    """Return the simulations that are kept with a checkpoint, or run and keep them."""
    if not callable(simulator) or not isinstance(prior, Distribution):
        got = f"got {quoted(simulator)} and {quoted(prior)}. Or give simulations=(theta, x)"
        raise ValueError(f"{CALLER}: simulator must be a function of parameters, and prior a distribution, {got}.")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = [*fingerprint((prior.sample((8,)),)), getattr(simulator, "__qualname__", type(simulator).__name__)]
    settings = {"steps": 0, "number": number, "data": data}
    beside = Checkpoint(CALLER, file and file.with_name(f"{file.name}.simulations"), settings)
    kept = beside.read()
    if kept is not None:
        return kept["theta"], kept["x"]
    theta, x = distributed.broadcast(lambda: _simulate(simulator, prior, number))
    beside.save({"theta": theta, "x": x})
    return theta, x


@torch.no_grad()
def _simulate(simulator: Callable[[Tensor], Tensor], prior: Distribution, number: int) -> tuple[Tensor, Tensor]:
    """Draw parameters and simulate their data, in parts."""
    if len(prior.batch_shape) + len(prior.event_shape) > 1:
        shape = tuple(prior.batch_shape + prior.event_shape)
        raise ValueError(f"{CALLER}: prior must draw vectors (P,), got draws of shape {shape}. Flatten them.")
    theta = _table("prior", "theta", prior.sample((number,)))
    parts = []
    for part in theta.split(SIMULATE):
        x = _table("simulator", "x", simulator(part))
        if len(x) != len(part):
            must = f"simulator must return one row for each of the {len(part)} parameters it is given"
            raise ValueError(f"{CALLER}: {must}, got {len(x)}. Loop over them and stack the results if it takes one.")
        parts.append(x)
    return theta, torch.cat(parts)


def _build(
    recipe: Callable[[int, int], Flow] | None,
    theta: Tensor,
    x: Tensor,
    discrete: Sequence[int],
    positive: Sequence[int],
) -> Flow | Mixed:
    """Build and start the distribution of the rows of x, ``(N, D)``, given parameters ``(N, P)``."""
    places = range(x.shape[1])
    for name, chosen in (("discrete", discrete), ("positive", positive)):
        if wrong := [place for place in chosen if place not in places]:
            raise ValueError(f"{CALLER}: {name} must hold indices below {x.shape[1]}, got {quoted(wrong[0])}.")
    for place in positive:
        if (x[:, place] <= 0).any():
            low = x[:, place].min().item()
            raise ValueError(f"{CALLER}: entry {place} must be positive, got {low:.6g}. Take it out of positive=.")
    numbers = tuple(_categories(place, x[:, place]) if place in discrete else 0 for place in places)
    width, size = theta.shape[1] + sum(numbers), numbers.count(0)
    made = built(CALLER, "flow", recipe, likelihood_flow, size, width, may_encode=True).to(x) if size else None
    if made is not None and not (discrete or positive):
        start(made, x, theta, (x.mean(0), x.std(0)), heavy_tails=False)
        return made
    mixed = Mixed(made, numbers, theta.shape[1], positive=positive).to(x)
    standardize = cast(Standardize, mixed.standardize)
    standardize.initialize(theta)
    if made is not None:
        y, _, _ = mixed.real(x)
        start(made, y, mixed.inputs(x, standardize(theta)), (y.mean(0), y.std(0)), heavy_tails=False)
    return mixed


def _categories(place: int, column: Tensor) -> int:
    """Return the number of categories 0, 1, … in a column."""
    if (column != column.round()).any() or (column < 0).any() or column.max() >= MOST:
        raise ValueError(
            f"{CALLER}: discrete entry {place} must hold integers from 0 to {MOST - 1}, got {column.min().item():.6g} "
            f"to {column.max().item():.6g}. Number its categories, or take it out of discrete=."
        )
    return max(2, int(column.max()) + 1)
