"""pocoMC on Pyro models, for the comparison in ``modes.py``.

pocoMC (Karamanis et al. 2022, arXiv:2207.05660) needs a prior that it can sample from and score, and a likelihood.
Both are functions of the unconstrained latents here.  The prior is the model's.  An improper prior is replaced by
Student's t with three degrees of freedom and scale 10, in unconstrained space.  The likelihood is divided by it, so
that Z is that of the model.  Angles are periodic parameters of pocoMC.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import evidence
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import prune_subsample_sites
from targets import Draws
from torch import Tensor
from torch.distributions import biject_to

REFERENCE = dist.StudentT(3.0, 0.0, 10.0)  # instead of an improper prior
Array = np.ndarray[Any, np.dtype[np.float64]]


class Run(NamedTuple):
    """Weighted draws of the latents, log Z, and the standard error of log Z that the sampler states."""

    draws: Draws
    log_weights: Tensor
    log_evidence: float
    error: float


@contextmanager
def double() -> Iterator[None]:
    """Set double precision, which the models need; the flows of pocoMC need single precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Latents:
    """The prior of a model's unconstrained latents, as pocoMC expects it, and the likelihood.

    Attributes:
        dim: The number of latents.
        bounds: Lower and upper bounds, ``(dim, 2)``: infinite, except for angles.
        periodic: The indices of the angles.
    """

    def __init__(self, model: Callable[[], None]) -> None:
        self.model = model
        self.sites, self.plates = evidence.latent_sites(model)
        self.sizes = [math.prod(site.shape) for site in self.sites]
        self.dim = sum(self.sizes)

        def origin(site: dict[str, Any]) -> Tensor:  # an improper prior cannot be sampled
            transform = biject_to(site["fn"].support)
            return transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))

        with poutine.block(), InitMessenger(origin):
            trace = prune_subsample_sites(poutine.trace(model).get_trace())
        functions = {name: bare(node["fn"]) for name, node in trace.iter_stochastic_nodes()}
        self.improper = {name for name, fn in functions.items() if isinstance(fn, dist.ImproperUniform)}
        angle = [isinstance(functions[site.name], dist.VonMises) for site in self.sites]
        circular = np.repeat(angle, self.sizes)
        self.periodic = np.flatnonzero(circular).tolist()
        self.bounds = np.where(circular[:, None], [[-math.pi, math.pi]], [[-math.inf, math.inf]])
        self.last: tuple[Array, Array, Array] | None = None

    def unpack(self, position: Tensor) -> tuple[Draws, dict[str, Tensor]]:
        """Return each site's unconstrained and constrained values."""
        parts = position.split(self.sizes, -1)
        free = {s.name: part.reshape(-1, *s.shape) for s, part in zip(self.sites, parts, strict=True)}
        return free, {s.name: s.transform(free[s.name]) for s in self.sites}

    def rvs(self, size: int = 1) -> Array:
        """Sample from the prior."""
        with double(), torch.no_grad():
            free, values = self.unpack(REFERENCE.sample((size, self.dim)).double())
            data = {name: values[name] for name in self.improper}
            with pyro.plate("particles", size, dim=-1 - self.plates):
                trace = poutine.trace(poutine.condition(self.model, data=data)).get_trace()
            columns = [
                free[s.name] if s.name in self.improper else s.transform.inv(trace.nodes[s.name]["value"])
                for s in self.sites
            ]
            return torch.cat([column.reshape(size, -1) for column in columns], -1).numpy()

    def scores(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log prior and the log likelihood at unconstrained positions."""
        number = len(position)
        free, values = self.unpack(position)
        try:
            with pyro.plate("particles", number, dim=-1 - self.plates):
                model = poutine.condition(self.model, data=values)
                trace = prune_subsample_sites(poutine.trace(model).get_trace())
        except torch.linalg.LinAlgError:  # the matrix of some row has no Cholesky factor
            if number == 1:
                return torch.zeros(1), torch.full((1,), -math.inf)
            first, second = (self.scores(half) for half in position.chunk(2))
            return torch.cat((first[0], second[0])), torch.cat((first[1], second[1]))
        trace.compute_log_prob()
        prior, likelihood = torch.zeros(number), torch.zeros(number)
        transforms = {site.name: site.transform for site in self.sites}
        for name, node in trace.nodes.items():
            if node["type"] != "sample":
                continue
            log_prob = node["log_prob"].reshape(number, -1).sum(-1)
            if name not in transforms:
                likelihood = likelihood + log_prob
                continue
            jacobian = transforms[name].log_abs_det_jacobian(free[name], values[name]).reshape(number, -1).sum(-1)
            if name in self.improper:
                reference = REFERENCE.log_prob(free[name]).reshape(number, -1).sum(-1)
                prior, likelihood = prior + reference, likelihood + log_prob + jacobian - reference
            else:
                prior = prior + log_prob + jacobian
        return prior, likelihood.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)

    def both(self, x: Array) -> tuple[Array, Array]:
        """Return log prior and log likelihood by one run of the model, since pocoMC requests both in turn."""
        if self.last is None or not np.array_equal(self.last[0], x):
            with double(), torch.no_grad():
                prior, likelihood = self.scores(torch.as_tensor(x, dtype=torch.float64))
            self.last = x.copy(), prior.numpy(), likelihood.numpy()
        return self.last[1], self.last[2]

    def logpdf(self, x: Array) -> Array:
        return self.both(x)[0].copy()

    def log_likelihood(self, x: Array) -> Array:
        return self.both(x)[1].copy()


def bare(fn: Any) -> Any:
    """Return a distribution without the wrappers that expand it or declare event dimensions."""
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return fn


def pocomc(model: Callable[[], None], seed: int, quick: bool) -> Run:
    """Run pocoMC with its defaults on a model."""
    from pocomc import Sampler

    with double():
        latents = Latents(model)
    torch.set_default_dtype(torch.float32)
    sampler = Sampler(
        prior=latents,
        likelihood=latents.log_likelihood,
        vectorize=True,
        periodic=latents.periodic or None,
        random_state=seed,
    )
    size = 512 if quick else 4096
    sampler.run(n_total=size, n_evidence=size, progress=False)
    x, log_weights, *_ = sampler.posterior(return_logw=True)
    log_z, error = sampler.evidence()
    torch.set_default_dtype(torch.float64)
    _, draws = latents.unpack(torch.as_tensor(x, dtype=torch.float64))
    weights = torch.as_tensor(log_weights, dtype=torch.float64)
    return Run(draws, weights - weights.logsumexp(0), float(log_z), float(error))
