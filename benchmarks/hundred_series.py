"""Posteriors of ``hundred.py``: time series, Gaussian processes and differential equations.

``hundred_registry.py`` says what these files may import.  The states of some series are centred on purpose, as users
write them first.
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


def known_walk() -> tuple[np.ndarray, float, float]:
    """Return the series of ``known_local_level_80`` and the sds of its steps and its noise."""
    random = rng("known_local_level_80")
    return random.normal(0.0, 0.4, 80).cumsum() + random.normal(0.0, 0.8, 80), 0.4, 0.8


def draw_known_walk(random: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Sample the Gaussian posterior of ``known_local_level_80``."""
    y, step, noise = known_walk()
    size = len(y)
    difference = np.eye(size) - np.eye(size, k=-1)
    weight = np.full(size, 1 / step**2)
    weight[0] = 1 / 2.0**2
    precision = difference.T @ (weight[:, None] * difference) + np.eye(size) / noise**2
    mean = np.linalg.solve(precision, y / noise**2)
    root = np.linalg.cholesky(precision)
    draws = mean + np.linalg.solve(root.T, random.normal(size=(size, n))).T
    return {f"level_{t}": draws[:, t] for t in range(size)}


def known_changes() -> np.ndarray:
    """Return the counts of ``change_point_summed``."""
    random = rng("change_point_summed")
    return random.poisson(np.where(np.arange(80) < 46, 3.1, 1.8))


