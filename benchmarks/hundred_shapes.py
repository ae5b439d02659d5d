"""Posteriors of ``hundred.py``: mixtures, shapes with known draws, constrained latents and latent structure.

``hundred_registry.py`` says what these files may import.  A function ``draw_...`` samples a posterior exactly.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from hundred_registry import entry, rng

Case = tuple[Callable[..., None], tuple[Any, ...]]
Draws = dict[str, np.ndarray]


@entry("mixture")
def gaussian_mixture_3() -> Case:
    """Mixture of three normals with ordered means: 150 rows."""
    random = rng("gaussian_mixture_3")
    group = random.choice(3, 150, p=[0.3, 0.45, 0.25])
    y = random.normal(np.array([-4.0, 0.0, 4.5])[group], np.array([0.8, 1.2, 1.0])[group])

    def model(y: Any) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(3.0 * torch.ones(3)))
        base = dist.Normal(torch.tensor([-3.0, 1.0, 1.0]), torch.tensor([2.0, 0.7, 0.7])).to_event(1)
        mean = pyro.sample("mean", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5).expand([3]).to_event(1))
        with pyro.plate("row", len(y)):
            parts = dist.MixtureSameFamily(dist.Categorical(probs=weights), dist.Normal(mean, scale))
            pyro.sample("y", parts, obs=y)

    return model, (y,)


@entry("mixture")
def mixture_of_regressions() -> Case:
    """Two regression lines with ordered slopes: 120 rows."""
    random = rng("mixture_of_regressions")
    x = random.uniform(-2.0, 2.0, 120)
    group = random.binomial(1, 0.4, 120)
    y = np.array([0.5, -0.3])[group] + np.array([-0.8, 1.5])[group] * x + random.normal(0.0, 0.6, 120)

    def model(x: Any, y: Any) -> None:
        share = pyro.sample("share", dist.Beta(3.0, 3.0))
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        low = pyro.sample("low", dist.Normal(0.0, 2.0))
        gap = pyro.sample("gap", dist.Gamma(3.0, 1.5))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        first = torch.log(share) + dist.Normal(alpha[..., 0:1] + low * x, sigma).log_prob(y)
        second = torch.log1p(-share) + dist.Normal(alpha[..., 1:2] + (low + gap) * x, sigma).log_prob(y)
        pyro.factor("y", torch.logaddexp(first, second).sum(-1))

    return model, (x, y)


@entry("mixture")
def student_mixture() -> Case:
    """Mixture of two Student-t distributions with ordered means: 150 rows."""
    random = rng("student_mixture")
    group = random.binomial(1, 0.35, 150)
    y = np.array([-1.5, 2.5])[group] + np.array([0.9, 0.7])[group] * random.standard_t(3.0, 150)

    def model(y: Any) -> None:
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        low = pyro.sample("low", dist.Normal(0.0, 2.0))
        gap = pyro.sample("gap", dist.Gamma(4.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.5).expand([2]).to_event(1))
        nu = pyro.sample("nu", dist.Gamma(2.0, 0.4))
        first = torch.log1p(-share) + dist.StudentT(1.0 + nu, low, scale[..., 0:1]).log_prob(y)
        second = torch.log(share) + dist.StudentT(1.0 + nu, low + gap, scale[..., 1:2]).log_prob(y)
        pyro.factor("y", torch.logaddexp(first, second).sum(-1))

    return model, (y,)


def unequal_modes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the weights, means and Cholesky factors of ``two_modes_5``."""
    random = rng("two_modes_5")
    means = np.stack([np.zeros(5), np.array([6.0, 0.0, -4.0, 0.0, 3.0])])
    roots = np.tril(0.4 * random.normal(size=(2, 5, 5)), -1) + np.array([1.0, 0.6])[:, None, None] * np.eye(5)
    return np.array([0.7, 0.3]), means, roots


