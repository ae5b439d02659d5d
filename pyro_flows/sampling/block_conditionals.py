"""Distributions of a block structure: each block is a Gaussian sequence given its parents.

Rows are independent given the latents of their parents, and a step of a sequence is coupled to its neighbours alone.
The precision matrix P has the same structure.  Elimination of the blocks, the last one first, turns it into the
distribution of each block given its parents, and costs as much as P has numbers.

One block may be the *root*, whose latents g all others share, such as the scale of a prior.  Given g the others are
Gaussian, with means, scales and gains that depend on g to first order.  So the whole is no Gaussian: it follows a
funnel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..transforms.recurrence import applied, before, recur


class Layout(NamedTuple):
    """The latents of a block in the packed vector.

    Attributes:
        places: Their places, ``(N, T, d)``, for N rows and T steps.
        parents: For each parent, its place among the blocks and the row of it that each row belongs to, ``(N,)``.
    """

    places: Tensor
    parents: tuple[tuple[int, Tensor], ...]


class Precision(NamedTuple):
    """The rows of a precision matrix that belong to a block.

    Attributes:
        diagonal: The block of each step, ``(N, T, d, d)``.
        lower: The block of each step and the one before it, ``(N, T, d, d)``; the first is zero.
        cross: For each parent the block of the row and of the parent's latents, ``(N, T d, d_p)``.
    """

    diagonal: Tensor
    lower: Tensor
    cross: tuple[Tensor, ...]

    def each(self, function: Callable[..., Tensor], *others: Precision) -> Precision:
        """Apply a function to each part, and to the same part of other precisions."""
        diagonal, lower = (function(*parts) for parts in zip(self[:2], *(other[:2] for other in others), strict=True))
        return Precision(diagonal, lower, tuple(map(function, self.cross, *(other.cross for other in others))))

    def damped(self, damping: float) -> Precision:
        """Return the precision of a root, positive definite, with its diagonal increased by a share."""
        matrix = _positive(self.diagonal)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        return self._replace(diagonal=matrix + torch.diag_embed(damping * diagonal))


class Bends(NamedTuple):
    """Derivatives of a block's distribution in the G latents of the root.

    Attributes:
        turn: That of the matrices A, ``(N, T, d, d, G)``.
        stretch: That of the logarithm of the diagonal of L, ``(N, T, d, G)``; it multiplies columns of L.
        lean: That of the gains of all P latents of parents but the root, ``(N, T d, P, G)``.
    """

    turn: Tensor
    stretch: Tensor
    lean: Tensor


class Conditional(NamedTuple):
    """The distribution of a block given its parents: e_t = A_t e_{t-1} + L_t w_t around the mean.

    Attributes:
        loc: The mean where the parents are at theirs, ``(N, T, d)``.
        gains: For each parent the change of the mean, ``(N, T d, d_p)``.
        matrix: The matrices A where the root is at its mean, ``(N, T, d, d)``.
        scale: The lower triangular matrices L there, ``(N, T, d, d)``.
        bends: Their derivatives in the root's latents.
    """

    loc: Tensor
    gains: tuple[Tensor, ...]
    matrix: Tensor
    scale: Tensor
    bends: Bends

    def deviation(self, w: Tensor, root: Tensor) -> Tensor:
        """Return e for noise w ``(S, N, T, d)`` and deviations of the root from its mean, ``(S, G)``."""
        along = root[:, None, None, :, None]  # (S, 1, 1, G, 1)
        stretched = w * (self.bends.stretch @ along).squeeze(-1).exp()
        e = applied(self.scale, stretched)
        if e.shape[-2] == 1:
            return e
        return recur(self.matrix + (self.bends.turn @ along.unsqueeze(-3)).squeeze(-1), e)

    def log_det(self, root: Tensor) -> Tensor:
        """Return log|de/dw|, ``(S,)``."""
        return self.scale.diagonal(dim1=-2, dim2=-1).log().sum() + root @ self.bends.stretch.sum((0, 1, 2))

    def solved(self, x: Tensor) -> Tensor:
        """Return the conditional covariance, where the root is at its mean, times x, ``(*batch, N, T, d)``."""
        later = torch.roll(self.matrix, -1, -3).mT.flip(-3)  # step t takes up what step t + 1 has
        c = recur(later, x.flip(-2)).flip(-2)
        return recur(self.matrix, applied(self.scale, applied(self.scale.mT, c)))


class BlockStructure:
    """The blocks of a packed vector, parents first, and what follows from them.

    Args:
        layouts: The layout of each block.  The first is the root if it has one row and is a parent.

    Attributes:
        root: The places of the root's G latents; none without a root.
        has_root: True if the first block is the root.
        order: The place of each latent in the numbers of all blocks, block by block, ``(D,)``.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self.layouts = layouts
        alone = layouts[0].places.shape[:2] == (1, 1)
        self.has_root = alone and any(0 in dict(layout.parents) for layout in layouts)
        self.root = layouts[0].places[0, 0][: None if self.has_root else 0]
        self.order = torch.cat([layout.places.flatten() for layout in layouts]).argsort()

    def width_above(self, parent: int) -> int:
        """Return the number of latents in a row of a block."""
        return self.layouts[parent].places[0].numel()

    def isotropic(self, value: float, like: Tensor) -> list[Precision]:
        """Return a precision that is a multiple of the identity."""
        found = []
        for layout in self.layouts:
            rows, steps, width = layout.places.shape
            diagonal = (value * torch.eye(width).to(like)).expand(rows, steps, -1, -1).clone()
            cross = (like.new_zeros(rows, steps * width, self.width_above(parent)) for parent, _ in layout.parents)
            found.append(Precision(diagonal, torch.zeros_like(diagonal), tuple(cross)))
        return found

    def straight(self, like: Tensor) -> list[Bends]:
        """Return derivatives of zero."""
        found = []
        for place, layout in enumerate(self.layouts):
            rows, steps, width = layout.places.shape
            above = sum(self.width_above(parent) for parent, _ in self._other_parents(place))
            turn = like.new_zeros(rows, steps, width, width, len(self.root))
            lean = like.new_zeros(rows, steps * width, above, len(self.root))
            found.append(Bends(turn, turn[:, :, :, 0], lean))
        return found

    def conditionals(self, precision: Sequence[Precision], loc: Tensor, bends: Sequence[Bends]) -> list[Conditional]:
        """Return the distribution of each block given its parents, by elimination of the last block first.

        The precision of the root is that of its marginal distribution.

        Args:
            precision: The precision of each block.
            loc: The mean, ``(D,)``.
            bends: The derivatives of each block in the root's latents.

        Raises:
            LinAlgError: If the precision is not positive definite.
        """
        left = [own.each(torch.clone) for own in precision]
        found: list[Conditional] = []
        for layout, own, of_root in zip(reversed(self.layouts), reversed(left), reversed(bends), strict=True):
            diagonal = own.diagonal if own.diagonal.shape[1] > 1 else _positive(own.diagonal)
            block = Conditional(loc[layout.places], (), *_forwards(diagonal, own.lower), of_root)
            gains = tuple(-_solved_columns(block, cross) for cross in own.cross)
            for (parent, row), cross in zip(layout.parents, own.cross, strict=True):
                if parent == 0 and self.has_root:
                    continue
                above = [other for other, _ in self.layouts[parent].parents]
                for (other, _), gain in zip(layout.parents, gains, strict=True):
                    change = cross.mT @ gain  # (N, d_p, d_q)
                    if other == parent:
                        left[parent].diagonal[:, 0].index_add_(0, row, change)
                    elif other in above:
                        left[parent].cross[above.index(other)].index_add_(0, row, change)
            found.append(block._replace(gains=gains))
        return found[::-1]

    def at(self, blocks: Sequence[Conditional], loc: Tensor) -> list[Conditional]:
        """Return blocks around another mean, ``(D,)``."""
        return [block._replace(loc=loc[of.places]) for of, block in zip(self.layouts, blocks, strict=True)]

    def coefficients(self, place: int, block: Conditional) -> tuple[Tensor, Tensor, Tensor]:
        """Return what depends on the root in a block's distribution: A, log diag L, and gains of its other parents."""
        pairs = zip(self.layouts[place].parents, block.gains, strict=True)
        gains = [gain for (parent, _), gain in pairs if parent or not self.has_root]
        none = block.loc.new_zeros(len(block.loc), block.loc[0].numel(), 0)
        return block.matrix, block.scale.diagonal(dim1=-2, dim2=-1).log(), torch.cat((none, *gains), -1)

    def root_of(self, blocks: Sequence[Conditional], noise: Tensor) -> Tensor:
        """Return the deviations of the root from its mean, ``(S, G)``."""
        return noise[:, self.root] @ blocks[0].scale[0, 0].mT if self.has_root else noise[:, :0]

    def placed(self, blocks: Sequence[Conditional], noise: Tensor, root: Tensor | None = None) -> Tensor:
        """Return the draws with some noise, ``(S, D)``, and with some deviations of the root from its mean."""
        root = self.root_of(blocks, noise) if root is None else root
        parts: list[Tensor] = []
        away: list[Tensor] = []  # deviations of blocks from their means, (S, N, T d)
        for place, (layout, block) in enumerate(zip(self.layouts, blocks, strict=True)):
            is_root = place == 0 and self.has_root
            e = root[:, None, None] if is_root else block.deviation(noise[:, layout.places], root)
            e = _moved(e, layout, block, away)
            above = [away[parent][:, row] for parent, row in self._other_parents(place)]
            if above and block.bends.lean.any():
                e = e + torch.einsum("nipg,snp,sg->sni", block.bends.lean, torch.cat(above, -1), root).reshape(e.shape)
            parts.append((block.loc + e).flatten(1))
            away.append(e.flatten(-2))
        return torch.cat(parts, -1)[:, self.order]

    def size(self, blocks: Sequence[Conditional], change: Tensor) -> float:
        """Return the root mean square of a step in standard deviations, of the block in which it is largest."""
        largest, back = 0.0, list[Tensor]()  # minus the steps of the blocks
        for layout, block in zip(self.layouts, blocks, strict=True):
            own = _moved(change[layout.places], layout, block, back)
            back.append(-change[layout.places].flatten(1))
            own = own - applied(block.matrix, before(own))
            noise = torch.linalg.solve_triangular(block.scale, own.unsqueeze(-1), upper=False)
            largest = max(largest, float(noise.square().mean().sqrt()))
        return largest

    def natural_gradient(
        self, blocks: Sequence[Conditional], x: Tensor, damping: float, joint: Tensor | None
    ) -> Tensor:
        """Return the natural gradient from a gradient ``(D,)``; that of the root counts the moves of all blocks.

        The root is damped by its precision, the others here.  ``joint`` has their moves if they follow from those of
        all other blocks, except the root.
        """
        x, change = x.clone(), torch.empty_like(x)
        middle: list[Tensor] = []
        for layout, block in zip(reversed(self.layouts), reversed(blocks), strict=True):
            middle.append(block.solved(x[layout.places]))
            for (parent, row), gain in zip(layout.parents, block.gains, strict=True):
                if parent or not self.has_root:
                    above = self.layouts[parent].places[:, 0]  # (N_p, d_p)
                    back = (gain.mT @ x[layout.places].flatten(1).unsqueeze(-1)).squeeze(-1)  # (N, d_p)
                    x[above] = x[above].index_add(0, row, back)
        away: list[Tensor] = []  # moves that others follow
        for place, (layout, block, solved) in enumerate(zip(self.layouts, blocks, reversed(middle), strict=True)):
            is_root = place == 0 and self.has_root
            if not is_root:
                solved = (solved if joint is None else joint[0][layout.places]) / (1 + damping)
            solved = _moved(solved, layout, block, away)
            change[layout.places] = solved
            away.append(solved.flatten(1) if joint is None or is_root else torch.zeros_like(solved.flatten(1)))
        return change

    def with_gains(self, blocks: list[Conditional], joint: Tensor | None) -> list[Conditional]:
        """Return blocks whose means move with the root as all couplings between blocks demand."""
        if joint is None or not self.has_root:
            return blocks
        found = [blocks[0]]
        for layout, block in zip(self.layouts[1:], blocks[1:], strict=True):
            of_root = joint[1:, layout.places.flatten(1)].movedim(0, -1)
            pairs = zip(layout.parents, block.gains, strict=True)
            found.append(block._replace(gains=tuple(gain if parent else of_root for (parent, _), gain in pairs)))
        return found

    def _other_parents(self, place: int) -> list[tuple[int, Tensor]]:
        """Return the parents of a block but the root, and the row of them that each row belongs to."""
        return [(parent, row) for parent, row in self.layouts[place].parents if parent or not self.has_root]


