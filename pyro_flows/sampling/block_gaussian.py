"""The Gaussian of a given block structure that is nearest to a density, by natural gradients.

For q = N(m, P⁻¹) the ELBO is stationary if E_q[∇ log p] = 0 and P = -E_q[∇² log p] (Opper, Archambeau 2009, *The
Variational Gaussian Approximation Revisited*, Neural Computation 21).  So each round draws from q, takes P from mean
second derivatives, and moves the mean by P⁻¹ E_q[∇ log p]: a Newton step for a density smoothed by q (Khan, Rue 2021,
*The Bayesian Learning Rule*, arXiv:2107.04562).

P has the structure of the guide.  Rows are independent given the latents of their parents, and a step of a sequence is
coupled to its neighbours alone.  So a few differences of scores give all of P: in one difference move all latents that
share no neighbour (Curtis, Powell, Reid 1974, *On the Estimation of Sparse Jacobian Matrices*).  Elimination of the
blocks, the last one first, costs as much as P has numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..programs.log_density import LogDensity, score_of
from ..transforms.recurrence import applied, recur

PAIRS = 8  # antithetic pairs of draws of a round
CURVED = 2  # pairs of them at which second derivatives are taken
APART = 3  # steps of a sequence that share no neighbour
SHIFT = 0.1  # of differences of scores, in conditional standard deviations
MOST = 256  # directions of such differences
NUMBERS = 20_000_000  # to hold at once
HALVINGS = 6  # of a step that does not increase the ELBO
NEAR = 0.3  # the root mean square step, in standard deviations, from which on rounds are averaged
AVERAGED = 12  # rounds

Watch = Callable[[], bool]


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

    def blended(self, other: Precision, rate: float) -> Precision:
        """Return the average with another precision, whose share is ``rate``."""
        return Precision(
            torch.lerp(self.diagonal, other.diagonal, rate),
            torch.lerp(self.lower, other.lower, rate),
            tuple(torch.lerp(mine, theirs, rate) for mine, theirs in zip(self.cross, other.cross, strict=True)),
        )


class Conditional(NamedTuple):
    """The distribution of a block given its parents: e_t = A_t e_{t-1} + L_t w_t around the mean.

    Attributes:
        loc: The mean where the parents are at theirs, ``(N, T, d)``.
        gains: For each parent the change of the mean, ``(N, T d, d_p)``.
        matrix: The matrices A, ``(N, T, d, d)``.
        scale: The lower triangular matrices L, ``(N, T, d, d)``.
    """

    loc: Tensor
    gains: tuple[Tensor, ...]
    matrix: Tensor
    scale: Tensor

    def deviation(self, w: Tensor) -> Tensor:
        """Return e for noise w, ``(*batch, N, T, d)``."""
        return recur(self.matrix, applied(self.scale, w))

    def solved(self, x: Tensor) -> Tensor:
        """Return the conditional covariance times x, ``(*batch, N, T, d)``."""
        later = torch.roll(self.matrix, -1, -3).mT.flip(-3)  # step t takes up what step t + 1 has
        c = recur(later, x.flip(-2)).flip(-2)
        return recur(self.matrix, applied(self.scale, applied(self.scale.mT, c)))


class BlockGaussian(NamedTuple):
    """A Gaussian of some block structure, with its fit.

    Attributes:
        blocks: The distribution of each block given its parents.
        elbo: The mean log-weight, in nats.
    """

    blocks: tuple[Conditional, ...]
    elbo: float


def fit_blocks(
    density: LogDensity, layouts: list[Layout], loc: Tensor, scale: float, *, rounds: int = 60, watch: Watch = bool
) -> BlockGaussian | None:
    """Fit a Gaussian of a block structure; return None if no round improves on the start, or it is too large.

    Args:
        density: The log-density.
        layouts: The layout of each block, parents first; the last blocks are eliminated first.
        loc: The start's mean, ``(D,)``.
        scale: The start's standard deviation.
        rounds: The largest number of rounds.
        watch: Called after each round; True ends the search.
    """
    if sum(len(_colours(layout)) for layout in layouts) > MOST:
        return None
    search = _Search(density, layouts, loc, scale)
    began, averaged = search.elbo, 0
    for _ in range(rounds):
        averaged += bool(averaged) or search.step < NEAR
        if averaged > AVERAGED or watch() or not search.advance(1 / max(1, averaged)):
            break
    if not math.isfinite(search.elbo) or (math.isfinite(began) and search.elbo <= began):
        return None
    return BlockGaussian(tuple(search.blocks), search.elbo)


class _Search:
    """The state of a search: the mean, the precision, and the conditional distributions that follow from it.

    Attributes:
        step: The root mean square of the last step, in standard deviations.
        elbo: The estimated ELBO, in nats.
    """

    def __init__(self, density: LogDensity, layouts: list[Layout], loc: Tensor, scale: float) -> None:
        self.density, self.layouts, self.like = density, layouts, loc
        self.loc, self.step = loc.double(), math.inf
        self.precision = [self._isotropic(layout, scale**-2) for layout in layouts]
        self.blocks = self._conditionals(self.precision, self.loc)
        self.elbo = self._judged(self.blocks, self._noise())

    def _isotropic(self, layout: Layout, value: float) -> Precision:
        rows, steps, width = layout.places.shape
        diagonal = (value * torch.eye(width).to(self.loc)).expand(rows, steps, -1, -1).clone()
        sizes = [self.layouts[parent].places[0].numel() for parent, _ in layout.parents]
        cross = tuple(self.loc.new_zeros(rows, steps * width, size) for size in sizes)
        return Precision(diagonal, torch.zeros_like(diagonal), cross)

    def _noise(self) -> Tensor:
        half = torch.randn(PAIRS, len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        return torch.stack((half, -half), 1).flatten(0, 1)

    def advance(self, rate: float) -> bool:
        """Make a step, shorter than the natural gradient's by a factor; return False if no step is found."""
        noise = self._noise()
        z = self._placed(self.blocks, noise)
        score = self._score(z)
        usable = score.isfinite().all(-1)
        if usable.sum() < len(score) / 2:
            return self._shrink()
        mean_score = score[usable].mean(0)
        found = self._curvature(z[usable][: 2 * CURVED])
        before_elbo = self._judged(self.blocks, noise)
        for _ in range(HALVINGS):
            precision = [mine.blended(new, rate) for mine, new in zip(self.precision, found, strict=True)]
            try:
                blocks = self._conditionals(precision, self.loc)
            except LinAlgError:
                rate /= 2
                continue
            change = self._solved(blocks, mean_score) * rate
            moved = self._conditionals(precision, self.loc + change)
            elbo = self._judged(moved, noise)
            if elbo >= before_elbo - 0.5 or not math.isfinite(before_elbo):
                self.step = float((change * mean_score).sum().clamp_min(0) / rate / len(change)) ** 0.5
                self.loc, self.precision, self.blocks, self.elbo = self.loc + change, precision, moved, elbo
                return True
            rate /= 2
        return False

    def _shrink(self) -> bool:
        """Halve all deviations, since most draws have no finite score; the means stay."""
        self.precision = [
            Precision(4 * p.diagonal, 4 * p.lower, tuple(4 * cross for cross in p.cross)) for p in self.precision
        ]
        self.blocks = self._conditionals(self.precision, self.loc)
        return True

    def _score(self, z: Tensor) -> Tensor:
        return score_of(self.density, z.to(self.like)).to(z)

    @torch.no_grad()
    def _judged(self, blocks: list[Conditional], noise: Tensor) -> float:
        """Return the mean log-weight of the draws with some noise."""
        log_q = -noise.square().sum(-1) / 2 - len(self.loc) / 2 * math.log(2 * math.pi)
        for block in blocks:
            log_q = log_q - block.scale.diagonal(dim1=-2, dim2=-1).log().sum()
        log_p = self.density(self._placed(blocks, noise).to(self.like)).to(log_q)
        return float((log_p - log_q).mean().nan_to_num(-math.inf, math.inf, -math.inf))

    def _placed(self, blocks: list[Conditional], noise: Tensor) -> Tensor:
        """Return the draws with some noise, ``(S, D)``."""
        z = torch.empty_like(noise)
        away: list[Tensor] = []  # deviations of the parents from their means, (S, N, T d)
        for layout, block in zip(self.layouts, blocks, strict=True):
            e = block.deviation(noise[:, layout.places])
            for (parent, row), gain in zip(layout.parents, block.gains, strict=True):
                shift = (gain @ away[parent][:, row].unsqueeze(-1)).squeeze(-1)
                e = e + shift.reshape(e.shape)
            z[:, layout.places] = block.loc + e
            away.append(e.flatten(-2))
        return z

    def _curvature(self, z: Tensor) -> list[Precision]:
        """Return minus the mean second derivatives at some draws."""
        sizes = torch.ones_like(self.loc)
        for layout, own in zip(self.layouts, self.precision, strict=True):
            sizes[layout.places] = SHIFT * own.diagonal.diagonal(dim1=-2, dim2=-1).rsqrt()
        colours = [_colours(layout) for layout in self.layouts]
        found = self._responses(z, [places for of_block in colours for places in of_block], sizes)
        responses = found.split([len(of_block) for of_block in colours])
        return [
            self._derivatives(layout, response, responses, sizes)
            for layout, response in zip(self.layouts, responses, strict=True)
        ]

    def _responses(self, z: Tensor, colours: list[Tensor], sizes: Tensor) -> Tensor:
        """Return minus the mean changes of the score if the latents of each colour move, ``(colours, D)``."""
        found, together = [], max(1, NUMBERS // (2 * z.numel()))
        for start in range(0, len(colours), together):
            part = colours[start : start + together]
            steps = z.new_zeros(len(part), 1, z.shape[-1])
            for step, places in zip(steps, part, strict=True):
                step[0, places] = sizes[places]
            moved = torch.cat((z + steps, z - steps), 1)  # (colours, 2 S, D)
            forth, back = self._score(moved.flatten(0, 1)).reshape(moved.shape).chunk(2, 1)
            found.append((back - forth).nan_to_num(0.0, 0.0, 0.0).mean(1) / 2)
        return torch.cat(found)

    def _derivatives(self, layout: Layout, response: Tensor, responses: Sequence[Tensor], sizes: Tensor) -> Precision:
        """Return the rows of the precision of a block.

        Args:
            layout: The block.
            response: The responses to moves in the block.
            responses: Those to moves in each block.
            sizes: The sizes of the moves, ``(D,)``.
        """
        rows, steps, width = layout.places.shape
        own, size = response[:, layout.places], sizes[layout.places]
        apart, step = len(own) // width, torch.arange(steps)
        columns = own.reshape(apart, width, rows, steps, width).movedim(1, -1)  # (apart, N, T, d, d)
        diagonal = columns[step % apart, :, step].movedim(0, 1) / size.unsqueeze(-2)
        lower = torch.zeros_like(diagonal)
        if apart > 1:
            before, after = step[:-1], step[1:]
            below = columns[before % apart, :, after].movedim(0, 1) / size[:, :-1].unsqueeze(-2)
            above = columns[after % apart, :, before].movedim(0, 1) / size[:, 1:].unsqueeze(-2)
            lower[:, 1:] = (below + above.mT) / 2
        cross = []
        for parent, row in layout.parents:
            of_parent = responses[parent][:, layout.places].flatten(-2).permute(1, 2, 0)  # (N, T d, d_p)
            cross.append(of_parent / sizes[self.layouts[parent].places[row].flatten(1)].unsqueeze(-2))
        return Precision((diagonal + diagonal.mT) / 2, lower, tuple(cross))

    def _conditionals(self, precision: list[Precision], loc: Tensor) -> list[Conditional]:
        """Return the distribution of each block given its parents, by elimination of the last block first.

        Raises:
            LinAlgError: If the precision is not positive definite.
        """
        left = [Precision(p.diagonal.clone(), p.lower, tuple(c.clone() for c in p.cross)) for p in precision]
        found: list[Conditional] = []
        for layout, own in zip(reversed(self.layouts), reversed(left), strict=True):
            matrix, scale = _forwards(own.diagonal, own.lower)
            mean = loc[layout.places]
            block = Conditional(mean, (), matrix, scale)
            solved = [-_solved_columns(block, cross) for cross in own.cross]
            for (parent, row), cross in zip(layout.parents, own.cross, strict=True):
                for (other, _), gain in zip(layout.parents, solved, strict=True):
                    change = cross.mT @ gain  # (N, d_p, d_q)
                    if other == parent:
                        left[parent].diagonal[:, 0].index_add_(0, row, change)
                    elif other in (up := [place for place, _ in self.layouts[parent].parents]):
                        left[parent].cross[up.index(other)].index_add_(0, row, change)
            found.append(block._replace(gains=tuple(solved)))
        return found[::-1]

    def _solved(self, blocks: list[Conditional], x: Tensor) -> Tensor:
        """Return the inverse of the precision times a vector ``(D,)``."""
        x, change = x.clone(), torch.empty_like(x)
        middle: list[Tensor] = []
        for layout, block in zip(reversed(self.layouts), reversed(blocks), strict=True):
            solved = block.solved(x[layout.places])
            for (parent, row), gain in zip(layout.parents, block.gains, strict=True):
                place = self.layouts[parent].places[:, 0]  # (N_p, d_p)
                back = (gain.mT @ x[layout.places].flatten(1).unsqueeze(-1)).squeeze(-1)  # (N, d_p)
                x[place] = x[place].index_add(0, row, back)
            middle.append(solved)
        away: list[Tensor] = []
        for layout, block, solved in zip(self.layouts, blocks, reversed(middle), strict=True):
            for (parent, row), gain in zip(layout.parents, block.gains, strict=True):
                solved = solved + (gain @ away[parent][row].unsqueeze(-1)).reshape(solved.shape)
            change[layout.places] = solved
            away.append(solved.flatten(1))
        return change


def _colours(layout: Layout) -> list[Tensor]:
    """Return sets of places of a block that cover it, in each of which no two latents share a neighbour."""
    _, steps, width = layout.places.shape
    apart = 1 if steps == 1 else APART
    return [layout.places[:, k::apart, j].flatten() for k in range(apart) for j in range(width)]


def _solved_columns(block: Conditional, cross: Tensor) -> Tensor:
    """Return the conditional covariance of each row times a matrix, ``(N, T d, n)``."""
    columns = cross.movedim(-1, 0).unflatten(-1, block.loc.shape[-2:])
    return block.solved(columns).flatten(-2).movedim(0, -1)


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
        last = coupled[step] / found[step]
    if not (found > 0).all():
        raise LinAlgError("the precision is not positive definite.")
    return torch.as_tensor(found.T.copy()).to(diagonal)
