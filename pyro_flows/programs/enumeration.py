"""Discrete latents k, summed out exactly and drawn back: log p(z, x) = log Σ_k p(z, k, x), and k ~ p(k | z, x).

:class:`Parallel` runs each discrete site at all values of its support at once, along a separate dimension, and
contracts the terms by variable elimination.  ``sequential_sum.py`` is for programs that do not run so.  Tensor Variable
Elimination for Plated Factor Graphs (Obermeyer et al. 2019, arXiv:1902.03210).  Pyro's ``TraceEnum_ELBO`` and
``infer_discrete`` do the same for one draw of z; here it is done for each of N draws.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import opt_einsum
import torch
from opt_einsum import shared_intermediates
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree, contract_to_tensor
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .engines import Run, Site, Values, View
from .masks import mask_of
from .plate_nesting import plates_of
from .sampling_ring import SamplingRing

REST = "the sum over all sites that depend on no discrete latent"
TRIES = 3  # runs whose rows have different discrete values, against which a sum is checked
Packed = Any  # a tensor with Pyro's names of its dimensions as an attribute
Factors = OrderedDict[frozenset[str], list[Packed]]
TraceAt = Callable[..., Trace]  # the trace of a model at values: trace_at(values, enumerate=False)


class WrongSum(ValueError):
    """A model has another density at all discrete values at once than at one; Pyro sums it without an error."""


class Parallel:
    """The sum over discrete latents at all of their values at once.

    Args:
        trace_at: Function that traces the model at given values of some latents, the others as in ``single``; with
            ``enumerate=True`` at all values of the discrete latents.
        single: A trace without enumeration.
        names: The discrete latents that are summed out.
        nesting: The number of dimensions that the plates take.

    Attributes:
        single_log_prob: The log-density of the latents in ``single``, ``(1,)`` in nats.

    Raises:
        ValueError: If the model has another density at all discrete values at once than at one.
    """

    def __init__(self, trace_at: TraceAt, single: Trace, names: tuple[str, ...], nesting: int) -> None:
        self._shapes = {name: single.nodes[name]["value"].shape for name in names}
        self._trace = trace = trace_at({}, enumerate=True)
        trace.compute_log_prob()
        trace.pack_tensors()
        plates = trace.plate_to_symbol
        self._draws = opt_einsum.get_symbol(2 * len(plates))  # Pyro takes the even symbols for plates
        self._summed = set(trace.symbol_to_dim) - set(plates.values())
        sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        self._sites = {n: s for n, s in sites.items() if self._summed & set(s["packed"]["log_prob"]._pyro_dims)}
        self._scale = self._common_scale()
        terms = {n: v.unsqueeze(0) for n, v in self._read(View(trace, trace, None, nesting)).items()}
        self.single_log_prob = self._total(terms)  # raises NotImplementedError for plates that cross
        # A model that uses .any() or .max() of discrete values differs from its enumeration at the ends of supports.
        # One whose rows depend on each other differs where rows have different values.
        ends = [
            {name: self._support(name)[end].expand(shape) for name, shape in self._shapes.items()} for end in (0, -1)
        ]
        for plain in (single, *map(trace_at, [*ends, *self._mixed()])):
            self._check(terms, View(plain, plain, None, nesting))
        check_masks(single, trace, names)

    def _mixed(self) -> Iterator[Values]:
        """Yield values that differ from row to row, the same at each call."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(TRIES):
            supports = ((name, self._support(name)) for name in self._shapes)
            yield {n: s[torch.randint(len(s), self._batch(n), generator=generator).to(s.device)] for n, s in supports}

    def _common_scale(self) -> Any:
        scales = {name: site["scale"] for name, site in self._sites.items()}
        first, *others = scales
        for name in others:
            if float(scales[name]) != float(scales[first]):
                raise ValueError(
                    f"sites {first!r} and {name!r} depend on the same discrete latents, but are scaled by "
                    f"{float(scales[first]):g} and {float(scales[name]):g}: put both into the same subsampled plates, "
                    "and under the same poutine.scale."
                )
        return scales[first]

    def _read(self, view: View) -> Values:
        return terms_of(view, self._sites, self._shapes)

    def _check(self, terms: Values, plain: View) -> None:
        """Raise ValueError unless the terms of one draw, at given discrete values, are those of a run with these alone.

        Args:
            terms: The terms of a run at all discrete values.
            plain: A run at the same other latents, and at one value of each discrete one.
        """
        places = [self._place_of(name, plain.trace.nodes[name]["value"]) for name in self._shapes]
        wanted, found = self._read(plain), {REST: terms[REST]}
        for term in (term for group in self._factors(terms).values() for term in group):
            name = term._pyro_site
            for place in places:
                if place is not None and place._pyro_symbol in term._pyro_dims:
                    term = packed.gather(term, place, place._pyro_symbol)
            found[name] = term
        for name, value in found.items():
            here, there = value.sum(), wanted[name].sum()
            if not (here.isfinite() or there.isfinite()):
                continue  # both runs find these values impossible
            if not (here - there).abs() <= 1e-3 * (1 + wanted[name].abs().sum()):
                what = name if name == REST else f"site {name!r}"
                raise WrongSum(f"{what} has another density at all discrete values at once than at one")

    def _place_of(self, name: str, value: Tensor) -> Packed | None:
        """Return the indices of a discrete site's values in its support, packed; None for a support of one value."""
        infer, support, batch = self._trace.nodes[name]["infer"], self._support(name), self._batch(name)
        if len(support) < 2:
            return None
        same = value.unsqueeze(0) == support.reshape(-1, *(1,) * len(batch), *support.shape[1:])
        place = same.reshape(len(support), *batch, -1).all(-1).long().argmax(0)
        place = packed.pack(place, infer["_dim_to_symbol"])
        place._pyro_symbol = infer["_dim_to_symbol"][infer["_enumerate_dim"]]
        return place

    def log_prob(self, run: Run, held: Values, size: int) -> Tensor:
        """Return the log-density of N draws of the continuous latents, ``(N,)`` in nats."""
        return self._total(run(self._read, held, size, enumerate=True))

    def _total(self, terms: Values) -> Tensor:
        with shared_intermediates() as cache:
            target = frozenset({self._draws})
            summed = contract_to_tensor(self._factors(terms), self._summed, target_ordinal=target, cache=cache)
        return terms[REST] + self._scale * summed

    @torch.no_grad()
    def sample(self, run: Run, held: Values, size: int) -> Values:
        """Draw the discrete latents given N draws of the others: for each site ``(N, *site_shape)``."""
        factors = self._factors(run(self._read, held, size, enumerate=True))
        sizes = {d: n for group in factors.values() for t in group for d, n in zip(t._pyro_dims, t.shape, strict=True)}
        own = {term._pyro_site: term for group in factors.values() for term in group if term._pyro_site in self._shapes}
        places = {name: torch.zeros((), dtype=torch.long) for name in self._shapes}  # for supports of one value
        if own:
            for term in own.values():
                term.requires_grad_()
            with torch.enable_grad():
                tree = contract_tensor_tree(factors, self._summed, ring=SamplingRing(dim_to_size=sizes))
                total = sum((term.sum() for group in tree.values() for term in group), torch.zeros(()))
            marks = torch.autograd.grad(total, list(own.values()))
            for (name, term), mark in zip(own.items(), marks, strict=True):
                places[name] = self._places(name, term._pyro_dims, mark)
        supports = {name: self._support(name) for name in places}
        return {n: supports[n][p.to(supports[n].device).expand(size, *self._batch(n))] for n, p in places.items()}

    def _factors(self, terms: Values) -> Factors:
        """Return the terms in Pyro's packed form, by the plates that they lie in; the draws count as a plate."""
        found: Factors = OrderedDict()
        plates = self._trace.plate_to_symbol
        for name, site in self._sites.items():
            symbols = site["infer"]["_dim_to_symbol"]
            shape = terms[name].shape[1:]
            dims = [place - len(shape) for place, size in enumerate(shape) if size > 1]
            term: Packed = terms[name].reshape(len(terms[name]), *(shape[dim] for dim in dims))
            term._pyro_dims = self._draws + "".join(symbols[dim] for dim in dims)
            term._pyro_site = name
            own = frozenset(plates[frame.name] for frame in plates_of(site))
            found.setdefault(own | {self._draws}, []).append(term)
        return found

    def _places(self, name: str, dims: str, marks: Tensor) -> Tensor:
        """Return the indices of a site's draws in its support, ``(N, *batch_shape)``.

        Args:
            name: The site.
            dims: The names of the dimensions of its term.
            marks: 1 where the term has the values of the draw, those of other sites included, and 0 elsewhere.
        """
        infer, batch = self._trace.nodes[name]["infer"], self._batch(name)
        to_symbol = infer["_dim_to_symbol"]
        symbols = [to_symbol.get(dim, " ") for dim in range(-len(batch), 0)]
        inner = to_symbol[infer["_enumerate_dim"]]
        kept = [symbol for symbol in (self._draws, *symbols, inner) if symbol in dims]
        marks = opt_einsum.contract(f"{dims}->{''.join(kept)}", marks)
        shape = [size if symbol in dims else 1 for size, symbol in zip(batch, symbols, strict=True)]
        return marks.argmax(-1).reshape(-1, *shape)

    def _support(self, name: str) -> Tensor:
        site = self._trace.nodes[name]
        return site["value"].reshape(-1, *site["fn"].event_shape)

    def _batch(self, name: str) -> torch.Size:
        shape = self._shapes[name]
        return shape[: len(shape) - self._trace.nodes[name]["fn"].event_dim]


