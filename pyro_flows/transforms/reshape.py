"""Events seen in another shape: an inner transform acts on pixels put into channels, patches put in a row, or a vector.

Nothing but places changes, so the log-determinant is that of the inner transform.  Space to depth: Real NVP (Dinh,
Sohl-Dickstein, Bengio 2016, arXiv:1605.08803, section 3.6).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ..arguments import TRANSFORM, as_image, as_shape, check_integers, check_kind
from .base import FlowTransform, Scored


class Rearranged(FlowTransform):
    """An inner transform that sees each event in another arrangement of its numbers.

    Subclasses define :meth:`arrange`, and :meth:`restore` or :meth:`put_back`.
    """

    def __init__(self, inner: FlowTransform, event_shape: Sequence[int]) -> None:
        super().__init__(tuple(event_shape), inner.context_dim)
        self.inner = inner

    @abstractmethod
    def arrange(self, x: Tensor) -> Tensor:
        """Events ``(*batch, *event_shape)`` as the inner transform takes them."""

    def restore(self, x: Tensor) -> Tensor:
        """The way back."""
        raise NotImplementedError

    def put_back(self, inside: Tensor, whole: Tensor) -> Tensor:
        """Return whole events in which the inner transform's part is replaced; by default it is all of them."""
        return self.restore(inside)

    def inner_context(self, context: Tensor | None) -> Tensor | None:
        """Return the context as the inner transform takes it."""
        return context

    def total(self, log_det: Tensor) -> Tensor:
        """Return the log-determinants ``(*batch)`` from those of the inner transform."""
        return log_det

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = self.inner.forward_and_log_det(self.arrange(x), self.inner_context(context))
        return self.put_back(y, x), self.total(log_det)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.inner.inverse_and_log_det(self.arrange(y), self.inner_context(context))
        return self.put_back(x, y), self.total(log_det)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        context = self.inner_context(context)
        y, log_det, inner_score = self.inner.forward_and_score(self.arrange(x), self.arrange(score), context)
        return self.put_back(y, x), self.total(log_det), self.put_back(inner_score, score)

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        self.inner.initialize(self.arrange(y), self.inner_context(context))


class Squeezed(Rearranged):
    """An inner transform of images at a lower resolution: each block of ``factor`` × ``factor`` pixels becomes one.

    Channel c of pixel (i, j) of a block becomes channel ``(c * factor + i) * factor + j``, so that a checkerboard over
    pixels is a choice of channels.  Nothing but places changes, so the log-determinant is the inner transform's.

    Density Estimation Using Real NVP (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803, section 3.6).

    Args:
        inner: A transform of images ``(C * factor², H / factor, W / factor)``.
        factor: The side of a block, at least 2.

    Raises:
        ValueError: If ``factor`` is below 2, or the inner transform's events are no images whose channels can be
            divided so.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import ActNorm, PerPixel
        >>> squeezed = Squeezed(PerPixel(ActNorm(4), (3, 3)))
        >>> squeezed.event_shape, squeezed(torch.zeros(5, 1, 6, 6)).shape
        (torch.Size([1, 6, 6]), torch.Size([5, 1, 6, 6]))
    """

    def __init__(self, inner: FlowTransform, factor: int = 2) -> None:
        check_kind("Squeezed", FlowTransform, TRANSFORM, inner=inner)
        check_integers("Squeezed", 2, factor=factor)
        if len(inner.event_shape) != 3 or inner.event_shape[0] % factor**2:
            raise ValueError(
                f"Squeezed: inner must act on images with a multiple of factor² = {factor**2} channels, got events of "
                f"shape {tuple(inner.event_shape)}."
            )
        channels, height, width = inner.event_shape
        super().__init__(inner, (channels // factor**2, height * factor, width * factor))
        self.factor = factor

    def arrange(self, x: Tensor) -> Tensor:
        return to_blocks(x, self.factor).flatten(-3).movedim(-1, -3)

    def restore(self, x: Tensor) -> Tensor:
        channels, f = self.event_shape[0], self.factor
        return from_blocks(x.movedim(-3, -1).unflatten(-1, (channels, f, f)))


class Patched(Rearranged):
    """An inner transform of the patches of an image, read row by row: a sequence of vectors.

    Nothing but places changes, so the log-determinant is the inner transform's.

    Args:
        inner: A transform of sequences ``(T, D)``: of T = H W / p² patches of D = C p² numbers each.
        image_shape: Channels, height and width of an image.

    Raises:
        ValueError: If no side p of a patch fits both, or ``image_shape`` does not hold three sizes.

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
        check_kind("Patched", FlowTransform, TRANSFORM, inner=inner)
        image_shape = as_image("Patched", "image_shape", image_shape)
        channels, height, width = image_shape
        side = math.isqrt(inner.event_shape[-1] // channels)
        if side == 0 or height % side or width % side:
            raise ValueError(f"Patched: an image of shape {tuple(image_shape)} has no patches of side {side}.")
        if (wanted := (height * width // side**2, channels * side**2)) != tuple(inner.event_shape):
            raise ValueError(
                f"Patched: inner must act on events of shape {wanted}, the patches of side {side} of an image of shape "
                f"{tuple(image_shape)}, got {tuple(inner.event_shape)}."
            )
        super().__init__(inner, image_shape)
        self.image_shape, self.side = tuple(image_shape), side

    def arrange(self, x: Tensor) -> Tensor:
        return to_blocks(x, self.side).flatten(-3).flatten(-3, -2)

    def restore(self, x: Tensor) -> Tensor:
        channels, height, width = self.image_shape
        grid = x.unflatten(-2, (height // self.side, width // self.side))
        return from_blocks(grid.unflatten(-1, (channels, self.side, self.side)))


class Reshaped(Rearranged):
    """An inner transform that takes the numbers of an event, in their order, in another shape.

    Nothing but places changes, so the log-determinant is the inner transform's.

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
        check_kind("Reshaped", FlowTransform, TRANSFORM, inner=inner)
        shape = as_shape("Reshaped", "shape", shape)
        if math.prod(inner.event_shape) != math.prod(shape):
            inside = tuple(inner.event_shape)
            raise ValueError(f"Reshaped: shape must hold as many numbers as inner's {inside}, got {tuple(shape)}.")
        super().__init__(inner, shape)
        self.shape = tuple(shape)

    def arrange(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: x.dim() - len(self.shape)], *self.inner.event_shape)

    def restore(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: x.dim() - len(self.inner.event_shape)], *self.shape)


def to_blocks(x: Tensor, side: int) -> Tensor:
    """Images ``(*batch, C, H, W)`` as blocks of pixels, ``(*batch, H / side, W / side, C, side, side)``, in one copy.

    The numbers of a block lie side by side in memory, where convolutions and maps of channels are fastest.
    """
    x = x.unflatten(-1, (x.shape[-1] // side, side)).unflatten(-3, (x.shape[-2] // side, side))
    return x.movedim((-4, -2, -5, -3, -1), (-5, -4, -3, -2, -1)).contiguous()


def from_blocks(blocks: Tensor) -> Tensor:
    """The way back."""
    x = blocks.movedim((-5, -4, -3, -2, -1), (-4, -2, -5, -3, -1))
    return x.flatten(-2).flatten(-3, -2)
