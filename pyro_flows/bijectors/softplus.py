"""Scale and shift: y = x s + t, with s = log(1 + exp(b a)) / b.

Far below 1 the scale grows by a factor in each step of an optimiser, like an exponential, and far above by a summand.
Where a posterior is nearly flat, an exponential runs away within some hundred steps, and near 1 it turns the noise of
its steps into twice as many nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_numbers
from .base import Bijector, split_params


@dataclass(frozen=True)
class SoftplusAffine(Bijector):
    """A scale and a shift that follow the steps of an optimiser at any size::

        y = x s + t,    s = log(1 + exp(b (a + a_1))) / b,    with s = 1 where a = 0

    Its 2 parameters are a and the shift t.

    Args:
        sharpness: The number b.  At 1.25 a scale grows from 0.1 to 1 in as many steps as an exponential.

    Raises:
        ValueError: If ``sharpness`` is not positive and finite.

    Example::

        >>> import torch
        >>> affine = SoftplusAffine()
        >>> raw = torch.tensor([affine.raw(5.0), 0.0])
        >>> y, log_det = affine.forward_and_log_det(torch.tensor(2.0), raw)
        >>> round(y.item(), 4), round(log_det.item(), 4)  # nats: log 5
        (10.0, 1.6094)
        >>> affine.forward_and_log_det(torch.tensor(2.0), raw + 1)[0] > 11.9  # a step adds to the scale
        tensor(True)
    """

    sharpness: float = 1.25

    def __post_init__(self) -> None:
        check_numbers("SoftplusAffine", above=0, sharpness=self.sharpness)

    @property
    def num_params(self) -> int:
        return 2

    def raw(self, scale: float) -> float:
        """Return the parameter a of a scale.

        Raises:
            ValueError: If the scale is not positive and finite.
        """
        check_numbers("SoftplusAffine.raw", above=0, scale=scale)
        return _inverse(self.sharpness * scale) / self.sharpness - self._unit

    @property
    def _unit(self) -> float:
        """The number a_1."""
        return _inverse(self.sharpness) / self.sharpness

    def _scale(self, a: Tensor) -> Tensor:
        return F.softplus(a + self._unit, self.sharpness).clamp(min=torch.finfo(a.dtype).tiny)

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        a, t = split_params(params)
        scale = self._scale(a)
        y = torch.addcmul(t, x, scale)
        return y, scale.log().expand_as(y)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        a, t = split_params(params)
        scale = self._scale(a)
        x = (y - t) / scale
        return x, -scale.log().expand_as(x)


def _inverse(y: float) -> float:
    """Return x with log(1 + exp(x)) = y."""
    return y + math.log(-math.expm1(-y))
