"""Coupling: the map of one part of the features depends on the other part, which stays the same."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import BIJECTOR, as_flags, check_kind, require
from ..bijectors import Bijector
from ..conditioners import Conditioner
from ..vjp import keeps, vjp
from .base import TwoWay, WithScore
from .elementwise import check_conditioner


class Coupling(TwoWay):
    """A coupling layer over the features of a vector ``(D,)``, or over the channels of an image ``(C, H, W)``::

        y_A = x_A,    y_B = f(x_B; θ(x_A, c)),    log|det dy/dx| = Σ_B log f'(x_B; θ)

    The map of part B of the features depends on part A, which stays the same.  Both directions cost one pass of the
    network.  A checkerboard over the pixels of an image is a choice of channels once it is :class:`Squeezed`.

    NICE (Dinh, Krueger, Bengio 2014, arXiv:1410.8516); Density Estimation Using Real NVP (Dinh, Sohl-Dickstein, Bengio
    2016, arXiv:1605.08803).

    Args:
        bijector: The map of the features that are transformed.
        conditioner: A network from the other features to the parameters; ``conditioner.size`` is the shape of a
            feature: ``()`` in a vector, ``(H, W)`` where features are channels.
        mask: For each feature, True if it conditions and stays the same, False if it is transformed.

    Raises:
        ValueError: If the mask has no True or no False, or the conditioner's sizes do not fit it or the bijector.  In
            use, if the conditioner takes contexts and none is given.

    Example::

        >>> import torch
        >>> from pyro_flows.bijectors import Affine
        >>> from pyro_flows.conditioners import MLP
        >>> coupling = Coupling(Affine(), MLP(2, 1, num_params=2), mask=[True, False, True])
        >>> _ = torch.nn.init.normal_(coupling.conditioner.output.weight)  # as if trained
        >>> x = torch.randn(5, 3)
        >>> y, log_det = coupling.forward_and_log_det(x)
        >>> torch.equal(y[:, [0, 2]], x[:, [0, 2]]), log_det.shape
        (True, torch.Size([5]))
        >>> torch.allclose(coupling.inverse_and_log_det(y)[0], x, atol=1e-3)
        True
    """

    mask: Tensor

    def __init__(self, bijector: Bijector, conditioner: Conditioner, mask: Sequence[bool] | Tensor) -> None:
        check_kind("Coupling", Bijector, BIJECTOR, bijector=bijector)
        mask = as_flags("Coupling", "mask", mask)
        kept = int(mask.sum())
        require(0 < kept < len(mask), "Coupling", "mask", "be a vector with both True and False", mask.tolist())
        check_conditioner("Coupling", conditioner, (len(mask) - kept, bijector.num_params))
        must = f"take the {kept} features that condition"
        require(conditioner.input_dim == kept, "Coupling", "conditioner", must, conditioner.input_dim)
        super().__init__((len(mask), *conditioner.size), conditioner.context_dim)
        self.bijector, self.conditioner = bijector, conditioner
        self.register_buffer("mask", mask)
        self._set_places()
        self.register_load_state_dict_post_hook(Coupling._set_places)

    def _set_places(self, _keys: object = None) -> None:
        """Find the places of features from the mask, also when a state is loaded."""
        kept, mapped = self.mask.nonzero().flatten(), (~self.mask).nonzero().flatten()
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("mapped", mapped, persistent=False)
        self.register_buffer("restore", torch.argsort(torch.cat((kept, mapped))), persistent=False)
        # Two runs, such as the halves of an image's channels, are split without a copy and joined by one.
        self._kept_first, sizes = bool(self.mask[0]), (len(kept), len(mapped))
        in_runs = (self.mask[1:] != self.mask[:-1]).sum() == 1
        self._runs = (sizes if self._kept_first else sizes[::-1]) if in_runs else None

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        kept, mapped = self.part(value)
        mapped, log_det = self.bijector.verb(inverse)(mapped, self.conditioner(kept, context))
        return self.join(kept, mapped), self.sum_event(log_det)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> WithScore:
        if not keeps(self, Coupling, "forward_and_log_det"):
            return super().forward_and_score(x, score, context)
        # The Jacobian is block triangular, so its transpose is solved in this pass, without a way back.
        kept, mapped = self.part(x)
        y, log_det = self.bijector.forward_and_log_det(mapped, self.conditioner(kept, context))
        ones = torch.ones_like(log_det)
        of_kept, of_mapped = self.part(score)
        of_mapped = (of_mapped - vjp((log_det,), (mapped,), (ones,))[0]) * torch.exp(-log_det.detach())
        of_kept = of_kept - vjp((log_det, y), (kept,), (ones, of_mapped))[0]
        return self.join(kept, y), self.sum_event(log_det), self.join(of_kept, of_mapped)

    def part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split events into the features that condition and the features that are transformed."""
        dim = -len(self.event_shape)
        if self._runs is None:
            return _taken(x, dim, self.kept), _taken(x, dim, self.mapped)
        first, second = x.split(self._runs, dim)
        return (first, second) if self._kept_first else (second, first)

    def join(self, kept: Tensor, mapped: Tensor) -> Tensor:
        """Put the parts of events together again."""
        dim = -len(self.event_shape)
        kept = kept.expand(*mapped.shape[:dim], *kept.shape[dim:])
        if self._runs is None:
            return _taken(torch.cat((kept, mapped), dim), dim, self.restore)
        return torch.cat((kept, mapped) if self._kept_first else (mapped, kept), dim)


def _taken(x: Tensor, dim: int, places: Tensor) -> Tensor:
    """Return some features of x."""
    # ``index_select`` along the last dimension takes five times as long as ``gather`` in double precision.
    if dim == -1 and x.dtype == torch.float64:
        return x.gather(-1, places.expand(*x.shape[:-1], -1))
    return x.index_select(dim, places)
