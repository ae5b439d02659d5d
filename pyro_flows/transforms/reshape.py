"""Events that an inner transform sees rearranged: as channels of larger pixels, patches in a row, pixels, or a part.

Only places change, so the log-determinant is that of the inner transform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import as_image, as_shape, check_integers
from .base import FlowTransform
from .wrapped import Wrapped


class Squeezed(Wrapped):
    """An inner transform of images at a lower resolution: each block of ``factor`` × ``factor`` pixels becomes one.

    Channel c of pixel (i, j) of a block becomes channel ``(c * factor + i) * factor + j``, so that a checkerboard over
    pixels is a choice of channels.

    Density Estimation Using Real NVP (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803, section 3.6).

    Args:
        inner: A transform of images ``(C * factor², H / factor, W / factor)``.
        factor: The side of a block, at least 2.

    Raises:
        ValueError: If ``factor`` is below 2, or the inner transform does not act on images whose number of channels
            is a multiple of factor².

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import ActNorm, PerPixel
        >>> squeezed = Squeezed(PerPixel(ActNorm(4), (3, 3)))
        >>> squeezed.event_shape, squeezed(torch.zeros(5, 1, 6, 6)).shape
        (torch.Size([1, 6, 6]), torch.Size([5, 1, 6, 6]))
    """

    def __init__(self, inner: FlowTransform, factor: int = 2) -> None:
        check_integers("Squeezed", 2, factor=factor)
        if len(inner.event_shape) != 3 or inner.event_shape[0] % factor**2:
            fault = f"inner must act on images with a multiple of factor² = {factor**2} channels"
            raise ValueError(f"Squeezed: {fault}, got events of shape {tuple(inner.event_shape)}.")
        channels, height, width = inner.event_shape
        super().__init__(inner, (channels // factor**2, height * factor, width * factor))
        self.factor = factor

    def arrange(self, x: Tensor) -> Tensor:
        # Convolutions and maps of channels are fastest if the channels of a pixel are contiguous in memory.
        return to_blocks(x, self.factor).flatten(-3).movedim(-1, -3)

    def put_back(self, inside: Tensor, whole: Tensor) -> Tensor:
        blocks = self.event_shape[0], self.factor, self.factor
        return from_blocks(inside.movedim(-3, -1).unflatten(-1, blocks))


class Patched(Wrapped):
    """An inner transform of the patches of an image, read row by row: a sequence of vectors.

    Args:
        inner: A transform of sequences ``(T, D)``: of T = H W / p² patches of D = C p² numbers each.
        image_shape: Channels, height and width of an image.

    Raises:
        ValueError: If the inner transform does not act on patches of such images, or ``image_shape`` does not hold
            three sizes.

    Example::

        >>> import torch
        >>> from pyro_flows.bijectors import Affine
        >>> from pyro_flows.conditioners import CausalTransformer
        >>> from pyro_flows.transforms import Autoregressive
        >>> layer = Autoregressive(Affine(), CausalTransformer(length=4, token_dim=16, num_params=2))
        >>> Patched(layer, (1, 8, 8))(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(self, inner: FlowTransform, image_shape: Sequence[int]) -> None:
        image_shape = channels, height, width = as_image("Patched", "image_shape", image_shape)
        side = math.isqrt(inner.event_shape[-1] // channels) or 1
        if height % side or width % side or inner.event_shape != (height * width // side**2, channels * side**2):
            fault = f"inner must act on patches, (H W / p², C p²), of images of shape {image_shape}"
            raise ValueError(f"Patched: {fault}, got events of shape {tuple(inner.event_shape)}.")
        super().__init__(inner, image_shape)
        self.image_shape, self.side = image_shape, side

    def arrange(self, x: Tensor) -> Tensor:
        return to_blocks(x, self.side).flatten(-3).flatten(-3, -2)

    def put_back(self, inside: Tensor, whole: Tensor) -> Tensor:
        channels, height, width = self.image_shape
        grid = inside.unflatten(-2, (height // self.side, width // self.side))
        return from_blocks(grid.unflatten(-1, (channels, self.side, self.side)))


def to_blocks(x: Tensor, side: int) -> Tensor:
    """Return images ``(*batch, C, H, W)`` as blocks of pixels, ``(*batch, H / side, W / side, C, side, side)``.

    The numbers of a block are contiguous in memory, where convolutions and maps of channels are fastest.  Unlike
    torch's ``pixel_unshuffle`` it works for empty batches.
    """
    x = x.unflatten(-1, (x.shape[-1] // side, side)).unflatten(-3, (x.shape[-2] // side, side))
    return x.movedim((-4, -2, -5, -3, -1), (-5, -4, -3, -2, -1)).contiguous()


def from_blocks(blocks: Tensor) -> Tensor:
    """Return the images of blocks from ``to_blocks``."""
    x = blocks.movedim((-5, -4, -3, -2, -1), (-4, -2, -5, -3, -1))
    return x.flatten(-2).flatten(-3, -2)


class Reshaped(Wrapped):
    """An inner transform that takes the numbers of an event, in their order, in another shape.

    Args:
        inner: A transform, as of vectors.
        shape: The shape of an event, of as many numbers.

    Raises:
        ValueError: If the sizes do not fit.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import LULinear
        >>> Reshaped(LULinear(18), (2, 3, 3))(torch.zeros(5, 2, 3, 3)).shape
        torch.Size([5, 2, 3, 3])
    """

    def __init__(self, inner: FlowTransform, shape: Sequence[int]) -> None:
        shape = as_shape("Reshaped", "shape", shape)
        if math.prod(inner.event_shape) != math.prod(shape):
            inside = tuple(inner.event_shape)
            raise ValueError(f"Reshaped: shape must hold as many numbers as inner's {inside}, got {tuple(shape)}.")
        super().__init__(inner, shape)
        self.shape = tuple(shape)

    def arrange(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: x.dim() - len(self.shape)], *self.inner.event_shape)

    def put_back(self, inside: Tensor, whole: Tensor) -> Tensor:
        return inside.reshape(*inside.shape[: inside.dim() - len(self.inner.event_shape)], *self.shape)


class PerPixel(Wrapped):
    """A transform t of vectors, applied to the channels of each pixel of an image ``(*batch, C, H, W)``::

        y[:, i, j] = t(x[:, i, j] | c)

    With a linear map it is the invertible 1 × 1 convolution of Glow (Kingma, Dhariwal 2018, arXiv:1807.03039).

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
        if len(inner.event_shape) != 1:
            raise ValueError(f"PerPixel: inner must act on vectors, got events of shape {tuple(inner.event_shape)}.")
        size = as_shape("PerPixel", "size", size, length=2, words="height and width")
        super().__init__(inner, (*inner.event_shape, *size))
        self.size = tuple(size)

    def arrange(self, x: Tensor) -> Tensor:
        return x.movedim(-3, -1)

    def put_back(self, inside: Tensor, whole: Tensor) -> Tensor:
        return inside.movedim(-1, -3)

    def inner_context(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else context.unsqueeze(-2).unsqueeze(-2)

    def total(self, log_det: Tensor) -> Tensor:
        return log_det.sum((-2, -1))


class Split(Wrapped):
    """A transform t of the first channels of an image, or of the first features of a vector; the others stay::

        (y_A, y_B) = (t(x_A | c), x_B)

    It makes flows of images multiscale: from data to base, the channels B leave the flow early.  A coupling behind it
    makes their distribution depend on A.  Real NVP, section 3.6, and Glow.

    Args:
        inner: The transform of the first channels or features.
        input_dim: The number of all channels or features; by default twice as many as ``inner`` acts on.

    Raises:
        ValueError: If no channel or feature is left over.

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
