"""Models that several test files share."""

from __future__ import annotations

import dataclasses

import pyro
import pyro.distributions as dist
import torch

from pyro_flows import Check
from pyro_flows.diagnostics import Finding


def nested(y=None, *, noise=1.0):
    """Sample two nested plates, a factor, a deterministic site and data."""
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("outer", 2, dim=-2):
        middle = pyro.sample("middle", dist.Normal(top, 1.0))
        with pyro.plate("inner", 3, dim=-1):
            leaf = pyro.sample("leaf", dist.Normal(middle, 1.0))
            pair = pyro.sample("pair", dist.Normal(leaf[..., None], torch.ones(2)).to_event(1))
            pyro.deterministic("double", 2 * leaf)
            pyro.sample("y", dist.Normal(pair.sum(-1), noise), obs=y)
    pyro.factor("penalty", -0.1 * top**2)
    pyro.deterministic("square", top**2)


Y = torch.tensor([[0.5, 1.0, 2.0], [3.0, 0.1, 1.5]])


def with_verdict(found: Check, verdict: str) -> Check:
    """Return a check with the findings that lead to a verdict."""
    findings = () if verdict == "trust" else (Finding("mean", "x", 1.0, 0.1, verdict),)
    return dataclasses.replace(found, findings=findings)
