"""A conditioner without parameters, which returns its input."""

from __future__ import annotations

from torch import Tensor

from .base import Conditioner


class Given(Conditioner):
    """A conditioner that returns the first ``num_params * output_dim`` numbers of its input as the parameters.

    It takes ``(*batch, input_dim)`` to ``(*batch, output_dim, num_params)``, and no context.  Its maps are the identity
    where these inputs are zero.  As for other conditioners, they should be zero at the start.

    Args:
        input_dim: The number of inputs; those beyond the parameters are ignored.
        output_dim: The number of features that receive parameters.
        num_params: The number of parameters of each feature (``bijector.num_params``).

    Raises:
        ValueError: If a size is below 1, or there are fewer inputs than parameters.

    Example::

        >>> import torch
        >>> Given(5, 2, num_params=2)(torch.arange(5.0)).tolist()
        [[0.0, 2.0], [1.0, 3.0]]
    """

    def __init__(self, input_dim: int, output_dim: int, num_params: int) -> None:
        super().__init__(input_dim, output_dim, num_params, (1,), 0)
        least = num_params * output_dim
        if input_dim < least:
            raise ValueError(f"Given: input_dim must be at least num_params * output_dim = {least}, got {input_dim}.")

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.arranged(x[..., : self.num_params * self.output_dim])
