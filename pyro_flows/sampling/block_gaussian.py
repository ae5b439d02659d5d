"""The Gaussian of a given block structure that is nearest to a density, by natural gradients.

For q = N(m, P⁻¹) the ELBO is stationary if E_q[∇ log p] = 0 and P = -E_q[∇² log p] (Opper, Archambeau 2009, *The
Variational Gaussian Approximation Revisited*, Neural Computation 21).  So each round draws from q, takes P from mean
second derivatives, and moves the mean by P⁻¹ E_q[∇ log p]: a Newton step for a density smoothed by q (Khan, Rue 2021,
*The Bayesian Learning Rule*, arXiv:2107.04562).

P has the structure of the guide.  Rows are independent given the latents of their parents, and a step of a sequence is
coupled to its neighbours alone.  So a few differences of scores give all of P: in one difference move all latents that
share no neighbour (Curtis, Powell, Reid 1974, *On the Estimation of Sparse Jacobian Matrices*).  Elimination of the
blocks, the last one first, costs as much as P has numbers.

One block may be the *root*, whose latents g all others share, such as the scale of a prior.  Given g the others are
Gaussian, with means, scales and gains that depend on g to first order.  So q is no Gaussian: it follows a funnel.  The
root is fitted to log p(g, z(g, w)) + log|dz/dw|, where the others move with g: a Laplace approximation nested in
another (Rue, Martino, Chopin 2009, JRSS B 71).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..programs.log_density import LogDensity, score_of
from ..transforms.recurrence import applied, before, recur

PAIRS = 2, 8  # the fewest and the most antithetic pairs of draws of a round
DRAWN = 40_000  # numbers to draw in a round, between these; many rows average the noise of a draw
APART = 3  # steps of a sequence that share no neighbour
SHIFT = 0.1  # of differences of scores, in conditional standard deviations
MANY = 256  # directions of such differences, from which on few draws take part, and latents of the largest root
NUMBERS = 20_000_000  # to hold at once, and of the largest precision
DAMPINGS = 0.0, 0.1, 1.0, 10.0, 100.0, 1000.0  # of a step that does not increase the ELBO (Levenberg, Marquardt)
NEAR = 0.2  # the root mean square step, in standard deviations, from which on rounds are averaged
LATEST = 4  # steps that are compared with as many before them, which finds steps that are noise
AVERAGED = 12  # rounds at most
STILL = 0.03  # the step, in the same unit, at which the search ends
HELD = 6  # rounds at most in which the root is held, so that the others suit it before it moves
FAINT = 1e-4  # a coupling this small, relative to the largest, is round-off
ROUNDS, PRECISE = 30, 0.02  # of conjugate gradients at most, and the error at which they end
FUNNEL = 16  # the largest root on which the scales of others depend
BEND = 0.7  # standard deviations of the root by which it is moved to see how the others depend on it
SLACK = 0.5  # nats by which the ELBO may fall in a step

Watch = Callable[[], bool]
Bends = tuple[Tensor, Tensor, Tensor]  # derivatives in the root's latents: of A, of log diag L, and of gains


def slack(elbo: float, like: Tensor) -> float:
    """Return the nats by which an ELBO may fall in a step: noise of draws, and round-off of large sums."""
    return SLACK + 16 * torch.finfo(like.dtype).eps * abs(elbo)


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

    def damped(self, damping: float) -> Precision:
        """Return the precision of a root, positive definite, with its diagonal increased by a share."""
        matrix = _positive(self.diagonal)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        return self._replace(diagonal=matrix + torch.diag_embed(damping * diagonal))


class Conditional(NamedTuple):
    """The distribution of a block given its parents: e_t = A_t e_{t-1} + L_t w_t around the mean.

    Attributes:
        loc: The mean where the parents are at theirs, ``(N, T, d)``.
        gains: For each parent the change of the mean, ``(N, T d, d_p)``.
        matrix: The matrices A where the root is at its mean, ``(N, T, d, d)``.
        scale: The lower triangular matrices L there, ``(N, T, d, d)``.
        turn: The derivative of A in the root's latents, ``(N, T, d, d, G)``.
        stretch: That of the logarithm of the diagonal of L, ``(N, T, d, G)``; it multiplies columns of L.
        lean: That of the gains of all P latents of parents but the root, ``(N, T d, P, G)``.
    """

    loc: Tensor
    gains: tuple[Tensor, ...]
    matrix: Tensor
    scale: Tensor
    turn: Tensor
    stretch: Tensor
    lean: Tensor

    def deviation(self, w: Tensor, root: Tensor) -> Tensor:
        """Return e for noise w ``(S, N, T, d)`` and deviations of the root from its mean, ``(S, G)``."""
        along = root[:, None, None, :, None]  # (S, 1, 1, G, 1)
        stretched = w * (self.stretch @ along).squeeze(-1).exp()
        e = applied(self.scale, stretched)
        if e.shape[-2] == 1:
            return e
        return recur(self.matrix + (self.turn @ along.unsqueeze(-3)).squeeze(-1), e)

    def log_det(self, root: Tensor) -> Tensor:
        """Return log|de/dw|, ``(S,)``."""
        return self.scale.diagonal(dim1=-2, dim2=-1).log().sum() + root @ self.stretch.sum((0, 1, 2))

    def solved(self, x: Tensor) -> Tensor:
        """Return the conditional covariance, where the root is at its mean, times x, ``(*batch, N, T, d)``."""
        later = torch.roll(self.matrix, -1, -3).mT.flip(-3)  # step t takes up what step t + 1 has
        c = recur(later, x.flip(-2)).flip(-2)
        return recur(self.matrix, applied(self.scale, applied(self.scale.mT, c)))


class BlockGaussian(NamedTuple):
    """A distribution of some block structure, Gaussian given its root, with its fit.

    Attributes:
        blocks: The distribution of each block given its parents.
        elbo: The mean log-weight, in nats.
        is_near: True if a guide that starts from it needs few steps.
    """

    blocks: tuple[Conditional, ...]
    elbo: float
    is_near: bool = True


def fit_blocks(
    density: LogDensity, layouts: list[Layout], loc: Tensor, scale: float, *, rounds: int = 80, watch: Watch = bool
) -> BlockGaussian | None:
    """Fit a distribution of a block structure; return None if no round improves on the start, or it is too large.

    Args:
        density: The log-density.
        layouts: The layout of each block, parents first.  The first is the root if it has one row and is a parent.
        loc: The start's mean, ``(D,)``.
        scale: The start's standard deviation.
        rounds: The largest number of rounds.
        watch: Called after each round; True ends the search.
    """
    if sum(layout.places.numel() * layout.places.shape[-1] for layout in layouts) > NUMBERS:
        return None
    search = _Search(density, layouts, loc, scale)
    if len(search.root) > MANY:
        return None
    began, averaged = search.elbo, 0
    steps: list[float] = []  # the sizes of the steps since the root moves
    for number in range(rounds):
        if search.holds_root and (number >= HELD or search.step < NEAR):
            search.holds_root, search.step, steps = False, math.inf, []
        rested = search.step < (2 * NEAR if averaged else NEAR) or _are_noise(steps)
        averaged = averaged + 1 if rested and not search.holds_root else 0
        ends = averaged > AVERAGED or (averaged > 1 and search.step < STILL)
        if ends or watch() or not search.advance(1 / max(1, averaged)):
            break
        steps.append(search.step)
    if not math.isfinite(search.elbo) or (math.isfinite(began) and search.elbo <= began):
        return None
    return BlockGaussian(tuple(search.blocks), search.elbo)


def _are_noise(steps: list[float]) -> bool:
    """True if steps are small and no longer decrease, so that they are noise of the draws."""
    latest, before = steps[-LATEST:], steps[-2 * LATEST : -LATEST]
    return len(before) == LATEST and max(latest) < 1 and statistics.median(latest) > 0.7 * statistics.median(before)


class _Search:
    """The state of a search: the mean, the precision, and the conditional distributions that follow from it.

    Attributes:
        step: The root mean square of the last step, in standard deviations, of the block in which it was largest.
        elbo: The estimated ELBO, in nats.
        holds_root: True to leave the root as it is.
        is_coupled: True if blocks are coupled that are no parents of each other, such as effects of users and items.
    """

    def __init__(self, density: LogDensity, layouts: list[Layout], loc: Tensor, scale: float) -> None:
        self.density, self.layouts, self.like = density, layouts, loc
        self.loc, self.step = loc.double(), math.inf
        least, most = PAIRS
        self.pairs = max(least, min(most, DRAWN // len(loc)))
        self.curved = max(2, self.pairs // 2)  # draws at which second derivatives are taken
        directions = sum(len(_colours(layout)) for layout in layouts)
        if directions > MANY:  # then more draws of the score alone cost next to nothing
            self.pairs, self.curved = directions // 16, 2
        alone = layouts[0].places.shape[:2] == (1, 1)
        shares = alone and any(0 in dict(layout.parents) for layout in layouts)
        self.root = layouts[0].places[0, 0][: None if shares else 0]
        self.holds_root, self.is_coupled = len(self.root) > 0, False
        self.precision = [self._isotropic(layout, scale**-2) for layout in layouts]
        self.blocks = self._conditionals(self.precision, self.loc)
        self.elbo = self._judged(self.blocks, self._noise())

    @property
    def has_root(self) -> bool:
        """True if the first block is the root."""
        return len(self.root) > 0

    def _isotropic(self, layout: Layout, value: float) -> Precision:
        rows, steps, width = layout.places.shape
        diagonal = (value * torch.eye(width).to(self.loc)).expand(rows, steps, -1, -1).clone()
        sizes = [self.layouts[parent].places[0].numel() for parent, _ in layout.parents]
        cross = tuple(self.loc.new_zeros(rows, steps * width, size) for size in sizes)
        return Precision(diagonal, torch.zeros_like(diagonal), cross)

    def _noise(self) -> Tensor:
        half = torch.randn(self.pairs, len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        return torch.stack((half, -half), 1).flatten(0, 1)

    def advance(self, rate: float) -> bool:
        """Make a step, shorter than the natural gradient's by a factor; return False if no step is found."""
        noise = self._noise()
        z = self._placed(self.blocks, noise)
        score = self._score(z)
        usable = score.isfinite().all(-1)
        if usable.sum() < len(score) / 2:
            return self._shrink()
        score, places = score[usable].mean(0), z[usable][: self.curved]
        found, bends = self._curvature(places), None
        if self.has_root:
            score[self.root] = 0.0
            found[0] = self.precision[0]
            if not self.holds_root:
                bends = self._bends(noise[: self.curved]) if len(self.root) <= FUNNEL else None
                score[self.root], found[0] = self._of_root(noise)
        joint = self._joint(places, score, found) if self.is_coupled else None
        start = self._judged(self.blocks, noise)
        for damping in DAMPINGS:
            precision = [mine.blended(new, rate) for mine, new in zip(self.precision, found, strict=True)]
            if self.has_root:
                precision[0] = precision[0].damped(damping)
            try:
                blocks = self._with_gains(self._conditionals(precision, self.loc, bends, rate), joint)
                change = rate * self._solved(blocks, score, damping, joint)
                moved = self._with_gains(self._conditionals(precision, self.loc + change, bends, rate), joint)
            except LinAlgError:
                rate /= 2
                continue
            elbo = self._judged(moved, noise)
            if elbo >= start - slack(start, self.like) or not math.isfinite(start):
                self.step = self._size(blocks, change / rate)
                self.loc, self.precision, self.blocks, self.elbo = self.loc + change, precision, moved, elbo
                return True
        return False

    def _size(self, blocks: list[Conditional], change: Tensor) -> float:
        """Return the root mean square of a step in standard deviations, of the block in which it is largest."""
        largest, away = 0.0, list[Tensor]()
        for layout, block in zip(self.layouts, blocks, strict=True):
            own = change[layout.places]
            away.append(own.flatten(1))
            for (parent, row), gain in zip(layout.parents, block.gains, strict=True):
                own = own - (gain @ away[parent][row].unsqueeze(-1)).reshape(own.shape)
            own = own - applied(block.matrix, before(own))
            noise = torch.linalg.solve_triangular(block.scale, own.unsqueeze(-1), upper=False)
            largest = max(largest, float(noise.square().mean().sqrt()))
        return largest

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
        root = self._root_of(blocks, noise)
        for block in blocks:
            log_q = log_q - block.log_det(root)
        log_p = self.density(self._placed(blocks, noise).to(self.like)).to(log_q)
        return float((log_p - log_q).mean().nan_to_num(-math.inf, math.inf, -math.inf))

    def _root_of(self, blocks: list[Conditional], noise: Tensor) -> Tensor:
        """Return the deviations of the root from its mean, ``(S, G)``."""
        return noise[:, self.root] @ blocks[0].scale[0, 0].mT if self.has_root else noise[:, :0]

    def _placed(self, blocks: list[Conditional], noise: Tensor, root: Tensor | None = None) -> Tensor:
        """Return the draws with some noise, ``(S, D)``, and with some deviations of the root from its mean."""
        root = self._root_of(blocks, noise) if root is None else root
        parts: list[Tensor] = []
        away: list[Tensor] = []  # deviations of blocks from their means, (S, N, T d)
        for place, (layout, block) in enumerate(zip(self.layouts, blocks, strict=True)):
            is_root = place == 0 and self.has_root
            e = root[:, None, None] if is_root else block.deviation(noise[:, layout.places], root)
            for (parent, row), gain in zip(layout.parents, block.gains, strict=True):
                shift = (gain @ away[parent][:, row].unsqueeze(-1)).squeeze(-1)
                e = e + shift.reshape(e.shape)
            above = [away[parent][:, row] for parent, row in self._other_parents(place)]
            if above and block.lean.any():
                shift = torch.einsum("nipg,snp,sg->sni", block.lean, torch.cat(above, -1), root)
                e = e + shift.reshape(e.shape)
            parts.append((block.loc + e).flatten(1))
            away.append(e.flatten(-2))
        order = torch.cat([layout.places.flatten() for layout in self.layouts])
        return torch.cat(parts, -1)[:, torch.argsort(order)]

    def _bends(self, noise: Tensor) -> list[Bends] | None:
        """Return for each block the derivatives of A, log diag L and gains in the root's latents.

        They are differences of the conditional distributions that suit the posterior at either side of the root's mean.
        Return None if there is no such distribution at one side.
        """
        size = BEND * self.precision[0].diagonal[0, 0].inverse().diagonal().sqrt()
        found = [list[Bends]() for _ in self.layouts]
        for own in torch.diag(size):
            sides = []
            for side in (own, -own):
                z = self._placed(self.blocks, noise, side.expand(len(noise), -1))
                curvature = [self.precision[0], *self._curvature(z, first=1)]
                try:
                    sides.append(self._conditionals(curvature, self.loc))
                except LinAlgError:
                    return None
            for place, (forth, back) in enumerate(zip(*sides, strict=True)):
                pairs = zip(self._coefficients(place, forth), self._coefficients(place, back), strict=True)
                turn, stretch, lean = ((high - low) / (2 * own.sum()) for high, low in pairs)
                found[place].append((turn, stretch, lean))
        stacked = [[torch.stack(parts, -1) for parts in zip(*of_block, strict=True)] for of_block in found]
        return [(turn, stretch, lean) for turn, stretch, lean in stacked]

    def _coefficients(self, place: int, block: Conditional) -> Bends:
        """Return what depends on the root in a block's distribution: A, log diag L, and gains of its other parents."""
        pairs = zip(self.layouts[place].parents, block.gains, strict=True)
        gains = [gain for (parent, _), gain in pairs if parent or not self.has_root]
        none = block.loc.new_zeros(len(block.loc), block.loc[0].numel(), 0)
        return block.matrix, block.scale.diagonal(dim1=-2, dim2=-1).log(), torch.cat((none, *gains), -1)

    def _of_root(self, noise: Tensor) -> tuple[Tensor, Precision]:
        """Return the mean score of the root, where the other blocks move with it, and minus its mean derivative."""

        def total(root: Tensor) -> Tensor:
            z = self._placed(self.blocks, noise.repeat(len(root) // len(noise), 1), root)
            return self.density(z.to(self.like)).to(z) + sum(block.log_det(root) for block in self.blocks[1:])

        root = self._root_of(self.blocks, noise)
        size = SHIFT * self.precision[0].diagonal[0, 0].diagonal().rsqrt()
        moves = torch.diag(size).unsqueeze(1)  # (G, 1, G)
        moved = torch.cat((root.unsqueeze(0), root + moves, root - moves)).flatten(0, 1)
        scores = torch.cat([score_of(total, part) for part in moved.split(len(noise))])
        own, forth, back = (
            scores.reshape(-1, *root.shape).nan_to_num(0.0, 0.0, 0.0).mean(1).split((1, *[len(size)] * 2))
        )
        second = (back - forth) / (2 * size.unsqueeze(-1))
        return own[0], Precision(((second + second.mT) / 2)[None, None], self.precision[0].lower, ())

    def _curvature(self, z: Tensor, first: int = 0) -> list[Precision]:
        """Return minus the mean second derivatives at some draws, for all blocks or without the first."""
        sizes = torch.ones_like(self.loc)
        for layout, own in zip(self.layouts, self.precision, strict=True):
            sizes[layout.places] = SHIFT * own.diagonal.diagonal(dim1=-2, dim2=-1).rsqrt()
        colours = [_colours(layout) if place >= first else [] for place, layout in enumerate(self.layouts)]
        found = self._responses(z, [places for of_block in colours for places in of_block], sizes)
        responses = found.split([len(of_block) for of_block in colours])
        self.is_coupled |= self._sees_couplings(responses)
        pairs = list(zip(self.layouts, responses, strict=True))[first:]
        return [self._derivatives(layout, response, responses, sizes) for layout, response in pairs]

    def _sees_couplings(self, responses: Sequence[Tensor]) -> bool:
        """True if moves of a block change the scores of another one that is no parent or child of it."""
        for place, response in enumerate(responses):
            own = [place, *(parent for parent, _ in self.layouts[place].parents)]
            for other, layout in enumerate(self.layouts):
                related = other in own or place in [parent for parent, _ in layout.parents]
                if (
                    not related
                    and len(response)
                    and response[:, layout.places].abs().max() > FAINT * response.abs().max()
                ):
                    return True
        return False

    def _joint(self, z: Tensor, score: Tensor, found: list[Precision]) -> Tensor:
        """Return the moves of all blocks but the root that follow from couplings between the blocks, too.

        They are found by conjugate gradients, with the inverse of the precision without these couplings as a
        preconditioner (Hestenes, Stiefel 1952).

        Args:
            z: Draws at which the second derivatives are taken.
            score: The mean score, ``(D,)``.
            found: The precision without these couplings.

        Returns:
            The change of the mean and, for each latent of the root, the move per unit, ``(1 + G, D)``.
        """
        wanted = torch.zeros(1 + len(self.root), len(score)).to(score)
        wanted[0] = score
        for layout, own in zip(self.layouts, found, strict=True):
            for (parent, _), cross in zip(layout.parents, own.cross, strict=True):
                if parent == 0 and self.has_root:
                    wanted[1:, layout.places.flatten(1)] = -cross.movedim(-1, 0)
        wanted[:, self.root] = 0.0
        solution, rest = torch.zeros_like(wanted), wanted
        step = ready = self._uncoupled(rest)
        size = (rest * ready).sum(-1, keepdim=True)
        least = PRECISE**2 * size
        for _ in range(ROUNDS):
            bent = self._bent_by(z, step)
            length = size / (step * bent).sum(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
            solution, rest = solution + length * step, rest - length * bent
            ready, last = self._uncoupled(rest), size
            size = (rest * ready).sum(-1, keepdim=True)
            if (size <= least).all():
                break
            step = ready + size / last.clamp_min(torch.finfo(size.dtype).tiny) * step
        return solution

    def _uncoupled(self, x: Tensor) -> Tensor:
        """Return the covariance of each block but the root, given its parents, times vectors ``(K, D)``."""
        found = torch.zeros_like(x)
        for layout, block in zip(self.layouts, self.blocks, strict=True):
            found[:, layout.places] = block.solved(x[:, layout.places])
        found[:, self.root] = 0.0
        return found

    def _bent_by(self, z: Tensor, steps: Tensor) -> Tensor:
        """Return minus the mean second derivatives, without the root, times vectors ``(K, D)``."""
        deviations = torch.ones_like(self.loc)
        for layout, own in zip(self.layouts, self.precision, strict=True):
            deviations[layout.places] = own.diagonal.diagonal(dim1=-2, dim2=-1).rsqrt()
        scale = SHIFT / (steps / deviations).abs().amax(-1, keepdim=True).clamp_min(1e-30)
        move = (scale * steps).unsqueeze(1)
        moved = torch.cat((z + move, z - move), 1)  # (K, 2 S, D)
        forth, back = self._score(moved.flatten(0, 1)).reshape(moved.shape).chunk(2, 1)
        found = (back - forth).nan_to_num(0.0, 0.0, 0.0).mean(1) / 2 / scale
        found[:, self.root] = 0.0
        return found

    def _with_gains(self, blocks: list[Conditional], joint: Tensor | None) -> list[Conditional]:
        """Return blocks whose means move with the root as all couplings between blocks demand."""
        if joint is None or not self.has_root:
            return blocks
        found = [blocks[0]]
        for layout, block in zip(self.layouts[1:], blocks[1:], strict=True):
            gains = list(block.gains)
            for place, (parent, _) in enumerate(layout.parents):
                if parent == 0:
                    gains[place] = joint[1:, layout.places.flatten(1)].movedim(0, -1)
            found.append(block._replace(gains=tuple(gains)))
        return found

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
            first, second = step[:-1], step[1:]
            below = columns[first % apart, :, second].movedim(0, 1) / size[:, :-1].unsqueeze(-2)
            above = columns[second % apart, :, first].movedim(0, 1) / size[:, 1:].unsqueeze(-2)
            lower[:, 1:] = (below + above.mT) / 2
        cross = []
        for parent, row in layout.parents:
            size = sizes[self.layouts[parent].places[row].flatten(1)].unsqueeze(-2)  # (N, 1, d_p)
            if len(found := responses[parent]):
                cross.append(found[:, layout.places].flatten(-2).permute(1, 2, 0) / size)  # (N, T d, d_p)
            else:
                cross.append(torch.zeros_like(size).expand(-1, steps * width, -1))
        return Precision((diagonal + diagonal.mT) / 2, lower, tuple(cross))

    def _conditionals(
        self,
        precision: list[Precision],
        loc: Tensor,
        bends: list[Bends] | None = None,
        rate: float = 1.0,
    ) -> list[Conditional]:
        """Return the distribution of each block given its parents, by elimination of the last block first.

        The precision of the root is that of its marginal distribution.

        Args:
            precision: The precision of each block.
            loc: The mean, ``(D,)``.
            bends: Derivatives in the root's latents, to be blended with the present ones; None for the present ones.
            rate: Their share.

        Raises:
            LinAlgError: If the precision is not positive definite.
        """
        left = [Precision(p.diagonal.clone(), p.lower, tuple(c.clone() for c in p.cross)) for p in precision]
        found: list[Conditional] = []
        for place in reversed(range(len(left))):
            layout, own = self.layouts[place], left[place]
            diagonal = own.diagonal if own.diagonal.shape[1] > 1 else _positive(own.diagonal)
            matrix, scale = _forwards(diagonal, own.lower)
            bent = self._bent(place, bends, rate)
            block = Conditional(loc[layout.places], (), matrix, scale, *bent)
            solved = [-_solved_columns(block, cross) for cross in own.cross]
            for (parent, row), cross in zip(layout.parents, own.cross, strict=True):
                if parent == 0 and self.has_root:
                    continue
                above = [other for other, _ in self.layouts[parent].parents]
                for (other, _), gain in zip(layout.parents, solved, strict=True):
                    change = cross.mT @ gain  # (N, d_p, d_q)
                    if other == parent:
                        left[parent].diagonal[:, 0].index_add_(0, row, change)
                    elif other in above:
                        left[parent].cross[above.index(other)].index_add_(0, row, change)
            found.append(block._replace(gains=tuple(solved)))
        return found[::-1]

    def _bent(self, place: int, bends: list[Bends] | None, rate: float) -> Bends:
        """Return the derivatives of a block's A, log diag L and gains in the root's latents."""
        if not hasattr(self, "blocks"):
            rows, steps, width = self.layouts[place].places.shape
            above = sum(self.layouts[parent].places[0].numel() for parent, _ in self._other_parents(place))
            turn = self.loc.new_zeros(rows, steps, width, width, len(self.root))
            return turn, turn[:, :, :, 0], self.loc.new_zeros(rows, steps * width, above, len(self.root))
        own = self.blocks[place]
        old = own.turn, own.stretch, own.lean
        if bends is None or (place == 0 and self.has_root):
            return old
        turn, stretch, lean = (torch.lerp(mine, theirs, rate) for mine, theirs in zip(old, bends[place], strict=True))
        return turn, stretch, lean

    def _other_parents(self, place: int) -> list[tuple[int, Tensor]]:
        """Return the parents of a block but the root, and the row of them that each row belongs to."""
        return [(parent, row) for parent, row in self.layouts[place].parents if parent or not self.has_root]

    def _solved(self, blocks: list[Conditional], x: Tensor, damping: float, joint: Tensor | None) -> Tensor:
        """Return the natural gradient from a gradient ``(D,)``; that of the root counts the moves of all blocks.

        The root is damped by its precision, the others here.
        """
        x, change = x.clone(), torch.empty_like(x)
        middle: list[Tensor] = []
        for layout, block in zip(reversed(self.layouts), reversed(blocks), strict=True):
            middle.append(block.solved(x[layout.places]))
            for (parent, row), gain in zip(layout.parents, block.gains, strict=True):
                if parent == 0 and self.has_root:
                    continue
                place = self.layouts[parent].places[:, 0]  # (N_p, d_p)
                back = (gain.mT @ x[layout.places].flatten(1).unsqueeze(-1)).squeeze(-1)  # (N, d_p)
                x[place] = x[place].index_add(0, row, back)
        away: list[Tensor] = []
        for number, (layout, block, solved) in enumerate(zip(self.layouts, blocks, reversed(middle), strict=True)):
            if number or not self.has_root:
                solved = (solved if joint is None else joint[0][layout.places]) / (1 + damping)
            if joint is not None:  # it has the moves that follow from those of other blocks, except the root
                above = [(parent, gain) for (parent, _), gain in zip(layout.parents, block.gains, strict=True)]
                for parent, gain in above if self.has_root else ():
                    if parent == 0:
                        solved = solved + (gain @ away[0][[0] * len(gain)].unsqueeze(-1)).reshape(solved.shape)
                change[layout.places] = solved
                away.append(solved.flatten(1))
                continue
            for (parent, row), gain in zip(layout.parents, block.gains, strict=True):
                solved = solved + (gain @ away[parent][row].unsqueeze(-1)).reshape(solved.shape)
            change[layout.places] = solved
            away.append(solved.flatten(1))
        return change


def _colours(layout: Layout) -> list[Tensor]:
    """Divide the places of a block into sets, so that no two latents of a set share a neighbour."""
    _, steps, width = layout.places.shape
    apart = 1 if steps == 1 else APART
    return [layout.places[:, k::apart, j].flatten() for k in range(apart) for j in range(width)]


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
