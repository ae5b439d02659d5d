"""Transforms made of others: chains, and inner ones at a kept context, recomputed, or of rearranged events.

Where only places change, the log-determinant is that of the inner transform.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..arguments import TRANSFORM, as_image, as_shape, check_integers, check_kind, quoted, require
from ..vjp import keeps
from .base import FlowTransform, TwoWay, WithScore, chained


class Compose(TwoWay):
    """A chain of transforms, y = t_n(… t_1(x)), whose log-determinants add up; each network is run once.

    A context reaches the transforms that take one.

    Args:
        transforms: At least one transform; all share one event shape, and those with contexts one ``context_dim``.

    Raises:
        TypeError: If an element is not a transform of this library, such as one of torch's.
        ValueError: If ``transforms`` is empty, or they differ in event shape or in ``context_dim``.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import ActNorm, Permute
        >>> chain = Compose([Permute([1, 0]), ActNorm(2)])
        >>> y, log_det = chain.forward_and_log_det(torch.tensor([[1.0, 2.0]]))
        >>> y.tolist(), log_det.tolist()
        ([[2.0, 1.0]], [0.0])
    """

    transforms: Sequence[FlowTransform]

    def __init__(self, transforms: Iterable[FlowTransform]) -> None:
        transforms, context_dim = checked_chain("Compose", transforms)
        super().__init__(transforms[0].event_shape, context_dim)
        self.domain, self.codomain = transforms[0].domain, transforms[-1].codomain
        self.transforms = nn.ModuleList(transforms)  # type: ignore[assignment]

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return chained(self.transforms, value, context, inverse=inverse)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> WithScore:
        if not keeps(self, Compose, "forward_and_log_det"):
            return super().forward_and_score(x, score, context)
        total = torch.zeros(())
        for transform in self.transforms:
            x, log_det, score = transform.forward_and_score(x, score, context if transform.context_dim else None)
            total = total + log_det
        return x, total, score

    @torch.no_grad()
    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Initialise each transform from what reaches it when the data ``y`` go back to the base."""
        for transform in reversed(self.transforms):
            own = context if transform.context_dim else None
            transform.initialize(y, own)
            y, _ = transform.inverse_and_log_det(y, own)


def checked_chain(owner: str, transforms: Iterable[FlowTransform]) -> tuple[list[FlowTransform], int]:
    """Return transforms that fit together, and the context size that they share, 0 if none takes a context."""
    if not isinstance(transforms, Iterable) or isinstance(transforms, str | bytes):
        raise TypeError(f"{owner}: transforms must be a list of transforms, got {quoted(transforms)}.")
    transforms = list(transforms)
    require(transforms, owner, "transforms", "not be empty", transforms)
    for number, transform in enumerate(transforms):
        check_kind(owner, FlowTransform, "a pyro_flows transform", **{f"transforms[{number}]": transform})
        first, own = tuple(transforms[0].event_shape), tuple(transform.event_shape)
        must = f"act on events of shape {first}, as transforms[0] does"
        require(own == first, owner, f"transforms[{number}]", must, own)
    sizes = sorted({transform.context_dim for transform in transforms} - {0})
    require(len(sizes) <= 1, owner, "transforms", "share one context_dim", sizes)
    return transforms, sizes[0] if sizes else 0


T = TypeVar("T")


class Wrapped(TwoWay):
    """A transform whose results are those of an inner one, perhaps of other arguments.

    Args:
        inner: The inner transform.
        event_shape: The shape of an event, by default that of the inner transform.
    """

    def __init__(self, inner: FlowTransform, event_shape: Sequence[int] | None = None) -> None:
        check_kind(type(self).__name__, FlowTransform, TRANSFORM, inner=inner)
        shape = tuple(event_shape or inner.event_shape)
        super().__init__(shape, inner.context_dim)
        self.inner = inner
        if shape == inner.event_shape:
            self.domain, self.codomain = inner.domain, inner.codomain

    def arrange(self, x: Tensor) -> Tensor:
        """Return events ``(*batch, *event_shape)`` as the inner transform takes them."""
        return x

    def put_back(self, inside: Tensor, whole: Tensor) -> Tensor:
        """Return events with the results of the inner transform in the places of its inputs.

        Args:
            inside: The results, arranged.
            whole: The whole events, of which the inner transform may take a part.
        """
        return inside

    def inner_context(self, context: Tensor | None) -> Tensor | None:
        """Return the context as the inner transform takes it."""
        return context

    def total(self, log_det: Tensor) -> Tensor:
        """Return the log-determinants ``(*batch)`` from those of the inner transform."""
        return log_det

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        image, log_det = self.inner.verb(inverse)(self.arrange(value), self.inner_context(context))
        return self.put_back(image, value), self.total(log_det)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> WithScore:
        context = self.inner_context(context)
        y, log_det, inner_score = self.inner.forward_and_score(self.arrange(x), self.arrange(score), context)
        return self.put_back(y, x), self.total(log_det), self.put_back(inner_score, score)

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        self.inner.initialize(self.arrange(y), self.inner_context(context))


