"""The main job: the posterior of the eight schools; no Gaussian can follow the funnel of their centred model.

Data: Rubin (1981), "Estimation in parallel randomized experiments", Journal of Educational Statistics 6(4).
"""

from argparse import Namespace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..answers import Posterior
from ..plots import pairs
from .fit import answer
from .outputs import Outputs

SCHOOLS = "ABCDEFGH"
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STANDARD_ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(effects: Tensor, standard_errors: Tensor) -> None:
    """Model the effect of coaching in each of eight schools, with partial pooling."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effects)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, standard_errors), obs=effects)


def run(wish: Namespace) -> bool:
    """Find the posterior of the eight schools, print it, and write the draws and a picture.

    Args:
        wish: The options of the command line.

    Returns:
        True if the draws can be trusted.
    """
    outputs = Outputs(wish.out, "eight_schools.nc")
    pyro.set_rng_seed(wish.seed)
    return answer(wish, outputs, eight_schools, EFFECTS, STANDARD_ERRORS, figure=funnel, theta=list(SCHOOLS))


def funnel(found: Posterior) -> Any:
    """Plot the draws of two schools against the scale: the smaller tau, the less the schools differ.

    Args:
        found: The posterior.

    Returns:
        A matplotlib figure.
    """
    mu, tau, theta = (found.draws[name] for name in ("mu", "tau", "theta"))
    quantities = torch.stack((mu, tau.log(), theta[:, 0] - mu, theta[:, 2] - mu), -1)
    return pairs(quantities, names=["mu", "log tau", "theta A − mu", "theta C − mu"], labels=("draws", ""))
