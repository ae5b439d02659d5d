"""The flow of a guide in named parts, z = F(B(C(A(T(u))))): from a recipe's flow T to the latents.

T are couplings, the layers of the recipe.  A is a learned affine map, F a fixed one.  Beyond 512 latents a fixed map
C of the correlations and a learned spline B of each latent lie between them.  So each latent has a marginal
distribution of any shape, with the correlations of a Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..bijectors import Affine, RationalQuadraticSpline, SoftplusAffine
from ..conditioners import Given
from ..conditioners.pace import set_pace
from ..distributions import CircularBase, ModesBase
from ..flows import Flow
from ..flows.mixture import FlowMixture
from ..transforms import ActNorm, Conditioned, Elementwise, FixedAffine, FlowTransform, QuantileMap, ScaledLinear
from ..transforms.compose import chained
from ..transforms.linear import unrotated
from .default_flows import LIMITS, share_step


class GuideFlow(Flow):
    """A flow in named parts, from the base to the latents.

    Args:
        couplings: The layers of a recipe.
        base: The base.
        fixed: The last map, which is set and not trained.
        learned: The affine map that is trained, or None.
        correlations: A further fixed map, before ``bend``, or None.
        bend: A map of each latent, trained, or set to the quantiles of simulations; or None.
        circular: For each latent, True if it is an angle, which affine maps leave alone; by default none is.
    """

    def __init__(
        self,
        couplings: Iterable[FlowTransform],
        base: nn.Module,
        fixed: FixedAffine,
        *,
        learned: FlowTransform | None = None,
        correlations: FixedAffine | None = None,
        bend: Elementwise | QuantileMap | None = None,
        circular: Sequence[bool] = (),
    ) -> None:
        couplings = list(couplings)
        ends = {"learned": learned, "correlations": correlations, "bend": bend, "fixed": fixed}
        present = {name: layer for name, layer in ends.items() if layer is not None}
        super().__init__([*couplings, *present.values()], base)
        self._places = {name: place for place, name in enumerate(present, len(couplings))}
        self.circular = tuple(circular) or (False,) * len(fixed.loc)

    def _layer(self, name: str) -> Any:
        return self.transforms[self._places[name]] if name in self._places else None

    @property
    def couplings(self) -> list[FlowTransform]:
        """The layers of the recipe."""
        return [*self.transforms[: -len(self._places)]]

    @property
    def learned(self) -> FlowTransform | None:
        """The affine map that is trained."""
        return self._layer("learned")

    @property
    def correlations(self) -> FixedAffine | None:
        """The fixed map before ``bend``."""
        return self._layer("correlations")

    @property
    def bend(self) -> Elementwise | QuantileMap | None:
        """The map of each latent."""
        return self._layer("bend")

    @property
    def fixed(self) -> FixedAffine:
        """The last map."""
        return self._layer("fixed")

    @property
    def ends(self) -> list[FlowTransform]:
        """All layers after the couplings."""
        return [*self.transforms[-len(self._places) :]]

    @property
    def unscaled(self) -> list[FlowTransform]:
        """All layers before the fixed map, whose numbers are of order one."""
        return [*self.transforms[:-1]]

    @property
    def rank(self) -> int:
        """The number of directions that the fixed maps can stretch."""
        return 0 if self.correlations is None else self.correlations.rank

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
        ends = {name: self._layer(name) for name in self._places}
        return GuideFlow(couplings, self.base, **ends, circular=self.circular)

    @torch.no_grad()
    def start_at(
        self, loc: Tensor, scale: Tensor, directions: Tensor | None = None, stretch: Tensor | None = None
    ) -> None:
        """Set the fixed maps to N(0, I) -> N(loc, L Lᵀ), and reset the other maps after the couplings.

        ``scale`` is L, or its diagonal; then some directions may be stretched before.  Angles stay the same.

        Raises:
            ValueError: If there are more directions than the maps have.
        """
        given = 0 if stretch is None else len(stretch)
        if given > self.rank:
            fault = f"stretch must have at most {self.rank} numbers for this guide, got {given}"
            raise ValueError(f"AutoFlow.start_at: {fault}.")
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
        loc, scale = z.median(0).values, _spread(z)
        self.start_at(loc, scale)
        if isinstance(self.bend, QuantileMap):
            angles = torch.as_tensor(self.circular, device=z.device) if any(self.circular) else None
            self.bend.set((z - loc) / scale, angles)
        return scale


def assemble(
    flow: Flow, base: Callable[[int], nn.Module] | None, loc: Tensor, scale: float, circular: Sequence[bool] = ()
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
    ends: dict[str, Any] = {"learned": learned, "correlations": correlations, "bend": bend}
    made = GuideFlow(flow.transforms, made_base, fixed, **ends, circular=circular)
    made.to(device=loc.device, dtype=loc.dtype)
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
    pairs = zip(flow.flows, flow.contexts(context), strict=True)
    return FlowMixture([part if own is None else part.bound(own) for part, own in pairs])


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


def _spread(z: Tensor) -> Tensor:
    """Return the standard deviation of each column, from its quartiles if they differ: heavy tails do not move them."""
    quarter = max(1, len(z) // 4)
    width = z.kthvalue(len(z) - quarter, 0).values - z.kthvalue(quarter, 0).values
    return torch.where(width > 0, width / 1.349, z.std(0))
