"""Algebra of many small lower triangular matrices, written out.

A matrix is a list of rows, up to the diagonal, of tensors of one shape: the entries of all matrices of a batch.  A
library's kernel is called for each matrix, and with two to four rows the calls take longer than the work.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

Triangle = Sequence[Sequence[Tensor]]
Vector = Sequence[Tensor]


def cholesky_of_one_plus(matrix: Triangle) -> Triangle:
    """Return the factors C with C Cᵀ = I + M, given the lower triangles of positive semidefinite matrices M.

    No pivot is below 1, whatever the rounding.
    """
    rows = list[list[Tensor]]()
    for i, given in enumerate(matrix):
        row = list[Tensor]()
        for j, rest in enumerate(given):
            for k in range(j):
                rest = rest - row[k] * (row if i == j else rows[j])[k]
            row.append((1 + rest).clamp_min(1).sqrt() if i == j else rest / rows[j][j])
        rows.append(row)
    return rows


def correlation_factor(free: Vector, size: int) -> Triangle:
    """Return the factors of correlation matrices, given their unconstrained numbers as torch and Pyro order them.

    Row i is a point on the unit sphere: L_ij = tanh(f_ij) √(1 - Σ_{k<j} L_ik²) for j < i.
    """
    rows, numbers = list[list[Tensor]](), iter(free)
    for i in range(size):
        row, rest = list[Tensor](), free[0].new_ones(()).expand_as(free[0])
        for _ in range(i):
            angle = next(numbers)
            row.append(angle.tanh() * rest)
            rest = rest / angle.cosh()
        rows.append([*row, rest])
    return rows


def times(triangle: Triangle, vector: Vector) -> Vector:
    """Return L v."""
    return [total(row[j] * vector[j] for j in range(i + 1)) for i, row in enumerate(triangle)]


def transposed_times(triangle: Triangle, vector: Vector) -> Vector:
    """Return Lᵀ v."""
    return [total(triangle[k][j] * vector[k] for k in range(j, len(triangle))) for j in range(len(triangle))]


def solve(triangle: Triangle, vector: Vector) -> Vector:
    """Return L⁻¹ v."""
    found = list[Tensor]()
    for row, rest in zip(triangle, vector, strict=True):
        for entry, known in zip(row, found, strict=False):
            rest = rest - entry * known
        found.append(rest / row[-1])
    return found


def transposed_solve(triangle: Triangle, vector: Vector) -> Vector:
    """Return L⁻ᵀ v."""
    found = dict[int, Tensor]()
    for j in reversed(range(len(triangle))):
        rest = vector[j]
        for k, known in found.items():
            rest = rest - triangle[k][j] * known
        found[j] = rest / triangle[j][j]
    return [found[j] for j in range(len(triangle))]


def congruent(triangle: Triangle, matrix: Sequence[Vector]) -> Triangle:
    """Return the lower triangles of Lᵀ M L for symmetric matrices M, given as all of their rows."""
    size = len(triangle)
    right = [[total(row[k] * triangle[k][j] for k in range(j, size)) for j in range(size)] for row in matrix]
    return [[total(triangle[k][i] * right[k][j] for k in range(i, size)) for j in range(i + 1)] for i in range(size)]


def total(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of some tensors, at least one."""
    first, *rest = parts
    return sum(rest, start=first)