def _moved(e: Tensor, layout: Layout, block: Conditional, away: Sequence[Tensor]) -> Tensor:
    """Move deviations of a block, ``(*batch, N, T, d)``, with those of all blocks before it."""
    for (parent, row), gain in zip(layout.parents, block.gains, strict=True):
        e = e + (gain @ away[parent][..., row, :].unsqueeze(-1)).reshape(e.shape)
    return e


def _solved_columns(block: Conditional, cross: Tensor) -> Tensor:
    """Return the conditional covariance of each row times a matrix, ``(N, T d, n)``."""
    columns = cross.movedim(-1, 0).unflatten(-1, block.loc.shape[-2:])
    return block.solved(columns).flatten(-2).movedim(0, -1)


def _positive(matrix: Tensor) -> Tensor:
    """Return symmetric matrices with the absolute values of their eigenvalues, where one is not positive definite.

    Newton's step then leads away from a saddle (Dauphin et al. 2014, arXiv:1406.2572).
    """
    _, fault = torch.linalg.cholesky_ex(matrix)
    if not fault.any():
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    values = values.abs().clamp_min(1e-6 * values.abs().amax(-1, keepdim=True))
    return torch.where((fault != 0)[..., None, None], (vectors * values.unsqueeze(-2)) @ vectors.mT, matrix)


