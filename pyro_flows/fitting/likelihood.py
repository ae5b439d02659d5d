"""Neural likelihood estimation: the density of a simulator's output, learned from simulations, for any Pyro model.

Maximises E log q(x | θ) over parameters θ of a proposal and their simulations x.  Sequential Neural Likelihood
(Papamakarios, Sterratt, Murray 2018, arXiv:1805.07226), in one round.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ..arguments import is_integer, quoted, suggests_keywords
from ..data.batches import divided
from ..data.columns import as_table, listed, spikes_of, tied_columns, warn_of_ties
from ..encoders import Standardize
from ..flows import Flow, Mixed
from ..guides.guide_flow import built, likelihood_flow
from ..programs.simulator import check_draws
from ..training import Training, distributed
from ..training.checkpoint import design, fingerprint
from ..user_code import warn_user
from .density import start_flow
from .row_training import RowTraining

CALLER = "fit_likelihood"
FEWEST = 20  # rows that can be split
MOST = 1000  # categories of an entry


@distributed.collective(CALLER)
@suggests_keywords
def fit_likelihood(
    theta: Tensor,
    x: Tensor,
    *,
    entries: Mapping[int, str] | None = None,
    flow: Callable[[int, int], Flow] | None = None,
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
        theta: The parameters of the simulations, ``(N, P)`` or ``(N,)``, for example 10,000 draws of a prior.
        x: One draw of data for each, ``(N, D)`` or ``(N,)``.
        entries: The entries of x that are not real numbers, by index: ``"discrete"`` for categories 0, 1, …, and
            ``"positive"`` for positive numbers, such as durations.
        flow: A recipe, called with the number of entries that are not discrete and with the width of the context, such
            as ``flows.nsf``.  By default autoregressive splines, and then an affine map that depends on the parameters;
            its matrix is triangular for two to four such entries.
        max_epochs: The largest number of passes through the simulations; the step size falls to zero by then.
        batch_size: The number of simulations per step; by default 256, and fewer if there are few.
        lr: The largest step size.
        training: Further options, such as ``Training(patience=5)``: see :class:`~pyro_flows.training.Training`.
        checkpoint: A file for the state of the run, from which the same call on the same simulations resumes.
        progress: Whether to show a progress bar.

    Returns:
        A :class:`~pyro_flows.flows.Flow`, or a :class:`~pyro_flows.flows.Mixed` if some entries are discrete or
        positive.  ``likelihood(theta)`` is a distribution over ``(D,)``, with densities in nats of x as given.  Its
        parameters are frozen, so that no fit of a model changes them; ``requires_grad_(True)`` lets them be trained.

    Raises:
        TypeError: If the data are no tensors, or ``flow`` is no recipe or fails.
        ValueError: If an argument is out of its range, or theta and x have other numbers of rows.  If data are complex,
            constant or not finite, a discrete entry holds other numbers than 0, 1, … or a positive one is not positive.
            If the recipe's flow has another size.
        FloatingPointError: If the loss or gradients stay non-finite.

    Warns:
        UserWarning: If entries that are not discrete hold integers or other values that repeat, or determine one
            another or the parameters, so that densities grow without bound.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow
        >>> theta = dist.Uniform(-3.0, 3.0).sample((200, 1))
        >>> x = theta + 0.5 * torch.randn(theta.shape)  # one draw for each row of theta
        >>> likelihood = fit_likelihood(theta, x, max_epochs=2, progress=False)
        >>> def model(x):
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("row", len(x)):
        ...         pyro.sample("x", likelihood(theta.expand(len(x))[..., None]), obs=x)
        >>> guide = AutoFlow(model).setup(torch.randn(10, 1))
    """
    run = RowTraining(CALLER, training, max_epochs, batch_size, lr, checkpoint, progress)
    if not (flow is None or callable(flow)) or isinstance(flow, torch.nn.Module):
        raise TypeError(f"{CALLER}: flow must be a recipe such as flows.nsf, got {quoted(flow)}.")
    theta, x = _table("theta", theta), _table("x", x)
    if len(theta) != len(x) or len(x) < FEWEST:
        words = f"theta and x must have as many rows, at least {FEWEST}"
        raise ValueError(f"{CALLER}: {words}, got {len(theta)} and {len(x)}.")
    for name, table in (("theta", theta), ("x", x)):
        for place, column in enumerate(table.T):
            check_draws(CALLER, "the simulated", f"{name}[:, {place}]", column)
    kinds = _kinds(entries, x)
    _warn_of_columns(theta, x, kinds)
    made = _build(flow, theta, x, kinds)
    rows = divided((x, theta), run.training.share or 0.0, batch_size)
    marks = {"model": design(made), "data": fingerprint((theta, x))}
    run.fit(made, rows, lambda batch: run.objective(made, *batch), lambda: "the density of the simulations", marks)
    return made.requires_grad_(False)