def draw_changes(random: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Sample the posterior of ``change_point_summed``, which is a mixture of gammas."""
    y = known_changes()
    before = np.cumsum(y)[:-1]
    count = np.arange(1, len(y))
    after, rest = y.sum() - before, len(y) - count
    log_gamma = np.vectorize(math.lgamma)
    weight = log_gamma(2.0 + before) - (2.0 + before) * np.log(1.0 + count)
    weight = weight + log_gamma(2.0 + after) - (2.0 + after) * np.log(1.0 + rest)
    weight = np.exp(weight - weight.max())
    point = random.choice(len(count), n, p=weight / weight.sum())
    early = random.gamma(2.0 + before[point]) / (1.0 + count[point])
    return {"early": early, "late": random.gamma(2.0 + after[point]) / (1.0 + rest[point])}


def known_waves() -> tuple[np.ndarray, np.ndarray]:
    """Return the times and the observations of ``damped_oscillator``."""
    random = rng("damped_oscillator")
    time = 0.9 * np.arange(14) + np.round(random.normal(0.0, 0.08, 14), 2)
    return time, 1.6 * np.exp(-0.15 * time) * np.cos(2.3 * time) + random.normal(0.0, 0.7, len(time))


def draw_waves(random: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Sample the posterior of ``damped_oscillator``: a grid of the two nonlinear latents, then a Gaussian."""
    time, y = known_waves()
    edges = np.linspace(0.5, 6.0, 2201), np.linspace(0.0, 1.0, 101)
    frequency, decay = np.meshgrid(*((edge[1:] + edge[:-1]) / 2 for edge in edges), indexing="ij")
    fade = np.exp(-decay.reshape(-1, 1) * time)
    phase = frequency.reshape(-1, 1) * time
    basis = np.stack([fade * np.cos(phase), fade * np.sin(phase)], -1)
    precision = basis.swapaxes(-1, -2) @ basis / 0.7**2 + np.eye(2) / 1.5**2
    score = y @ basis / 0.7**2
    mean = np.linalg.solve(precision, score[..., None])[..., 0]
    weight = 0.5 * (score * mean).sum(-1) - 0.5 * np.linalg.slogdet(precision)[1]
    weight = np.exp(weight - weight.max())
    cell = random.choice(len(weight), n, p=weight / weight.sum())
    root = np.linalg.cholesky(np.linalg.inv(precision[cell]))
    wave = mean[cell] + (root @ random.normal(size=(n, 2, 1)))[..., 0]
    spread = [random.uniform(-0.5, 0.5, n) * (edge[1] - edge[0]) for edge in edges]
    return {
        "frequency": frequency.reshape(-1)[cell] + spread[0],
        "decay": decay.reshape(-1)[cell] + spread[1],
        "wave": wave,
    }


@entry("series")
def autoregression_2() -> Case:
    """AR(2) of 120 observations."""
    random = rng("autoregression_2")
    y = [0.0, 0.5]
    for _ in range(118):
        y.append(0.4 + 0.9 * y[-1] - 0.35 * y[-2] + random.normal(0.0, 0.7))

    def model(y: Any) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        phi = pyro.sample("phi", dist.Normal(0.0, 0.7).expand([2]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        with pyro.plate("time", len(y) - 2):
            pyro.sample("y", dist.Normal(alpha + phi[..., 0] * y[1:-1] + phi[..., 1] * y[:-2], sigma), obs=y[2:])

    return model, (np.array(y),)


def volatile_returns(name: str, size: int) -> np.ndarray:
    """Return simulated returns with an AR(1) log-volatility."""
    random = rng(name)
    state = [0.3 / math.sqrt(1 - 0.95**2) * random.normal()]
    for _ in range(size - 1):
        state.append(0.95 * state[-1] + 0.3 * random.normal())
    return np.exp((np.array(state) - 0.8) / 2) * random.normal(size=size)


@entry("series")
def stochastic_volatility_100() -> Case:
    """Stochastic volatility of 100 returns; the log-volatilities are centred."""

    def model(y: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        phi = pyro.sample("phi", dist.Beta(20.0, 1.5))
        sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
        states = [pyro.sample("h_0", dist.Normal(mu, sigma / torch.sqrt(1.0 - phi * phi)))]
        for t in range(1, len(y)):
            states.append(pyro.sample(f"h_{t}", dist.Normal(mu + phi * (states[-1] - mu), sigma)))
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(0.0, torch.exp(torch.stack(states, -1) / 2.0)), obs=y)

    return model, (volatile_returns("stochastic_volatility_100", 100),)


@entry("series")
def stochastic_volatility_300_noncentred() -> Case:
    """Stochastic volatility of 300 returns; the innovations of the log-volatilities are standard normal."""

    def model(y: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        phi = pyro.sample("phi", dist.Beta(20.0, 1.5))
        sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
        states = [sigma * z[..., 0] / torch.sqrt(1.0 - phi * phi)]
        for t in range(1, len(y)):
            states.append(phi * states[-1] + sigma * z[..., t])
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(0.0, torch.exp((mu + torch.stack(states, -1)) / 2.0)), obs=y)

    return model, (volatile_returns("stochastic_volatility_300_noncentred", 300),)


@entry("series")
def local_level_60() -> Case:
    """Random walk of 60 centred levels with noise; both sds are latent."""
    random = rng("local_level_60")
    y = random.normal(0.0, 0.5, 60).cumsum() + random.normal(0.0, 0.8, 60)

    def model(y: Any) -> None:
        step = pyro.sample("step", dist.HalfNormal(1.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        levels = [pyro.sample("level_0", dist.Normal(0.0, 2.0))]
        for t in range(1, len(y)):
            levels.append(pyro.sample(f"level_{t}", dist.Normal(levels[-1], step)))
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(torch.stack(levels, -1), noise), obs=y)

    return model, (y,)


@entry("series", exact=draw_known_walk)
def known_local_level_80() -> Case:
    """Random walk of 80 centred levels with noise; both sds are known, so the posterior is Gaussian."""
    y, step, noise = known_walk()

    def model(y: Any, step: float, noise: float) -> None:
        levels = [pyro.sample("level_0", dist.Normal(0.0, 2.0))]
        for t in range(1, len(y)):
            levels.append(pyro.sample(f"level_{t}", dist.Normal(levels[-1], step)))
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(torch.stack(levels, -1), noise), obs=y)

    return model, (y, step, noise)


@entry("series")
def local_trend_50() -> Case:
    """Local linear trend of 50 observations: walks of the slope and of the level, both non-centred."""
    random = rng("local_trend_50")
    slope = 0.2 + random.normal(0.0, 0.15, 50).cumsum()
    y = slope.cumsum() + random.normal(0.0, 0.3, 50).cumsum() + random.normal(0.0, 0.6, 50)

    def model(y: Any) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(0.5).expand([2]).to_event(1))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        start = pyro.sample("start", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2, len(y)]).to_event(2))
        slope = start[..., 0:1] + scale[..., 0:1] * torch.cumsum(z[..., 0, :], -1)
        level = start[..., 1:2] + torch.cumsum(slope + scale[..., 1:2] * z[..., 1, :], -1)
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(level, noise), obs=y)

    return model, (y,)


