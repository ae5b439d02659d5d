"""A linear recurrence along a sequence, solved in about log₂ T rounds.

The even steps are put into the equations of the odd ones, which leaves a recurrence of half the length: cyclic
reduction (Hockney 1965, Journal of the ACM 12), as a parallel scan (Blelloch 1990, CMU-CS-90-190).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import check_integers
from ..bijectors.base import bounded
from ..conditioners import Conditioner
from .base import FlowTransform, VectorTransform
from .elementwise import check_conditioner

MAX_LOG_SCALE = 5.0  # bound of the log-scales, in nats
SMALL = 4  # the largest matrices whose products are faster by sums than by matrix products


class Recurrence(VectorTransform):
    """A linear recurrence along the T steps of a sequence of vectors ``(d,)``, the identity at the start::

        y_t = b_t + e_t,    e_t = A_t e_{t-1} + exp(s_t) x_t,    log|det dy/dx| = Σ_t Σ_j s_tj

    With learned steps it is the map from white noise to a Gaussian Markov process.  Events are vectors ``(T d,)``, one
    step after the other.  Both directions cost O(T).  The rows of A have sums of absolute values below 1, so that no
    parameters let the process grow without bound.

    Args:
        steps: The number T of steps.
        width: The number d of features of a step.
        conditioner: A network that computes the 2 + d parameters (raw s, b, raw A) of each feature from the context,
            with ``input_dim = 0`` and ``output_dim = T d``; by default they are a table.

    Raises:
        ValueError: If a number is not positive or the conditioner's sizes do not fit.  In use, if the conditioner takes
            contexts and none is given.

    Example::

        >>> import torch
        >>> walk = Recurrence(steps=1000, width=1)
        >>> walk.params.data[:, 2] = 20.0  # A is nearly 1
        >>> y, log_det = walk.forward_and_log_det(torch.ones(1000))
        >>> round(y[-1].item()), log_det.item()
        (1000, 0.0)
    """

    def __init__(self, steps: int, width: int = 1, conditioner: Conditioner | None = None) -> None:
        check_integers("Recurrence", steps=steps, width=width)
        if conditioner is not None:
            check_conditioner("Recurrence", conditioner, (steps * width, 2 + width))
        super().__init__(steps * width, 0 if conditioner is None else conditioner.context_dim)
        self.steps, self.width, self.conditioner = steps, width, conditioner
        if conditioner is None:
            self.params = nn.Parameter(torch.zeros(steps * width, 2 + width))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift, matrix = self._system(x, context)
        e = recur(matrix, log_scale.exp() * x.unflatten(-1, (self.steps, self.width)))
        y, log_det = (e + shift).flatten(-2), log_scale.sum((-2, -1))
        return y, log_det.expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift, matrix = self._system(y, context)
        e = y.unflatten(-1, (self.steps, self.width)) - shift
        x = ((e - applied(matrix, before(e))) * torch.exp(-log_scale)).flatten(-2)
        return x, -log_scale.sum((-2, -1)).expand(x.shape[:-1])

    def _system(self, like: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-scales and shifts, ``(*batch, T, d)``, and the matrices A, ``(*batch, T, d, d)``."""
        params = self.params if self.conditioner is None else self.conditioner(like.new_zeros(0), context)
        raw, shift, *rows = params.unflatten(-2, (self.steps, self.width)).unbind(-1)
        matrix = torch.tanh(torch.stack(rows, -1)) / self.width
        return bounded(raw, MAX_LOG_SCALE), shift, matrix


class Process(FlowTransform):
    """A map from white noise to a Gaussian process along the steps of a sequence, with tensors that are given::

        y_t = μ_t + e_t,    e_t = A_t e_{t-1} + L_t x_t,    log|det dy/dx| = Σ_t log|det L_t|

    Events are vectors ``(T d,)``, one step after the other.  It is ephemeral: it holds its tensors for one use.

    Args:
        loc: The means μ, ``(*batch, T, d)``.
        matrix: The matrices A, ``(*batch, T, d, d)``; None if all are zero.
        scale: The lower triangular matrices L, ``(*batch, T, d, d)``.
    """

    def __init__(self, loc: Tensor, matrix: Tensor | None, scale: Tensor) -> None:
        super().__init__((int(loc.shape[-2]) * int(loc.shape[-1]),))  # under a trace these are tensors
        self.loc, self.matrix, self.scale = loc, matrix, scale

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        e = applied(self.scale, x.unflatten(-1, self.loc.shape[-2:]))
        y = (self.loc + (e if self.matrix is None else recur(self.matrix, e))).flatten(-2)
        return y, self._log_det().expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        e = y.unflatten(-1, self.loc.shape[-2:]) - self.loc
        if self.matrix is not None:
            e = e - applied(self.matrix, before(e))
        if e.shape[-1] == 1:
            x = e / self.scale.squeeze(-1)
        else:
            x = torch.linalg.solve_triangular(self.scale, e.unsqueeze(-1), upper=False).squeeze(-1)
        x = x.flatten(-2)
        return x, -self._log_det().expand(x.shape[:-1])

    def _log_det(self) -> Tensor:
        return self.scale.diagonal(dim1=-2, dim2=-1).abs().log().sum((-2, -1))


def recur(matrix: Tensor, x: Tensor) -> Tensor:
    """Return e with e_t = A_t e_{t-1} + x_t and e_{-1} = 0.

    Args:
        matrix: The matrices A, ``(*batch, T, d, d)``; the first does not count.
        x: The inputs, ``(*batch, T, d)``.
    """
    steps = x.shape[-2]
    if steps == 1:
        return x.expand(torch.broadcast_shapes(x.shape, matrix.shape[:-1]))
    pairs = steps // 2
    first, second = matrix[..., 0 : 2 * pairs : 2, :, :], matrix[..., 1::2, :, :]
    even, odd = x[..., 0::2, :], x[..., 1::2, :]
    odd = recur(multiplied(second, first), odd + applied(second, even[..., :pairs, :]))
    even = even + applied(matrix[..., 0::2, :, :], before(odd, steps - pairs))
    both = torch.stack((even[..., :pairs, :], odd), -2).flatten(-3, -2)
    return both if steps == 2 * pairs else torch.cat((both, even[..., pairs:, :]), -2)


def before(e: Tensor, steps: int | None = None) -> Tensor:
    """Return the step before each step, ``(*batch, T, d)``, zero before the first; by default as many steps."""
    return F.pad(e, (0, 0, 1, 0))[..., : e.shape[-2] if steps is None else steps, :]


def applied(matrix: Tensor, x: Tensor) -> Tensor:
    """Return matrices times vectors, ``(*batch, d, d), (*batch, d) -> (*batch, d)``."""
    if x.shape[-1] == 1:
        return matrix.squeeze(-1) * x
    if x.shape[-1] <= SMALL:
        return (matrix * x.unsqueeze(-2)).sum(-1)
    return torch.einsum("...ij,...j->...i", matrix, x)


def multiplied(left: Tensor, right: Tensor) -> Tensor:
    """Return products of matrices ``(*batch, d, d)``."""
    if left.shape[-1] <= SMALL:
        return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)
    return left @ right
