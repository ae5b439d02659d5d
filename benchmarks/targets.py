"""Posteriors with reference answers, as Pyro models.

Models and data come from posteriordb (Magnusson et al. 2024, arXiv:2407.04967), inference-gym and the study of Agrawal,
Sheldon and Domke (2020, arXiv:2006.10343).  They are not copied: the files are read from the folder that
``PYRO_FLOWS_DATA`` names.  ``posteriors.py`` fits them and ``evidence.py`` integrates them.
"""

import csv
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

Draws = dict[str, Tensor]  # a site's or a quantity's draws, (N, *shape)
STEM = {  # the files of each target
    "eight_schools": "eight_schools-eight_schools_noncentered",
    "eight_schools_centered": "eight_schools-eight_schools_noncentered",
    "garch": "garch-garch11",
    "gp_pois_regr": "gp_pois_regr-gp_pois_regr",
    "low_dim_gauss_mix": "low_dim_gauss_mix-low_dim_gauss_mix",
    "kidiq": "kidiq-kidscore_interaction",
    "diamonds": "diamonds-diamonds",
    "earnings": "earnings-logearn_interaction",
    "nes1972": "nes1972-nes",
    "sblrc": "sblrc-blr",
    "german_credit_sparse": "german_credit_sparse",
    "brownian_unknown_scales": "brownian_unknown_scales",
    "hepatitis": "hepatitis",
    "electric_1c_chr": "electric_1c_chr",
    "wells": "wells",
}


@dataclass(frozen=True)
class Target:
    """Posterior.

    Attributes:
        name: Its name in tables.
        dim: The number of unconstrained latents.
        model: The Pyro model, without arguments.
        quantities: Map from draws of the latents to draws of the named quantities of the reference, each ``(N,)``.
            Quantities that the reference lacks are not compared.
    """

    name: str
    dim: int
    model: Callable[[], None]
    quantities: Callable[[Draws], Draws]


def folder() -> Path:
    """Return the folder of the data, or exit with an error that names their sources."""
    here = Path(__file__).resolve()
    path = Path(os.environ.get("PYRO_FLOWS_DATA", here.parents[2] / "shared" / "data")) / "posteriors"
    if not path.is_dir():
        sys.exit(
            f"folder: {path} must be a folder, but it is missing. Set PYRO_FLOWS_DATA to a folder with "
            "posteriors/NAME.data.json, NAME.reference.npz and NAME.moments.npz. The originals are in posteriordb "
            "(github.com/stan-dev/posteriordb), inference-gym (PyPI) and stan-dev/example-models (hepatitis, "
            "electric_1c_chr, wells)."
        )
    return path


def load(name: str) -> Target:
    """Return a target by name."""
    if name not in STEM:
        raise ValueError(f"load: name must be one of {', '.join(STEM)}, got {name!r}. Use one of these names.")
    with open(folder() / f"{STEM[name]}.data.json") as file:
        data = {k: torch.as_tensor(np.array(v, dtype=float)) for k, v in json.load(file).items()}
    return globals()[f"_{name}"](data)


def evidence(name: str) -> float:
    """Return the log Z of a target from ``evidence.py``; NaN if it is not known yet."""
    path = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "evidence.csv"
    with path.open(newline="") as file:
        return next((float(r["log_evidence"]) for r in csv.DictReader(file) if r["target"] == name), math.nan)


def reference_moments(name: str) -> dict[str, tuple[float, float]]:
    """Return the reference's mean and standard deviation of each quantity; empty if there is no reference."""
    draws, moments = (folder() / f"{STEM[name]}.{kind}.npz" for kind in ("reference", "moments"))
    if draws.exists():
        return {k: (float(v.mean()), float(v.std())) for k, v in np.load(draws).items()}
    found: dict[str, tuple[float, float]] = {}
    if moments.exists():
        table = np.load(moments)
        for key in table:
            if key.endswith("_mean"):
                site = key.removesuffix("_mean")
                means, sds = np.atleast_1d(table[key]), np.atleast_1d(table[f"{site}_standard_deviation"])
                names = [site] if table[key].ndim == 0 else [f"{site}[{i + 1}]" for i in range(len(means))]
                found.update({n: (float(m), float(s)) for n, m, s in zip(names, means, sds, strict=True)})
    return found


def reference_draws(name: str) -> dict[str, np.ndarray]:
    """Return the reference's draws of each quantity; empty if there is no reference."""
    path = folder() / f"{STEM[name]}.reference.npz"
    return dict(np.load(path)) if path.exists() else {}


