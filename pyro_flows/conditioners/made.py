"""Masked autoencoder: the parameters of a feature depend on the features of lower rank alone.

A hidden unit of degree m sees the features of rank < m and feeds the features of rank >= m.  Units are sorted by
degree, so the units that one more feature unlocks lie side by side: the network can be run *incrementally*, one
feature at a time, in about the work of one pass (:func:`stream`), and so can its transposed Jacobian
(:func:`costream`).

MADE: Masked Autoencoder for Distribution Estimation (Germain, Gregor, Murray, Larochelle 2015, arXiv:1502.03509).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .base import Conditioner, MaskedLinear


class MADE(Conditioner):
    """An autoregressive network, in any feature order and with hidden layers of any width.

    Args:
        input_dim: The number D of features.
        num_params: The number of parameters of each feature (``bijector.num_params``).
        hidden_dims: The widths of the hidden layers, at least one; they may be narrower than the input.
        context_dim: The number of context features; every unit may see them.
        order: ``order[i]`` is the rank of feature i, a permutation of 0 … D - 1; by default the features' own order.
        activation: The class of the elementwise nonlinearity.

    Example::

        >>> import torch
        >>> net = MADE(3, num_params=2, hidden_dims=(16,), order=(2, 1, 0))
        >>> net(torch.randn(7, 3)).shape
        torch.Size([7, 3, 2])
    """

    order: Tensor
    hidden: Sequence[MaskedLinear]

    def __init__(
        self,
        input_dim: int,
        num_params: int,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        *,
        order: Sequence[int] | None = None,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(input_dim, input_dim, num_params, hidden_dims, context_dim)
        order = range(input_dim) if order is None else [int(rank) for rank in order]
        if sorted(order) != list(range(input_dim)):
            raise ValueError(f"MADE: order must be a permutation of 0 … {input_dim - 1}, got {list(order)}.")
        self.activation = activation
        self.act = activation()
        widths = (input_dim, *self.hidden_dims)
        self.hidden = nn.ModuleList(MaskedLinear(n, m) for n, m in pairwise(widths))  # type: ignore[assignment]
        self.output = MaskedLinear(widths[-1], num_params * input_dim, zero=True)
        lowest = min(0 if context_dim else 1, input_dim - 1)
        self.degrees = [_degrees(width, lowest, input_dim - 1) for width in self.hidden_dims]
        # unlocked[l][r]: how many units of hidden layer l have degree r, and so wait for r features
        self.unlocked = [[degrees.count(r) for r in range(input_dim)] for degrees in self.degrees]
        self.register_buffer("order", torch.tensor(list(order)))
        self._set_masks()
        self.register_load_state_dict_post_hook(_restore_masks)

    def _set_masks(self) -> None:
        """Derive the masks and the sequence of features from ``order``, which alone is part of the state."""
        device = self.order.device
        self.features: tuple[int, ...] = tuple(torch.argsort(self.order).tolist())  # the feature of each rank
        seen = self.order
        for layer, degrees in zip(self.hidden, self.degrees, strict=True):
            rank = torch.tensor(degrees, device=device)
            above = rank[:, None] > seen if seen is self.order else rank[:, None] >= seen
            layer.mask = above.to(layer.weight)
            seen = rank
        fed = self.order[:, None] >= seen  # (D, H)
        self.output.mask = fed.repeat(self.num_params, 1).to(self.output.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        first, *others = self.hidden
        h = self.act(self.add_context(first(x), context))
        for layer in others:
            h = self.act(layer(h))
        return self._output(h)

    def _output(self, h: Tensor) -> Tensor:
        return self.output(h).unflatten(-1, (self.num_params, self.output_dim)).mT

    def params_and_slopes(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The parameters ``(N, D, P)``, with their graph, and each layer's derivatives of the activation ``(H, N)``."""
        slopes = []
        with torch.enable_grad():
            h = x.detach().requires_grad_()
            for number, layer in enumerate(self.hidden):
                a = layer(h) if number else self.add_context(layer(h), context)
                h = self.act(a)
                slopes.append(torch.autograd.grad(h, a, torch.ones_like(h), retain_graph=True)[0].T.contiguous())
            return self._output(h), slopes


def _degrees(width: int, lowest: int, highest: int) -> list[int]:
    """Ascending degrees, spread evenly over lowest … highest, both ends included whenever there are two units."""
    span = highest - lowest + 1
    if width >= span:
        return [lowest + i * span // width for i in range(width)]
    return [lowest + round(i * (span - 1) / max(width - 1, 1)) for i in range(width)]


def _restore_masks(module: nn.Module, _: object) -> None:
    assert isinstance(module, MADE)
    module._set_masks()
