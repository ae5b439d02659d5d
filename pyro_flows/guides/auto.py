"""AutoFlow: one flow over all latents of a model, z = constrain(loc + scale · T(u)) with u from the flow's base.

Automatic Differentiation Variational Inference (Kucukelbir et al. 2017, arXiv:1603.00788) with a normalizing flow
(Rezende, Mohamed 2015, arXiv:1505.05770) in the unconstrained space.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.inspect import get_dependencies
from torch import Tensor, nn
from torch.distributions import Transform

from ..arguments import check_numbers, quoted, suggests_recipes
from ..encoders import Joined
from ..encoders.base import at_rest
from ..flows import Flow, cnf, nsf, nsf_ar, realnvp
from ..flows.distribution import FlowDistribution, chunk_for
from ..flows.mixture import FlowMixture
from ..transforms import Compose, NonCentred, View
from ..transforms.base import chained
from ..vjp import keeps
from .amortised import OfDatasets, Packed, SimulatedVectors
from .base import FlowGuide, Schedule, check_fits, schedule_of_many
from .contexts import check_finite, encode, initialize, width_for_one
from .guide_call import Call, Found
from .guide_flow import LIMITS, GuideFlow, assemble, bound, built, check_recipes, default_for
from .hierarchy import units_of
from .packing import Moving, Packing, check_supports, is_circular, moving_supports, place


class AutoFlow(FlowGuide, AutoContinuous):
    """A guide whose posterior over all continuous latents is one normalizing flow.

    With u drawn from the flow's base, T the flow, the identity at the start, A a learned and F a fixed affine map::

        z = constrain(F(A(T(u)))),    log q(z) = log p_base(u) - log|det dz/du| in nats

    A is a matrix for up to 64 unconstrained latents, and a scale for each beyond.  It starts at ``init_scale``, and F
    at ``init_loc_fn``; ``fit_svi`` sets F to a Gaussian.  It has all correlations for up to 4096 latents, and beyond
    those along up to 512 directions.  Beyond 512 latents F also bends each latent by a learned spline.
    Up to 1,200 latents the effects of a hierarchy are in units of their priors, times Gaussian potentials: F is then
    followed by a :class:`~pyro_flows.transforms.NonCentred`.  The guide is a Pyro ``AutoContinuous``: it works with any
    ELBO in SVI, ``Predictive``, ``AutoGuideList`` and ``NeuTraReparam``.
    Latents on circles get circular splines.  These are von Mises latents, and latents on intervals marked
    ``infer={"periodic": True}``.

    Elements that a mask hides are no latents if no visible site depends on them.  They have a fixed value.

    With an encoder the guide is *amortised*: q(z | data), one network for all datasets, trained by ``fit_amortized``.
    Before F a fixed map of each latent then takes a normal to the prior, through quantiles of the simulations.
    Then ``guide.sample(n, x)`` is the posterior of data ``x``; :meth:`bind` makes a guide of that dataset alone.

    Args:
        model: A Pyro model of fixed structure.  Its discrete latents of finite support are summed out.
        flow: A recipe, called with the number of latent dimensions, such as ``flows.iaf``.  By default 8 affine
            couplings, 16 beyond 32 latents, over contaminated normals, or beyond 512 latents normals.  With an encoder
            it is also called with the width of the context, and is by default ``flows.nsf_ar`` and an affine map that
            depends on the context.
        encoder: A network or function from the model's arguments to a context ``(context_dim,)``, and from a batch of
            datasets ``(*batch, ...)`` to ``(*batch, context_dim)``: see ``pyro_flows.encoders``.
        base: A function of the number of latent dimensions that replaces the recipe's base, such as
            ``distributions.StudentTBase`` for heavy tails.
        init_loc_fn: The strategy for the start; by default ``init_to_center``, or the origin if that is far likelier.
        init_scale: The scale of each unconstrained latent at the start, for effects of a hierarchy in units of their
            priors.  With the default flow, standard deviations are up to 2 % larger.
        name: The guide's name in Pyro's parameter store, unique by default; a name of yours finds stored parameters.

    Raises:
        TypeError: If ``flow``, ``base`` or ``encoder`` cannot be called, or ``model`` is a guide.  At :meth:`setup`, if
            the recipe fails.
        ValueError: If ``init_scale`` is not positive.  At :meth:`setup`, if a latent is discrete with infinite support,
            has a support without volume or lies in a subsampled plate.  If a mask divides an event, or hides a part of
            a latent that visible sites depend on.  The error names the site.  Also if
            the model's density is not finite at the start, or the recipe's flow or the encoder's output does not fit.
            In use, if arguments change which latents the model has, or their shapes.
        FloatingPointError: In training, naming the site, the cause and the way out, if a draw is not finite.  In use,
            if an encoder's data lie so far from those of training that a draw is not finite.

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

    recipes = "_recipe", "_base_recipe"
    settings = "encoder", "init_scale"
    is_joint = True

    @suggests_recipes(nsf, nsf_ar, realnvp, cnf)
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
        check_numbers("AutoFlow", above=0, init_scale=init_scale)
        super().__init__(model, encoder, init_loc_fn, name)
        self._recipe, self._base_recipe = flow, base
        self._init_scale, self.encoder = float(init_scale), encoder
        self._engine: str | None = None  # for runs that constrain latents, if supports depend on other latents

    def _build(self, call: Call, found: Found) -> None:
        self.packings = self._layouts(call.latents)
        moving = moving_supports(call, self._init_scale)
        if self.is_amortised:
            check_supports(call, moving)
        self._engine = Moving(call, self.packings["latent"]).engine if moving else None
        self.latent_dim = self.packings["latent"].size  # without absent elements
        sizes = self.latent_dim, width_for_one(call, self.encoder)
        flow = built("AutoFlow", "flow", self._recipe, default_for(self.circular, sizes[1]), sizes)
        start, units = self.packings["latent"].start, None if self.is_amortised or moving else self._units(call)
        self.flow = assemble(flow, self._base_recipe, start, self._init_scale, self.circular, units)

    def _units(self, call: Call) -> NonCentred | None:
        """Return the map from effects in units of their priors, if the model is a hierarchy."""
        if self.latent_dim > LIMITS.related or self.has_circles:
            return None
        return units_of(call, self.packings["latent"])

    def parts(self) -> dict[str, Any]:
        parts = super().parts() | {"encoder": self.encoder, "flow": self.flow}
        return parts | {"context_dim": self.flow.context_dim, "moves": self.moves}

    def _restore(self, flow: GuideFlow, context_dim: int, moves: bool = False) -> None:
        self.latent_dim = self.packings["latent"].size
        check_fits(flow, self.latent_dim, context_dim)
        self.flow, self._engine = flow, "vmap" if moves else None

    @property
    def _unconstrained_shapes(self) -> dict[str, torch.Size]:
        """The shapes of unconstrained latents, an attribute of Pyro's ``AutoContinuous``."""
        return {name: part.batch + part.event for name, part in self.packings["latent"].parts.items()}

    # The default training.

    @property
    def has_circles(self) -> bool:
        """True if some latents are angles."""
        return any(self.circular)

    @property
    def moves(self) -> bool:
        """True if the supports of some latents depend on other latents."""
        return self._engine is not None

    @property
    def is_of_effects(self) -> bool:
        """True if all but few latents are effects in units of their priors, which are independent given these few."""
        units = self.flow.units
        if units is None or units.chained:
            return False
        return self.latent_dim - sum(map(len, units.effects)) <= LIMITS.quick

    @property
    def draws_from_flow(self) -> bool:
        """True if the guide has no encoder, and no subclass changes how it samples from its flow."""
        is_plain = keeps(self, AutoFlow, "forward", "_draws", "sample_latent", "get_posterior")
        return self.encoder is None and isinstance(self.flow, Flow) and is_plain

    @property
    def has_default_flow(self) -> bool:
        """True if the flow is the default one, and not from a recipe of the user."""
        return self._recipe is None and type(self.flow) is GuideFlow

    @property
    def is_fresh(self) -> bool:
        """True if the guide is untrained."""
        return isinstance(self.flow, GuideFlow) and self.flow.is_untrained

    @property
    def takes_paths(self) -> bool:
        return not self.has_circles

    def schedule(self, *, near: bool = False, alone: bool = True, share: float = 1.0) -> Schedule:
        """Return the schedule that suits the guide: many draws per step, which help more than further steps.

        A guide that starts near the posterior needs a part of the steps.
        """
        if self.has_circles:
            return Schedule(steps=2000, num_particles=256, lr=0.003)
        if self.latent_dim > LIMITS.few:
            return schedule_of_many(self.latent_dim, near=near)
        if not alone:
            return Schedule(500 if near else 1000, num_particles=256)
        if near:
            return Schedule(80, num_particles=128, lr=0.02)
        return Schedule(400 if self.latent_dim <= 16 else 600, num_particles=256, lr=0.02)

    def prepare(self, call: Call) -> None:
        if not isinstance(self.flow, Flow):
            fault = "fit_svi cannot train an ensemble, since its draws have no gradients"
            raise ValueError(f"AutoFlow: {fault}. Train one of its members, or resample its draws by pf.resample.")

    def by_soap(self) -> list[Tensor]:
        return [] if self.has_circles or self.latent_dim > LIMITS.few else list(self.flow.parameters())

    def by_muon(self) -> list[Tensor]:
        if self.has_circles or self.latent_dim <= LIMITS.few:
            return []
        return [layer.weight for layer in self.flow.modules() if isinstance(layer, nn.Linear)]

    @property
    def circular(self) -> list[bool]:
        """True for each of the packed latents that is an angle."""
        parts = self.packings["latent"].parts
        return [is_circular(parts[name].support) for name in self.coordinates]

    @property
    def start(self) -> tuple[Tensor, float]:
        """The packed, unconstrained latents at the start, from ``init_loc_fn``, and ``init_scale``."""
        loc = self.flow.fixed.loc.detach().clone()
        if self.flow.units is not None:
            loc = self.flow.units.forward_and_log_det(loc)[0].detach()
        return loc, self._init_scale

    def start_at(
        self, loc: Tensor, scale: Tensor, directions: Tensor | None = None, stretch: Tensor | None = None
    ) -> None:
        """Reset the guide's last maps, so that together they take N(0, I) to N(loc, L Lᵀ).

        Beyond 4096 latents L is diagonal, or ``diag(s) (I + Q (E - I) Qᵀ)`` for orthonormal directions Q.  Angles stay
        the same.

        Args:
            loc: The mean of the packed, unconstrained latents, ``(latent_dim,)``.
            scale: Their Cholesky factor L, ``(latent_dim, latent_dim)``, or a diagonal s, ``(latent_dim,)``.  Only
                the marginals of L count beyond 4096 latents.
            directions: The directions Q, ``(latent_dim, R)``; none by default.
            stretch: The diagonal of E, ``(R,)``.

        Raises:
            ValueError: If there are more directions than the guide's map has, which has none for up to 4096 latents.
        """
        if self.flow.units is not None:
            self.flow.units.reset()
        self.flow.start_at(loc, scale, directions, stretch)

    # Training on simulations, for a guide with an encoder.

    @property
    def is_amortised(self) -> bool:
        return self.encoder is not None

    @property
    def data_encoders(self) -> list[Any]:
        return [] if self.encoder is None else [self.encoder]

    def packed(self, values: dict[str, Tensor]) -> Packed:
        """Return the packed latents of N simulations, ``(N, latent_dim)``, with log|det| of the packing ``(N,)``."""
        return [self.pack(values)]

    def start_at_draws(self, vectors: Sequence[Tensor]) -> None:
        """Start from the marginal distributions of the packed latents of simulations, ``(N, latent_dim)``."""
        self.flow.start_at_draws(vectors[0])

    def initialize_encoders(self, call: Call) -> None:
        """Initialise the ``Standardize`` layers of the encoder from the data of a call."""
        initialize(call, self.encoder)

    def scored(self, packed: Packed, *args: Any, **kwargs: Any) -> list[SimulatedVectors]:
        """Return the packed latents of N simulations with the contexts of their data, the model's arguments."""
        ((z, log_det),) = packed
        context = cast(Tensor, self.context(*args, **kwargs))
        if context.shape[:-1] != z.shape[:-1]:
            shape = tuple(context.shape)
            raise ValueError(f"AutoFlow: the encoder must return shape ({len(z)}, context_dim), got {shape}.")
        return [SimulatedVectors(self.flow, z, context, log_det)]

    def of_datasets(self, *args: Any, **kwargs: Any) -> OfDatasets:
        """Return the posteriors of M datasets, or of the one dataset of a guide without an encoder."""
        with at_rest(self.encoder):
            context = self.context(*args, **kwargs)
        shapes = {name: site["value"].shape for name, site in self.prototype_trace.iter_stochastic_nodes()}
        layout = self._layout(self._call(args, kwargs))
        return OfDatasets(self.flow, context, layout, shapes, widens=not self.has_circles)

    def context(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Return the encoder's context of data, ``(*batch, context_dim)``; None without an encoder."""
        if self.encoder is None:
            return None
        return encode(self._call(args, kwargs), self.encoder, self.flow.context_dim).to(next(self.flow.parameters()))

    @torch.no_grad()
    def bind(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Return a copy for the one dataset in the arguments, without the encoder, to be checked or refined."""
        if self.encoder is None or self.prototype_trace is None:
            reason = "has no encoder" if self.encoder is None else "was never set up; train it by fit_amortized"
            raise ValueError(f"AutoFlow.bind: the guide {reason}.")
        call = self.setup()._call(args, kwargs)
        seen = cast(Tensor, self._context_at_rest(call))
        if seen.dim() != 1:
            raise ValueError("AutoFlow.bind: give one dataset, for which the encoder returns one vector.")
        self._check_draw(call)
        new = copy.deepcopy(self)
        new.encoder, new.flow = None, bound(new.flow, seen)
        return new

    def _layouts(self, sites: dict[str, Any]) -> dict[str, Packing]:
        return {"latent": Packing("AutoFlow", sites.values(), present=self._calls.present)}

    def _layout(self, call: Call) -> Packing | Moving:
        """Return the map between the vector and the latents: a run of the model if supports depend on other latents."""
        if self._engine is None:
            return self.packings["latent"]
        if call.model is None:
            fault = "the supports of some latents depend on other latents and need the model, which saved guides lack"
            raise ValueError(f"AutoFlow: {fault}. Build AutoFlow(model) again and load its state_dict.")
        return Moving(call, self.packings["latent"], self._engine)

    def _draws(self, call: Call) -> dict[str, Tensor]:
        self._calls.rows(call, needed=False)
        layout, latent = self._layout(call), self.sample_latent(*call.args, **call.kwargs)
        return place(layout.unpack(latent), self._create_plates())

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the packed, unconstrained latents, ``(latent_dim,)``."""
        return self._draw("latent", self.get_posterior(*args, **kwargs))

    def get_base_dist(self) -> dist.TorchDistribution:
        """Return the base distribution of the flow, over vectors of ``latent_dim`` numbers."""
        return self.flow.base()

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """Return the map from the base to the unconstrained latents; each network runs once."""
        return View(Compose(self.setup(*args, **kwargs).flow.runs), self.context(*args, **kwargs))

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """Return the distribution of the packed, unconstrained latents."""
        return self.setup(*args, **kwargs).flow(self.context(*args, **kwargs))

    def _sampled(self, number: int, call: Call) -> dict[str, Tensor]:
        context, chunk = self._context_at_rest(call), chunk_for(self.latent_dim)
        return self._layout(call).values(self.flow.sample((number,), context, chunk_size=chunk))

    @torch.no_grad()
    def sample_roughly(self, number: int) -> Tensor:
        """Sample packed, unconstrained latents, ``(number, latent_dim)``, with networks in single precision.

        This takes half the time.  The last, fixed affine map is exact, so that latents may be far from zero.
        """
        rough = copy.deepcopy(Flow(self.flow.unscaled, self.flow.base)).float()
        x = rough.sample((number,), chunk_size=chunk_for(self.latent_dim))
        return chained(self.flow.scaled, x.to(self.flow.fixed.loc), None)[0]

    def constrain(self, latent: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Map packed latents ``(N, latent_dim)`` to values of the sites, ``(N, *site_shape)``, for some arguments."""
        return self._layout(self._call(args, kwargs)).values(latent)

    def _log_prob(self, values: dict[str, Tensor], call: Call) -> Tensor:
        context, (packed, log_det) = self._context_at_rest(call), self._layout(call).pack(values)
        return self.flow.log_prob(packed, context, chunk_size=chunk_for(self.latent_dim)) + log_det

    def _context_at_rest(self, call: Call) -> Tensor | None:
        if self.encoder is not None:
            self.check_same(call)
        with at_rest(self.encoder):
            context = self.context(*call.args, **call.kwargs)
        check_finite("AutoFlow", context)
        return context

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield the latent sites with their unconstrained values, ``(*batch, *shape)``, as Pyro's reparametriser asks.

        Args:
            latent: Packed latents, ``(*batch, latent_dim)``.
        """
        sites = self.prototype_trace.nodes
        yield from ((sites[name], free) for name, free in self.packings["latent"].free(latent).items())

    def unpack(self, latent: Tensor) -> dict[str, Tensor]:
        """Map packed, unconstrained latents ``(*batch, latent_dim)`` to values of sites, ``(*batch, *site_shape)``."""
        return self.packings["latent"].values(latent)

    def pack(self, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Map values to packed latents ``(*batch, latent_dim)``, and return log|det| of that map too.

        The log-determinant is in nats, and -inf outside of the support.
        """
        return self._layout(self._call(args, kwargs)).pack(values)

    @property
    def coordinates(self) -> list[str]:
        """The site of each of the packed latents."""
        return self.packings["latent"].coordinates


def ensemble(guides: Sequence[AutoFlow]) -> AutoFlow:
    """Return the ensemble of K trained, amortised guides of one model: the mean of their densities::

        q(z | x) = 1/K Σ_k q_k(z | x)

    A guide that was trained on too few simulations is often too narrow, and each one differently.  The mean of the
    densities of several is wider, and its coverage is nearer to the stated level: A Crisis in Simulation-Based
    Inference? Beware, Your Posterior Approximations Can Be Unfaithful (Hermans et al. 2021, arXiv:2110.06581).  Simple
    and Scalable Predictive Uncertainty Estimation using Deep Ensembles (Lakshminarayanan, Pritzel, Blundell 2016,
    arXiv:1612.01474).

    It is less often overconfident than its members, and its mean log-density over any data is at
    least the mean of theirs.  Train each member by :func:`~pyro_flows.fit_amortized`, on the same ``simulations``.
    Members start from other weights, and hold out other simulations.

    The ensemble is an :class:`~pyro_flows.AutoFlow` with copies of the networks.  It draws, scores, binds, and is
    calibrated, checked and saved as each member is, at K times the cost.  It has no single base, so ``fit_svi`` and
    ``neutra`` refuse it.

    Args:
        guides: The guides, at least two, each with an encoder of its own.

    Raises:
        TypeError: If one of them is no ``AutoFlow``.
        ValueError: If there are fewer than two, one has no encoder or was never trained, two share an encoder, or their
            latents differ.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow, fit_amortized, simulate
        >>> from pyro_flows.encoders import MLPEncoder
        >>> def model(x=None):
        ...     theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1).to_event(1))
        ...     return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)
        >>> known = simulate(model, num_simulations=200)
        >>> guides = [AutoFlow(model, encoder=MLPEncoder(2, context_dim=8)) for _ in range(2)]
        >>> fits = [fit_amortized(model, g, simulations=known, max_epochs=2, progress=False) for g in guides]
        >>> guide, x = ensemble(guides), torch.tensor([1.0, -1.0])
        >>> draws = guide.sample(5, x)
        >>> draws["theta"].shape, guide.log_prob(draws, x).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """
    _check(guides)
    new = copy.deepcopy(guides[0])
    parts = [copy.deepcopy(guide) for guide in guides]
    new.encoder = Joined([part.encoder for part in parts if part.encoder is not None])
    new.flow = FlowMixture([part.flow for part in parts])  # type: ignore[assignment]
    return new


def _check(guides: Sequence[Any]) -> None:
    """Raise an error unless guides can form an ensemble."""
    if not isinstance(guides, list | tuple) or not all(isinstance(guide, AutoFlow) for guide in guides):
        raise TypeError(f"ensemble: guides must be a list of AutoFlows, got {quoted(guides)}.")
    if len(guides) < 2:
        raise ValueError(f"ensemble: guides must hold at least two guides, got {len(guides)}. Train another one.")
    latents = list[list[str]]()
    for number, guide in enumerate(guides):
        way = "Build AutoFlow(model, encoder=...), and train it by fit_amortized"
        is_ensemble = isinstance(getattr(guide, "flow", None), FlowMixture)
        for fails, fault in (
            (guide.encoder is None, f"have an encoder, got none. {way}"),
            (guide.prototype_trace is None or guide.is_fresh, "be trained. Fit it first: fit_amortized(model, guide)"),
            (is_ensemble, "be a single guide, got an ensemble. Give its members"),
        ):
            if fails:
                raise ValueError(f"ensemble: guides[{number}] must {fault}.")
        latents.append([f"{site.name} {tuple(site.value.shape)} in {site.support}" for site in guide.parts()["sites"]])
        if latents[number] != latents[0]:
            got = f"{latents[number]} and {latents[0]}"
            raise ValueError(f"ensemble: guides must have the same latents, got {got}. Give guides of one model.")
    weights = [id(weight) for guide in guides for weight in guide.parameters()]
    if len(set(weights)) < len(weights):
        fault = "have weights of their own, got a network that is shared, so that each fit changed the others"
        raise ValueError(f"ensemble: guides must {fault}. Build an encoder for each guide.")


def posterior_graph(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Return the dependencies among the packed latents of an ``AutoFlow``, given the model's arguments.

    Latents are taken in the reverse of the model's order, and each depends on its children and on the other parents of
    these, as ``pyro.infer.inspect.get_dependencies`` finds them: Faithful Inversion of Generative Models for Effective
    Amortized Inference (Webb et al. 2018, arXiv:1712.00287).

    They are the ``adjacency`` of autoregressive recipes::

        graph = posterior_graph(model, *data)
        guide = AutoFlow(model, functools.partial(flows.maf, adjacency=graph))

    With one layer the guide has exactly this graph.  With k layers a latent depends on k generations of ancestors; with
    ``flows.iaf``, whose networks see the base, on all of them.  Rows of a plate count as independent unless Pyro sees a
    site that joins them.  It does not see couplings inside of the plate, such as a ``factor`` of neighbours.

    Args:
        model: A Pyro model with continuous latents.
        *args: Its arguments, with the data.
        **kwargs: Its keyword arguments.

    Returns:
        A boolean matrix ``(D, D)``, true at (i, j) if latent number i depends on latent number j.  It has no cycle.

    Raises:
        TypeError: If the model requires arguments and none are given.
        ValueError: If an :class:`~pyro_flows.AutoFlow` refuses the model, for example for a discrete latent
            or because it has no latents.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     mean = pyro.sample("mean", dist.Normal(0, 1))
        ...     with pyro.plate("group", 2):
        ...         level = pyro.sample("level", dist.Normal(mean, 1))
        ...         pyro.sample("y", dist.Normal(level, 1), obs=torch.zeros(2))
        >>> posterior_graph(model).int().tolist()  # the mean depends on both levels, which depend on the data alone
        [[0, 1, 1], [0, 0, 0], [0, 0, 0]]
    """
    parts = AutoFlow(model).setup(*args, **kwargs).packings["latent"].parts
    depends = get_dependencies(model, args, kwargs)["posterior_dependencies"]
    own = {name: part.rows for name, part in parts.items()}
    rows = []
    for child in parts:
        blocks = []
        for parent in parts:
            plates = depends.get(child, {}).get(parent)
            block = torch.full((parts[child].size, parts[parent].size), plates is not None)
            for plate in own[child].keys() & own[parent].keys() - (plates or set()):
                block &= own[child][plate][:, None] == own[parent][plate]
            blocks.append(block.tril(-1) if child == parent else block)
        rows.append(torch.cat(blocks, -1))
    return torch.cat(rows)
