"""Discrete latents k, summed out exactly and drawn back: log p(z, x) = log Σ_k p(z, k, x), and k ~ p(k | z, x).

:class:`Parallel` runs each discrete site at all values of its support at once, along a separate dimension, and
contracts the terms by variable elimination.  Tensor Variable Elimination for Plated Factor Graphs (Obermeyer et al.
2019, arXiv:1902.03210).  Pyro's ``TraceEnum_ELBO`` and ``infer_discrete`` do the same for one draw of z; here it is
done for each of N draws.

:class:`Sequential` is for programs that do not run at all values at once.  It takes one joint value after the other.
If the latents lie in plates, all rows take the same value in a run.  The sum is taken row by row, as rows are
independent given the sites outside the plates.

Draws come from sums over discrete values in log space, whose gradient is a draw of these values.  The gradient of
log Σ exp is the softmax, which holds marginals.  With one draw of the softmax in its place, the gradients of a whole
sum with respect to its terms mark the values of one joint draw.  This is forward filtering and backward sampling by
automatic differentiation: Torch-Struct: Deep Structured Prediction Library (Rush 2020, arXiv:2002.00876).  Pyro's
``SampleRing`` fails for some models with several chains in a plate.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import opt_einsum
import torch
from opt_einsum import shared_intermediates
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree, contract_to_tensor
from pyro.ops.einsum.util import Tensordot
from pyro.ops.rings import LogRing
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .checks import quoted
from .engines import Run, View
from .sites import MOST, Site, Values, mask_of, plates_of, with_values

REST = "the sum over all sites that depend on no discrete latent"
ROWS = "the sum over sites in the plates, by row"
TRIES = 3  # runs whose rows have different discrete values, against which a sum is checked
ROW_TRIES = 10  # the same for sums by row
Packed = Any  # a tensor with Pyro's names of its dimensions as an attribute
Factors = OrderedDict[frozenset[str], list[Packed]]
TraceAt = Callable[..., Trace]  # the trace of a model at values: trace_at(values, enumerate=False)


class _WrongSum(ValueError):
    """A model has another density at all discrete values at once than at one; Pyro sums it without an error."""


class _RowsDepend(ValueError):
    """A site depends on the discrete values of several rows."""


def sum_over(trace_at: TraceAt, single: Trace, names: tuple[str, ...], nesting: int) -> Parallel | Sequential:
    """Return the sum over discrete latents: at all values at once if the model runs so, or else one after the other.

    Args:
        trace_at: Function that traces the model at given values of some latents, the others as in ``single``; with
            ``enumerate=True`` at all values of the discrete latents.
        single: A trace without enumeration.
        names: The discrete latents that are summed out.
        nesting: The number of dimensions that the plates take.

    Raises:
        ValueError: If the model runs in neither way.  If rows of a plate without a size share a discrete value, which a
            sum would take row by row.
    """
    for name, site in ((name, single.nodes[name]) for name in names):
        for frame in plates_of(site):
            if frame.size < 0 and len(site["fn"].batch_shape) < -frame.dim:
                fault = f"discrete latent site {name!r} has no dimension for the rows of plate {frame.name!r}"
                way = f"which has no size. Give the number of its rows: pyro.plate({frame.name!r}, len(x))."
                raise ValueError(f"{fault}, {way}")
    try:
        return Parallel(trace_at, single, names, nesting)
    except Exception as error:  # a user's program may raise anything
        fault = f"discrete latents {', '.join(map(repr, names))} cannot be summed out"
        try:
            return Sequential(trace_at, single, names)
        except _RowsDepend as more:
            words = "Pyro's TraceEnum_ELBO raises no error, but sums as if rows were independent, which is wrong. "
            words *= isinstance(error, _WrongSum)
            way = f'Draw each row at a site of its own, in a Python loop: pyro.sample(f"{names[0]}_{{i}}", ...)'
            raise ValueError(f"{fault}: {more}. {words}{way}.") from error
        except ValueError as more:
            fault += f": the model does not run at all of their values at once ({quoted(error)}), and {more}"
            way = "Let it broadcast over dimensions to the left of its plates, as for Pyro's TraceEnum_ELBO"
            raise ValueError(f"{fault}. {way}: no .item() and no branches on discrete values.") from error


class Parallel:
    """The sum over discrete latents at all of their values at once; arguments as for :func:`sum_over`.

    Attributes:
        single_log_prob: The log-density of the latents in ``single``, ``(1,)`` in nats.

    Raises:
        ValueError: If the model has another density at all discrete values at once than at one.
    """

    def __init__(self, trace_at: TraceAt, single: Trace, names: tuple[str, ...], nesting: int) -> None:
        self._trace = trace = trace_at({}, enumerate=True)
        trace.compute_log_prob()
        trace.pack_tensors()
        self._shapes = {name: single.nodes[name]["value"].shape for name in names}
        nodes = {name: trace.nodes[name] for name in names}
        self._batches = {n: shape[: len(shape) - nodes[n]["fn"].event_dim] for n, shape in self._shapes.items()}
        self._supports = {n: site["value"].reshape(-1, *site["fn"].event_shape) for n, site in nodes.items()}
        plates = trace.plate_to_symbol
        self._draws = opt_einsum.get_symbol(2 * len(plates))  # Pyro takes the even symbols for plates
        self._summed = set(trace.symbol_to_dim) - set(plates.values())
        sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        self._sites = {n: s for n, s in sites.items() if self._summed & set(s["packed"]["log_prob"]._pyro_dims)}
        self._scale = self._common_scale()
        terms = {n: v.unsqueeze(0) for n, v in self._read(View(trace, trace, None, nesting)).items()}
        self.single_log_prob = self._total(terms)  # raises NotImplementedError for plates that cross
        for plain in (single, *map(trace_at, self._trials())):
            self._check(terms, View(plain, plain, None, nesting))
        _check_masks(single, trace, names)

    def _trials(self) -> Iterator[Values]:
        """Yield discrete values against which the sum is checked, the same at each call.

        A model that uses .any() or .max() of discrete values differs from its enumeration at the ends of supports.  One
        whose rows depend on each other differs where rows have different values.
        """
        for end in (0, -1):
            yield {name: self._supports[name][end].expand(shape) for name, shape in self._shapes.items()}
        generator = torch.Generator().manual_seed(0)
        for _ in range(TRIES):
            supports = ((name, self._supports[name], batch) for name, batch in self._batches.items())
            yield {n: s[torch.randint(len(s), b, generator=generator).to(s.device)] for n, s, b in supports}

    def _common_scale(self) -> Any:
        scales = {name: site["scale"] for name, site in self._sites.items()}
        (first, scale), *others = scales.items()
        for name, other in others:
            if float(other) != float(scale):
                fault = f"sites {first!r} and {name!r} depend on the same discrete latents"
                numbers = f"but are scaled by {float(scale):g} and {float(other):g}"
                way = "put both into the same subsampled plates, and under the same poutine.scale"
                raise ValueError(f"{fault}, {numbers}: {way}.")
        return scale

    def _read(self, view: View) -> Values:
        return _terms_of(view, self._sites, self._shapes)

    def _check(self, terms: Values, plain: View) -> None:
        """Raise ValueError unless the terms of one draw, at given discrete values, are those of a run with these alone.

        Args:
            terms: The terms of a run at all discrete values.
            plain: A run at the same other latents, and at one value of each discrete one.
        """
        places = [self._place_of(n, plain.trace.nodes[n]["value"]) for n, s in self._supports.items() if len(s) > 1]
        wanted, found = self._read(plain), {REST: terms[REST]}
        for term in itertools.chain(*self._factors(terms).values()):
            name = term._pyro_site
            for place in places:
                if place._pyro_symbol in term._pyro_dims:
                    term = packed.gather(term, place, place._pyro_symbol)
            found[name] = term
        for name, value in found.items():
            here, there = value.sum(), wanted[name].sum()
            if not (here.isfinite() or there.isfinite()):
                continue  # both runs find these values impossible
            if not (here - there).abs() <= 1e-3 * (1 + wanted[name].abs().sum()):
                what = name if name == REST else f"site {name!r}"
                raise _WrongSum(f"{what} has another density at all discrete values at once than at one")

    def _place_of(self, name: str, value: Tensor) -> Packed:
        """Return the indices of a discrete site's values in its support, packed."""
        infer, support, batch = self._trace.nodes[name]["infer"], self._supports[name], self._batches[name]
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
        terms = list(itertools.chain(*factors.values()))
        sizes = {dim: number for term in terms for dim, number in zip(term._pyro_dims, term.shape, strict=True)}
        own = {term._pyro_site: term for term in terms if term._pyro_site in self._shapes}
        places = {name: torch.zeros((), dtype=torch.long) for name in self._shapes}  # for supports of one value
        if own:
            for term in own.values():
                term.requires_grad_()
            with torch.enable_grad():
                tree = contract_tensor_tree(factors, self._summed, ring=_SamplingRing(dim_to_size=sizes))
                total = sum((term.sum() for group in tree.values() for term in group), torch.zeros(()))
            marks = torch.autograd.grad(total, list(own.values()))
            for (name, term), mark in zip(own.items(), marks, strict=True):
                places[name] = self._places(name, term._pyro_dims, mark)
        supports = self._supports
        return {n: supports[n][p.to(supports[n].device).expand(size, *self._batches[n])] for n, p in places.items()}

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
        infer, batch = self._trace.nodes[name]["infer"], self._batches[name]
        to_symbol = infer["_dim_to_symbol"]
        symbols = [to_symbol.get(dim, " ") for dim in range(-len(batch), 0)]
        inner = to_symbol[infer["_enumerate_dim"]]
        kept = [symbol for symbol in (self._draws, *symbols, inner) if symbol in dims]
        marks = opt_einsum.contract(f"{dims}->{''.join(kept)}", marks)
        shape = [size if symbol in dims else 1 for size, symbol in zip(batch, symbols, strict=True)]
        return marks.argmax(-1).reshape(-1, *shape)


