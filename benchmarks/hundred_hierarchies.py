"""Hierarchical models of ``hundred.py``."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from hundred_registry import entry, rng

Array = Any  # a tensor for Pyro, an array of JAX for NumPyro
Case = tuple[Callable[..., None], tuple[Any, ...]]

RATS = """
151 199 246 283 320  145 199 249 293 354  147 214 263 312 328  155 200 237 272 297  135 188 230 280 323
159 210 252 298 331  141 189 231 275 305  159 201 248 297 338  177 236 285 350 376  134 182 220 260 296
160 208 261 313 352  143 188 220 273 314  154 200 244 289 325  171 221 270 326 358  163 216 242 281 312
160 207 248 288 324  142 187 234 280 316  156 203 243 283 317  157 212 259 307 336  152 203 246 286 321
154 205 253 298 334  139 190 225 267 302  146 191 229 272 302  157 211 250 285 323  132 185 237 286 331
160 207 257 303 345  169 216 261 295 333  157 205 248 289 316  137 180 219 258 291  153 200 244 286 324
"""


def _numbers(text: str) -> np.ndarray:
    return np.array([float(word) for word in text.split()])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


@entry("hierarchy", eased=("alpha", "beta"))
def rats() -> Case:
    """Growth curves of 30 young rats, centred (BUGS)."""

    def model(days: Array, y: Array) -> None:
        mean = pyro.sample("mean", dist.Normal(250.0, 50.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
        mean_scale = pyro.sample("mean_scale", dist.HalfCauchy(20.0))
        slope_scale = pyro.sample("slope_scale", dist.HalfCauchy(2.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(10.0))
        with pyro.plate("rat", 30):
            alpha = pyro.sample("alpha", dist.Normal(mean, mean_scale))
            beta = pyro.sample("beta", dist.Normal(slope, slope_scale))
            weight = alpha[..., None] + beta[..., None] * days
            pyro.sample("y", dist.Normal(weight, sigma).to_event(1), obs=y)

    return model, (np.array([-14.0, -7.0, 0.0, 7.0, 14.0]), _numbers(RATS).reshape(30, 5))


@entry("hierarchy", eased=("b",))
def seeds() -> Case:
    """Germination on 21 plates, logistic regression with a random effect per plate, centred (BUGS)."""
    r = _numbers("10 23 23 26 17 5 53 55 32 46 10 8 10 8 23 0 3 22 15 32 3")
    n = _numbers("39 62 81 51 39 6 74 72 51 79 13 16 30 28 45 4 12 41 30 51 7")
    kind = np.array([0.0] * 11 + [1.0] * 10)
    extract = _numbers("0 0 0 0 0 1 1 1 1 1 1 0 0 0 0 0 1 1 1 1 1")
    x = np.stack([np.ones(21), kind, extract, kind * extract], axis=1)

    def model(x: Array, n: Array, r: Array) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 3.0).expand([4]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
        with pyro.plate("plate", 21):
            b = pyro.sample("b", dist.Normal(0.0, sigma))
            pyro.sample("r", dist.Binomial(total_count=n, logits=x @ beta + b), obs=r)

    return model, (x, n, r)


@entry("hierarchy")
def pumps() -> Case:
    """Failures of 10 pumps of a power plant, gamma rates (BUGS)."""
    time = _numbers("94.3 15.7 62.9 126 5.24 31.4 1.05 1.05 2.1 10.5")
    failures = _numbers("5 1 5 14 3 19 1 1 4 22")

    def model(time: Array, failures: Array) -> None:
        alpha = pyro.sample("alpha", dist.Exponential(1.0))
        beta = pyro.sample("beta", dist.Gamma(0.1, 1.0))
        with pyro.plate("pump", 10):
            theta = pyro.sample("theta", dist.Gamma(alpha, beta))
            pyro.sample("failures", dist.Poisson(theta * time), obs=failures)

    return model, (time, failures)


@entry("hierarchy", eased=("delta",))
def blocker() -> Case:
    """Meta-analysis of 22 trials of beta blockers, centred log odds ratios (BUGS)."""
    deaths = "3 7 5 102 28 4 98 60 25 138 64 45 9 57 25 33 28 8 6 32 27 22"
    treated = "38 114 69 1533 355 59 945 632 278 1916 873 263 291 858 154 207 251 151 174 209 391 680"
    control_deaths = "3 14 11 127 27 6 152 48 37 188 52 47 16 45 31 38 12 6 3 40 43 39"
    controls = "39 116 93 1520 365 52 939 471 282 1921 583 266 293 883 147 213 122 154 134 218 364 674"

    def model(r: Array, n: Array, control_r: Array, control_n: Array) -> None:
        d = pyro.sample("d", dist.Normal(0.0, 2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("trial", 22):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            delta = pyro.sample("delta", dist.Normal(d, sigma))
            pyro.sample("control", dist.Binomial(total_count=control_n, logits=mu), obs=control_r)
            pyro.sample("treated", dist.Binomial(total_count=n, logits=mu + delta), obs=r)

    return model, tuple(_numbers(text) for text in (deaths, treated, control_deaths, controls))


@entry("hierarchy", eased=("b",))
def surgical() -> Case:
    """Deaths after surgery in 12 hospitals, centred (BUGS)."""
    n = _numbers("47 148 119 810 211 196 148 215 207 97 256 360")
    r = _numbers("0 18 8 46 8 13 9 31 14 8 29 24")

    def model(n: Array, r: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
        with pyro.plate("hospital", 12):
            b = pyro.sample("b", dist.Normal(mu, sigma))
            pyro.sample("r", dist.Binomial(total_count=n, logits=b), obs=r)

    return model, (n, r)


@entry("hierarchy", eased=("mean",))
def dyes() -> Case:
    """Yield of 6 batches of dyestuff in 5 samples each, centred (BUGS)."""
    y = _numbers(
        "1545 1440 1440 1520 1580 1540 1555 1490 1560 1495 1595 1550 1605 1510 1560"
        " 1445 1440 1595 1465 1545 1595 1630 1515 1635 1625 1520 1455 1450 1480 1445"
    ).reshape(6, 5)

    def model(y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(1500.0, 200.0))
        between = pyro.sample("between", dist.HalfNormal(100.0))
        within = pyro.sample("within", dist.HalfNormal(100.0))
        with pyro.plate("batch", 6):
            mean = pyro.sample("mean", dist.Normal(mu, between))
            pyro.sample("y", dist.Normal(mean[..., None], within).expand([6, 5]).to_event(1), obs=y)

    return model, (y,)


@entry("hierarchy", eased=("patient_effect", "visit_effect"))
def epilepsy_counts() -> Case:
    """Seizures of 59 patients in 4 visits, with effects of patients and of visits, centred: 302 latents."""
    random = rng("epilepsy_counts")
    patient = np.repeat(np.arange(59), 4)
    base = random.normal(size=59)
    treated = (random.permutation(59) < 30).astype(float)
    last = np.tile(np.array([0.0, 0.0, 0.0, 1.0]), 59)
    x = np.stack([base[patient], treated[patient], (base * treated)[patient], last], axis=1)
    effects = 0.5 * random.normal(size=59)[patient] + 0.35 * random.normal(size=236)
    y = random.poisson(np.exp(1.6 + x @ np.array([0.8, -0.3, 0.2, -0.15]) + effects))

    def model(patient: Array, x: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 3.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        patient_scale = pyro.sample("patient_scale", dist.HalfNormal(1.0))
        visit_scale = pyro.sample("visit_scale", dist.HalfNormal(1.0))
        with pyro.plate("patient", 59):
            patient_effect = pyro.sample("patient_effect", dist.Normal(0.0, patient_scale))
        with pyro.plate("visit", len(y)):
            visit_effect = pyro.sample("visit_effect", dist.Normal(0.0, visit_scale))
            log_rate = alpha + x @ beta + patient_effect[patient] + visit_effect
            pyro.sample("y", dist.Poisson(torch.exp(log_rate)), obs=y)

    return model, (patient, x, y)


@entry("hierarchy", eased=("effect",))
def salmonella() -> Case:
    """Mutagenicity of quinoline on 18 plates of salmonella, centred plate effects (BUGS)."""
    y = _numbers("15 21 29 16 18 21 16 26 33 27 41 60 33 38 41 20 27 42")
    dose = np.repeat(np.array([0.0, 10.0, 33.0, 100.0, 333.0, 1000.0]), 3)

    def model(dose: Array, y: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 2.0))
        gamma = pyro.sample("gamma", dist.Normal(0.0, 5.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("plate", 18):
            effect = pyro.sample("effect", dist.Normal(0.0, sigma))
            log_rate = alpha + beta * torch.log(dose + 10.0) - gamma * dose / 1000.0 + effect
            pyro.sample("y", dist.Poisson(torch.exp(log_rate)), obs=y)

    return model, (dose, y)


def _counties(name: str, counties: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = rng(name)
    county = np.repeat(np.arange(counties), random.integers(2, 15, size=counties))
    floor = (random.uniform(size=len(county)) < 0.2).astype(float)
    level = 1.4 + 0.35 * random.normal(size=counties)
    slope = -0.7 + 0.25 * random.normal(size=counties)
    return county, floor, level[county] + slope[county] * floor + 0.7 * random.normal(size=len(county))


@entry("hierarchy", eased=("alpha", "beta"))
def radon_counties_40() -> Case:
    """Level and effect of the floor in 40 counties, centred: 85 latents."""

    def model(county: Array, floor: Array, y: Array) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 3.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
        level_scale = pyro.sample("level_scale", dist.HalfNormal(1.0))
        slope_scale = pyro.sample("slope_scale", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        with pyro.plate("county", 40):
            alpha = pyro.sample("alpha", dist.Normal(level, level_scale))
            beta = pyro.sample("beta", dist.Normal(slope, slope_scale))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(alpha[county] + beta[county] * floor, sigma), obs=y)

    return model, _counties("radon_counties_40", 40)


@entry("hierarchy")
def radon_counties_85_noncentred() -> Case:
    """Level and effect of the floor in 85 counties, non-centred: 175 latents."""

    def model(county: Array, floor: Array, y: Array) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 3.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
        level_scale = pyro.sample("level_scale", dist.Exponential(1.0))
        slope_scale = pyro.sample("slope_scale", dist.Exponential(1.0))
        sigma = pyro.sample("sigma", dist.Exponential(1.0))
        with pyro.plate("county", 85):
            level_z = pyro.sample("level_z", dist.Normal(0.0, 1.0))
            slope_z = pyro.sample("slope_z", dist.Normal(0.0, 1.0))
        alpha = level + level_scale * level_z
        beta = slope + slope_scale * slope_z
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(alpha[county] + beta[county] * floor, sigma), obs=y)

    return model, _counties("radon_counties_85_noncentred", 85)


@entry("hierarchy")
def baseball() -> Case:
    """Hits of 18 players in 45 times at bat, beta-binomial (Efron and Morris 1975)."""
    hits = _numbers("18 17 16 15 14 14 13 12 11 11 10 10 10 10 10 9 8 7")

    def model(hits: Array) -> None:
        phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
        log_kappa = pyro.sample("log_kappa", dist.Exponential(1.5))
        kappa = torch.exp(log_kappa)
        with pyro.plate("player", 18):
            theta = pyro.sample("theta", dist.Beta(kappa * phi, kappa * (1.0 - phi)))
            pyro.sample("hits", dist.Binomial(total_count=45, probs=theta), obs=hits)

    return model, (hits,)


@entry("hierarchy", eased=("theta",))
def weak_groups() -> Case:
    """Means of 20 groups with 2 rows each, centred: the scale may be near zero."""
    random = rng("weak_groups")
    group = np.repeat(np.arange(20), 2)
    y = 0.5 + 0.3 * random.normal(size=20)[group] + random.normal(size=40)

    def model(group: Array, y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        with pyro.plate("group", 20):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(theta[group], sigma), obs=y)

    return model, (group, y)


@entry("hierarchy", eased=("theta",))
def logit_intercepts_100() -> Case:
    """Logistic regression with intercepts of 100 groups of 5 rows, centred: 104 latents."""
    random = rng("logit_intercepts_100")
    group = np.repeat(np.arange(100), 5)
    x = random.normal(size=(500, 2))
    score = -0.4 + random.normal(size=100)[group] + x @ np.array([0.8, -0.5])
    y = (score + random.logistic(size=500) > 0.0).astype(float)

    def model(group: Array, x: Array, y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        with pyro.plate("group", 100):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=theta[group] + x @ beta), obs=y)

    return model, (group, x, y)


@entry("hierarchy", eased=("theta",))
def poisson_groups_500() -> Case:
    """Counts of 500 groups with log-normal rates, centred: 502 latents."""
    random = rng("poisson_groups_500")
    exposure = random.uniform(0.5, 4.0, size=500)
    y = random.poisson(exposure * np.exp(0.8 + 0.6 * random.normal(size=500)))

    def model(exposure: Array, y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("group", 500):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Poisson(exposure * torch.exp(theta)), obs=y)

    return model, (exposure, y)


@entry("hierarchy")
def meta_student() -> Case:
    """Meta-analysis of 25 studies with Student-t effects, centred."""
    random = rng("meta_student")
    error = random.uniform(0.1, 0.5, size=25)
    y = 0.3 + 0.25 * random.standard_t(4.0, size=25) + error * random.normal(size=25)

    def model(error: Array, y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(0.5))
        with pyro.plate("study", 25):
            theta = pyro.sample("theta", dist.StudentT(4.0, mu, tau))
            pyro.sample("y", dist.Normal(theta, error), obs=y)

    return model, (error, y)


@entry("hierarchy", eased=("mean", "log_scale"))
def group_variances() -> Case:
    """Means and log standard deviations of 15 groups of 8 rows, centred: 34 latents."""
    random = rng("group_variances")
    means, scales = 1.0 + random.normal(size=15), np.exp(-0.2 + 0.5 * random.normal(size=15))
    y = means[:, None] + scales[:, None] * random.normal(size=(15, 8))

    def model(y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        with pyro.plate("group", 15):
            mean = pyro.sample("mean", dist.Normal(mu, tau))
            log_scale = pyro.sample("log_scale", dist.Normal(level, spread))
            rows = dist.Normal(mean[..., None], torch.exp(log_scale)[..., None]).expand([15, 8])
            pyro.sample("y", rows.to_event(1), obs=y)

    return model, (y,)


def _slopes(name: str, groups: int, rows: int, scales: list[float]) -> tuple[Any, np.random.Generator]:
    """Return groups, predictors and the linear predictor of correlated coefficients per group."""
    random = rng(name)
    size = len(scales)
    group = np.repeat(np.arange(groups), rows)
    x = np.concatenate([np.ones((len(group), 1)), random.normal(size=(len(group), size - 1))], axis=1)
    correlation = np.where(np.eye(size) == 1.0, 1.0, 0.4)
    factor = np.array(scales)[:, None] * np.linalg.cholesky(correlation)
    theta = 0.5 + random.normal(size=(groups, size)) @ factor.T
    return (group, x, (x * theta[group]).sum(-1)), random


@entry("correlated effects", eased=("theta",))
def lkj_slopes_8() -> Case:
    """Correlated intercepts and slopes of 8 groups of 12 rows, linear, centred: 22 latents."""
    (group, x, mean), random = _slopes("lkj_slopes_8", 8, 12, [1.0, 0.5])

    def model(group: Array, x: Array, y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        scales = pyro.sample("scales", dist.HalfNormal(2.0).expand([2]).to_event(1))
        factor = pyro.sample("factor", dist.LKJCholesky(2, concentration=2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        with pyro.plate("group", 8):
            theta = pyro.sample("theta", dist.MultivariateNormal(mu, scale_tril=scales[..., None] * factor))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal((x * theta[group]).sum(-1), sigma), obs=y)

    return model, (group, x, mean + 0.8 * random.normal(size=len(mean)))


@entry("correlated effects", eased=("theta",))
def lkj_slopes_30() -> Case:
    """Correlated intercepts and slopes of 30 groups of 20 rows, logistic, centred: 65 latents."""
    (group, x, score), random = _slopes("lkj_slopes_30", 30, 20, [0.9, 0.6])
    y = (score + random.logistic(size=len(score)) > 0.0).astype(float)

    def model(group: Array, x: Array, y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        scales = pyro.sample("scales", dist.HalfNormal(1.0).expand([2]).to_event(1))
        factor = pyro.sample("factor", dist.LKJCholesky(2, concentration=1.0))
        with pyro.plate("group", 30):
            theta = pyro.sample("theta", dist.MultivariateNormal(mu, scale_tril=scales[..., None] * factor))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=(x * theta[group]).sum(-1)), obs=y)

    return model, (group, x, y)


@entry("correlated effects")
def lkj_slopes_30_noncentred() -> Case:
    """Correlated intercepts and slopes of 30 groups of 20 rows, logistic, non-centred: 65 latents."""
    (group, x, score), random = _slopes("lkj_slopes_30_noncentred", 30, 20, [0.9, 0.6])
    y = (score + random.logistic(size=len(score)) > 0.0).astype(float)

    def model(group: Array, x: Array, y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        scales = pyro.sample("scales", dist.HalfNormal(1.0).expand([2]).to_event(1))
        factor = pyro.sample("factor", dist.LKJCholesky(2, concentration=1.0))
        with pyro.plate("group", 30):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        theta = mu + torch.einsum("gk,jk->gj", z, scales[..., None] * factor)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=(x * theta[group]).sum(-1)), obs=y)

    return model, (group, x, y)


@entry("correlated effects")
def lkj_slopes_200() -> Case:
    """Correlated intercepts and slopes of 200 groups of 8 rows, linear, centred: 406 latents."""
    (group, x, mean), random = _slopes("lkj_slopes_200", 200, 8, [1.0, 0.5])

    def model(group: Array, x: Array, y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        scales = pyro.sample("scales", dist.HalfCauchy(1.0).expand([2]).to_event(1))
        factor = pyro.sample("factor", dist.LKJCholesky(2, concentration=2.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
        with pyro.plate("group", 200):
            theta = pyro.sample("theta", dist.MultivariateNormal(mu, scale_tril=scales[..., None] * factor))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal((x * theta[group]).sum(-1), sigma), obs=y)

    return model, (group, x, mean + 0.8 * random.normal(size=len(mean)))


@entry("correlated effects")
def lkj_three_40() -> Case:
    """Three correlated coefficients of 40 groups of 10 rows, linear, non-centred: 130 latents."""
    (group, x, mean), random = _slopes("lkj_three_40", 40, 10, [1.0, 0.5, 0.3])

    def model(group: Array, x: Array, y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        scales = pyro.sample("scales", dist.Exponential(1.0).expand([3]).to_event(1))
        factor = pyro.sample("factor", dist.LKJCholesky(3, concentration=2.0))
        sigma = pyro.sample("sigma", dist.Exponential(1.0))
        with pyro.plate("group", 40):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        theta = mu + torch.einsum("gk,jk->gj", z, scales[..., None] * factor)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal((x * theta[group]).sum(-1), sigma), obs=y)

    return model, (group, x, mean + 0.8 * random.normal(size=len(mean)))


@entry("hierarchy", eased=("district", "school"))
def three_levels() -> Case:
    """Pupils in 40 schools in 8 districts, centred: 52 latents."""
    random = rng("three_levels")
    district_of = np.repeat(np.arange(8), 5)
    school_of = np.repeat(np.arange(40), 8)
    schools = (0.8 * random.normal(size=8))[district_of] + 0.5 * random.normal(size=40)
    y = 1.0 + schools[school_of] + random.normal(size=320)

    def model(district_of: Array, school_of: Array, y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        scales = pyro.sample("scales", dist.HalfNormal(2.0).expand([2]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        with pyro.plate("districts", 8):
            district = pyro.sample("district", dist.Normal(mu, scales[0]))
        with pyro.plate("schools", 40):
            school = pyro.sample("school", dist.Normal(district[district_of], scales[1]))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(school[school_of], sigma), obs=y)

    return model, (district_of, school_of, y)


@entry("hierarchy")
def four_levels() -> Case:
    """Pupils in 72 schools in 24 districts in 6 regions, non-centred logistic regression: 106 latents."""
    random = rng("four_levels")
    school_of = np.repeat(np.arange(72), 8)
    district_of, region_of = np.arange(72) // 3, np.arange(72) // 12
    effects = (0.6 * random.normal(size=6))[region_of] + (0.5 * random.normal(size=24))[district_of]
    score = 0.3 + (effects + 0.4 * random.normal(size=72))[school_of]
    y = (score + random.logistic(size=576) > 0.0).astype(float)

    def model(region_of: Array, district_of: Array, school_of: Array, y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        scales = pyro.sample("scales", dist.HalfNormal(1.0).expand([3]).to_event(1))
        with pyro.plate("regions", 6):
            region = pyro.sample("region", dist.Normal(0.0, 1.0))
        with pyro.plate("districts", 24):
            district = pyro.sample("district", dist.Normal(0.0, 1.0))
        with pyro.plate("schools", 72):
            school = pyro.sample("school", dist.Normal(0.0, 1.0))
        level = mu + scales[0] * region[region_of] + scales[1] * district[district_of] + scales[2] * school
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=level[school_of]), obs=y)

    return model, (region_of, district_of, school_of, y)


@entry("crossed effects", eased=("person", "item"))
def crossed_30_20() -> Case:
    """Ratings of 20 items by 30 people, 300 of the pairs, centred: 54 latents."""
    random = rng("crossed_30_20")
    pairs = random.permutation(600)[:300]
    person_of, item_of = pairs // 20, pairs % 20
    y = 3.0 + 0.8 * random.normal(size=30)[person_of] + 0.5 * random.normal(size=20)[item_of]
    y = y + random.normal(size=300)

    def model(person_of: Array, item_of: Array, y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        person_scale = pyro.sample("person_scale", dist.HalfNormal(2.0))
        item_scale = pyro.sample("item_scale", dist.HalfNormal(2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        with pyro.plate("people", 30):
            person = pyro.sample("person", dist.Normal(mu, person_scale))
        with pyro.plate("items", 20):
            item = pyro.sample("item", dist.Normal(0.0, item_scale))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(person[person_of] + item[item_of], sigma), obs=y)

    return model, (person_of, item_of, y)


@entry("crossed effects", eased=("site", "year"))
def crossed_poisson() -> Case:
    """Counts at 25 sites in 15 years, centred effects of both: 43 latents."""
    random = rng("crossed_poisson")
    log_rate = 1.0 + 0.6 * random.normal(size=(25, 1)) + 0.3 * random.normal(size=(1, 15))
    y = random.poisson(np.exp(log_rate))

    def model(y: Array) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        site_scale = pyro.sample("site_scale", dist.Exponential(1.0))
        year_scale = pyro.sample("year_scale", dist.Exponential(1.0))
        sites, years = pyro.plate("sites", 25, dim=-2), pyro.plate("years", 15, dim=-1)
        with sites:
            site = pyro.sample("site", dist.Normal(0.0, site_scale))
        with years:
            year = pyro.sample("year", dist.Normal(0.0, year_scale))
        with sites, years:
            pyro.sample("y", dist.Poisson(torch.exp(mu + site + year)), obs=y)

    return model, (y,)


@entry("crossed effects", eased=("state", "age"))
def poststratification() -> Case:
    """Support by state, age and sex from a poll, with its share in each of 20 states: 30 latents."""
    random = rng("poststratification")
    cells = np.indices((20, 6, 2)).reshape(3, 240)
    score = 0.2 + 0.5 * random.normal(size=20)[cells[0]] + 0.4 * random.normal(size=6)[cells[1]] - 0.3 * cells[2]
    n = 1.0 + random.poisson(random.uniform(1.0, 12.0, size=20)[cells[0]])
    r = random.binomial(n.astype(int), _sigmoid(score)).astype(float)
    shares = random.dirichlet(np.full(12, 5.0), size=20)

    def model(state_of: Array, age_of: Array, sex: Array, n: Array, shares: Array, r: Array) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
        state_scale = pyro.sample("state_scale", dist.HalfNormal(1.0))
        age_scale = pyro.sample("age_scale", dist.HalfNormal(1.0))
        with pyro.plate("states", 20):
            state = pyro.sample("state", dist.Normal(0.0, state_scale))
        with pyro.plate("ages", 6):
            age = pyro.sample("age", dist.Normal(0.0, age_scale))
        score = alpha + beta * sex + state[state_of] + age[age_of]
        support = torch.sigmoid(score)
        pyro.deterministic(
            "share", torch.stack([(shares[k] * support[12 * k : 12 * k + 12]).sum(-1) for k in range(20)], -1)
        )
        with pyro.plate("cell", 240):
            pyro.sample("r", dist.Binomial(total_count=n, logits=score), obs=r)

    return model, (cells[0], cells[1], cells[2].astype(float), n, shares, r)


@entry("hierarchy")
def dirichlet_multinomial() -> Case:
    """Choices among 4 options in 25 groups of 30, with shares per group as latents: 79 latents."""
    random = rng("dirichlet_multinomial")
    shares = random.dirichlet(np.array([4.0, 3.0, 2.0, 1.0]), size=25)
    y = np.array([random.multinomial(30, share) for share in shares]).astype(float)

    def model(y: Array) -> None:
        phi = pyro.sample("phi", dist.Dirichlet(torch.ones(4)))
        kappa = pyro.sample("kappa", dist.Gamma(2.0, 0.1))
        with pyro.plate("group", 25):
            share = pyro.sample("share", dist.Dirichlet(kappa * phi))
            pyro.sample("y", dist.Multinomial(total_count=30, probs=share), obs=y)

    return model, (y,)


def _answers(name: str, people: int, items: int, spread: float) -> np.ndarray:
    random = rng(name)
    ability, difficulty = random.normal(size=(people, 1)), random.normal(size=items)
    slope = np.exp(spread * random.normal(size=items))
    score = slope * (ability - difficulty) + random.logistic(size=(people, items))
    return (score > 0.0).astype(float)


@entry("item response", eased=("ability", "difficulty"))
def rasch_60_15() -> Case:
    """Rasch model of 60 people and 15 items, centred, in long format: 78 latents."""
    y = _answers("rasch_60_15", 60, 15, 0.0)
    person_of, item_of = np.indices(y.shape).reshape(2, -1)

    def model(person_of: Array, item_of: Array, y: Array) -> None:
        spread = pyro.sample("spread", dist.HalfNormal(2.0))
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        with pyro.plate("people", 60):
            ability = pyro.sample("ability", dist.Normal(0.0, spread))
        with pyro.plate("items", 15):
            difficulty = pyro.sample("difficulty", dist.Normal(level, scale))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=ability[person_of] - difficulty[item_of]), obs=y)

    return model, (person_of, item_of, y.reshape(-1))


@entry("item response")
def two_pl_100_20() -> Case:
    """Two-parameter logistic model of 100 people and 20 items: 140 latents."""

    def model(y: Array) -> None:
        people, items = pyro.plate("people", 100, dim=-2), pyro.plate("items", 20, dim=-1)
        with people:
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with items:
            difficulty = pyro.sample("difficulty", dist.Normal(0.0, 2.0))
            slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
        with people, items:
            pyro.sample("y", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=y)

    return model, (_answers("two_pl_100_20", 100, 20, 0.4),)


@entry("item response")
def two_pl_500_40() -> Case:
    """Two-parameter logistic model of 500 people and 40 items, with a level and a scale: 582 latents."""

    def model(y: Array) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        people, items = pyro.plate("people", 500, dim=-2), pyro.plate("items", 40, dim=-1)
        with people:
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with items:
            difficulty = pyro.sample("difficulty", dist.Normal(0.0, 2.0))
            slope = pyro.sample("slope", dist.LogNormal(level, scale))
        with people, items:
            pyro.sample("y", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=y)

    return model, (_answers("two_pl_500_40", 500, 40, 0.4),)


@entry("item response")
def graded_response() -> Case:
    """Graded response model of 80 people and 8 items with 4 ordered categories: 112 latents."""
    random = rng("graded_response")
    score = 1.3 * random.normal(size=(80, 1)) + 0.5 * random.normal(size=8) + random.logistic(size=(80, 8))
    y = (score[..., None] > np.array([-1.5, 0.0, 1.5])).sum(-1)
    person_of, item_of = np.indices(y.shape).reshape(2, -1)

    def model(person_of: Array, item_of: Array, y: Array) -> None:
        with pyro.plate("people", 80):
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 8):
            slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
            base = dist.Normal(0.0, 1.5).expand([3])
            ordered = dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()])
            cutpoints = pyro.sample("cutpoints", ordered)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.OrderedLogistic(slope[item_of] * ability[person_of], cutpoints[item_of]), obs=y)

    return model, (person_of, item_of, y.reshape(-1))


@entry("paired comparison", eased=("skill",))
def bradley_terry_20() -> Case:
    """Bradley-Terry model of 150 games of 20 teams with a home advantage, centred: 22 latents."""
    random = rng("bradley_terry_20")
    pairs = np.array([random.permutation(20)[:2] for _ in range(150)])
    skill = 0.9 * random.normal(size=20)
    y = (0.3 + skill[pairs[:, 0]] - skill[pairs[:, 1]] + random.logistic(size=150) > 0.0).astype(float)

    def model(home: Array, away: Array, y: Array) -> None:
        advantage = pyro.sample("advantage", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("team", 20):
            skill = pyro.sample("skill", dist.Normal(0.0, scale))
        with pyro.plate("game", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=advantage + skill[home] - skill[away]), obs=y)

    return model, (pairs[:, 0], pairs[:, 1], y)


@entry("item response")
def ideal_points() -> Case:
    """Ideal points of 50 legislators in 30 votes; the direction of 12 of the votes is known: 110 latents."""
    random = rng("ideal_points")
    party = np.where(np.arange(50) < 25, -0.8, 0.8)
    position = party + 0.6 * random.normal(size=50)
    slope = np.where(np.arange(30) < 12, 1.0, random.choice([-1.0, 1.0], size=30)) * random.uniform(0.5, 2.0, size=30)
    score = position[:, None] * slope + 0.5 * random.normal(size=30) + random.logistic(size=(50, 30))

    def model(y: Array) -> None:
        legislators, votes = pyro.plate("legislators", 50, dim=-2), pyro.plate("votes", 30, dim=-1)
        with legislators:
            position = pyro.sample("position", dist.Normal(0.0, 1.0))
        known = pyro.sample("known", dist.LogNormal(0.0, 0.5).expand([12]).to_event(1))
        unknown = pyro.sample("unknown", dist.Normal(0.0, 1.5).expand([18]).to_event(1))
        slope = torch.cat([known, unknown], -1)
        with votes:
            level = pyro.sample("level", dist.Normal(0.0, 1.5))
        with legislators, votes:
            pyro.sample("y", dist.Bernoulli(logits=slope * position - level), obs=y)

    return model, ((score > 0.0).astype(float),)