@entry("series")
def dynamic_regression_80() -> Case:
    """Regression whose coefficient is a random walk of 80 non-centred steps."""
    random = rng("dynamic_regression_80")
    x = random.normal(size=80)
    y = 1.0 + (0.5 + random.normal(0.0, 0.2, 80).cumsum()) * x + random.normal(0.0, 0.5, 80)

    def model(x: Any, y: Any) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        start = pyro.sample("start", dist.Normal(0.0, 1.0))
        step = pyro.sample("step", dist.Exponential(2.0))
        noise = pyro.sample("noise", dist.Exponential(1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
        beta = start + step * torch.cumsum(z, -1)
        with pyro.plate("time", len(x)):
            pyro.sample("y", dist.Normal(alpha + beta * x, noise), obs=y)

    return model, (x, y)


def forward(initial: Any, transition: Any, emission: Any) -> Any:
    """Return the log-likelihood of a hidden Markov chain; ``emission`` is the log-density by time and state."""
    alpha = initial + emission[..., 0, :]
    for t in range(1, emission.shape[-2]):
        alpha = torch.logsumexp(alpha[..., :, None] + transition, -2) + emission[..., t, :]
    return torch.logsumexp(alpha, -1)


@entry("series")
def hmm_gaussian_2() -> Case:
    """Hidden Markov chain of two states with ordered means; the 80 states are summed out."""
    random = rng("hmm_gaussian_2")
    state = [0]
    for _ in range(79):
        state.append(state[-1] if random.uniform() < 0.85 else 1 - state[-1])
    y = np.where(np.array(state) == 0, -0.8, 1.4) + random.normal(0.0, 0.8, 80)

    def model(y: Any) -> None:
        low = pyro.sample("low", dist.Normal(-1.0, 1.0))
        gap = pyro.sample("gap", dist.Gamma(4.0, 2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0).expand([2]).to_event(1))
        stay = pyro.sample("stay", dist.Beta(8.0, 2.0).expand([2]).to_event(1))
        mean = torch.stack([low, low + gap], -1)
        leave = torch.log1p(-stay)
        stay = torch.log(stay)
        rows = [torch.stack([stay[..., 0], leave[..., 0]], -1), torch.stack([leave[..., 1], stay[..., 1]], -1)]
        emission = dist.Normal(mean, sigma).log_prob(y[:, None])
        pyro.factor("y", forward(math.log(0.5), torch.stack(rows, -2), emission))

    return model, (y,)


@entry("series")
def hmm_poisson_3() -> Case:
    """Hidden Markov chain of three states with ordered rates; the 60 states are summed out."""
    random = rng("hmm_poisson_3")
    state = [0]
    for _ in range(59):
        state.append(state[-1] if random.uniform() < 0.8 else int(random.integers(3)))
    y = random.poisson(np.array([1.0, 5.0, 13.0])[state])

    def model(y: Any) -> None:
        steps = pyro.sample("steps", dist.Gamma(torch.tensor([2.0, 6.0, 8.0]), 1.2).to_event(1))
        rows = [
            pyro.sample(f"row_{k}", dist.Dirichlet(torch.tensor([6.0 if j == k else 1.0 for j in range(3)])))
            for k in range(3)
        ]
        emission = dist.Poisson(torch.cumsum(steps, -1)).log_prob(y[:, None])
        pyro.factor("y", forward(math.log(1 / 3), torch.log(torch.stack(rows, -2)), emission))

    return model, (y,)


@entry("series", eased=("effect",))
def seasonal_regression() -> Case:
    """Monthly counts of eight years: a trend and twelve centred effects."""
    random = rng("seasonal_regression")
    month = np.arange(96) % 12
    year = (np.arange(96) - 47.5) / 48
    y = random.poisson(
        np.exp(1.5 + 0.3 * year + 0.4 * np.sin(month / 6 * math.pi) + random.normal(0.0, 0.1, 12)[month])
    )

    def model(month: Any, year: Any, y: Any) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 3.0))
        trend = pyro.sample("trend", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("months", 12):
            effect = pyro.sample("effect", dist.Normal(0.0, tau))
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Poisson(torch.exp(alpha + trend * year + effect[..., month])), obs=y)

    return model, (month, year, y)


@entry("series")
def garch_student() -> Case:
    """GARCH(1, 1) of 200 returns with Student-t innovations."""
    random = rng("garch_student")
    noise = random.standard_t(6.0, 200)
    y = [0.1 + noise[0]]
    variance = 1.0
    for shock in noise[1:]:
        variance = 0.15 + 0.25 * (y[-1] - 0.1) ** 2 + 0.6 * variance
        y.append(0.1 + math.sqrt(variance) * shock)

    def model(y: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        omega = pyro.sample("omega", dist.LogNormal(-1.5, 1.0))
        shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([2.0, 4.0, 2.0])))
        nu = pyro.sample("nu", dist.Gamma(4.0, 0.5))
        square = torch.square(y - mu)
        variances = [omega / shares[..., 2]]
        for t in range(1, len(y)):
            previous = shares[..., 0] * square[..., t - 1] + shares[..., 1] * variances[-1]
            variances.append(omega + previous)
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.StudentT(nu, mu, torch.sqrt(torch.stack(variances, -1))), obs=y)

    return model, (np.array(y),)