class Sequential:
    """The sum over discrete latents, one joint value after the other; arguments as for :func:`sum_over`.

    Attributes:
        single_log_prob: The log-density of the latents in ``single``, ``(1,)`` in nats.

    Raises:
        ValueError: If the latents lie in different plates or have more than ``MOST`` joint values.  If rows, outer
            sites or masks depend on the values of other rows.
    """

    def __init__(self, trace_at: TraceAt, single: Trace, names: tuple[str, ...]) -> None:
        sites = {name: single.nodes[name] for name in names}
        supports = {name: _support_of(site["fn"]) for name, site in sites.items()}
        self._plates, *others = [_plate_dims(site) for site in sites.values()]
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
        self._joint_values = [self._values(torch.full(self._rows, place)) for place in range(number)]
        scales = {float(site["scale"]) for site in single.nodes.values() if self._is_inside(site)}
        self._scale = scales.pop() if len(scales) == 1 else 1.0
        if scales and self._plates:
            raise ValueError("the sites in their plates are scaled by different numbers")
        self.single_log_prob = self._checked(trace_at, single)

    def _checked(self, trace_at: TraceAt, single: Trace) -> Tensor:
        """Return the log-density of the latents in the first trace, ``(1,)``.

        Raises:
            ValueError: If a row depends on the values of other rows, or if a mask or an outer site depends on any row.
        """
        views = [View(trace_at(values), single, None, 0) for values in self._joint_values]
        found = [self._read(view) for view in views]
        for trace in (view.trace for view in views):
            _check_masks(single, trace, (*self._tables,))
            for name, table in self._tables.items():
                if not torch.equal(_support_of(trace.nodes[name]["fn"]).unique(dim=0), table.unique(dim=0)):
                    raise ValueError(f"the values that site {name!r} can take depend on those of other sites")
        generator, known = torch.Generator().manual_seed(0), [self._by_site(view) for view in views]
        for _ in range(ROW_TRIES if self._plates else 0):
            places = torch.randint(len(views), self._rows, generator=generator)
            mixed = View(trace_at(self._values(places)), single, None, 0)
            mixed.check_structure()
            for name, here in self._by_site(mixed).items():
                there, inside = torch.stack([by_site[name] for by_site in known]), self._is_inside(single.nodes[name])
                wanted = there.gather(0, places.to(there.device).unsqueeze(0))[0] if inside else there
                if not torch.allclose(here.expand_as(wanted), wanted, rtol=1e-5, atol=1e-4, equal_nan=True):
                    plates = f"plate{'s' * (len(self._plates) > 1)} {', '.join(map(repr, self._plates))}"
                    place, which = ("in", "other") if inside else ("outside of", "several")
                    raise _RowsDepend(f"site {name!r} {place} {plates} depends on the values of {which} rows")
        return found[0][REST].unsqueeze(0) + self._scale * torch.stack([f[ROWS] for f in found]).logsumexp(0).sum()

    def log_prob(self, run: Run, held: Values, size: int) -> Tensor:
        """Return the log-density of N draws of the continuous latents, ``(N,)`` in nats."""
        rest, rows = self._joint(run, held, size)
        return rest + self._scale * rows.logsumexp(0).reshape(size, -1).sum(-1)

    @torch.no_grad()
    def sample(self, run: Run, held: Values, size: int) -> Values:
        """Draw the discrete latents given N draws of the others: for each site ``(N, *site_shape)``."""
        _, rows = self._joint(run, held, size)
        return self._values(torch.distributions.Categorical(logits=rows.movedim(0, -1)).sample())

    def _values(self, places: Tensor) -> Values:
        """Return the discrete latents where each row has one of the joint values, ``(*batch, *rows)``."""
        batch = places.shape[: places.dim() - len(self._rows)]
        return {name: table[places].reshape(batch + self._shapes[name]) for name, table in self._tables.items()}

    def _joint(self, run: Run, held: Values, size: int) -> tuple[Tensor, Tensor]:
        """Return the log-density outside the plates, ``(N,)``, and by value and row, ``(values, N, *rows)``."""
        found = [run(self._read, held, size, rows=values) for values in self._joint_values]
        return found[0][REST], torch.stack([terms[ROWS] for terms in found])

    def _read(self, view: View) -> Values:
        view.check_structure()  # a site that only some values lead to would be counted with all values
        terms = self._inside(view)
        return {REST: terms.pop(REST), ROWS: sum(terms.values(), torch.zeros(()))}

    def _inside(self, view: View) -> Values:
        """Return the scaled log-density of the sites in the plates by row, and that of all others as ``REST``."""
        inside = {name: site for name, site in view.trace.nodes.items() if self._is_inside(site)}
        terms, lead = _terms_of(view, inside, self._tables), int(view.size is not None)
        rows = {n: site["scale"] / self._scale * self._by_row(terms[n], lead) for n, site in inside.items()}
        return {REST: terms[REST], **rows}

    def _by_site(self, view: View) -> Values:
        """Return the log-density of each site of one draw: by row in the plates, and the sum outside of them."""
        terms = self._inside(view)
        names = [name for name, site in view.trace.nodes.items() if site["type"] == "sample"]
        return {name: terms[name] if name in terms else view.log_prob(name.__eq__) for name in names}

    def _is_inside(self, site: Site) -> bool:
        return site["type"] == "sample" and self._plates.keys() <= _plate_dims(site).keys()

    def _by_row(self, term: Tensor, lead: int) -> Tensor:
        """Sum a log-density over all dimensions except those of the draws, ``lead`` in front, and the plates."""
        front, shape = term.shape[:lead], term.shape[lead:]
        depth = max((-dim for dim in self._dims), default=0)
        term = term.reshape(front + torch.Size((1,) * (depth - len(shape))) + shape)
        others = [dim for dim in range(lead - term.dim(), 0) if dim not in self._dims]
        return (term.sum(others) if others else term).expand(front + self._rows)


