"""A multilayer perceptron as a vector field: it tells its velocities and, in factors, its Jacobian from one pass.

    v(t, x, c) = W_L h_{L-1} + b_L,   h_l = a(W_l h_{l-1} + b_l),   h_1 = a(W_1 x + b_1 + U τ(t) + V c),

with the first Fourier modes of time τ.  Free-form Jacobian of Reversible Dynamics (Grathwohl, Chen, Bettencourt,
Sutskever, Duvenaud 2018, arXiv:1810.01367).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..arguments import check_integers, check_sizes
from .activations import SMOOTH
from .base import Linear, Network, share_of
from .field import Derivative, Rates, VectorField
from .jacobian import Jacobian


class MLPField(Network, VectorField):
    """A multilayer perceptron as a vector field, zero at the start::

        v(t, x, c) = W_L h_{L-1} + b_L,    h_l = a(W_l h_{l-1} + b_l),    h_1 = a(W_1 x + b_1 + U τ(t) + V c)

    Time enters by its first Fourier modes τ, cos kπt and sin kπt, and with the context is added to the first hidden
    layer.  It knows its Jacobian: with one or two hidden layers the exact divergence costs no more than the field.

    FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl, Chen, Bettencourt,
    Sutskever, Duvenaud 2018, arXiv:1810.01367).

    Args:
        input_dim: The number D of features, at least 1.
        context_dim: The number of context features.
        hidden_dims: The widths of the hidden layers, at least one.
        frequencies: The number of Fourier modes of time, at least 1.
        activation: The class of the nonlinearity: ``torch.nn``'s ``ELU``, ``SiLU``, ``Softplus`` or ``Tanh``, whose
            slopes are continuous.
        pace: How far the parameters move in a step of an optimiser: see ``set_pace``.

    Raises:
        ValueError: If a size or ``pace`` is out of its range, or ``activation`` is none of the four.  In use, if the
            field takes contexts and none is given.

    Example::

        >>> import torch
        >>> field = MLPField(2, context_dim=4)
        >>> t, x = torch.rand(7), torch.randn(7, 2)
        >>> v, jacobian = field.at(torch.randn(4))(t, x)
        >>> v.shape, jacobian.trace().shape
        (torch.Size([7, 2]), torch.Size([7]))
    """

    hidden: Sequence[Linear]
    output: Linear

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        frequencies: int = 3,
        activation: type[nn.Module] = nn.SiLU,
        pace: float | None = None,
    ) -> None:
        super().__init__(input_dim, context_dim)
        check_sizes("MLPField", hidden_dims=hidden_dims)
        check_integers("MLPField", frequencies=frequencies)
        self.hidden_dims = tuple(hidden_dims)
        self.cheap_trace = len(self.hidden_dims) <= 2  # then the divergence costs about as much as the field itself
        self.frequencies = frequencies
        self.activation = activation
        if not isinstance(activation, type) or activation not in SMOOTH:
            names = ", ".join(known.__name__ for known in SMOOTH)
            raise ValueError(
                f"MLPField: activation must be a class of torch.nn with continuous slopes, one of {names}, "
                f"got {activation!r}; for others write a VectorField of your own."
            )
        layers = nn.ModuleList(Linear(n, m) for n, m in pairwise((input_dim, *self.hidden_dims)))
        self.hidden = layers  # type: ignore[assignment]
        self.output = Linear(self.hidden_dims[-1], input_dim, zero=True)
        self.act = activation()
        self.from_time = Linear(2 * frequencies, self.hidden_dims[0], bias=False)
        self.from_context = Linear(context_dim, self.hidden_dims[0], bias=False) if context_dim else None
        self.set_pace(pace)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        first, *others = self.hidden
        h = self.act(first(x) + self._shift(t, share_of(self, context)))
        for layer in others:
            h = self.act(layer(h))
        return self.output(h)

    def at(self, context: Tensor | None = None) -> Rates:
        weights = [*(layer.matrix() for layer in self.hidden), self.output.matrix()]
        share = share_of(self, context)
        value_and_slope = SMOOTH[self.activation]

        def rates(t: Tensor, x: Tensor) -> tuple[Tensor, Derivative]:
            first, *others = self.hidden
            h, slope = value_and_slope(first(x) + self._shift(t, share))
            slopes = [slope]
            for layer in others:
                h, slope = value_and_slope(layer(h))
                slopes.append(slope)
            return self.output(h), Jacobian(weights, slopes)

        return rates

    def _shift(self, t: Tensor, share: Tensor | None) -> Tensor:
        """Return what the time and the context add to the first hidden layer."""
        modes = math.pi * torch.arange(1, self.frequencies + 1, dtype=t.dtype, device=t.device)
        phases = modes * t.unsqueeze(-1)
        of_time = self.from_time(torch.cat((phases.cos(), phases.sin()), -1))
        return of_time if share is None else of_time + share
