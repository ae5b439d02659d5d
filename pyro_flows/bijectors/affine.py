"""Scale and shift: y = x exp(s) + t, with s = b tanh(c a / b).

The log-scale is bounded smoothly, so that no step of an optimiser can make a layer explode; near zero it is c a under
any bound.  By default c is a quarter, since steeper ones let deep flows explode that are fitted by their own draws.
Densities of given data are learned best at c = 1: see *Learning in a plain loop* in the docs.
Density estimation using Real NVP (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803);
Masked Autoregressive Flow (Papamakarios, Pavlakou, Murray 2017, arXiv:1705.07057).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_numbers
from ..vjp import keeps
from .base import Bijector, Pulled, split_params


class ScaleAndShift(Bijector):
    """A scale and a shift, y = x exp(s) + t, with the parameters a of the log-scale s and t."""

    num_params = 2

    @abstractmethod
    def _log_scale(self, a: Tensor, sign: int) -> Tensor:
        """Return s, or -s where the sign is -1."""

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        a, t = split_params(params)
        s = self._log_scale(a, 1)
        y = torch.addcmul(t, x, s.exp())
        return y, s.expand_as(y)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        a, t = split_params(params)
        s = self._log_scale(a, -1)
        x = (y - t) * s.exp()
        return x, s.expand_as(x)


@dataclass(frozen=True)
class Affine(ScaleAndShift):
    """The map of RealNVP, MAF and IAF, a scale and a shift::

        y = x exp(s) + t,    s = b tanh(c a / b)

    Its 2 parameters are a, of the bounded log-scale s, and the shift t.

    Density Estimation Using Real NVP (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803); Masked Autoregressive Flow
    for Density Estimation (Papamakarios, Pavlakou, Murray 2017, arXiv:1705.07057).

    Args:
        max_log_scale: The bound b on the log-scale, in nats: one layer scales by at most exp(b).
        slope: The slope c of the log-scale where it is zero.

    Raises:
        ValueError: If ``max_log_scale`` or ``slope`` is not positive and finite.

    Example::

        >>> import torch
        >>> affine = Affine()
        >>> affine.forward_and_log_det(torch.tensor(2.0), torch.zeros(2))  # zero parameters are the identity
        (tensor(2.), tensor(0.))
        >>> y, log_det = affine.forward_and_log_det(torch.tensor(2.0), torch.tensor([1e9, 0.0]))
        >>> log_det.item()  # nats: no step of an optimiser leads further
        3.0
    """

    max_log_scale: float = 3.0
    slope: float = 0.25

    def __post_init__(self) -> None:
        check_numbers("Affine", above=0, max_log_scale=self.max_log_scale, slope=self.slope)

    def _log_scale(self, a: Tensor, sign: int) -> Tensor:
        """Return ±b tanh(c a / b) as ±(2 b sigmoid(a / (b / 2c)) - b): a sigmoid is faster than a tangent."""
        b = self.max_log_scale
        return torch.rsub(torch.sigmoid(a / (b / (2 * self.slope))), -sign * b, alpha=-2 * sign * b)

    def forward_and_pull(self, x: Tensor, params: Tensor) -> Pulled:
        if not keeps(self, Affine, "forward_and_log_det", "_log_scale"):
            return super().forward_and_pull(x, params)
        a, t = split_params(params)
        s = self._log_scale(a, 1)
        scale = s.exp()
        stretched = x * scale
        slope = self.slope - (self.slope / self.max_log_scale**2) * s * s  # of s in a

        def pull(of_y: Tensor, of_log_det: Tensor | None) -> tuple[Tensor, Tensor]:
            of_s = of_y * stretched if of_log_det is None else torch.addcmul(of_log_det, of_y, stretched)
            return of_y * scale, torch.stack((of_s * slope, of_y), -2).mT

        return Pulled(stretched + t, s, None, pull)