@entry("series")
def moving_average() -> Case:
    """Invertible MA(2) of 100 observations; a loop finds the innovations."""
    random = rng("moving_average")
    noise = random.normal(0.0, 0.9, 102)
    y = 0.5 + noise[2:] + 0.6 * noise[1:-1] + 0.3 * noise[:-2]

    def model(y: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        part = pyro.sample("part", dist.Uniform(-torch.ones(2), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        one, two = part[..., 0] * (1.0 + part[..., 1]), part[..., 1]
        first, second = torch.zeros_like(mu), torch.zeros_like(mu)
        means = []
        for t in range(len(y)):
            means.append(mu + one * first + two * second)
            first, second = y[t] - means[-1], first
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(torch.stack(means, -1), sigma), obs=y)

    return model, (y,)


@entry("series")
def vector_autoregression_3() -> Case:
    """VAR(1) of three series of 80 observations with correlated noise."""
    random = rng("vector_autoregression_3")
    link = np.array([[0.6, 0.2, 0.0], [-0.2, 0.5, 0.1], [0.0, 0.3, 0.4]])
    root = np.array([[0.8, 0.0, 0.0], [0.4, 0.6, 0.0], [-0.2, 0.2, 0.7]])
    y = [np.zeros(3)]
    for _ in range(79):
        y.append(np.array([0.2, 0.0, -0.3]) + link @ y[-1] + root @ random.normal(size=3))

    def model(y: Any) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        link = pyro.sample("link", dist.Normal(0.0, 0.5).expand([3, 3]).to_event(2))
        scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([3]).to_event(1))
        root = pyro.sample("root", dist.LKJCholesky(3, concentration=2.0))
        mean = alpha + torch.einsum("ij,tj->ti", link, y[:-1])
        with pyro.plate("time", len(y) - 1):
            pyro.sample("y", dist.MultivariateNormal(mean, scale_tril=scale[:, None] * root), obs=y[1:])

    return model, (np.array(y),)


@entry("series")
def random_walk_counts() -> Case:
    """Counts of 112 years whose log rate is a centred random walk."""
    random = rng("random_walk_counts")
    y = random.poisson(np.exp(1.0 + random.normal(0.0, 0.15, 112).cumsum()))

    def model(y: Any) -> None:
        step = pyro.sample("step", dist.HalfNormal(0.5))
        states = [pyro.sample("state_0", dist.Normal(0.0, 2.0))]
        for t in range(1, len(y)):
            states.append(pyro.sample(f"state_{t}", dist.Normal(states[-1], step)))
        with pyro.plate("year", len(y)):
            pyro.sample("y", dist.Poisson(torch.exp(torch.stack(states, -1))), obs=y)

    return model, (y,)


@entry("series")
def river_step() -> Case:
    """Annual flow of a river with a smooth step: 100 simulated years."""
    random = rng("river_step")
    year = np.arange(100) + 0.0
    y = 11.0 - 2.4 / (1 + np.exp(-(year - 28) / 2)) + random.normal(0.0, 1.3, 100)

    def model(year: Any, y: Any) -> None:
        level = pyro.sample("level", dist.Normal(10.0, 3.0))
        change = pyro.sample("change", dist.Normal(0.0, 3.0))
        middle = pyro.sample("middle", dist.Normal(40.0, 25.0))
        width = pyro.sample("width", dist.Gamma(2.0, 0.5))
        sigma = pyro.sample("sigma", dist.HalfNormal(3.0))
        mean = level + change * torch.sigmoid((year - middle) / width)
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    return model, (year, y)


@entry("series")
def threshold_autoregression() -> Case:
    """Smooth-threshold AR(1) of 150 observations with two regimes."""
    random = rng("threshold_autoregression")
    y = [0.0]
    for _ in range(149):
        high = 1 / (1 + math.exp(-(y[-1] - 0.5) / 0.2))
        y.append((1 - high) * (0.6 + 0.7 * y[-1]) + high * (-0.4 + 0.2 * y[-1]) + random.normal(0.0, 0.6))

    def model(y: Any) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        phi = pyro.sample("phi", dist.Normal(0.0, 0.5).expand([2]).to_event(1))
        threshold = pyro.sample("threshold", dist.Normal(0.5, 0.3))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        high = torch.sigmoid((y[:-1] - threshold) / 0.2)
        below = alpha[..., 0:1] + phi[..., 0:1] * y[:-1]
        above = alpha[..., 1:2] + phi[..., 1:2] * y[:-1]
        with pyro.plate("time", len(y) - 1):
            pyro.sample("y", dist.Normal((1.0 - high) * below + high * above, sigma), obs=y[1:])

    return model, (np.array(y),)


@entry("series", exact=draw_changes)
def change_point_summed() -> Case:
    """Poisson counts with one change; the 79 possible points are summed out."""

    def model(y: Any) -> None:
        early = pyro.sample("early", dist.Gamma(2.0, 1.0))
        late = pyro.sample("late", dist.Gamma(2.0, 1.0))
        before = torch.cumsum(dist.Poisson(early).log_prob(y), -1)
        after = torch.cumsum(dist.Poisson(late).log_prob(y), -1)
        pyro.factor("y", torch.logsumexp(before[..., :-1] + after[..., -1:] - after[..., :-1], -1) - math.log(79))

    return model, (known_changes(),)


@entry("series")
def seasonal_counts_72() -> Case:
    """Monthly counts of six years: a non-centred random walk, a seasonal pattern and a spread of the counts."""
    random = rng("seasonal_counts_72")
    month = np.arange(72) % 12
    log_rate = 2.0 + random.normal(0.0, 0.12, 72).cumsum() + 0.5 * np.cos(month / 6 * math.pi)
    y = random.poisson(np.exp(log_rate) * random.gamma(15.0, size=72) / 15.0)

    def model(month: Any, y: Any) -> None:
        start = pyro.sample("start", dist.Normal(0.0, 3.0))
        step = pyro.sample("step", dist.HalfNormal(0.3))
        wave = pyro.sample("wave", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        spread = pyro.sample("spread", dist.Exponential(5.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
        phase = month / 6.0 * math.pi
        season = wave[..., 0:1] * torch.cos(phase) + wave[..., 1:2] * torch.sin(phase)
        mean = torch.exp(start + step * torch.cumsum(z, -1) + season)
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.GammaPoisson(1.0 / spread, 1.0 / (spread * mean)), obs=y)

    return model, (month, y)


@entry("series")
def shares_walk_30() -> Case:
    """Votes for three parties in 30 years whose log shares are non-centred random walks."""
    random = rng("shares_walk_30")
    walk = np.array([0.4, 0.0]) + random.normal(0.0, 0.2, (30, 2)).cumsum(0)
    share = np.exp(np.append(walk, np.zeros((30, 1)), -1))
    y = random.multinomial(100, share / share.sum(-1, keepdims=True)) + 0.0

    def model(y: Any) -> None:
        start = pyro.sample("start", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        step = pyro.sample("step", dist.HalfNormal(0.5).expand([2]).to_event(1))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2, len(y)]).to_event(2))
        walk = start[..., None] + step[..., None] * torch.cumsum(z, -1)
        first, second = walk[..., 0, :], walk[..., 1, :]
        logits = torch.stack([first, second, torch.zeros_like(first)], -1)
        with pyro.plate("year", len(y)):
            pyro.sample("y", dist.Multinomial(total_count=100, logits=logits), obs=y)

    return model, (y,)


def rough(x: Any, scale: Any, length: Any) -> Any:
    """Return the Matérn-3/2 covariance of points on a line."""
    ratio = math.sqrt(3.0) * torch.abs(x[:, None] - x[None, :]) / length
    return scale * scale * ((1.0 + ratio) * torch.exp(-ratio) + 1e-6 * torch.eye(len(x)))


def smooth(x: Any, scale: Any, length: Any) -> Any:
    """Return the squared-exponential covariance of points on a line."""
    return (
        scale * scale * (torch.exp(-0.5 * torch.square((x[:, None] - x[None, :]) / length)) + 1e-6 * torch.eye(len(x)))
    )


@entry("process")
def gp_regression_40() -> Case:
    """Gaussian-process regression on 40 points; the function is integrated out."""
    random = rng("gp_regression_40")
    x = np.sort(random.uniform(0.0, 10.0, 40))
    y = np.sin(x) + 0.1 * x + random.normal(0.0, 0.4, 40)

    def model(x: Any, y: Any) -> None:
        length = pyro.sample("length", dist.InverseGamma(3.0, 4.0))
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        covariance = smooth(x, scale, length) + noise * noise * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance_matrix=covariance), obs=y)

    return model, (x, y)