def _terms_of(view: View, sites: Mapping[str, Site], discrete: Mapping[str, Any]) -> Values:
    """Return the unscaled log-density of some sites by name, and the log-density of all others as ``REST``."""
    found = {REST: view.log_prob(lambda name: name not in sites)}
    view.trace.compute_log_prob(lambda name, _: name in sites)
    for name in sites:
        site = view.trace.nodes[name]
        mask = None if name in discrete else site["mask"]  # a sum over all values is 1 with or without a mask
        found[name] = view.by_draw(scale_and_mask(site["unscaled_log_prob"], mask=mask))
    return found


def _check_masks(one: Trace, other: Trace, discrete: tuple[str, ...]) -> None:
    """Raise ValueError if the mask of a latent depends on discrete values: a masked latent has no density there."""
    for name in [name for name, _ in one.iter_stochastic_nodes() if name not in discrete]:
        here, there = (torch.as_tensor(mask_of(trace.nodes[name]).every) for trace in (one, other))
        if not torch.equal(*torch.broadcast_tensors(here, there)):
            fault = f"latent site {name!r} is masked at some discrete values, where nothing bounds it"
            raise ValueError(f"{fault}: leave the mask out, so that its prior stays in")


def _support_of(fn: Any) -> Tensor:
    """Return all values of a discrete distribution, ``(number, *event_shape)``."""
    return with_values(fn).enumerate_support(expand=False).reshape(-1, *fn.event_shape)


