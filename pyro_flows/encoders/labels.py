"""Encoders of class labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import check_integers
from ..compiler_state import is_traced


class ClassEmbedding(nn.Module):
    """A network from class labels to contexts ``(*batch, context_dim)``, a learned vector for each class::

        c = E[k] for the index k of a class,    c = p E for one-hot vectors or probabilities p

    Labels are an index tensor ``(*batch,)`` of integers from 0 to ``num_classes - 1``.  Or they are floating one-hot
    vectors or probabilities, ``(*batch, num_classes)``.  The dtype decides, since integers of this shape could also be
    a batch of indices.

    Args:
        num_classes: The number of classes.
        context_dim: The width of the context.

    Raises:
        ValueError: If a size is below 1.  In use, if labels are out of their range or have another form.

    Example::

        >>> import torch
        >>> embedding = ClassEmbedding(10, context_dim=4)
        >>> labels = torch.tensor([3, 1])
        >>> torch.equal(embedding(labels), embedding(torch.nn.functional.one_hot(labels, 10).float()))
        True
        >>> embedding(torch.tensor([10]))
        Traceback (most recent call last):
        ValueError: ClassEmbedding: labels must lie between 0 and 9, got labels from 10 to 10.
    """

    def __init__(self, num_classes: int, context_dim: int) -> None:
        super().__init__()
        check_integers("ClassEmbedding", num_classes=num_classes, context_dim=context_dim)
        self.num_classes, self.context_dim = num_classes, context_dim
        self.weight = nn.Parameter(torch.randn(num_classes, context_dim))

    def forward(self, labels: Tensor) -> Tensor:
        """Encode labels.

        Args:
            labels: Indices ``(*batch,)`` of integers, or floating one-hot vectors or probabilities
                ``(*batch, num_classes)``.

        Returns:
            Contexts of shape ``(*batch, context_dim)``.

        Raises:
            ValueError: If indices lie outside of 0 … ``num_classes - 1`` or look one-hot, or floating labels have
                another width, are negative, or do not sum to 1.  ``torch.compile`` and ``torch.func`` skip these
                checks.
        """
        if not is_traced() and (fault := self._fault(labels)):
            raise ValueError(f"ClassEmbedding: {fault}.")
        return labels.to(self.weight.dtype) @ self.weight if labels.is_floating_point() else self.weight[labels.long()]

    def _fault(self, labels: Tensor) -> str:
        """Return what is wrong with labels, or an empty string."""
        number, shape = self.num_classes, tuple(labels.shape)
        if labels.is_floating_point():
            if shape[-1:] != (number,):
                return f"floating labels must have shape (*batch, {number}), got {shape}. Use labels.long() for indices"
            if not ((labels >= 0).all() and torch.allclose(labels.sum(-1), labels.new_ones(()), atol=1e-3)):
                return "floating labels must be probabilities, at least 0 and with the sum 1"
        elif labels.numel():
            labels = labels.long()  # because torch has no minimum of unsigned integers
            low, high = int(labels.min()), int(labels.max())
            if not 0 <= low <= high < number:
                return f"labels must lie between 0 and {number - 1}, got labels from {low} to {high}"
            if shape[1:] and shape[-1] == number and high == 1 and (labels.sum(-1) == 1).all():
                return f"integer labels must be indices, got one-hot vectors of shape {shape}. Use labels.float()"
        return ""
