"""What all guides made of flows share: a name of their own, summaries of their draws, and independent copies."""

from __future__ import annotations

import copy
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro import poutine, validation_enabled
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.nn.module import _is_module_local_param_enabled
from torch import Tensor, nn

from ..arguments import quoted
from ..flows import Flow
from ..flows.distribution import FlowDistribution
from ..programs.engines import plate_like
from ..programs.log_density import is_breakdown
from .call_checks import Calls
from .discrete import draw_discrete
from .guide_call import Call
from .nonfinite import Sites
from .parameter_names import adopt_stored_parameters, claim_name, is_free
from .refusals import setup_error
from .schedule import Plan


class FlowGuide(Plan, AutoGuide):
    """A guide whose networks are its own, under a name that no other guide bears."""

    num_summary_draws = 10_000
    recipes: tuple[str, ...] = ()  # attributes that hold functions, which copies share and pickles leave behind
    prototype_trace: Any
    plate: str | None = None  # whose rows have a flow of their own
    _calls: Calls
    _chooses_start: bool  # as no init_loc_fn was given
    _data_plates: Sequence[str] = ()  # those that the model gives their rows' data

    def setup(self, *args: Any, **kwargs: Any) -> Any:
        """Build the guide now, by running the model, and return it.  A second call does nothing.

        Args:
            *args: The model's arguments, with data of the shapes that are to come.
            **kwargs: Its keyword arguments.

        Raises:
            TypeError: If the model asks for arguments and none are given, or a recipe fails.
            RuntimeError: If the model of an ``AutoFlow`` has no latents.
            NotImplementedError: If torch knows no bijection onto the support of a latent.
            ValueError: If the guide cannot answer for the model; the error names the site or plate, and the way out.
        """
        if self.prototype_trace is not None:
            return self
        owner = type(self).__name__
        if self.model is None:
            fault = "this guide was saved before setup(), and saved guides leave their models behind"
            raise ValueError(f"{owner}: {fault}.")
        try:
            self._set_up(*args, **kwargs)
        except Exception as error:
            self.prototype_trace = None  # a failed setup can be tried again
            if told := setup_error(owner, error, bool(args or kwargs)):
                raise told from error
            raise
        return self

    def _set_up(self, *args: Any, **kwargs: Any) -> None:
        """Build the guide; where the model breaks down at the start, find another if none was asked for."""
        try:
            self._setup_prototype(*args, **kwargs)
        except ValueError as error:
            if not (self._chooses_start and is_breakdown(error)):
                raise
            try:
                with validation_enabled(False):
                    self._setup_prototype(*args, **kwargs)
                call = self._call(args, kwargs)
                call.trace_at(call.start).compute_log_prob()
            except ValueError:
                raise error from None

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return Call(type(self).__name__, self.model, args, kwargs, self.prototype_trace, self.plate)

    def compile(self, **settings: Any) -> None:
        """Compile the guide's flows once it is set up; see :meth:`~pyro_flows.flows.Flow.compile`.

        Path gradients, and so ``fit_svi`` by default, go layer by layer as before; draws, densities and gradients of
        Pyro's own ELBOs are compiled.

        Raises:
            ValueError: If the guide was not set up yet, and has no flow.
        """
        if not (found := [module for module in self.modules() if isinstance(module, Flow)]):
            raise ValueError(f"{type(self).__name__}.compile: the guide has no flow yet; call setup(...) first.")
        for flow in found:
            flow.compile(**settings)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the latents, as Pyro's guides do: site name -> value; in Pyro's ``Predictive`` discrete ones too."""
        call = self.setup(*args, **kwargs)._call(args, kwargs)
        with self._calls.watch.over(self, call):
            found = self._draws(call)
        return {**found, **draw_discrete(call, found)}

    @abstractmethod
    def _draws(self, call: Call) -> dict[str, Tensor]:
        """Draw the guide's latents, each at its sample statement."""

    @abstractmethod
    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw from the guide: for each latent site, values of shape ``(num_samples, *site_shape)``.

        A million fit into memory if their values do: networks see some of them at a time.
        """

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent, from ``num_summary_draws`` draws: site name -> ``site_shape``."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: float | list[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each latent, from ``num_summary_draws`` draws, or fewer where there are more than 2,000 numbers.

        Args:
            quantiles: Levels between 0 and 1, or a single one.
            *args: The model's arguments, where the guide is new or depends on data.
            **kwargs: Its keyword arguments.

        Returns:
            For each latent site values of shape ``(len(quantiles), *site_shape)``; of a single level ``site_shape``.
        """
        one = sum(value.numel() for value in self.sample(1, *args, **kwargs).values())
        number = min(self.num_summary_draws, max(1000, 20_000_000 // one))  # so that they fit into memory
        return {name: _quantiles(value, quantiles) for name, value in self.sample(number, *args, **kwargs).items()}

    def _draw(self, name: str, q: FlowDistribution, sites: Sites) -> Tensor:
        """Draw packed latents, at a sample statement of the guide's own.

        Raises:
            FloatingPointError: Naming the site, if a draw is not finite while the guide is trained.
        """
        z = pyro.sample(f"_{self._pyro_name}_{name}", q.for_one_step(), infer={"is_auxiliary": True})
        self._calls.watch.see(self, name, sites, q, z)
        return z

    # The plates that latents lie in.

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Make the plates of the prototype that Pyro would make otherwise.

        A plate without a size stays without.  The rows' data that a model gives a plate, ``subsample=x``, are the
        model's own: indices in the guide's trace would be replayed in their place.
        """
        if self.master is not None:
            return dict(super()._create_plates(*args, **kwargs))
        with poutine.block(hide=self._data_plates):
            self.plates = {name: plate_like(frame) for name, frame in sorted(self._prototype_frames.items())}
        return self.plates

    # Parameters under a name of the guide's own.

    def _adopt_stored(self, *names: str) -> None:
        """Let modules take over what Pyro's parameter store holds under the guide's name: it may have been loaded."""
        if not _is_module_local_param_enabled():
            for name in names or self._modules:
                if (module := self._modules[name]) is not None:
                    adopt_stored_parameters(f"{self._pyro_name}.{name}", module)

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        """Inside a list of guides too, the guide keeps its own name, which is unique; its place in the list is not."""
        super()._pyro_set_supermodule(self._pyro_name, context)

    def __getattr__(self, name: str) -> Any:
        """Every way to a network leads through here, so that none answers from parameters older than the store's."""
        if name in self.__dict__.get("_modules", ()):
            self._adopt_stored(name)
        value = super().__getattr__(name)
        if isinstance(value, nn.Module) and not isinstance(value, PyroModule) and _is_module_local_param_enabled():
            for parameter in value.parameters():  # SVI asks each parameter for this, and Pyro forgets it in this mode
                parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
        return value

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._adopt_stored()
        super()._save_to_state_dict(*args, **kwargs)

    # Copies: independent parameters under a name of their own; pickles leave the model behind.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self._adopt_stored()
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        shared = {name: self.__dict__.get(name) for name in ("_model", "prototype_trace", *self.recipes)}
        state = {k: v for k, v in self.__dict__.items() if k not in (*shared, "master")}
        new.__dict__.update(copy.deepcopy(state, memo), **shared, master=None)
        new.__dict__["_pyro_name"] = claim_name(new, None)
        return new

    def __getstate__(self) -> dict[str, Any]:
        self._adopt_stored()
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)  # a weak reference that Pyro leaves on parameters
        return {**self.__dict__, "_model": (None,), "master": None, **dict.fromkeys(self.recipes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_pyro_name"] = claim_name(self, self._pyro_name if is_free(self._pyro_name) else None)


def _quantiles(value: Tensor, quantiles: float | list[float] | Tensor) -> Tensor:
    """Quantiles over the first dimension, some columns at a time: torch takes no more than 2²⁴ numbers."""
    try:
        levels = torch.as_tensor(quantiles, dtype=value.dtype, device=value.device)
        fits = bool(((levels >= 0) & (levels <= 1)).all())
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise ValueError(f"quantiles must be numbers from 0 to 1, such as [0.05, 0.95], got {quoted(quantiles)}.")
    columns = value.reshape(len(value), -1).split(1000, 1)
    found = torch.cat([torch.quantile(part, levels.reshape(-1), dim=0) for part in columns], 1)
    return found.reshape(levels.shape + value.shape[1:])