def _forwards(diagonal: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrices A and L of each step from a block tridiagonal precision.

    From the last step to the first, S_t = P_tt - P_t+1,tᵀ S_t+1⁻¹ P_t+1,t is the precision of step t given the one
    before it.  Then A_t = -S_t⁻¹ P_t,t-1, and L_t L_tᵀ = S_t⁻¹.

    Raises:
        LinAlgError: If the precision is not positive definite.
    """
    steps, width = diagonal.shape[-3], diagonal.shape[-1]
    if width == 1:
        conditional = _scalar_recursion(diagonal[..., 0, 0], lower[..., 0, 0])[..., None, None]
        return -lower / conditional, conditional.rsqrt()
    found, last = [torch.empty(0)] * steps, torch.zeros_like(diagonal[:, 0])
    for step in reversed(range(steps)):
        own = diagonal[:, step] - last
        factor = torch.linalg.cholesky(own)
        found[step] = factor
        half = torch.linalg.solve_triangular(factor, lower[:, step], upper=False)
        last = half.mT @ half
    factors = torch.stack(found, 1)
    covariance = torch.cholesky_inverse(factors)
    return -covariance @ lower, torch.linalg.cholesky(covariance)


def _scalar_recursion(diagonal: Tensor, lower: Tensor) -> Tensor:
    """Return S_t, ``(N, T)``, for steps of a single latent."""
    own, coupled = diagonal.T.cpu().numpy(), lower.T.square().cpu().numpy()
    found, last = np.empty_like(own), np.zeros_like(own[0])
    for step in reversed(range(len(own))):
        found[step] = own[step] - last
        last = coupled[step] / np.where(found[step] > 0, found[step], np.nan)
    if not (found > 0).all():
        raise LinAlgError("the precision is not positive definite.")
    return torch.as_tensor(found.T.copy()).to(diagonal)
