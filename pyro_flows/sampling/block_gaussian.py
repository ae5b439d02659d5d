"""The distribution of a given block structure that is nearest to a density, by natural gradients.

For q = N(m, P⁻¹) the ELBO is stationary if E_q[∇ log p] = 0 and P = -E_q[∇² log p] (Opper, Archambeau 2009, *The
Variational Gaussian Approximation Revisited*, Neural Computation 21).  So each round draws from q, takes P from mean
second derivatives, and moves the mean by P⁻¹ E_q[∇ log p]: a Newton step for a density smoothed by q (Khan, Rue 2021,
*The Bayesian Learning Rule*, arXiv:2107.04562).

P has the structure of the guide (:mod:`.block_conditionals`), so few differences of scores give all of it
(:mod:`.block_curvature`).  The root is fitted to log p(g, z(g, w)) + log|dz/dw|, where the others move with it: a
Laplace approximation nested in another (Rue, Martino, Chopin 2009, JRSS B 71).
"""

import math
import statistics
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..vjp import LogDensity, score_of
from .block_conditionals import Bends, Blocks, BlockStructure, Conditional, Layout, NotPositive, Precision
from .block_curvature import Curvature
from .gaussian import Watch, is_no_worse, judged


@dataclass(frozen=True)
class BlockSearch:
    """Settings of a search.

    Attributes:
        numbers: The numbers of the largest precision, for memory.
        pairs: The fewest and the most antithetic pairs of draws of a round.
        drawn: Numbers to draw in a round, between these; many rows average the noise of a draw.
        many: Directions of differences from which on few draws take part, and latents of the largest root.
        dampings: Of a step that does not increase the ELBO (Levenberg, Marquardt).
        near: The root mean square step, in standard deviations, from which on rounds are averaged.
        averaged: The largest number of such rounds.
        still: The step, in the same unit, at which the search ends.
        latest: Steps that are compared with as many before them, which finds steps that are noise.
        held: Rounds at most in which the root is held, so that the others suit it before it moves.
        funnel: Latents of the largest root on which the scales of others depend; each takes two more curvatures.
        bend: Standard deviations of the root by which it is moved to see how the others depend on it.
    """

    numbers: int = 20_000_000
    pairs: tuple[int, int] = (2, 8)
    drawn: int = 40_000
    many: int = 256
    dampings: tuple[float, ...] = (0.0, 0.1, 1.0, 10.0, 100.0, 1000.0)
    near: float = 0.2
    averaged: int = 12
    still: float = 0.03
    latest: int = 4
    held: int = 6
    funnel: int = 16
    bend: float = 0.7


SEARCH = BlockSearch()
Parts = TypeVar("Parts", Precision, Bends)


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
    structure = BlockStructure(layouts)
    numbers = sum(layout.places.numel() * layout.places.shape[-1] for layout in layouts)
    if numbers > SEARCH.numbers or len(structure.root) > SEARCH.many:
        return None
    search, averaged = _Search(density, structure, loc, scale), 0
    began, steps = search.elbo, list[float]()  # the sizes of the steps since the root moves
    for number in range(rounds):
        if search.holds_root and (number >= SEARCH.held or search.step < SEARCH.near):
            search.holds_root, search.step, steps = False, math.inf, []
        rested = search.step < SEARCH.near * (2 if averaged else 1) or _are_noise(steps)
        averaged = averaged + 1 if rested and not search.holds_root else 0
        ends = averaged > SEARCH.averaged or (averaged > 1 and search.step < SEARCH.still)
        if ends or watch() or not search.advance(1 / max(1, averaged)):
            break
        steps.append(search.step)
    if not math.isfinite(search.elbo) or (math.isfinite(began) and search.elbo <= began):
        return None
    return BlockGaussian(tuple(search.blocks), search.elbo)


def _are_noise(steps: list[float]) -> bool:
    """True if steps are small and no longer decrease, so that they are noise of the draws."""
    latest, before = steps[-SEARCH.latest :], steps[-2 * SEARCH.latest : -SEARCH.latest]
    is_long = len(before) == SEARCH.latest
    return is_long and max(latest) < 1 and statistics.median(latest) > 0.7 * statistics.median(before)


