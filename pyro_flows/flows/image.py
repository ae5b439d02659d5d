"""Recipes of image flows by couplings, at several scales: density and samples at about the same price.

Each scale halves height and width, takes some steps and lets half of the channels go.  Each number of the base has a
mean and a scale that are learned, since convolutions do not know where in an image they are.  Images are ``(C, H, W)``
with real values; :class:`~pyro_flows.flows.Dequantized` makes of each flow a distribution over images of integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ..bijectors import Affine, Bijector, LogisticMixture
from ..conditioners import ConvNet
from ..distributions import NormalBase
from ..transforms import ActNorm, Compose, Coupling, FlowTransform, LULinear, PerPixel, Recomputed, Split, Squeezed
from .flow import Flow
from .image_context import Steering, check_image

Shape = tuple[int, int, int]
Build = Callable[[Shape, Sequence[bool]], FlowTransform]  # a coupling of images of a shape, by a mask of channels


def realnvp_image(
    image_shape: Sequence[int],
    context_dim: int | Sequence[int] = 0,
    *,
    num_classes: int = 0,
    num_scales: int | None = None,
    num_steps: int = 3,
    hidden_dim: int = 32,
    num_blocks: int = 2,
    max_log_scale: float = 3.0,
    activation: type[nn.Module] = nn.ReLU,
    recompute: bool = False,
) -> Flow:
    """Real NVP for images: affine couplings by checkerboards and by channels (Dinh, Sohl-Dickstein, Bengio 2016,
    arXiv:1605.08803).

    A coupling is ``y_A = x_A, y_B = x_B exp(s) + t`` with ``(s, t) = net(x_A, context)``.  A scale has ``num_steps`` by
    checkerboards and, at half the height and width, as many by channels; the last has one more by checkerboards and
    none by channels.  ``ActNorm`` stands for batch normalisation, as in Glow.

    Args:
        image_shape: Channels, height and width of an image, ``(C, H, W)``.
        context_dim: The number of context features, or the shape ``(K, H, W)`` of contexts that are images of the same
            height and width, of which networks see at each place what lies there.
        num_classes: The number of classes, where contexts are class labels: an index tensor ``(*batch,)`` of integers,
            or one-hot and floating, ``(*batch, num_classes)``; ``flow.encoder`` embeds them.
        num_scales: How often height and width are halved; by default as often as they can be, up to three times.
        num_steps: The number of steps at each scale.
        hidden_dim: The number of channels inside of the networks.
        num_blocks: The number of their gated residual blocks.
        max_log_scale: The bound on the log-scale of one coupling, in nats.
        activation: The class of the networks' nonlinearity.
        recompute: Whether to keep no activations inside of steps for the gradient, and to compute them again: far less
            memory for about a third more time.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over images ``(C, H, W)`` of real numbers.

    Raises:
        ValueError: If a size is out of its range, or height and width cannot be halved so often.

    Example::

        >>> realnvp_image((1, 8, 8), hidden_dim=8)().sample((5,)).shape
        torch.Size([5, 1, 8, 8])
    """
    steering = check_image("realnvp_image", image_shape, context_dim, num_classes, num_steps, hidden_dim, num_blocks)
    couple = _coupling(Affine(max_log_scale, slope=1.0), steering, hidden_dim, num_blocks, activation)

    def steps(shape: Shape, masks: Sequence[Sequence[bool]]) -> list[FlowTransform]:
        layers = [[couple(shape, mask), PerPixel(ActNorm(shape[0]), shape[1:])] for mask in masks]
        return _flat(layers, recompute)

    def scale(shape: Shape, left: int) -> FlowTransform:
        half = halved(shape)
        layers = steps(half, [checkerboard(shape[0], number) for number in range(num_steps + (left == 1))])
        if left > 1:
            by_channel = steps(half, [halves(half[0], number) for number in range(num_steps)])
            layers = [Split(scale((half[0] // 2, *half[1:]), left - 1)), *by_channel, *layers]
        return Squeezed(Compose(layers))

    return _made(scale(steering.image_shape, steering.scales(num_scales)), steering)


def glow(
    image_shape: Sequence[int],
    context_dim: int | Sequence[int] = 0,
    *,
    num_classes: int = 0,
    num_scales: int | None = None,
    num_steps: int = 8,
    hidden_dim: int = 64,
    num_blocks: int = 0,
    max_log_scale: float = 3.0,
    activation: type[nn.Module] = nn.ReLU,
    recompute: bool = False,
) -> Flow:
    """Glow: steps of ActNorm, an invertible 1 × 1 convolution and an affine coupling (Kingma, Dhariwal 2018,
    arXiv:1807.03039).

    A step is ``x = coupling⁻¹(W (y - loc) exp(-s))`` from data y to base x, with W, loc and s of channels.  Without
    blocks its networks are Glow's own, of three convolutions.  W starts as a random rotation.  Channels that leave have
    a normal law whose mean and scale depend on those that stay.

    Args:
        image_shape: Channels, height and width of an image, ``(C, H, W)``.
        context_dim: The number of context features, or the shape ``(K, H, W)`` of contexts that are images.
        num_classes: The number of classes, where contexts are class labels, as for :func:`realnvp_image`.
        num_scales: How often height and width are halved; by default as often as they can be, up to three times.
        num_steps: The number of steps at each scale.
        hidden_dim: The number of channels inside of the networks.
        num_blocks: The number of their gated residual blocks.
        max_log_scale: The bound on the log-scale of one coupling, in nats.
        activation: The class of the networks' nonlinearity.
        recompute: Whether to compute activations inside of steps again for the gradient, and not to keep them.

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
    steering = check_image("glow", image_shape, context_dim, num_classes, num_steps, hidden_dim, num_blocks)
    couple = _coupling(Affine(max_log_scale, slope=1.0), steering, hidden_dim, num_blocks, activation)
    return _glow(steering, couple, num_scales, num_steps, recompute, rotated=True)


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
    bound: float = 10.0,
    activation: type[nn.Module] = nn.ReLU,
    recompute: bool = False,
) -> Flow:
    """Flow++ for images: Glow's steps, with couplings by distribution functions of logistic mixtures (Ho, Chen,
    Srinivas, Duan, Abbeel 2019, arXiv:1902.00275).

    From data y to base x they are ``x_A = y_A, x_B = e^a logit Σ_k π_k σ((y_B - μ_k) e^{-s_k}) + b``, to be inverted
    numerically for samples.  Linear maps start at the identity: mixtures find the steps of integers in single pixels
    sooner than in sums of them.

    Args:
        components: The number of logistic components of each map, at least 2.
        bound: The half-width of the interval that the maps bend; outside they are straight.

    The other arguments, the result and the errors are those of :func:`realnvp_image`.

    Example::

        >>> flowpp_image((1, 4, 4), num_steps=2, hidden_dim=8, components=4)().sample((5,)).shape
        torch.Size([5, 1, 4, 4])
    """
    steering = check_image("flowpp_image", image_shape, context_dim, num_classes, num_steps, hidden_dim, num_blocks)
    couple = _coupling(LogisticMixture(components, bound=bound), steering, hidden_dim, num_blocks, activation)
    return _glow(steering, lambda *of: couple(*of).inv, num_scales, num_steps, recompute, rotated=False)