@entry("process")
def gp_latent_40() -> Case:
    """Gaussian process whose 40 values are centred latents, with Gaussian noise."""
    random = rng("gp_latent_40")
    x = np.sort(random.uniform(0.0, 10.0, 40))
    y = 1.2 * np.sin(0.9 * x) + random.normal(0.0, 0.5, 40)

    def model(x: Any, y: Any) -> None:
        length = pyro.sample("length", dist.InverseGamma(3.0, 5.0))
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(x)), covariance_matrix=rough(x, scale, length)))
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(f, noise), obs=y)

    return model, (x, y)


@entry("process")
def gp_poisson_60() -> Case:
    """Poisson counts of 60 bins whose log rate is a non-centred Gaussian process."""
    random = rng("gp_poisson_60")
    x = np.arange(60) / 6.0
    y = random.poisson(np.exp(1.0 + 0.8 * np.sin(1.2 * x)))

    def model(x: Any, y: Any) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        length = pyro.sample("length", dist.InverseGamma(3.0, 4.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
        f = torch.linalg.cholesky(smooth(x, scale, length)) @ z
        with pyro.plate("bin", len(x)):
            pyro.sample("y", dist.Poisson(torch.exp(mean + f)), obs=y)

    return model, (x, y)


@entry("process")
def gp_classification_50() -> Case:
    """Classification of 50 points of the plane by a non-centred Gaussian process."""
    random = rng("gp_classification_50")
    x = random.uniform(-2.0, 2.0, (50, 2))
    y = random.binomial(1, 1 / (1 + np.exp(-2.0 * np.sin(1.5 * x[:, 0]) - 1.5 * x[:, 1]))) + 0.0

    def model(x: Any, y: Any) -> None:
        length = pyro.sample("length", dist.InverseGamma(5.0, 8.0).expand([2]).to_event(1))
        scale = pyro.sample("scale", dist.Gamma(4.0, 2.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
        near = torch.exp(-0.5 * torch.sum(torch.square((x[:, None, :] - x[None, :, :]) / length), -1))
        f = scale * (torch.linalg.cholesky(near + 1e-6 * torch.eye(len(x))) @ z)
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=f), obs=y)

    return model, (x, y)


@entry("process")
def gp_grid_poisson() -> Case:
    """Poisson counts on a 6 × 6 grid whose log rates are a centred Gaussian process."""
    random = rng("gp_grid_poisson")
    place = np.stack(np.meshgrid(np.arange(6), np.arange(6), indexing="ij"), -1).reshape(-1, 2)
    distance = np.sqrt(np.square(place[:, None] - place).sum(-1))
    y = random.poisson(np.exp(0.8 + np.linalg.cholesky(0.7 * np.exp(-distance / 2.0)) @ random.normal(size=36)))

    def model(distance: Any, y: Any) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        length = pyro.sample("length", dist.InverseGamma(3.0, 5.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        covariance = scale * scale * torch.exp(-distance / length)
        f = pyro.sample("f", dist.MultivariateNormal(mean * torch.ones(len(y)), covariance_matrix=covariance))
        with pyro.plate("cell", len(y)):
            pyro.sample("y", dist.Poisson(torch.exp(f)), obs=y)

    return model, (distance, y)


@entry("process")
def matern_student() -> Case:
    """Non-centred Matérn process on 45 points with Student-t noise and outliers."""
    random = rng("matern_student")
    x = np.sort(random.uniform(0.0, 8.0, 45))
    y = np.cos(1.1 * x) + 0.3 * random.standard_t(2.5, 45)

    def model(x: Any, y: Any) -> None:
        length = pyro.sample("length", dist.InverseGamma(3.0, 5.0))
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        nu = pyro.sample("nu", dist.Gamma(2.0, 0.2))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
        f = torch.linalg.cholesky(rough(x, scale, length)) @ z
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.StudentT(1.0 + nu, f, noise), obs=y)

    return model, (x, y)


def solve(slope: Callable[[Any], Any], state: Any, step: float, count: int) -> Any:
    """Return the states after each of ``count`` Runge–Kutta steps, by time along the last axis but one."""
    states = []
    for _ in range(count):
        first = slope(state)
        second = slope(state + 0.5 * step * first)
        third = slope(state + 0.5 * step * second)
        fourth = slope(state + step * third)
        state = state + step / 6.0 * (first + 2.0 * second + 2.0 * third + fourth)
        states.append(state)
    return torch.stack(states, -2)


@entry("differential equation")
def sir_epidemic() -> Case:
    """Susceptible-infected-recovered model of the influenza at a boarding school in 1978: pupils in bed on 14 days."""
    y = np.array([3, 8, 26, 76, 225, 298, 258, 233, 189, 128, 68, 29, 14, 4])

    def model(y: Any) -> None:
        beta = pyro.sample("beta", dist.LogNormal(0.5, 0.5))
        gamma = pyro.sample("gamma", dist.LogNormal(-0.7, 0.5))
        spread = pyro.sample("spread", dist.Exponential(5.0))

        def slope(state: Any) -> Any:
            new = beta * state[..., 0] * state[..., 1]
            return torch.stack([-new, new - gamma * state[..., 1]], -1)

        states = solve(slope, torch.tensor([762.0 / 763.0, 1.0 / 763.0]), 0.25, 56)
        mean = 763.0 * torch.clamp(states[..., 3::4, 1], min=1e-6)
        with pyro.plate("day", len(y)):
            pyro.sample("y", dist.GammaPoisson(1.0 / spread, 1.0 / (spread * mean)), obs=y)

    return model, (y,)


@entry("differential equation")
def seir() -> Case:
    """Epidemic with a latent period: weekly cases of 15 weeks, of which a part is reported."""
    random = rng("seir")
    s, e, i, y = 0.999, 0.0, 0.001, []
    for _ in range(15):
        start = s
        for _ in range(50):
            new, ill, well = 1.9 * s * i / 50, 1.5 * e / 50, 0.8 * i / 50
            s, e, i = s - new, e + new - ill, i + ill - well
        y.append(random.poisson(0.3 * 10000 * (start - s) * random.gamma(20.0) / 20.0))

    def model(y: Any) -> None:
        beta = pyro.sample("beta", dist.LogNormal(0.5, 0.5))
        onset = pyro.sample("onset", dist.LogNormal(0.4, 0.2))
        gamma = pyro.sample("gamma", dist.LogNormal(-0.2, 0.2))
        start = pyro.sample("start", dist.Beta(1.0, 500.0))
        part = pyro.sample("part", dist.Beta(3.0, 6.0))
        spread = pyro.sample("spread", dist.Exponential(10.0))

        def slope(state: Any) -> Any:
            s, e, i = state[..., 0], state[..., 1], state[..., 2]
            return torch.stack([-beta * s * i, beta * s * i - onset * e, onset * e - gamma * i], -1)

        initial = torch.stack([1.0 - start, torch.zeros_like(start), start], -1)
        left = solve(slope, initial, 0.25, 60)[..., 3::4, 0]
        fresh = torch.cat([initial[..., 0:1] - left[..., 0:1], left[..., :-1] - left[..., 1:]], -1)
        mean = 10000.0 * part * torch.clamp(fresh, min=1e-8)
        with pyro.plate("week", len(y)):
            pyro.sample("y", dist.GammaPoisson(1.0 / spread, 1.0 / (spread * mean)), obs=y)

    return model, (np.array(y),)


@entry("differential equation")
def fitzhugh_nagumo() -> Case:
    """Neuron with two states, both observed with noise at 30 times."""
    random = rng("fitzhugh_nagumo")
    v, r, rows = -1.0, 1.0, []
    for _ in range(30):
        for _ in range(400):
            v, r = v + 0.001 * 2.5 * (v - v**3 / 3 + r), r - 0.001 * (v - 0.2 + 0.3 * r) / 2.5
        rows.append([v, r])
    y = np.array(rows) + random.normal(0.0, 0.3, (30, 2))

    def model(y: Any) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 0.5))
        b = pyro.sample("b", dist.Normal(0.0, 0.5))
        c = pyro.sample("c", dist.LogNormal(1.0, 0.3))
        start = pyro.sample("start", dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0).expand([2]).to_event(1))

        def slope(state: Any) -> Any:
            v, r = torch.clamp(state[..., 0], min=-4.0, max=4.0), state[..., 1]
            return torch.stack([c * (v - v * v * v / 3.0 + r), -(v - a + b * r) / c], -1)

        states = solve(slope, start, 0.2, 60)[..., 1::2, :]
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(states, sigma).to_event(1), obs=y)

    return model, (y,)


