"""The flow of a guide in named parts, z = F(B(C(A(T(u))))): from a recipe's flow T to the latents.

T are couplings, the layers of the recipe.  A is a learned affine map, F a fixed one.  Beyond 512 latents a fixed map
C of the correlations and a learned spline B of each latent lie between them.  So each latent has a marginal
distribution of any shape, with the correlations of a Gaussian.

The default recipes come first.  *Choosing a flow* in the docs says how they were found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import flows
from ..bijectors import Affine, RationalQuadraticSpline, SoftplusAffine
from ..conditioners import MLP, Given, StepNet
from ..conditioners.base import networks_of, set_pace
from ..distributions import CircularBase, ContaminatedNormalBase, ModesBase, StandardNormal
from ..flows import Flow
from ..flows.arguments import checked_sizes
from ..flows.coupling import coupling_layers
from ..flows.mixture import FlowMixture
from ..programs.checks import BUILT_IN
from ..transforms import (
    ActNorm,
    Conditioned,
    Coupling,
    Elementwise,
    FixedAffine,
    FlowTransform,
    NonCentred,
    QuantileMap,
    Recurrence,
    ScaledLinear,
    TriangularAffine,
)
from ..transforms.base import chained
from ..transforms.linear import unrotated


@dataclass(frozen=True)
class Limits:
    """The largest numbers of latents up to which a default of guides holds, and sizes that follow from them.

    Attributes:
        few: Eight couplings, trained by SOAP; beyond, sixteen and Muon.
        quick: Couplings that each move by a quarter of a step, beyond ``few``.
        learned: A full matrix in the learned affine map.
        related: Effects of a hierarchy in units of their priors.
        tailed: A base with wide tails.  Beyond, each latent has a spline of its own.
        dense: A full matrix in the map that the guide starts from.  Beyond, it stretches some directions.
        stretched: Numbers in all these directions together, which bound their memory.
        directions: The fewest directions, and the most.
        correlated: Features of a learned likelihood whose correlations depend on its parameters.
        factors: The most latents of parents for which rows have coefficients in place of a network.
        place_pace: The pace of the map from a context to a row's place, which has to keep up with the encoder.  At 1 it
            learns less in the usual number of steps of an autoencoder.  Without an encoder a step of .03 throws the
            rows far away.
    """

    few: int = 32
    quick: int = 64
    learned: int = 64
    related: int = 1200
    tailed: int = 512
    dense: int = 4096
    stretched: int = 5_000_000
    directions: tuple[int, int] = (16, 512)
    correlated: int = 4
    factors: int = 8
    place_pace: float = 16.0


LIMITS = Limits()
Recipe = Callable[..., Flow]


def affine_couplings(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 8,
    hidden_dims: Sequence[int] = (64, 64),
    max_log_scale: float = 3.0,
    activation: type[nn.Module] = nn.ELU,
) -> Flow:
    """Build affine couplings for a guide, y_B = x_B exp(s) + t, with (s, t) = net(x_A).

    The recipe :func:`~pyro_flows.flows.realnvp` is made for densities: its scales are steep, and its shifts are in
    units of the base.  A guide is trained on its own draws, so here shifts are in units of the draws.  Scales are
    damped: steep ones compound from layer to layer, and throw the first draws of a fit out of range.  Without a context
    the networks are centred.  While a guide is far from the posterior, all gradients point one way, and should move the
    affine map, not bend the couplings.

    Density estimation using Real NVP (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803).

    Raises:
        ValueError: If a size or ``max_log_scale`` is out of its range.

    Example::

        >>> len(affine_couplings(4, num_transforms=2).transforms)
        2
    """
    sizes = checked_sizes("affine_couplings", input_dim, context_dim, num_transforms, hidden_dims)
    return Flow(coupling_layers(Affine(max_log_scale), sizes, activation, centered=context_dim == 0))


def default_flow(input_dim: int) -> Flow:
    """Build the default flow of :class:`~pyro_flows.AutoFlow`: 8 affine couplings, 16 beyond 32 latents.

    The base has slightly heavier tails than a normal, so that weights p / q are bounded if those of the posterior are.
    Beyond 512 latents the base is normal.  Otherwise each draw would have some latents far out, whose gradients are
    noise to all others.  For 33 to 64 latents each coupling has a pace of 1/4; other paces are left to the guide.

    After Agrawal, Domke 2024, Disentangling impact of capacity, objective, batchsize, estimators, and step-size on
    flow VI, arXiv:2412.08824.

    Args:
        input_dim: The number D of latent dimensions.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, equal to its base at the start.

    Raises:
        ValueError: If ``input_dim`` is not a positive integer.

    Example::

        >>> [len(default_flow(dim).transforms) for dim in (32, 33)]
        [8, 16]
    """
    couplings = affine_couplings(input_dim, num_transforms=8 if input_dim <= LIMITS.few else 16)
    base: nn.Module = StandardNormal(input_dim)
    if input_dim <= LIMITS.few:
        base = ContaminatedNormalBase(input_dim)
    elif input_dim <= LIMITS.tailed:
        # Among many latents one is always in the wide component, which must then be less wide.
        base = ContaminatedNormalBase(input_dim, share=0.05, scale=1.3)
    if LIMITS.few < input_dim <= LIMITS.quick:
        # If 16 shared a step they would bend slowly.  With fewer latents, networks of this pace bend on a long way to
        # the posterior; with more, draws can leave the range of float32.
        for layers in networks_of(couplings):
            set_pace(layers, 0.25)
    return Flow(couplings.transforms, base)


def local_flow(input_dim: int, context_dim: int, *, spread: bool = False) -> Flow:
    """Build the default flow of :class:`AutoPlateFlow` for the rows of a plate, l = A_c(T_c(u)).

    The last layer A_c is an affine map that depends on the context c alone, so that each row's place and scale are
    found first.  If ``spread``, rows start at a random linear map of their contexts: if all rows of an autoencoder
    started alike, a decoder that is trained with the guide would learn to ignore their latents.
    """
    if input_dim == 1:
        layers = flows.nsf(1, context_dim, num_transforms=2, activation=nn.ELU).transforms
    else:
        layers = affine_couplings(input_dim, context_dim, num_transforms=4).transforms
    place = MLP(context_dim, input_dim, Affine().num_params, activation=nn.ELU, skip=True)
    set_pace(networks_of(place)[0], LIMITS.place_pace)
    if spread and (direct := place.direct) is not None:
        # A conditioner returns all scales of an affine map and then all shifts, here from the context's own columns.
        nn.init.normal_(direct.weight[input_dim : 2 * input_dim, :context_dim], std=context_dim**-0.5 / direct.unit)
    return Flow([*layers, Elementwise(Affine(), input_dim, place)])


def rows_flow(input_dim: int, context_dim: int, num_given: int) -> Flow:
    """Build the default flow of :class:`AutoStructuredFlow` for the rows of plates, without a network::

        l = m + M p + exp(s + S p) T(u)

    Each row has its own coefficients m, M, s and S, at the start of its context; p are the parents' latents.  All rows
    have the same spline T.  So a step costs little more than one of a Gaussian guide, and rows learn independently.
    """
    net = Given(context_dim, input_dim, Affine().num_params, num_given)
    return Flow([Elementwise(RationalQuadraticSpline(), input_dim), Elementwise(Affine(), input_dim, net)])


def sequence_flow(steps: int, width: int, context_dim: int = 0) -> Flow:
    """Build the default flow of :class:`AutoStructuredFlow` for T steps of d latents, e = R(T_2(T_1(u))).

    Two couplings bend every other number, depending on its neighbours and on the context.  A recurrence R makes the
    steps depend on all before.  All are convolutional, so that time and memory are proportional to T.
    """
    layers: list[FlowTransform] = []
    place = torch.arange(steps * width)
    board = (place // width + place % width) % 2 == 0
    for mask in (board, ~board):
        if 0 < mask.sum() < len(mask):
            net = StepNet(mask, steps, Affine().num_params, (16, 16), context_dim)
            layers.append(Coupling(Affine(3.0), net, mask))
    net = StepNet(torch.zeros_like(board), steps, 2 + width, (16,), context_dim)
    return Flow([*layers, Recurrence(steps, width, net)])


def check_recipes(owner: str, **recipes: object) -> None:
    """Raise TypeError unless each argument is None or a function of the number of latent dimensions."""
    for argument, recipe in recipes.items():
        if isinstance(recipe, nn.Module) or not (recipe is None or callable(recipe)):
            example = "distributions.StudentTBase" if argument == "base" else "flows.nsf"
            words = f"a recipe that is called with the number of latent dimensions, such as {example}"
            raise TypeError(f"{owner}: {argument} must be {words}, got {type(recipe).__name__}.")


def built(
    owner: str, name: str, build: Recipe | None, default: Recipe, sizes: tuple[int, int], *, may_encode: bool = False
) -> Flow:
    """Build the flow from the recipe that the user gives under a name, or from the default recipe.

    Args:
        owner: The function or class that the user calls, for errors.
        name: The argument that holds the recipe.
        build: The recipe of the user, or None.
        default: The default recipe.
        sizes: The number of features, and the width of the contexts or 0.
        may_encode: True if the flow may have an encoder, which then takes the contexts.

    Raises:
        TypeError: If the recipe fails by one; its errors of other classes keep those.
        ValueError: If it returns no flow over that number of features, with contexts of that width; or one with an
            encoder, unless it ``may_encode``.
    """
    (input_dim, context_dim), given = sizes, sizes if sizes[1] else sizes[:1]
    call = f"{name}({', '.join(map(str, given))})"
    try:
        flow = (build or default)(*given)
    except BUILT_IN as error:
        if type(error) not in BUILT_IN:
            raise
        raise type(error)(f"{owner}: {call} fails: {str(error).rstrip('.')}.") from error
    has_encoder = isinstance(flow, Flow) and flow.encoder is not None
    fits = isinstance(flow, Flow) and flow.event_shape == (input_dim,) and (may_encode or not has_encoder)
    if not fits or not (flow.context_dim == context_dim or has_encoder):
        context = f"contexts of width {context_dim}" if context_dim else "no context"
        wanted = f"a Flow over events of shape ({input_dim},) with {context}{' and no encoder' * has_encoder}"
        raise ValueError(f"{owner}: {call} must return {wanted}, got {flow!r:.200}.")
    return flow


def default_for(circular: Sequence[bool], context_dim: int) -> Recipe:
    """Return the default recipe of :class:`AutoFlow`; with an encoder :func:`placed_flow`."""
    if any(circular):
        return partial(flows.circular_coupling, circular=circular, activation=nn.ELU)
    return placed_flow if context_dim else default_flow


def placed_flow(input_dim: int, context_dim: int, activation: type[nn.Module] = nn.SiLU) -> Flow:
    """Build the default flow for training on simulations, y = A_c(T_c(u)).

    T_c are autoregressive splines, which score simulations in one pass and overfit less than couplings do.  The last
    layer A_c is an affine map that depends on the context c alone.  It places and scales a narrow distribution, whose
    tails then are as narrow; splines alone would have those of their base.  Of a single feature all networks depend on
    the context alone, so that many values for one context cost one network pass.  The activation is that of the
    networks of splines.
    """
    if input_dim == 1:
        layers = flows.nsf(1, context_dim, num_transforms=2, activation=activation).transforms
    else:
        layers = flows.nsf_ar(input_dim, context_dim, activation=activation).transforms
    place = MLP(context_dim, input_dim, Affine().num_params, hidden_dims=(64, 64), activation=nn.SiLU, skip=True)
    return Flow([*layers, Elementwise(Affine(), input_dim, place)])


def likelihood_flow(input_dim: int, context_dim: int) -> Flow:
    """Build the default flow of :func:`~pyro_flows.fit_likelihood`, x = A_θ(T_θ(u)).

    Rows of two to four features get two layers of splines with small networks.  Their affine map has a triangular
    matrix, so a normal row is found by it alone, with correlations that depend on the parameters.  A
    :func:`placed_flow` overfits such rows more.  Larger rows get one, since the triangular map of many independent
    features overfits in turn.  Rows of one feature get it with ReLU, which follows modes that cross several times as
    the parameter grows.
    """
    if input_dim > LIMITS.correlated:
        return placed_flow(input_dim, context_dim)
    if input_dim == 1:
        return placed_flow(1, context_dim, nn.ReLU)
    splines = flows.nsf_ar(input_dim, context_dim, num_transforms=2, hidden_dims=(32, 32))
    place = MLP(context_dim, 1, TriangularAffine.count_params(input_dim), skip=True)
    return Flow([*splines.transforms, TriangularAffine(input_dim, place)])


def share_step(flow: Flow) -> None:
    """Let each network of a flow move its layer by a share of a step of Adam, so that all together move by one step.

    The tables of a bijector's parameters get paces likewise.  This keeps deep or wide flows stable at the usual step
    sizes of plain SVI.  Parts whose recipe gave them a pace keep it.
    """
    tables = [[part] for part in flow.modules() if isinstance(part, Elementwise) and part.conditioner is None]
    for groups in (networks_of(flow), tables):
        free = [parts for parts in groups if all(part.unit == 1.0 for part in parts)]
        for parts in free:
            set_pace(parts, 1 / len(free))


class GuideFlow(Flow):
    """A flow in named parts, from the base to the latents.

    Args:
        couplings: The layers of a recipe.
        base: The base.
        fixed: The last affine map, which is set and not trained.
        learned: The affine map that is trained, or None.
        correlations: A further fixed map, before ``bend``, or None.
        bend: A map of each latent, trained, or set to the quantiles of simulations; or None.
        units: The last map, from effects of a hierarchy in units of their priors, or None.
        circular: For each latent, True if it is an angle, which affine maps leave alone; by default none is.
    """

    couplings: list[FlowTransform]
    fixed: FixedAffine
    learned: FlowTransform | None
    correlations: FixedAffine | None
    bend: Elementwise | QuantileMap | None
    units: NonCentred | None

    def __init__(
        self,
        couplings: Iterable[FlowTransform],
        base: nn.Module,
        fixed: FixedAffine,
        *,
        learned: FlowTransform | None = None,
        correlations: FixedAffine | None = None,
        bend: Elementwise | QuantileMap | None = None,
        units: NonCentred | None = None,
        circular: Sequence[bool] = (),
    ) -> None:
        couplings = list(couplings)
        ends = [layer for layer in (learned, correlations, bend, fixed, units) if layer is not None]
        super().__init__([*couplings, *ends], base)
        # The list registers the layers.  If their names did so too, each tensor would have two names.
        vars(self).update(couplings=couplings, fixed=fixed, learned=learned, correlations=correlations, bend=bend)
        vars(self).update(units=units)
        self.circular = tuple(circular) or (False,) * len(fixed.loc)

    @property
    def unscaled(self) -> list[FlowTransform]:
        """All layers before the fixed map, whose numbers are of order one."""
        return [*self.transforms[: -1 if self.units is None else -2]]

    @property
    def scaled(self) -> list[FlowTransform]:
        """The fixed map, and all layers after it."""
        return [self.fixed] if self.units is None else [self.fixed, self.units]

    @property
    def scale_tril(self) -> Tensor:
        """The matrix L of the fixed maps, z = loc + L x, if nothing bends them, ``(D, D)``."""
        matrix = self.fixed.scale if self.fixed.dense else self.fixed.scale.diag()
        if (inner := self.correlations) is None:
            return matrix
        matrix = matrix @ (inner.scale if inner.dense else inner.scale.diag())
        return matrix + matrix @ (inner.directions * (inner.stretch - 1)) @ inner.directions.T if inner.rank else matrix

    @property
    def is_untrained(self) -> bool:
        """True if the flow is as at its start: couplings permute, and learned maps are multiples of the identity."""
        if isinstance(self.base, ModesBase) and self.base.loc.any():
            return False  # the modes were found by training
        if isinstance(self.bend, Elementwise) and self.bend.params.any():
            return False
        with torch.no_grad():
            origin = torch.zeros_like(self.fixed.loc)
            if self.learned is not None:
                (shift, _), (unit, _) = (self.learned.forward_and_log_det(x) for x in (origin, origin + 1))
                unit = unit[[not angle for angle in self.circular]]
                if shift.any() or not torch.allclose(unit, unit[:1].expand_as(unit), rtol=1e-5, atol=0.0):
                    return False
            return permutes(self.couplings, origin)

    def bound(self, context: Tensor) -> GuideFlow:
        """Return a flow of the same layers for one context ``(context_dim,)``, which is a parameter of the new flow."""
        held = nn.Parameter(context.detach().clone())
        couplings = [Conditioned(layer, held) if layer.context_dim else layer for layer in self.couplings]
        ends: dict[str, Any] = {
            name: getattr(self, name) for name in ("learned", "correlations", "bend", "units", "circular")
        }
        return GuideFlow(couplings, self.base, self.fixed, **ends)

    @torch.no_grad()
    def start_at(
        self, loc: Tensor, scale: Tensor, directions: Tensor | None = None, stretch: Tensor | None = None
    ) -> None:
        """Set the fixed maps to N(0, I) -> N(loc, L Lᵀ), and reset the other maps after the couplings.

        ``scale`` is L, or its diagonal; then some directions may be stretched before.  Angles stay the same.

        Raises:
            ValueError: If there are more directions than the maps have.
        """
        given, rank = 0 if stretch is None else len(stretch), 0 if self.correlations is None else self.correlations.rank
        if given > rank:
            raise ValueError(f"AutoFlow.start_at: stretch must have at most {rank} numbers here, got {given}.")
        if self.learned is not None:
            self.learned.load_state_dict(learned_map(self.circular, 1.0).state_dict())
        if any(self.circular):
            loc, scale = _without_angles(loc, scale, torch.as_tensor(self.circular, device=loc.device))
        if isinstance(self.bend, QuantileMap):
            self.bend.set(None)
        if self.correlations is not None and isinstance(self.bend, Elementwise):
            nn.init.zeros_(self.bend.params)
            deviation = scale.norm(dim=-1) if scale.dim() == 2 else scale
            if directions is not None and stretch is not None:
                deviation = deviation * (1 + directions.square() @ (stretch.square() - 1)).sqrt()
            unit = scale / (deviation.unsqueeze(-1) if scale.dim() == 2 else deviation)
            self.correlations.set(torch.zeros_like(loc), unit, directions, stretch)
            scale = deviation
        self.fixed.set(loc, scale)

    @torch.no_grad()
    def start_at_draws(self, z: Tensor) -> Tensor:
        """Set the fixed maps to the marginal distributions of draws ``(N, D)``; return their scales, ``(D,)``."""
        loc, quarter = z.median(0).values, max(1, len(z) // 4)
        width = z.kthvalue(len(z) - quarter, 0).values - z.kthvalue(quarter, 0).values
        scale = torch.where(width > 0, width / 1.349, z.std(0))  # heavy tails do not move the quartiles
        self.start_at(loc, scale)
        if isinstance(self.bend, QuantileMap):
            self.bend.set((z - loc) / scale, torch.as_tensor(self.circular, device=z.device))
        return scale


def assemble(
    flow: Flow,
    base: Callable[[int], nn.Module] | None,
    loc: Tensor,
    scale: float,
    circular: Sequence[bool] = (),
    units: NonCentred | None = None,
) -> GuideFlow:
    """Return a recipe's flow, followed by a learned affine map that starts at ``scale`` and a fixed one at ``loc``.

    Beyond 512 latents correlations and a spline of each latent follow the learned map.  For fewer latents of an
    amortised guide a fixed map of each latent does, from a normal to its prior.

    Raises:
        ValueError: If the flow has no place for the angles among the latents.
    """
    dim, angles = len(loc), any(circular)
    circular = circular or [False] * dim
    made_base = base(dim) if base else flow.base
    held = [b.circular.tolist() if isinstance(b, CircularBase | ModesBase) else [] for b in (flow.base, made_base)]
    if angles and any(found != list(circular) for found in held):
        fault = "some latents are angles, which a base or recipe for real numbers cannot hold"
        way = f"use flow=lambda dim: flows.circular_coupling(dim, circular={list(circular)}, ...)"
        raise ValueError(f"AutoFlow: {fault}; leave both out, or {way}.")
    if not flow.context_dim:  # amortised guides are trained on simulations, without paces
        share_step(flow)
    reachable = min(max(scale, 0.01), 100.0)  # by the learned map; the fixed one has the rest
    learned, correlations, bend = learned_map(circular, reachable), None, None
    if dim > LIMITS.tailed and not angles:
        dense = dim <= LIMITS.dense
        correlations = FixedAffine(dim, dense=dense, rank=0 if dense else rank_for(dim))
        bend = Elementwise(RationalQuadraticSpline(), dim)
    elif flow.context_dim:
        bend = QuantileMap(dim)
    fixed, rest = FixedAffine(dim, dense=dim <= LIMITS.tailed), torch.as_tensor(circular, device=loc.device)
    ends: dict[str, Any] = {"learned": learned, "correlations": correlations, "bend": bend, "circular": circular}
    made = GuideFlow(flow.transforms, made_base, fixed, units=units, **ends)
    made.to(device=loc.device, dtype=loc.dtype)
    if units is not None:
        with torch.no_grad():
            loc, _ = units.inverse_and_log_det(loc)
    fixed.set(loc.masked_fill(rest, 0), torch.full_like(loc, scale / reachable).masked_fill(rest, 1))
    return made


def assemble_local(flow: Flow, loc: Tensor, scale: float, *, by_row: bool, amortised: bool = False) -> GuideFlow:
    """Return a recipe's flow for the latents of a row, followed by a fixed affine map.

    With ``by_row`` another affine map lies between them; its parameters are the first numbers of the context.  If the
    guide is ``amortised``, a fixed map of each latent does, from a normal to its prior.
    """
    if not amortised:
        share_step(flow)
    dim, layers = len(loc), [*flow.transforms]
    if by_row:
        layers.append(Elementwise(Affine(), dim, Given(flow.context_dim, dim, Affine().num_params)))
    fixed = FixedAffine(dim, dense=False)
    made = GuideFlow(layers, flow.base, fixed, bend=QuantileMap(dim) if amortised else None)
    made.to(device=loc.device, dtype=loc.dtype)
    fixed.set(loc, torch.full_like(loc, scale))
    return made


def bound(flow: Any, context: Tensor) -> Any:
    """Return the flow of a guide, or of an ensemble, for one context ``(context_dim,)``."""
    if not isinstance(flow, FlowMixture):
        return flow.bound(context)
    return FlowMixture([part if own is None else part.bound(own) for part, own in flow.pairs(context)])


def rank_for(dim: int) -> int:
    """Return the number of directions that the fixed maps of more than 4096 latents stretch."""
    least, most = LIMITS.directions
    return max(least, min(most, LIMITS.stretched // dim))


def learned_map(circular: Sequence[bool], scale: float) -> FlowTransform:
    """Build the learned affine map: a full matrix for few latents, a scale for each of many; angles are left alone."""
    dim, angles = len(circular), any(circular)
    if dim > LIMITS.learned and not angles:
        scaled = Elementwise(SoftplusAffine(), dim)
        scaled.params.data[:, 0] = SoftplusAffine.raw(scale)
        return scaled
    if dim == 1 or angles:
        norm = ActNorm(dim, fixed=circular if angles else None)
        norm.log_scale.data.fill_(math.log(scale))
        return norm
    linear = ScaledLinear(dim)
    set_pace([linear], 1.0)
    linear.set_scale(scale)
    return linear


@torch.no_grad()
def permutes(layers: Sequence[FlowTransform], like: Tensor) -> bool:
    """True if layers, apart from the rotations that they start from, only permute, as they do before training."""
    x = torch.linspace(-1.5, 1.5, 3 * like.numel()).reshape(3, *like.shape).to(like)
    with unrotated(layers):
        y, _ = chained(layers, x, x.new_zeros(max(layer.context_dim for layer in layers)))
    return torch.allclose(x.flatten(1).sort().values, y.flatten(1).sort().values, rtol=0, atol=1e-3)


def _without_angles(loc: Tensor, scale: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return a Gaussian of which the angles are a standard normal."""
    if scale.dim() == 1:
        return loc.masked_fill(angles, 0.0), scale.masked_fill(angles, 1.0)
    rows = scale.masked_fill(angles.unsqueeze(-1), 0.0)
    factor = torch.linalg.qr(torch.cat((rows, angles.to(rows).diag()), -1).T).R.T
    return loc.masked_fill(angles, 0.0), factor * factor.diagonal().sign()