def draw_unequal(random: np.random.Generator, n: int) -> Draws:
    """Sample ``two_modes_5``: the product of a normal prior and a mixture is a mixture."""
    weights, means, roots = unequal_modes()
    covariances = roots @ roots.swapaxes(-1, -2)
    wide = covariances + 100.0 * np.eye(5)
    distance = np.einsum("ki,ki->k", means, np.linalg.solve(wide, means[..., None])[..., 0])
    weights = weights * np.exp(-0.5 * distance) / np.sqrt(np.linalg.det(wide))
    narrow = np.linalg.inv(np.linalg.inv(covariances) + np.eye(5) / 100.0)
    centers = (narrow @ np.linalg.solve(covariances, means[..., None]))[..., 0]
    mode = random.choice(2, n, p=weights / weights.sum())
    return {"x": centers[mode] + (np.linalg.cholesky(narrow)[mode] @ random.normal(size=(n, 5, 1)))[..., 0]}


@entry("mixture", exact=draw_unequal)
def two_modes_5() -> Case:
    """Two modes of five dimensions, far apart and of unequal weights."""

    def model(weights: Any, means: Any, roots: Any) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 10.0).expand([5]).to_event(1))
        parts = dist.MultivariateNormal(means, scale_tril=roots).log_prob(x[..., None, :])
        pyro.factor("parts", torch.logsumexp(torch.log(weights) + parts, -1))

    return model, unequal_modes()


def draw_signs(random: np.random.Generator, n: int) -> Draws:
    """Sample ``symmetric_modes``: the size of each latent from a fine grid, and its sign."""
    edge = np.linspace(0.0, 6.0, 60001)
    middle = (edge[1:] + edge[:-1]) / 2
    draws = []
    for seen in (1.5, 2.5, 4.0):
        weight = np.exp(-0.5 * np.square(middle / 2.0) - 0.5 * np.square((seen - middle * middle) / 0.7))
        size = random.choice(middle, n, p=weight / weight.sum()) + random.uniform(-5e-5, 5e-5, n)
        draws.append(size * random.choice([-1.0, 1.0], n))
    return {"x": np.stack(draws, -1)}


@entry("mixture", exact=draw_signs)
def symmetric_modes() -> Case:
    """Three latents whose squares are observed with noise: eight modes of equal weight."""

    def model(y: Any) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(torch.square(x), 0.7), obs=y)

    return model, (np.array([1.5, 2.5, 4.0]),)


def draw_funnel(size: int) -> Callable[[np.random.Generator, int], Draws]:
    """Return the sampler of Neal's funnel with ``size`` latents."""

    def draw(random: np.random.Generator, n: int) -> Draws:
        v = random.normal(0.0, 3.0, n)
        return {"v": v, "x": np.exp(v / 2)[:, None] * random.normal(size=(n, size - 1))}

    return draw


def funnel(size: int) -> None:
    """Sample Neal's funnel (2003, doi:10.1214/aos/1056562461)."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("item", size - 1):
        pyro.sample("x", dist.Normal(0.0, torch.exp(v / 2.0)))


@entry("shape", exact=draw_funnel(10), eased=("x",))
def funnel_10() -> Case:
    """Neal's funnel of 10 latents."""
    return funnel, (10,)


@entry("shape", exact=draw_funnel(50), eased=("x",))
def funnel_50() -> Case:
    """Neal's funnel of 50 latents."""
    return funnel, (50,)


def draw_banana(random: np.random.Generator, n: int) -> Draws:
    """Sample ``banana_2``."""
    x = random.normal(0.0, 10.0, n)
    return {"x": x, "y": random.normal(0.03 * (x * x - 100.0), 1.0)}


