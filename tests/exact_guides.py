"""Amortised guides with given means and standard deviations, such as those of exact posteriors."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_flows import AutoFlow, Flow
from pyro_flows.bijectors import Affine
from pyro_flows.conditioners import Conditioner
from pyro_flows.transforms import Elementwise


class Formula(Conditioner):
    """Affine parameters from a context that holds means and standard deviations."""

    def __init__(self, dim: int) -> None:
        super().__init__(2 * dim, dim, 2, (1,), 0)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        loc, scale = x.chunk(2, -1)
        return torch.stack((12 * torch.atanh(scale.log() / 3), loc), -1)


class Line(Conditioner):
    """Linear map from context to the parameters of an affine map, which fits the posteriors of conjugate models."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__(input_dim, output_dim, 2, (1,), 0)
        self.output = nn.Linear(input_dim, 2 * output_dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.output(x).unflatten(-1, (2, self.output_dim)).mT


def gaussian(model, moments) -> AutoFlow:
    """Return a guide of independent normals, given a function from data to means and standard deviations."""

    def recipe(dim, context_dim):
        return Flow([Elementwise(Affine(), dim, Formula(dim))])

    guide = AutoFlow(model, recipe, encoder=lambda *data: torch.cat(moments(*data), -1), init_scale=1.0)
    return guide.setup(model())


def conjugate(x=None, noise=0.5):
    """theta ~ N(0, I) in two dimensions, x ~ N(theta, noise² I): the posterior is N(0.8 x, 0.2 I) for noise 0.5."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    return pyro.sample("x", dist.Normal(theta, noise).to_event(1), obs=x)


def simulator(data, prior=None):
    """Return a model with two standard normal latents, or other ones, and the distribution of its data given these."""

    def model(x=None):
        theta = pyro.sample("theta", prior or dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return pyro.sample("x", data(theta), obs=x)

    return model


def wrong(narrow, wide, shift):
    """Return the settings of wrong posteriors by the words for their error."""
    widths = {"too narrow": {"width": narrow}, "too wide": {"width": wide}}
    return {**widths, "too high": {"shift": shift}, "too low": {"shift": -shift}}


def posterior(width: float = 1.0, shift: float = 0.0, near: Tensor | None = None, reach: float = 0.37) -> AutoFlow:
    """Return the posterior of ``conjugate``, with its scale times ``width`` and its mean off by ``shift`` sds.

    With ``near`` it is wrong near that dataset only.
    """

    def moments(x, *_):
        share = torch.ones_like(x)
        if near is not None:
            share = share * (-(x - near).square().sum(-1, keepdim=True) / (2 * reach**2)).exp()
        sd = math.sqrt(0.2)
        return 0.8 * x + share * shift * sd, sd * (1 - (1 - width) * share)

    return gaussian(conjugate, moments)
