"""What :class:`AutoFlow` builds where nothing else is asked for, and how it puts a guide's flow together.

*Choosing a flow* in the docs tells how the defaults were found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import flows
from ..distributions import CircularBase
from ..flows import Flow
from ..transforms import ActNorm, FixedAffine, FlowTransform, LULinear

LEARNED = 64  # up to how many latents the learned affine map has a full matrix
DENSE = 512  # up to how many the one that the guide starts from has


def default_flow(input_dim: int) -> Flow:
    """The flow that :class:`AutoFlow` builds when none is named: eight affine couplings.

    After Agrawal, Domke 2024, Disentangling impact of capacity, objective, batchsize, estimators, and step-size on
    flow VI, arXiv:2412.08824.
    """
    return flows.realnvp(input_dim, activation=nn.ELU)


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
    """A recipe's flow over a base, followed by an affine map that starts at ``loc`` and ``scale`` exactly.

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
    learned = LULinear(dim) if 1 < dim <= LEARNED and not angles else ActNorm(dim, fixed=circular if angles else None)
    placed = FixedAffine(dim, dense=dim <= DENSE)
    layers: list[FlowTransform] = [*flow.transforms, learned, placed]
    made = Flow(layers, base(dim) if base else flow.base).to(device=loc.device, dtype=loc.dtype)
    stays = torch.as_tensor(circular, device=loc.device)  # angles
    placed.set(loc.masked_fill(stays, 0), torch.full_like(loc, scale).masked_fill(stays, 1))
    return made


def place(flow: Flow) -> FixedAffine:
    """The last, affine map of an assembled flow."""
    last = flow.transforms[-1]
    assert isinstance(last, FixedAffine)
    return last


def is_untrained(flow: Flow) -> bool:
    """Whether the learned affine map of an assembled flow is still the identity."""
    return not any(parameter.any() for parameter in flow.transforms[-2].parameters())
