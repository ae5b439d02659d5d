"""The default flows of :class:`AutoFlow`, and the affine maps between a recipe's flow and the latents.

*Choosing a flow* in the docs tells how the defaults were found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .. import flows
from ..bijectors import SoftplusAffine
from ..conditioners import Conditioner
from ..conditioners.base import Network
from ..distributions import CircularBase, ContaminatedNormalBase, ModesBase, StandardNormal
from ..flows import Flow
from ..transforms import ActNorm, Elementwise, FixedAffine, FlowTransform, ScaledLinear
from ..transforms.linear import unrotated
from .couplings import affine_couplings

FEW = 32  # up to how many latents eight couplings and Adam will do
QUICK = 64  # up to how many latents, and beyond FEW, each coupling moves by a quarter of a step
LEARNED = 64  # up to how many latents the learned affine map has a full matrix
DENSE = 512  # up to how many the one that the guide starts from has
TAILED = 512  # up to how many the base has wide tails

Recipe = Callable[..., Flow]


def default_flow(input_dim: int) -> Flow:
    """The flow that :class:`~pyro_flows.AutoFlow` builds when none is named: 8 affine couplings, 16 beyond 32 latents,
    over a base with tails that are slightly heavier than a normal's, so that weights p / q stay bounded where the
    posterior's are.  Beyond 512 latents the base is normal: each draw would have some latents far out, whose gradients
    are noise to all others.  For 33 to 64 latents each coupling has a pace of 1/4; other paces are left to the guide.

    After Agrawal, Domke 2024, Disentangling impact of capacity, objective, batchsize, estimators, and step-size on
    flow VI, arXiv:2412.08824.

    Args:
        input_dim: The number D of latent dimensions.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, its base at the start.

    Raises:
        ValueError: If ``input_dim`` is no positive integer.

    Example::

        >>> [len(default_flow(dim).transforms) for dim in (32, 33)]
        [8, 16]
    """
    couplings = affine_couplings(input_dim, num_transforms=8 if input_dim <= FEW else 16)
    if FEW < input_dim <= QUICK:
        # If 16 shared a step they would bend slowly.  With fewer latents, networks of this pace bend on a long way to
        # the posterior; with more, draws can leave the range of float32.
        for network in _networks(couplings):
            network.set_pace(0.25)
    return Flow(couplings.transforms, _default_base(input_dim))


def _default_base(input_dim: int) -> nn.Module:
    if input_dim > TAILED:
        return StandardNormal(input_dim)
    if input_dim <= FEW:
        return ContaminatedNormalBase(input_dim)
    # Among many latents one is always in the wide component, which must then be less wide.
    return ContaminatedNormalBase(input_dim, share=0.05, scale=1.3)


def check_recipes(owner: str, **recipes: object) -> None:
    """Raise a TypeError unless each argument is None or a function of the number of latent dimensions."""
    for argument, recipe in recipes.items():
        if isinstance(recipe, nn.Module) or not (recipe is None or callable(recipe)):
            example = "distributions.StudentTBase" if argument == "base" else "flows.nsf"
            words = f"a recipe that is called with the number of latent dimensions, such as {example}"
            raise TypeError(f"{owner}: {argument} must be {words}, got {type(recipe).__name__}.")


def built(owner: str, name: str, build: Recipe | None, default: Recipe, input_dim: int, context_dim: int = 0) -> Flow:
    """Build the flow from the recipe that a guide is given under a name, or from the default recipe.

    Raises:
        ValueError: If it is no flow over so many latents with such a context.
    """
    sizes = (input_dim, context_dim) if context_dim else (input_dim,)
    call = f"{name}({', '.join(map(str, sizes))})"
    try:
        flow = (build or default)(*sizes)
    except TypeError as error:
        raise TypeError(f"{owner}: {call} fails: {error}.") from error
    if not isinstance(flow, Flow) or flow.event_shape != (input_dim,) or flow.context_dim != context_dim:
        context = f"contexts of width {context_dim}" if context_dim else "no context"
        wanted = f"a Flow over events of shape ({input_dim},) with {context}"
        raise ValueError(f"{owner}: {call} must return {wanted}, got {flow!r:.200}.")
    if flow.encoder is not None:
        raise ValueError(f"{owner}: {call} must return a Flow without an encoder; give it to the guide, encoder=....")
    return flow


def default_for(circular: Sequence[bool], context_dim: int) -> Recipe:
    """Return the recipe of :class:`AutoFlow` where none is named.

    With an encoder it is that of autoregressive splines, which score simulations in one pass and overfit less than
    couplings do.
    """
    if any(circular):
        return partial(flows.circular_coupling, circular=circular, activation=nn.ELU)
    return partial(flows.nsf_ar, activation=nn.SiLU) if context_dim else default_flow


def assemble(
    flow: Flow, base: Callable[[int], nn.Module] | None, loc: Tensor, scale: float, circular: Sequence[bool] = ()
) -> Flow:
    """A recipe's flow over a base, then an affine map that is learned and starts at ``scale``, then one that is fixed
    and starts at ``loc``.

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
    if not flow.context_dim:  # amortised guides are trained by other means, on simulations
        set_pace(flow)
    fixed = FixedAffine(dim, dense=dim <= DENSE)
    layers: list[FlowTransform] = [*flow.transforms, _learned(circular, _reachable(scale)), fixed]
    made = Flow(layers, made_base).to(device=loc.device, dtype=loc.dtype)
    rest = torch.as_tensor(circular, device=loc.device)
    fixed.set(loc.masked_fill(rest, 0), torch.full_like(loc, scale / _reachable(scale)).masked_fill(rest, 1))
    return made


