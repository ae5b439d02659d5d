"""The Gaussian of low rank plus diagonal that is nearest to a density, for tens of thousands of coordinates.

Its draws are z = m + S C w, with w standard normal, S diagonal, and C = I + Q (E - I) Qᵀ, which stretches R orthonormal
directions Q by E.  In units of S let H be the mean of -∇² log p over draws.  Each round improves mean, directions and
scales in turn.

* The method of Lanczos (:mod:`.lanczos`) finds orthonormal directions Q and numbers Θ with Qᵀ H Q = Θ, from R products
  of H with a vector, by differences of scores.  If the ELBO is quadratic, E = Θ^-1/2 is best for these directions.  As
  the first vector is the mean score, the same products solve for a Newton step of the mean (conjugate gradients:
  Hestenes, Stiefel 1952, J. Res. Nat. Bur. Standards 49).
* The ELBO is stationary in S if E[-∇ log p(z) ∘ (z - m)] = 1.  So this mean, whose noise vanishes if q is the
  posterior (Roeder, Wu, Duvenaud 2017, arXiv:1703.09194), divides the square of S.

Time and memory are proportional to the number of coordinates.  *Batch, match, and patch* (Modi, Cai, Saul 2024,
arXiv:2410.22292) fits the same family by scores alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..transforms.linear import stretched
from ..vjp import LogDensity, score_of, value_and_score
from .lanczos import lanczos
from .start_search import SLACK, Watch, elbo_of, is_no_worse, log_weights


@dataclass(frozen=True)
class LowRankSearch:
    """Settings of a search.

    Attributes:
        pairs: Antithetic pairs of draws of a round.
        curved: Draws of a round at which second derivatives are taken.
        shift: The distance between scores, in units of S at first, later of the sharpest direction's deviation.
        dampings: Of a step that does not increase the ELBO.
        sure: Standard errors by which a square of S must differ from the others to be moved apart.
        flat: The least eigenvalue, relative to the largest or to one.
        first: Directions at first, which double when the ELBO rises no more: many would hide that S is wrong.
        most: The largest factor of a square of S in a round.
        still: The root mean square change, in standard deviations, at which the search ends.
        rounds: The largest number of rounds.
        averaged: The largest number of rounds that are averaged.
    """

    pairs: int = 64
    curved: int = 8
    shift: float = 0.5
    dampings: tuple[float, ...] = (0.0, 1.0, 10.0, 100.0, 1000.0)
    sure: float = 2.0
    flat: float = 1e-6
    first: int = 8
    most: float = 16.0
    still: float = 0.03
    rounds: int = 60
    averaged: int = 12


SEARCH = LowRankSearch()


class LowRankGaussian(NamedTuple):
    """A Gaussian with z = m + S (w + Q (E - I) Qᵀ w), with its fit.

    Attributes:
        loc: The mean m, ``(D,)``.
        scale: The diagonal of S, ``(D,)``.
        directions: The orthonormal directions Q, ``(D, R)``.
        stretch: The diagonal of E, ``(R,)``.
        elbo: The mean log-weight, in nats.
        is_near: True if a guide that starts from it needs few steps.
    """

    loc: Tensor
    scale: Tensor
    directions: Tensor
    stretch: Tensor
    elbo: float = -math.inf
    is_near: bool = True

    def place(self, w: Tensor) -> Tensor:
        """Return the draws with some noise, ``(N, D)``."""
        return self.loc + self.scale * self.stretched(w, self.stretch)

    def stretched(self, w: Tensor, by: Tensor) -> Tensor:
        """Return w with its parts along the directions multiplied by numbers, ``(R,)``."""
        return stretched(w, self.directions, by)


def fit_low_rank(
    density: LogDensity, loc: Tensor, scale: float, rank: int, *, budget: float = math.inf, watch: Watch = bool
) -> LowRankGaussian | None:
    """Fit a Gaussian of low rank plus diagonal; return None if no round improves on the start.

    Args:
        density: The log-density.
        loc: The start's mean, ``(D,)``.
        scale: The start's standard deviation.
        rank: The number R of directions.
        budget: The number of gradients after which no further round begins.
        watch: Called after each round; True ends the search.
    """
    most = min(rank, len(loc))
    search = _Search(density, loc, scale, min(SEARCH.first, most))
    began, averaged = search.q.elbo, 1
    for _ in range(SEARCH.rounds):
        before = search.q.elbo
        search.advance(1 / averaged)
        rises = search.q.elbo > before + SLACK or not math.isfinite(search.q.elbo)
        if (
            watch()
            or search.gradients > budget
            or averaged > SEARCH.averaged
            or (averaged > 1 and not rises and search.step < SEARCH.still)
        ):
            break
        if not rises and search.rank < most:
            search.rank = min(2 * search.rank, most)
        else:
            averaged += averaged > 1 or not rises
    found = search.q._replace(is_near=averaged > 1)  # otherwise the ELBO was still rising
    return found if math.isfinite(found.elbo) and not found.elbo <= began else None


class _Search:
    """The state of a search.

    Attributes:
        q: The Gaussian.
        step: The root mean square change of the last round, in standard deviations: of the mean or of log S.
        gradients: The number of gradients so far.
    """

    def __init__(self, density: LogDensity, loc: Tensor, scale: float, rank: int) -> None:
        self.density, self.like, self.rank = density, loc, rank
        self.step, self.gradients, self._shift = math.inf, 0, SEARCH.shift
        none = loc.new_zeros(len(loc), 0)
        q = LowRankGaussian(loc, torch.full_like(loc, scale), none, none[0])
        self.q = q._replace(elbo=self._judged(q, self._noise()))

    def advance(self, rate: float) -> None:
        """Make a round that counts for a share of all so far, if it increases the ELBO."""
        noise, q = self._noise(), self.q
        z = q.place(noise)
        value, score = value_and_score(self.density, z)
        self.gradients += len(z)
        usable = value.isfinite() & score.isfinite().all(-1)
        gradient = q.scale * score[usable].mean(0)
        found = self._curvature(z[usable][: SEARCH.curved], gradient, rate) if usable.sum() >= len(z) / 2 else None
        if found is None:
            self.q = q._replace(scale=q.scale / 2)
            return
        basis, values = found
        start, moved = self._judged(q, noise), 0.0
        for damping in SEARCH.dampings:
            damped = values * (1 + damping)
            change = basis @ (basis.T @ gradient / damped)
            new = q._replace(loc=q.loc + rate * q.scale * change, directions=basis, stretch=damped.rsqrt())
            elbo = self._judged(new, noise)
            if is_no_worse(elbo, start, self.like.dtype):
                q, moved = new, float((basis.T @ change).mul(damped.sqrt()).norm())
                break
        self._rescale(q, rate, moved * len(q.loc) ** -0.5)

    def _rescale(self, q: LowRankGaussian, rate: float, moved: float) -> None:
        """Change S of a Gaussian as far as that increases the ELBO, and take the Gaussian, whose mean has moved."""
        noise = self._noise()
        z = q.place(noise)
        value, score = value_and_score(self.density, z)
        self.gradients += len(z)
        own = q.stretched(noise, q.stretch) * q.stretched(noise, 1 / q.stretch) - 1  # with mean zero
        usable = value.isfinite() & score.isfinite().all(-1)
        terms = _controlled((score * (q.loc - z))[usable], own[usable])
        start, change = self._judged(q, noise), -rate / 2 * _shrunk_log(terms)
        self.q, self.step = q._replace(elbo=start), moved
        for _ in SEARCH.dampings:
            new = q._replace(scale=q.scale * change.exp())
            elbo = self._judged(new, noise)
            if is_no_worse(elbo, start, self.like.dtype):
                self.q, self.step = new._replace(elbo=elbo), max(moved, float(change.square().mean().sqrt()) / rate)
                return
            change = change / 4

    def _curvature(self, places: Tensor, start: Tensor, rate: float) -> tuple[Tensor, Tensor] | None:
        """Return orthonormal directions Q, ``(D, R)``, and the diagonal of Qᵀ H Q, ``(R,)``, from a first vector.

        H is blended with the present precision, and has the share ``rate``.  None if a product is not finite.
        """

        def blended(vector: Tensor) -> Tensor:
            product = self._product(places, vector)
            present = self.q.stretched(vector, self.q.stretch.square().reciprocal())
            return product if rate == 1 else torch.lerp(present, product, rate)

        found = lanczos(blended, start, self.rank)
        if found is None:
            return None
        basis, values = found
        values = values.abs().clamp_min(SEARCH.flat * max(1.0, float(values.abs().max())))
        self._shift = SEARCH.shift / max(1.0, float(values.max()) ** 0.5)
        return basis, values

    def _product(self, places: Tensor, vector: Tensor) -> Tensor:
        """Return H times a vector, by differences of scores at the draws where they are finite."""
        shift = self._shift * self.q.scale * vector
        forth, back = score_of(self.density, torch.cat((places + shift, places - shift))).chunk(2)
        self.gradients += 2 * len(places)
        apart = back - forth
        return self.q.scale * apart[apart.isfinite().all(-1)].mean(0) / (2 * self._shift)

    def _noise(self) -> Tensor:
        half = torch.randn(SEARCH.pairs, len(self.like), dtype=self.like.dtype, device=self.like.device)
        return torch.cat((half, -half))

    @torch.no_grad()
    def _judged(self, q: LowRankGaussian, noise: Tensor) -> float:
        """Return the mean log-weight of the draws with some noise."""
        log_det = q.scale.log().sum() + q.stretch.log().sum()
        return elbo_of(log_weights(self.density(q.place(noise)), noise, log_det))


def _controlled(terms: Tensor, known: Tensor) -> Tensor:
    """Return numbers at draws, ``(N, D)``, with less noise, by regression on other numbers whose mean is zero."""
    spread = (known - known.mean(0)).square().sum(0).clamp_min(1e-12)
    return terms - (terms * (known - known.mean(0))).sum(0) / spread * known


def _shrunk_log(terms: Tensor) -> Tensor:
    """Return logarithms of means of draws, ``(N, D) -> (D,)``, moved together as far as their differences are noise."""
    if len(terms) < SEARCH.pairs:
        return torch.zeros_like(terms.sum(0))
    square, noise = terms.mean(0), terms.var(0) / len(terms)
    apart = square - square.mean()
    clear = (1 - SEARCH.sure**2 * noise / apart.square().clamp_min(1e-12)).clamp_min(0)
    return (square.mean() + apart * clear).clamp(1 / SEARCH.most, SEARCH.most).log()
