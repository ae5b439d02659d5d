"""Non-centred coordinates of a hierarchy, as a map of vectors that needs no model.

A vector y holds effects next to the numbers that their priors depend on.  Each effect has a location, linear in the
others, and a scale, log-linear in the others.  In units of these the neck of a funnel is no narrower than its mouth.
A General Framework for the Parametrization of Hierarchical Models (Papaspiliopoulos, Roberts, Sköld 2007, Statistical
Science 22) compares the two parametrisations; Automatic Reparameterisation of Probabilistic Programs (Gorinova, Moore,
Hoffman 2020, arXiv:1906.03028) learns a degree between them for each effect.
"""

import torch
from torch import Tensor, nn

from ..arguments import check_integers
from .base import TwoWay, VectorTransform

LARGEST = 40.0  # the largest change of a scale, in nats; float32 holds its exponential


class NonCentred(TwoWay, VectorTransform):
    """A map from effects in units of their scales to effects, the identity until it is set::

        e_i = exp(τ_i (R e)_i) x_i,    y = W e,    log|det dy/dx| = Σ_i τ_i (R e)_i

    The matrix W is unit triangular, and R strictly triangular.  They are set and not trained; the degrees τ are
    trained.  With τ = 1 effects are fully non-centred.  With τ = 0 the map is linear.

    Args:
        input_dim: The number D of features.
        levels: The depth of the hierarchy: the most scales in a chain where each depends on the one before.

    Attributes:
        loc: The matrix W, ``(D, D)``.
        log_scale: The matrix R, ``(D, D)``.
        degree: The degrees τ, ``(D,)``.

    Raises:
        ValueError: If a number is not positive.

    Example::

        >>> import torch
        >>> funnel = NonCentred(2)
        >>> funnel.set(torch.eye(2), torch.tensor([[0.0, 0.0], [0.5, 0.0]]))  # the first number is a log-variance
        >>> y, log_det = funnel.forward_and_log_det(torch.tensor([2.0, 1.0]))
        >>> y.tolist(), log_det.item()  # e = 2.718
        ([2.0, 2.7182817459106445], 1.0)
    """

    def __init__(self, input_dim: int, levels: int = 1) -> None:
        super().__init__(input_dim)
        check_integers("NonCentred", levels=levels)
        self.levels = levels
        self.loc = nn.Parameter(torch.eye(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim, input_dim))
        self.degree = nn.Parameter(torch.ones(input_dim))

    @torch.no_grad()
    def set(self, loc: Tensor, log_scale: Tensor, degree: Tensor | float = 1.0) -> None:
        """Set the matrices W and R, each ``(D, D)``, and the degrees τ, ``(D,)`` or one number for all."""
        self.loc.copy_(loc)
        self.log_scale.copy_(log_scale)
        self.degree.copy_(torch.as_tensor(degree))

    def reset(self) -> None:
        """Set the map to the identity."""
        self.set(torch.eye(self.input_dim), torch.zeros_like(self.log_scale))

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        loc = self.loc.detach()
        if inverse:
            flat = value.reshape(-1, self.input_dim).T
            e = torch.linalg.solve_triangular(loc, flat, upper=False, unitriangular=True).T.reshape(value.shape)
            change = self._change(e)
            return e * torch.exp(-change), -change.sum(-1)
        e = value
        for _ in range(self.levels):
            change = self._change(e)
            e = change.exp() * value
        return e @ loc.T, change.sum(-1)

    def _change(self, e: Tensor) -> Tensor:
        """Return the changes of the log-scales, ``(*batch, D)``."""
        return (self.degree * (e @ self.log_scale.detach().T)).clamp(-LARGEST, LARGEST)
