"""Transforms of vectors whose parameters are learned or, with a conditioner, depend on a context."""

from __future__ import annotations

from torch import Tensor, nn

from ..arguments import CONDITIONER, check_kind
from ..bijectors import Bijector
from ..conditioners import Conditioner
from .base import VectorTransform


class Conditional(VectorTransform):
    """A transform of vectors whose parameters are learned or, with a conditioner, depend on a context.

    Args:
        input_dim: The number D of features.
        conditioner: A network from contexts to parameters, or None.
    """

    def __init__(self, input_dim: int, conditioner: Conditioner | None) -> None:
        if conditioner is not None:
            check_kind(type(self).__name__, Conditioner, CONDITIONER, conditioner=conditioner)
        super().__init__(input_dim, 0 if conditioner is None else conditioner.input_dim)
        self.conditioner = conditioner

    def _conditioned(self, conditioner: Conditioner, context: Tensor | None) -> Tensor:
        """Return the conditioner's parameters at a context, ``(*batch, output_dim, num_params)``."""
        if context is None:
            raise ValueError(f"{type(self).__name__}: context is missing; its width is {self.context_dim}.")
        return conditioner(context)


class Tabled(Conditional):
    """A transform with a table of parameters, to which a conditioner adds: θ(c) = table + network(c).

    Conditioners start at zero, so a layer starts as its table does.  A table can start with random parts, which a
    network alone cannot give.
    """

    def _set_table(self, start: Tensor) -> None:
        """Set the start of the table ``(P)``, and check that the conditioner yields as many numbers."""
        if self.conditioner is not None:
            check_outputs(type(self).__name__, self.conditioner, (1, len(start)), f"{self.input_dim} features")
        self.params = nn.Parameter(start)

    def _params(self, context: Tensor | None) -> Tensor:
        """Return the parameters at a context, ``(P)`` without a conditioner and ``(*batch, P)`` with one."""
        if self.conditioner is None:
            return self.params
        return self.params + self._conditioned(self.conditioner, context).squeeze(-2)


def check_outputs(owner: str, conditioner: Conditioner, wanted: tuple[int, int], words: str) -> None:
    """Raise ValueError unless a conditioner has the wanted ``(output_dim, num_params)``."""
    got = conditioner.output_dim, conditioner.num_params
    if got != wanted:
        raise ValueError(f"{owner}: conditioner must have (output_dim, num_params) = {wanted} for {words}, got {got}.")


def check_params(owner: str, bijector: Bijector, conditioner: Conditioner, output_dim: int) -> None:
    """Raise ValueError unless a conditioner yields the parameters of a bijector for each feature to map."""
    words = f"{output_dim} features mapped by {type(bijector).__name__}"
    check_outputs(owner, conditioner, (output_dim, bijector.num_params), words)
