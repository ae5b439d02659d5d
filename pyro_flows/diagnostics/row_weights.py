"""Importance weights of the rows of plates, for models whose weights of all latents together say nothing.

The weight of row i compares the terms of model and guide in that row, with latents l and data x::

    w_i = p(l_i, x_i | rest) / q(l_i | rest)

Its k-hat tells whether the guide's distribution of the row is right, as in :mod:`.importance`.  Weighted means show the
errors of the row's means.  All rows are looked at, in time and memory proportional to their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ..programs.engines import Site, Values, View, in_batches
from ..programs.latent_space import LatentSpace
from .pareto import smooth

FEWEST = 100  # rows of a plate; if they are few, each counts much in what they share
WIDEST = 64  # latents in a row, beyond which its weights say nothing either
DRAWS, LEAST, NUMBERS = 1000, 200, 20_000_000  # draws, at least, and numbers in them to hold
SMOOTHED = 200  # rows whose k-hat is found: those with the most unequal weights
CERTAIN = 6.0  # standard errors of an error that is certain among a million rows
LOG_P, LOG_Q, OUTSIDE = "log p of rows", "log q of rows", "log p outside"  # not the names of sites


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
        return abs(self.error) > limit + CERTAIN * self.noise

    def __str__(self) -> str:
        return f"{max(self.khat, 0.0):.2f} in the {self.number:,} rows of {self.plates!r}"


@torch.no_grad()
def row_weights(space: LatentSpace, batch_size: int) -> tuple[RowWeights, ...]:
    """Return what the weights of all rows show, for each set of plates with many rows and latents of their own.

    The result is empty if the guide draws all latents together, or if discrete latents are summed out.  Plates are left
    out if data outside of a row depend on its latents, for example sums, or data of crossed plates.
    """
    task = space.task
    if task.model.enumerated or task.runs_one_by_one or task.model.subsamples:
        return ()
    nodes = task.model.single.nodes
    keys = dict.fromkeys(tuple(_plates(nodes[name])) for name in task.latents)
    blocks = [_Rows(space, key) for key in keys if key]
    return tuple(block.judged(batch_size) for block in blocks if block.tells)


class _Rows:
    """The rows of some plates.

    Args:
        space: The guide's space.
        plates: The plates.
    """

    def __init__(self, space: LatentSpace, plates: tuple[str, ...]) -> None:
        self.task, self.plates = space.task, plates
        self.nodes, drawn = self.task.model.single.nodes, self.task.guide.single.nodes
        self.of_model, self.of_guide = (
            [name for name, site in of.items() if site["type"] == "sample" and {*plates} <= {*_plates(site)}]
            for of in (self.nodes, drawn)
        )
        self.latents = [name for name in self.task.latents if tuple(_plates(self.nodes[name])) == plates]
        frames = _plates(self.nodes[self.latents[0]])
        self.dims, self.sizes = [frames[name].dim for name in plates], [frames[name].size for name in plates]

    @property
    def tells(self) -> bool:
        """True if the weights of the rows say something about the guide's distribution of each."""
        nodes, latents = self.nodes, {name: {*_plates(self.nodes[name])} for name in self.task.latents}
        inside = [name for name in self.of_model if name in latents]
        number, numbers = math.prod(self.sizes), _numbers(nodes, inside)
        if number < FEWEST or numbers > WIDEST * number:
            return False
        # Few rows share the latents of an outer row, or the effects of another plate, whose draws would count too.
        others = {plate for name in latents.keys() - {*inside} for plate in latents[name]}
        if any(others & {*_plates(nodes[name])} for name in self.of_model):
            return False
        # A guide that draws all latents together has values in the rows, and their density outside.
        return any(name in self.task.own for name in self.of_guide) and self._are_apart(inside)

    def _are_apart(self, inside: list[str]) -> bool:
        """True if the latents in a row change no density outside of it: every second row is moved."""
        found = self.task.guide.sample(lambda view: {name: view.read(name) for name in self.task.latents}, {}, 2)
        moved = torch.arange(math.prod(self.sizes)).reshape(self.sizes) % 2 == 0
        for name in inside:
            value, event_dim = found[name], self.nodes[name]["fn"].event_dim
            shape = [1] * value.dim()
            for dim, size in zip(self.dims, self.sizes, strict=True):
                shape[dim - event_dim] = size
            here = moved.to(value.device).reshape(shape)[0]
            found[name] = torch.stack((value[0], value[1].where(here, value[0])))
        for name in self.task.latents:
            found[name] = found[name] if name in inside else found[name][:1].expand_as(found[name])

        def read(view: View) -> Values:
            return {
                LOG_P: self._log_prob(view, self.of_model),
                OUTSIDE: view.log_prob(lambda n: n not in self.of_model),
            }

        densities = self.task.model.run(read, found, 2)
        rows, outside = densities[LOG_P][:, ~moved.flatten()], densities[OUTSIDE]
        same = torch.allclose(rows[0], rows[1], rtol=1e-4, atol=1e-3, equal_nan=True)
        return same and torch.allclose(outside[0], outside[1], rtol=1e-5, atol=1e-3, equal_nan=True)

    def judged(self, batch_size: int) -> RowWeights:
        """Return what the weights of draws of the guide show."""
        number = max(LEAST, min(DRAWS, NUMBERS // _numbers(self.nodes, self.latents)))
        found = in_batches(self._draw, {}, number, batch_size)
        log_w = found[LOG_P] - found[LOG_Q]
        weights = (log_w - log_w.logsumexp(0)).nan_to_num(-math.inf).exp()
        weights = weights.clamp_max(number**-0.5)  # truncated (Ionides 2008)
        weights = (weights / weights.sum(0).clamp_min(1e-30)).unsqueeze(-1)
        values = torch.cat([self._by_row(found[name], name) for name in self.latents], -1).flatten(1, -2)
        away = (values - values.mean(0)) / values.std(0).clamp_min(1e-12)
        error, noise = ((weights - 1 / number) * away).sum(0), ((weights - 1 / number) * away).square().sum(0).sqrt()
        unequal = weights.square().sum((0, 2)).argsort(descending=True)[:SMOOTHED]
        khat = max(smooth(log_w[:, row].double().nan_to_num(-math.inf))[1] for row in unequal.tolist())
        worst = int((error.abs() / (noise + 0.01)).argmax())
        place = divmod(worst, error.shape[1])
        label, *ends = self._label(*place), float(error[place]), float(noise[place])
        return RowWeights(",".join(self.plates), log_w.shape[1], khat, label, *ends)

    def _draw(self, _: Values, size: int) -> Values:
        def of_guide(view: View) -> Values:
            return {LOG_Q: self._log_prob(view, self.of_guide), **{name: view.read(name) for name in self.task.latents}}

        found = self.task.guide.sample(of_guide, {}, size)
        latents = {name: found[name] for name in self.task.latents}
        log_p = self.task.model.run(lambda view: {LOG_P: self._log_prob(view, self.of_model)}, latents, size)
        return log_p | {name: found[name] for name in (LOG_Q, *self.latents)}

    def _log_prob(self, view: View, names: list[str]) -> Tensor:
        """Return the log-density of each row at some sites, ``(N, rows)``, or ``(rows,)`` for one draw."""
        totals = [self._in_front(view.read(name, _log_prob), view.single.nodes[name], 0).sum(-1) for name in names]
        return sum(totals[1:], totals[0]).flatten(-len(self.dims))

    def _by_row(self, values: Tensor, name: str) -> Tensor:
        """Return the numbers of a latent by row, ``(*draws, *rows, numbers)``."""
        return self._in_front(values, self.nodes[name], self.nodes[name]["fn"].event_dim)

    def _in_front(self, values: Tensor, site: Site, event_dim: int) -> Tensor:
        draws = values.dim() - site["value"].dim() + site["fn"].event_dim - event_dim
        axes = [values.dim() + dim - event_dim for dim in self.dims]
        front = values.movedim(axes, [*range(draws, draws + len(axes))]).unsqueeze(-1)
        return front.flatten(draws + len(axes))

    def _label(self, row: int, column: int) -> str:
        """Return the name of a number in a row."""
        for name in self.latents:
            shape = self.nodes[name]["value"].shape
            places = self._by_row(torch.arange(shape.numel()).reshape(shape), name).flatten(0, -2)
            if column < places.shape[1]:
                index = torch.unravel_index(places[row, column], shape)
                return f"{name}[{', '.join(str(int(i)) for i in index)}]"
            column -= places.shape[1]
        raise IndexError(column)


def _numbers(nodes: Mapping[str, Site], names: list[str]) -> int:
    return sum(nodes[name]["value"].numel() for name in names)


def _plates(site: Site) -> dict[str, Any]:
    """Return the plates around a site that are dimensions of it, by name, the outermost first."""
    frames = [frame for frame in site.get("cond_indep_stack", ()) if frame.vectorized]
    return {frame.name: frame for frame in sorted(frames, key=lambda frame: frame.dim)}


def _log_prob(site: Site) -> Tensor:
    """Return the log-density of each element of a site, with its scale, 0 where it is masked."""
    found = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(found, site["scale"], site["mask"])
