"""What steers an image flow: nothing, a vector, an image, or a class; and the checks that recipes of images share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from ..arguments import IMAGE, as_image, check_integers, is_integer
from ..encoders import ClassEmbedding, Flatten

MOST_SCALES = 3
CLASS_DIM = 32  # the width of what stands for a class


class Steering(NamedTuple):
    """The sizes of an image flow and of its contexts.

    Attributes:
        name: The recipe's.
        image_shape: Channels, height and width of an image.
        context_dim: The width of what the networks see of a context, 0 without one.
        context_shape: The shape of contexts that are images, else None.
        encoder: What makes vectors of contexts that are none, else None.
    """

    name: str
    image_shape: tuple[int, int, int]
    context_dim: int
    context_shape: tuple[int, int, int] | None
    encoder: nn.Module | None

    def scales(self, asked: int | None) -> int:
        """How often height and width are halved: as often as is asked for, or as they can be."""
        size = math.gcd(*self.image_shape[1:])
        most = (size & -size).bit_length() - 1  # how often 2 divides both
        number = min(most, MOST_SCALES) if asked is None else asked
        if not is_integer(number) or not 1 <= number <= most:
            height, width = self.image_shape[1:]
            got = "" if asked is None else f", got num_scales={asked!r}"
            raise ValueError(
                f"{self.name}: images {IMAGE} of {height} × {width} pixels can be halved {most} times{got}; "
                "pad them to a height and width that a power of 2 divides."
            )
        return number


def check_image(
    name: str, image_shape: Sequence[int], context_dim: int | Sequence[int], num_classes: int, *sizes: int
) -> Steering:
    """Raise one clear error that names the recipe, the argument and its value.

    Args:
        name: The recipe's.
        image_shape: As the user gave it.
        context_dim: As the user gave it.
        num_classes: As the user gave it.
        *sizes: ``num_steps``, ``hidden_dim`` and ``num_blocks``.
    """
    shape = as_image(name, "image_shape", image_shape)
    num_steps, hidden_dim, num_blocks = sizes
    check_integers(name, num_steps=num_steps, hidden_dim=hidden_dim)
    check_integers(name, 0, num_blocks=num_blocks, num_classes=num_classes)
    if num_classes and context_dim:
        raise ValueError(
            f"{name}: give context_dim or num_classes, not both, got {context_dim} and {num_classes}; vectors may hold "
            "one-hot classes, and images constant channels of them."
        )
    if num_classes:
        return Steering(name, shape, CLASS_DIM, None, ClassEmbedding(num_classes, CLASS_DIM))
    if not isinstance(context_dim, Sequence):
        check_integers(name, 0, context_dim=context_dim)
        return Steering(name, shape, context_dim, None, None)
    of_context = as_image(name, "context_dim", context_dim, f"a width, or {IMAGE} of images")
    if of_context[1:] != shape[1:]:
        raise ValueError(
            f"{name}: contexts that are images must have the shape (K, {shape[1]}, {shape[2]}), got {of_context}; "
            "resize them, as torch.nn.functional.interpolate does."
        )
    return Steering(name, shape, math.prod(of_context), of_context, Flatten(of_context))
