"""Scale and shift: y = x s + t, with s = log(1 + exp(b a)) / b.

Below 1 the scale grows by a factor in each step of an optimiser, as an exponential does, and above 1 by a summand.
Where a posterior is nearly flat, an exponential runs away within some hundred steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..arguments import check_numbers
from .affine import ScaleAndShift

SHARPNESS = 1.25  # b: a scale grows from 0.1 to 1 in as many steps as an exponential
OFFSET = math.log(math.expm1(SHARPNESS))  # c: the scale is 1 where a = 0


@dataclass(frozen=True)
class SoftplusAffine(ScaleAndShift):
    """A scale and a shift, for places and scales that are learned over a long way::

        y = x s + t,    s = log(1 + exp(b a + c)) / b,    with b = 1.25, and s = 1 where a = 0

    Its 2 parameters are a and the shift t.  Far below 1, s is an exponential of a, and far above a straight line.
    Scales have no bound, so autoregressive layers had better take :class:`Affine`: there, scales compound.

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

    @staticmethod
    def raw(scale: float) -> float:
        """Return the parameter a of a scale.

        Raises:
            ValueError: If the scale is not positive and finite.
        """
        check_numbers("SoftplusAffine.raw", above=0, scale=scale)
        size = SHARPNESS * scale
        return (size + math.log(-math.expm1(-size)) - OFFSET) / SHARPNESS

    def _log_scale(self, a: Tensor, sign: int) -> Tensor:
        z = (SHARPNESS * a + OFFSET).clamp(min=-60)  # exp(60) leaves room for squares in single precision
        bent = z.clamp(min=-20)  # below, log(1 + exp(z)) is exp(z) to nine digits, but quotients in gradients overflow
        s = (F.softplus(bent) / SHARPNESS).log() + (z - bent)
        return s if sign == 1 else -s
