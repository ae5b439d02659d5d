"""Discrete latents summed out one joint value after the other, for programs that do not run at all values at once.

Where the latents lie in plates, all rows take the same value in a run, and each row has a sum of its own: rows are
independent given all that lies outside of the plates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .engines import Site, Values, View
from .enumeration import REST, Run, check_masks
from .events import MOST, with_values
from .nesting import plates_of

ROWS = "the sum over sites in the plates, by row"
TRIES = 10  # mixed values of all rows, beside which sums by row are held


class Sequential:
    """The sum over discrete latents, one joint value after the other.

    Args:
        trace: The trace of a run without enumeration.
        names: The discrete latents.

    Raises:
        ValueError: If the latents lie in different plates, or have more than ``MOST`` joint values.
    """

    def __init__(self, trace: Trace, names: tuple[str, ...]) -> None:
        sites = {name: trace.nodes[name] for name in names}
        supports = {name: with_values(site["fn"]).enumerate_support(expand=False) for name, site in sites.items()}
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
        joint = torch.cartesian_prod(*(torch.arange(len(support)) for support in supports.values()))
        self._tables = {
            name: support.reshape(len(support), *sites[name]["fn"].event_shape)[places]
            for (name, support), places in zip(supports.items(), joint.reshape(number, -1).T, strict=True)
        }
        self._single, self._number, self._scale = trace, number, 1.0
        scales = [float(site["scale"]) for site in trace.nodes.values() if self._is_inside(site)]
        if len(set(scales)) == 1:
            self._scale = scales[0]
        elif self._plates:
            raise ValueError("the sites in their plates are scaled by different numbers")

    def check(self, run: Run, trace: Callable[[Values], Trace], latents: list[str]) -> None:
        """Raise ValueError unless each row follows from its own values, nothing else from any, and no mask does.

        Args:
            run: Runs the model for one draw of the other latents.
            trace: Traces the model at that draw and at some discrete values.
            latents: The names of the other latents.
        """
        for j in range(self._number):
            there = trace(self._values(torch.full(self._rows, j)))
            View(there, self._single, None, 0).check_structure()
            check_masks(self._single, there, latents)
            for name, table in self._tables.items():
                support = with_values(there.nodes[name]["fn"]).enumerate_support(expand=False)
                if not torch.equal(support.reshape(-1, *table.shape[1:]).unique(dim=0), table.unique(dim=0)):
                    raise ValueError(f"the values that site {name!r} can take depend on those of other sites")
        if not self._plates:
            return
        rest, rows = self._joint(run)
        generator = torch.Generator().manual_seed(0)
        for _ in range(TRIES):
            places = torch.randint(self._number, self._rows, generator=generator).to(rows.device)
            other = run(self._read, discrete=self._values(places))
            wanted = rows[:, 0].gather(0, places.unsqueeze(0))[0]
            for found, known in ((other[ROWS][0], wanted), (other[REST][0], rest[:, 0])):
                if not torch.allclose(found, known, rtol=1e-5, atol=1e-4, equal_nan=True):
                    raise ValueError("rows of their plates, or sites outside, depend on the values of other rows")

    def log_prob(self, run: Run) -> Tensor:
        """Return the log-density of N draws of the continuous latents, ``(N,)`` in nats."""
        rest, rows = self._joint(run)
        summed = rows.logsumexp(0)
        return rest[0] + self._scale * summed.reshape(len(summed), -1).sum(-1)

    @torch.no_grad()
    def sample(self, run: Run) -> Values:
        """Draw the discrete latents given N draws of the others: for each site ``(N, *site_shape)``."""
        return self._values(torch.distributions.Categorical(logits=self._joint(run)[1].movedim(0, -1)).sample())

    def _values(self, places: Tensor) -> Values:
        """Return the discrete latents where each row has one of the joint values, ``(*batch, *rows)``."""
        batch = places.shape[: places.dim() - len(self._rows)]
        return {name: table[places].reshape(batch + self._shapes[name]) for name, table in self._tables.items()}

    def _joint(self, run: Run) -> tuple[Tensor, Tensor]:
        """Return the log-density outside of the plates, ``(values, N)``, and by row, ``(values, N, *rows)``."""
        found = [run(self._read, discrete=self._values(torch.full(self._rows, j))) for j in range(self._number)]
        return torch.stack([terms[REST] for terms in found]), torch.stack([terms[ROWS] for terms in found])

    def _read(self, view: View) -> Values:
        view.check_structure()  # a site that only some values lead to would be counted with all values
        sites = view.trace.nodes
        inside = [name for name, site in sites.items() if self._is_inside(site)]
        rest = view.log_prob(lambda name: name not in inside)
        view.trace.compute_log_prob(lambda name, _: name in inside)
        rows = torch.zeros(())
        for name in inside:  # the mask of a latent that is summed out makes no difference to its sum
            site, mask = sites[name], None if name in self._tables else sites[name]["mask"]
            term = scale_and_mask(site["unscaled_log_prob"], site["scale"] / self._scale, mask)
            rows = rows + self._by_row(view.by_draw(term), view.size is not None)
        return {REST: rest, ROWS: rows}

    def _is_inside(self, site: Site) -> bool:
        return site["type"] == "sample" and self._plates.keys() <= _plates_of(site).keys()

    def _by_row(self, term: Tensor, has_draws: bool) -> Tensor:
        """Sum a log-density over all dimensions but those of the plates, and of the draws in front."""
        lead, shape = term.shape[:has_draws], term.shape[has_draws:]
        depth = max((-dim for dim in self._dims), default=0)
        term = term.reshape(lead + torch.Size((1,) * (depth - len(shape))) + shape)
        others = [dim for dim in range(has_draws - term.dim(), 0) if dim not in self._dims]
        return (term.sum(others) if others else term).expand(lead + self._rows)


def _plates_of(site: Site) -> dict[str, int]:
    """Return the dimensions of the plates of a site by their names, from left to right."""
    return {frame.name: frame.dim for frame in sorted(plates_of(site), key=lambda frame: frame.dim)}
