"""AutoFlow: one flow over all latents of a model.

q(z) is the law of z = constrain(loc + scale · T(u)), u from the flow's base and T the flow, which starts at the
identity.  Automatic Differentiation Variational Inference (Kucukelbir et al. 2017, arXiv:1603.00788) with a
normalizing flow (Rezende, Mohamed 2015, arXiv:1505.05770) in the unconstrained space.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.nn.module import _is_module_local_param_enabled
from torch import Tensor, nn
from torch.distributions import Transform, biject_to

from ..flows import Flow
from ..transforms import Compose, View
from .checks import check_latents, check_start, missing_arguments
from .circles import is_circular, mark_circles
from .init import init_to_center
from .names import adopt_stored_parameters, claim_name, is_free
from .recipe import assemble, check_recipe, is_untrained, start_at
from .supports import unconstrain


class AutoFlow(AutoContinuous):
    """A guide whose posterior over all continuous latents is one normalizing flow.

    It is a Pyro ``AutoContinuous``: SVI with any ELBO, ``Predictive``, ``AutoGuideList`` and ``NeuTraReparam`` take it
    as it is.  Latents are moved to the unconstrained space and packed into one vector.  The flow, the identity at the
    start, is followed by a learnable affine map (a full matrix up to 64 latents, a scale each beyond), which starts at
    ``init_scale``, and that by a fixed one, which starts at ``init_loc_fn`` and which ``fit_svi`` sets to a Gaussian.

    Latents on circles, von Mises or on intervals marked ``infer={"periodic": True}``, get circular splines.

    Args:
        model: A Pyro model of fixed structure, with continuous latents.
        flow: A recipe, called with the number of latent dimensions, such as ``flows.iaf``; by default 8 affine
            couplings, 16 beyond 32 latents, over contaminated normals.
        base: In place of the recipe's base, a function of the number of latent dimensions, such as
            ``distributions.StudentTBase`` for heavy tails.
        init_loc_fn: Where the guide starts, a Pyro initialisation strategy; by default the prior's median or mean
            where it has one, else the origin.
        init_scale: The scale of each unconstrained latent at the start (sds are 2 % larger by default).  For plain SVI,
            whose gradients are noisy in narrow guides, 1.0 is better where the model bears it.
        name: The guide's name in Pyro's parameter store, unique by default; under one you give it is found again.

    Raises:
        ValueError: At :meth:`setup`, naming the site: if a latent is discrete, if its support has no volume or depends
            on another latent, if it lies in a subsampled plate, or if the model's density is not finite at the start.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0, 1))
        ...     pyro.sample("y", dist.Normal(x**2, 0.1), obs=torch.tensor(1.0))
        >>> guide = AutoFlow(model).setup()
        >>> guide.sample(5)["x"].shape
        torch.Size([5])
    """

    num_summary_draws = 10_000
    flow: Flow
    prototype_trace: Any

    def __init__(
        self,
        model: Callable[..., Any],
        flow: Callable[[int], Flow] | None = None,
        *,
        base: Callable[[int], nn.Module] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_center,
        init_scale: float = 0.1,
        name: str | None = None,
    ) -> None:
        check_recipe("flow", flow, "flows.nsf")
        check_recipe("base", base, "distributions.StudentTBase")
        if not (math.isfinite(init_scale) and init_scale > 0):
            raise ValueError(f"AutoFlow: init_scale must be positive and finite, got {init_scale}.")
        super().__init__(mark_circles(model), init_loc_fn=init_loc_fn)
        self._build_flow, self._build_base = flow, base
        self._init_scale = float(init_scale)
        self._pyro_name = claim_name(self, name)

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Build the flow now, by running the model, and return the guide.  A second call does nothing."""
        if self.prototype_trace is None:
            with missing_arguments(args, kwargs):
                self._setup_prototype(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self.model is None:
            raise ValueError(
                "AutoFlow: this guide was saved before setup(), and saved guides leave their models behind."
            )
        try:
            super(AutoContinuous, self)._setup_prototype(*args, **kwargs)
            check_latents(self.prototype_trace)  # before Pyro refuses a discrete site in fewer words
            super()._setup_prototype(*args, **kwargs)
            check_start(self.model, self.prototype_trace, self._init_scale, args, kwargs)
            self._build()
        except Exception:
            self.prototype_trace = None  # a failed setup can be tried again
            raise

    def _build(self) -> None:
        sites = [site for _, site in self.prototype_trace.iter_stochastic_nodes()]
        self._circular = [is_circular(s) for s in sites for _ in range(self._unconstrained_shapes[s["name"]].numel())]
        self.flow = assemble(self._build_flow, self._build_base, self._init_loc(), self._init_scale, self._circular)
        adopt_stored_parameters(f"{self._pyro_name}.flow", self._modules["flow"])

    @property
    def start(self) -> tuple[Tensor, float]:
        """Where the guide starts: packed, unconstrained latents, by default of ``init_loc_fn``, and ``init_scale``."""
        return self.flow.transforms[-1].loc.detach().clone(), self._init_scale

    def rebuilt(self, flow: Callable[[int], Flow] | None = None) -> AutoFlow:
        """A new guide of the same model, untrained, with another recipe or with the same."""
        new = copy.deepcopy(self)
        new._build_flow = flow or self._build_flow
        new._build()
        return new

    @property
    def has_circles(self) -> bool:
        """Whether some latents are angles."""
        return any(self._circular)

    @property
    def is_fresh(self) -> bool:
        """Whether the guide is still untrained."""
        return is_untrained(self.flow, self._init_scale, self._circular)

    def start_at(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Let the guide's affine maps, which are reset, take N(0, I) to N(loc, L Lᵀ).

        Args:
            loc: The mean of the packed, unconstrained latents, ``(latent_dim,)``.
            scale_tril: Their Cholesky factor L, ``(latent_dim, latent_dim)``; beyond 512 only the marginals count.

        Raises:
            ValueError: If some latents are angles.
        """
        if self.has_circles:
            raise ValueError("AutoFlow.start_at: some latents are angles, which have no Gaussian.")
        start_at(self.flow, loc, scale_tril)

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        """Inside a list of guides too, the guide keeps its own name, which is unique; its place in the list is not."""
        super()._pyro_set_supermodule(self._pyro_name, context)

    # Pyro's protocol of continuous guides.

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the latents, as Pyro's guides do: site name -> value."""
        if self.prototype_trace is not None and not _is_module_local_param_enabled():
            adopt_stored_parameters(f"{self._pyro_name}.flow", self._modules["flow"])  # it may have been loaded since
        return super().forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, Flow) and _is_module_local_param_enabled():
            for parameter in value.parameters():  # SVI asks each parameter for this, and Pyro forgets it in this mode
                parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
        return value

    def get_base_dist(self) -> dist.TorchDistribution:
        """The base distribution of the flow, over vectors of ``latent_dim`` numbers."""
        return self.flow.base()

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """From the base to the unconstrained latents; each network runs once."""
        return View(Compose(self.flow.transforms))

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """The distribution of the packed, unconstrained latents."""
        return self.flow()

    # Using the answer.

    @torch.no_grad()
    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw from the guide: for each latent site, values of shape ``(num_samples, *site_shape)``."""
        latent = self.setup(*args, **kwargs).flow().sample((num_samples,))
        return {site["name"]: biject_to(site["fn"].support)(value) for site, value in self._sites(latent)}

    def log_prob(self, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The guide's log-density, in nats, of any constrained values, draws of another method included.

        Args:
            values: For each latent site, values of shape ``(*batch, *site_shape)``.

        Returns:
            A tensor of shape ``batch``; -inf outside of the support.
        """
        self.setup(*args, **kwargs)
        packed, log_det = [], torch.zeros((), dtype=self.flow.transforms[-1].loc.dtype)
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            if name not in values:
                raise ValueError(f"AutoFlow.log_prob: values lack the latent site {name!r}.")
            free, change = unconstrain(name, site, values[name])
            packed.append(free)
            log_det = log_det.to(change.device) + change
        return self.flow().log_prob(torch.cat(packed, -1)) + log_det

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent, from ``num_summary_draws`` draws: site name -> ``site_shape``."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: list[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each latent, from ``num_summary_draws`` draws: name -> ``(len(quantiles), *site_shape)``."""
        draws = self.sample(self.num_summary_draws, *args, **kwargs)
        return {
            name: torch.quantile(value, torch.as_tensor(quantiles, dtype=value.dtype, device=value.device), dim=0)
            for name, value in draws.items()
        }

    def _sites(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Split packed latents ``(N, latent_dim)`` into sites and their unconstrained values ``(N, *shape)``."""
        start = 0
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            shape = self._unconstrained_shapes[name]
            stop = start + shape.numel()
            yield site, latent[:, start:stop].reshape(-1, *shape)
            start = stop

    # Copies: independent parameters under a name of their own; pickles leave the model behind.

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        names = "_model", "prototype_trace", "_build_flow", "_build_base"
        shared = {name: self.__dict__.get(name) for name in names}
        state = {k: v for k, v in self.__dict__.items() if k not in (*shared, "master")}
        new.__dict__.update(copy.deepcopy(state, memo), **shared, master=None)
        new.__dict__["_pyro_name"] = claim_name(new, None)
        return new

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)  # a weak reference that Pyro leaves on parameters
        return {**self.__dict__, "_model": (None,), "master": None, "_build_flow": None, "_build_base": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_pyro_name"] = claim_name(self, self._pyro_name if is_free(self._pyro_name) else None)
