"""The base class of guides made of flows: default training, setup, summaries, unique names, and independent copies.

*Choosing a flow* in the docs says how the numbers of the default training were found.
"""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine, validation_enabled
from pyro.infer.autoguide import AutoGuide, init_to_value
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import PyroModule
from pyro.nn.module import _is_module_local_param_enabled
from pyro.params.param_store import param_with_module_name
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints

from ..arguments import check_integers, check_kind, check_program, check_tensors
from ..flows import Flow
from ..flows.distribution import FlowDistribution
from ..programs.checks import BUILT_IN, count_nan, explained, warn_untrained
from ..programs.log_density import is_breakdown
from ..programs.program import arguments_of, outline, outline_of, signature_of
from ..programs.sites import is_discrete, named, plate_like
from .contexts import check_encoder
from .draw_watch import DrawWatch
from .guide_call import NONE, Call, Calls, Found
from .guide_flow import LIMITS
from .left_out import HideDiscrete, draw_discrete, with_reparametrised
from .packing import MarkCircles, Packing, bijection_onto, scalar_support
from .start_location import init_to_center, settle_start


@dataclass(frozen=True)
class SavedSite:
    """A latent site of a guide.

    Args:
        name: Its name.
        support: The support of its values.
        value: The value that the guide starts from, ``batch_shape + event_shape``.
        batch_shape: The batch shape of its distribution, with its plates.
        event_shape: The event shape of its distribution.
        plates: Its plates, the outermost first: name, dim, the number of rows that the guide saw, and of all rows.
        present: The mask of its present elements, or None if all are present.
    """

    name: str
    support: constraints.Constraint
    value: Tensor
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    plates: tuple[tuple[str, int, int, int], ...]
    present: Tensor | None = None


def check_fits(flow: Flow | None, size: int, context_dim: int) -> None:
    """Raise ValueError unless a flow is over ``size`` numbers with contexts of a width; None stands for 0 numbers."""
    got = (0, 0) if flow is None else (flow.event_shape.numel(), flow.context_dim)
    if got[0] != size or (size and got[1] != context_dim):
        fault = f"the flow is over {got[0]} numbers with a context of width {got[1]}"
        raise ValueError(f"{fault}, but the sites have {size} and {context_dim}")


class Schedule(NamedTuple):
    """The number of steps and of draws per step, the step size, and the largest norm of a gradient."""

    steps: int = 3000
    num_particles: int = 64
    lr: float = 0.01
    clip_norm: float = 100.0


def schedule_of_many(number: int, *, near: bool) -> Schedule:
    """Return the schedule that suits one flow over more than 32 latents.

    Guides with about forty latents take the most steps.  A step is still cheap there, and funnels of many dimensions
    train slowly.  A guide that starts near the posterior needs half as many, or 100 beyond 4096 latents, where a
    step is dear.
    """
    steps = 2100 if number <= 64 else 1000
    if near:
        steps = steps // 2 if number <= LIMITS.dense else 100
    return Schedule(steps, num_particles=256, clip_norm=1.0)


class Plan:
    """The properties of a guide that its training depends on.  These are the defaults for guides of other packages.

    Attributes:
        is_joint: True if the guide is one flow over all latents, which can be compared with others.
    """

    is_joint = False

    @property
    def is_fresh(self) -> bool:
        """True if the guide is known to be untrained."""
        return False

    @property
    def takes_paths(self) -> bool:
        """True if path gradients suit the guide."""
        return True

    def schedule(self, *, near: bool = False, alone: bool = True, share: float = 1.0) -> Schedule:
        """Return the schedule that suits the guide.

        Args:
            near: True if the guide starts near the posterior.
            alone: True if only the guide is trained, by many draws per step, so that SOAP takes the steps.
            share: The share of the rows of a batch that this process has.
        """
        return Schedule()

    def by_soap(self) -> list[Tensor]:
        """Return the parameters that SOAP trains if only the guide is trained, by many draws per step."""
        return []

    def by_muon(self) -> list[Tensor]:
        """Return the weight matrices that Muon trains."""
        return []

    def prepare(self, call: Call) -> None:
        """Initialise, from the data that the guide will be trained on, layers that depend on their scale."""


def plan_of(guide: Any) -> Plan:
    """Return a guide itself if it is a plan, else the default plan."""
    return guide if isinstance(guide, Plan) else Plan()