@entry("shape", exact=draw_banana)
def banana_2() -> Case:
    """Banana of two latents."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal(0.03 * (torch.square(x) - 100.0), 1.0))

    return model, ()


def draw_bananas(random: np.random.Generator, n: int) -> Draws:
    """Sample ``banana_chain_50``."""
    x = np.zeros((n, 25))
    x[:, 0] = random.normal(size=n)
    for t in range(1, 25):
        x[:, t] = random.normal(0.7 * x[:, t - 1], 0.7)
    return {**{f"x_{t}": x[:, t] for t in range(25)}, "y": random.normal(x * x, 0.3)}


@entry("shape", exact=draw_bananas)
def banana_chain_50() -> Case:
    """Chain of 25 latents and their squares with noise: 25 correlated bananas."""

    def model() -> None:
        chain = [pyro.sample("x_0", dist.Normal(0.0, 1.0))]
        for t in range(1, 25):
            chain.append(pyro.sample(f"x_{t}", dist.Normal(0.7 * chain[-1], 0.7)))
        with pyro.plate("item", 25):
            pyro.sample("y", dist.Normal(torch.square(torch.stack(chain, -1)), 0.3))

    return model, ()


def draw_wave(random: np.random.Generator, n: int) -> Draws:
    """Sample ``wave_2``."""
    x = random.normal(0.0, 2.0, n)
    return {"x": x, "y": random.normal(2.0 * np.sin(1.5 * x), 0.3)}


@entry("shape", exact=draw_wave)
def wave_2() -> Case:
    """Two latents along a sine wave."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(2.0 * torch.sin(1.5 * x), 0.3))

    return model, ()


def draw_students(random: np.random.Generator, n: int) -> Draws:
    """Sample ``student_product_20``."""
    return {"x": np.linspace(-2.0, 2.0, 20) + random.standard_t(5.0, (n, 20))}


@entry("shape", exact=draw_students)
def student_product_20() -> Case:
    """Twenty independent Student-t latents of five degrees of freedom."""

    def model(loc: Any) -> None:
        with pyro.plate("item", len(loc)):
            pyro.sample("x", dist.StudentT(5.0, loc, 1.0))

    return model, (np.linspace(-2.0, 2.0, 20),)


def dense_root(name: str, scales: np.ndarray) -> np.ndarray:
    """Return the Cholesky factor of a randomly rotated covariance with these principal sds."""
    axes = np.linalg.qr(rng(name).normal(size=(len(scales), len(scales))))[0]
    return np.linalg.cholesky((axes * scales**2) @ axes.T)


def draw_gaussian(name: str, scales: np.ndarray) -> Callable[[np.random.Generator, int], Draws]:
    """Return the sampler of a rotated normal distribution."""

    def draw(random: np.random.Generator, n: int) -> Draws:
        return {"x": random.normal(size=(n, len(scales))) @ dense_root(name, scales).T}

    return draw


def gaussian(root: Any) -> None:
    """Sample a normal distribution with a dense covariance."""
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(len(root)), scale_tril=root))


@entry("shape", exact=draw_gaussian("correlated_gaussian_100", np.geomspace(0.1, 3.0, 100)))
def correlated_gaussian_100() -> Case:
    """Normal distribution of 100 latents with principal sds from 0.1 to 3."""
    return gaussian, (dense_root("correlated_gaussian_100", np.geomspace(0.1, 3.0, 100)),)


@entry("shape", exact=draw_gaussian("ill_conditioned_30", np.geomspace(1e-3, 10.0, 30)))
def ill_conditioned_30() -> Case:
    """Normal distribution of 30 latents with principal sds from 0.001 to 10."""
    return gaussian, (dense_root("ill_conditioned_30", np.geomspace(1e-3, 10.0, 30)),)


def known_design() -> tuple[np.ndarray, np.ndarray]:
    """Return the predictors and the outcome of ``conjugate_regression_35``."""
    random = rng("conjugate_regression_35")
    x = random.normal(size=(60, 35)) + 2.0 * random.normal(size=(60, 1))
    return x, x @ random.normal(0.0, 0.5, 35) + random.normal(0.0, 1.0, 60)


def draw_regression(random: np.random.Generator, n: int) -> Draws:
    """Sample the Gaussian posterior of ``conjugate_regression_35``."""
    x, y = known_design()
    precision = x.T @ x + np.eye(35) / 0.5**2
    root = np.linalg.cholesky(np.linalg.inv(precision))
    return {"beta": np.linalg.solve(precision, x.T @ y) + random.normal(size=(n, 35)) @ root.T}


@entry("shape", exact=draw_regression)
def conjugate_regression_35() -> Case:
    """Linear regression with known noise on 35 correlated predictors."""

    def model(x: Any, y: Any) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 0.5).expand([x.shape[-1]]).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)

    return model, known_design()


