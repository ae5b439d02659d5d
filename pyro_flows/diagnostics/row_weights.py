"""Importance weights of the rows of plates.

The weight of row i compares the terms of model and guide in that row, with latents l and data x::

    w_i = p(l_i, x_i | rest) / q(l_i | rest)

Their mean estimates the likelihood of the row.  Of many latents the weights of all together say nothing.  Then k-hat
of a row tells whether the guide's distribution of this row is right, as in :mod:`.importance`, and weighted means show
the errors of the row's means.  All rows are looked at, in time and memory proportional to their number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ..arguments import check_integers
from ..programs.density import Density
from ..programs.engines import View, in_batches
from ..programs.model_and_guide import Task
from ..programs.program import Function, runs_programs
from ..programs.sites import Site, Values, plates_of, row_log_prob
from .importance import WEIGHING, smooth

LOG_P, LOG_Q, LOG_W, OUTSIDE = "log p of rows", "log q of rows", "log w of rows", "log p outside"  # are no sites


@dataclass(frozen=True)
class RowJudgement:
    """Constants of a judgement of rows.

    Attributes:
        fewest: The fewest rows of a plate; if they are few, each counts much in what they share.
        widest: The latents in a row beyond which its weights say nothing either.
        draws: The draws.
        least: The fewest draws.
        smoothed: The rows whose k-hat is found: those with the most unequal weights.
        certain: The standard errors of an error that is certain among a million rows.
    """

    fewest: int = 100
    widest: int = 64
    draws: int = 1000
    least: int = 200
    smoothed: int = 200
    certain: float = 6.0


ROW_JUDGEMENT = RowJudgement()


class RowWeights(NamedTuple):
    """Findings of the weights of the rows of some plates.

    Attributes:
        plates: The plates, joined by commas.
        number: The number of rows.
        khat: The largest k-hat of a row.
        name: The number of a latent whose mean is wrong by the most standard errors.
        error: The error of that mean, in standard deviations of the guide.
        noise: Its standard error.
    """

    plates: str
    number: int
    khat: float
    name: str
    error: float
    noise: float

    def is_off(self, limit: float) -> bool:
        """True if the mean is certainly wrong by more than a limit."""
        return abs(self.error) > limit + ROW_JUDGEMENT.certain * self.noise

    def __str__(self) -> str:
        return f"{max(self.khat, 0.0):.2f} in the {self.number:,} rows of {self.plates!r}"


class PlateRows:
    """The rows of some plates, and the log-densities of model and guide in each.

    Args:
        task: The model and the guide.
        plates: The plates.
        of: Function that returns the log-density of each element of a site.

    Attributes:
        of_model: The sites of the model inside.
        of_guide: The sites of the guide inside.
        latents: The latents of the model in these plates alone.
        sizes: The number of rows of each plate.
    """

    def __init__(self, task: Task, plates: tuple[str, ...], of: Callable[[Site], Tensor]) -> None:
        self.task, self.plates, self._of = task, plates, of
        self.nodes = task.model.single.nodes
        self.of_model, self.of_guide = (
            [name for name, site in nodes.items() if site["type"] == "sample" and {*plates} <= {*_plates(site)}]
            for nodes in (self.nodes, task.guide.single.nodes)
        )
        self.latents = [name for name in task.latents if tuple(_plates(self.nodes[name])) == plates]
        frames = [_plates(self.nodes[name]) for name in self.of_model[:1]]
        self.sizes = [of[plate].size for of in frames for plate in plates]

    def draw(self, size: int) -> Values:
        """Draw from the guide; return the log-weight of each draw and row, ``(N, rows)``, and the latents."""

        def of_guide(view: View) -> Values:
            return {LOG_Q: self.log_prob(view, self.of_guide), **{name: view.read(name) for name in self.task.latents}}

        found = self.task.guide.sample(of_guide, {}, size)
        log_q = found.pop(LOG_Q)
        log_p = self.task.model.run(lambda view: {LOG_P: self.log_prob(view, self.of_model)}, found, size)[LOG_P]
        return {**found, LOG_W: log_p - log_q}

    def log_prob(self, view: View, names: list[str]) -> Tensor:
        """Return the log-density of each row at some sites, ``(N, rows)``, or ``(rows,)`` for one draw."""
        draws, nodes = int(view.size is not None), view.single.nodes
        totals = [self.in_front(view.read(name, self._of), nodes[name], 0, draws).sum(-1) for name in names]
        return sum(totals[1:], totals[0]).flatten(-len(self.plates))

    def in_front(self, values: Tensor, site: Site, event_dim: int, draws: int) -> Tensor:
        """Return values of a site by row, ``(*draws, *rows, numbers)``, given the number of dimensions of draws."""
        frames = _plates(site)
        axes = [values.dim() + frames[plate].dim - event_dim for plate in self.plates]
        front = values.movedim(axes, [*range(draws, draws + len(axes))]).unsqueeze(-1)
        return front.flatten(draws + len(axes))


@runs_programs
@torch.no_grad()
def importance_log_likelihood(
    model: Function, guide: Function, *args: Any, plate: str | None = None, num_samples: int = 500, **kwargs: Any
) -> Tensor:
    """Estimate log p(x_i) of each row of a plate, for example of each test image of a variational autoencoder.

    For K draws z_k of a row's latents from the guide q the estimate is::

        log p(x_i) ≈ log 1/K Σ_k p(x_i, z_k) / q(z_k | x_i)

    Its mean is a lower bound that rises with K (Burda, Grosse, Salakhutdinov 2015, arXiv:1509.00519).  Latents outside
    the plate must be fixed with ``poutine.condition``.

    Args:
        model: A Pyro model whose latents all lie in the plate.
        guide: A Pyro guide of the same latents.
        *args: The model's arguments, with the rows to score.
        plate: The name of the plate; by default the plate of an ``AutoPlateFlow``, or the only plate of the model.
        num_samples: The number K of draws per row.
        **kwargs: The model's keyword arguments.

    Returns:
        The log-likelihood of each row, ``(rows,)`` in nats.

    Raises:
        ValueError: If a number is out of its range, the plate is missing or subsampled, a latent lies outside it, the
            guide is a point, or the latents of model and guide differ.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("row", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> x = torch.tensor([0.0, 2.0])
        >>> found = importance_log_likelihood(model, guide, x, plate="row", num_samples=10)
        >>> torch.allclose(found, dist.Normal(0.0, 2**0.5).log_prob(x), atol=1e-4)  # exact, as the guide is
        True
    """
    check_integers("importance_log_likelihood", num_samples=num_samples)
    task = Task(model, guide, args, kwargs).check(whole=False).settle()
    rows = PlateRows(task, (plate or getattr(guide, "plate", None) or _only_plate(task),), row_log_prob)
    for program, names in (task.model, rows.of_model), (task.guide, rows.of_guide):
        for name, _ in program.single.iter_stochastic_nodes():
            if name not in names:
                fault = f"site {name!r} lies outside of plate {rows.plates[0]!r}. Fix such latents with "
                way = "poutine.condition(model, data={...}), and use a guide whose latents all lie in the plate."
                raise ValueError(f"importance_log_likelihood: {fault}{way}")
        if not names:
            raise ValueError(f"importance_log_likelihood: the model has no plate {rows.plates[0]!r}.")

    def step(_: Values, size: int) -> Values:
        return {LOG_W: rows.draw(size)[LOG_W].logsumexp(0, keepdim=True)}  # (1, rows)

    return in_batches(step, {}, num_samples, WEIGHING.at_once(task))[LOG_W].logsumexp(0) - math.log(num_samples)


def _only_plate(task: Task) -> str:
    """Return the name of a model's only plate, or raise ValueError."""
    sites = (site for site in task.model.single.nodes.values() if site["type"] == "sample")
    plates = list(dict.fromkeys(name for site in sites for name in _plates(site)))
    if len(plates) != 1:
        fault = f"plate must be the name of the rows' plate, and the model has {', '.join(map(repr, plates)) or 'none'}"
        way = f"Pass plate={plates[0]!r}" if plates else "Put the rows into a pyro.plate"
        raise ValueError(f"importance_log_likelihood: {fault}. {way}.")
    return plates[0]


@torch.no_grad()
def row_weights(space: Density) -> tuple[RowWeights, ...]:
    """Return what the weights of all rows show, for each set of plates with many rows and latents of their own.

    The result is empty if the guide draws all latents together, or if discrete latents are summed out.  Plates are left
    out if data outside of a row depend on its latents, for example sums, or data of crossed plates.
    """
    task = space.task
    if task.model.enumerated or task.runs_one_by_one or task.model.subsamples:
        return ()
    keys = dict.fromkeys(tuple(_plates(task.model.single.nodes[name])) for name in task.latents)
    blocks = [PlateRows(task, key, _log_prob) for key in keys if key]
    return tuple(_judged(rows) for rows in blocks if _tell(rows))


def _tell(rows: PlateRows) -> bool:
    """Return True if the weights of rows say something about the guide's distribution of each."""
    nodes, task, number = rows.nodes, rows.task, math.prod(rows.sizes)
    inside = [name for name in rows.of_model if name in task.latents]
    numbers = sum(nodes[name]["value"].numel() for name in inside)
    # Few rows share the latents of an outer row, or the effects of another plate, whose draws would count too.
    others = {plate for name in task.latents if name not in inside for plate in _plates(nodes[name])}
    return (
        ROW_JUDGEMENT.fewest <= number
        and numbers <= ROW_JUDGEMENT.widest * number
        and not any(others & {*_plates(nodes[name])} for name in rows.of_model)
        # A guide that draws all latents together has values in the rows, and their density outside.
        and any(name in task.own for name in rows.of_guide)
        and _are_apart(rows, inside)
    )


def _are_apart(rows: PlateRows, inside: list[str]) -> bool:
    """Return True if the latents in a row change no density outside of it: every second row is moved."""
    task, nodes = rows.task, rows.nodes
    found = task.guide.sample(lambda view: {name: view.read(name) for name in task.latents}, {}, 2)
    moved = torch.arange(math.prod(rows.sizes)).reshape(rows.sizes) % 2 == 0
    for name, value in found.items():
        here = torch.zeros((), dtype=torch.bool)
        if name in inside:
            event_dim, frames = nodes[name]["fn"].event_dim, _plates(nodes[name])
            shape = [1] * (value.dim() - 1)
            for plate, size in zip(rows.plates, rows.sizes, strict=True):
                shape[frames[plate].dim - event_dim] = size
            here = moved.reshape(shape)
        found[name] = torch.stack((value[0], value[1].where(here.to(value.device), value[0])))

    def read(view: View) -> Values:
        outside = view.log_prob(lambda name: name not in rows.of_model)
        return {LOG_P: rows.log_prob(view, rows.of_model)[..., ~moved.flatten()], OUTSIDE: outside}

    densities = task.model.run(read, found, 2)
    (here, there), (before, after) = densities[LOG_P], densities[OUTSIDE]
    is_same = torch.allclose(here, there, rtol=1e-4, atol=1e-3, equal_nan=True)
    return is_same and torch.allclose(before, after, rtol=1e-5, atol=1e-3, equal_nan=True)


def _judged(rows: PlateRows) -> RowWeights:
    """Return what the weights of draws of the guide show."""
    most = WEIGHING.held // sum(rows.nodes[name]["value"].numel() for name in rows.latents)
    number = max(ROW_JUDGEMENT.least, min(ROW_JUDGEMENT.draws, most))
    found = in_batches(lambda _, size: rows.draw(size), {}, number, WEIGHING.at_once(rows.task))
    log_w = found[LOG_W]
    weights = (log_w - log_w.logsumexp(0)).nan_to_num(-math.inf).exp()
    weights = weights.clamp_max(number**-0.5)  # truncated (Ionides 2008)
    weights = (weights / weights.sum(0).clamp_min(1e-30)).unsqueeze(-1)
    values, places, names = [], [], []
    for name in rows.latents:
        site, shape = rows.nodes[name], rows.nodes[name]["value"].shape
        values.append(rows.in_front(found[name], site, site["fn"].event_dim, 1).flatten(1, -2))
        numbers = torch.arange(shape.numel()).reshape(shape)
        places.append(rows.in_front(numbers, site, site["fn"].event_dim, 0).flatten(0, -2))
        names += [name] * places[-1].shape[1]
    away = torch.cat(values, -1)  # (draws, rows, numbers)
    away = (away - away.mean(0)) / away.std(0).clamp_min(1e-12)
    error, noise = ((weights - 1 / number) * away).sum(0), ((weights - 1 / number) * away).square().sum(0).sqrt()
    unequal = weights.square().sum((0, 2)).argsort(descending=True)[: ROW_JUDGEMENT.smoothed]
    khat = max(smooth(log_w[:, row].double().nan_to_num(-math.inf))[1] for row in unequal.tolist())
    row, column = divmod(int((error.abs() / (noise + 0.01)).argmax()), error.shape[1])
    index = torch.unravel_index(torch.cat(places, -1)[row, column], rows.nodes[names[column]]["value"].shape)
    label = f"{names[column]}[{', '.join(str(int(i)) for i in index)}]"
    ends = float(error[row, column]), float(noise[row, column])
    return RowWeights(",".join(rows.plates), log_w.shape[1], khat, label, *ends)


def _plates(site: Site) -> dict[str, Any]:
    """Return the plates around a site that are dimensions of it, by name, the outermost first."""
    return {frame.name: frame for frame in sorted(plates_of(site), key=lambda frame: frame.dim)}


def _log_prob(site: Site) -> Tensor:
    """Return the log-density of each element of a site, with its scale, 0 where it is masked."""
    found = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(found, site["scale"], site["mask"])