@entry("differential equation", eased=("theta",))
def pharmacokinetics_12() -> Case:
    """Oral dose, one compartment: 12 subjects with ten samples each and centred log-normal parameters."""
    random = rng("pharmacokinetics_12")
    time = np.array([0.25, 0.5, 1.0, 2.0, 3.5, 5.0, 7.0, 9.0, 12.0, 24.0])
    dose = random.uniform(3.0, 6.0, 12)
    truth = np.array([-3.2, -0.8, 0.5]) + np.array([0.25, 0.15, 0.6]) * random.normal(size=(12, 3))
    clearance, volume, uptake = np.exp(truth.T[:, :, None])
    shape = np.exp(-clearance / volume * time) - np.exp(-uptake * time)
    y = dose[:, None] * uptake / (uptake * volume - clearance) * shape * np.exp(random.normal(0.0, 0.15, (12, 10)))

    def model(time: Any, dose: Any, y: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-3.0, -1.0, 0.5]), 0.5).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(0.5).expand([3]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
        with pyro.plate("subject", len(dose)):
            theta = pyro.sample("theta", dist.Normal(mu, tau).to_event(1))
        clearance, volume, uptake = (torch.exp(theta[..., k : k + 1]) for k in range(3))
        out = clearance / volume
        mean = dose[:, None] * uptake / (volume * (uptake - out)) * (torch.exp(-out * time) - torch.exp(-uptake * time))
        with pyro.plate("subjects", len(dose), dim=-2), pyro.plate("time", len(time), dim=-1):
            pyro.sample("y", dist.LogNormal(torch.log(mean), sigma), obs=y)

    return model, (time, dose, y)


@entry("differential equation", exact=draw_waves)
def damped_oscillator() -> Case:
    """Damped oscillation of unknown frequency, 14 observations almost evenly spaced: several frequencies fit."""

    def model(time: Any, y: Any) -> None:
        frequency = pyro.sample("frequency", dist.Uniform(0.5, 6.0))
        decay = pyro.sample("decay", dist.Uniform(0.0, 1.0))
        wave = pyro.sample("wave", dist.Normal(0.0, 1.5).expand([2]).to_event(1))
        phase = frequency * time
        mean = torch.exp(-decay * time) * (wave[..., 0:1] * torch.cos(phase) + wave[..., 1:2] * torch.sin(phase))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.7), obs=y)

    return model, known_waves()


