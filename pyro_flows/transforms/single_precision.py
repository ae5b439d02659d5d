"""The layers of a flow in single precision, for faster steps of training.

Products of matrices take half the time in single precision.  As long as the layers act on numbers of order one, the
rounding of a gradient is far below the noise of its draws.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..bijectors import Affine, SoftplusAffine
from ..conditioners import MLP
from ..vjp import is_plain
from .base import Carried, Compose, FlowTransform, Gradients, carried_along
from .coupling import Coupling
from .elementwise import Elementwise
from .linear import ScaledLinear


class InSingle(Compose):
    """A chain of transforms in double precision that carries draws, scores and gradients along in single precision.

    It holds copies of the transforms, into which each call of :meth:`carry` copies all numbers.  The transforms
    themselves do everything else; they also carry values beyond the range of single precision.

    Args:
        transforms: The transforms.
    """

    def __init__(self, transforms: Sequence[FlowTransform]) -> None:
        super().__init__(transforms)
        self._copies = [copy.deepcopy(transform).float() for transform in transforms]  # in a list, so not registered
        self._own = dict(zip(_numbers(self._copies), _numbers(transforms), strict=True))

    @staticmethod
    def suits(transforms: Sequence[FlowTransform]) -> bool:
        """Return True for plain affine maps and couplings in double precision."""
        double = all(p.dtype == torch.float64 for transform in transforms for p in transform.parameters())
        return bool(transforms) and double and is_plain(transforms) and all(map(_is_affine, transforms))

    def carry(self, x: Tensor, score: Tensor) -> Carried:
        with torch.no_grad():
            torch._foreach_copy_([*self._own], [*self._own.values()])
        y, log_det, of_y, pull = carried_along(self._copies, x.float(), score.float())
        if not math.isfinite(float(y.sum() + of_y.sum())):
            return carried_along(self.transforms, x, score)

        def pulled(g: Tensor) -> tuple[Tensor, Gradients]:
            size = g.abs().max().clamp_min(1.0)  # gradients of models far from the posterior would overflow
            g, gradients = pull((g / size).float())
            return g.double() * size, [(self._own[copied], gradient.double() * size) for copied, gradient in gradients]

        return Carried(y.double(), log_det.double(), of_y.double(), pulled)


def _numbers(transforms: Sequence[FlowTransform]) -> Iterator[Tensor]:
    """Yield all parameters and buffers that are of floating point."""
    for transform in transforms:
        yield from (t for t in (*transform.parameters(), *transform.buffers()) if t.is_floating_point())


def _is_affine(transform: FlowTransform) -> bool:
    if type(transform) is Elementwise:
        return type(transform.bijector) in (Affine, SoftplusAffine) and transform.conditioner is None
    if type(transform) is Coupling:
        return type(transform.bijector) is Affine and type(transform.conditioner) is MLP
    return type(transform) is ScaledLinear
