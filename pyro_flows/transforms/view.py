"""A transform at a context, for torch's own classes, which ask for a value and its log-determinant one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Transform

from .snapshot import Snapshot, can_be_kept

if TYPE_CHECKING:
    from .base import FlowTransform


class View(Transform):
    """A transform at a context, as torch's :class:`~torch.distributions.TransformedDistribution` wants it.

    torch asks for a value and then for the log-determinant of the pair (x, y).  So a view keeps the log-determinant of
    the pair that it made last, and gives it away once, when it is asked about these two tensors and no number that it
    depends on has changed.  Values are always computed.

    Args:
        transform: The transform.
        context: ``(*batch, context_dim)``, or None.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import LULinear
        >>> view, x = View(LULinear(3)), torch.ones(5, 3)
        >>> y = view(x)
        >>> view.log_abs_det_jacobian(x, y).shape  # without a second evaluation
        torch.Size([5])
    """

    bijective = True

    def __init__(self, transform: FlowTransform, context: Tensor | None = None) -> None:
        super().__init__()
        self.domain, self.codomain = transform.domain, transform.codomain
        self.transform = transform
        self.context = context
        # The last pair y = t(x), its log|det dy/dx|, the grad mode, and the tensors that it depends on.
        self._pair: tuple[Tensor, Tensor, Tensor, bool, Snapshot] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y, log_det = self.transform.forward_and_log_det(x, self.context)
        self._keep(x, y, log_det)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        x, log_det = self.transform.inverse_and_log_det(y, self.context)
        self._keep(x, y, -log_det)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        pair, self._pair = self._pair, None
        if pair is not None:
            of_x, of_y, log_det, grad_mode, snapshot = pair
            if of_x is x and of_y is y and grad_mode == torch.is_grad_enabled() and snapshot.holds():
                return log_det
        return self.transform.log_abs_det_jacobian(x, y, self.context)

    def with_cache(self, cache_size: int = 1) -> View:
        """Itself: a view always keeps the log-determinant of one pair."""
        return self

    def _keep(self, x: Tensor, y: Tensor, log_det: Tensor) -> None:
        if can_be_kept():
            depends = [x, y] if self.context is None else [x, y, self.context]
            self._pair = x, y, log_det, torch.is_grad_enabled(), Snapshot([self.transform], depends)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pair": None}