class _Search:
    """The state of a search: the mean, the precision, and the conditional distributions that follow from it.

    Attributes:
        step: The root mean square of the last step, in standard deviations, of the block in which it was largest.
        elbo: The estimated ELBO, in nats.
        holds_root: True to leave the root as it is.
    """

    def __init__(self, density: LogDensity, structure: BlockStructure, loc: Tensor, scale: float) -> None:
        self._structure, self._dtype = structure, loc.dtype
        self._density = lambda z: density(z.to(loc)).to(z)
        self._curvature = Curvature(self._density, structure)
        least, most = SEARCH.pairs
        self._pairs = max(least, min(most, SEARCH.drawn // len(loc)))
        self._curved = max(2, self._pairs // 2)  # draws at which second derivatives are taken
        if self._curvature.directions > SEARCH.many:  # then more draws of the score alone cost next to nothing
            self._pairs, self._curved = self._curvature.directions // 16, 2
        self._loc, self.step, self.holds_root = loc.double(), math.inf, structure.has_root
        self._precision, bends = structure.isotropic(scale**-2, self._loc)
        self.blocks = structure.conditionals(self._precision, self._loc, bends)
        self.elbo = self._judged(self.blocks, self._noise())

    def _noise(self) -> Tensor:
        half = torch.randn(self._pairs, len(self._loc), dtype=self._loc.dtype, device=self._loc.device)
        return torch.stack((half, -half), 1).flatten(0, 1)

    def advance(self, rate: float) -> bool:
        """Make a step, shorter than the natural gradient's by a factor; return False if no step is found."""
        structure, noise, bends = self._structure, self._noise(), [block.bends for block in self.blocks]
        z = structure.placed(self.blocks, noise)
        score = score_of(self._density, z)
        usable = score.isfinite().all(-1)
        if usable.sum() < len(score) / 2:  # halve all deviations; the means stay
            self._precision = [Precision(*(4 * part for part in own)) for own in self._precision]
            self.blocks = structure.conditionals(self._precision, self._loc, bends)
            return True
        score, places, curvature = score[usable].mean(0), z[usable][: self._curved], self._curvature
        found = curvature.precision(places, self._precision)
        if self.holds_root:
            score[structure.root], found[0] = 0.0, self._precision[0]
        elif structure.has_root:
            curved = self._curved
            if len(structure.root) <= SEARCH.funnel:
                bends, curved = self._bends(noise[:curved]), len(noise)
            score[structure.root], found[0] = curvature.of_root(self.blocks, self._precision, noise, curved)
        coupled = curvature.is_coupled
        joint = curvature.joint(places, score, found, self._precision, self.blocks) if coupled else None
        start = self._judged(self.blocks, noise)
        for damping in SEARCH.dampings:
            precision = [_blended(*pair, rate) for pair in zip(self._precision, found, strict=True)]
            if structure.has_root:
                precision[0] = precision[0].damped(damping)
            bent = [_blended(block.bends, new, rate) for block, new in zip(self.blocks, bends, strict=True)]
            try:
                blocks = structure.with_gains(structure.conditionals(precision, self._loc, bent), joint)
            except NotPositive:
                rate /= 2
                continue
            change = rate * structure.natural_gradient(blocks, score, damping, joint)
            moved = structure.at(blocks, self._loc + change)
            elbo = self._judged(moved, noise)
            if is_no_worse(elbo, start, self._dtype):
                self.step = structure.size(blocks, change / rate)
                self._loc, self._precision, self.blocks, self.elbo = self._loc + change, precision, moved, elbo
                return True
        return False

    @torch.no_grad()
    def _judged(self, blocks: Blocks, noise: Tensor) -> float:
        """Return the mean log-weight of the draws with some noise."""
        root = self._structure.root_of(blocks, noise)
        log_p = self._density(self._structure.placed(blocks, noise))
        return judged(log_p, noise, sum(block.log_det(root) for block in blocks))[0]

    def _bends(self, noise: Tensor) -> list[Bends]:
        """Return for each block the derivatives of A, log diag L and gains in the root's latents.

        They are differences of the conditional distributions that suit the posterior at either side of the root's mean.
        The present ones are returned if there is no such distribution at one side.
        """
        structure, present, old = self._structure, self._precision, [block.bends for block in self.blocks]
        size, slopes = SEARCH.bend * present[0].diagonal[0, 0].inverse().diagonal().sqrt(), []
        for own in size.diag():
            sides = []
            for side in (own, -own):
                z = structure.placed(self.blocks, noise, side.expand(len(noise), -1))
                curvature = [present[0], *self._curvature.precision(z, present, first=1)]
                try:
                    moved = structure.conditionals(curvature, self._loc, old)
                    sides.append(structure.coefficients(moved, self.blocks))
                except NotPositive:
                    return old
            pairs = (zip(*pair, strict=True) for pair in zip(*sides, strict=True))
            slopes.append([[(high - low) / (2 * own.sum()) for high, low in pair] for pair in pairs])
        return [
            Bends(*(torch.stack(parts, -1) for parts in zip(*of_block, strict=True)))
            for of_block in zip(*slopes, strict=True)
        ]


def _blended(old: Parts, new: Parts, share: float) -> Parts:
    """Blend the tensors of two tuples, so that the new ones have some share."""
    return type(old)(*(torch.lerp(mine, other, share) for mine, other in zip(old, new, strict=True)))
