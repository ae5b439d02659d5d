"""Recipes of image flows: couplings at several scales, and TarFlow, an autoregressive flow over patches.

Flows by couplings halve height and width at each scale, apply some steps and pass half of the channels to the base.
Their densities and samples cost about the same.  Each number of their base has a trainable mean and scale, since
convolutions do not see where in an image they are.  Images are ``(C, H, W)`` with real values;
:class:`~pyro_flows.flows.Dequantized` turns each flow into a distribution over images of integers.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ..arguments import IMAGE, as_image, check_flags, check_integers, is_integer, suggests_keywords
from ..bijectors import Affine, Bijector, LogisticMixture
from ..conditioners import CausalTransformer, ConvNet
from ..distributions import NormalBase
from ..encoders import ClassEmbedding, Flatten
from ..transforms import ActNorm, Autoregressive, Coupling, FlowTransform, LULinear
from ..transforms.wrapped import Compose, Patched, PerPixel, Recomputed, Split, Squeezed
from .flow import Flow

CLASS_DIM = 32  # the width of the embedding of a class
MIN_PATCHES = 4  # patches: with a single one a layer would be an affine map of each number alone
Shape = tuple[int, int, int]
Layers = list[FlowTransform]
Couple = Callable[[Shape, Sequence[bool]], FlowTransform]  # from a shape of images and a mask of their channels


@suggests_keywords
def realnvp_image(
    image_shape: Sequence[int],
    context_dim: int | Sequence[int] = 0,
    *,
    num_classes: int = 0,
    num_scales: int | None = None,
    num_steps: int = 3,
    hidden_dim: int = 32,
    num_blocks: int = 2,
    recompute: bool = False,
) -> Flow:
    """Real NVP for images: affine couplings by checkerboards and by channels (Dinh, Sohl-Dickstein, Bengio 2016,
    arXiv:1605.08803).

    A coupling is ``y_A = x_A, y_B = x_B exp(s) + t`` with ``(s, t) = net(x_A, context)``.  A scale has ``num_steps``
    couplings by checkerboards and, at half the height and width, as many by channels.  The last scale has one more by
    checkerboards and none by channels.  ``ActNorm`` replaces batch normalisation, as in Glow.

    Args:
        image_shape: Channels, height and width of an image, ``(C, H, W)``.
        context_dim: The number of context features; or the shape ``(K, H, W)`` of contexts that are images of the same
            height and width, whose pixels enter the networks at their place.
        num_classes: The number of classes, if contexts are class labels: an index tensor ``(*batch,)`` of integers,
            or one-hot and floating, ``(*batch, num_classes)``; ``flow.encoder`` embeds them.
        num_scales: The number of times that height and width are halved; by default as many as possible, up to three.
        num_steps: The number of steps at each scale.
        hidden_dim: The number of hidden channels of the networks.
        num_blocks: The number of gated residual blocks of the networks.
        recompute: True to compute the activations inside of steps again for the gradient, and not to keep them: far
            less memory for about a third more time.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over images ``(C, H, W)`` of real numbers.

    Raises:
        ValueError: If a size is out of its range, or height and width cannot be halved so often.

    Example::

        >>> realnvp_image((1, 8, 8), hidden_dim=8)().sample((5,)).shape
        torch.Size([5, 1, 8, 8])
    """
    images = _Images("realnvp_image", image_shape, context_dim, num_classes, num_steps, hidden_dim, num_blocks)
    couple = partial(images.couple, Affine(slope=1.0))

    def steps(shape: Shape, masks: Sequence[Sequence[bool]]) -> Layers:
        return _joined([[couple(shape, m), PerPixel(ActNorm(shape[0]), shape[1:])] for m in masks], recompute)

    def layers(shape: Shape, last: bool) -> Layers:
        by_square = steps(shape, [checkerboard(shape[0] // 4, number) for number in range(num_steps + last)])
        by_channel = [] if last else steps(shape, [halves(shape[0], number) for number in range(num_steps)])
        return [*by_channel, *by_square]

    return images.flow(num_scales, layers, lambda _: [])


@suggests_keywords
def glow(
    image_shape: Sequence[int],
    context_dim: int | Sequence[int] = 0,
    *,
    num_classes: int = 0,
    num_scales: int | None = None,
    num_steps: int = 8,
    hidden_dim: int = 64,
    num_blocks: int = 0,
    recompute: bool = False,
) -> Flow:
    """Glow: steps of ActNorm, an invertible 1 × 1 convolution and an affine coupling (Kingma, Dhariwal 2018,
    arXiv:1807.03039).

    A step is ``x = coupling⁻¹(W (y - loc) exp(-s))`` from data y to base x, with W, loc and s of channels.  Without
    blocks its networks are Glow's own, with three convolutions.  W starts as a random rotation.  The channels that a
    scale passes to the base have a normal distribution whose mean and scale depend on the other channels.

    Args:
        image_shape: Channels, height and width of an image, ``(C, H, W)``.
        context_dim: The number of context features, or the shape ``(K, H, W)`` of contexts that are images.
        num_classes: The number of classes, if contexts are class labels, as for :func:`realnvp_image`.
        num_scales: The number of times that height and width are halved; by default as many as possible, up to three.
        num_steps: The number of steps at each scale.
        hidden_dim: The number of hidden channels of the networks.
        num_blocks: The number of gated residual blocks of the networks.
        recompute: True to compute the activations inside of steps again for the gradient, and not to keep them.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over images ``(C, H, W)`` of real numbers.

    Raises:
        ValueError: If a size is out of its range, or height and width cannot be halved so often.

    Example::

        >>> import torch
        >>> flow = glow((3, 8, 8), num_classes=10, num_steps=2, hidden_dim=8)
        >>> flow(torch.tensor([0, 7])).log_prob(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2])
    """
    images = _Images("glow", image_shape, context_dim, num_classes, num_steps, hidden_dim, num_blocks)
    couple = partial(images.couple, Affine(slope=1.0))
    return _glow(images, couple, num_scales, num_steps, recompute, rotated=True)


@suggests_keywords
def flowpp_image(
    image_shape: Sequence[int],
    context_dim: int | Sequence[int] = 0,
    *,
    num_classes: int = 0,
    num_scales: int | None = None,
    num_steps: int = 4,
    hidden_dim: int = 32,
    num_blocks: int = 2,
    components: int = 8,
    recompute: bool = False,
) -> Flow:
    """Flow++ for images: Glow's steps, with couplings by distribution functions of logistic mixtures (Ho, Chen,
    Srinivas, Duan, Abbeel 2019, arXiv:1902.00275).

    A coupling from data y to base x is ``x_A = y_A, x_B = e^a logit Σ_k π_k σ((y_B - μ_k) e^{-s_k}) + b``.  Samples
    need its inverse, which is found numerically.  Linear maps start at the identity: mixtures find the steps of
    integers in single pixels sooner than in sums of them.

    Args:
        components: The number of logistic components of each map, at least 2.

    The other arguments, the result and the errors are those of :func:`realnvp_image`.

    Example::

        >>> flowpp_image((1, 4, 4), num_steps=2, hidden_dim=8, components=4)().sample((5,)).shape
        torch.Size([5, 1, 4, 4])
    """
    images = _Images("flowpp_image", image_shape, context_dim, num_classes, num_steps, hidden_dim, num_blocks)
    couple = partial(images.couple, LogisticMixture(components))
    return _glow(images, lambda *of: couple(*of).inv, num_scales, num_steps, recompute, rotated=False)


@suggests_keywords
def tarflow(
    image_shape: Sequence[int],
    context_dim: int | Sequence[int] = 0,
    *,
    num_classes: int = 0,
    patch_size: int | None = None,
    num_transforms: int = 8,
    num_layers: int = 1,
    hidden_dim: int = 64,
    num_heads: int = 4,
    recompute: bool = False,
) -> Flow:
    """TarFlow: autoregressive affine maps of patches by causal transformers, in alternating directions (Zhai et al.
    2024, Normalizing Flows are Capable Generative Models, arXiv:2412.06329).

    Each layer maps y, on the data's side, to x, on the base's side, where x_i and y_i are the i-th patches::

        x_i = y_i exp(s_i) + t_i,    (s_i, t_i) = net_i(y_1 … y_{i-1}, context)

    A density takes one pass of each transformer.  A sample takes as many steps as there are patches, which together
    cost a few passes, since keys and values are kept.  In contrast to the paper, the first patch is mapped too, and the
    log-density is a sum over all numbers.

    Args:
        image_shape: Channels, height and width of an image, ``(C, H, W)``.
        context_dim: The number of context features, 0 for none; or the shape ``(K, H, W)`` of contexts that are images.
            A patch then depends on the context at its place and at the places before.
        num_classes: The number of classes, if contexts are class labels, as for :func:`realnvp_image`.
        patch_size: The side of a patch.  By default the number of patches is nearest to 64, and the side is above 1 if
            at least 16 patches are left.
        num_transforms: The number of layers of the flow, each with a transformer.
        num_layers: The number of layers of each transformer.
        hidden_dim: The width of each transformer, a multiple of ``num_heads``.
        num_heads: The number of heads of attention.
        recompute: True to compute the activations inside of layers again for the gradient, and not to keep them: far
            less memory for about a third more time.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over images ``(C, H, W)`` of real numbers, the standard normal at the start.

    Raises:
        ValueError: If a size is out of its range, or patches do not fill an image.

    Example::

        >>> flow = tarflow((1, 8, 8), patch_size=4, num_transforms=2, hidden_dim=16)
        >>> x = flow.sample((5,))
        >>> x.shape, flow.log_prob(x).shape
        (torch.Size([5, 1, 8, 8]), torch.Size([5]))
    """
    check_integers("tarflow", num_transforms=num_transforms, num_layers=num_layers)
    check_flags("tarflow", recompute=recompute)
    images = _Images("tarflow", image_shape, context_dim, num_classes, num_transforms, hidden_dim, num_layers)
    bijector, side = Affine(), images.side(patch_size)
    channels, height, width = images.shape
    length, size = height * width // side**2, channels * side**2
    layers: Layers = []
    for number in range(num_transforms):
        order = range(length - 1, -1, -1) if number % 2 else range(length)
        sizes = length, size, bijector.num_params, hidden_dim, num_layers, num_heads, images.context_dim
        net = CausalTransformer(*sizes, context_shape=images.context_shape, order=order)
        layer = Patched(Autoregressive(bijector, net).inv, images.shape)
        layers.append(Recomputed(layer) if recompute else layer)
    return Flow(layers, encoder=images.encoder)


class _Images:
    """The checked sizes of an image flow and of its contexts, and parts of flows of these sizes.

    Attributes:
        shape: Channels, height and width of an image.
        context_dim: The width of the encoded context, 0 without one.
        context_shape: The shape of contexts that are images, else None.
        encoder: The encoder of labels or images, else None.
    """

    def __init__(
        self, name: str, image_shape: Sequence[int], context_dim: int | Sequence[int], num_classes: int, *sizes: int
    ) -> None:
        self.name, self.shape = name, as_image(name, "image_shape", image_shape)
        self.context_shape: Shape | None = None
        self.encoder: nn.Module | None = None
        num_steps, self.hidden_dim, self.num_blocks = sizes
        check_integers(name, num_steps=num_steps, hidden_dim=self.hidden_dim)
        check_integers(name, 0, num_blocks=self.num_blocks, num_classes=num_classes)
        if num_classes and context_dim:
            must = f"give context_dim or num_classes, not both, got {context_dim} and {num_classes}"
            raise ValueError(f"{name}: {must}; vectors may hold one-hot classes, and images constant channels of them.")
        if num_classes:
            self.context_dim, self.encoder = CLASS_DIM, ClassEmbedding(num_classes, CLASS_DIM)
        elif isinstance(context_dim, Sequence):
            shape = self.context_shape = as_image(name, "context_dim", context_dim, f"a width, or {IMAGE} of images")
            if shape[1:] != self.shape[1:]:
                must = f"contexts that are images must have the shape (K, {self.shape[1]}, {self.shape[2]})"
                raise ValueError(f"{name}: {must}, got {shape}; resize them by torch.nn.functional.interpolate.")
            self.context_dim, self.encoder = math.prod(shape), Flatten(shape)
        else:
            check_integers(name, 0, context_dim=context_dim)
            self.context_dim = context_dim

    def scales(self, asked: int | None) -> int:
        """Return the number of times that height and width are halved: the number asked for, or the default."""
        height, width = self.shape[1:]
        size = math.gcd(height, width)
        most = (size & -size).bit_length() - 1  # how often 2 divides both
        number = min(most, 3) if asked is None else asked
        if not is_integer(number) or not 1 <= number <= most:
            got = "" if asked is None else f", got num_scales={asked!r}"
            words = f"images {IMAGE} of {height} × {width} pixels can be halved {most} times{got}"
            raise ValueError(f"{self.name}: {words}; pad them to a height and width that a power of 2 divides.")
        return number

    def side(self, asked: int | None) -> int:
        """Return the side of a patch: the side asked for, or the default."""
        height, width = self.shape[1:]
        sides = [p for p in range(1, min(height, width) + 1) if height % p == width % p == 0]
        counts = {p: height * width // p**2 for p in sides if height * width // p**2 >= MIN_PATCHES}
        coarse = {p: count for p, count in counts.items() if p > 1 and count >= 16} or counts
        side = min(coarse, key=lambda p: abs(math.log(coarse[p] / 64)), default=0) if asked is None else asked
        if not is_integer(side) or side not in counts:
            must = f"patch_size must divide height and width, {height} and {width}, into {MIN_PATCHES} patches at least"
            raise ValueError(f"{self.name}: {must}, got {asked!r}; it may be one of {list(counts)}.")
        return side

    def couple(self, bijector: Bijector, shape: Shape, mask: Sequence[bool]) -> FlowTransform:
        """Build a coupling of images of a shape, by a mask of their channels."""
        kept, (channels, *size) = sum(mask), shape
        sizes = kept, channels - kept, bijector.num_params, size, self.hidden_dim, self.num_blocks, self.context_dim
        net = ConvNet(*sizes, context_shape=self.context_shape)
        return Coupling(bijector, net, mask)

    def flow(
        self, num_scales: int | None, layers: Callable[[Shape, bool], Layers], split: Callable[[Shape], Layers]
    ) -> Flow:
        """Build a flow of several scales.

        Args:
            num_scales: The number of scales, or None for the default.
            layers: The layers of a scale, given the shape at half the height and width, and True for the last scale.
            split: The layers before a split, given the same shape.
        """

        def scale(shape: Shape, left: int) -> FlowTransform:
            channels, height, width = half = 4 * shape[0], shape[1] // 2, shape[2] // 2
            parts = layers(half, left == 1)
            if left > 1:
                parts = [Split(scale((channels // 2, height, width), left - 1)), *split(half), *parts]
            return Squeezed(Compose(parts))

        return Flow([scale(self.shape, self.scales(num_scales))], NormalBase(self.shape), encoder=self.encoder)


def _glow(
    images: _Images, couple: Couple, num_scales: int | None, num_steps: int, recompute: bool, *, rotated: bool
) -> Flow:
    def step(shape: Shape, number: int) -> Layers:
        channels, *size = shape
        layer = couple(shape, halves(channels, number))
        mixed = LULinear(channels, rotation_seed=number if rotated else None).inv  # fast in the density's direction
        return [layer, PerPixel(mixed, size), PerPixel(ActNorm(channels), size)]

    return images.flow(
        num_scales,
        lambda shape, _: _joined([step(shape, number) for number in range(num_steps)], recompute),
        lambda shape: [couple(shape, halves(shape[0], 0))],
    )


def _joined(steps: Sequence[Layers], recompute: bool) -> Layers:
    """Return the layers of all steps, or one layer per step whose activations are computed again."""
    if recompute:
        return [Recomputed(Compose(step)) for step in steps]
    return [layer for step in steps for layer in step]


def checkerboard(channels: int, number: int) -> list[bool]:
    """Return the mask of the black or, for odd numbers, the white squares, over the channels of a squeezed image.

    Example::

        >>> checkerboard(1, 0)
        [True, False, False, True]
    """
    return [(place // 2 + place) % 2 == number % 2 for place in range(4 * channels)]


def halves(channels: int, number: int) -> list[bool]:
    """Return the mask of the first or, for odd numbers, the second half of the channels.

    Example::

        >>> halves(4, 0)
        [True, True, False, False]
    """
    return [(place < channels // 2) == (number % 2 == 0) for place in range(channels)]
