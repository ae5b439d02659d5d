"""Default recipes of guides and of likelihoods, and the flow that is built from a recipe of the user.

*Choosing a flow* in the docs says how the defaults were found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .. import flows
from ..bijectors import Affine, RationalQuadraticSpline
from ..conditioners import MLP, Given, StepNet
from ..conditioners.pace import networks_of, set_pace
from ..distributions import ContaminatedNormalBase, StandardNormal
from ..flows import Flow
from ..flows.arguments import checked_sizes
from ..flows.coupling import coupling_layers
from ..transforms import Coupling, Elementwise, FlowTransform, Recurrence, TriangularAffine


@dataclass(frozen=True)
class Limits:
    """The largest numbers of latents up to which a default of guides holds, and sizes that follow from them.

    Attributes:
        few: Eight couplings, trained by SOAP; beyond, sixteen and Muon.
        quick: Couplings that each move by a quarter of a step, beyond ``few``.
        learned: A full matrix in the learned affine map.
        tailed: A base with wide tails.  Beyond, each latent has a spline of its own.
        dense: A full matrix in the map that the guide starts from.  Beyond, it stretches some directions.
        stretched: Numbers in all these directions together, which bound their memory.
        directions: The fewest directions, and the most.
        correlated: Features of a learned likelihood whose correlations depend on its parameters.
        factors: The parents' latents of which each row has coefficients, and needs no network.
        place_pace: The pace of the map from a context to a row's place, which has to keep up with the encoder.  At 1 it
            learns less in the usual number of steps of an autoencoder.  Without an encoder a step of .03 throws the
            rows far away.
    """

    few: int = 32
    quick: int = 64
    learned: int = 64
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


def local_flow(input_dim: int, context_dim: int) -> Flow:
    """Build the default flow of :class:`AutoPlateFlow` for the rows of a plate, l = A_c(T_c(u)).

    The last layer A_c is an affine map that depends on the context c alone, so that each row's place and scale are
    found first.
    """
    if input_dim == 1:
        layers = flows.nsf(1, context_dim, num_transforms=2, activation=nn.ELU).transforms
    else:
        layers = affine_couplings(input_dim, context_dim, num_transforms=4).transforms
    place = MLP(context_dim, input_dim, Affine().num_params, activation=nn.ELU, skip=True)
    set_pace(networks_of(place)[0], LIMITS.place_pace)
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
