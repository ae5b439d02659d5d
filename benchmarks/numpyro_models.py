"""Posteriors of ``targets.py`` and Neal's funnel as NumPyro models, with the same sites, priors and data.

    python benchmarks/numpyro_models.py       # compare every log-density with Pyro's at random points

The models take no arguments and need the files of ``targets.py``.  ``sample.py`` runs NumPyro's NUTS on them.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import targets
from jax import Array
from numpyro.distributions import constraints

Model = Callable[[], None]
Data = dict[str, Array]
NAMES = *targets.NAMES, "funnel"


def load(name: str) -> Model:
    """Return one model by name, in double precision."""
    jax.config.update("jax_enable_x64", True)
    if name == "funnel":
        return _funnel
    with open(targets.folder() / f"{targets.STEM[name]}.data.json") as file:
        data = {k: jnp.asarray(np.array(v, dtype=float)) for k, v in json.load(file).items()}
    return globals()[f"_{name}"](data)


def _flat(support: Any, *shape: int) -> dist.ImproperUniform:
    return dist.ImproperUniform(support, (), shape)


def _normal(scale: float, *shape: int) -> dist.Distribution:
    return dist.Normal(0.0, scale).expand(shape).to_event(len(shape))


def _observe(name: str, likelihood: dist.Distribution, value: Array) -> None:
    numpyro.sample(name, likelihood.to_event(1), obs=value)


def _funnel() -> None:
    v = numpyro.sample("v", dist.Normal(0.0, 3.0))
    with numpyro.plate("row", 9):
        numpyro.sample("x", dist.Normal(0.0, jnp.exp(v / 2)))


def _regression(x: Array, y: Array, coefficients: dist.Distribution, noise: dist.Distribution) -> Model:
    """Return the model y ~ Normal(x beta, sigma)."""

    def model() -> None:
        beta = numpyro.sample("beta", coefficients)
        sigma = numpyro.sample("sigma", noise)
        _observe("y", dist.Normal(x @ beta, sigma), y)

    return model


def _kidiq(data: Data) -> Model:
    hs, iq = data["mom_hs"], data["mom_iq"]
    x = jnp.stack((jnp.ones_like(iq), hs, iq, hs * iq), -1)
    return _regression(x, data["kid_score"], _flat(constraints.real_vector, 4), dist.HalfCauchy(2.5))


def _earnings(data: Data) -> Model:
    height, male = data["height"], data["male"]
    x = jnp.stack((jnp.ones_like(height), height, male, height * male), -1)
    return _regression(x, jnp.log(data["earn"]), _flat(constraints.real_vector, 4), _flat(constraints.positive))


def _nes1972(data: Data) -> Model:
    ages = [jnp.where(data["age_discrete"] == k, 1.0, 0.0) for k in (2, 3, 4)]
    columns = [data[k] for k in ("real_ideo", "race_adj")] + ages + [data[k] for k in ("educ1", "gender", "income")]
    x = jnp.stack([jnp.ones_like(ages[0]), *columns], -1)
    return _regression(x, data["partyid7"], _flat(constraints.real_vector, 9), _flat(constraints.positive))


def _sblrc(data: Data) -> Model:
    return _regression(data["X"], data["y"], _normal(10.0, 5), dist.HalfNormal(10.0))


def _diamonds(data: Data) -> Model:
    x, y = data["X"][:, 1:], data["Y"]
    x = x - x.mean(0)

    def model() -> None:
        b = numpyro.sample("b", _normal(1.0, 24))
        intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
        sigma = numpyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
        _observe("y", dist.Normal(intercept + x @ b, sigma), y)

    return model


def _wells(data: Data) -> Model:
    x = jnp.stack((jnp.ones_like(data["dist"]), data["dist"] / 100), -1)

    def model() -> None:
        beta = numpyro.sample("beta", _flat(constraints.real_vector, 2))
        _observe("switched", dist.Bernoulli(logits=x @ beta), data["switc"])

    return model


def _eight_schools_model(data: Data, centered: bool) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", 8):
        if centered:
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
        else:
            theta = numpyro.deterministic("theta", mu + tau * numpyro.sample("theta_raw", dist.Normal(0.0, 1.0)))
        numpyro.sample("y", dist.Normal(theta, data["sigma"]), obs=data["y"])


def _eight_schools(data: Data) -> Model:
    return partial(_eight_schools_model, data, False)


def _eight_schools_centered(data: Data) -> Model:
    return partial(_eight_schools_model, data, True)


def _garch(data: Data) -> Model:
    y, first = data["y"], data["sigma1"]

    def model() -> None:
        mu = numpyro.sample("mu", _flat(constraints.real))
        alpha0 = numpyro.sample("alpha0", _flat(constraints.positive))
        alpha1 = numpyro.sample("alpha1", _flat(constraints.unit_interval))
        u = numpyro.sample("u", _flat(constraints.unit_interval))
        numpyro.factor("jacobian", jnp.log1p(-alpha1))
        # The recursion is summed by doubling, as in targets.py: a scan over the time steps is slower.
        variance = jnp.concatenate((first[None] ** 2, alpha0 + alpha1 * (y[:-1] - mu) ** 2))
        decay, step = (1 - alpha1) * u, 1
        while step < len(y):
            variance = jnp.concatenate((variance[:step], variance[step:] + decay * variance[:-step]))
            decay, step = decay**2, 2 * step
        _observe("y", dist.Normal(mu, jnp.sqrt(variance)), y)

    return model


def _gp_pois_regr(data: Data) -> Model:
    x, k = data["x"], data["k"]
    squares = (x[:, None] - x) ** 2

    def model() -> None:
        rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
        alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
        raw = numpyro.sample("f_raw", _normal(1.0, len(x)))
        kernel = alpha**2 * jnp.exp(-squares / (2 * rho**2)) + 1e-10 * jnp.eye(len(x))
        _observe("k", dist.Poisson(jnp.exp(jnp.linalg.cholesky(kernel) @ raw)), k)

    return model


def _low_dim_gauss_mix(data: Data) -> Model:
    y = data["y"]

    def model() -> None:
        mu = numpyro.sample("mu", _flat(constraints.ordered_vector, 2))
        numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
        sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
        theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
        first, second = dist.Normal(mu[:, None], sigma[:, None]).log_prob(y)
        numpyro.factor("y", jnp.logaddexp(jnp.log(theta) + first, jnp.log1p(-theta) + second).sum())

    return model


def _german_credit_sparse(data: Data) -> Model:
    x = data["features"]
    x = jnp.concatenate(((x - x.mean(0)) / x.std(0), jnp.ones_like(x[:, :1])), -1)

    def model() -> None:
        z = numpyro.sample("unscaled_weights", _normal(1.0, 25))
        local = numpyro.sample("local_scales", dist.Gamma(0.5, 0.5).expand([25]).to_event(1))
        scale = numpyro.sample("global_scale", dist.Gamma(0.5, 0.5))
        _observe("label", dist.Bernoulli(logits=x @ (z * local * scale)), data["labels"])

    return model


def _brownian_unknown_scales(data: Data) -> Model:
    y = np.asarray(data["observed_locs"])
    seen = np.flatnonzero(np.isfinite(y))
    walk = jnp.tril(jnp.ones((len(y), len(y))))

    def model() -> None:
        innovation = numpyro.sample("innovation_noise_scale", dist.LogNormal(0.0, 2.0))
        noise = numpyro.sample("observation_noise_scale", dist.LogNormal(0.0, 2.0))
        x = numpyro.sample("locs", dist.MultivariateNormal(jnp.zeros(len(y)), scale_tril=innovation * walk))
        _observe("y", dist.Normal(x[seen], noise), jnp.asarray(y[seen]))

    return model


def _hepatitis(data: Data) -> Model:
    person, count = data["idxn1"].astype(int) - 1, len(data["y0"])
    time, start = data["tvec1"] - 6.5, (data["y0"] - data["y0"].mean())[person]

    def model() -> None:
        alpha0, beta0, gamma = (numpyro.sample(name, _normal(1000.0)) for name in ("alpha0", "beta0", "gamma"))
        scales = [
            jnp.sqrt(numpyro.sample(f"variance_{name}", dist.InverseGamma(0.001, 0.001)))
            for name in ("alpha", "beta", "y")
        ]
        alpha = numpyro.sample("alpha", dist.Normal(alpha0, scales[0]).expand([count]).to_event(1))
        beta = numpyro.sample("beta", dist.Normal(beta0, scales[1]).expand([count]).to_event(1))
        _observe("y", dist.Normal(alpha[person] + beta[person] * time + gamma * start, scales[2]), data["Yvec1"])

    return model


def _electric_1c_chr(data: Data) -> Model:
    pair, grade, grade_pair = (data[name].astype(int) - 1 for name in ("pair", "grade", "grade_pair"))

    def model() -> None:
        mu = numpyro.sample("mu", _normal(1.0, 4))
        b = numpyro.sample("b", _normal(100.0, 4))
        c = numpyro.sample("c", _normal(100.0, 4))
        scale_a = numpyro.sample("sigma_a", dist.Uniform(0.0, 100.0).expand([4]).to_event(1))
        scale_y = numpyro.sample("sigma_y", dist.Uniform(0.0, 100.0).expand([4]).to_event(1))
        eta = numpyro.sample("eta", _normal(1.0, 96))
        a = 50 * mu[grade_pair] + scale_a[grade_pair] * eta
        mean = a[pair] + b[grade] * data["treatment"] + c[grade] * data["pre_test"]
        _observe("y", dist.Normal(mean, scale_y[grade]), data["y"])

    return model


def differences(name: str, points: int = 20) -> np.ndarray:
    """Return the log-density of a NumPyro model minus that of the Pyro model, at random points."""
    import torch
    from neutra import neal
    from numpyro.infer.util import log_density
    from pyro import poutine
    from pyro.infer.autoguide.initialization import InitMessenger
    from pyro.poutine.util import prune_subsample_sites

    def anywhere(site: dict[str, Any]) -> torch.Tensor:
        transform = torch.distributions.biject_to(site["fn"].support)
        return transform(torch.randn(transform.inverse_shape(site["fn"].shape())))

    model, ours, found = load(name), neal if name == "funnel" else targets.load(name).model, []
    for _ in range(points):
        trace = prune_subsample_sites(poutine.trace(InitMessenger(anywhere)(ours)).get_trace())
        values = {key: jnp.asarray(node["value"].numpy()) for key, node in trace.iter_stochastic_nodes()}
        found.append(float(log_density(model, (), {}, values)[0]) - float(trace.log_prob_sum()))
    return np.array(found)


def main() -> None:
    import torch

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    for name in NAMES:
        values = differences(name)
        print(f"{name:24} constant {values.mean():+.3e}  largest deviation {abs(values - values.mean()).max():.1e}")


if __name__ == "__main__":
    main()
