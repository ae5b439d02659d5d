"""Multilayer perceptrons whose Lipschitz constant is below a bound.

Each of the L matrices is divided by the factor by which it exceeds its share of the bound,

    W ← W / max(1, b(W) / c),   c = lipschitz^(1/L),   |W|₂ ≤ b(W) = |G_T|_F^(1/2^T),   G_0 = W,   G_{t+1} = G_t G_tᵀ,

where b is at most rank^(1/2^(T+1)) times the spectral norm.  A power iteration approaches that norm from below and
keeps vectors from one call to the next.  The bound b is guaranteed, differentiable, and the same in each mode.
The functions between the matrices are smooth, of slope at most one: h = a sigmoid(β a) / 1.1 with β > 0.  So the
Jacobian is

    J = W_L S_{L-1} W_{L-1} … S_1 W_1   with   |J|₂ ≤ lipschitz < 1,

where S_l is the diagonal matrix of the slopes of layer l.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import check_integers, check_numbers, check_sizes
from .base import share_of
from .jacobian import Jacobian
from .pace import zero_

GRAMS = 6  # T: at rank 64 the bound exceeds the spectral norm by 3 per cent at most
STEEPEST = 1.1  # the slope of a sigmoid(β a) is at most 1.09984, whatever β


class LipschitzMLP(nn.Module):
    """A network g from ``(*batch, D)`` to ``(*batch, D)`` whose slopes are bounded, zero at the start.

    It is the network of :class:`~pyro_flows.transforms.Residual`.  At any parameters and at each context, in the
    Euclidean norm ::

        |g(x) - g(x')| ≤ lipschitz |x - x'|,    lipschitz < 1

    A differentiable upper bound on the spectral norm of each of its L matrices is compared with ``lipschitz^(1/L)``,
    and the matrix is divided by the excess.  The functions between the matrices have slopes of at most one.  The
    context is added to the first hidden layer, without a bound.

    Residual Flows for Invertible Generative Modeling (Chen, Behrmann, Duvenaud, Jacobsen 2019, arXiv:1906.02735);
    Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram Iteration (Delattre, Barthélemy, Araujo,
    Allauzen 2023, arXiv:2305.16173).

    Args:
        input_dim: The number D of inputs and of outputs, at least 1.
        hidden_dims: The widths of the hidden layers, at least one.
        context_dim: The number of context features.
        lipschitz: The bound, between 0 and 1.

    Raises:
        ValueError: If an argument is out of its range.  In use, if the network takes contexts and none is given.

    Example::

        >>> import torch
        >>> net = LipschitzMLP(2, (16, 16))
        >>> _ = torch.nn.init.normal_(net.output.weight, std=1000.0)  # however steep the parameters are
        >>> x, other = torch.randn(2, 100, 2)
        >>> bool(((net(x) - net(other)).norm(dim=-1) <= 0.9001 * (x - other).norm(dim=-1)).all())
        True
    """

    def __init__(
        self, input_dim: int, hidden_dims: Sequence[int] = (64, 64), context_dim: int = 0, *, lipschitz: float = 0.9
    ) -> None:
        super().__init__()
        check_integers("LipschitzMLP", input_dim=input_dim)
        check_integers("LipschitzMLP", 0, context_dim=context_dim)
        check_sizes("LipschitzMLP", hidden_dims=hidden_dims)
        check_numbers("LipschitzMLP", above=0, below=1, lipschitz=lipschitz)
        self.input_dim, self.context_dim, self.lipschitz = input_dim, context_dim, lipschitz
        self.hidden_dims = tuple(hidden_dims)
        self.hidden = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise((input_dim, *self.hidden_dims)))
        self.output = zero_(nn.Linear(self.hidden_dims[-1], input_dim))
        self.from_context = nn.Linear(context_dim, self.hidden_dims[0], bias=False) if context_dim else None
        self.steepness = nn.Parameter(torch.full((len(self.hidden_dims),), 0.5))  # β = softplus, as in the paper

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return g(x).

        Args:
            x: Inputs of shape ``(*batch, D)``.
            context: Contexts of shape ``(*batch, context_dim)``, broadcast with ``x``, or None if ``context_dim`` is 0.

        Returns:
            Of shape ``(*batch, D)``.

        Raises:
            ValueError: If the network takes contexts and none is given.
        """
        return self.at(context).linearise(x)[0]

    def at(self, context: Tensor | None = None) -> Layers:
        """Return the network at a context, with its matrices within their bounds, for many evaluations.

        Args:
            context: As for :meth:`forward`.

        Returns:
            Layers with the method ``linearise(x)``, which returns g(x) and the Jacobian there, in factors.

        Raises:
            ValueError: If the network takes contexts and none is given.
        """
        layers = [*self.hidden, self.output]
        limit = self.lipschitz ** (1 / len(layers))
        weights = [layer.weight / (spectral_bound(layer.weight) / limit).clamp_min(1) for layer in layers]
        biases = [layer.bias for layer in layers]
        share = share_of(self, context)
        if share is not None:
            biases[0] = biases[0] + share
        return Layers(weights, biases, F.softplus(self.steepness).unbind())


class Layers(NamedTuple):
    """A network at a context: matrices within their bounds, biases, and a steepness β for each hidden layer."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    steepness: Sequence[Tensor]

    def linearise(self, x: Tensor) -> tuple[Tensor, Jacobian]:
        """Return the value g(x) and the Jacobian there."""
        slopes = []
        for weight, bias, beta in zip(self.weights[:-1], self.biases[:-1], self.steepness, strict=True):
            a = x @ weight.mT + bias  # (*batch, h)
            gate = torch.sigmoid(beta * a)
            x = a * gate / STEEPEST
            slopes.append(gate / STEEPEST + beta * x * (1 - gate))
        return x @ self.weights[-1].mT + self.biases[-1], Jacobian(self.weights, slopes)


def spectral_bound(matrix: Tensor) -> Tensor:
    """Return a differentiable upper bound on the largest singular value of a matrix, tight to some per cent."""
    gram = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    tiny = torch.finfo(matrix.dtype).tiny
    log_bound, share = matrix.new_zeros(()), 1.0
    for _ in range(GRAMS):
        # The scale, a constant to autograd, cancels from the result; without it the powers would overflow.
        scale = gram.detach().abs().amax().clamp_min(tiny)
        gram = gram / scale
        log_bound = log_bound + share * scale.log()
        gram, share = gram @ gram.mT, share / 2
    square = gram.square().sum().clamp_min(tiny)  # at zero, where a norm has no gradient, the clamp gives none
    return (log_bound + share / 2 * square.log()).exp()
