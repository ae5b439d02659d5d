"""An encoder of classes: c = E[k], a learned vector for each class, or c = p E for their probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import check_sizes


class ClassEmbedding(nn.Module):
    """A network from class labels to contexts ``(*batch, context_dim)``.

    Labels are an index tensor ``(*batch,)`` of integers from 0 to ``num_classes - 1``, or one-hot, or probabilities:
    floating, ``(*batch, num_classes)``.

    Args:
        num_classes: The number of classes.
        context_dim: The width of the context.

    Raises:
        ValueError: If a size is below 1.

    Example::

        >>> import torch
        >>> embedding = ClassEmbedding(10, context_dim=4)
        >>> labels = torch.tensor([3, 1])
        >>> torch.equal(embedding(labels), embedding(nn.functional.one_hot(labels, 10).float()))
        True
    """

    def __init__(self, num_classes: int, context_dim: int) -> None:
        super().__init__()
        check_sizes("ClassEmbedding", num_classes=num_classes, context_dim=context_dim)
        self.num_classes, self.context_dim = num_classes, context_dim
        self.weight = nn.Parameter(torch.randn(num_classes, context_dim))

    def forward(self, labels: Tensor) -> Tensor:
        """Encode labels.

        Raises:
            ValueError: If they are no classes.
        """
        if labels.is_floating_point():
            if labels.dim() == 0 or labels.shape[-1] != self.num_classes:
                raise ValueError(
                    f"ClassEmbedding: floating labels are one-hot, of shape (*batch, {self.num_classes}), got "
                    f"{tuple(labels.shape)}; use labels.long() where they are indices."
                )
            return labels.to(self.weight.dtype) @ self.weight
        labels = labels.long()
        low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
        if not 0 <= low <= high < self.num_classes:
            raise ValueError(
                f"ClassEmbedding: labels must lie between 0 and {self.num_classes - 1}, got some from {low} to {high}."
            )
        return self.weight[labels]
