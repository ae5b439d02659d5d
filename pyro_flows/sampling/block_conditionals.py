"""Distributions of a block structure: each block is a Gaussian sequence given its parents.

Rows are independent given the latents of their parents, and a step of a sequence is coupled to its neighbours alone.
The precision matrix P has the same structure.  Elimination of the blocks, the last one first, turns it into the
distribution of each block given its parents, and costs as much as P has numbers.

One block may be the *root*, whose latents g all others share, such as the scale of a prior.  Given g the others are
Gaussian, with means, scales and gains that depend on g to first order.  So the whole is no Gaussian: it follows a
funnel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..transforms.recurrence import applied, before, recur

NotPositive = (torch.linalg.LinAlgError, np.linalg.LinAlgError)  # type: ignore[attr-defined]


class Layout(NamedTuple):
    """The latents of a block in the packed vector.

    Attributes:
        places: Their places, ``(N, T, d)``, for N rows and T steps.
        parents: For each parent, its place among the blocks and the row of it that each row belongs to, ``(N,)``.  The
            P latents of all parents stand in this order, the root's first.
    """

    places: Tensor
    parents: tuple[tuple[int, Tensor], ...]


class Precision(NamedTuple):
    """The rows of a precision matrix that belong to a block.

    Attributes:
        diagonal: The block of each step, ``(N, T, d, d)``.
        lower: The block of each step and the one before it, ``(N, T, d, d)``; the first is zero.
        cross: The block of each row and the latents of its parents, ``(N, T d, P)``.
    """

    diagonal: Tensor
    lower: Tensor
    cross: Tensor

    def damped(self, damping: float) -> Precision:
        """Return the precision of a root, positive definite, with its diagonal increased by a share."""
        matrix = _positive(self.diagonal)
        return self._replace(diagonal=matrix + torch.diag_embed(damping * matrix.diagonal(dim1=-2, dim2=-1)))


class Bends(NamedTuple):
    """Derivatives of a block's distribution in the G latents of the root.

    Attributes:
        turn: That of the matrices A, ``(N, T, d, d, G)``.
        stretch: That of the lower triangular matrix S in L (I + N) exp(D), ``(N, T, d, d, G)``.  D is the diagonal of
            S, and N the rest.
        lean: That of the gains of all latents of parents but the root, ``(N, T d, P - G, G)``.
    """

    turn: Tensor
    stretch: Tensor
    lean: Tensor


class Conditional(NamedTuple):
    """The distribution of a block given its parents: e_t = A_t e_{t-1} + L_t w_t around the mean.

    Attributes:
        loc: The mean where the parents are at theirs, ``(N, T, d)``.
        gains: The change of the mean with the latents of the parents, ``(N, T d, P)``.
        matrix: The matrices A where the root is at its mean, ``(N, T, d, d)``.
        scale: The lower triangular matrices L there, ``(N, T, d, d)``.
        bends: Their derivatives in the root's latents.
    """

    loc: Tensor
    gains: Tensor
    matrix: Tensor
    scale: Tensor
    bends: Bends

    def deviation(self, w: Tensor, root: Tensor) -> Tensor:
        """Return e for noise w ``(S, N, T, d)`` and deviations of the root from its mean, ``(S, G)``."""
        along = root[:, None, None, :, None]  # (S, 1, 1, G, 1)
        stretch = (self.bends.stretch @ along.unsqueeze(-3)).squeeze(-1)
        e = w * stretch.diagonal(dim1=-2, dim2=-1).exp()
        e = applied(self.scale, e + applied(stretch.tril(-1), e))
        if e.shape[-2] == 1:
            return e
        return recur(self.matrix + (self.bends.turn @ along.unsqueeze(-3)).squeeze(-1), e)

    def log_det(self, root: Tensor) -> Tensor:
        """Return log|de/dw|, ``(S,)``."""
        change = self.bends.stretch.sum((0, 1)).diagonal().sum(-1)
        return self.scale.diagonal(dim1=-2, dim2=-1).log().sum() + root @ change

    def solved(self, x: Tensor) -> Tensor:
        """Return the conditional covariance, where the root is at its mean, times x, ``(*batch, N, T, d)``."""
        later = torch.roll(self.matrix, -1, -3).mT.flip(-3)  # step t takes up what step t + 1 has
        c = recur(later, x.flip(-2)).flip(-2)
        return recur(self.matrix, applied(self.scale, applied(self.scale.mT, c)))


Precisions = Sequence[Precision]  # of all blocks
Blocks = Sequence[Conditional]


class BlockStructure:
    """The blocks of a packed vector, parents first, and what follows from them.

    Args:
        layouts: The layout of each block.  The first is the root if it has one row and is a parent.

    Attributes:
        root: The places of the root's G latents; none without a root.
        has_root: True if the first block is the root.
        order: The place of each latent in the numbers of all blocks, block by block, ``(D,)``.
        above: For each block its parents: their places, the row of them that each row belongs to, and their columns
            among the P latents of all parents.
        shared: For each block the number of columns of the root: G or 0.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self.layouts, self.above = layouts, list[list[tuple[int, Tensor, slice]]]()
        alone = layouts[0].places.shape[:2] == (1, 1)
        self.has_root = alone and any(0 in dict(layout.parents) for layout in layouts)
        self.root = layouts[0].places[0, 0][: None if self.has_root else 0]
        self.order = torch.cat([layout.places.flatten() for layout in layouts]).argsort()
        self.shared = [len(self.root) * (0 in dict(layout.parents)) for layout in layouts]
        for layout in layouts:
            ends = np.cumsum([0, *(layouts[parent].places[0].numel() for parent, _ in layout.parents)]).tolist()
            pairs = zip(layout.parents, map(slice, ends, ends[1:]), strict=False)
            self.above.append([(parent, row, columns) for (parent, row), columns in pairs])

    def isotropic(self, value: float, like: Tensor) -> tuple[list[Precision], list[Bends]]:
        """Return a precision that is a multiple of the identity, and derivatives of zero."""
        precision, bends = [], []
        for layout, above, shared in zip(self.layouts, self.above, self.shared, strict=True):
            (rows, steps, width), size = layout.places.shape, above[-1][2].stop if above else 0
            diagonal = (value * torch.eye(width).to(like)).expand(rows, steps, -1, -1).clone()
            cross = like.new_zeros(rows, steps * width, size)
            precision.append(Precision(diagonal, torch.zeros_like(diagonal), cross))
            turn = like.new_zeros(rows, steps, width, width, len(self.root))
            lean = like.new_zeros(*cross.shape[:2], size - shared, len(self.root))
            bends.append(Bends(turn, torch.zeros_like(turn), lean))
        return precision, bends

    def conditionals(self, precision: Precisions, loc: Tensor, bends: Sequence[Bends]) -> list[Conditional]:
        """Return the distribution of each block given its parents, by elimination of the last block first.

        The precision of the root is that of its marginal distribution.

        Args:
            precision: The precision of each block.
            loc: The mean, ``(D,)``.
            bends: The derivatives of each block in the root's latents.

        Raises:
            NotPositive: If the precision is not positive definite.
        """
        left, found = [Precision(*map(torch.clone, own)) for own in precision], list[Conditional]()
        for layout, own, of_root, above in [*zip(self.layouts, left, bends, self.above, strict=True)][::-1]:
            diagonal = own.diagonal if own.diagonal.shape[1] > 1 else _positive(own.diagonal)
            block = Conditional(loc[layout.places], own.cross, *_forwards(diagonal, own.lower), of_root)
            columns = own.cross.movedim(-1, 0).unflatten(-1, layout.places.shape[1:])
            gains = -block.solved(columns).flatten(-2).movedim(0, -1)
            change = own.cross.mT @ gains  # (N, P, P)
            for parent, row, mine in above[1:] if self.has_root and above and above[0][0] == 0 else above:
                places = {other: theirs for other, _, theirs in self.above[parent]}
                left[parent].diagonal[:, 0].index_add_(0, row, change[:, mine, mine])
                for other, _, theirs in above:
                    if other in places:
                        left[parent].cross[:, :, places[other]].index_add_(0, row, change[:, mine, theirs])
            found.append(block._replace(gains=gains))
        return found[::-1]

    def coefficients(self, blocks: Blocks, present: Blocks) -> list[Bends]:
        """Return for each block what depends on the root: A, L in units of the present one, and gains of other parents.

        The unit of L is that of :class:`Bends`: present.L⁻¹ L = (I + N) exp(D).
        """
        found = []
        for block, now, shared in zip(blocks, present, self.shared, strict=True):
            relative = torch.linalg.solve_triangular(now.scale, block.scale, upper=False)
            diagonal = relative.diagonal(dim1=-2, dim2=-1)
            stretch = (relative / diagonal.unsqueeze(-2)).tril(-1) + diagonal.log().diag_embed()
            found.append(Bends(block.matrix, stretch, block.gains[..., shared:]))
        return found

    def at(self, blocks: Blocks, loc: Tensor) -> list[Conditional]:
        """Return blocks around another mean, ``(D,)``."""
        return [block._replace(loc=loc[of.places]) for of, block in zip(self.layouts, blocks, strict=True)]

    def root_of(self, blocks: Blocks, noise: Tensor) -> Tensor:
        """Return the deviations of the root from its mean, ``(S, G)``."""
        return noise[:, self.root] @ blocks[0].scale[0, 0, : len(self.root), : len(self.root)].mT

    def placed(self, blocks: Blocks, noise: Tensor, root: Tensor | None = None) -> Tensor:
        """Return the draws with some noise, ``(S, D)``, and with some deviations of the root from its mean."""
        root = self.root_of(blocks, noise) if root is None else root
        parts, away = list[Tensor](), list[Tensor]()  # draws, and deviations from the means, (S, N, T d)
        for place, (layout, block) in enumerate(zip(self.layouts, blocks, strict=True)):
            is_root = place == 0 and self.has_root
            e = root[:, None, None] if is_root else block.deviation(noise[:, layout.places], root)
            e = self._moved(place, e, block, away)
            if block.bends.lean.any():
                others = self._given(place, away)[..., self.shared[place] :]
                e = e + torch.einsum("nipg,snp,sg->sni", block.bends.lean, others, root).reshape(e.shape)
            parts.append((block.loc + e).flatten(1))
            away.append(e.flatten(-2))
        return torch.cat(parts, -1)[:, self.order]

    def size(self, blocks: Blocks, change: Tensor) -> float:
        """Return the root mean square of a step in standard deviations, of the block in which it is largest."""
        largest, back = 0.0, list[Tensor]()  # minus the steps of the blocks
        for place, (layout, block) in enumerate(zip(self.layouts, blocks, strict=True)):
            own = self._moved(place, change[layout.places], block, back)
            back.append(-change[layout.places].flatten(1))
            own = own - applied(block.matrix, before(own))
            noise = torch.linalg.solve_triangular(block.scale, own.unsqueeze(-1), upper=False)
            largest = max(largest, float(noise.square().mean().sqrt()))
        return largest

    def natural_gradient(self, blocks: Blocks, x: Tensor, damping: float, joint: Tensor | None) -> Tensor:
        """Return the natural gradient from a gradient ``(D,)``; that of the root counts the moves of all blocks.

        It is J Jᵀ x, with J the Jacobian of draws in their noise.  The root is damped by its precision, the others
        here.  ``joint`` has their moves if they follow from those of all other blocks.
        """
        factor = blocks[0].scale[0, 0, : len(self.root), : len(self.root)]
        root = (x[self.root] @ factor @ factor.mT).unsqueeze(0)
        if joint is not None:
            return (joint[0] / (1 + damping) + root[0] @ joint[1:]).index_copy(0, self.root, root[0])
        plain = [b._replace(loc=0 * b.loc, bends=Bends(*map(torch.zeros_like, b.bends))) for b in blocks]
        with torch.enable_grad():
            noise = x.new_zeros(1, len(x), requires_grad=True)
            (slope,) = torch.autograd.grad((self.placed(plain, noise, 0 * root) @ x).sum(), noise)
        return self.placed(plain, slope / (1 + damping), root)[0]

    def with_gains(self, blocks: list[Conditional], joint: Tensor | None) -> list[Conditional]:
        """Return blocks whose means move with the root as all couplings between blocks demand."""
        if joint is None:
            return blocks
        found = []
        for layout, block, shared in zip(self.layouts, blocks, self.shared, strict=True):
            of_root = joint[1:, layout.places.flatten(1)].movedim(0, -1)
            found.append(block._replace(gains=torch.cat((of_root[..., :shared], block.gains[..., shared:]), -1)))
        return found

    def _given(self, place: int, away: Sequence[Tensor]) -> Tensor:
        """Return the deviations of a block's parents, ``(*batch, N, P)``, given those of all blocks before it."""
        return torch.cat([away[parent][..., row, :] for parent, row, _ in self.above[place]], -1)

    def _moved(self, place: int, e: Tensor, block: Conditional, away: Sequence[Tensor]) -> Tensor:
        """Move deviations of a block, ``(*batch, N, T, d)``, with those of its parents."""
        if not self.above[place]:
            return e
        return e + (block.gains @ self._given(place, away).unsqueeze(-1)).reshape(e.shape)


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
        NotPositive: If the precision is not positive definite.
    """
    own, coupled = diagonal.cpu().numpy().copy(), lower.cpu().numpy()  # numpy has less overhead per step
    with np.errstate(all="ignore"):
        for step in range(own.shape[1] - 1, 0, -1):
            parts = own[:, step], coupled[:, step]
            solved = np.linalg.solve(*parts) if own.shape[-1] > 1 else parts[1] / parts[0]
            own[:, step - 1] -= parts[1].transpose(0, 2, 1) @ solved
    precision = torch.as_tensor(own).to(diagonal)
    if precision.shape[-1] == 1 and (precision > 0).all():  # a batch of decompositions takes ten times as long
        return -lower / precision, precision.rsqrt()
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
    return -covariance @ lower, torch.linalg.cholesky(covariance)
