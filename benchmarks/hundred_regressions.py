"""Regressions of ``hundred.py``."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from hundred_registry import entry, rng

Array = Any  # a tensor for Pyro, an array of JAX for NumPyro
Case = tuple[Callable[..., None], tuple[Any, ...]]


@entry("regression")
def robust_student() -> Case:
    """Student-t regression with outliers: 200 rows, 6 coefficients."""
    random = rng("robust_student")
    x = random.normal(size=(200, 6))
    noise = 0.8 * random.standard_t(3.0, size=200) + 8.0 * (random.uniform(size=200) < 0.05)
    y = 1.0 + x @ np.array([1.5, -1.0, 0.5, 0.0, 0.3, -0.2]) + noise

    def model(x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 2.5).expand([6]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.StudentT(nu, alpha + x @ beta, sigma), obs=y)

    return model, (x, y)


@entry("regression")
def stacks_student() -> Case:
    """Robust regression on the stack loss data of BUGS: 21 rows, 3 standardised predictors."""
    air = np.array([80, 80, 75, 62, 62, 62, 62, 62, 58, 58, 58, 58, 58, 58, 50, 50, 50, 50, 50, 56, 70], dtype=float)
    water = np.array([27, 27, 25, 24, 22, 23, 24, 24, 23, 18, 18, 17, 18, 19, 18, 18, 19, 19, 20, 20, 20], dtype=float)
    acid = np.array([89, 88, 90, 87, 87, 87, 93, 93, 87, 80, 89, 88, 82, 93, 89, 86, 72, 79, 80, 82, 91], dtype=float)
    y = np.array([42, 37, 37, 28, 18, 18, 19, 20, 15, 14, 14, 13, 11, 12, 8, 7, 8, 8, 9, 15, 15], dtype=float)
    x = np.stack([air, water, acid], axis=1)
    x = (x - x.mean(0)) / x.std(0)

    def model(x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(20.0, 10.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfCauchy(5.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.StudentT(4.0, alpha + x @ beta, sigma), obs=y)

    return model, (x, y)


@entry("regression")
def ordinal_logistic() -> Case:
    """Ordinal logistic regression with 5 categories: 150 rows, 4 coefficients, 4 ordered cutpoints."""
    random = rng("ordinal_logistic")
    x = random.normal(size=(150, 4))
    score = x @ np.array([1.0, -0.7, 0.4, 0.0]) + random.logistic(size=150)
    y = np.searchsorted(np.array([-2.0, -0.5, 0.8, 2.2]), score)

    def model(x: Array, y: Array) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([4]).to_event(1))
        base = dist.Normal(0.0, 1.5).expand([4])
        cutpoints = pyro.sample("cutpoints", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.OrderedLogistic(x @ beta, cutpoints), obs=y)

    return model, (x, y)


@entry("regression")
def zero_inflated_poisson() -> Case:
    """Poisson regression with extra zeros, whose share depends on a predictor: 200 rows."""
    random = rng("zero_inflated_poisson")
    x = random.normal(size=(200, 3))
    gate = random.uniform(size=200) < 1.0 / (1.0 + np.exp(0.5 - x[:, 0]))
    y = np.where(gate, 0, random.poisson(np.exp(0.8 + x @ np.array([0.4, -0.3, 0.2]))))

    def model(x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        gate = pyro.sample("gate", dist.Normal(0.0, 1.5))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.5))
        log_rate = alpha + x @ beta
        logit = gate + slope * x[:, 0]
        zero = torch.nn.functional.logsigmoid(logit)
        counted = torch.nn.functional.logsigmoid(-logit) + y * log_rate - torch.exp(log_rate) - torch.lgamma(y + 1.0)
        with pyro.plate("row", len(y)):
            pyro.factor("y", torch.where(y == 0, torch.logaddexp(zero, counted), counted))

    return model, (x, y)


@entry("regression")
def hurdle() -> Case:
    """Hurdle model: logistic regression for zero or not, and a zero-truncated Poisson regression: 150 rows."""
    random = rng("hurdle")
    x = random.normal(size=(150, 3))
    rate = np.exp(0.6 + x @ np.array([0.5, 0.0, -0.3]))
    positive = random.uniform(size=150) < 1.0 / (1.0 + np.exp(-0.3 - x @ np.array([0.8, -0.5, 0.0])))
    lowest = np.exp(-rate)
    counts = np.array([_poisson_quantile(u, r) for u, r in zip(random.uniform(lowest, 1.0), rate, strict=True)])
    y = np.where(positive, counts, 0)

    def model(x: Array, y: Array) -> None:
        gate = pyro.sample("gate", dist.Normal(0.0, 2.0))
        gate_slopes = pyro.sample("gate_slopes", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        log_rate = alpha + x @ beta
        rate = torch.exp(log_rate)
        truncated = y * log_rate - rate - torch.lgamma(y + 1.0) - torch.log(-torch.expm1(-rate))
        with pyro.plate("row", len(y)):
            pyro.sample("positive", dist.Bernoulli(logits=gate + x @ gate_slopes), obs=torch.where(y > 0, 1.0, 0.0))
            pyro.factor("count", torch.where(y > 0, truncated, 0.0))

    return model, (x, y)


def _poisson_quantile(probability: float, rate: float) -> int:
    count, mass = 0, math.exp(-rate)
    total = mass
    while total < probability and count < 1000:
        count += 1
        mass *= rate / count
        total += mass
    return count


@entry("regression")
def censored_tobit() -> Case:
    """Tobit regression: 120 rows, about 40 % of the responses censored at zero."""
    random = rng("censored_tobit")
    x = random.normal(size=(120, 4))
    y = np.maximum(0.0, 0.5 + x @ np.array([1.0, -0.8, 0.5, 0.0]) + 1.2 * random.normal(size=120))

    def model(x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 2.5).expand([4]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(3.0))
        mean = alpha + x @ beta
        density = -0.5 * torch.square((y - mean) / sigma) - torch.log(sigma) - 0.5 * math.log(2.0 * math.pi)
        with pyro.plate("row", len(y)):
            pyro.factor("y", torch.where(y > 0.0, density, torch.special.log_ndtr(-mean / sigma)))

    return model, (x, y)


@entry("regression")
def censored_latents() -> Case:
    """Regression with 35 censored responses as latents above a limit of detection: 100 rows."""
    random = rng("censored_latents")
    x = random.normal(size=(100, 3))
    y = 1.0 + x @ np.array([1.0, -0.5, 0.3]) + random.normal(size=100)
    order = np.argsort(y)
    x, y = x[order], y[order]
    limit = float(y[65])

    def model(x: Array, y: Array, limit: float) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 2.5).expand([3]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(3.0))
        unseen = pyro.sample("unseen", dist.Uniform(limit, limit + 20.0).expand([35]).to_event(1))
        complete = torch.cat([y, unseen], -1)
        with pyro.plate("row", len(complete)):
            pyro.factor("y", dist.Normal(alpha + x @ beta, sigma).log_prob(complete))

    return model, (x, y[:65], limit)


@entry("regression")
def negative_binomial() -> Case:
    """Negative binomial regression with a log link: 150 rows, 5 coefficients."""
    random = rng("negative_binomial")
    x = random.normal(size=(150, 5))
    rate = np.exp(1.2 + x @ np.array([0.5, -0.4, 0.3, 0.0, 0.2]))
    y = random.poisson(rate * random.gamma(1.5, 1.0 / 1.5, size=150))

    def model(x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 3.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        phi = pyro.sample("phi", dist.Gamma(2.0, 0.5))
        mean = torch.exp(alpha + x @ beta)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.GammaPoisson(phi, phi / mean), obs=y)

    return model, (x, y)


@entry("regression")
def poisson_40_coefficients() -> Case:
    """Poisson regression: 300 rows, 40 coefficients."""
    random = rng("poisson_40_coefficients")
    x = random.normal(size=(300, 40)) / math.sqrt(40.0)
    y = random.poisson(np.exp(0.7 + x @ random.normal(size=40)))

    def model(x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.5).expand([40]).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Poisson(torch.exp(alpha + x @ beta)), obs=y)

    return model, (x, y)


@entry("regression")
def logistic_separated() -> Case:
    """Logistic regression on nearly separated classes: 30 rows, 5 predictors, wide priors."""
    random = rng("logistic_separated")
    x = random.normal(size=(30, 5))
    score = x @ np.array([4.0, -3.0, 2.0, 0.0, 0.0]) + 0.5 * random.logistic(size=30)
    y = (score > 0.0).astype(float)

    def model(x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([5]).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=alpha + x @ beta), obs=y)

    return model, (x, y)


@entry("regression", eased=("beta",))
def logistic_ridge_50() -> Case:
    """Logistic ridge regression with a scale to estimate: 150 rows, 50 coefficients."""
    random = rng("logistic_ridge_50")
    x = random.normal(size=(150, 50))
    y = (x @ (0.4 * random.normal(size=50)) + random.logistic(size=150) > 0.0).astype(float)

    def model(x: Array, y: Array) -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(torch.zeros(50), scale).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=alpha + x @ beta), obs=y)

    return model, (x, y)


@entry("regression")
def heteroscedastic() -> Case:
    """Regression of mean and of log standard deviation on the same 5 predictors: 150 rows."""
    random = rng("heteroscedastic")
    x = random.normal(size=(150, 5))
    scale = np.exp(-0.3 + x @ np.array([0.5, 0.0, -0.4, 0.2, 0.0]))
    y = 2.0 + x @ np.array([1.0, -0.5, 0.0, 0.5, 0.2]) + scale * random.normal(size=150)

    def model(x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([5]).to_event(1))
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        slopes = pyro.sample("slopes", dist.Normal(0.0, 0.5).expand([5]).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(alpha + x @ beta, torch.exp(level + x @ slopes)), obs=y)

    return model, (x, y)


@entry("regression")
def quantile_regression() -> Case:
    """Regression of the 80 % quantile by the asymmetric Laplace density: 120 rows, 4 coefficients."""
    random = rng("quantile_regression")
    x = random.normal(size=(120, 4))
    y = 1.0 + x @ np.array([1.0, -0.5, 0.0, 0.3]) + random.gumbel(size=120)

    def model(x: Array, y: Array, level: float) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 2.5).expand([4]).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        residual = y - alpha - x @ beta
        loss = torch.maximum(level * residual, (level - 1.0) * residual)
        with pyro.plate("row", len(y)):
            pyro.factor("y", math.log(level * (1.0 - level)) - torch.log(scale) - loss / scale)

    return model, (x, y, 0.8)


@entry("regression")
def beta_regression() -> Case:
    """Beta regression of proportions with a logit link: 100 rows, 3 coefficients."""
    random = rng("beta_regression")
    x = random.normal(size=(100, 3))
    mean = 1.0 / (1.0 + np.exp(-(0.3 + x @ np.array([0.8, -0.5, 0.2]))))
    y = np.clip(random.beta(12.0 * mean, 12.0 * (1.0 - mean)), 1e-3, 1.0 - 1e-3)

    def model(x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        precision = pyro.sample("precision", dist.Gamma(2.0, 0.1))
        mean = torch.sigmoid(alpha + x @ beta)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Beta(mean * precision, (1.0 - mean) * precision), obs=y)

    return model, (x, y)


@entry("regression")
def gamma_loglink() -> Case:
    """Gamma regression with a log link: 120 rows, 4 coefficients."""
    random = rng("gamma_loglink")
    x = random.normal(size=(120, 4))
    y = random.gamma(2.5, np.exp(1.0 + x @ np.array([0.4, -0.3, 0.0, 0.2])) / 2.5)

    def model(x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 3.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        shape = pyro.sample("shape", dist.LogNormal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Gamma(shape, shape / torch.exp(alpha + x @ beta)), obs=y)

    return model, (x, y)


@entry("regression")
def softmax_3_classes() -> Case:
    """Multinomial logistic regression with 3 classes: 120 rows, 5 predictors."""
    random = rng("softmax_3_classes")
    x = random.normal(size=(120, 5))
    scores = np.concatenate([np.zeros((120, 1)), x @ random.normal(size=(5, 2))], axis=1)
    y = np.argmax(scores + random.gumbel(size=(120, 3)), axis=1)

    def model(x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.5).expand([5, 2]).to_event(2))
        logits = torch.cat([torch.zeros((len(y), 1)), alpha + x @ beta], -1)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model, (x, y)


@entry("regression")
def collinear_polynomial() -> Case:
    """Polynomial of degree 5 in raw powers, which are nearly collinear: 60 rows."""
    random = rng("collinear_polynomial")
    t = np.sort(random.uniform(size=60))
    x = t[:, None] ** np.arange(6)
    y = np.sin(5.0 * t) + 0.2 * random.normal(size=60)

    def model(x: Array, y: Array) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 20.0).expand([6]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)

    return model, (x, y)


def _sparse_data(name: str, rows: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    random = rng(name)
    x = random.normal(size=(rows, size))
    beta = np.zeros(size)
    beta[:5] = np.array([2.0, -1.5, 1.0, 0.7, -0.4])
    return x, x @ beta + random.normal(size=rows)


@entry("sparse regression")
def lasso_60() -> Case:
    """Bayesian lasso with a scale to estimate: 100 rows, 60 coefficients."""

    def model(x: Array, y: Array) -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        beta = pyro.sample("beta", dist.Laplace(torch.zeros(60), scale).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)

    return model, _sparse_data("lasso_60", 100, 60)


@entry("sparse regression", eased=("beta",))
def horseshoe_50() -> Case:
    """Horseshoe regression, coefficients given their scales: 80 rows, 50 coefficients."""

    def model(x: Array, y: Array) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        lambdas = pyro.sample("lambdas", dist.HalfCauchy(1.0).expand([50]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        beta = pyro.sample("beta", dist.Normal(torch.zeros(50), tau * lambdas).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)

    return model, _sparse_data("horseshoe_50", 80, 50)


@entry("sparse regression")
def horseshoe_noncentred_50() -> Case:
    """Horseshoe regression with standardised coefficients: 80 rows, 50 coefficients."""

    def model(x: Array, y: Array) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(0.2))
        lambdas = pyro.sample("lambdas", dist.HalfCauchy(1.0).expand([50]).to_event(1))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([50]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        beta = pyro.deterministic("beta", z * tau * lambdas)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)

    return model, _sparse_data("horseshoe_noncentred_50", 80, 50)


@entry("sparse regression")
def regularised_horseshoe_30() -> Case:
    """Logistic regression with the regularised horseshoe of Piironen and Vehtari: 120 rows, 30 coefficients."""
    x, score = _sparse_data("regularised_horseshoe_30", 120, 30)
    y = (score > 0.0).astype(float)

    def model(x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfCauchy(0.1))
        lambdas = pyro.sample("lambdas", dist.HalfCauchy(1.0).expand([30]).to_event(1))
        slab = pyro.sample("slab", dist.InverseGamma(2.0, 8.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([30]).to_event(1))
        squares = torch.square(lambdas)
        scales = torch.sqrt(slab * squares / (slab + torch.square(tau) * squares))
        beta = pyro.deterministic("beta", z * tau * scales)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=alpha + x @ beta), obs=y)

    return model, (x, y)


@entry("latent predictors")
def measurement_error() -> Case:
    """Regression on 30 true values of a predictor that is measured twice with error."""
    random = rng("measurement_error")
    true = 2.0 + random.normal(size=30)
    measured = true[:, None] + 0.5 * random.normal(size=(30, 2))
    y = 1.0 + 0.8 * true + 0.4 * random.normal(size=30)

    def model(measured: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        error = pyro.sample("error", dist.HalfNormal(1.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("row", len(y)):
            x = pyro.sample("x", dist.Normal(mu, tau))
            pyro.sample("measured", dist.Normal(x[..., None], error).expand([len(y), 2]).to_event(1), obs=measured)
            pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)

    return model, (measured, y)


@entry("latent predictors")
def missing_predictors() -> Case:
    """Regression in which a predictor is missing in the last 20 of 80 rows."""
    random = rng("missing_predictors")
    z = random.normal(size=80)
    x = 0.6 * z + random.normal(size=80)
    y = 0.5 + 1.0 * x - 0.7 * z + 0.6 * random.normal(size=80)

    def model(x: Array, z: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        gamma = pyro.sample("gamma", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        mean = gamma[0] + gamma[1] * z
        with pyro.plate("seen", 60):
            pyro.sample("x", dist.Normal(mean[:60], tau), obs=x)
        with pyro.plate("missing", 20):
            unseen = pyro.sample("unseen", dist.Normal(mean[60:], tau))
        complete = torch.cat([x, unseen], -1)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(alpha + beta[0] * complete + beta[1] * z, sigma), obs=y)

    return model, (x[:60], z, y)


@entry("regression")
def correlated_outcomes() -> Case:
    """Three outcomes with correlated residuals on two predictors: 80 rows."""
    random = rng("correlated_outcomes")
    x = np.concatenate([np.ones((80, 1)), random.normal(size=(80, 2))], axis=1)
    scale = np.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [-0.3, 0.4, 0.7]])
    y = x @ random.normal(size=(3, 3)) + random.normal(size=(80, 3)) @ scale.T

    def model(x: Array, y: Array) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 3.0).expand([3, 3]).to_event(2))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([3]).to_event(1))
        factor = pyro.sample("factor", dist.LKJCholesky(3, concentration=2.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.MultivariateNormal(x @ beta, scale_tril=sigma[..., None] * factor), obs=y)

    return model, (x, y)


@entry("nonlinear regression")
def smooth_change_point() -> Case:
    """Line whose slope changes smoothly at an unknown time: 60 rows."""
    random = rng("smooth_change_point")
    t = np.linspace(0.0, 1.0, 60)
    y = 1.0 + 0.5 * t + 0.15 * np.logaddexp(0.0, (t - 0.6) / 0.05) + 0.12 * random.normal(size=60)

    def model(t: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        change = pyro.sample("change", dist.Normal(0.0, 5.0))
        when = pyro.sample("when", dist.Uniform(0.0, 1.0))
        width = pyro.sample("width", dist.LogNormal(-3.0, 0.5))
        sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
        bend = width * torch.nn.functional.softplus((t - when) / width)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(alpha + slope * t + change * bend, sigma), obs=y)

    return model, (t, y)


@entry("nonlinear regression")
def dugongs() -> Case:
    """Growth of 27 dugongs, with an asymptote (BUGS)."""
    ages = "1 1.5 1.5 1.5 2.5 4 5 5 7 8 8.5 9 9.5 9.5 10 12 12 13 13 14.5 15.5 15.5 16.5 17 22.5 29 31.5"
    lengths = (
        "1.80 1.85 1.87 1.77 2.02 2.27 2.15 2.26 2.47 2.19 2.26 2.40 2.39 2.41 2.50 2.32 2.32 2.43 2.47 2.56 2.65"
        " 2.47 2.64 2.56 2.70 2.72 2.57"
    )
    x = np.array([float(word) for word in ages.split()])
    y = np.array([float(word) for word in lengths.split()])

    def model(x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
        gamma = pyro.sample("gamma", dist.Uniform(0.5, 1.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(alpha - beta * torch.exp(x * torch.log(gamma)), sigma), obs=y)

    return model, (x, y)


@entry("regression")
def probit() -> Case:
    """Probit regression: 100 rows, 5 coefficients."""
    random = rng("probit")
    x = random.normal(size=(100, 5))
    y = (0.3 + x @ np.array([1.0, -0.7, 0.4, 0.0, 0.2]) + random.normal(size=100) > 0.0).astype(float)

    def model(x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([5]).to_event(1))
        score = alpha + x @ beta
        with pyro.plate("row", len(y)):
            pyro.factor("y", torch.special.log_ndtr((2.0 * y - 1.0) * score))

    return model, (x, y)


@entry("regression")
def beetles_cloglog() -> Case:
    """Deaths of beetles in 8 doses of carbon disulphide, complementary log-log link (BUGS, Bliss 1935)."""
    dose = np.array([1.6907, 1.7242, 1.7552, 1.7842, 1.8113, 1.8369, 1.8610, 1.8839])
    trials = np.array([59.0, 60.0, 62.0, 56.0, 63.0, 59.0, 62.0, 60.0])
    deaths = np.array([6.0, 13.0, 18.0, 28.0, 52.0, 53.0, 61.0, 60.0])

    def model(dose: Array, trials: Array, deaths: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 50.0))
        hazard = torch.exp(alpha + beta * dose)
        with pyro.plate("row", len(dose)):
            pyro.factor("deaths", deaths * torch.log(-torch.expm1(-hazard)) - (trials - deaths) * hazard)

    return model, (dose - dose.mean(), trials, deaths)


@entry("nonlinear regression")
def michaelis_menten() -> Case:
    """Reaction rates of the Puromycin experiment, treated and untreated cells: 23 rows."""
    steps = [0.02, 0.06, 0.11, 0.22, 0.56, 1.10]
    doses = np.concatenate([np.repeat(steps, 2), np.repeat(steps, 2)[:-1]])
    treated = [76, 47, 97, 107, 123, 139, 159, 152, 191, 201, 207, 200]
    untreated = [67, 51, 84, 86, 98, 115, 131, 124, 144, 158, 160]
    y = np.array(treated + untreated, dtype=float)
    group = np.array([0] * 12 + [1] * 11)

    def model(doses: Array, group: Array, y: Array) -> None:
        highest = pyro.sample("highest", dist.LogNormal(5.0, 1.0).expand([2]).to_event(1))
        half = pyro.sample("half", dist.LogNormal(-2.0, 1.0).expand([2]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(20.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(highest[group] * doses / (half[group] + doses), sigma), obs=y)

    return model, (doses, group, y)


@entry("survival")
def weibull_survival() -> Case:
    """Weibull regression on the remission times of 42 leukaemia patients, 12 of them censored (Freireich 1963)."""
    drug = [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35]
    seen = [1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    placebo = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
    time = np.array(drug + placebo, dtype=float)
    event = np.array(seen + [1] * 21, dtype=float)
    treated = np.array([1.0] * 21 + [0.0] * 21)

    def model(time: Array, event: Array, treated: Array) -> None:
        shape = pyro.sample("shape", dist.LogNormal(0.0, 0.5))
        alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 2.0))
        log_scale = alpha + beta * treated
        log_ratio = torch.log(time) - log_scale
        log_hazard = torch.log(shape) + (shape - 1.0) * log_ratio - log_scale
        with pyro.plate("patient", len(time)):
            pyro.factor("time", event * log_hazard - torch.exp(shape * log_ratio))

    return model, (time, event, treated)


@entry("survival")
def cox_frailty() -> Case:
    """Exponential hazards of 300 patients in 30 centres with gamma frailties, censored at time 2."""
    random = rng("cox_frailty")
    centre = np.repeat(np.arange(30), 10)
    x = random.normal(size=(300, 3))
    frailty = random.gamma(2.0, 0.5, size=30)
    complete = random.exponential(1.0 / (0.7 * frailty[centre] * np.exp(x @ np.array([0.5, -0.4, 0.0]))))
    time, event = np.minimum(complete, 2.0), (complete < 2.0).astype(float)

    def model(centre: Array, x: Array, time: Array, event: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        nu = pyro.sample("nu", dist.Gamma(2.0, 0.5))
        with pyro.plate("centre", 30):
            frailty = pyro.sample("frailty", dist.Gamma(nu, nu))
        log_hazard = alpha + x @ beta + torch.log(frailty[centre])
        with pyro.plate("patient", len(time)):
            pyro.factor("time", event * log_hazard - time * torch.exp(log_hazard))

    return model, (centre, x, time, event)