def draw_sphere(size: int, radius: float, noise: float) -> Callable[[np.random.Generator, int], Draws]:
    """Return the sampler of ``sphere``: the radius from a fine grid, and a uniform direction."""

    def draw(random: np.random.Generator, n: int) -> Draws:
        edge = np.linspace(0.0, radius + 10 * noise, 40001)
        middle = (edge[1:] + edge[:-1]) / 2
        log_weight = (size - 1) * np.log(middle) - 0.5 * np.square(middle / 3.0)
        log_weight = log_weight - 0.5 * np.square((radius - middle) / noise)
        weight = np.exp(log_weight - log_weight.max())
        length = random.choice(middle, n, p=weight / weight.sum()) + random.uniform(-0.5, 0.5, n) * edge[1]
        x = random.normal(size=(n, size))
        return {"x": length[:, None] * x / np.linalg.norm(x, axis=-1, keepdims=True)}

    return draw


def sphere(size: int, radius: float, noise: float) -> None:
    """Observe the distance of a point from the origin."""
    x = pyro.sample("x", dist.Normal(0.0, 3.0).expand([size]).to_event(1))
    pyro.sample("y", dist.Normal(torch.sqrt(torch.square(x).sum(-1)), noise), obs=torch.tensor(radius))


@entry("shape", exact=draw_sphere(2, 4.0, 0.2))
def ring_2() -> Case:
    """Ring in the plane."""
    return sphere, (2, 4.0, 0.2)


@entry("shape", exact=draw_sphere(10, 6.0, 0.3))
def shell_10() -> Case:
    """Thin shell in ten dimensions."""
    return sphere, (10, 6.0, 0.3)


def draw_skewed(random: np.random.Generator, n: int) -> Draws:
    """Sample ``skewed_product_40``."""
    return {
        "gumbel": random.gumbel(0.0, 1.0, (n, 10)),
        "gamma": random.gamma(0.8, 1.0, (n, 10)),
        "log_normal": random.lognormal(0.0, 0.7, (n, 10)),
        "beta": random.beta(0.7, 3.0, (n, 10)),
    }


@entry("shape", exact=draw_skewed)
def skewed_product_40() -> Case:
    """Forty independent skewed latents of four families."""

    def model() -> None:
        with pyro.plate("item", 10):
            pyro.sample("gumbel", dist.Gumbel(0.0, 1.0))
            pyro.sample("gamma", dist.Gamma(0.8, 1.0))
            pyro.sample("log_normal", dist.LogNormal(0.0, 0.7))
            pyro.sample("beta", dist.Beta(0.7, 3.0))

    return model, ()


def draw_chain(random: np.random.Generator, n: int) -> Draws:
    """Sample ``log_normal_chain``."""
    logs = [random.normal(0.0, 0.5, n)]
    for _ in range(31):
        logs.append(random.normal(0.9 * logs[-1], 0.25))
    return {f"x_{t}": np.exp(log) for t, log in enumerate(logs)}


@entry("shape", exact=draw_chain)
def log_normal_chain() -> Case:
    """Chain of 32 log-normal latents."""

    def model() -> None:
        x = pyro.sample("x_0", dist.LogNormal(0.0, 0.5))
        for t in range(1, 32):
            x = pyro.sample(f"x_{t}", dist.LogNormal(0.9 * torch.log(x), 0.25))

    return model, ()


@entry("constrained")
def von_mises_direction() -> Case:
    """Mean direction and concentration of 60 angles; the direction is a point of the plane."""
    y = rng("von_mises_direction").vonmises(2.6, 1.5, 60)

    def model(y: Any) -> None:
        point = pyro.sample("point", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        kappa = pyro.sample("kappa", dist.Gamma(2.0, 0.5))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.VonMises(torch.atan2(point[..., 1], point[..., 0]), kappa), obs=y)

    return model, (y,)


@entry("constrained")
def circular_regression() -> Case:
    """Angles that depend on two predictors with positive slopes through the arctangent link: 80 rows."""
    random = rng("circular_regression")
    x = random.normal(size=(80, 2))
    y = random.vonmises(0.5 + 2.0 * np.arctan(x @ np.array([0.8, 0.4])), 4.0)

    def model(x: Any, y: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.5, 0.3))
        beta = pyro.sample("beta", dist.HalfNormal(1.0).expand([2]).to_event(1))
        kappa = pyro.sample("kappa", dist.Gamma(10.0, 2.0))
        line = x @ beta
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.VonMises(mu + 2.0 * torch.atan2(line, torch.ones_like(line)), kappa), obs=y)

    return model, (x, y)