def _flat(support: Any, *shape: int) -> dist.ImproperUniform:
    return dist.ImproperUniform(support, torch.Size(), torch.Size(shape))


def _elements(draws: Draws, *names: str) -> Draws:
    """Return the draws of scalar sites, and those of vector sites by element as ``name[1] …``."""
    found = {}
    for name in names:
        value = draws[name]
        columns = {name: value} if value.dim() == 1 else {f"{name}[{i + 1}]": c for i, c in enumerate(value.T)}
        found.update(columns)
    return found


def _regression(name: str, x: Tensor, y: Tensor, coefficients: dist.Distribution, noise: dist.Distribution) -> Target:
    """Return the target y ~ Normal(x beta, sigma)."""

    def model() -> None:
        beta = pyro.sample("beta", coefficients)
        sigma = pyro.sample("sigma", noise)
        pyro.sample("y", dist.Normal(beta @ x.T, sigma.unsqueeze(-1)).to_event(1), obs=y)

    return Target(name, x.shape[1] + 1, model, lambda draws: _elements(draws, "beta", "sigma"))


def _kidiq(data: dict[str, Tensor]) -> Target:
    hs, iq = data["mom_hs"], data["mom_iq"]
    x = torch.stack((torch.ones_like(iq), hs, iq, hs * iq), -1)
    return _regression("kidiq", x, data["kid_score"], _flat(constraints.real_vector, 4), dist.HalfCauchy(2.5))


def _earnings(data: dict[str, Tensor]) -> Target:
    height, male = data["height"], data["male"]
    x = torch.stack((torch.ones_like(height), height, male, height * male), -1)
    flat = _flat(constraints.real_vector, 4), _flat(constraints.positive)
    return _regression("earnings", x, data["earn"].log(), *flat)


def _nes1972(data: dict[str, Tensor]) -> Target:
    ages = [(data["age_discrete"] == k).to(data["income"]) for k in (2, 3, 4)]
    columns = [data[k] for k in ("real_ideo", "race_adj")] + ages + [data[k] for k in ("educ1", "gender", "income")]
    x = torch.stack([torch.ones_like(ages[0]), *columns], -1)
    flat = _flat(constraints.real_vector, 9), _flat(constraints.positive)
    return _regression("nes1972", x, data["partyid7"], *flat)


def _sblrc(data: dict[str, Tensor]) -> Target:
    coefficients = dist.Normal(torch.zeros(5, dtype=torch.float64), 10.0).to_event(1)
    return _regression("sblrc", data["X"], data["y"], coefficients, dist.HalfNormal(torch.tensor(10.0).double()))


def _diamonds(data: dict[str, Tensor]) -> Target:
    x, y = data["X"][:, 1:], data["Y"]
    x = x - x.mean(0)
    zero = torch.zeros((), dtype=x.dtype)

    def model() -> None:
        b = pyro.sample("b", dist.Normal(zero.expand(24), 1.0).to_event(1))
        intercept = pyro.sample("Intercept", dist.StudentT(3.0, zero + 8, 10.0))
        sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, zero, 10.0)))
        mean = intercept.unsqueeze(-1) + b @ x.T
        pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1), obs=y)

    return Target("diamonds", 26, model, lambda draws: _elements(draws, "b", "Intercept", "sigma"))


def _wells(data: dict[str, Tensor]) -> Target:
    x = torch.stack((torch.ones_like(data["dist"]), data["dist"] / 100), -1)

    def model() -> None:
        beta = pyro.sample("beta", _flat(constraints.real_vector, 2))
        pyro.sample("switched", dist.Bernoulli(logits=beta @ x.T).to_event(1), obs=data["switc"])

    return Target("wells", 2, model, lambda draws: _elements(draws, "beta"))


def _eight_schools_model(data: dict[str, Tensor], centered: bool) -> None:
    zero = torch.zeros((), dtype=data["y"].dtype)
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 5))
    with pyro.plate("school", 8):
        if centered:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
        else:
            theta = pyro.deterministic("theta", mu + tau * pyro.sample("theta_raw", dist.Normal(zero, 1.0)))
        pyro.sample("y", dist.Normal(theta, data["sigma"]), obs=data["y"])


