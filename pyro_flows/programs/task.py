"""A task: a model with its arguments, and a guide of its latents, traced once and run for many draws at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .. import arguments
from ..memory import keep_memory
from .broadcasting import Lifted
from .engine_choice import settle
from .engines import ENGINES, Site, Values, View, value_of
from .latents import check_match, is_point, summable
from .nesting import check_crossed, has_bare_dimensions, nesting_of
from .noisy_density import check_noise, warn_user
from .program import Program
from .row_parts import parts_of
from .traces import trace_of


class Draws(NamedTuple):
    """N draws of a guide.

    Attributes:
        latents: The values of each latent that the guide draws, ``(N, *site_shape)``.
        log_p: The model's log-density at them, ``(N,)`` in nats, with discrete latents summed out.
        log_q: The guide's.
    """

    latents: Values
    log_p: Tensor
    log_q: Tensor

    def take(self, index: Tensor) -> Draws:
        """The draws of some numbers, ``(K,)``."""
        return Draws({name: value[index] for name, value in self.latents.items()}, self.log_p[index], self.log_q[index])


class Task:
    """A model and a guide with the model's arguments.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.  Discrete latents that it lacks are summed out, if their support is finite.
        args: The model's arguments.
        kwargs: Its keyword arguments.
        vectorize: The way to run many draws: ``"plate"``, ``"vmap"``, ``"loop"``, or the first of these that works.

    Attributes:
        model: The model as a :class:`Program`.
        guide: The guide as one.
        traces: Those of one run of model and guide, in this order.
        latents: The names of the model's latents, but those that are summed out.
        own: The names of the sites that the guide draws, but those that only place others' draws.
        is_settled: True once the engines are chosen.
        has_bare_dimensions: True if a site of the model has dimensions that neither plates nor events declare.

    Raises:
        ValueError: If model or guide do not run vectorised over draws as ``vectorize`` asks.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        vectorize: str = "auto",
    ) -> None:
        keep_memory()
        check_vectorize(vectorize)
        arguments.check_program(model=model, guide=guide)
        self._programs, self._arguments, marks = (model, guide), (args, kwargs), _Marks()
        single, drawn = self.once(marks)
        marks.keep(single)
        check_crossed(single)
        nesting = nesting_of(drawn, single)
        self.traces, self._vectorize = (single, drawn), vectorize
        self.is_settled = self._weighs = False
        enumerated = tuple(summable(single, drawn))
        self.guide = Program(guide, args, kwargs, drawn, nesting)
        self.model = Program(model, args, kwargs, single, nesting, enumerated, tuple(marks.given))
        sites = dict(self.model.single.iter_stochastic_nodes())
        follows = {name for name, site in sites.items() if name not in drawn.nodes and is_point(site["fn"])}
        self.latents = [name for name in sites if name not in {*enumerated, *follows}]
        self.has_bare_dimensions = has_bare_dimensions(single)
        own = self.guide.single.iter_stochastic_nodes()
        self.own = [name for name, site in own if not isinstance(site["fn"], dist.Delta)]

    @torch.no_grad()
    def once(self, *watching: Messenger) -> tuple[Trace, Trace]:
        """Run guide and model once; return the traces of the model and of the guide."""
        model, guide = self._programs
        args, kwargs = self._arguments
        for messenger in watching:
            model = messenger(model)
        with poutine.block():
            drawn = trace_of(guide, args, kwargs)
            return trace_of(poutine.replay(model, trace=drawn), args, kwargs), drawn

    @functools.cached_property
    def broadcasting(self) -> Callable[..., Any]:
        """The model as a program that runs under an outer plate of draws: as it is, or lifted by its engine."""
        self.settle()
        return (
            self.model.call
            if self.model.engine == "plate" and not self.model.enumerated
            else Lifted(self.model, self.latents)
        )

    @property
    def runs_one_by_one(self) -> bool:
        """True if model or guide run one draw at a time."""
        return "loop" in (self.model.engine, self.guide.engine)

    @property
    def nesting(self) -> int:
        """The number of dimensions that the plates of model and guide take."""
        return self.model.nesting

    @property
    def subsampled(self) -> str:
        """Words for the first plate that runs over a part of its rows, or an empty string."""
        return subsampled_plate(self.traces[0])

    def check(self, *, whole: bool = True) -> Task:
        """Refuse a guide whose draws cannot be weighed, and return the task.

        Args:
            whole: True to weigh draws against all rows of a subsampled plate that holds data alone.

        Raises:
            ValueError: If the guide is a point, lacks a latent or has another, or a plate is subsampled and holds
                latents, or gets its rows from elsewhere.
        """
        check_match(*self.traces)
        self._weighs = whole
        if whole and self._can_be_whole:
            self.model.whole()
        elif self.subsampled:
            raise ValueError(
                f"{self.subsampled}: draws would be weighed against different data. Let the plate run over all rows."
            )
        return self

    @property
    def _can_be_whole(self) -> bool:
        """True if one plate is subsampled, by indices that are drawn, and holds none of the guide's latents."""
        if len(self.model.subsamples) != 1:
            return False
        (plate,) = self.model.subsamples
        nodes = self.model.single.nodes
        inside = [name for name in self.latents if plate in [frame.name for frame in nodes[name]["cond_indep_stack"]]]
        others = [f for site in nodes.values() for f in site.get("cond_indep_stack", ()) if f.name != plate]
        if inside or any(f.full_size is not None and f.size < f.full_size for f in others):
            return False
        summed = [nodes[name]["cond_indep_stack"] for name in self.model.enumerated]
        if not all(plate in [frame.name for frame in stack] for stack in summed):
            return False  # a sum over a latent outside of the plate does not fall into parts
        return self._follows_rows(plate)

    def _follows_rows(self, plate: str) -> bool:
        """True if the data in a plate are other ones at other indices: a minibatch that is given has no other rows."""
        sites = self.sites("observed").items()
        names = [n for n, site in sites if plate in [frame.name for frame in site["cond_indep_stack"]]]
        rows = self.model.rows
        first, *_, last = parts_of(plate, rows[plate], self.model.subsamples[plate].size)
        one, other = (
            self.model.with_(rows={**rows, plate: part.rows}).alone(lambda view: {n: view.read(n) for n in names}, 1)
            for part in (first, last)
        )
        return any(not torch.equal(one[name], other[name]) for name in names)

    def settle(self) -> Task:
        """Choose how guide and model run many draws, by two draws of the guide, and return the task.

        Raises:
            ValueError: If draws are to be weighed, and the model's log-density is too noisy for that.

        Warns:
            UserWarning: If the model runs one draw at a time, or its log-density is an estimate whose noise shows.
        """
        if self.is_settled:
            return self
        names = dict.fromkeys((*self.own, *self.latents))
        with torch.no_grad():
            found = self.guide.alone(lambda view: {name: view.read(name) for name in names}, 1)
        own, latents = ({name: found[name] for name in part} for part in (self.own, self.latents))
        settle(self.guide, own, "auto", "guide")
        settle(self.model, latents, self._vectorize, "model")
        self.is_settled = True
        if self._vectorize == "auto":
            for role, program in (("model", self.model), ("guide", self.guide)):
                if program.engine == "loop":
                    warn_user(f"the {role} runs one draw at a time, as it{program.fault}.")
        check_noise(self.model.noise, is_weighed=self._weighs)
        return self

    @torch.no_grad()
    def draw(self, number: int, batch_size: int = 1000) -> Draws:
        """Draw from the guide and score the draws by both, ``batch_size`` at a time."""

        def read(view: View) -> Values:
            return {**{f"latent {name}": view.read(name) for name in self.latents}, "log_q": view.log_prob()}

        def step(_: Values, size: int) -> Values:
            found = self.guide.sample(read, {}, size)
            log_p = self.model.log_prob({name: found[f"latent {name}"] for name in self.latents}, size)
            return {**found, "log_p": log_p}

        self.settle()
        found = in_batches(step, {}, number, batch_size)
        return Draws({name: found[f"latent {name}"] for name in self.latents}, found["log_p"], found["log_q"])

    @torch.no_grad()
    def read(
        self,
        latents: Values,
        sites: list[str],
        what: Callable[[Site], Tensor] = value_of,
        *,
        batch_size: int = 1000,
        forget: bool = False,
    ) -> Values:
        """Run the model at N draws of all latents, discrete ones included, and read sites: each ``(N, *shape)``.

        Args:
            latents: The draws.
            sites: The sites.
            what: What to read off a site; by default its value.
            batch_size: How many draws are run at once.
            forget: True to draw the observed sites anew, in place of the data; deterministic sites cannot be read then.
        """
        place, model = _forgetful if forget else poutine.condition, self.model.at_values

        def step(held: Values, size: int) -> Values:
            return model.sample(lambda view: {n: view.read(n, what) for n in sites}, held, size, place=place)

        return in_batches(step, latents, len(next(iter(latents.values()))), batch_size)

    def complete(self, latents: Values, batch_size: int = 1000) -> Values:
        """Add draws of the discrete latents that are summed out, given N draws of the others."""
        if not self.model.enumerated:
            return latents
        number = len(next(iter(latents.values())))
        return {**latents, **in_batches(self.model.discrete, latents, number, batch_size)}

    def values(self, latents: Values, batch_size: int = 1000) -> Values:
        """Return latents and deterministic sites at N draws of the guide's latents: each ``(N, *site_shape)``."""
        return self.read(self.complete(latents, batch_size), list(self.sites("posterior")), batch_size=batch_size)

    def sites(self, group: str) -> dict[str, Site]:
        """Return the model's sites that belong to a group, by name: see :func:`group_of`."""
        return {name: site for name, site in self.model.single.nodes.items() if group_of(site) == group}


