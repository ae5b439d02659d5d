"""AutoFlow: one flow over all latents of a model, z = constrain(loc + scale · T(u)) with u from the flow's base.

Automatic Differentiation Variational Inference (Kucukelbir et al. 2017, arXiv:1603.00788) with a normalizing flow
(Rezende, Mohamed 2015, arXiv:1505.05770) in the unconstrained space.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pyro.distributions as dist
import torch
from pyro import validation_enabled
from pyro.distributions.util import broadcast_shape
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor, nn
from torch.distributions import Transform, biject_to

from ..arguments import check_numbers
from ..encoders.base import at_rest
from ..flows import Flow
from ..flows.chunks import chunk_for, in_chunks
from ..flows.distribution import FlowDistribution
from ..programs.engines import with_room
from ..transforms import Compose, Conditioned, View
from ..vjp import keeps
from .base import FlowGuide
from .call_checks import Calls
from .circles import is_circular, mark_circles
from .dependent_supports import Moving
from .discrete import HideDiscrete
from .encoding import check_encoder, encode, finite, width_for_one
from .guide_call import Call
from .init import init_to_center
from .nonfinite import joint_sites
from .packing import Packing, check_same, put
from .parameter_names import claim_name
from .recipe import DENSE, FEW, assemble, built, check_recipes, default_for, is_untrained, start_at
from .refusals import check_latents, check_supports, moving_supports
from .rows import data_plates
from .schedule import Schedule
from .start import settle_start


class AutoFlow(FlowGuide, AutoContinuous):
    """A guide whose posterior over all continuous latents is one normalizing flow.

    With u drawn from the flow's base, T the flow, the identity at the start, A a learned and F a fixed affine map::

        z = constrain(F(A(T(u)))),    log q(z) = log p_base(u) - log|det dz/du| in nats

    A (a matrix up to 64 unconstrained latents, a scale each beyond) starts at ``init_scale``, F at ``init_loc_fn``;
    ``fit_svi`` sets F to a Gaussian.  It is a Pyro ``AutoContinuous``: SVI with any ELBO,
    ``Predictive``, ``AutoGuideList`` and ``NeuTraReparam`` take it as it is.  Latents on circles, which are von Mises
    or on intervals marked ``infer={"periodic": True}``, get circular splines.

    With an encoder the guide is *amortised*: q(z | data), one network for all data sets, trained by ``fit_amortized``.
    Then ``guide.sample(n, x)`` is the posterior of data ``x``; :meth:`bind` makes a guide of that data set alone.

    Args:
        model: A Pyro model of fixed structure.  Its discrete latents of finite support are left to be summed out.
        flow: A recipe, called with the number of latent dimensions, such as ``flows.iaf``; by default 8 affine
            couplings, 16 beyond 32 latents, over contaminated normals, beyond 512 normals.  With an encoder it is
            called with the width of the context too, and is by default ``flows.nsf_ar``.
        encoder: A network or function from the model's arguments to a context ``(context_dim,)``, and from those of
            many data sets side by side, ``(*batch, ...)``, to ``(*batch, context_dim)``: see ``pyro_flows.encoders``.
        base: In place of the recipe's base, a function of the number of latent dimensions, such as
            ``distributions.StudentTBase`` for heavy tails.
        init_loc_fn: Where the guide starts; by default ``init_to_center``, or the origin if that is far likelier.
        init_scale: The scale of each unconstrained latent at the start (sds are up to 2 % larger by default).
        name: The guide's name in Pyro's parameter store, unique by default; under one you give it is found again.

    Raises:
        TypeError: If ``flow``, ``base`` or ``encoder`` cannot be called; at :meth:`setup`, if the recipe fails.
        ValueError: If ``init_scale`` is not positive; at :meth:`setup`, naming the site: if a latent is discrete with
            infinite support, its support has no volume, it is masked or in a subsampled plate, or the model's density
            is not finite at the start; or if the recipe's flow or the encoder's output does not fit.  In use, if
            arguments change which latents the model has, or their shapes.
        FloatingPointError: In training, naming the site, the cause and the way out, if a draw is not finite.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0, 1))
        ...     pyro.sample("y", dist.Normal(x**2, 0.1), obs=torch.tensor(1.0))
        >>> guide = AutoFlow(model).setup()
        >>> guide.sample(5)["x"].shape, guide.log_prob({"x": torch.zeros(5)}).shape
        (torch.Size([5]), torch.Size([5]))
    """

    recipes = "_build_flow", "_build_base"
    is_joint = True

    def __init__(
        self,
        model: Callable[..., Any],
        flow: Callable[..., Flow] | None = None,
        *,
        encoder: Callable[..., Tensor] | None = None,
        base: Callable[[int], nn.Module] | None = None,
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float = 0.1,
        name: str | None = None,
    ) -> None:
        check_recipes("AutoFlow", flow=flow, base=base)
        check_encoder("AutoFlow", encoder)
        check_numbers("AutoFlow", above=0, init_scale=init_scale)
        super().__init__(HideDiscrete()(mark_circles(model)), init_loc_fn=init_loc_fn or init_to_center)
        self._build_flow, self._build_base = flow, base
        self._init_scale, self._chooses_start = float(init_scale), init_loc_fn is None
        self.encoder, self._calls = encoder, Calls()
        self._engine: str | None = None  # that of the runs which constrain latents, where supports depend on others
        self._pyro_name = claim_name(self, name)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        # With an encoder it is trained on draws: the data may have no density, and the model may break at the centre.
        amortised = self.encoder is not None
        with validation_enabled(False) if amortised else nullcontext():
            super(AutoContinuous, self)._setup_prototype(*args, **kwargs)
            check_latents(self._call(args, kwargs))  # before Pyro refuses a discrete site in fewer words
            super()._setup_prototype(*args, **kwargs)
            call = self._call(args, kwargs)
            if not amortised:
                settle_start(call, choose=self._chooses_start)
            moving = moving_supports(call, self._init_scale)
            if amortised:
                check_supports(call, moving)
            self._engine = Moving(call).engine if moving else None
            self._data_plates = data_plates(self._calls.begin(call))
        self._context_dim = width_for_one(call, self.encoder)
        self._build()

    def _build(self) -> None:
        circular, sizes = self.circular, (self.latent_dim, self._context_dim)
        flow = built("AutoFlow", "flow", self._build_flow, default_for(circular, self._context_dim), *sizes)
        self.flow = assemble(flow, self._build_base, self._init_loc(), self._init_scale, circular)
        self._adopt_stored()

    def restore(self, flow: Flow, context_dim: int, engine: str | None) -> None:
        """Take over the parts of a guide that was saved, and let go of the model."""
        self.flow, self._context_dim, self._engine = flow, context_dim, engine
        self._model = (None,)

    # How it is trained where nothing else is asked for.

    @property
    def has_circles(self) -> bool:
        """True if some latents are angles."""
        return any(self.circular)

    @property
    def draws_from_flow(self) -> bool:
        """True if the guide has no encoder, and no subclass changes how it draws from its flow."""
        return self.encoder is None and keeps(self, AutoFlow, "forward", "_draws", "sample_latent", "get_posterior")

    @property
    def has_default_flow(self) -> bool:
        """True if the flow is the default one, and not of a recipe of the user's."""
        return self._build_flow is None and type(self.flow) is Flow

    @property
    def is_fresh(self) -> bool:
        """True if the guide is still untrained."""
        return is_untrained(self.flow, self._init_scale, self.circular)

    @property
    def starts_from_gaussian(self) -> bool:
        return not self.has_circles and self.latent_dim <= DENSE

    @property
    def takes_paths(self) -> bool:
        return not self.has_circles

    def schedule(self, *, near: bool = False, alone: bool = True) -> Schedule:
        """Many draws a step serve better than more steps with fewer.

        Some forty latents take the most steps: there a step is still cheap, and funnels of many dimensions take long to
        learn.  Where hardly anything is left to learn, a part of the steps will do.
        """
        if self.has_circles:
            return Schedule(steps=2000, num_particles=256, lr=0.003)
        if self.latent_dim > FEW:
            steps = 2100 if self.latent_dim <= 64 else 1000
            return Schedule(steps // 2 if near else steps, num_particles=256, clip_norm=1.0)
        if not alone:
            return Schedule(500 if near else 1000, num_particles=256)
        if near:
            return Schedule(80, num_particles=128, lr=0.02)
        return Schedule(400 if self.latent_dim <= 16 else 600, num_particles=256, lr=0.02)

    def by_soap(self) -> list[Tensor]:
        return [] if self.has_circles or self.latent_dim > FEW else list(self.flow.parameters())

    def by_muon(self) -> list[Tensor]:
        if self.has_circles or self.latent_dim <= FEW:
            return []
        return [layer.weight for layer in self.flow.modules() if isinstance(layer, nn.Linear)]

    @property
    def circular(self) -> list[bool]:
        """For each of the packed latents, whether it is an angle."""
        return [is_circular(self.prototype_trace.nodes[name]["fn"].support) for name in self.coordinates]

    @property
    def start(self) -> tuple[Tensor, float]:
        """The packed, unconstrained latents that the guide starts from, of ``init_loc_fn``, and ``init_scale``."""
        return self.flow.transforms[-1].loc.detach().clone(), self._init_scale

    def rebuilt(self, flow: Callable[..., Flow] | None = None) -> AutoFlow:
        """A new guide of the same model, untrained, with another recipe or with the same."""
        new = copy.deepcopy(self)
        new._build_flow = flow or self._build_flow
        new._build()
        return new

    def start_at(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Let the guide's affine maps, which are reset, take N(0, I) to N(loc, L Lᵀ).

        Angles stay as they are.

        Args:
            loc: The mean of the packed, unconstrained latents, ``(latent_dim,)``.
            scale_tril: Their Cholesky factor L, ``(latent_dim, latent_dim)``; beyond 512 only the marginals count.
        """
        start_at(self.flow, loc, scale_tril, self.circular)

    def context(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """What the encoder makes of data, ``(*batch, context_dim)``; None without an encoder."""
        if self.encoder is None:
            return None
        context = encode(self._call(args, kwargs), self.encoder, self._context_dim)
        return context.to(self.flow.transforms[-1].loc)

    @torch.no_grad()
    def bind(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """The guide of one data set, which the arguments hold, without the encoder: a copy, to be checked, refined."""
        if self.encoder is None or self.prototype_trace is None:
            reason = "has no encoder" if self.encoder is None else "was never set up; train it by fit_amortized"
            raise ValueError(f"AutoFlow.bind: the guide {reason}.")
        seen = self._context_at_rest(args, kwargs)
        if seen is None or seen.dim() != 1:
            raise ValueError("AutoFlow.bind: give one data set, for which the encoder returns one vector.")
        new, context = copy.deepcopy(self), nn.Parameter(seen.clone())
        layers = [Conditioned(t, context) if t.context_dim else t for t in new.flow.transforms]
        new.encoder, new._context_dim, new.flow = None, 0, Flow(layers, new.flow.base)
        return new

    def _draws(self, call: Call) -> dict[str, Tensor]:
        self._calls.rows(call, needed=False)
        if moving := self._moving(call):
            return self._place(moving, self.sample_latent(*call.args, **call.kwargs), call)
        return dict(AutoContinuous.forward(self, *call.args, **call.kwargs))

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Yield each site with its unconstrained value, as Pyro does, but without ``torch.broadcast_shapes``: the first
        call of that imports sympy, in half a second."""
        for name, part in self._split(latent).items():
            site, shape = self.prototype_trace.nodes[name], self._unconstrained_shapes[name]
            event_dim = site["fn"].event_dim + len(shape) - site["value"].dim()
            yield site, part.reshape(broadcast_shape(shape, latent.shape[:-1] + (1,) * event_dim))

    def _moving(self, call: Call) -> Moving | None:
        """The map to the latents by a run of the model, where supports depend on other latents."""
        if self._engine is None:
            return None
        if call.model is None:
            fault = "the supports of some latents depend on other latents and need the model, which saved guides lack"
            raise ValueError(f"AutoFlow: {fault}. Build AutoFlow(model) again and load its state_dict.")
        return Moving(call, self._engine)

    def _place(self, moving: Moving, latent: Tensor, call: Call) -> dict[str, Tensor]:
        """Put the packed latents at their sites, in their plates."""
        plates, lead = self._create_plates(*call.args, **call.kwargs), latent.shape[:-1]
        values, log_dets = moving.unpack(self._split(latent.reshape(-1, self.latent_dim)), lead.numel())
        found = {}
        for name, site in call.latents.items():
            both = values[name], log_dets[name]
            value, log_det = (with_room(site, part, len(lead) - 1) if lead else part[0] for part in both)
            frames = [plates[frame.name] for frame in self._cond_indep_stacks[name]]
            found[name] = put(name, value, log_det, site["fn"].event_dim, frames)
        return found

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw the packed, unconstrained latents, ``(latent_dim,)``."""
        return self._draw("latent", self.get_posterior(*args, **kwargs), joint_sites(self))

    def get_base_dist(self) -> dist.TorchDistribution:
        """The base distribution of the flow, over vectors of ``latent_dim`` numbers."""
        return self.flow.base()

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """From the base to the unconstrained latents; each network runs once."""
        return View(Compose(self.flow.runs), self.context(*args, **kwargs))

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The distribution of the packed, unconstrained latents."""
        return self.flow(self.context(*args, **kwargs))

    @torch.no_grad()
    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw from the guide: for each latent site, values of shape ``(num_samples, *site_shape)``."""
        context = self.setup(*args, **kwargs)._context_at_rest(args, kwargs)
        latent = self.flow.sample((num_samples,), context, chunk_size=chunk_for(self.latent_dim))
        return self.constrain(latent, *args, **kwargs)

    @torch.no_grad()
    def sample_roughly(self, number: int) -> Tensor:
        """Sample packed, unconstrained latents, ``(number, latent_dim)``, with networks in single precision.

        This takes half the time.  The last, fixed affine map is exact, so that latents may be far from zero.
        """
        *layers, fixed = self.flow.transforms
        rough = copy.deepcopy(Flow(layers, self.flow.base)).float()
        x = rough.sample((number,), chunk_size=chunk_for(self.latent_dim))
        return fixed.forward_and_log_det(x.to(fixed.loc))[0]

    def constrain(self, latent: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Map packed latents ``(N, latent_dim)`` to values of the sites, ``(N, *site_shape)``, for some arguments."""
        if moving := self._moving(self._call(args, kwargs)):
            return moving.unpack(self._split(latent), len(latent))[0]
        return self.unpack(latent)

    def log_prob(self, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The guide's log-density, in nats, of any constrained values, draws of another method included.

        Values of all latent sites, ``(*batch, *site_shape)``, have one of shape ``batch``; -inf outside of the support.
        """
        context = self.setup(*args, **kwargs)._context_at_rest(args, kwargs)
        packed, log_det = self.pack(values, *args, **kwargs)
        chunk = chunk_for(self.latent_dim)
        return in_chunks(lambda z, c: self.flow(c).log_prob(z), chunk, packed, context, 1) + log_det

    def _context_at_rest(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        if self.encoder is not None:
            check_same(self._call(args, kwargs))
        with at_rest(self.encoder):
            return finite("AutoFlow", self.context(*args, **kwargs))

    def unpack(self, latent: Tensor) -> dict[str, Tensor]:
        """Packed, unconstrained latents ``(*batch, latent_dim)`` as values of sites, ``(*batch, *site_shape)``."""
        free = self._split(latent)
        return {n: biject_to(s["fn"].support)(free[n]) for n, s in self.prototype_trace.iter_stochastic_nodes()}

    def _split(self, latent: Tensor) -> dict[str, Tensor]:
        shapes = self._unconstrained_shapes
        parts = latent.split([shape.numel() for shape in shapes.values()], -1)
        return {n: part.reshape(latent.shape[:-1] + shapes[n]) for n, part in zip(shapes, parts, strict=True)}

    def pack(self, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The way back: ``(*batch, latent_dim)``, and log|det| of the change in nats, -inf outside of the support."""
        call = self._call(args, kwargs)
        if moving := self._moving(call):
            return moving.packed(values)
        return Packing("AutoFlow", call.latents.values()).pack(values)

    @property
    def coordinates(self) -> list[str]:
        """The site that each of the packed latents belongs to."""
        return [name for name, shape in self._unconstrained_shapes.items() for _ in range(shape.numel())]
