"""A convolutional network along a sequence, with learned vectors of each step: the conditioner of Markov processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import as_flags, check_integers
from .base import Conditioner, activation_of
from .pace import Linear


class StepNet(Conditioner):
    """A convolutional network along the T steps of a sequence of vectors ``(d,)``::

        h_t = a(W_0 [x_{t-1}, x_t, x_{t+1}] + v_t + U c),    h_t ← h_t + a(W_l [h_{t-1}, h_t, h_{t+1}]) layer by layer
        θ_t = W h_t + w_t

    All steps share the weights W; the vectors v and w are learned for each step.  It takes the features of a vector
    ``(T d,)``, one step after the other, that condition a coupling, and returns the parameters of the others.  Time and
    memory are proportional to T.

    Args:
        mask: For each of the T d features, True if it is an input, False if it receives parameters.
        steps: The number T of steps.
        num_params: The number of parameters of each feature (``bijector.num_params``).
        hidden_dims: The widths of the hidden layers, at least one; all are alike.
        context_dim: The number of context features, which are the same for all steps.
        activation: The class of the elementwise nonlinearity.

    Raises:
        ValueError: If a size is out of its range, the mask does not divide into the steps or has no False, or the
            widths differ.  In use, if the network takes contexts and none is given.

    Example::

        >>> import torch
        >>> net = StepNet([True, False] * 50, steps=100, num_params=2, hidden_dims=(8, 8), context_dim=3)
        >>> net(torch.randn(7, 50), torch.randn(3)).shape
        torch.Size([7, 50, 2])
    """

    mask: Tensor
    source: Tensor
    taken: Tensor

    def __init__(
        self,
        mask: Sequence[bool] | Tensor,
        steps: int,
        num_params: int,
        hidden_dims: Sequence[int] = (16,),
        context_dim: int = 0,
        *,
        activation: type[nn.Module] = nn.ELU,
    ) -> None:
        mask = as_flags("StepNet", "mask", mask)
        check_integers("StepNet", steps=steps)
        if len(mask) % steps or mask.all():
            raise ValueError(f"StepNet: mask must hold {steps} steps and a False, got {len(mask)} flags.")
        kept = int(mask.sum())
        super().__init__(kept, len(mask) - kept, num_params, hidden_dims, context_dim)
        width, *others = self.hidden_dims
        if {*others} - {width}:
            raise ValueError(f"StepNet: hidden_dims must be alike, got {self.hidden_dims}.")
        self.steps, self.activation = steps, activation
        self.register_buffer("mask", mask)
        self._set_places()
        self.register_load_state_dict_post_hook(StepNet._set_places)
        features = len(mask) // steps
        self.first = Linear(3 * features, width, bias=False) if kept else None
        self.inner = nn.ModuleList(Linear(3 * width, width) for _ in others)
        self.output = Linear(width, num_params * features, zero=True)
        self.vectors = nn.Parameter(torch.randn(steps, width) / 2)
        self.table = nn.Parameter(torch.zeros(self.output_dim, num_params))
        self.act = activation_of("StepNet", activation)

    def _set_places(self, _keys: object = None) -> None:
        """Find the places of features from the mask, also when a state is loaded."""
        self.register_buffer("taken", (~self.mask).nonzero().flatten(), persistent=False)
        source = torch.where(self.mask, self.mask.cumsum(0) - 1, self.mask.sum())  # the last place holds a zero
        self.register_buffer("source", source, persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h: Tensor = self.vectors
        if self.first is not None:
            grid = F.pad(x, (0, 1))[..., self.source]
            h = h + self.first(_windows(grid.unflatten(-1, (self.steps, -1))))
        h = self.act(self.add_context(h, None if context is None else context.unsqueeze(-2)))
        for layer in self.inner:
            h = h + self.act(layer(_windows(h)))
        params = self.output(h).unflatten(-1, (-1, self.num_params)).flatten(-3, -2)
        return params[..., self.taken, :] + self.table


def _windows(h: Tensor) -> Tensor:
    """Return each step with its neighbours, ``(*batch, T, d) -> (*batch, T, 3 d)``; zeros lie beyond the ends."""
    padded = F.pad(h, (0, 0, 1, 1))
    return torch.cat((padded[..., :-2, :], h, padded[..., 2:, :]), -1)
