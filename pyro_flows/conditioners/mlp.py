"""Multilayer perceptrons, the conditioners of coupling layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..arguments import check_flags
from .base import Conditioner, activation_of
from .pace import Linear

POINTS = 16  # an even number: the mirror image of each point is a point


class MLP(Conditioner):
    """A fully connected network from ``(*batch, input_dim)`` to parameters ``(*batch, output_dim, num_params)``::

        h_1 = a(W_1 x + b_1 + U c),    h_l = a(W_l h_{l-1} + b_l),    θ = W h_L + b

    It conditions couplings and, with contexts in place of x, conditional elementwise maps.

    Args:
        input_dim: The number of inputs; with 0 the parameters depend on the context alone.
        output_dim: The number of features that receive parameters.
        num_params: The number of parameters of each feature (``bijector.num_params``).
        hidden_dims: The widths of the hidden layers, at least one.
        context_dim: The number of context features.
        activation: The class of the elementwise nonlinearity.
        residual: Add its input to each hidden layer that keeps the width (He et al. 2015, arXiv:1512.03385).
        skip: Add a linear map of the inputs, and of as many products of two as the first layer is wide; it starts at
            zero too.  Functions that are nearly linear, or bilinear, are then learned to a precision that few units
            reach.
        centered: Subtract from h_L its mean over 16 normal points.  Then b sets the mean of the parameters, and W their
            dependence on x.  A gradient that is the same for all x mostly changes b.  Not with a context or ``skip``.

    Raises:
        ValueError: If a size is out of its range, or ``centered`` is combined with a context or ``skip``.  In use, if
            the network takes contexts and none is given.

    Example::

        >>> import torch
        >>> net = MLP(2, 3, num_params=5, hidden_dims=(16, 16), context_dim=4)
        >>> net(torch.randn(7, 2), torch.randn(4)).shape
        torch.Size([7, 3, 5])
        >>> net(torch.randn(7, 2))
        Traceback (most recent call last):
        ValueError: MLP: context is missing; this network takes contexts of width 4.
    """

    points: Tensor

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        num_params: int,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        *,
        activation: type[nn.Module] = nn.ReLU,
        residual: bool = False,
        skip: bool = False,
        centered: bool = False,
    ) -> None:
        super().__init__(input_dim, output_dim, num_params, hidden_dims, context_dim)
        check_flags("MLP", residual=residual, skip=skip, centered=centered)
        if centered and (skip or context_dim or not input_dim):
            got = f"got input_dim={input_dim}, context_dim={context_dim}, skip={skip}"
            raise ValueError(f"MLP: centered=True takes inputs alone, without skip, {got}. Leave centered out.")
        self.activation, self.residual, self.skip, self.centered = activation, residual, skip, centered
        widths = (input_dim, *self.hidden_dims)
        self.hidden = nn.ModuleList(Linear(n, m) for n, m in pairwise(widths))
        self.output = Linear(widths[-1], num_params * output_dim, zero=True)
        self.act = activation_of("MLP", activation)
        if centered:  # the same in any default dtype and on any device, and part of the state
            generator = torch.Generator().manual_seed(0)
            half = torch.randn(POINTS // 2, input_dim, generator=generator, dtype=torch.float32, device="cpu")
            self.register_buffer("points", torch.cat((half, -half)).to(self.output.weight))
        if skip:
            self.factors = Linear(input_dim, 2 * widths[1])
            self.direct = Linear(input_dim + widths[1], num_params * output_dim, bias=False, zero=True)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self._units(x, context)
        if self.centered:
            h = h - self._units(self.points, None).mean(0)
        params = self.output(h)
        if self.skip:
            a, b = self.factors(x).chunk(2, -1)
            params = params + self.direct(torch.cat((x, a * b), -1))
        return self.arranged(params)

    def _units(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return the last hidden layer."""
        first, *others = self.hidden
        h = self.act(self.add_context(first(x), context))
        for layer in others:
            update = self.act(layer(h))
            h = h + update if self.residual and update.shape == h.shape else update
        return h