@entry("constrained")
def simplex_counts() -> Case:
    """Counts of five species at nine sites: Dirichlet shares around common shares."""
    random = rng("simplex_counts")
    y = random.multinomial(40, random.dirichlet(np.array([4.0, 3.0, 1.5, 1.0, 0.5]), 9)) + 0.0

    def model(y: Any) -> None:
        base = pyro.sample("base", dist.Dirichlet(2.0 * torch.ones(5)))
        alpha = pyro.sample("alpha", dist.Gamma(2.0, 0.2))
        with pyro.plate("site", len(y)):
            share = pyro.sample("share", dist.Dirichlet(alpha * base))
            pyro.sample("y", dist.Multinomial(total_count=40, probs=share), obs=y)

    return model, (y,)


@entry("constrained")
def correlation_matrix_5() -> Case:
    """Means, sds and correlations of five variables: 50 rows."""
    random = rng("correlation_matrix_5")
    root = np.tril(random.normal(0.0, 0.5, (5, 5)), -1) + np.eye(5)
    y = np.array([1.0, 0.0, -1.0, 0.5, 2.0]) + random.normal(size=(50, 5)) @ root.T

    def model(y: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0).expand([5]).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(2.0).expand([5]).to_event(1))
        root = pyro.sample("root", dist.LKJCholesky(5, concentration=2.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.MultivariateNormal(mu, scale_tril=scale[..., None] * root), obs=y)

    return model, (y,)


@entry("constrained")
def ordered_dose() -> Case:
    """Responses at seven doses whose effects cannot fall."""
    y = rng("ordered_dose").binomial(25, np.array([0.1, 0.12, 0.2, 0.4, 0.55, 0.7, 0.72])) + 0.0

    def model(y: Any) -> None:
        base = pyro.sample("base", dist.Normal(-1.0, 1.5))
        total = pyro.sample("total", dist.HalfNormal(4.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(6)))
        rise = torch.cat([torch.zeros_like(share[..., 0:1]), torch.cumsum(share, -1)], -1)
        with pyro.plate("dose", len(y)):
            pyro.sample("y", dist.Binomial(total_count=25, logits=base + total * rise), obs=y)

    return model, (y,)


@entry("latent structure")
def factor_model() -> Case:
    """Two factors of eight items, 100 rows; the factors are integrated out and positive loadings fix their signs."""
    random = rng("factor_model")
    main, cross = random.uniform(0.6, 1.3, (8, 1)), random.normal(0.0, 0.2, (8, 1))
    first = np.arange(8)[:, None] < 4
    loading = np.concatenate([np.where(first, main, cross), np.where(first, cross, main)], -1)
    y = random.normal(size=(100, 2)) @ loading.T + 0.6 * random.normal(size=(100, 8))

    def model(y: Any) -> None:
        main = pyro.sample("main", dist.LogNormal(-0.2, 0.5).expand([8]).to_event(1))
        cross = pyro.sample("cross", dist.Normal(0.0, 0.3).expand([8]).to_event(1))
        noise = pyro.sample("noise", dist.HalfNormal(1.0).expand([8]).to_event(1))
        first = torch.cat([main[..., :4], cross[..., 4:]], -1)
        second = torch.cat([cross[..., :4], main[..., 4:]], -1)
        shared = first[..., :, None] * first[..., None, :] + second[..., :, None] * second[..., None, :]
        covariance = shared + torch.square(noise)[..., None] * torch.eye(8)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(8), covariance_matrix=covariance), obs=y)

    return model, (y,)


