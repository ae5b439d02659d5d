"""Coupling: one part of the features steers the other, y_A = x_A, y_B = f(x_B; θ(x_A, context)).

Both directions cost one pass of the network.  NICE (Dinh, Krueger, Bengio 2014, arXiv:1410.8516); Real NVP (Dinh,
Sohl-Dickstein, Bengio 2016, arXiv:1605.08803).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..bijectors import Bijector
from ..conditioners import Conditioner
from .base import FlowTransform
from .elementwise import check_params


class Coupling(FlowTransform):
    """A coupling layer over the features of a vector.

    Args:
        bijector: The map of the features that are transformed.
        conditioner: A network from the other features to the parameters.
        mask: For each feature, True where it conditions and stays as it is, False where it is transformed.

    Raises:
        ValueError: If the mask has no True or no False, or the conditioner's sizes do not fit it.

    Example::

        >>> import torch
        >>> from pyro_flows.bijectors import Affine
        >>> from pyro_flows.conditioners import MLP
        >>> coupling = Coupling(Affine(), MLP(2, 1, num_params=2), mask=[True, False, True])
        >>> y, log_det = coupling.forward_and_log_det(torch.randn(5, 3))
        >>> y.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    mask: Tensor

    def __init__(self, bijector: Bijector, conditioner: Conditioner, mask: Sequence[bool] | Tensor) -> None:
        mask = torch.as_tensor(mask, dtype=torch.bool)
        if mask.dim() != 1 or mask.all() or not mask.any():
            raise ValueError(f"Coupling: mask must be a vector with both True and False, got {mask.tolist()}.")
        super().__init__((len(mask),), conditioner.context_dim)
        check_params("Coupling", bijector, conditioner, int((~mask).sum()))
        if conditioner.input_dim != int(mask.sum()):
            raise ValueError(
                f"Coupling: {int(mask.sum())} features condition, but the conditioner takes {conditioner.input_dim}."
            )
        self.bijector = bijector
        self.conditioner = conditioner
        self.register_buffer("mask", mask)
        self._set_indices()
        self.register_load_state_dict_post_hook(_restore_indices)

    def _set_indices(self) -> None:
        kept, mapped = self.mask.nonzero().flatten(), (~self.mask).nonzero().flatten()
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("mapped", mapped, persistent=False)
        self.register_buffer("restore", torch.argsort(torch.cat((kept, mapped))), persistent=False)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_verb(self.bijector.forward_and_log_det, x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_verb(self.bijector.inverse_and_log_det, y, context)

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The Jacobian is triangular by blocks, so its transpose is solved in the pass at hand, without a way back.
        kept, mapped = x.index_select(-1, self.kept), x.index_select(-1, self.mapped)
        y, log_det = self.bijector.forward_and_log_det(mapped, self.conditioner(kept, context))
        ones = torch.ones_like(log_det)
        of_mapped = score.index_select(-1, self.mapped) - _gradient([(log_det, ones)], mapped)
        of_mapped = of_mapped * torch.exp(-log_det.detach())
        of_kept = score.index_select(-1, self.kept) - _gradient([(log_det, ones), (y, of_mapped)], kept)
        return self._join(kept, y), log_det.sum(-1), self._join(of_kept, of_mapped)

    def _join(self, kept: Tensor, mapped: Tensor) -> Tensor:
        kept = kept.expand(*mapped.shape[:-1], kept.shape[-1])
        return torch.cat((kept, mapped), -1).index_select(-1, self.restore)

    def _apply_verb(
        self, verb: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        kept = x.index_select(-1, self.kept)
        mapped, log_det = verb(x.index_select(-1, self.mapped), self.conditioner(kept, context))
        return self._join(kept, mapped), log_det.sum(-1)


def _gradient(weighted: list[tuple[Tensor, Tensor]], of: Tensor) -> Tensor:
    """The gradient of a weighted sum; the log-determinant of a shift, for one, is constant and adds nothing."""
    moving = [(output, weight) for output, weight in weighted if output.requires_grad]
    if not moving:
        return torch.zeros_like(of)
    outputs, weights = zip(*moving, strict=True)
    return torch.autograd.grad(outputs, of, weights, retain_graph=True, materialize_grads=True)[0]


def _restore_indices(module: nn.Module, _: object) -> None:
    assert isinstance(module, Coupling)
    module._set_indices()
