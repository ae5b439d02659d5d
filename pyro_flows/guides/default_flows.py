"""Default flows of guides and of likelihoods, and the affine maps between a recipe's flow and the latents.

*Choosing a flow* in the docs says how the defaults were found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import flows
from ..bijectors import Affine, RationalQuadraticSpline, SoftplusAffine
from ..conditioners import MLP, Conditioner, Given, GivenLinear, StepNet
from ..conditioners.base import Network
from ..distributions import CircularBase, ContaminatedNormalBase, ModesBase, StandardNormal
from ..flows import Flow
from ..flows.arguments import checked_sizes
from ..flows.coupling import coupling_layers
from ..flows.mixture import FlowMixture
from ..transforms import (
    ActNorm,
    Conditioned,
    Coupling,
    Elementwise,
    FixedAffine,
    FlowTransform,
    QuantileMap,
    Recurrence,
    ScaledLinear,
    TriangularAffine,
)
from ..transforms.base import chained
from ..transforms.linear import unrotated

# Largest numbers of latents
FEW = 32  # for eight couplings and SOAP; beyond, sixteen and Muon
QUICK = 64  # for couplings that each move by a quarter of a step, beyond FEW
LEARNED = 64  # for a full matrix in the learned affine map
DENSE = 4096  # for a full matrix in the map that the guide starts from; beyond, it stretches some directions
STRETCHED, DIRECTIONS = 5_000_000, (16, 512)  # numbers in these directions, the fewest directions, and the most
TAILED = 512  # for a base with wide tails; beyond, each latent has a spline of its own
CORRELATED = 4  # for correlations of a learned likelihood that depend on its parameters
FACTORS = 8  # of the parents' latents that each row has coefficients for
# The pace of the map from a context to a row's place, which has to keep up with the encoder.  At 1 it learns less in
# the usual number of steps of an autoencoder.  Without an encoder a step of .03 throws the rows far away.
PLACE_PACE = 16.0

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
    return Flow(coupling_layers(Affine(max_log_scale), sizes, activation, False, context_dim == 0))


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
    couplings = affine_couplings(input_dim, num_transforms=8 if input_dim <= FEW else 16)
    base: nn.Module = StandardNormal(input_dim)
    if input_dim <= FEW:
        base = ContaminatedNormalBase(input_dim)
    elif input_dim <= TAILED:
        # Among many latents one is always in the wide component, which must then be less wide.
        base = ContaminatedNormalBase(input_dim, share=0.05, scale=1.3)
    if FEW < input_dim <= QUICK:
        # If 16 shared a step they would bend slowly.  With fewer latents, networks of this pace bend on a long way to
        # the posterior; with more, draws can leave the range of float32.
        for network in _networks(couplings):
            network.set_pace(0.25)
    return Flow(couplings.transforms, base)


def local_flow(input_dim: int, context_dim: int) -> Flow:
    """Build the default flow of :class:`AutoPlateFlow` for the rows of a plate, l = A_c(T_c(u)).

    The last layer A_c is an affine map that depends on the context c alone, so that each row's place and scale are
    found first.
    """
    if input_dim == 1:
        layers = flows.nsf(1, context_dim, num_transforms=2, activation=nn.ELU).transforms
    else:
        layers = affine_couplings(input_dim, context_dim, num_transforms=4).transforms
    place = MLP(context_dim, input_dim, Affine().num_params, activation=nn.ELU, skip=True, pace=PLACE_PACE)
    return Flow([*layers, Elementwise(Affine(), input_dim, place)])


def rows_flow(input_dim: int, context_dim: int, num_given: int) -> Flow:
    """Build the default flow of :class:`AutoStructuredFlow` for the rows of plates, without a network::

        l = m + M p + exp(s + S p) T(u)

    Each row has its own coefficients m, M, s and S, at the start of its context; p are the parents' latents.  All rows
    have the same spline T.  So a step costs little more than one of a Gaussian guide, and rows learn independently.
    """
    if num_given:
        net: Conditioner = GivenLinear(context_dim, input_dim, Affine().num_params, num_given)
    else:
        net = Given(context_dim, input_dim, Affine().num_params)
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


def autoencoder_flow(input_dim: int, context_dim: int) -> Flow:
    """Build a flow as :func:`local_flow` does, whose rows start at a random linear map of their contexts.

    If all rows started alike, a decoder that is trained with the guide would learn to ignore their latents.
    """
    flow = local_flow(input_dim, context_dim)
    # A conditioner returns all scales of an affine map and then all shifts, here from the context's own columns.
    direct = flow.transforms[-1].conditioner.direct
    shift = direct.weight[input_dim : 2 * input_dim, :context_dim]
    nn.init.normal_(shift, std=context_dim**-0.5 / direct.unit)
    return flow


def check_recipes(owner: str, **recipes: object) -> None:
    """Raise TypeError unless each argument is None or a function of the number of latent dimensions."""
    for argument, recipe in recipes.items():
        if isinstance(recipe, nn.Module) or not (recipe is None or callable(recipe)):
            example = "distributions.StudentTBase" if argument == "base" else "flows.nsf"
            words = f"a recipe that is called with the number of latent dimensions, such as {example}"
            raise TypeError(f"{owner}: {argument} must be {words}, got {type(recipe).__name__}.")


def built(
    owner: str,
    name: str,
    build: Recipe | None,
    default: Recipe,
    input_dim: int,
    context_dim: int = 0,
    *,
    may_encode: bool = False,
) -> Flow:
    """Build the flow from the recipe that the user gives under a name, or from the default recipe.

    Raises:
        TypeError: If the recipe fails.
        ValueError: If it returns no flow over that number of features, with contexts of that width; or one with an
            encoder, unless it ``may_encode``.
    """
    sizes = (input_dim, context_dim) if context_dim else (input_dim,)
    call = f"{name}({', '.join(map(str, sizes))})"
    try:
        flow = (build or default)(*sizes)
    except TypeError as error:
        raise TypeError(f"{owner}: {call} fails: {str(error).rstrip('.')}.") from error
    fits = isinstance(flow, Flow) and flow.event_shape == (input_dim,)
    encodes = fits and flow.encoder is not None  # then the encoder takes the contexts
    if not fits or (flow.context_dim != context_dim and not (encodes and may_encode)):
        context = f"contexts of width {context_dim}" if context_dim else "no context"
        wanted = f"a Flow over events of shape ({input_dim},) with {context}"
        raise ValueError(f"{owner}: {call} must return {wanted}, got {flow!r:.200}.")
    if encodes and not may_encode:
        raise ValueError(f"{owner}: {call} must return a Flow without an encoder; give it to the guide, encoder=....")
    return flow


def default_for(circular: Sequence[bool], context_dim: int) -> Recipe:
    """Return the default recipe of :class:`AutoFlow`.

    With an encoder it is :func:`placed_flow`.
    """
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
    if input_dim > CORRELATED:
        return placed_flow(input_dim, context_dim)
    if input_dim == 1:
        return placed_flow(1, context_dim, nn.ReLU)
    splines = flows.nsf_ar(input_dim, context_dim, num_transforms=2, hidden_dims=(32, 32))
    place = MLP(context_dim, 1, TriangularAffine.count_params(input_dim), skip=True)
    return Flow([*splines.transforms, TriangularAffine(input_dim, place)])


def assemble(
    flow: Flow,
    base: Callable[[int], nn.Module] | None,
    loc: Tensor,
    scale: float,
    circular: Sequence[bool] = (),
) -> Flow:
    """Return a recipe's flow, followed by a learned affine map that starts at ``scale`` and a fixed one at ``loc``.

    Beyond 512 latents the fixed map has two parts, z = loc + S B(C x), and between them a learned spline B of each
    latent.  So each latent has a marginal distribution of any shape, with the correlations of a Gaussian.  For fewer
    latents of an amortised guide a fixed map of each latent lies before, from a normal to its prior.

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
        set_pace(flow)
    reachable, rest = _reachable(scale), torch.as_tensor(circular, device=loc.device)
    width = torch.full_like(loc, scale / reachable)
    layers = [*flow.transforms, _learned(circular, reachable)]
    if dim > TAILED and not angles:
        correlations = FixedAffine(dim, dense=dim <= DENSE, rank=0 if dim <= DENSE else rank_for(dim))
        layers += [correlations, Elementwise(RationalQuadraticSpline(), dim)]
    elif flow.context_dim:
        layers.append(QuantileMap(dim))
    return _ending(layers, made_base, loc.masked_fill(rest, 0), width.masked_fill(rest, 1), dense=dim <= TAILED)