@entry("differential equation")
def logistic_growth() -> Case:
    """Logistic growth of one culture at 18 times with multiplicative noise."""
    random = rng("logistic_growth")
    time = np.linspace(0.0, 8.0, 18)
    y = 12.0 / (1 + (12.0 / 0.4 - 1) * np.exp(-0.8 * time)) * np.exp(random.normal(0.0, 0.15, 18))

    def model(time: Any, y: Any) -> None:
        capacity = pyro.sample("capacity", dist.LogNormal(2.5, 1.0))
        rate = pyro.sample("rate", dist.LogNormal(-0.5, 0.7))
        start = pyro.sample("start", dist.LogNormal(-1.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
        mean = capacity / (1.0 + (capacity / start - 1.0) * torch.exp(-rate * time))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.LogNormal(torch.log(mean), sigma), obs=y)

    return model, (time, y)


@entry("differential equation", eased=("theta",))
def growth_curves_12() -> Case:
    """Logistic growth of 12 cultures at eight times, with centred log-normal parameters of each culture."""
    random = rng("growth_curves_12")
    time = np.linspace(0.0, 7.0, 8)
    truth = np.array([2.3, -0.2, -0.7]) + np.array([0.2, 0.2, 0.3]) * random.normal(size=(12, 3))
    capacity, rate, start = np.exp(truth.T[:, :, None])
    y = capacity / (1 + (capacity / start - 1) * np.exp(-rate * time)) * np.exp(random.normal(0.0, 0.12, (12, 8)))

    def model(time: Any, y: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor([2.0, 0.0, -1.0]), 1.0).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(0.5).expand([3]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
        with pyro.plate("culture", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau).to_event(1))
        capacity, rate, start = (torch.exp(theta[..., k : k + 1]) for k in range(3))
        mean = capacity / (1.0 + (capacity / start - 1.0) * torch.exp(-rate * time))
        with pyro.plate("cultures", len(y), dim=-2), pyro.plate("time", len(time), dim=-1):
            pyro.sample("y", dist.LogNormal(torch.log(mean), sigma), obs=y)

    return model, (time, y)


@entry("differential equation")
def chemical_chain() -> Case:
    """Reaction A → B → C in closed form: three concentrations at 12 times."""
    random = rng("chemical_chain")
    time = np.linspace(0.5, 10.0, 12)
    a, b = 2.0 * np.exp(-0.6 * time), 2.0 * 0.6 / (0.25 - 0.6) * (np.exp(-0.6 * time) - np.exp(-0.25 * time))
    y = np.stack([a, b, 2.0 - a - b], -1) + random.normal(0.0, 0.12, (12, 3))

    def model(time: Any, y: Any) -> None:
        amount = pyro.sample("amount", dist.LogNormal(0.5, 0.5))
        first = pyro.sample("first", dist.LogNormal(-0.5, 1.0))
        second = pyro.sample("second", dist.LogNormal(-1.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
        a = amount * torch.exp(-first * time)
        b = amount * first / (second - first) * (torch.exp(-first * time) - torch.exp(-second * time))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(torch.stack([a, b, amount - a - b], -1), sigma).to_event(1), obs=y)

    return model, (time, y)
