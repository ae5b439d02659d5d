"""Transforms of vectors whose parameters are learned or, with a conditioner, depend on a context."""

from __future__ import annotations

from torch import Tensor, nn

from ..arguments import CONDITIONER, check_kind
from ..bijectors import Bijector
from ..conditioners import Conditioner
from .base import VectorTransform


class Conditional(VectorTransform):
    """A transform of vectors whose parameters are learned or, with a conditioner, depend on a context.

    A conditioner replaces the table of parameters, or adds to it: θ(c) = table + network(c).  Conditioners start at
    zero, and a table can start with random parts, which a network alone cannot give.

    Args:
        input_dim: The number D of features.
        conditioner: A network from contexts to parameters, or None.
        outputs: The numbers ``(output_dim, num_params)`` that the conditioner must have.

    Attributes:
        params: The table, which a subclass may set: of the shape of ``outputs``, or ``(num_params)`` if it stays with a
            conditioner.
    """

    params: nn.Parameter

    def __init__(self, input_dim: int, conditioner: Conditioner | None, outputs: tuple[int, int]) -> None:
        owner = type(self).__name__
        if conditioner is not None:
            check_kind(owner, Conditioner, CONDITIONER, conditioner=conditioner)
        super().__init__(input_dim, 0 if conditioner is None else conditioner.input_dim)
        self.conditioner = conditioner
        self.register_parameter("params", None)
        if conditioner is not None:
            check_outputs(owner, conditioner, outputs, f"{input_dim} features")

    def _params(self, context: Tensor | None) -> Tensor:
        """Return the parameters at a context: the table, ``(*batch, *outputs)``, or ``(*batch, num_params)``."""
        if self.conditioner is None:
            return self.params
        if context is None:
            raise ValueError(f"{type(self).__name__}: context is missing; its width is {self.context_dim}.")
        found: Tensor = self.conditioner(context)
        return found if self.params is None else self.params + found.squeeze(-2)


def check_outputs(owner: str, conditioner: Conditioner, wanted: tuple[int, int], words: str) -> None:
    """Raise ValueError unless a conditioner has the wanted ``(output_dim, num_params)``."""
    got = conditioner.output_dim, conditioner.num_params
    if got != wanted:
        raise ValueError(f"{owner}: conditioner must have (output_dim, num_params) = {wanted} for {words}, got {got}.")


def check_params(owner: str, bijector: Bijector, conditioner: Conditioner, output_dim: int) -> None:
    """Raise ValueError unless a conditioner yields the parameters of a bijector for each feature to map."""
    words = f"{output_dim} features mapped by {type(bijector).__name__}"
    check_outputs(owner, conditioner, (output_dim, bijector.num_params), words)
