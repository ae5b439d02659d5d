"""One transform for every pixel: y[:, i, j] = t(x[:, i, j]), a map of the channels.

Of a linear map this makes the invertible 1 × 1 convolution, of a scale and a shift the activation normalisation of
Glow (Kingma, Dhariwal 2018, arXiv:1807.03039).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..arguments import TRANSFORM, as_shape, check_kind
from .base import FlowTransform
from .reshape import Rearranged


class PerPixel(Rearranged):
    """A transform t of vectors, applied to the channels of each pixel of an image ``(*batch, C, H, W)``::

        y[:, i, j] = t(x[:, i, j] | c)

    Of a linear map it makes the invertible 1 × 1 convolution of Glow (Kingma, Dhariwal 2018, arXiv:1807.03039).

    Args:
        inner: A transform of vectors ``(C,)``; a context of the image is the context of each pixel.
        size: Height and width of the image.

    Raises:
        ValueError: If the inner transform does not act on vectors, or ``size`` does not hold two positive numbers.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import LULinear
        >>> convolution = PerPixel(LULinear(3), (8, 8))
        >>> convolution.inner.set_scale(2.0)
        >>> y, log_det = convolution.forward_and_log_det(torch.ones(5, 3, 8, 8))
        >>> y.shape, round(log_det[0].item(), 2)  # nats: 64 times 3 log 2
        (torch.Size([5, 3, 8, 8]), 133.08)
    """

    def __init__(self, inner: FlowTransform, size: Sequence[int]) -> None:
        check_kind("PerPixel", FlowTransform, TRANSFORM, inner=inner)
        if len(inner.event_shape) != 1:
            raise ValueError(f"PerPixel: inner must act on vectors, got events of shape {tuple(inner.event_shape)}.")
        size = as_shape("PerPixel", "size", size, length=2, words="height and width")
        super().__init__(inner, (*inner.event_shape, *size))
        self.size = tuple(size)

    def arrange(self, x: Tensor) -> Tensor:
        return x.movedim(-3, -1)

    def restore(self, x: Tensor) -> Tensor:
        return x.movedim(-1, -3)

    def inner_context(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else context.unsqueeze(-2).unsqueeze(-2)

    def total(self, log_det: Tensor) -> Tensor:
        return log_det.sum((-2, -1))