def assemble_local(flow: Flow, loc: Tensor, scale: float, *, by_row: bool, amortised: bool = False) -> Flow:
    """Return a recipe's flow for the latents of a row, followed by a fixed affine map.

    With ``by_row`` another affine map lies between them; its parameters are the first numbers of the context.  If the
    guide is ``amortised``, a fixed map of each latent does, from a normal to its prior.
    """
    if not amortised:
        set_pace(flow)
    dim, width, last = len(loc), torch.full_like(loc, scale), list[FlowTransform]()
    if by_row:
        last.append(Elementwise(Affine(), dim, Given(flow.context_dim, dim, Affine().num_params)))
    if amortised:
        last.append(QuantileMap(dim))
    return _ending([*flow.transforms, *last], flow.base, loc, width, dense=False)


def _ending(layers: Sequence[FlowTransform], base: nn.Module, loc: Tensor, scale: Tensor, *, dense: bool) -> Flow:
    """Return a flow of layers that ends with a fixed affine map."""
    fixed = FixedAffine(len(loc), dense=dense)
    made = Flow([*layers, fixed], base).to(device=loc.device, dtype=loc.dtype)
    fixed.set(loc, scale)
    return made


def bound(flow: Any, context: Tensor) -> Any:
    """Return a flow of the same layers for one context ``(context_dim,)``, which is a parameter of the new flow."""
    if isinstance(flow, FlowMixture):
        pairs = zip(flow.flows, flow.contexts(context), strict=True)
        return FlowMixture([part if own is None else bound(part, own) for part, own in pairs])
    held = nn.Parameter(context.detach().clone())
    return Flow([Conditioned(t, held) if t.context_dim else t for t in flow.transforms], flow.base)


