"""Discrete latents summed out one joint value after the other, for programs that do not run at all values at once.

If the latents lie in plates, all rows take the same value in a run.  The sum is taken row by row, as rows are
independent given the sites outside the plates.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .engines import Run, Site, Values, View
from .enumeration import REST, Parallel, TraceAt, WrongSum, check_masks, check_rows, terms_of
from .error_text import quoted
from .finite_supports import MOST, with_values
from .plate_nesting import plates_of

ROWS = "the sum over sites in the plates, by row"
TRIES = 10  # runs whose rows take different values, against which sums by row are checked


def sum_over(trace_at: TraceAt, single: Trace, names: tuple[str, ...], nesting: int) -> Parallel | Sequential:
    """Return the sum over discrete latents: at all values at once if the model runs so, or else one after the other.

    Args:
        trace_at: As for :class:`~.enumeration.Parallel`.
        single: A trace without enumeration.
        names: The discrete latents that are summed out.
        nesting: The number of dimensions that the plates take.

    Raises:
        ValueError: If the model runs in neither way.
    """
    for name in names:
        check_rows(name, single)
    try:
        return Parallel(trace_at, single, names, nesting)
    except Exception as error:  # a user's program may raise anything
        fault = f"discrete latents {', '.join(map(repr, names))} cannot be summed out"
        try:
            return Sequential(trace_at, single, names)
        except _RowsDepend as more:
            words = "Pyro's TraceEnum_ELBO raises no error, but sums as if rows were independent, which is wrong. "
            words *= isinstance(error, WrongSum)
            way = f'Draw each row at a site of its own, in a Python loop: pyro.sample(f"{names[0]}_{{i}}", ...)'
            raise ValueError(f"{fault}: {more}. {words}{way}.") from error
        except ValueError as more:
            raise ValueError(
                f"{fault}: the model does not run at all of their values at once ({quoted(error)}), and {more}. Let it "
                "broadcast over dimensions to the left of its plates, as for Pyro's TraceEnum_ELBO: no .item() and no "
                "branches on discrete values."
            ) from error


class _RowsDepend(ValueError):
    """A site depends on the discrete values of several rows."""


class Sequential:
    """The sum over discrete latents, one joint value after the other.

    Args:
        trace_at: Function that traces the model at given values of some latents, the others as in ``single``.
        single: A trace without enumeration.
        names: The discrete latents.

    Attributes:
        single_log_prob: The log-density of the latents in ``single``, ``(1,)`` in nats.

    Raises:
        ValueError: If the latents lie in different plates or have more than ``MOST`` joint values.  If rows, outer
            sites or masks depend on the values of other rows.
    """

    def __init__(self, trace_at: TraceAt, single: Trace, names: tuple[str, ...]) -> None:
        sites = {name: single.nodes[name] for name in names}
        supports = {name: _support_of(site["fn"]) for name, site in sites.items()}
        self._plates, *others = [_plates_of(site) for site in sites.values()]
        self._dims = list(self._plates.values())
        batch = sites[names[0]]["fn"].batch_shape
        self._rows = torch.Size(batch[dim] for dim in self._dims if len(batch) >= -dim)
        self._shapes = {name: site["value"].shape for name, site in sites.items()}
        bare = [name for name, site in sites.items() if site["fn"].batch_shape.numel() != self._rows.numel()]
        if (number := math.prod(map(len, supports.values()))) > MOST:
            raise ValueError(f"one value after the other there are too many: there are {number} joint values")
        if bare or any(plates.keys() != self._plates.keys() for plates in others):
            why = f"site {bare[0]!r} has several elements" if bare else "they lie in different plates"
            raise ValueError(f"one value after the other there are too many: {why}")
        joint = zip(*itertools.product(*supports.values()), strict=True)
        self._tables = {name: torch.stack(column) for name, column in zip(supports, joint, strict=True)}
        self._single, self._number, self._scale = single, number, 1.0
        scales = {float(site["scale"]) for site in single.nodes.values() if self._is_inside(site)}
        if len(scales) == 1:
            (self._scale,) = scales
        elif self._plates:
            raise ValueError("the sites in their plates are scaled by different numbers")
        self.single_log_prob = self._checked(trace_at)

    def _checked(self, trace_at: TraceAt) -> Tensor:
        """Return the log-density of the latents in the first trace, ``(1,)``.

        Raises:
            ValueError: If a row depends on the values of other rows, or if a mask or an outer site depends on any row.
        """
        rests, rows = [], []
        for values in self._joint_values():
            trace = trace_at(values)
            terms = self._read(View(trace, self._single, None, 0))
            rests.append(terms[REST])
            rows.append(terms[ROWS])
            check_masks(self._single, trace, (*self._tables,))
            for name, table in self._tables.items():
                if not torch.equal(_support_of(trace.nodes[name]["fn"]).unique(dim=0), table.unique(dim=0)):
                    raise ValueError(f"the values that site {name!r} can take depend on those of other sites")
        generator, rest, by_value = torch.Generator().manual_seed(0), torch.stack(rests), torch.stack(rows)
        for _ in range(TRIES if self._plates else 0):
            places = torch.randint(self._number, self._rows, generator=generator).to(by_value.device)
            view = View(trace_at(self._values(places)), self._single, None, 0)
            mixed, wanted = self._read(view), by_value.gather(0, places.unsqueeze(0))[0]
            if not (_alike(mixed[ROWS], wanted) and _alike(mixed[REST], rest)):
                raise _RowsDepend(self._dependent(view, trace_at, places))
        return rest[:1] + self._scale * by_value.logsumexp(0).sum()

    def _dependent(self, mixed: View, trace_at: TraceAt, places: Tensor) -> str:
        """Return words for the first site that depends on the values of several rows.

        Args:
            mixed: A run whose rows take different values.
            trace_at: As for the class.
            places: The indices of these values, ``(*rows)``.
        """
        views = [View(trace_at(values), self._single, None, 0) for values in self._joint_values()]
        plates = f"plate{'s' * (len(self._plates) > 1)} {', '.join(map(repr, self._plates))}"
        names = [name for name, site in self._single.nodes.items() if site["type"] == "sample"]
        for name in names:
            if not self._is_inside(self._single.nodes[name]):
                here, *there = (view.log_prob(name.__eq__) for view in (mixed, *views))
                if not all(_alike(here, other) for other in there):
                    return f"site {name!r} outside of {plates} depends on the values of several rows"
                continue
            here, *there = (self._of_site(view, name) for view in (mixed, *views))
            if not _alike(here, torch.stack(there).gather(0, places.unsqueeze(0))[0]):
                return f"site {name!r} in {plates} depends on the values of other rows"
        return f"rows of {plates} depend on the values of other rows"

    def _of_site(self, view: View, name: str) -> Tensor:
        """Return the log-density of a site inside of the plates by row, ``(*rows)``."""
        return self._by_row(terms_of(view, {name: view.trace.nodes[name]}, self._tables)[name], False)

    def log_prob(self, run: Run, held: Values, size: int) -> Tensor:
        """Return the log-density of N draws of the continuous latents, ``(N,)`` in nats."""
        rest, rows = self._joint(run, held, size)
        return rest + self._scale * rows.logsumexp(0).reshape(size, -1).sum(-1)

    @torch.no_grad()
    def sample(self, run: Run, held: Values, size: int) -> Values:
        """Draw the discrete latents given N draws of the others: for each site ``(N, *site_shape)``."""
        _, rows = self._joint(run, held, size)
        return self._values(torch.distributions.Categorical(logits=rows.movedim(0, -1)).sample())

    def _joint_values(self) -> list[Values]:
        return [self._values(torch.full(self._rows, j)) for j in range(self._number)]

    def _values(self, places: Tensor) -> Values:
        """Return the discrete latents where each row has one of the joint values, ``(*batch, *rows)``."""
        batch = places.shape[: places.dim() - len(self._rows)]
        return {name: table[places].reshape(batch + self._shapes[name]) for name, table in self._tables.items()}

    def _joint(self, run: Run, held: Values, size: int) -> tuple[Tensor, Tensor]:
        """Return the log-density outside the plates, ``(N,)``, and by value and row, ``(values, N, *rows)``."""
        found = [run(self._read, held, size, rows=values) for values in self._joint_values()]
        return found[0][REST], torch.stack([terms[ROWS] for terms in found])

    def _read(self, view: View) -> Values:
        view.check_structure()  # a site that only some values lead to would be counted with all values
        inside = {name: site for name, site in view.trace.nodes.items() if self._is_inside(site)}
        terms, has_draws = terms_of(view, inside, self._tables), view.size is not None
        rows = (site["scale"] / self._scale * self._by_row(terms[name], has_draws) for name, site in inside.items())
        return {REST: terms[REST], ROWS: sum(rows, torch.zeros(()))}

    def _is_inside(self, site: Site) -> bool:
        return site["type"] == "sample" and self._plates.keys() <= _plates_of(site).keys()

    def _by_row(self, term: Tensor, has_draws: bool) -> Tensor:
        """Sum a log-density over all dimensions except the draws in front and the plates."""
        lead, shape = term.shape[:has_draws], term.shape[has_draws:]
        depth = max((-dim for dim in self._dims), default=0)
        term = term.reshape(lead + torch.Size((1,) * (depth - len(shape))) + shape)
        others = [dim for dim in range(has_draws - term.dim(), 0) if dim not in self._dims]
        return (term.sum(others) if others else term).expand(lead + self._rows)


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-4, equal_nan=True)


def _support_of(fn: Any) -> Tensor:
    """Return all values of a discrete distribution, ``(number, *event_shape)``."""
    return with_values(fn).enumerate_support(expand=False).reshape(-1, *fn.event_shape)


def _plates_of(site: Site) -> dict[str, int]:
    """Return the dimensions of the plates of a site by their names, from left to right."""
    return {frame.name: frame.dim for frame in sorted(plates_of(site), key=lambda frame: frame.dim)}
