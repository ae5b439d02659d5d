"""The main job: a flow guide for the eight schools; no Gaussian can follow the funnel of their centred posterior.

Data: Rubin (1981), "Estimation in parallel randomized experiments", Journal of Educational Statistics 6(4).
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..answers import Posterior
from ..plots.draws import density_of
from ..plots.panels import panels
from .answer import answer
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
    return answer(wish, outputs, eight_schools, EFFECTS, STANDARD_ERRORS, figure=plot_funnel, theta=list(SCHOOLS))


def plot_funnel(found: Posterior) -> Any:
    """Plot the marginals of the posterior, and the funnel of a school's deviation against the log scale.

    Args:
        found: The posterior.

    Returns:
        A matplotlib figure.
    """
    draws = {name: values.numpy(force=True) for name, values in found.draws.items()}
    picture, (left, right) = panels(10.5, 4.8, 2, 2, width_ratios=(1.15, 1))
    mean, scale, effects = draws["mu"], draws["tau"], draws["theta"].T
    names = ["mu", "tau", *(f"theta {school}" for school in SCHOOLS)]
    low, high = -15.0, 27.0
    for row, values in enumerate((mean, scale, *effects)):
        height, color = len(names) - 1 - row, ("C3", "C2", "C0")[min(row, 2)]
        places, density = density_of(values, low, high)
        left.fill_between(places, height, height + 0.85 * density / (density.max() or 1), color=color, alpha=0.45, lw=0)
        left.plot(np.quantile(values, [0.05, 0.95]), [height, height], color=color, lw=2.2, solid_capstyle="butt")
        left.plot(values.mean(), height, "o", color=color, ms=4.5)
    left.set_yticks(range(len(names)), names[::-1])
    left.set(xlim=(low, high), xlabel="value (points of the test)")
    left.set_title("Marginals: density, mean and 90 % interval", fontsize=11)
    left.grid(axis="x", alpha=0.3)
    left.spines["left"].set_visible(False)
    right.scatter(effects[0] - mean, np.log(scale), s=5, alpha=0.25, color="C0", lw=0, rasterized=True)
    right.set(xlabel="theta A − mu", ylabel="log tau")
    right.set_title("The funnel: the smaller tau, the less the schools differ", fontsize=11)
    right.grid(alpha=0.3)
    return picture