def set_pace(flow: Flow) -> None:
    """Let each network of a flow move its layer by a share of a step of Adam, so that all together move by one step.

    The tables of a bijector's parameters get paces likewise.  This keeps deep or wide flows stable at the usual step
    sizes of plain SVI.  Parts whose recipe gave them a pace keep it.
    """
    tables = [part for part in flow.modules() if isinstance(part, Elementwise) and part.conditioner is None]
    for parts in ([*_networks(flow)], tables):
        free = [part for part in parts if part.pace is None]
        for part in free:
            part.set_pace(1 / len(free))


def _networks(module: nn.Module) -> Iterator[Network]:
    """Yield the networks of a module, without those inside of a conditioner, which share its pace."""
    for part in module.children():
        if isinstance(part, Network):
            yield part
        if not isinstance(part, Conditioner):
            yield from _networks(part)


class Ends(NamedTuple):
    """The layers of an assembled flow after those of the recipe, which together start from z = loc + S C A x."""

    learned: FlowTransform
    correlations: FixedAffine | None
    bend: Elementwise | QuantileMap | None
    fixed: FixedAffine

    @property
    def layers(self) -> list[FlowTransform]:
        """The layers, from the base to the latents."""
        return [layer for layer in self if layer is not None]

    @property
    def scale_tril(self) -> Tensor:
        """The matrix L of the fixed map, z = loc + L x, if nothing bends it, ``(D, D)``."""
        matrix = self.fixed.scale if self.fixed.dense else self.fixed.scale.diag()
        if self.correlations is None:
            return matrix
        inner = self.correlations.scale if self.correlations.dense else self.correlations.scale.diag()
        if self.correlations.rank:
            directions, stretch = self.correlations.directions, self.correlations.stretch
            inner = inner + inner @ (directions * (stretch - 1)) @ directions.T
        return matrix @ inner


def split(flow: Flow) -> tuple[list[FlowTransform], Ends]:
    """Divide an assembled flow into the layers of the recipe and those after them."""
    *layers, learned, fixed = flow.transforms
    if isinstance(learned, Elementwise) and isinstance(learned.bijector, RationalQuadraticSpline):
        *layers, scale, correlations = layers
        return layers, Ends(scale, correlations, learned, fixed)
    if isinstance(learned, QuantileMap):
        *layers, scale = layers
        return layers, Ends(scale, None, learned, fixed)
    return layers, Ends(learned, None, None, fixed)


