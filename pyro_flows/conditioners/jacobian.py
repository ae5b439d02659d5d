"""The Jacobian of a multilayer perceptron in factors, never multiplied out: J = W_L S_{L-1} W_{L-1} … S_1 W_1.

S_l holds the slopes of layer l at an input.  Determinant and inverse of I + J cost what they cost in the narrowest
layer, be it an inner one: with J = A B, where B leads there, det(I + A B) = det(I + B A) (Sylvester 1851), and
(I + A B)⁻¹ = I - A (I + B A)⁻¹ B (Woodbury 1950).  W_1 and W_L then meet in one product that no input enters.  So they
do in the trace, which with two hidden layers is a bilinear form of their slopes s_1 and s_2,

    tr J = s_2ᵀ (W_2 ∘ (W_1 W_3)ᵀ) s_1,

whose matrix is the same for all inputs: one pass of a layer, and not D of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Jacobian(NamedTuple):
    """The Jacobian J = W_L S_{L-1} … S_1 W_1 at each of a batch of inputs."""

    weights: Sequence[Tensor]  # (n_l, n_{l-1}), shared by the batch
    slopes: Sequence[Tensor]  # (*batch, n_l)

    def push(self, v: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Carry vectors, ``(*batch, n_start)``, from one layer up to another; by default J v."""
        for weight, slope in self._layers(start, stop):
            v = v @ weight.mT
            v = v if slope is None else v * slope
        return v

    def pull(self, v: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Carry covectors, ``(*batch, n_stop)``, from one layer down to another; by default Jᵀ v."""
        for weight, slope in reversed(self._layers(start, stop)):
            v = (v if slope is None else v * slope) @ weight
        return v

    def ring(self) -> Jacobian:
        """The factors once around from the waist, B A: det(I + B A) and the traces of its powers are those of J."""
        w, s, k = self.weights, self.slopes, self._waist()
        return self if k == 0 else Jacobian([*w[k:-1], w[0] @ w[-1], *w[1:k]], [*s[k:], *s[:k]])

    def log_det(self) -> Tensor:
        """log det(I + J), ``(*batch)``."""
        return torch.linalg.slogdet(self._core()).logabsdet

    def trace(self) -> Tensor:
        """tr J, ``(*batch)``; with up to two hidden layers at the cost of one pass, whatever the number of inputs."""
        first, *others = self.weights
        *others, last = others
        if not others:
            return self.slopes[0] @ (first * last.mT).sum(-1)
        if len(others) == 1:
            return ((self.slopes[1] @ (others[0] * (first @ last).mT)) * self.slopes[0]).sum(-1)
        rows = first.mT * self.slopes[0].unsqueeze(-2)  # row i is what unit vector i becomes, (*batch, D, n_1)
        for weight, slope in zip(others, self.slopes[1:], strict=True):
            rows = (rows @ weight.mT) * slope.unsqueeze(-2)
        return (rows * last).sum((-2, -1))

    def solve(self, v: Tensor) -> Tensor:
        """(I + J)⁻¹ v for vectors v, ``(*batch, D)``."""
        k = self._waist()
        z = torch.linalg.solve(self._core().mT, self.push(v, 0, k).unsqueeze(-1)).squeeze(-1)
        return v - self.push(z, k) if k else z

    def solve_transposed(self, v: Tensor) -> Tensor:
        """(I + Jᵀ)⁻¹ v for covectors v, ``(*batch, D)``."""
        k = self._waist()
        z = torch.linalg.solve(self._core(), (self.pull(v, k) if k else v).unsqueeze(-1)).squeeze(-1)
        return v - self.pull(z, 0, k) if k else z

    def _core(self) -> Tensor:
        """I + B A of the ring, transposed, ``(*batch, n, n)`` for a waist of width n."""
        first, *others = self.ring()._layers()
        rows = first[0].mT.contiguous()  # row i is what unit vector i becomes; in order, or products would be slow
        rows = rows if first[1] is None else rows * first[1].unsqueeze(-2)
        for weight, slope in others:
            rows = rows @ weight.mT
            rows = rows if slope is None else rows * slope.unsqueeze(-2)
        return rows + torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)

    def _waist(self) -> int:
        """The number of the narrowest layer; the input is layer 0."""
        widths = [weight.shape[-1] for weight in self.weights]
        return widths.index(min(widths))

    def _layers(self, start: int = 0, stop: int | None = None) -> list[tuple[Tensor, Tensor | None]]:
        slopes = [*self.slopes, None][: len(self.weights)]
        return list(zip(self.weights, slopes, strict=True))[start:stop]
