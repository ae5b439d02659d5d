"""An encoder of classes: c = E[k], a learned vector for each class, or c = p E for their probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import check_integers


class ClassEmbedding(nn.Module):
    """A network from class labels to contexts ``(*batch, context_dim)``, a learned vector for each class::

        c = E[k] for the index k of a class,    c = p E for one-hot vectors or probabilities p

    Labels are an index tensor ``(*batch,)`` of integers from 0 to ``num_classes - 1``, or one-hot, or probabilities:
    floating, ``(*batch, num_classes)``.  Floating and not, since integers of that shape may be a batch of indices.

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
        ValueError: ClassEmbedding: labels must lie between 0 and 9, got some from 10 to 10.
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
                another width, are negative, or do not sum to 1.  Under ``torch.compile`` and ``torch.func`` nothing is
                checked.
        """
        if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
            self._check(labels)
        return labels.to(self.weight.dtype) @ self.weight if labels.is_floating_point() else self.weight[labels.long()]

    def _check(self, labels: Tensor) -> None:
        number, shape = self.num_classes, tuple(labels.shape)
        wide = bool(shape) and shape[-1] == number
        if labels.is_floating_point():
            if not wide:
                wanted = f"floating labels are one-hot, of shape (*batch, {number})"
                raise ValueError(f"ClassEmbedding: {wanted}, got {shape}; use labels.long() where they are indices.")
            if not ((labels >= 0).all() and torch.allclose(labels.sum(-1), labels.new_ones(()), atol=1e-3)):
                raise ValueError("ClassEmbedding: floating labels are probabilities, of at least 0 and with the sum 1.")
            return
        labels = labels.long()
        low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
        if not 0 <= low <= high < number:
            got = f"got some from {low} to {high}"
            raise ValueError(f"ClassEmbedding: labels must lie between 0 and {number - 1}, {got}.")
        if wide and labels.dim() > 1 and high == 1 and (labels.sum(-1) == 1).all():
            got = f"labels of integers, of shape {shape}, are indices, but these look one-hot"
            raise ValueError(f"ClassEmbedding: {got}; use labels.float() where they are.")
