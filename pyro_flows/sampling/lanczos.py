"""The method of Lanczos: extreme directions of a symmetric matrix that is known by its products with vectors alone.

An Iteration Method for the Solution of the Eigenvalue Problem of Linear Differential and Integral Operators (Lanczos
1950, J. Res. Nat. Bur. Standards 45).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HUGE = 1e15  # the largest number of a product
FAINT, RESTARTS = 1e-4, 3  # a length that is round-off, and new vectors after such


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return orthonormal directions Q, ``(D, R)``, and ascending numbers, ``(R,)``, with Qᵀ H Q their diagonal matrix.

    If the first vector lies in the span of few eigenvectors, there are fewer directions.

    Args:
        product: The product of H with a vector, ``(D,) -> (D,)``.
        start: The first vector, ``(D,)``; a random one if it is zero or not finite.
        rank: The largest number R of directions.

    Returns:
        Q and the numbers, or None if a product is not finite.
    """
    vector, restarts = start / start.abs().max(), 0  # whose square may overflow
    vector = vector if bool(vector.isfinite().all()) else torch.randn_like(start)
    basis = start.new_zeros(min(rank, len(start)), len(start))
    diagonal: list[float] = []
    beside: list[float] = []
    for place in range(len(basis)):
        basis[place] = vector / vector.norm()
        image = product(basis[place])
        if not bool(image.isfinite().all()) or float(image.abs().max()) > HUGE:
            return None
        diagonal.append(float(basis[place] @ image))
        known = basis[: place + 1]
        vector = _across(image, known)
        beside.append(float(vector.norm()))
        if beside[-1] <= FAINT * max(map(abs, diagonal)):  # the space is complete: look for others
            if restarts == RESTARTS:
                basis = known
                break
            beside[-1], restarts = 0.0, restarts + 1
            vector = _across(torch.randn_like(start), known)
    ends = torch.tensor(beside[: len(basis) - 1], dtype=torch.float64)
    matrix = torch.tensor(diagonal, dtype=torch.float64).diag() + ends.diag(1) + ends.diag(-1)
    values, vectors = torch.linalg.eigh(matrix)
    return basis.T @ vectors.to(basis), values.to(basis)


def _across(vector: Tensor, known: Tensor) -> Tensor:
    """Return what is left of a vector without its parts along orthonormal rows, ``(n, D)``."""
    for _ in range(2):  # once loses orthogonality to round-off
        vector = vector - (known @ vector) @ known
    return vector
