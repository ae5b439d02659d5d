"""Multiscale: an inner transform acts on some channels, the others are factored out, (y_A, y_B) = (t(x_A), x_B).

From the data's side, the channels B leave the flow early and meet the base as they are; a coupling put behind makes
their law depend on A.  Real NVP (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803, section 3.6); Glow (Kingma,
Dhariwal 2018, arXiv:1807.03039).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import TRANSFORM, check_integers, check_kind
from .base import FlowTransform
from .reshape import Rearranged


class Split(Rearranged):
    """A transform t of the first channels of an image, or of the first features of a vector; the others stay::

        (y_A, y_B) = (t(x_A | c), x_B)

    It makes flows of images multiscale: from the data's side, the channels B leave the flow early.

    Density Estimation Using Real NVP (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803, section 3.6).

    Args:
        inner: The transform of the first ones.
        input_dim: The number of all channels or features; by default twice as many as ``inner`` acts on.

    Raises:
        ValueError: If nothing is left to stay.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import LULinear, PerPixel
        >>> split = Split(PerPixel(LULinear(2), (4, 4)))
        >>> split.event_shape, split(torch.zeros(5, 4, 4, 4)).shape
        (torch.Size([4, 4, 4]), torch.Size([5, 4, 4, 4]))
        >>> linear = LULinear(1)
        >>> linear.set_scale(2.0)
        >>> Split(linear)(torch.ones(2)).round(decimals=4).tolist()
        [2.0, 1.0]
    """

    def __init__(self, inner: FlowTransform, input_dim: int | None = None) -> None:
        check_kind("Split", FlowTransform, TRANSFORM, inner=inner)
        check_integers("Split", optional=True, input_dim=input_dim)
        first, *size = inner.event_shape
        total = 2 * first if input_dim is None else input_dim
        if total <= first:
            raise ValueError(f"Split: input_dim must exceed the {first} that inner acts on, got {total}.")
        super().__init__(inner, (total, *size))
        self.input_dim = total
        self.sizes = [first, total - first]

    def arrange(self, x: Tensor) -> Tensor:
        return x.split(self.sizes, -len(self.event_shape))[0]

    def put_back(self, inside: Tensor, whole: Tensor) -> Tensor:
        number = len(self.event_shape)
        rest = whole.split(self.sizes, -number)[1]
        rest = rest.expand(*inside.shape[:-number], *rest.shape[-number:])
        return torch.cat((inside, rest), -number)
