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
from torch.distributions.utils import _sum_rightmost

from .. import flows
from ..flows import Flow
from ..transforms import ActNorm, Compose, View
from .checks import check_latents, check_start
from .init import init_to_center
from .names import adopt_stored_parameters, claim_name, is_free


def default_flow(input_dim: int) -> Flow:
    """The flow that :class:`AutoFlow` builds when none is named: an inverse autoregressive flow, fast to sample."""
    width = min(max(64, 2 * input_dim), 128)
    return flows.iaf(input_dim, num_transforms=3, hidden_dims=(width, width), activation=nn.ELU)


class AutoFlow(AutoContinuous):
    """A guide whose posterior over all continuous latents is one normalizing flow.

    It is a Pyro ``AutoContinuous``: SVI with any ELBO, ``Predictive``, ``AutoGuideList`` and ``NeuTraReparam`` take it
    as it is.  Latents are moved to the unconstrained space and packed into one vector; the flow, the identity at
    the start, is followed by a learnable location and scale, which start at ``init_loc_fn`` and ``init_scale`` exactly.

    Args:
        model: A Pyro model of fixed structure, with continuous latents.
        flow: A recipe, called with the number of latent dimensions: ``flows.nsf``, or
            ``functools.partial(flows.realnvp, num_transforms=4)``.
        init_loc_fn: Where the guide starts, a Pyro initialisation strategy; by default the prior's median or mean
            where it has one, else the origin.
        init_scale: The standard deviation of each unconstrained latent at the start.
        name: The guide's name in Pyro's parameter store; by default one that is unique in the process.  Give one to
            find the parameters again in another process.

    Raises:
        ValueError: At :meth:`setup`, naming the site: if a latent is discrete, if its support depends on another
            latent, if it lies in a subsampled plate, or if the model's density is not finite at the start.

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
        init_loc_fn: Callable[..., Any] = init_to_center,
        init_scale: float = 0.1,
        name: str | None = None,
    ) -> None:
        if isinstance(flow, nn.Module) or not (flow is None or callable(flow)):
            raise TypeError(
                f"AutoFlow: flow must be a recipe that is called with the number of latent dimensions, such as "
                f"flows.nsf, got {type(flow).__name__}."
            )
        if not (math.isfinite(init_scale) and init_scale > 0):
            raise ValueError(f"AutoFlow: init_scale must be positive and finite, got {init_scale}.")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._build_flow = flow or default_flow
        self._init_scale = float(init_scale)
        self._pyro_name = claim_name(self, name)

    # Setting up: the model is run, the flow is built, and from then on the parameters exist.

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Build the flow now, by running the model on its arguments, and return the guide.  A second call does
        nothing."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self.model is None:
            raise ValueError(
                "AutoFlow: this guide was saved before setup(), and a saved guide leaves its model behind."
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
        flow = self._build_flow(self.latent_dim)
        if not isinstance(flow, Flow) or flow.event_shape != (self.latent_dim,) or flow.context_dim:
            raise ValueError(
                f"AutoFlow: flow({self.latent_dim}) must return a Flow over events of shape ({self.latent_dim},) "
                f"without context, got {flow!r:.200}."
            )
        loc, affine = self._init_loc(), ActNorm(self.latent_dim)
        self.flow = Flow([*flow.transforms, affine], flow.base).to(device=loc.device, dtype=loc.dtype)
        affine.loc.data.copy_(loc)
        affine.log_scale.data.fill_(math.log(self._init_scale))
        adopt_stored_parameters(f"{self._pyro_name}.flow", self._modules["flow"])

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
        """From the base to the unconstrained latents, as one transform that runs each network once."""
        return View(Compose(self.flow.transforms))

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """The distribution of the packed, unconstrained latents."""
        return self.flow()

    # Using the answer.

    @torch.no_grad()
    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw from the guide.

        Returns:
            For each latent site, values of shape ``(num_samples, *site_shape)``.
        """
        latent = self.setup(*args, **kwargs).flow().sample((num_samples,))
        return {site["name"]: biject_to(site["fn"].support)(value) for site, value in self._sites(latent)}

    def log_prob(self, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The guide's log-density, in nats, of any constrained values, draws of another method included.

        Args:
            values: For each latent site, values of shape ``(*batch, *site_shape)``.

        Returns:
            A tensor of shape ``batch``.
        """
        self.setup(*args, **kwargs)
        packed, log_det = [], torch.zeros((), dtype=self.flow.transforms[-1].loc.dtype)
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            if name not in values:
                raise ValueError(f"AutoFlow.log_prob: values lack the latent site {name!r}.")
            value, shape = values[name], site["value"].shape
            batch = value.shape[: value.dim() - len(shape)]
            if value.shape != batch + shape:
                raise ValueError(
                    f"AutoFlow.log_prob: values[{name!r}] must have shape (*batch, *{tuple(shape)}), got "
                    f"{tuple(value.shape)}."
                )
            inverse = biject_to(site["fn"].support).inv
            unconstrained = inverse(value)
            change = inverse.log_abs_det_jacobian(value, unconstrained)
            log_det = log_det.to(change.device) + _sum_rightmost(change, change.dim() - len(batch))
            packed.append(unconstrained.reshape(*batch, -1))
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
        shared = {"_model": self._model, "prototype_trace": self.prototype_trace, "_build_flow": self._build_flow}
        state = {k: v for k, v in self.__dict__.items() if k not in (*shared, "master")}
        new.__dict__.update(copy.deepcopy(state, memo), **shared, master=None)
        new.__dict__["_pyro_name"] = claim_name(new, None)
        return new

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)  # a weak reference that Pyro leaves on parameters
        return {**self.__dict__, "_model": (None,), "master": None, "_build_flow": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_pyro_name"] = claim_name(self, self._pyro_name if is_free(self._pyro_name) else None)