class Conditioned(Wrapped):
    """A transform at one context, to keep: the context is a parameter like any other.

    ``transform.condition(context)`` is the same for one use.

    Args:
        inner: A transform that takes contexts.
        context: One context, ``(context_dim,)``; its values are copied, but a ``torch.nn.Parameter`` is kept itself,
            and may be shared.

    Raises:
        ValueError: If the context is not one vector of the transform's width.

    Example::

        >>> import torch
        >>> from pyro_flows import flows
        >>> layer = flows.nsf(2, context_dim=3).transforms[0]
        >>> held = Conditioned(layer, torch.zeros(3))
        >>> held.context_dim, held(torch.ones(5, 2)).shape, held.context.requires_grad
        (0, torch.Size([5, 2]), True)
    """

    def __init__(self, inner: FlowTransform, context: Tensor | nn.Parameter) -> None:
        check_kind("Conditioned", Tensor, "a tensor", context=context)
        super().__init__(inner)
        self.context_dim = 0
        wanted, got = (inner.context_dim,), tuple(context.shape)
        require(got == wanted, "Conditioned", "context", f"have shape {wanted}", got)
        self.context = context if isinstance(context, nn.Parameter) else nn.Parameter(context.detach().clone())

    def inner_context(self, context: Tensor | None) -> Tensor | None:
        return self.context


class Recomputed(Wrapped):
    """A transform that keeps only its input for the gradient; training takes about a third more time.

    Values, log-determinants and gradients are those of the inner transform, which is run again in the backward pass.

    Training Deep Nets with Sublinear Memory Cost (Chen, Xu, Zhang, Guestrin 2016, arXiv:1604.06174).

    Args:
        inner: The transform, of events of any shape.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import LULinear
        >>> inner, x = LULinear(3), torch.randn(5, 3)
        >>> torch.equal(Recomputed(inner)(x), inner(x))
        True
    """

    def __init__(self, inner: FlowTransform) -> None:
        super().__init__(inner)

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return recomputed(self.inner.verb(inverse), value, context)


def recomputed(function: Callable[..., T], *args: Any) -> T:
    """Call a function and keep only its arguments for the gradient; the backward pass calls it again."""
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return function(*args)
    from torch.utils.checkpoint import checkpoint  # which loads a compiler on torch 2.4

    return checkpoint(function, *args, use_reentrant=False)


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
        fits = len(inner.event_shape) == 3 and inner.event_shape[0] % factor**2 == 0
        must = f"act on images with a multiple of factor² = {factor**2} channels"
        require(fits, "Squeezed", "inner", must, tuple(inner.event_shape))
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
        whole = not height % side and not width % side
        fits = whole and inner.event_shape == (height * width // side**2, channels * side**2)
        must = f"act on patches, (H W / p², C p²), of images of shape {image_shape}"
        require(fits, "Patched", "inner", must, tuple(inner.event_shape))
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
        must = f"hold as many numbers as inner's {tuple(inner.event_shape)}"
        require(inner.event_shape.numel() == shape.numel(), "Reshaped", "shape", must, tuple(shape))
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
        require(len(inner.event_shape) == 1, "PerPixel", "inner", "act on vectors", tuple(inner.event_shape))
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
        require(total > first, "Split", "input_dim", f"exceed the {first} that inner acts on", total)
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