def _glow(
    steering: Steering, couple: Build, num_scales: int | None, num_steps: int, recompute: bool, *, rotated: bool
) -> Flow:
    def step(half: Shape, number: int) -> list[FlowTransform]:
        channels, *size = half
        layer, seed = couple(half, halves(channels, number)), number if rotated else None
        mixed = LULinear(channels, rotation_seed=seed).inv  # whose cheap direction is the density's
        return [layer, PerPixel(mixed, size), PerPixel(ActNorm(channels), size)]

    def scale(shape: Shape, left: int) -> FlowTransform:
        (channels, *_) = half = halved(shape)
        steps = _flat([step(half, number) for number in range(num_steps)], recompute)
        if left > 1:
            inner = scale((channels // 2, *half[1:]), left - 1)
            steps = [Split(inner), couple(half, halves(channels, 0)), *steps]
        return Squeezed(Compose(steps))

    return _made(scale(steering.image_shape, steering.scales(num_scales)), steering)


def _made(transform: FlowTransform, steering: Steering) -> Flow:
    """The flow over a base whose numbers each have a mean and a scale."""
    return Flow([transform], NormalBase(steering.image_shape), encoder=steering.encoder)


def _coupling(
    bijector: Bijector, steering: Steering, hidden_dim: int, num_blocks: int, activation: type[nn.Module]
) -> Build:
    def couple(shape: Shape, mask: Sequence[bool]) -> FlowTransform:
        kept, (channels, *size) = sum(mask), shape
        sizes = kept, channels - kept, bijector.num_params, size, hidden_dim, num_blocks, steering.context_dim
        net = ConvNet(*sizes, context_shape=steering.context_shape, activation=activation)
        return Coupling(bijector, net, mask)

    return couple


def _flat(steps: Sequence[Sequence[FlowTransform]], recompute: bool) -> list[FlowTransform]:
    """The layers of all steps, or one layer a step whose activations are not kept."""
    if recompute:
        return [Recomputed(Compose(step)) for step in steps]
    return [layer for step in steps for layer in step]


def halved(shape: Shape) -> Shape:
    """The shape of an image once each block of two by two pixels is one."""
    channels, height, width = shape
    return 4 * channels, height // 2, width // 2


def checkerboard(channels: int, number: int) -> list[bool]:
    """The black or the white squares, in turn, of the pixels of an image as channels of its squeezed form.

    Example::

        >>> checkerboard(1, 0)
        [True, False, False, True]
    """
    return [(place // 2 + place) % 2 == number % 2 for place in range(4 * channels)]


def halves(channels: int, number: int) -> list[bool]:
    """The first or the second half of the channels, in turn.

    Example::

        >>> halves(4, 0)
        [True, True, False, False]
    """
    return [(place < channels // 2) == (number % 2 == 0) for place in range(channels)]
