"""What one sees of an image flow while it trains: samples in a file, and bits per dimension."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..diagnostics import bits_per_dim, save_images
from ..encoders import ClassEmbedding
from ..flows import Dequantized, Flow

NUMBER = 64


@torch.no_grad()
def draw(model: Flow | Dequantized, contexts: Tensor | None, path: Path, epoch: int) -> None:
    """Write a grid of samples: of each class a column, or of contexts as they come.

    Args:
        model: The flow.
        contexts: Contexts ``(N, ...)`` of data, or None.
        path: The file; ``{epoch}`` in its name is replaced.
        epoch: The number of the epoch that ended.
    """
    flow, levels = (model.flow, model.levels) if isinstance(model, Dequantized) else (model, None)
    columns = 8
    if isinstance(flow.encoder, ClassEmbedding):
        classes = columns = min(flow.encoder.num_classes, 16)
        contexts = torch.arange(classes).repeat(NUMBER // classes)
    if contexts is None:
        images = model().sample((NUMBER,))
    else:
        device = next(flow.parameters()).device
        images = model(contexts[:NUMBER].to(device)).sample()
    name = path.name.replace("{epoch}", f"{epoch:04d}")
    save_images(images, path.with_name(name), columns=columns, levels=levels)


def in_bits(model: Flow | Dequantized, loss: float) -> str:
    """A loss in nats as it is shown of images: in bits per dimension."""
    return f"{bits_per_dim(torch.tensor(-loss), model.event_shape):.4f} bits/dim"