def check_vectorize(vectorize: Any) -> None:
    """Raise ValueError unless a way to vectorise exists."""
    if vectorize not in ("auto", *ENGINES):
        raise ValueError(
            f'vectorize must be "auto", {", ".join(map(repr, ENGINES))}, got {arguments.quoted(vectorize)}. '
            "Leave it out to use the fastest that works."
        )


def in_batches(step: Callable[[Values, int], Values], held: Values, number: int, batch_size: int) -> Values:
    """Call a function for batches of draws, and return what it makes of all of them.

    Args:
        step: Takes the values that are held in a batch and its size N; returns tensors ``(N, *shape)``.
        held: The values of all draws, ``(number, *shape)``.
        number: The number of draws.
        batch_size: The largest number in a batch.
    """
    if not arguments.is_integer(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
    parts = []
    for start in range(0, number, batch_size):
        size = min(batch_size, number - start)
        parts.append(step({name: value[start : start + size] for name, value in held.items()}, size))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def group_of(site: Site) -> str | None:
    """Return a site's group: ``"posterior"`` for latent and deterministic sites, ``"observed"``, or None."""
    if site["type"] != "sample" or site_is_subsample(site) or not isinstance(site["value"], Tensor):
        return None
    if not site["is_observed"] or site["infer"].get("_deterministic", False):
        return "posterior"
    return None if type(site["fn"]).__name__ == "Unit" else "observed"


def subsampled_plate(trace: Trace) -> str:
    """Words for the first plate of a trace that runs over a part of its rows, or an empty string."""
    for name, site in trace.nodes.items():
        for frame in site.get("cond_indep_stack", ()):
            if frame.full_size is not None and frame.size < frame.full_size:
                rows = f"{frame.size} of {frame.full_size} rows"
                return f"site {name!r} lies in plate {frame.name!r}, which is subsampled ({rows})"
    return ""


def check_trained(caller: str, guide: Any) -> None:
    """Refuse a guide that was never trained, where that shows."""
    if getattr(guide, "is_fresh", False) or getattr(guide, "prototype_trace", guide) is None:
        kind = type(guide).__name__
        raise ValueError(f"{caller}: the {kind} was never trained; fit it first: fit_svi(model, guide, ...).")


def _forgetful(model: Callable[..., Any], data: Values) -> Callable[..., Any]:
    """Hold latents, and let the observed sites be drawn anew."""
    # To Pyro what is deterministic is observed too: drawn anew in a plate, it would grow by the plate's size.
    return poutine.condition(poutine.uncondition(_AllRows()(poutine.block(model, hide_fn=_is_derived))), data=data)


def _is_derived(message: Site) -> bool:
    return message["type"] == "sample" and message["is_observed"] and group_of(message) != "observed"


class _Marks(Messenger):
    """Keeps the marks of a model's sites, ``infer={...}``: where a guide is replayed, its marks take their place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, dict[str, Any]] = {}
        self.given: list[str] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        self.found[msg["name"]] = dict(msg["infer"] or {})
        if site_is_subsample(msg) and msg["value"] is not None:
            self.given.append(msg["name"])

    def keep(self, trace: Trace) -> None:
        """Give the sites of a trace their marks back."""
        for name, mark in self.found.items():
            if name in trace.nodes:
                trace.nodes[name]["infer"] = {**trace.nodes[name]["infer"], **mark}


class _AllRows(Messenger):
    """Draws as many rows anew as a site observes, also where its distribution is one for all of them."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if group_of(msg) == "observed":
            rows = msg["value"].shape[: msg["value"].dim() - msg["fn"].event_dim]
            msg["fn"] = msg["fn"].expand(torch.broadcast_shapes(msg["fn"].batch_shape, rows))