def _eight_schools(data: dict[str, Tensor]) -> Target:
    def quantities(draws: Draws) -> Draws:
        theta = draws["mu"].unsqueeze(-1) + draws["tau"].unsqueeze(-1) * draws["theta_raw"]
        return _elements({**draws, "theta": theta}, "theta", "mu", "tau")

    return Target("eight_schools", 10, partial(_eight_schools_model, data, False), quantities)


def _eight_schools_centered(data: dict[str, Tensor]) -> Target:
    model = partial(_eight_schools_model, data, True)
    return Target("eight_schools_centered", 10, model, lambda draws: _elements(draws, "theta", "mu", "tau"))


def _garch(data: dict[str, Tensor]) -> Target:
    y, first = data["y"], data["sigma1"]

    def model() -> None:
        mu = pyro.sample("mu", _flat(constraints.real))
        alpha0 = pyro.sample("alpha0", _flat(constraints.positive))
        alpha1 = pyro.sample("alpha1", _flat(constraints.unit_interval))
        u = pyro.sample("u", _flat(constraints.unit_interval))
        beta1 = (1 - alpha1) * u
        pyro.factor("jacobian", torch.log1p(-alpha1))
        # s_t^2 = a_t + beta1 s_{t-1}^2 is summed by doubling: after k rounds each term sums 2^k steps of the past.
        shocks = alpha0.unsqueeze(-1) + alpha1.unsqueeze(-1) * (y[:-1] - mu.unsqueeze(-1)).square()
        variance = torch.cat((first.square().expand(*mu.shape, 1), shocks), -1)
        decay, step = beta1.unsqueeze(-1), 1
        while step < len(y):
            variance = torch.cat((variance[..., :step], variance[..., step:] + decay * variance[..., :-step]), -1)
            decay, step = decay.square(), 2 * step
        pyro.sample("y", dist.Normal(mu.unsqueeze(-1), variance.sqrt()).to_event(1), obs=y)

    def quantities(draws: Draws) -> Draws:
        return _elements({**draws, "beta1": (1 - draws["alpha1"]) * draws["u"]}, "mu", "alpha0", "alpha1", "beta1")

    return Target("garch", 4, model, quantities)


def _gp_pois_regr(data: dict[str, Tensor]) -> Target:
    x, k = data["x"], data["k"]
    squares, one = (x[:, None] - x).square(), torch.ones((), dtype=x.dtype)

    def factor(rho: Tensor, alpha: Tensor) -> Tensor:
        rho, alpha = rho[..., None, None], alpha[..., None, None]
        kernel = alpha.square() * torch.exp(-squares / (2 * rho.square()))
        return torch.linalg.cholesky(kernel + 1e-10 * torch.eye(len(x), dtype=x.dtype))

    def model() -> None:
        rho = pyro.sample("rho", dist.Gamma(25 * one, 4.0))
        alpha = pyro.sample("alpha", dist.HalfNormal(2 * one))
        raw = pyro.sample("f_raw", dist.Normal(one.new_zeros(len(x)), 1.0).to_event(1))
        f = (factor(rho, alpha) @ raw.unsqueeze(-1)).squeeze(-1)
        pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)

    def quantities(draws: Draws) -> Draws:
        f = (factor(draws["rho"], draws["alpha"]) @ draws["f_raw"].unsqueeze(-1)).squeeze(-1)
        return _elements({**draws, "f": f}, "rho", "alpha", "f")

    return Target("gp_pois_regr", 13, model, quantities)


def _low_dim_gauss_mix(data: dict[str, Tensor]) -> Target:
    y, zero = data["y"], torch.zeros((), dtype=data["y"].dtype)

    def model() -> None:
        mu = pyro.sample("mu", _flat(constraints.ordered_vector, 2))
        pyro.factor("mu_prior", dist.Normal(zero, 2.0).log_prob(mu).sum(-1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2 + zero.expand(2)).to_event(1))
        theta = pyro.sample("theta", dist.Beta(5 + zero, 5.0))
        parts = dist.Normal(mu.unsqueeze(-1), sigma.unsqueeze(-1)).log_prob(y)  # (*, 2, N)
        first, second = parts.unbind(-2)
        weight = theta.unsqueeze(-1)
        pyro.factor("y", torch.logaddexp(weight.log() + first, torch.log1p(-weight) + second).sum(-1))

    return Target("low_dim_gauss_mix", 5, model, lambda draws: _elements(draws, "mu", "sigma", "theta"))