@entry("latent structure")
def probabilistic_pca() -> Case:
    """One principal component of six columns with the scores of 30 rows; its sign is fixed."""
    random = rng("probabilistic_pca")
    y = random.normal(size=(30, 1)) * np.array([1.5, -0.8, 0.6, 1.0, 0.2, -0.4]) + random.normal(0.0, 0.6, (30, 6))

    def model(y: Any) -> None:
        first = pyro.sample("first", dist.LogNormal(0.0, 0.5))
        rest = pyro.sample("rest", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        loading = torch.cat([first[..., None], rest], -1)
        with pyro.plate("row", len(y)):
            score = pyro.sample("score", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(score[..., None] * loading, noise).to_event(1), obs=y)

    return model, (y,)


@entry("latent structure")
def occupancy() -> Case:
    """Occupancy of 50 sites, visited five times, with random site effects on detection; presence is summed out."""
    random = rng("occupancy")
    x = random.normal(size=50)
    present = random.binomial(1, 1 / (1 + np.exp(-0.3 - 0.9 * x)))
    y = random.binomial(5, present / (1 + np.exp(0.4 - random.normal(0.0, 0.7, 50)))) + 0.0

    def model(x: Any, y: Any) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.5))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(0.7))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
        logit = alpha + beta * x
        seen = dist.Binomial(total_count=5, logits=mean + tau * z).log_prob(y)
        here = torch.nn.functional.logsigmoid(logit) + seen
        gone = torch.nn.functional.logsigmoid(-logit)
        pyro.factor("y", torch.where(y > 0, here, torch.logaddexp(here, gone)).sum(-1))

    return model, (x, y)


@entry("latent structure")
def n_mixture() -> Case:
    """Repeated counts of animals at 30 sites, four visits each; abundance is summed out."""
    random = rng("n_mixture")
    x = random.normal(size=30)
    number = random.poisson(np.exp(1.4 + 0.5 * x))
    y = random.binomial(number[:, None], 0.45, (30, 4))
    sizes = np.arange(61)
    log_gamma = np.vectorize(math.lgamma)
    short = y.max(-1)[:, None] > sizes
    gap = np.maximum(sizes - y[..., None], 0)
    ways = (log_gamma(sizes + 1.0) - log_gamma(y[..., None] + 1.0) - log_gamma(gap + 1.0)).sum(1)
    missed = gap.sum(1) + 0.0

    def model(x: Any, seen: Any, missed: Any, ways: Any, sizes: Any) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
        logit = pyro.sample("logit", dist.Normal(0.0, 1.5))
        prior = dist.Poisson(torch.exp(alpha + beta * x)[..., None]).log_prob(sizes)
        hit, miss = torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)
        pyro.factor("y", torch.logsumexp(prior + ways + seen[:, None] * hit + missed * miss, -1).sum(-1))

    return model, (x, y.sum(-1) + 0.0, missed, np.where(short, -1e8, ways), sizes + 0.0)


@entry("latent structure")
def dawid_skene() -> Case:
    """Labels of 40 items by five annotators with confusion matrices of three classes; true classes are summed out."""
    random = rng("dawid_skene")
    truth = random.choice(3, 40, p=[0.5, 0.3, 0.2])
    skill = np.array([0.9, 0.8, 0.7, 0.6, 0.75])
    y = np.where(random.uniform(size=(40, 5)) < skill, truth[:, None], random.integers(0, 3, (40, 5)))

    def model(y: Any, seen: Any) -> None:
        share = pyro.sample("share", dist.Dirichlet(3.0 * torch.ones(3)))
        with pyro.plate("annotator", 5, dim=-2), pyro.plate("class", 3, dim=-1):
            confusion = pyro.sample("confusion", dist.Dirichlet(1.0 + 4.0 * torch.eye(3)))
        votes = torch.einsum("iab,...acb->...ic", seen, torch.log(confusion))
        pyro.factor("y", torch.logsumexp(torch.log(share)[..., None, :] + votes, -1).sum(-1))

    return model, (y, np.eye(3)[y])