def set_pace(flow: Flow) -> None:
    """Let each network of a flow move its layer by a share of a step of Adam.

    All layers together then move by one step.  So do the tables of a bijector's parameters.  A deep or wide flow bears
    the steps that people take in plain SVI.  Parts whose recipe gave them a pace keep it.
    """
    tables = [part for part in flow.modules() if isinstance(part, Elementwise) and part.conditioner is None]
    for parts in ([*_networks(flow)], tables):
        free = [part for part in parts if part.pace is None]
        for part in free:
            part.set_pace(1 / len(free))


def _networks(module: nn.Module) -> Iterator[Network]:
    """Yield the networks of a module, but not those inside of a conditioner, which share its pace."""
    for part in module.children():
        if isinstance(part, Network):
            yield part
        if not isinstance(part, Conditioner):
            yield from _networks(part)


def start_at(flow: Flow, loc: Tensor, scale_tril: Tensor, circular: Sequence[bool]) -> None:
    """Let the affine maps of an assembled flow take N(0, I) to N(loc, L Lᵀ): the fixed one does, the other rests.

    Angles stay as they are.
    """
    learned, fixed = flow.transforms[-2:]
    assert isinstance(fixed, FixedAffine)
    learned.load_state_dict(_learned(circular, 1.0).state_dict())
    if any(circular):
        angles = torch.as_tensor(circular, device=loc.device)
        rows = scale_tril.masked_fill(angles.unsqueeze(-1), 0.0)
        factor = torch.linalg.qr(torch.cat((rows, angles.to(rows).diag()), -1).T).R.T
        loc, scale_tril = loc.masked_fill(angles, 0.0), factor * factor.diagonal().sign()
    fixed.set(loc, scale_tril)


@torch.no_grad()
def is_untrained(flow: Flow, scale: float, circular: Sequence[bool]) -> bool:
    """Whether an assembled flow is where it started: the learned affine map there or at rest, the rest permutes."""
    if isinstance(flow.base, ModesBase) and flow.base.loc.any():
        return False  # its modes are what was learned
    *layers, learned, _ = flow.transforms
    mine = list(learned.parameters())
    starts = [_learned(circular, s) for s in (_reachable(scale), 1.0)]
    if type(learned) is not type(starts[0]):
        return False  # a file of another version
    rests = any(all(torch.equal(m, p.to(m)) for m, p in zip(mine, s.parameters(), strict=True)) for s in starts)
    return rests and permutes(layers, mine[0].new_zeros(len(circular)))


@torch.no_grad()
def permutes(layers: Sequence[FlowTransform], like: Tensor) -> bool:
    """Whether layers do nothing but permute, beyond the rotations that they start from, as before they are trained."""
    x = torch.linspace(-1.5, 1.5, 3 * like.numel()).reshape(3, *like.shape).to(like)
    y = x
    with unrotated(layers):
        for layer in layers:
            y, _ = layer.forward_and_log_det(y, x.new_zeros(layer.context_dim) if layer.context_dim else None)
    return torch.allclose(x.flatten(1).sort().values, y.flatten(1).sort().values, rtol=0, atol=1e-3)


def _reachable(scale: float) -> float:
    """As much of a scale as a learned map may start at."""
    return min(max(scale, 0.01), 100.0)


def _learned(circular: Sequence[bool], scale: float) -> FlowTransform:
    """The affine map that is learned: a full matrix for some latents, a scale each for many; angles rest."""
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