def _german_credit_sparse(data: dict[str, Tensor]) -> Target:
    x = data["features"]
    x = torch.cat(((x - x.mean(0)) / x.std(0, correction=0), torch.ones_like(x[:, :1])), -1)
    half = torch.full((25,), 0.5, dtype=x.dtype)

    def model() -> None:
        z = pyro.sample("unscaled_weights", dist.Normal(torch.zeros_like(half), 1.0).to_event(1))
        local = pyro.sample("local_scales", dist.Gamma(half, half).to_event(1))
        scale = pyro.sample("global_scale", dist.Gamma(half[0], half[0]))
        logits = (z * local * scale.unsqueeze(-1)) @ x.T
        pyro.sample("label", dist.Bernoulli(logits=logits).to_event(1), obs=data["labels"])

    names = "unscaled_weights", "local_scales", "global_scale"
    return Target("german_credit_sparse", 51, model, lambda draws: _elements(draws, *names))


def _brownian_unknown_scales(data: dict[str, Tensor]) -> Target:
    y = data["observed_locs"]
    seen = y.isfinite()
    zeros, walk = y.new_zeros(len(y)), torch.ones(len(y), len(y), dtype=y.dtype).tril()

    def model() -> None:
        innovation = pyro.sample("innovation_noise_scale", dist.LogNormal(zeros[0], 2.0))
        noise = pyro.sample("observation_noise_scale", dist.LogNormal(zeros[0], 2.0))
        factor = innovation[..., None, None] * walk  # x is the running sum of its innovations
        x = pyro.sample("locs", dist.MultivariateNormal(zeros, scale_tril=factor))
        pyro.sample("y", dist.Normal(x[..., seen], noise.unsqueeze(-1)).to_event(1), obs=y[seen])

    names = "innovation_noise_scale", "observation_noise_scale", "locs"
    return Target("brownian_unknown_scales", 32, model, lambda draws: _elements(draws, *names))


def _hepatitis(data: dict[str, Tensor]) -> Target:
    person, count = data["idxn1"].long() - 1, len(data["y0"])
    time, start = data["tvec1"] - 6.5, (data["y0"] - data["y0"].mean())[person]
    zero = torch.zeros((), dtype=time.dtype)

    def model() -> None:
        coefficients = [pyro.sample(name, dist.Normal(zero, 1000.0)) for name in ("alpha0", "beta0", "gamma")]
        alpha0, beta0, gamma = (c.unsqueeze(-1) for c in coefficients)
        scales = [
            pyro.sample(f"variance_{name}", dist.InverseGamma(0.001 + zero, 0.001 + zero)).sqrt().unsqueeze(-1)
            for name in ("alpha", "beta", "y")
        ]
        alpha = pyro.sample("alpha", dist.Normal(alpha0, scales[0]).expand([*alpha0.shape[:-1], count]).to_event(1))
        beta = pyro.sample("beta", dist.Normal(beta0, scales[1]).expand([*beta0.shape[:-1], count]).to_event(1))
        mean = alpha[..., person] + beta[..., person] * time + gamma * start
        pyro.sample("y", dist.Normal(mean, scales[2]).to_event(1), obs=data["Yvec1"])

    return Target("hepatitis", 218, model, lambda draws: {})


def _electric_1c_chr(data: dict[str, Tensor]) -> Target:
    pair, grade, grade_pair = (data[name].long() - 1 for name in ("pair", "grade", "grade_pair"))
    zero = torch.zeros((), dtype=data["y"].dtype)
    zeros = zero.expand(4)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(zeros, 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(zeros, 100.0).to_event(1))
        c = pyro.sample("c", dist.Normal(zeros, 100.0).to_event(1))
        scale_a = pyro.sample("sigma_a", dist.Uniform(zeros, 100.0).to_event(1))
        scale_y = pyro.sample("sigma_y", dist.Uniform(zeros, 100.0).to_event(1))
        eta = pyro.sample("eta", dist.Normal(zero.expand(96), 1.0).to_event(1))
        a = 50 * mu[..., grade_pair] + scale_a[..., grade_pair] * eta
        mean = a[..., pair] + b[..., grade] * data["treatment"] + c[..., grade] * data["pre_test"]
        pyro.sample("y", dist.Normal(mean, scale_y[..., grade]).to_event(1), obs=data["y"])

    return Target("electric_1c_chr", 116, model, lambda draws: {})


NAMES = tuple(STEM)
DIMS = dict(zip(NAMES, (10, 10, 4, 13, 5, 5, 26, 5, 10, 6, 51, 32, 218, 116, 2), strict=True))