@entry("latent structure")
def capture_recapture() -> Case:
    """Cormack-Jolly-Seber model of eight occasions: survival varies by year, capture is constant."""
    random = rng("capture_recapture")
    survival = np.array([0.6, 0.5, 0.7, 0.65, 0.4, 0.6, 0.7])
    again = np.zeros((7, 8))
    for first in range(7):
        for _ in range(25):
            now = first
            while now < 7 and random.uniform() < survival[now]:
                now += 1
                if random.uniform() < 0.6:
                    again[first, now - 1] += 1
                    break
            else:
                again[first, 7] += 1

    def model(again: Any) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        survive = pyro.sample("survive", dist.Normal(mean, tau).expand([7]).to_event(1))
        capture = pyro.sample("capture", dist.Beta(2.0, 2.0))
        phi = torch.sigmoid(survive)
        total = 0.0
        for first in range(7):
            alive, never = 1.0, 1.0
            for last in range(first, 7):
                alive = alive * phi[..., last]
                cell = alive * capture
                total = total + again[first, last] * torch.log(cell)
                never = never - cell
                alive = alive * (1.0 - capture)
            total = total + again[first, 7] * torch.log(never)
        pyro.factor("again", total)

    return model, (again,)


@entry("latent structure")
def latent_dirichlet_tiny() -> Case:
    """Two topics of eight words in 24 documents; the topic of each word is summed out."""
    random = rng("latent_dirichlet_tiny")
    prior = np.array([[5.0, 4.0, 3.0, 1.0, 1.0, 1.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0, 1.0, 3.0, 4.0, 5.0]])
    topic = np.stack([random.dirichlet(row) for row in prior])
    y = np.stack([random.multinomial(40, random.dirichlet([0.8, 0.8]) @ topic) for _ in range(24)]) + 0.0

    def model(prior: Any, y: Any) -> None:
        with pyro.plate("topic", 2):
            word = pyro.sample("word", dist.Dirichlet(prior))
        with pyro.plate("document", len(y)):
            share = pyro.sample("share", dist.Beta(0.8, 0.8))
            chance = share[..., None] * word[..., 0, :] + (1.0 - share)[..., None] * word[..., 1, :]
            pyro.sample("y", dist.Multinomial(total_count=40, probs=chance), obs=y)

    return model, (prior, y)


def neighbours(rows: int, columns: int) -> np.ndarray:
    """Return the adjacency matrix of a grid."""
    place = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    return (np.abs(place[:, None] - place).sum(-1) == 1) + 0.0


@entry("latent structure")
def spatial_car_40() -> Case:
    """Proper conditional autoregression on a 5 × 8 grid with Poisson counts; the effects are centred."""
    random = rng("spatial_car_40")
    near = neighbours(5, 8)
    root = np.linalg.cholesky(np.linalg.inv(np.diag(near.sum(-1)) - 0.95 * near))
    x, expected = random.normal(size=40), random.uniform(2.0, 10.0, 40)
    y = random.poisson(expected * np.exp(0.1 + 0.3 * x + 0.8 * (root @ random.normal(size=40))))

    def model(root: Any, x: Any, expected: Any, y: Any) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        effect = pyro.sample("effect", dist.MultivariateNormal(torch.zeros(len(y)), scale_tril=tau * root))
        with pyro.plate("area", len(y)):
            pyro.sample("y", dist.Poisson(expected * torch.exp(alpha + beta * x + effect)), obs=y)

    return model, (root, x, expected, y)


@entry("latent structure")
def besag_york() -> Case:
    """Besag-York-Mollié model on a 6 × 6 grid: intrinsic and independent effects of each area."""
    random = rng("besag_york")
    near = neighbours(6, 6)
    first, second = np.nonzero(np.triu(near))
    inverse = np.linalg.pinv(np.diag(near.sum(-1)) - near)
    factor = 1 / math.sqrt(np.exp(np.log(np.diag(inverse)).mean()))
    value, axes = np.linalg.eigh(inverse)
    rough = factor * axes @ (np.sqrt(np.maximum(value, 0.0)) * random.normal(size=36))
    expected = random.uniform(3.0, 12.0, 36)
    y = random.poisson(expected * np.exp(0.5 * (math.sqrt(0.7) * rough + math.sqrt(0.3) * random.normal(size=36))))

    def model(first: Any, second: Any, factor: float, expected: Any, y: Any) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        rho = pyro.sample("rho", dist.Beta(2.0, 2.0))
        phi = pyro.sample("phi", dist.Normal(0.0, 10.0).expand([36]).to_event(1))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0).expand([36]).to_event(1))
        pyro.factor("differences", -0.5 * torch.square(phi[..., first] - phi[..., second]).sum(-1))
        pyro.factor("sum", dist.Normal(0.0, 0.036).log_prob(phi.sum(-1)))
        effect = sigma * (torch.sqrt(rho) * factor * phi + torch.sqrt(1.0 - rho) * theta)
        with pyro.plate("area", len(y)):
            pyro.sample("y", dist.Poisson(expected * torch.exp(alpha + effect)), obs=y)

    return model, (first, second, factor, expected, y)