SHOWN = 8  # latents in the repr of a guide
_used: set[str] = set()  # names of guides in Pyro's parameter store, which all guides of a process share
_live: weakref.WeakValueDictionary[str, FlowGuide] = weakref.WeakValueDictionary()


class FlowGuide(Plan, AutoGuide):
    """A guide whose networks are stored under a unique name in Pyro's parameter store."""

    num_summary_draws = 10_000
    recipes: tuple[str, ...]  # attributes that hold functions: copies share them, and pickles leave them out
    settings: tuple[str, ...]  # arguments of the class that files hold
    prototype_trace: Any
    packings: dict[str, Packing]  # the layout of the vector at each of the guide's sample statements
    row_plates: tuple[str, ...] = ()  # the plates whose rows have flows
    _given_plates: Sequence[str] = ()  # the plates to which the model gives rows, ``subsample=``
    _init_scale: Any

    def __init__(
        self, model: Callable[..., Any], encoder: Any, init_loc_fn: Callable[..., Any] | None, name: str | None
    ) -> None:
        check_encoder(type(self).__name__, encoder)
        check_program(model=model)
        owner = type(self).__name__  # not the guide itself, which would then refer to itself

        def start(site: dict[str, Any]) -> Any:
            try:
                return (init_loc_fn or init_to_center)(site)
            except BUILT_IN as error:
                if init_loc_fn is None or type(error) not in BUILT_IN:
                    raise
                fault = f"init_loc_fn fails at site {site['name']!r}"
                raise type(error)(f"{owner}: {fault}: {str(error).rstrip('.')}.") from error

        AutoGuide.__init__(self, InitMessenger(start)(HideDiscrete()(MarkCircles()(model))))
        self._chooses_start = init_loc_fn is None
        self._calls, self._watch = Calls(), DrawWatch()
        self._outline = outline_of(model)
        self._claim_name(name)

    def setup(self, *args: Any, **kwargs: Any) -> Any:
        """Build the guide now, by running the model, and return it.  A second call does nothing.

        Args:
            *args: The model's arguments, with data of the shapes that later calls have.
            **kwargs: Its keyword arguments.

        Raises:
            TypeError: If the model requires arguments and none are given, or a recipe fails.
            NotImplementedError: If torch knows no bijection onto the support of a latent.
            ValueError: If the model has no latents, or the guide cannot represent it.  The error names the site or
                plate, and the way out.
        """
        if self.prototype_trace is not None:
            self._adopt_stored()
            return self
        owner = type(self).__name__
        if self.model is None:
            raise ValueError(f"{owner}: this guide was saved before setup(), and saved guides have no model.")
        given = arguments_of(self.model, args, kwargs)
        try:
            with explained("model", given):
                self._set_up(*args, **kwargs)
        except Exception as error:
            self.prototype_trace = None  # a failed setup can be tried again
            if isinstance(error, TypeError) and not (args or kwargs or str(error).startswith(f"{owner}: ")):
                fault = f"this guide is new, and to set it up the model is called with what is given here: {error}"
                way = "Fit the guide first, or give the model's arguments here too"
                raise TypeError(f"{owner}: {fault}. {way}.") from error
            if type(error) is ValueError and is_breakdown(error) and not count_nan(given):
                way = "Give the guide a start where the model has a density: init_loc_fn=init_to_value(values={...})"
                raise ValueError(f"{owner}: {error} {way}.") from error
            raise
        return self

    def _set_up(self, *args: Any, **kwargs: Any) -> None:
        """Build the guide; if the model breaks down at the default start, find another one."""
        try:
            self._setup_prototype(*args, **kwargs)
        except ValueError as error:
            if not (self._chooses_start and is_breakdown(error)):
                raise
            with suppress(ValueError, RuntimeError):  # torch refuses to draw with a negative scale
                with validation_enabled(False):
                    self._setup_prototype(*args, **kwargs)
                call = self._call(args, kwargs)
                call.trace_at(call.start).compute_log_prob()
                return
            raise

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        # An amortised guide is trained on draws: the data may have no density, and the model may break at the centre.
        with validation_enabled(False) if self.is_amortised else nullcontext():
            AutoGuide._setup_prototype(self, *args, **kwargs)
            _check_continuous(self._call(args, kwargs))
            self._read_structure(self._call(args, kwargs))
            call = self._call(args, kwargs)
            found = self._calls.begin(call, varies=self.is_amortised)
            self._given_plates = found.given
            _check_whole(call)
            if not call.latents:
                raise ValueError(f"{call.owner}: the model has no latents.")
            if not self.is_amortised:
                settle_start(call, choose=self._chooses_start)
            self._build(call, found)
        self._adopt_stored()

    def _read_structure(self, call: Call) -> None:
        """Find the structure of the guide, for the latents of a prototype."""

    @abstractmethod
    def _build(self, call: Call, found: Found) -> None:
        """Pack the latents of a prototype, and build their flows."""

    @property
    @abstractmethod
    def is_amortised(self) -> bool:
        """True if the whole posterior is a function of the data, so that simulations can train it."""

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return Call(type(self).__name__, self.model, args, kwargs, self.prototype_trace, self.row_plates, self._outline)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> FlowGuide:
        """Move what the guide knows of its latents along with its parameters, for example by ``.double()``."""
        super()._apply(fn, *args)
        if self.prototype_trace is not None:
            latents = dict(self.prototype_trace.iter_stochastic_nodes())
            self.prototype_trace = self.prototype_trace.copy()  # copies of the guide share the trace and its sites
            self.prototype_trace.nodes.update({n: {**site, "value": fn(site["value"])} for n, site in latents.items()})
            self.packings = {name: packing.moved(fn) for name, packing in self.packings.items()}
        return self

    def compile(self, **settings: Any) -> None:
        """Compile the guide's flows once it is set up; see :meth:`~pyro_flows.flows.Flow.compile`.

        Draws, densities and gradients of Pyro's own ELBOs are compiled.  Path gradients, the default of ``fit_svi``,
        still run layer by layer.

        Raises:
            ValueError: If the guide was not set up yet, and has no flow.
        """
        if not (found := [module for module in self.modules() if isinstance(module, Flow)]):
            raise ValueError(f"{type(self).__name__}.compile: the guide has no flow yet; call setup(...) first.")
        for flow in found:
            flow.compile(**settings)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the latents, as Pyro's guides do: site name -> value; in Pyro's ``Predictive`` discrete ones too."""
        if self.prototype_trace is None:
            self.setup(*args, **kwargs)
        call, stored = self._call(args, kwargs), self._adopt_stored()
        self._state_parameters(stored)
        with self._watch.over(self, call):
            found = self._draws(call)
        return {**found, **draw_discrete(call, found)}

    @property
    @abstractmethod
    def data_encoders(self) -> list[Any]:
        """The encoders of the model's arguments."""

    @abstractmethod
    def _draws(self, call: Call) -> dict[str, Tensor]:
        """Sample the guide's latents, each at its sample statement."""

    @abstractmethod
    def _layouts(self, sites: dict[str, Any]) -> dict[str, Packing]:
        """Return the layout of the vector at each of the guide's sample statements, for some latent sites."""

    def check_same(self, call: Call) -> Found | None:
        """Raise ValueError if arguments change the latents, their shapes or supports; return the model's sites."""
        if call.model is None:
            return None
        found = call.look()
        self._calls.check(call, found)
        there = self._layouts({name: found.latents[name] for name in call.latents})
        for name, packing in self.packings.items():
            packing.check_same(call.owner, there[name])
        return found

    @torch.no_grad()
    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample from the guide, for all rows of the plates in the arguments.

        A million draws fit into memory if their values do, since networks see some of them at a time.

        Returns:
            For each latent site values of shape ``(num_samples, *site_shape)``.  Sites that ``poutine.reparam``
            replaced are included, as in Pyro's ``Predictive``; those of ``pyro.deterministic`` are not.  They are left
            out by a guide from a file, which has no model, by a call without the model's arguments, and if a plate is
            subsampled.
        """
        call = self._asked("sample", args, kwargs)
        check_integers(f"{call.owner}.sample", num_samples=num_samples)
        drawn = self._watch.checked(self, call, self._sampled(num_samples, call))
        return with_reparametrised(call, self._calls.reparametrised, drawn)

    def log_prob(self, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the guide's log-density, in nats, of constrained values, such as draws of another method.

        Values of all latent sites and rows, ``(*batch, *site_shape)``, have one of shape ``batch``; -inf outside of the
        support.  Rows that the model masks do not count.
        """
        check_tensors(f"{type(self).__name__}.log_prob", "values", values)
        call = self._asked("log_prob", args, kwargs)
        log_q = self._log_prob(values, call)
        if self.data_encoders and log_q.isnan().any():
            self._check_draw(call)
        return log_q

    @torch.no_grad()
    def _check_draw(self, call: Call) -> None:
        """Raise an error if a draw is not finite, since an encoder's data are far from those of training."""
        self._watch.checked(self, call, self._sampled(1, call))

    @abstractmethod
    def _sampled(self, number: int, call: Call) -> dict[str, Tensor]:
        """Sample the latents of all rows."""

    @abstractmethod
    def _log_prob(self, values: dict[str, Tensor], call: Call) -> Tensor:
        """Return the log-density of values of all rows."""

    def _asked(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return the call of a method whose answer depends on the rows in the arguments.

        Raises:
            TypeError: If a guide with rows is set up, and lacks arguments of its model.
        """
        if self.row_plates and self.prototype_trace is not None and self.model is not None:
            with suppress(ValueError):  # Python does not know the signature
                signature = signature_of(self.model)
                try:
                    signature.bind(*args, **kwargs)
                except TypeError as error:
                    call, owner = f"guide.{method}(..., {', '.join(signature.parameters)})", type(self).__name__
                    fault = f"the model's arguments must be given too, got {error}"
                    raise TypeError(f"{owner}.{method}: {fault}. Use {call}.") from error
        return self.setup(*args, **kwargs)._call(args, kwargs)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each latent, from ``num_summary_draws`` draws: site name -> ``site_shape``."""
        return self.quantiles(0.5, *args, **kwargs)

    def quantiles(self, quantiles: float | list[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of each latent, from ``num_summary_draws`` draws, or fewer for more than 2,000 numbers.

        Args:
            quantiles: Levels between 0 and 1, or a single one.
            *args: The model's arguments, if the guide is new or depends on data.
            **kwargs: Its keyword arguments.

        Returns:
            For each latent site values of shape ``(len(quantiles), *site_shape)``; ``site_shape`` for a single level.

        Warns:
            UserWarning: If the guide was never trained.
        """
        self._asked("quantiles", args, kwargs)
        one = sum(value.numel() for value in self.sample(1, *args, **kwargs).values())
        warn_untrained(f"{type(self).__name__}.quantiles", self)
        number, found = min(self.num_summary_draws, max(1000, 20_000_000 // one)), {}  # so that draws fit into memory
        for name, value in self.sample(number, *args, **kwargs).items():
            levels = torch.as_tensor(quantiles, dtype=value.dtype).cpu()
            found[name] = torch.as_tensor(np.quantile(value.cpu(), levels, axis=0)).to(value)  # torch takes 2²⁴ numbers
        return found

    def __repr__(self) -> str:
        """Return the state of training, the latents and the flows in a few lines; ``modules()`` has every layer."""
        if self.prototype_trace is None:
            return f"{type(self).__name__}(not set up)"
        sites = [f"{name} {tuple(site['value'].shape)}" for name, site in self.prototype_trace.iter_stochastic_nodes()]
        latents = ", ".join(sites[:SHOWN]) + (f" and {len(sites) - SHOWN} more" if sites[SHOWN:] else "")
        head = f"{type(self).__name__}({'untrained' if self.is_fresh else 'trained'}; latents {latents})"
        flows = [repr(part) for part in self.modules() if isinstance(part, Flow)]
        return "\n".join([head, *flows]).replace("\n", "\n  ")

    def _draw(self, name: str, q: FlowDistribution, rows: Mapping[str, Tensor] = NONE) -> Tensor:
        """Sample packed latents at an auxiliary sample statement.

        Raises:
            FloatingPointError: Naming the site, if a draw is not finite while the guide is trained or given an
                encoder's data.
        """
        z = pyro.sample(f"_{self._pyro_name}_{name}", q.for_one_step(), infer={"is_auxiliary": True})
        self._watch.see(self, name, q, z, rows)
        return z

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Make the plates of the prototype, as Pyro does, except those whose rows have flows.

        A plate without a size stays without.  Rows that a model gives a plate, ``subsample=x``, are left to the model:
        x may be data, and indices in the guide's trace would be replayed in their place.
        """
        if self.master is not None:
            return dict(super()._create_plates(*args, **kwargs))
        frames = sorted(self._prototype_frames.items())
        with poutine.block(hide=self._given_plates):
            self.plates = {name: plate_like(frame) for name, frame in frames if name not in self.row_plates}
        return self.plates

    def parts(self) -> dict[str, Any]:
        """Return the parts of the guide that a file holds, for ``from_parts``.

        Raises:
            ValueError: If the guide was never set up.
        """
        if self.prototype_trace is None:
            fault = f"this {type(self).__name__} was never set up, so that it has no flow yet"
            raise ValueError(f"save: {fault}. Fit it first, or call guide.setup(...) with the model's arguments.")
        sites, masks = [], self._calls.present
        for name, node in self.prototype_trace.iter_stochastic_nodes():
            fn, frames = node["fn"], sorted(node["cond_indep_stack"], key=lambda frame: frame.dim)
            plates = tuple((f.name, f.dim, int(f.size), int(f.full_size or f.size)) for f in frames)
            shapes = fn.batch_shape, fn.event_shape
            sites.append(SavedSite(name, fn.support, node["value"], *shapes, plates, masks.get(name)))
        known = None if self._outline is None else self._outline.parameters.values()
        arguments = None if known is None else tuple((argument.name, argument.kind.name) for argument in known)
        return {"sites": sites, "init_scale": self._init_scale, "name": self._pyro_name, "arguments": arguments}

    @classmethod
    def from_parts(
        cls, sites: Sequence[SavedSite], name: str, arguments: Sequence[tuple[str, str]] | None = None, **parts: Any
    ) -> Any:
        """Build a guide without a model from its :meth:`parts`.

        It gets another name if the parameter store holds tensors under this one, which would replace its own.

        Raises:
            ValueError: If the parts do not fit together.
        """
        taken = name in _live or any(key.startswith(f"{name}.") for key in pyro.get_param_store())
        start = init_to_value(values={site.name: site.value for site in sites}, fallback=None)
        settings = {key: parts.pop(key) for key in cls.settings if key in parts}

        def program() -> None:
            plates: dict[str, Any] = {}
            for site in sites:
                with ExitStack() as stack:
                    for plate, dim, size, full_size in site.plates:
                        if plate not in plates:
                            plates[plate] = pyro.plate(plate, full_size, subsample=torch.arange(size), dim=dim)
                        stack.enter_context(plates[plate])
                    pyro.sample(site.name, dist.ImproperUniform(site.support, site.batch_shape, site.event_shape))

        guide = cls(program, init_loc_fn=start, name=None if taken else name, **settings)
        AutoGuide._setup_prototype(guide)
        guide._calls.present = {site.name: site.present for site in sites if site.present is not None}
        guide.packings = guide._layouts(dict(guide.prototype_trace.iter_stochastic_nodes()))
        guide._restore(**parts)
        guide._model, guide._outline = (None,), None if arguments is None else outline(arguments)
        return guide

    @abstractmethod
    def _restore(self, *args: Any, **parts: Any) -> None:
        """Set the other parts of a guide that was built from a file."""

    # Two guides under one name would train one set of tensors and use another, so names are unique.

    def _claim_name(self, name: str | None) -> None:
        """Take a name in the parameter store, by default the first of the class that was never used."""
        kind = type(self).__name__
        check_kind(kind, (str, type(None)), "a word or None", name=name)
        if name is None:
            names = (kind if i == 1 else f"{kind}_{i}" for i in itertools.count(1))
            name = next(n for n in names if n not in _used)
        elif name in _live:
            fault = f"Another live {kind} is named {name!r}; the two would share parameters in Pyro's store"
            warnings.warn(f"{fault}. Give each guide a name of its own.", stacklevel=4)
        _used.add(name)
        _live[name] = self
        self.__dict__["_pyro_name"] = name

    def _adopt_stored(self) -> dict[str, nn.Parameter]:
        """Copy what the parameter store holds under the guide's names, for example after its ``load``.

        The store then drops its own tensors, so that it and the guide share one set.  Returns the parameters by their
        names in the store.  The result is empty if torch has put other tensors in their place, as by
        ``torch.func.functional_call`` or ``torch.export``, which the store must not keep.
        """
        store, own = pyro.get_param_store(), dict[str, nn.Parameter]()
        for outer, module in self._modules.items():
            for inner, parameter in module.named_parameters() if module is not None else ():
                own[param_with_module_name(f"{self._pyro_name}.{outer}", inner)] = parameter
        if not all(type(parameter) is nn.Parameter for parameter in own.values()):
            return {}
        for name, parameter in {} if _is_module_local_param_enabled() else own.items():
            kept = store._params.get(name)
            if kept is None or kept is parameter or kept.data_ptr() == parameter.data_ptr():
                continue
            stored = store[name].detach()
            if stored.shape != parameter.shape:
                shapes = f"of shape {tuple(stored.shape)}, but the guide needs {tuple(parameter.shape)}"
                way = "give the guide another name= or clear the store"
                raise ValueError(f"The parameter store holds {name!r} {shapes}; {way}.")
            with torch.no_grad():
                parameter.copy_(stored)
            del store[name]
        return own

    def _state_parameters(self, stored: Mapping[str, nn.Parameter]) -> None:
        """Make a param statement of each trained parameter, by which Pyro's optimisers find it."""
        local = _is_module_local_param_enabled()
        for name, parameter in stored.items():
            if parameter.requires_grad and not local:
                pyro.param(name, parameter)
            elif parameter.requires_grad:
                parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
                effectful(lambda value, **_: value, type="param")(parameter, name=name, constraint=constraints.real)

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        """Keep the guide's own name inside a list of guides: it is unique, and the place in the list is not."""
        super()._pyro_set_supermodule(self._pyro_name, context)

    def __getattr__(self, name: str) -> Any:
        """Return a network as it is, without the param statements that Pyro makes at each access.

        After a load of the store it has what was loaded: its first trained parameter tells, since a load replaces all.
        """
        found = self.__dict__.get("_modules", {}).get(name)
        if found is None or isinstance(found, PyroModule):
            return super().__getattr__(name)
        for inner, parameter in found.named_parameters():
            if parameter.requires_grad:
                full = param_with_module_name(f"{self._pyro_name}.{name}", inner)
                if pyro.get_param_store()._params.get(full, parameter) is not parameter:
                    self._adopt_stored()
                break
        return found

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._adopt_stored()
        super()._save_to_state_dict(*args, **kwargs)

    # Copies have independent parameters under another name; pickles leave the model out.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self._adopt_stored()
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        shared = {name: self.__dict__.get(name) for name in ("_model", "prototype_trace", "packings", *self.recipes)}
        state = {k: v for k, v in self.__dict__.items() if k not in (*shared, "master")}
        new.__dict__.update(copy.deepcopy(state, memo), **shared, master=None)
        new._claim_name(None)
        return new

    def __getstate__(self) -> dict[str, Any]:
        self._adopt_stored()
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)  # a weak reference that Pyro leaves on parameters
        return {**self.__dict__, "_model": (None,), "master": None, **dict.fromkeys(self.recipes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._claim_name(None if self._pyro_name in _live else self._pyro_name)


def holders(parameters: Collection[Tensor]) -> list[nn.Module]:
    """Return the live guides that hold some of these parameters."""
    wanted = {id(parameter) for parameter in parameters}
    return [guide for guide in _live.values() if any(id(parameter) in wanted for parameter in guide.parameters())]


def _check_continuous(call: Call) -> None:
    """Refuse discrete latents, and supports without volume or bijection."""
    if names := [name for name, site in call.latents.items() if is_discrete(site["fn"])]:
        which = f"sites {named(names)} are" if len(names) > 1 else f"site {named(names)} is"
        why = "values are infinitely many, more than 1000 in one event, or not listed by Pyro"
        way = "Sum out by hand (a Poisson of Gamma rate is a GammaPoisson), cut off at a Categorical, or condition"
        raise ValueError(f"{call.owner}: latent {which} discrete, and cannot be enumerated: {why}. {way}.")
    for name, site in call.latents.items():
        support = site["fn"].support
        bijection_onto(call.owner, name, support)
        bounds = [getattr(scalar_support(support), bound, None) for bound in ("lower_bound", "upper_bound")]
        if None not in bounds and (torch.as_tensor(bounds[0]) >= torch.as_tensor(bounds[1])).any():
            fault = f"the support of latent site {name!r}, {support}, has no volume: low must be below high"
            raise ValueError(f"{call.owner}: {fault}. Where they are equal, write pyro.deterministic({name!r}, value).")


def _check_whole(call: Call) -> None:
    """Refuse latents in subsampled plates other than the guide's."""
    for name, site in call.latents.items():
        for frame in site["cond_indep_stack"]:
            if frame.name not in call.plates and frame.full_size is not None and frame.size < frame.full_size:
                rows = f"which is subsampled ({frame.size} of {frame.full_size} rows)"
                way = "Let it run over all rows, or use AutoStructuredFlow(model)"
                raise ValueError(f"{call.owner}: latent site {name!r} lies in plate {frame.name!r}, {rows}. {way}.")