def rank_for(dim: int) -> int:
    """Return the number of directions that the fixed affine map of more latents than ``DENSE`` stretches."""
    least, most = DIRECTIONS
    return max(least, min(most, STRETCHED // dim))


def start_at(
    flow: Flow,
    loc: Tensor,
    scale: Tensor,
    circular: Sequence[bool],
    directions: Tensor | None = None,
    stretch: Tensor | None = None,
) -> None:
    """Set the fixed affine map of an assembled flow to N(0, I) -> N(loc, L Lᵀ), and reset the learned layers after it.

    ``scale`` is L, or its diagonal; then some directions may be stretched before.  Angles stay the same.

    Raises:
        ValueError: If there are more directions than the map has.
    """
    _, ends = split(flow)
    most, given = 0 if ends.correlations is None else ends.correlations.rank, 0 if stretch is None else len(stretch)
    if given > most:
        raise ValueError(f"AutoFlow.start_at: stretch must have at most {most} numbers for this guide, got {given}.")
    ends.learned.load_state_dict(_learned(circular, 1.0).state_dict())
    if any(circular):
        angles = torch.as_tensor(circular, device=loc.device)
        loc = loc.masked_fill(angles, 0.0)
        if scale.dim() == 1:
            scale = scale.masked_fill(angles, 1.0)
        else:
            rows = scale.masked_fill(angles.unsqueeze(-1), 0.0)
            factor = torch.linalg.qr(torch.cat((rows, angles.to(rows).diag()), -1).T).R.T
            scale = factor * factor.diagonal().sign()
    if isinstance(ends.bend, QuantileMap):
        ends.bend.set(None)
    if ends.correlations is not None and isinstance(ends.bend, Elementwise):
        nn.init.zeros_(ends.bend.params)
        deviation = scale.norm(dim=-1) if scale.dim() == 2 else scale
        if directions is not None and stretch is not None:
            deviation = deviation * (1 + directions.square() @ (stretch.square() - 1)).sqrt()
        unit = scale / (deviation.unsqueeze(-1) if scale.dim() == 2 else deviation)
        ends.correlations.set(torch.zeros_like(loc), unit, directions, stretch)
        scale = deviation
    ends.fixed.set(loc, scale)


@torch.no_grad()
def start_at_draws(flow: Flow, z: Tensor, circular: Sequence[bool] = (), *, is_local: bool = False) -> Tensor:
    """Set the fixed maps of an amortised guide's flow to the marginal distributions of draws ``(N, D)``.

    Args:
        flow: The flow.
        z: The draws.
        circular: For each latent, True if it is an angle; by default none is.
        is_local: True if the flow is of :func:`assemble_local`.

    Returns:
        The scale of each latent, ``(D,)``.
    """
    loc, scale = z.median(0).values, _spread(z)
    *_, bend, fixed = flow.transforms
    if is_local:
        fixed.set(loc, scale)
    else:
        start_at(flow, loc, scale, circular or [False] * len(loc))
    if isinstance(bend, QuantileMap):
        bend.set((z - loc) / scale, torch.as_tensor(circular, device=z.device) if any(circular) else None)
    return scale


def _spread(z: Tensor) -> Tensor:
    """Return the standard deviation of each column, from its quartiles if they differ: heavy tails do not move them."""
    quarter = max(1, len(z) // 4)
    width = z.kthvalue(len(z) - quarter, 0).values - z.kthvalue(quarter, 0).values
    return torch.where(width > 0, width / 1.349, z.std(0))


@torch.no_grad()
def is_untrained(flow: Flow, scale: float, circular: Sequence[bool]) -> bool:
    """True if an assembled flow is as at its start: its learned affine map was not trained, and its layers permute."""
    if isinstance(flow.base, ModesBase) and flow.base.loc.any():
        return False  # the modes were found by training
    layers, ends = split(flow)
    mine = list(ends.learned.parameters())
    starts = [_learned(circular, s) for s in (_reachable(scale), 1.0)]
    if type(ends.learned) is not type(starts[0]):
        return False  # the flow is from a file of another version
    rests = any(all(torch.equal(m, p.to(m)) for m, p in zip(mine, s.parameters(), strict=True)) for s in starts)
    straight = not isinstance(ends.bend, Elementwise) or not ends.bend.params.any()
    return rests and straight and permutes(layers, mine[0].new_zeros(len(circular)))


@torch.no_grad()
def permutes(layers: Sequence[FlowTransform], like: Tensor) -> bool:
    """True if layers, apart from the rotations that they start from, only permute, as they do before training."""
    x = torch.linspace(-1.5, 1.5, 3 * like.numel()).reshape(3, *like.shape).to(like)
    with unrotated(layers):
        y, _ = chained(layers, x, x.new_zeros(max(layer.context_dim for layer in layers)))
    return torch.allclose(x.flatten(1).sort().values, y.flatten(1).sort().values, rtol=0, atol=1e-3)


def _reachable(scale: float) -> float:
    """Return the scale that the learned map starts at; the fixed map has the rest."""
    return min(max(scale, 0.01), 100.0)


def _learned(circular: Sequence[bool], scale: float) -> FlowTransform:
    """Build the learned affine map: a full matrix for few latents, a scale for each of many; angles are left alone."""
    dim, angles = len(circular), any(circular)
    if dim > LEARNED and not angles:
        scaled = Elementwise(SoftplusAffine(), dim)
        scaled.params.data[:, 0] = SoftplusAffine.raw(scale)
        return scaled
    if dim == 1 or angles:
        norm = ActNorm(dim, fixed=circular if angles else None)
        norm.log_scale.data.fill_(math.log(scale))
        return norm
    linear = ScaledLinear(dim, pace=1.0)
    linear.set_scale(scale)
    return linear