@entry("latent structure")
def survival_piecewise() -> Case:
    """Survival of 100 patients with a piecewise constant hazard, whose log is a random walk of eight intervals."""
    random = rng("survival_piecewise")
    x = random.normal(size=(100, 3))
    time = random.weibull(1.4, 100) * 3.0 * np.exp(-x @ np.array([0.6, -0.4, 0.0]) / 1.4)
    end = np.minimum(time, random.uniform(2.0, 8.0, 100))
    edges = np.append(np.quantile(end, np.linspace(0.0, 1.0, 9))[:-1], np.inf)
    edges[0] = 0.0
    spent = np.clip(end[:, None] - edges[:-1], 0.0, np.diff(edges))
    died = ((end == time)[:, None] & (end[:, None] > edges[:-1]) & (end[:, None] <= edges[1:])) + 0.0

    def model(x: Any, spent: Any, died: Any) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        step = pyro.sample("step", dist.HalfNormal(0.5))
        walk = [pyro.sample("hazard_0", dist.Normal(-1.0, 1.5))]
        for k in range(1, 8):
            walk.append(pyro.sample(f"hazard_{k}", dist.Normal(walk[-1], step)))
        log_hazard = torch.stack(walk, -1)[..., None, :] + (x @ beta)[..., None]
        pyro.factor("y", torch.sum(died * log_hazard - spent * torch.exp(log_hazard), (-2, -1)))

    return model, (x, spent, died)


@entry("latent structure")
def missing_bivariate() -> Case:
    """Correlated pairs: 70 rows, of the last 35 only the first number is observed; the second is latent."""
    random = rng("missing_bivariate")
    first = random.normal(1.0, 1.0, 70)
    second = -0.5 + 1.1 * first + random.normal(0.0, 0.8, 70)

    def model(first: Any, second: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(2.0).expand([2]).to_event(1))
        root = pyro.sample("root", dist.LKJCholesky(2, concentration=1.5))
        missing = pyro.sample("missing", dist.Normal(0.0, 10.0).expand([35]).to_event(1))
        pairs = torch.stack([first, torch.cat([second, missing], -1)], -1)
        density = dist.MultivariateNormal(mu, scale_tril=scale[..., None] * root)
        pyro.factor("pairs", density.log_prob(pairs).sum(-1))

    return model, (first, second[:35])


@entry("latent structure", eased=("midpoint", "slope"))
def dose_response_hierarchical() -> Case:
    """Logistic dose-response curves of 16 laboratories with centred midpoints and log slopes."""
    random = rng("dose_response_hierarchical")
    dose = np.linspace(-2.0, 2.0, 6)
    middle, steep = random.normal(0.3, 0.4, (16, 1)), np.exp(random.normal(0.5, 0.25, (16, 1)))
    y = random.binomial(12, 1 / (1 + np.exp(-steep * (dose - middle)))) + 0.0

    def model(dose: Any, y: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(0.7).expand([2]).to_event(1))
        with pyro.plate("laboratory", len(y)):
            midpoint = pyro.sample("midpoint", dist.Normal(mu[..., 0], tau[..., 0]))
            slope = pyro.sample("slope", dist.Normal(mu[..., 1], tau[..., 1]))
        logit = torch.exp(slope)[..., None] * (dose - midpoint[..., None])
        with pyro.plate("laboratories", len(y), dim=-2), pyro.plate("dose", len(dose), dim=-1):
            pyro.sample("y", dist.Binomial(total_count=12, logits=logit), obs=y)

    return model, (dose, y)
