"""Affine maps: a shift, and a scale with a shift under two parametrisations of the scale."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import check_numbers
from .base import Bijector

SHARPNESS = 1.25  # b of SoftplusAffine: a scale grows from 0.1 to 1 in as many steps as an exponential
OFFSET = math.log(math.expm1(SHARPNESS))  # c of SoftplusAffine: the scale is 1 where a = 0


@dataclass(frozen=True)
class Shift(Bijector):
    """The map of NICE, a translation y = x + t with one parameter t and log-determinant zero.

    NICE: Non-linear Independent Components Estimation (Dinh, Krueger, Bengio 2014, arXiv:1410.8516).

    Example::

        >>> import torch
        >>> y, log_det = Shift().forward_and_log_det(torch.tensor(1.0), torch.tensor([0.5]))
        >>> y.item(), log_det.item()
        (1.5, 0.0)
    """

    num_params = 1

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y = x + params[..., 0]
        return y, torch.zeros_like(y)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x = y - params[..., 0]
        return x, torch.zeros_like(x)


class ScaleAndShift(Bijector):
    """A scale and a shift, y = x exp(s(a)) + t, with parameters a and t."""

    num_params = 2

    @abstractmethod
    def log_scale(self, a: Tensor, sign: int) -> Tensor:
        """Return s for the sign 1, and -s for the sign -1."""

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        a, t = _split(params)
        s = self.log_scale(a, 1)
        y = torch.addcmul(t, x, s.exp())
        return y, s.expand_as(y)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        a, t = _split(params)
        s = self.log_scale(a, -1)
        x = (y - t) * s.exp()
        return x, s.expand_as(x)


@dataclass(frozen=True)
class Affine(ScaleAndShift):
    """The map of RealNVP, MAF and IAF, a scale and a shift::

        y = x exp(s) + t,    s = b tanh(c a / b)

    Its 2 parameters are a and the shift t.  The smooth bound b keeps a layer from exploding in one step of an
    optimiser.  Near a = 0 the log-scale s is c a under any bound.  With a slope c above the default, deep flows that
    are fitted by their own draws may explode.  Densities of given data are learned best at c = 1: see *Learning in a
    plain loop* in the docs.

    Density Estimation Using Real NVP (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803); Masked Autoregressive Flow
    for Density Estimation (Papamakarios, Pavlakou, Murray 2017, arXiv:1705.07057).

    Args:
        max_log_scale: The bound b on the log-scale, in nats: one layer scales by at most exp(b).
        slope: The slope c of the log-scale at a = 0.

    Raises:
        ValueError: If ``max_log_scale`` or ``slope`` is not positive and finite.

    Example::

        >>> import torch
        >>> affine = Affine()
        >>> affine.forward_and_log_det(torch.tensor(2.0), torch.zeros(2))  # zero parameters are the identity
        (tensor(2.), tensor(0.))
        >>> y, log_det = affine.forward_and_log_det(torch.tensor(2.0), torch.tensor([1e9, 0.0]))
        >>> log_det.item()  # nats: the bound
        3.0
    """

    max_log_scale: float = 3.0
    slope: float = 0.25

    def __post_init__(self) -> None:
        check_numbers("Affine", above=0, max_log_scale=self.max_log_scale, slope=self.slope)

    def log_scale(self, a: Tensor, sign: int) -> Tensor:
        # A sigmoid is faster than a tanh: ±b tanh(c a / b) = ±(2 b sigmoid(a / (b / 2c)) - b).
        b = self.max_log_scale
        return torch.rsub(torch.sigmoid(a / (b / (2 * self.slope))), -sign * b, alpha=-2 * sign * b)


@dataclass(frozen=True)
class SoftplusAffine(ScaleAndShift):
    """A scale and a shift that may have to move far from their start::

        y = x s + t,    s = log(1 + exp(b a + c)) / b,    with b = 1.25, and s = 1 where a = 0

    Its 2 parameters are a and the shift t.  Far below 1 the scale s is an exponential of a: each step of an optimiser
    multiplies it.  Far above 1 it is linear in a: each step adds to it.  An exponential scale would diverge within
    some hundred steps where a posterior is nearly flat.  The scale has no bound, so autoregressive layers, where
    scales compound, should use :class:`Affine`.

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

    def log_scale(self, a: Tensor, sign: int) -> Tensor:
        z = (SHARPNESS * a + OFFSET).clamp(min=-60)  # exp(60) leaves room for squares in single precision
        bent = z.clamp(min=-20)  # below, log(1 + exp(z)) is exp(z) to nine digits, but quotients in gradients overflow
        s = (F.softplus(bent) / SHARPNESS).log() + (z - bent)
        return s if sign == 1 else -s


def _split(params: Tensor) -> tuple[Tensor, ...]:
    """Return the P parameters, ``(*s)`` each.  Their gradients are then assembled in the order of conditioners."""
    return params.mT.unbind(-2) if params.dim() > 1 else params.unbind(-1)
