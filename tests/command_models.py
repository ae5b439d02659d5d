"""File of a user of the command ``fit``, with models that it takes and that it refuses."""

import sys
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

number = 3
seen = []


def normal(y, scale=1.0):
    x = pyro.sample("x", dist.Normal(0.0, 3.0))
    pyro.deterministic("twice", 2 * x)
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x, scale), obs=y)


def clash(steps, lr, warm_start):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(steps)):
        pyro.sample("y", dist.Normal(x, lr), obs=steps)


def nested(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("school", y.shape[1]):
        level = pyro.sample("level", dist.Normal(mu, 1.0))
        with pyro.plate("class", y.shape[0]):
            pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def counts(x, group, y, groups):
    with pyro.plate("group", groups):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson((level[..., group] + x).exp()), obs=y)


def single(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def no_arguments():
    pyro.sample("x", dist.Normal(0.0, 1.0))


def no_latents(y):
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def discrete(y):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(k, 1.0), obs=y)


def improper(y):
    pyro.sample("shift", dist.ImproperUniform(dist.constraints.real, (), ()))
    other = pyro.sample("other", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(other, 1.0), obs=y)


def faulty(y):
    pyro.sample("x", dist.Normal(0.0, 1.0))
    return torch.zeros(3) @ torch.zeros(4)


def no_arguments_but_faulty():
    pyro.sample("x", dist.Normal(0.0, 1.0))
    return len(3)


def subsampled(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(x, 1.0), obs=y[rows.long()])


def half(y):
    single(y)
    pyro.deterministic("d", torch.ones((), dtype=torch.bfloat16))


def complexes(y):
    single(y)
    pyro.deterministic("d", torch.ones(2, dtype=torch.complex64))


def exits(y):
    normal(y)
    sys.exit(0)


def exits_late(y):
    normal(y)
    seen.append(y)
    if len(seen) > 30:  # in training
        sys.exit(0)


def lacks_a_key(y):
    normal(y)
    seen.append(y)
    if len(seen) > 30:  # in training
        return {}["colour"]
    return None


def by_position(y, /):
    pyro.sample("x", dist.Normal(0.0, 1.0))


def anything(**kwargs):
    pyro.sample("x", dist.Normal(0.0, 1.0))


class Class(PyroModule):
    def forward(self, y):
        normal(y)


@dataclass
class Record:
    field: "int"


instance = Class()
