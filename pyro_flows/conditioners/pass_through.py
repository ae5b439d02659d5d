"""A conditioner without parameters, which returns parts of its input."""

from __future__ import annotations

from torch import Tensor

from ..arguments import check_integers
from .base import Conditioner


class Given(Conditioner):
    """A conditioner whose parameters are given by its input, or are linear in the last numbers of its input::

        θ_ip = x_ip + Σ_k x_ipk g_k

    An input holds ``num_params * output_dim`` numbers x_ip, as many for each k, and at its end the numbers g.  It takes
    ``(*batch, input_dim)`` to ``(*batch, output_dim, num_params)``, and no context.  Its maps are the identity where
    the coefficients are zero.  As for other conditioners, they should be zero at the start.

    Args:
        input_dim: The number of inputs; those between the coefficients and g are ignored.
        output_dim: The number of features that receive parameters.
        num_params: The number of parameters of each feature (``bijector.num_params``).
        num_factors: The number of factors g; by default the parameters are the numbers x_ip.

    Raises:
        ValueError: If a size is out of its range, or there are too few inputs.

    Example::

        >>> import torch
        >>> Given(5, 2, num_params=2)(torch.arange(5.0)).tolist()
        [[0.0, 2.0], [1.0, 3.0]]
        >>> Given(6, 1, num_params=2, num_factors=1)(torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 10.0])).tolist()
        [[31.0, 42.0]]
    """

    def __init__(self, input_dim: int, output_dim: int, num_params: int, num_factors: int = 0) -> None:
        super().__init__(input_dim, output_dim, num_params, (1,), 0)
        check_integers("Given", 0, num_factors=num_factors)
        self.num_factors = num_factors
        if input_dim < (least := self.num_coefficients(output_dim, num_params, num_factors) + num_factors):
            raise ValueError(f"Given: input_dim must be at least {least} for these sizes, got {input_dim}.")

    @staticmethod
    def num_coefficients(output_dim: int, num_params: int, num_factors: int) -> int:
        """Return the number of coefficients at the start of an input."""
        return num_params * output_dim * (1 + num_factors)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        number, size = self.num_factors, self.num_params * self.output_dim
        params = x[..., :size]
        if number:
            linear = x[..., size : size * (1 + number)].unflatten(-1, (number, size))
            params = params + (x[..., None, -number:] @ linear).squeeze(-2)
        return self.arranged(params)
