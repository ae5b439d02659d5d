"""What :class:`AutoFlow` builds where nothing else is asked for, and how it puts a guide's flow together.

*Choosing a flow* in the docs tells how the defaults were found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import flows
from ..distributions import CircularBase, ContaminatedNormalBase
from ..flows import Flow
from ..transforms import ActNorm, FixedAffine, FlowTransform, LULinear

FEW = 32  # up to how many latents eight couplings and Adam will do
LEARNED = 64  # up to how many latents the learned affine map has a full matrix
DENSE = 512  # up to how many the one that the guide starts from has


def default_flow(input_dim: int) -> Flow:
    """The flow that :class:`AutoFlow` builds when none is named: 8 affine couplings, 16 beyond 32 latents, over a base
    with tails that are slightly heavier than a normal's, so that weights p / q stay bounded where the posterior's are.

    After Agrawal, Domke 2024, Disentangling impact of capacity, objective, batchsize, estimators, and step-size on
    flow VI, arXiv:2412.08824.
    """
    few = input_dim <= FEW
    couplings = flows.realnvp(input_dim, num_transforms=8 if few else 16, activation=nn.ELU)
    # Among many latents one is always in the wide component, which must then be less wide.
    base = ContaminatedNormalBase(input_dim) if few else ContaminatedNormalBase(input_dim, share=0.05, scale=1.3)
    return Flow(couplings.transforms, base)


def circular_flow(circular: Sequence[bool]) -> Flow:
    """The flow that :class:`AutoFlow` builds when none is named and some latents are angles."""
    return flows.circular_coupling(len(circular), circular=circular, activation=nn.ELU)


def check_recipe(argument: str, recipe: object, example: str) -> None:
    """Refuse what is not a function of the number of latent dimensions."""
    if isinstance(recipe, nn.Module) or not (recipe is None or callable(recipe)):
        raise TypeError(
            f"AutoFlow: {argument} must be a recipe that is called with the number of latent dimensions, such as "
            f"{example}, got {type(recipe).__name__}."
        )


def assemble(
    build: Callable[[int], Flow] | None,
    base: Callable[[int], nn.Module] | None,
    loc: Tensor,
    scale: float,
    circular: Sequence[bool],
) -> Flow:
    """A recipe's flow over a base, then an affine map that is learned and starts at ``scale``, then one that is fixed
    and starts at ``loc``.

    Raises:
        ValueError: If the recipe's result is no flow over so many latents, or has no place for the angles among them.
    """
    dim, angles = len(loc), any(circular)
    flow = build(dim) if build else circular_flow(circular) if angles else default_flow(dim)
    if not isinstance(flow, Flow) or flow.event_shape != (dim,) or flow.context_dim:
        raise ValueError(
            f"AutoFlow: flow({dim}) must return a Flow over events of shape ({dim},) without context, "
            f"got {flow!r:.200}."
        )
    held = flow.base.circular.tolist() if isinstance(flow.base, CircularBase) else [False] * dim
    if angles and (base or held != list(circular)):
        raise ValueError(
            "AutoFlow: some latents are angles, which a base or recipe for real numbers cannot hold; leave both out, "
            f"or use flow=lambda dim: flows.circular_coupling(dim, circular={list(circular)}, ...)."
        )
    fixed = FixedAffine(dim, dense=dim <= DENSE)
    layers: list[FlowTransform] = [*flow.transforms, _learned(circular, _reachable(scale)), fixed]
    made = Flow(layers, base(dim) if base else flow.base).to(device=loc.device, dtype=loc.dtype)
    rest = torch.as_tensor(circular, device=loc.device)
    fixed.set(loc.masked_fill(rest, 0), torch.full_like(loc, scale / _reachable(scale)).masked_fill(rest, 1))
    return made


def start_at(flow: Flow, loc: Tensor, scale_tril: Tensor) -> None:
    """Let the affine maps of an assembled flow take N(0, I) to N(loc, L Lᵀ): the fixed one does, the other rests."""
    learned, fixed = flow.transforms[-2:]
    assert isinstance(fixed, FixedAffine)
    learned.load_state_dict(_learned([False] * len(loc), 1.0).state_dict())
    fixed.set(loc, scale_tril)


@torch.no_grad()
def is_untrained(flow: Flow, scale: float, circular: Sequence[bool]) -> bool:
    """Whether an assembled flow is where it started: the learned affine map there or at rest, the rest permutes."""
    *layers, learned, _ = flow.transforms
    mine = list(learned.parameters())
    starts = [
        [p.to(m) for p, m in zip(_learned(circular, s).parameters(), mine, strict=True)]
        for s in (_reachable(scale), 1.0)
    ]
    if not any(all(map(torch.equal, mine, start)) for start in starts):
        return False
    x = torch.linspace(-1.5, 1.5, 3 * len(circular)).reshape(3, -1).to(mine[0])
    y = x
    for layer in layers:
        y, _ = layer.forward_and_log_det(y)
    return torch.allclose(x.sort(-1).values, y.sort(-1).values, rtol=0, atol=1e-3)


def _reachable(scale: float) -> float:
    """As much of a scale as a learned map may start at."""
    return min(max(scale, 0.01), 100.0)


def _learned(circular: Sequence[bool], scale: float) -> FlowTransform:
    """The affine map that is learned: a full matrix for some latents, a scale each for many; angles rest."""
    dim, angles = len(circular), any(circular)
    if dim == 1 or dim > LEARNED or angles:
        norm = ActNorm(dim, fixed=circular if angles else None)
        norm.log_scale.data.fill_(math.log(scale))
        return norm
    linear = LULinear(dim)
    linear.set_scale(scale)
    return linear
