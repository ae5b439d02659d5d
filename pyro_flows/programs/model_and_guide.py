"""A task: a model with its arguments, and a guide of its latents, traced once and run for many draws at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine, validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from ..arguments import check_program
from ..threads import keep_memory
from ..user_code import warn_user
from . import sites
from .checks import check_crossed, check_match, check_observed, explained, lacking
from .engines import View, in_batches
from .log_density import RunBudget
from .program import Args, Function, Kwargs, Program, arguments_of, nesting_of, trace_of, vectorize_of, writable
from .runner import GIVEN, TOTAL, Choice, Runner, check_noise, choose, why_alone
from .sites import Site, Values, value_of

LOG_Q = "the guide's log-density"  # a key next to the names of sites
Of = Callable[[Site], Tensor]  # a tensor of a site, such as its value


class Draws(NamedTuple):
    """N draws of a guide.

    Attributes:
        latents: The values of each latent that the guide draws, ``(N, *site_shape)``.
        log_p: The model's log-density at them, ``(N,)`` in nats, with discrete latents summed out.
        log_q: The guide's log-density.
    """

    latents: Values
    log_p: Tensor
    log_q: Tensor

    def latents_at(self, index: Tensor) -> Values:
        """Return the latents of the draws at some indices, ``(K,)``."""
        return {name: value[index] for name, value in self.latents.items()}

    def take(self, index: Tensor) -> Draws:
        """Return the draws at some indices, ``(K,)``."""
        return Draws(self.latents_at(index), self.log_p[index], self.log_q[index])


class Task:
    """A model and a guide with the model's arguments.

    Args:
        model: A Pyro model, or a :class:`~pyro_flows.Program`.
        guide: A Pyro guide.  Discrete latents that it lacks are summed out, if their support is finite.
        args: The model's arguments.
        kwargs: Its keyword arguments.

    Attributes:
        model: The model as a :class:`~.runner.Runner`.
        guide: The guide as a :class:`~.runner.Runner`.
        given: The model's arguments by their names.
        traces: The traces of one run of model and guide, in this order.
        latents: The names of the model's latents except those that are summed out.
        own: The names of the sites that the guide draws, without sites of type ``Delta``.
        left_out: The model's arguments that are None; a site that observes one draws its data.
        observes: True if a site of the model is observed.
        subsampled: The first plate that runs over a part of its rows, in words, or an empty string.
        has_bare_dimensions: True if a site of the model has dimensions that neither plates nor events declare.

    Raises:
        ValueError: If model or guide do not run vectorised over draws as the program asks.
    """

    def __init__(self, model: Function, guide: Function, args: Args, kwargs: Kwargs) -> None:
        keep_memory()
        check_program(model=model, guide=guide)
        self._arguments, self.given = (args, kwargs), arguments_of(model, args, kwargs)
        self._guide, self._vectorize, self._weighs, self._warns = guide, vectorize_of(model), False, True
        self._model, (single, drawn) = writable(model, self.once)
        check_crossed("", single)
        check_observed("", single, self.given)
        nesting, enumerated = nesting_of(drawn, single), tuple(lacking(single, drawn, summable=True))
        self.traces, self.subsampled = (single, drawn), sites.subsampled_plate(single)
        self.left_out = [name for name, value in self.given.items() if value is None]
        nodes = single.nodes.values()
        self.observes = any(sites.is_observation(site) and not site_is_subsample(site) for site in nodes)
        self.guide = Runner(guide, args, kwargs, drawn, nesting, choose=functools.partial(self._choose, "guide"))
        program, choice = self._model, functools.partial(self._choose, "model")
        if sites.hides_nan(single):
            program = sites.WithoutHiddenNaN()(program)
        self.model = Runner(program, args, kwargs, single, nesting, enumerated, choice)
        latents = self.model.single.iter_stochastic_nodes()
        unknown = [(name, site) for name, site in latents if name not in enumerated]
        self.latents = [name for name, site in unknown if name in drawn.nodes or not sites.is_point(site["fn"])]
        self.has_bare_dimensions = sites.has_bare_dimensions(single)
        own = self.guide.single.iter_stochastic_nodes()
        self.own = [name for name, site in own if not isinstance(site["fn"], dist.Delta)]

    def of(self, guide: Function, model: Function | None = None) -> Task:
        """Return the task of another guide of the model, or of the model changed by a handler, with the same engine."""
        engine = "auto" if model else self.model.engine if self.is_settled else self._vectorize
        other = Task(Program(model or self.model.call, vectorize=engine), guide, *self._arguments)
        other._warns = model is not None or not self.is_settled
        return other

    @torch.no_grad()
    def once(self, model: Function | None = None) -> tuple[Trace, Trace]:
        """Run guide and model once; return the traces of the model and of the guide.

        Parameters that are not valid at this draw are no error, since other draws may give valid ones.
        """
        with poutine.block():
            with explained("guide", self.given):
                drawn = trace_of(self._guide, *self._arguments)
            replayed = _Replay(trace=drawn)(model or self._model)
            with explained("model", self.given):
                try:
                    return trace_of(replayed, *self._arguments), drawn
                except ValueError:
                    with validation_enabled(False):
                        return trace_of(replayed, *self._arguments), drawn

    @functools.cached_property
    def broadcasting(self) -> Function:
        """The model as a program that runs under an outer plate of draws: itself, or lifted by its engine."""
        model = self.settle().model
        return model.call if model.engine == "plate" and not model.enumerated else Lifted(model, self.latents)

    @property
    def runs_one_by_one(self) -> bool:
        """True if model or guide run one draw at a time."""
        return "loop" in (self.model.engine, self.guide.engine)

    def budget(self, seconds: float, *, by_clock: bool = False) -> RunBudget:
        """Return the runs that a time allows; if model and guide run many draws at once, the clock alone may limit."""
        return RunBudget(seconds, sum(part.choice.seconds for part in (self.model, self.guide)), by_clock)

    @property
    def draws_rows(self) -> bool:
        """True if the guide draws a minibatch of latents, because their plate is subsampled."""
        frames = [frame for name in self.latents for frame in self.model.single.nodes[name]["cond_indep_stack"]]
        return any(frame.name in self.model.subsamples for frame in frames)

    def check(self, *, whole: bool = True) -> Task:
        """Let draws be weighed, and return the task.

        Args:
            whole: True to weigh draws against all rows of a subsampled plate that holds data alone.

        Raises:
            ValueError: If the guide is a point, or has other latents than the model.  If a subsampled plate holds
                latents, or does not draw its rows.  If engines are chosen, and the density is too noisy for weights.
        """
        check_match(*self.traces, self.left_out)
        shares = self.model.all_rows(list(self.sites("observed"))) if whole and not self.draws_rows else []
        if self.subsampled and not shares:
            fault = f"{self.subsampled}: draws would be weighed against different data"
            raise ValueError(f"{fault}. Let the plate run over all rows.")
        if self.is_settled:
            check_noise(self.model.choice.noise, is_weighed=whole, warns=False)
        self._weighs, self.model.shares = whole, shares
        return self

    @functools.cached_property
    def _second(self) -> Values:
        """A draw of the guide next to that of the traces, by which engines are chosen: ``(1, *site_shape)`` each."""
        names = dict.fromkeys((*self.own, *self.latents))
        with torch.no_grad():
            return self.guide.alone(lambda view: {name: view.read(name) for name in names}, 1)

    def _choose(self, role: str, runner: Runner) -> Choice:
        names, asked = (self.own, "auto") if role == "guide" else (self.latents, self._vectorize)
        choice = choose(runner, {name: self._second[name] for name in names}, asked, role)
        if choice.engine == "loop" and self._vectorize == "auto":
            warn_user(why_alone(role, choice))
        if role == "model":
            check_noise(choice.noise, is_weighed=self._weighs, warns=self._warns)
        return choice

    def settle(self) -> Task:
        """Choose the engines of guide and model now, by two draws of the guide, and return the task.

        Raises:
            ValueError: If draws are to be weighed, and the model's log-density is too noisy for that.

        Warns:
            UserWarning: If the model runs one draw at a time, or its log-density is an estimate whose noise shows.
        """
        for program in (self.guide, self.model):
            program.choice  # noqa: B018 - it is made now
        return self

    @property
    def is_settled(self) -> bool:
        """True if the engines are chosen."""
        return "choice" in vars(self.model)

    @torch.no_grad()
    def draw(self, number: int, batch_size: int = 1000) -> Draws:
        """Draw from the guide and score the draws by both, ``batch_size`` at a time."""

        def read(view: View) -> Values:
            return {TOTAL: view.log_prob(), **{name: view.read(name) for name in self.latents}}

        def step(_: Values, size: int) -> Values:
            found = self.guide.sample(read, {}, size)
            log_q = found.pop(TOTAL)
            return {**found, TOTAL: self.model.log_prob(found, size), LOG_Q: log_q}

        self.settle()
        found = in_batches(step, {}, number, batch_size)
        return Draws(log_p=found.pop(TOTAL), log_q=found.pop(LOG_Q), latents=found)

    @torch.no_grad()
    def read(
        self, latents: Values, sites: list[str], what: Of = value_of, *, batch_size: int = 1000, forget: bool = False
    ) -> Values:
        """Run the model at N draws of all latents, discrete ones included, and read sites: each ``(N, *shape)``.

        Args:
            latents: The draws.
            sites: The sites.
            what: The tensor to read off a site; by default its value.
            batch_size: The number of draws to run at once.
            forget: True to draw the observed sites anew instead of the data.
        """
        model = self.model.with_(call=_Anew()(self.model.call)) if forget else self.model
        if model.enumerated and model.engine != "loop":
            model = model.by("vmap")  # at values of its discrete latents it may not broadcast

        def step(held: Values, size: int) -> Values:
            return model.sample(lambda view: {n: view.read(n, what) for n in sites}, held, size)

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
        """Return the model's sites of a group by name: see :func:`group_of`."""
        return {name: site for name, site in self.model.single.nodes.items() if sites.group_of(site) == group}