def _table(name: str, value: Any) -> Tensor:
    """Return parameters or data as a floating table, or raise an error that names the fault."""
    if not isinstance(value, Tensor):
        got = f"got {type(value).__name__}. Simulate first, x = simulator(theta)"
        raise TypeError(f"{CALLER}: {name} must be a tensor, {got}.")
    value, _ = as_table(CALLER, name, value)
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    value = value.unsqueeze(-1) if value.dim() == 1 else value
    if value.dim() != 2:
        raise ValueError(f"{CALLER}: {name} must have shape (N, D), got {tuple(value.shape)}. Flatten each row.")
    return value


def _kinds(entries: Any, x: Tensor) -> list[str]:
    """Return the kind of each entry of x: discrete, positive or real."""
    given, width = {} if entries is None else entries, x.shape[1]
    fits = isinstance(given, Mapping) and all(is_integer(place, 0) and place < width for place in given)
    if not fits or not {*given.values()} <= {"discrete", "positive"}:
        must = f"entries must map indices below {width} to 'discrete' or 'positive'"
        raise ValueError(f"{CALLER}: {must}, got {quoted(entries)}. Give entries={{0: 'positive'}}.")
    kinds = [given.get(place, "real") for place in range(width)]
    for place, (kind, column) in enumerate(zip(kinds, x.T, strict=True)):
        low, high = column.min().item(), column.max().item()
        if kind == "positive" and low <= 0:
            raise ValueError(f"{CALLER}: entry {place} must be positive, got {low:.6g}. Take it out of entries.")
        if kind == "discrete" and (low < 0 or high >= MOST or (column != column.round()).any()):
            must = f"discrete entry {place} must hold integers from 0 to {MOST - 1}, got {low:.6g} to {high:.6g}"
            raise ValueError(f"{CALLER}: {must}. Number its categories, or take it out of entries.")
    return kinds


def _warn_of_columns(theta: Tensor, x: Tensor, kinds: list[str]) -> None:
    """Warn of entries of x without a density: values that repeat, and linear functions of other entries or of theta."""
    own = [place for place, kind in enumerate(kinds) if kind != "discrete"]
    if spikes := spikes_of(x, None, own):
        integers = {spike.column: "discrete" for spike in spikes if spike.kind == "integers"}
        fault = f"{CALLER}: of x, {listed([str(spike) for spike in spikes])}. Its density grows without bound there"
        way = "Mark a value that repeats by a further entry of 0 and 1, or add uniform noise to rounded numbers"
        warn_user(f"{fault}. {f'Give integers as entries={integers}. ' if integers else ''}{way}.")
    columns = {f"theta[:, {place}]": column for place, column in enumerate(theta.to("cpu", torch.float64).T)}
    entries = {f"x[:, {place}]": column for place, column in enumerate(x.to("cpu", torch.float64).T)}
    given = [*columns, *(name for name, kind in zip(entries, kinds, strict=True) if kind == "discrete")]
    columns |= entries
    while tied := tied_columns(torch.stack([columns[name] for name in given], 1)):
        del given[tied[0]]  # parameters and categories may have relations of their own
    names = [*given, *(f"x[:, {place}]" for place in own)]
    warn_of_ties(CALLER, torch.stack([columns[name] for name in names], 1), names)


def _build(recipe: Callable[[int, int], Flow] | None, theta: Tensor, x: Tensor, kinds: list[str]) -> Flow | Mixed:
    """Build and start the distribution of the rows of x, ``(N, D)``, given parameters ``(N, P)``."""
    number = [max(2, int(c.max()) + 1) if kind == "discrete" else 0 for kind, c in zip(kinds, x.T, strict=True)]
    width, size = theta.shape[1] + sum(number), number.count(0)
    made = built(CALLER, "flow", recipe, likelihood_flow, (size, width), may_encode=True).to(x) if size else None
    if made is not None and {*kinds} == {"real"}:
        start_flow(made, x, theta, (x.mean(0), x.std(0)), heavy_tails=False)
        return made
    positive = tuple(place for place, kind in enumerate(kinds) if kind == "positive")
    mixed = Mixed(made, tuple(number), theta.shape[1], positive=positive).to(x)
    standardize = cast(Standardize, mixed.standardize)
    standardize.initialize(theta)
    if made is not None:
        y, _, _ = mixed.real(x)
        start_flow(made, y, mixed.inputs(x, standardize(theta)), (y.mean(0), y.std(0)), heavy_tails=False)
    return mixed