def _plate_dims(site: Site) -> dict[str, int]:
    """Return the dimensions of the plates of a site by their names, from left to right."""
    return {frame.name: frame.dim for frame in sorted(plates_of(site), key=lambda frame: frame.dim)}


class _SamplingRing(LogRing):
    """Pyro's sums and products in log space, with draws as gradients.

    Its backend of ``opt_einsum`` is this module, where ``einsum``, ``tensordot`` and ``transpose`` are found by name.
    """

    _backend = __name__


class _LogSumExp(torch.autograd.Function):
    """log Σ exp over the last dimension, with a draw as gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.logsumexp(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        share = x.softmax(-1).nan_to_num(1.0)  # draws without a density get discrete values too, and any will do
        place = torch.multinomial(share.reshape(-1, x.shape[-1]), 1).reshape(gradient.shape)
        return torch.nn.functional.one_hot(place, x.shape[-1]) * gradient.unsqueeze(-1)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Sum operands over the dimensions that an equation names, and log-sum-exp over those that its output lacks."""
    inputs, output = equation.split("->")
    summed = sorted(set(inputs) - set(output) - {","})
    total = torch.zeros(())
    for names, operand in zip(inputs.split(","), operands, strict=True):
        sizes = dict(zip(names, operand.shape, strict=True))
        ordered = operand.permute([names.index(dim) for dim in (*output, *summed) if dim in names])
        total = total + ordered.reshape([sizes.get(dim, 1) for dim in (*output, *summed)])
    return _LogSumExp.apply(total.flatten(len(output))) if summed else total


def transpose(operand: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Permute the dimensions of an operand."""
    return operand.permute(axes)


tensordot = Tensordot(einsum)
