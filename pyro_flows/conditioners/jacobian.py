"""The Jacobian of a multilayer perceptron in factors, never multiplied out: J = W_L S_{L-1} W_{L-1} … S_1 W_1.

S_l is the diagonal matrix of the slopes of layer l at an input.  Determinant and inverse of I + J cost as much as in
the narrowest layer, also if it is an inner one.  Let J = A B, where B ends at the narrowest layer.  Then

    det(I + A B) = det(I + B A) (Sylvester 1851),   (I + A B)⁻¹ = I - A (I + B A)⁻¹ B (Woodbury 1950).

In B A, W_1 and W_L form one product that does not depend on the input.

The same holds for the trace.  With two hidden layers it is a bilinear form of their slopes s_1 and s_2,

    tr J = s_2ᵀ (W_2 ∘ (W_1 W_3)ᵀ) s_1,

whose matrix is the same for all inputs.  So it costs one pass of a layer, and not D passes of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Jacobian(NamedTuple):
    """The Jacobian J = W_L S_{L-1} … S_1 W_1 at each of a batch of inputs."""

    weights: Sequence[Tensor]  # (n_l, n_{l-1}), shared by the batch
    slopes: Sequence[Tensor]  # (*batch, n_l)

    def push(self, v: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Map vectors, ``(*batch, n_start)``, from one layer up to another; by default to J v."""
        for weight, slope in self._layers(start, stop):
            v = v @ weight.mT
            v = v if slope is None else v * slope
        return v

    def transposed(self) -> Jacobian:
        """Return Jᵀ, which has the same form."""
        return Jacobian([weight.mT for weight in reversed(self.weights)], self.slopes[::-1])

    def pull(self, v: Tensor) -> Tensor:
        """Map covectors, ``(*batch, D)``, to Jᵀ v."""
        return self.transposed().push(v)

    def ring(self) -> Jacobian:
        """Return B A, where B ends at the narrowest layer: det(I + B A) and the traces of its powers are those of J."""
        w, s, k = self.weights, self.slopes, self._waist()
        return self if k == 0 else Jacobian([*w[k:-1], w[0] @ w[-1], *w[1:k]], [*s[k:], *s[:k]])

    def log_det(self) -> Tensor:
        """Return log det(I + J), ``(*batch)``."""
        return torch.linalg.slogdet(self._core()).logabsdet

    def trace(self) -> Tensor:
        """Return tr J, ``(*batch)``; with at most two hidden layers it costs one pass, for any number of inputs."""
        first, *others, last = self.weights
        if not others:
            return self.slopes[0] @ (first * last.mT).sum(-1)
        if len(others) == 1:
            return ((self.slopes[1] @ (others[0] * (first @ last).mT)) * self.slopes[0]).sum(-1)
        return (_transposed_product(self._layers()[:-1]) * last).sum((-2, -1))

    def solve(self, v: Tensor) -> Tensor:
        """Return (I + J)⁻¹ v for vectors v, ``(*batch, D)``."""
        k = self._waist()
        z = torch.linalg.solve(self._core().mT, self.push(v, 0, k).unsqueeze(-1)).squeeze(-1)
        return v - self.push(z, k) if k else z

    def _core(self) -> Tensor:
        """Return (I + B A)ᵀ, ``(*batch, n, n)`` for a narrowest layer of width n."""
        rows = _transposed_product(self.ring()._layers())
        return rows + torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)

    def _waist(self) -> int:
        """Return the number of the narrowest layer; the input is layer 0."""
        widths = [weight.shape[-1] for weight in self.weights]
        return widths.index(min(widths))

    def _layers(self, start: int = 0, stop: int | None = None) -> list[tuple[Tensor, Tensor | None]]:
        slopes = [*self.slopes, None][: len(self.weights)]
        return list(zip(self.weights, slopes, strict=True))[start:stop]


def _transposed_product(layers: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Return the transposed matrix of layers, ``(*batch, n_start, n_stop)``; row i is the image of unit vector i."""
    rows = layers[0][0].mT.contiguous()  # products with a transposed view are slow
    for place, (weight, slope) in enumerate(layers):
        rows = rows @ weight.mT if place else rows
        rows = rows if slope is None else rows * slope.unsqueeze(-2)
    return rows


def _silu_slope(a: Tensor, h: Tensor) -> Tensor:
    gate = torch.sigmoid(a)
    return gate + h * (1 - gate)


# The slopes of activations h(a), as functions of a and h.
SMOOTH: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.ELU: lambda a, h: h.clamp_max(0) + 1,
    nn.SiLU: _silu_slope,
    nn.Softplus: lambda a, h: torch.sigmoid(a),
    nn.Tanh: lambda a, h: 1 - h * h,
}
SLOPES = {**SMOOTH, nn.ReLU: lambda a, h: h.sign()}
