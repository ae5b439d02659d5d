"""Recipe of a transformer autoregressive flow over the patches of an image: fast densities."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..arguments import check_flags, check_integers, is_integer
from ..bijectors import Affine
from ..conditioners import CausalTransformer
from ..transforms import Autoregressive, FlowTransform, Patched, Recomputed
from .flow import Flow
from .image_context import check_image

FEWEST = 4  # patches: of a single one a layer would be an affine map of each number alone


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
    max_log_scale: float = 3.0,
    recompute: bool = False,
) -> Flow:
    """TarFlow: autoregressive affine maps of patches by causal transformers, in alternating directions (Zhai et al.
    2024, Normalizing Flows are Capable Generative Models, arXiv:2412.06329).

    Each layer maps y, on the data's side, to x, on the base's side, where x_i and y_i are the i-th patches::

        x_i = y_i exp(s_i) + t_i,    (s_i, t_i) = net_i(y_1 … y_{i-1}, context)

    A density takes one pass of each transformer; a sample as many steps as there are patches, which together cost a few
    passes, since keys and values are kept.  Unlike the paper's, the first patch is mapped too, and the
    log-density is a sum over all numbers.

    Args:
        image_shape: Channels, height and width of an image, ``(C, H, W)``.
        context_dim: The number of context features, 0 for none, or the shape ``(K, H, W)`` of contexts that are images,
            of which a patch sees its own place and those before.
        num_classes: The number of classes, where contexts are class labels: an index tensor ``(*batch,)`` of integers,
            or one-hot and floating, ``(*batch, num_classes)``.
        patch_size: The side of a patch; by default that of which there are nearest to 64, above 1 where it leaves 16.
        num_transforms: The number of layers of the flow, each with a transformer.
        num_layers: The number of layers of each transformer.
        hidden_dim: Their width, a multiple of ``num_heads``.
        num_heads: The number of heads of attention.
        max_log_scale: The bound on the log-scale s of one layer, in nats.
        recompute: Whether to keep no activations inside of layers for the gradient, and to compute them again: far less
            memory for about a third more time.

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
    steering = check_image("tarflow", image_shape, context_dim, num_classes, num_transforms, hidden_dim, num_layers)
    (channels, height, width), bijector = steering.image_shape, Affine(max_log_scale)
    sides = [p for p in range(1, min(height, width) + 1) if height % p == width % p == 0]
    counts = {p: height * width // p**2 for p in sides if height * width // p**2 >= FEWEST}
    coarse = {p: count for p, count in counts.items() if p > 1 and count >= 16} or counts
    side = min(coarse, key=lambda p: abs(math.log(coarse[p] / 64)), default=0) if patch_size is None else patch_size
    if not is_integer(side) or side not in counts:
        raise ValueError(
            f"tarflow: patch_size must divide height and width, {height} and {width}, into {FEWEST} patches at least, "
            f"got {patch_size!r}; it may be one of {list(counts)}."
        )
    length = height * width // side**2
    layers: list[FlowTransform] = []
    for number in range(num_transforms):
        ranks = range(length - 1, -1, -1) if number % 2 else range(length)
        sizes = length, channels * side**2, bijector.num_params, hidden_dim, num_layers, num_heads, steering.context_dim
        net = CausalTransformer(*sizes, context_shape=steering.context_shape, order=ranks)
        layer = Patched(Autoregressive(bijector, net).inv, steering.image_shape)
        layers.append(Recomputed(layer) if recompute else layer)
    return Flow(layers, encoder=steering.encoder)
