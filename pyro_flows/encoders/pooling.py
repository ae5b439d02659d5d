"""Weights of the elements of a set, or of the steps of a series, in pooled features."""

from __future__ import annotations

import torch
from torch import Tensor


def pooling_weights(scores: Tensor, there: Tensor) -> Tensor:
    """Return the weights of elements in their mean, and under the attention of each query.

    Args:
        scores: The logits of Q queries, ``(*batch, n, Q)``.
        there: True for the elements that count, ``(*batch, n)``.

    Returns:
        Of shape ``(*batch, n, 1 + Q)``, the mean first.  Each column sums to 1, or to 0 if no element counts.
    """
    there = there.unsqueeze(-1)
    # The lowest finite number, not -inf: the softmax of an empty set would be NaN.  There the mask makes it zero.
    attention = scores.masked_fill(~there, torch.finfo(scores.dtype).min).softmax(-2) * there
    size = there.sum(-2, keepdim=True).to(scores.dtype)  # (*batch, 1, 1)
    return torch.cat((there / size.clamp(min=1.0), attention), -1)
