"""The checks of one observation take guides of hierarchies: of the latents outside of the plate, and in one row.

The exact posterior of a conjugate hierarchy passes, and one that is wrong outside of the plate or in its rows fails.
"""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import in_groups
from pyro import poutine
from scipy import stats
from torch import Tensor

from pyro_flows import AutoPlateFlow, Flow, calibrate, local_c2st, misspecification
from pyro_flows.bijectors import Affine
from pyro_flows.conditioners import Conditioner
from pyro_flows.diagnostics.local_c2st import Proposal, neighbours_of
from pyro_flows.programs.simulator import Simulator
from pyro_flows.transforms import Elementwise

GROUPS, WITHIN, BETWEEN = 4, 1 / 3, 0.25  # the variances of the mean of a row's data, and of the rows
PRECISION = 1 + GROUPS / (WITHIN + BETWEEN)  # of mu
OF_ROW = 1 / WITHIN + 1 / BETWEEN  # of theta given mu
quick = {"num_simulations": 99, "num_samples": 10}


def hierarchy(y: Tensor | None = None, groups: int = GROUPS, noise: float = 1.0) -> Tensor:
    """Sample groups of three numbers around a mean of their own."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    return in_groups(mu, y, groups, noise)


class Weighted(Conditioner):
    """Affine parameters: the location is a weighted sum of the context, and the scale is constant."""

    def __init__(self, weights: tuple[float, ...], scale: float) -> None:
        super().__init__(len(weights), 1, 2, (1,), 0)
        self.weights, self.scale = torch.tensor(weights), scale

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        loc = x @ self.weights.unsqueeze(-1)
        return torch.stack((torch.full_like(loc, 12 * math.atanh(math.log(self.scale) / 3)), loc), -1)


def exact(width: float = 1.0, of_rows: float = 1.0) -> AutoPlateFlow:
    """Return the posterior of ``hierarchy``, with the scale of mu times ``width``, and those of rows by ``of_rows``."""
    whole = (GROUPS / (WITHIN + BETWEEN) / PRECISION,), width * PRECISION**-0.5
    part = (1 / WITHIN / OF_ROW, 1 / BETWEEN / OF_ROW), of_rows * OF_ROW**-0.5
    guide = AutoPlateFlow(
        hierarchy,
        "group",
        encoder=lambda y, *_, **__: y.mean(-1, keepdim=True),
        global_encoder=lambda contexts: contexts.mean(-2),
        global_flow=lambda dim, _: Flow([Elementwise(Affine(), dim, Weighted(*whole))]),
        local_flow=lambda dim, _: Flow([Elementwise(Affine(), dim, Weighted(*part))]),
        init_scale=1.0,
    )
    guide.setup(hierarchy()).posterior.blocks[0].unit.data.fill_(1.0)
    return guide


def test_the_guide_by_hand_is_the_posterior():
    found = calibrate(hierarchy, exact(), num_simulations=500, num_samples=100)
    assert found.names == ["mu", "theta[row]"]
    assert found.calibrated


def test_the_posterior_of_one_row_is_that_of_the_guide():
    """Its draws and densities have a closed form, and its base coordinates are standard normal."""
    guide, y = exact(), torch.randn(5, GROUPS, 3)
    of = guide.of_datasets(y)
    truths = of.pick({"mu": torch.zeros(5), "theta": torch.arange(20.0).reshape(5, GROUPS)})
    assert torch.equal(truths["theta"][:, 0], torch.arange(5) * 4.0 + of.places)
    z = of.q.sample((4000,))
    assert of.q.coordinates(z).std().item() == pytest.approx(1, abs=0.02)
    row = y.mean(-1)[torch.arange(5), of.places]
    mean = GROUPS * y.mean((-1, -2)) / (WITHIN + BETWEEN) / PRECISION
    assert torch.allclose(z[..., 0].mean(0), mean, atol=5 * (PRECISION * 4000) ** -0.5)
    joint = dist.Normal(mean, PRECISION**-0.5).log_prob(z[..., 0])
    inside = dist.Normal((z[..., 0] / BETWEEN + row / WITHIN) / OF_ROW, OF_ROW**-0.5).log_prob(z[..., 1])
    assert torch.allclose(of.log_prob(of.values(z)), joint + inside, atol=1e-4)
    some = of.take(torch.tensor([3, 1]))
    assert torch.allclose(some.q.log_prob(z[:, [3, 1]]), (joint + inside)[:, [3, 1]], atol=1e-4)
    assert of.sample_all(7)["theta"].shape == (7, 5, GROUPS)
    assert of.shared.labels == ["mu"]


def test_the_proposal_is_one_of_the_latents_outside_of_the_plate():
    y = hierarchy()
    proposal = Proposal(Simulator("test", hierarchy, (), {}), exact().of_datasets(y[None]))
    assert proposal.is_mixed
    mean, sd = GROUPS * y.mean() / (WITHIN + BETWEEN) / PRECISION, PRECISION**-0.5
    z = torch.randn(6, 2)
    ratio = dist.Normal(mean, 1.5 * sd).log_prob(z[:, 0]) - dist.Normal(0.0, 1.0).log_prob(z[:, 0])
    assert torch.allclose(proposal.log_weights(z), ((1 + ratio.exp()) / 2).log(), atol=1e-4)


def test_an_exact_guide_passes():
    found = local_c2st(hierarchy, exact(), observed={"y": hierarchy()}, num_simulations=4000)
    assert found.passed
    assert found.names == ["mu", "theta[row]"]
    assert found.truths.shape == found.draws.shape == (240, 2)


@pytest.mark.parametrize(("width", "of_rows", "name"), [(0.6, 1.0, "mu"), (1.0, 0.6, "theta[row]")])
def test_a_guide_that_is_too_narrow_fails_and_the_latent_is_named(width, of_rows, name):
    found = local_c2st(hierarchy, exact(width, of_rows), observed={"y": hierarchy()}, num_simulations=4000)
    assert found.p_value < 0.005
    assert f"the draws of {name} lie too narrow" in found.reason or "of all latents lie too narrow" in found.reason


@pytest.mark.slow
def test_p_values_of_an_exact_guide_are_uniform():
    guide, local, made = exact(), [], []
    for seed in range(100):
        pyro.set_rng_seed(seed)
        y = hierarchy()
        local.append(local_c2st(hierarchy, guide, observed={"y": y}, num_simulations=2000, num_null=199).p_value)
        made.append(misspecification(hierarchy, guide, observed={"y": y}, num_simulations=199, num_samples=10).p_value)
    for found in (local, made):
        assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_data_of_the_model_pass_and_data_with_more_noise_do_not():
    run = functools.partial(misspecification, hierarchy, exact())
    found = run(observed={"y": hierarchy()}, **quick)
    assert found.passed
    assert found.entries[:2] == ["y[0, 0]", "y[0, 1]"]
    noisy = run(observed={"y": hierarchy(noise=10.0)}, **quick)
    assert noisy.p_value == 0.01
    one = hierarchy()
    one[2] += torch.tensor([8.0, 0.0, -8.0])  # one row of four
    assert not run(observed={"y": one}, **quick).passed


def test_other_numbers_of_rows_are_arguments_of_the_model():
    y = hierarchy(groups=7)
    found = misspecification(hierarchy, exact(), groups=7, observed={"y": y}, **quick)
    assert len(found.entries) == 21
    assert local_c2st(hierarchy, exact(), groups=7, observed={"y": y}, num_simulations=1000).null.shape == (999,)


def test_candidates_have_numbers_of_one_row():
    how = {"num_simulations": 1000, "number": 50, "num_samples": 20}
    found = neighbours_of(exact(), Simulator("test", hierarchy, (), {}), {"y": hierarchy()[None]}, **how)
    assert found.names == ["mu", "theta[row]"]
    assert found.numbers.shape == found.base.shape == (50, 21, 2)


def test_guides_without_a_global_encoder_are_refused():
    guide = AutoPlateFlow(hierarchy, "group", encoder=lambda y, *_, **__: y.mean(-1, keepdim=True)).setup(hierarchy())
    for run in (local_c2st, misspecification):
        with pytest.raises(ValueError, match="with a global_encoder, got AutoPlateFlow without one"):
            run(hierarchy, guide, observed={"y": hierarchy()})


@pytest.mark.filterwarnings("ignore")
def test_rows_that_the_model_masks_are_refused():
    """Simulated datasets have all rows, and so another posterior."""

    def masked(y: Tensor | None = None) -> Tensor:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=torch.tensor([True, True, True, False])):
            return in_groups(mu, y, GROUPS)

    for run in (local_c2st, misspecification):
        with pytest.raises(ValueError, match=r"must have all rows of plate 'group', but the model masks some"):
            run(masked, exact(), observed={"y": hierarchy()})