class Lifted:
    """A model as a program that broadcasts, for objectives to run if the model itself does not broadcast.

    Its latents are the model's latents except those that are summed out, in the model's plates, so that any guide's
    trace can be replayed.  All of its density is one factor, which an engine computes.  So Pyro's ELBOs, which do not
    know engines, train a guide under an outer plate of particles, whatever shapes the model uses.

    Args:
        model: The model.
        latents: The names of its latents except those that are summed out.
    """

    def __init__(self, model: Runner, latents: list[str]) -> None:
        self._model = model
        if model.enumerated:
            model.enumeration  # noqa: B018 - found once, for all copies that take other rows
        self._sites = {name: model.single.nodes[name] for name in latents}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Take the latents from a guide's trace, and add the model's log-density of each draw."""
        rows, plates = self._plates()
        values = {name: self._sample(name, site, plates) for name, site in self._sites.items()}
        shapes = {name: site["value"].shape for name, site in self._sites.items()}
        by_draw = [len(value) for name, value in values.items() if value.dim() > len(shapes[name])]
        size = by_draw[0] if by_draw else 1
        held = {name: value.reshape(-1, *shapes[name]).expand(size, *shapes[name]) for name, value in values.items()}
        log_prob = self._model.with_(rows={**self._model.rows, **rows}).log_prob(held, size)
        dims = max(value.dim() - self._sites[name]["fn"].event_dim for name, value in values.items())
        pyro.factor("_pyro_flows_log_density", log_prob.reshape(size, *(1,) * (dims - 1)) if by_draw else log_prob[0])

    def _sample(self, name: str, site: Site, plates: dict[str, Any]) -> Any:
        with ExitStack() as stack:
            for frame in sites.plates_of(site):
                stack.enter_context(plates[frame.name])
            shape = site["value"].shape
            depth = len(shape) - site["fn"].event_dim
            return pyro.sample(name, dist.ImproperUniform(constraints.real, shape[:depth], shape[depth:]).mask(False))

    def _plates(self) -> tuple[Values, dict[str, Any]]:
        """Return the rows of subsampled plates, and the plates that latents lie in."""
        plates: dict[str, Any] = {}
        for frame in {frame for site in self._sites.values() for frame in sites.plates_of(site)}:
            with poutine.block(hide=self._model.given):
                plates[frame.name] = sites.plate_like(frame)
        for name, fn in self._model.subsamples.items():
            if name not in plates:
                plates[name] = pyro.plate(name, fn.size, fn.subsample_size)
        return {name: plates[name].indices for name in self._model.subsamples}, plates


class _Replay(ReplayMessenger):
    """Puts a guide's draws into a model's sites, keeps their marks ``infer={...}``, and marks plates of given rows."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        marks = {**(msg["infer"] or {}), GIVEN: site_is_subsample(msg) and msg["value"] is not None}
        super()._pyro_sample(msg)
        msg["infer"] = {**(msg["infer"] or {}), **marks}


class _Anew(Messenger):
    """Draws observed sites anew, in as many rows as they observe.

    Pyro's ``uncondition`` draws deterministic sites anew too, which would grow by the size of each plate.
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if sites.group_of(msg) == "observed":
            rows = msg["value"].shape[: msg["value"].dim() - msg["fn"].event_dim]
            msg["fn"] = msg["fn"].expand(torch.broadcast_shapes(msg["fn"].batch_shape, rows))
            msg["value"], msg["is_observed"] = None, False
