"""The Gaussian nearest to a density, found in about a second: a dense one, or one of low rank plus diagonal.

Batch and match (Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei, Saul 2024, arXiv:2402.14758) draws z from the
Gaussian N(μ, Σ) in each round and takes the scores g = ∇ log p(z).  Then it moves to the Gaussian whose own scores
match them best.  The update has a closed form and is invariant under linear changes of variables.

For tens of thousands of coordinates there is the Gaussian of low rank plus diagonal.
Its draws are z = m + S C w, with w standard normal, S diagonal, and C = I + Q (E - I) Qᵀ, which stretches R orthonormal
directions Q by E.  In units of S let H be the mean of -∇² log p over draws.  Each round improves mean, directions and
scales in turn.

* The method of Lanczos (1950, J. Res. Nat. Bur. Standards 45) finds orthonormal directions Q and numbers Θ with
  Qᵀ H Q = Θ, from R products of H with a vector, by differences of scores.  If the ELBO is quadratic, E = Θ^-1/2 is
  best for these directions.  As the first vector is the mean score, the same products solve for a Newton step of the
  mean (conjugate gradients: Hestenes, Stiefel 1952, J. Res. Nat. Bur. Standards 49).
* The ELBO is stationary in S if E[-∇ log p(z) ∘ (z - m)] = 1.  So this mean, whose noise vanishes if q is the
  posterior (Roeder, Wu, Duvenaud 2017, arXiv:1703.09194), divides the square of S.

Time and memory are proportional to the number of coordinates.  *Batch, match, and patch* (Modi, Cai, Saul 2024,
arXiv:2410.22292) fits the same family by scores alone.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..transforms.linear import stretched
from ..vjp import LogDensity, score_of, value_and_score

Watch = Callable[[], bool]  # called after each round of a search; True ends it.  bool() is False
HUGE = 1e15  # the largest number of a product
FAINT, RESTARTS = 1e-4, 3  # a length that is round-off, and new vectors after such
SLACK = 0.5  # nats by which the ELBO may fall in a step, which is noise of the draws


@dataclass(frozen=True)
class Matching:
    """Settings of batch and match.

    Attributes:
        near: The standard deviation of the log-weights, in nats, of a Gaussian that hardly differs from the posterior.
        poor: That of a Gaussian whose correlations may mislead.
        tried: Draws at which each size of a mode is tried.
        fewest: The fewest rounds, however small the budget.
        last: Rounds in which the learning rate decreases.
        close: The mean square of a difference between scores, relative to that of a score, at which fits rest.
    """

    near: float = 0.25
    poor: float = 5.0
    tried: int = 32
    fewest: int = 10
    last: int = 20
    close: float = 0.5


MATCHING = Matching()


class Gaussian(NamedTuple):
    """A Gaussian over packed, unconstrained latents, and its fit by the log-weights log p - log q.

    Attributes:
        loc: The mean, ``(D,)``.
        scale_tril: The Cholesky factor of the covariance, ``(D, D)``.
        elbo: The mean log-weight, in nats; -inf if it is NaN.
        spread: The standard deviation of the log-weights, in nats.
    """

    loc: Tensor
    scale_tril: Tensor
    elbo: float
    spread: float

    def holds(self, z: Tensor) -> Tensor:
        """Return True for vectors, ``(N, D)``, within the radius that holds nearly all of the Gaussian, ``(N,)``."""
        distance = torch.linalg.solve_triangular(self.scale_tril, (z - self.loc).T, upper=False).norm(dim=0)
        return distance < math.sqrt(len(self.loc)) + 3

    @property
    def is_near(self) -> bool:
        """True if the Gaussian hardly differs from the posterior."""
        return self.spread < MATCHING.near

    @property
    def is_poor(self) -> bool:
        """True if the Gaussian fits so badly that its correlations may mislead."""
        return self.spread > MATCHING.poor


def judged(log_p: Tensor, noise: Tensor, log_det: Tensor | float) -> tuple[float, float]:
    """Return the mean and the standard deviation of the log-weights log p - log q of draws, in nats.

    The mean is the ELBO, -inf if it is NaN.  The weights are constant if q is the posterior.

    Args:
        log_p: The log-density of the posterior at the draws, ``(N,)``.
        noise: The standard normal noise of the draws, ``(N, D)``.
        log_det: The log-determinant of the draws in their noise.
    """
    log_q = -noise.square().sum(-1) / 2 - noise.shape[-1] / 2 * math.log(2 * math.pi)
    weights = log_p - (log_q - log_det)
    return float(weights.mean().nan_to_num(-math.inf, math.inf, -math.inf)), float(weights.std())


def is_no_worse(elbo: float, start: float, dtype: torch.dtype) -> bool:
    """True if a step to an ELBO may be taken; large sums have round-off, too."""
    return elbo >= start - SLACK - 16 * torch.finfo(dtype).eps * abs(start) or not math.isfinite(start)


def fit_gaussian(
    density: LogDensity, loc: Tensor, scale: float, *, rounds: int = 100, budget: float = math.inf, watch: Watch = bool
) -> Gaussian:
    """Fit a Gaussian by batch and match; return the start if no round improves on it.

    Args:
        density: The log-density.
        loc: The start's mean, ``(D,)``.
        scale: The start's standard deviation.
        rounds: The largest number of rounds from each place.
        budget: The largest number of gradients.
        watch: Called after each round; True ends the search.
    """
    start = torch.eye(len(loc), dtype=loc.dtype, device=loc.device) * scale
    found = [_fitted(density, loc, start)]
    rounds = int(min(rounds, max(MATCHING.fewest, budget / 2 / max(64, 2 * len(loc)))))
    for place in (_climb(density, loc), loc):
        if (gaussian := match(density, place, start, rounds, watch)) is not None:
            found.append(gaussian)
            if gaussian.is_near or watch():
                break
    return max(found, key=lambda gaussian: gaussian.elbo)


def match_top(density: LogDensity, top: Tensor, scale_tril: Tensor, watch: Watch = bool) -> Gaussian | None:
    """Match a Gaussian to the mode around a top, which may be far narrower than ``scale_tril``.

    It starts at the largest of some sizes at which the density falls by at most a nat per dimension.  None if it breaks
    down or leads away.
    """
    sizes = 3.0 ** -torch.arange(1.0, 7.0).to(top)
    noise = torch.randn(len(sizes), MATCHING.tried, len(top), dtype=top.dtype, device=top.device) @ scale_tril.T
    with torch.no_grad():
        heights = density((top + sizes.view(-1, 1, 1) * noise).flatten(0, 1)).view(len(sizes), -1)
        fall = density(top.unsqueeze(0)) - heights.nan_to_num(-math.inf, math.inf, -math.inf).median(-1).values
    fits = (fall <= len(top)).nonzero()
    found = match(density, top, sizes[int(fits[0]) if len(fits) else -1] * scale_tril, 60, watch)
    return found if found is not None and found.holds(top.unsqueeze(0)) else None


def match(
    density: LogDensity, loc: Tensor, scale_tril: Tensor, rounds: int = 100, watch: Watch = bool
) -> Gaussian | None:
    """Batch and match with a learning rate that is constant until the scores stop improving, and then decreases.

    None if it breaks down.
    """
    eye, draws = torch.eye(len(loc), dtype=loc.dtype, device=loc.device), max(64, 2 * len(loc))
    rests, errors = rounds / 2, list[float]()  # mean squares of differences between scores, where Σ = I
    try:
        for number in range(1, rounds + 1):
            noise = torch.randn(draws, len(loc), dtype=loc.dtype, device=loc.device)
            score = score_of(density, loc + noise @ scale_tril.T)
            usable = score.isfinite().all(-1)
            if usable.sum() < draws / 2:
                scale_tril = scale_tril / 2
                continue
            noise, score = noise[usable], score[usable]
            errors.append(float((score @ scale_tril + noise).square().mean()))
            latest, before = errors[-3:], errors[-6:-3]
            if number < rests and len(before) == 3 and statistics.median(latest) < MATCHING.close:
                rests = number if statistics.median(latest) > 0.7 * statistics.median(before) else rests
            if number > rests + MATCHING.last or watch():
                break
            rate = draws / max(1.0, number - rests)
            weight = rate / (1 + rate)
            mean, mean_score = noise.mean(0), score.mean(0)
            u = rate * torch.cov(score.T, correction=0).reshape(eye.shape) + weight * mean_score.outer(mean_score)
            v = rate * torch.cov(noise.T, correction=0).reshape(eye.shape) + weight * mean.outer(mean)
            # Σ' solves Σ' U Σ' + Σ' = Σ + L V Lᵀ with Σ = L Lᵀ; eigenvalues give it where the right side is I.
            root = scale_tril @ torch.linalg.cholesky(eye + v)
            eigenvalues, vectors = torch.linalg.eigh(root.T @ u @ root)
            shrink = 2 / (1 + (1 + 4 * eigenvalues.clamp_min(0)).sqrt())
            factor = root @ (vectors * shrink.sqrt())
            loc = loc + weight * (factor @ (factor.T @ mean_score) + scale_tril @ mean)
            scale_tril = torch.linalg.qr(factor.T).R.T
            scale_tril = scale_tril * scale_tril.diagonal().sign()
    except LinAlgError:
        return None
    return _fitted(density, loc, scale_tril)


def _climb(density: LogDensity, loc: Tensor) -> Tensor:
    """Make some steps of L-BFGS uphill."""
    from scipy.optimize import minimize  # importing torch's L-BFGS takes most of a second

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        height, score = value_and_score(density, torch.as_tensor(x).to(loc).unsqueeze(0))
        return -float(height.nan_to_num(-math.inf)), -score[0].nan_to_num(0, 0, 0).double().cpu().numpy()

    found = minimize(loss, loc.double().cpu().numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 20})
    place = torch.as_tensor(found.x).to(loc)
    return place if place.isfinite().all() else loc


@torch.no_grad()
def _fitted(density: LogDensity, loc: Tensor, scale_tril: Tensor) -> Gaussian:
    """Return a Gaussian with the mean and spread of some log-weights."""
    noise = torch.randn(500, len(loc), dtype=loc.dtype, device=loc.device)
    log_det = scale_tril.diagonal().log().sum()
    return Gaussian(loc, scale_tril, *judged(density(loc + noise @ scale_tril.T), noise, log_det))


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
        ends = averaged > SEARCH.averaged or (averaged > 1 and not rises and search.step < SEARCH.still)
        if watch() or search.gradients > budget or ends:
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
        self.density, self.rank, self.step, self._shift = density, rank, math.inf, SEARCH.shift
        none = loc.new_zeros(len(loc), 0)
        self.q, self.gradients = LowRankGaussian(loc, torch.full_like(loc, scale), none, none[0]), -2 * SEARCH.pairs
        self.q = self.q._replace(elbo=self._judged(self.q, self._scored(self.q)[0]))

    def advance(self, rate: float) -> None:
        """Make a round that counts for a share of all so far, if it increases the ELBO."""
        q, (noise, z, score, usable) = self.q, self._scored(self.q)
        gradient = q.scale * score[usable].mean(0)
        found = self._curvature(z[usable][: SEARCH.curved], gradient, rate) if usable.sum() >= len(z) / 2 else None
        if found is None:
            self.q = q._replace(scale=q.scale / 2)
            return
        (basis, values), start, moved = found, self._judged(q, noise), 0.0
        for damping in SEARCH.dampings:
            damped = values * (1 + damping)
            change = basis @ (basis.T @ gradient / damped)
            new = q._replace(loc=q.loc + rate * q.scale * change, directions=basis, stretch=damped.rsqrt())
            if is_no_worse(self._judged(new, noise), start, q.loc.dtype):
                q, moved = new, float((basis.T @ change).mul(damped.sqrt()).norm())
                break
        self._rescale(q, rate, moved * len(q.loc) ** -0.5)

    def _rescale(self, q: LowRankGaussian, rate: float, moved: float) -> None:
        """Change S of a Gaussian as far as that increases the ELBO, and take the Gaussian, whose mean has moved.

        The squares of S are moved together as far as their differences are noise.
        """
        noise, z, score, usable = self._scored(q)
        start = self._judged(q, noise)
        self.q, self.step = q._replace(elbo=start), moved
        if usable.sum() < SEARCH.pairs:
            return
        known = (q.stretched(noise, q.stretch) * q.stretched(noise, 1 / q.stretch) - 1)[usable]  # with mean zero
        terms, centred = (score * (q.loc - z))[usable], known - known.mean(0)
        terms = terms - (terms * centred).sum(0) / centred.square().sum(0).clamp_min(1e-12) * known  # with less noise
        square, variance = terms.mean(0), terms.var(0) / len(terms)
        apart = square - square.mean()
        clear = (1 - SEARCH.sure**2 * variance / apart.square().clamp_min(1e-12)).clamp_min(0)
        change = (square.mean() + apart * clear).clamp(1 / SEARCH.most, SEARCH.most).log() * -rate / 2
        for _ in SEARCH.dampings:
            new = q._replace(scale=q.scale * change.exp())
            elbo = self._judged(new, noise)
            if is_no_worse(elbo, start, q.loc.dtype):
                self.q, self.step = new._replace(elbo=elbo), max(moved, float(change.square().mean().sqrt()) / rate)
                return
            change = change / 4

    def _curvature(self, places: Tensor, start: Tensor, rate: float) -> tuple[Tensor, Tensor] | None:
        """Return orthonormal directions Q, ``(D, R)``, and the diagonal of Qᵀ H Q, ``(R,)``, from a first vector.

        H is blended with the present precision, and has the share ``rate``.  None if a product is not finite.
        """

        def product(vector: Tensor) -> Tensor:
            """Return H times a vector, by differences of scores at the draws where they are finite."""
            shift = self._shift * self.q.scale * vector
            forth, back = score_of(self.density, torch.cat((places + shift, places - shift))).chunk(2)
            self.gradients += 2 * len(places)
            apart = back - forth
            found = self.q.scale * apart[apart.isfinite().all(-1)].mean(0) / (2 * self._shift)
            return torch.lerp(self.q.stretched(vector, self.q.stretch.square().reciprocal()), found, rate)

        found = lanczos(product, start, self.rank)
        if found is None:
            return None
        values = found[1].abs().clamp_min(SEARCH.flat * max(1.0, float(found[1].abs().max())))
        self._shift = SEARCH.shift / max(1.0, float(values.max()) ** 0.5)
        return found[0], values

    def _scored(self, q: LowRankGaussian) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return noise, the draws with it, the scores there, each ``(N, D)``, and True where these are finite."""
        half = torch.randn(SEARCH.pairs, len(q.loc), dtype=q.loc.dtype, device=q.loc.device)
        noise = torch.cat((half, -half))
        z = q.place(noise)
        value, score = value_and_score(self.density, z)
        self.gradients += len(z)
        return noise, z, score, value.isfinite() & score.isfinite().all(-1)

    @torch.no_grad()
    def _judged(self, q: LowRankGaussian, noise: Tensor) -> float:
        """Return the mean log-weight of the draws with some noise."""
        return judged(self.density(q.place(noise)), noise, q.scale.log().sum() + q.stretch.log().sum())[0]


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return orthonormal directions Q, ``(D, R)``, and ascending numbers, ``(R,)``, with Qᵀ H Q their diagonal matrix.

    The method of Lanczos finds extreme directions of a symmetric matrix that is known by its products with vectors.  If
    the first vector lies in the span of few eigenvectors, there are fewer directions.

    Args:
        product: The product of H with a vector, ``(D,) -> (D,)``.
        start: The first vector, ``(D,)``; a random one if it is zero or not finite.
        rank: The largest number R of directions.

    Returns:
        Q and the numbers, or None if a product is not finite.
    """
    vector, restarts = start / start.abs().max(), 0  # whose square may overflow
    vector = vector if bool(vector.isfinite().all()) else torch.randn_like(start)
    basis, diagonal, beside = start.new_zeros(min(rank, len(start)), len(start)), list[float](), list[float]()
    for place in range(len(basis)):
        basis[place] = vector / vector.norm()
        image = product(basis[place])
        if not bool((image.abs() <= HUGE).all()):
            return None
        diagonal.append(float(basis[place] @ image))
        known = basis[: place + 1]
        vector = _across(image, known)
        beside.append(float(vector.norm()))
        if beside[-1] <= FAINT * max(map(abs, diagonal)):  # the space is complete: look for others
            if restarts == RESTARTS:
                basis = known
                break
            beside[-1], restarts, vector = 0.0, restarts + 1, _across(torch.randn_like(start), known)
    matrix = torch.tensor(diagonal, dtype=torch.float64).diag() + torch.tensor(
        beside[: len(basis) - 1], dtype=torch.float64
    ).diag(-1)
    values, vectors = torch.linalg.eigh(matrix)  # which reads the lower triangle
    return basis.T @ vectors.to(basis), values.to(basis)


def _across(vector: Tensor, known: Tensor) -> Tensor:
    """Return what is left of a vector without its parts along orthonormal rows, ``(n, D)``."""
    for _ in range(2):  # once loses orthogonality to round-off
        vector = vector - (known @ vector) @ known
    return vector