def terms_of(view: View, sites: Mapping[str, Site], discrete: Mapping[str, Any]) -> Values:
    """Return the unscaled log-density of some sites by name, and the log-density of all others as ``REST``."""
    found = {REST: view.log_prob(lambda name: name not in sites)}
    view.trace.compute_log_prob(lambda name, _: name in sites)
    for name in sites:
        site = view.trace.nodes[name]
        mask = None if name in discrete else site["mask"]  # a sum over all values is 1 with or without a mask
        found[name] = view.by_draw(scale_and_mask(site["unscaled_log_prob"], mask=mask))
    return found


def check_masks(one: Trace, other: Trace, discrete: tuple[str, ...]) -> None:
    """Raise ValueError if the mask of a latent depends on discrete values: a masked latent has no density there."""
    for name in [name for name, _ in one.iter_stochastic_nodes() if name not in discrete]:
        here, there = (torch.as_tensor(mask_of(trace.nodes[name]).every) for trace in (one, other))
        if not torch.equal(*torch.broadcast_tensors(here, there)):
            raise ValueError(
                f"latent site {name!r} is masked at some discrete values, where nothing bounds it: leave the mask out, "
                "so that its prior stays in"
            )


def check_rows(name: str, trace: Trace) -> None:
    """Raise ValueError if rows of a plate without a size share a discrete value, which a sum would take row by row."""
    for frame in plates_of(trace.nodes[name]):
        if frame.size < 0 and len(trace.nodes[name]["fn"].batch_shape) < -frame.dim:
            raise ValueError(
                f"discrete latent site {name!r} has no dimension for the rows of plate {frame.name!r}, which has no "
                f"size. Give the number of its rows: pyro.plate({frame.name!r}, len(x))."
            )
