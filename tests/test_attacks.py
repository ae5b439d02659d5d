"""Attacks on ``check``: a wrong guide of each class, and a right one of each shape.  benchmarks/attacks.py has more.

Posteriors are given distributions: the model is a normal prior times the ratio of the distribution to the prior.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import normals, sampling, with_posterior
from torch import Tensor
from vector_laws import Edged, Funnel, Mixture, Ring

import pyro_flows as pf
from pyro_flows import check
from pyro_flows.diagnostics.missing_modes import SEARCH, narrowest_shown

FAR = Mixture(0.96, normals(2), normals(2, 1.0, 20.0))
SPIKE = Mixture(0.3, normals(5, 0.2), normals(5, 1.0, 3.0))
BOXES = Mixture(0.5, Edged(-2.0, 0.0, 2), Edged(3.0, 6.0, 2))
LABELS = Mixture(0.5, *(dist.Normal(torch.tensor([at, -at]), 0.3).to_event(1) for at in (-4.0, 4.0)))
ARMS = [dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, r], [r, 1.0]])) for r in (0.99, -0.99)]
CROSS = Mixture(0.5, *ARMS)
LAWS = {  # posteriors, and the standard deviations of normal priors
    "labels": (LABELS, 10.0),
    "spike": (SPIKE, 3.0),
    "far": (FAR, 20.0),
    "boxes": (BOXES, 5.0),
    "ring": (Ring(2), 4.0),
    "cross": (CROSS, 4.0),
}
RADIUS = math.sqrt((9 + 0.09) / 2)  # the standard deviation of the ring's coordinates
WRONG: dict[str, tuple[str, dist.TorchDistribution, set[str]]] = {
    "one labelling of two": ("labels", LABELS.first, {"mode", "collapsed"}),
    "a spike without its slab": ("spike", SPIKE.first, {"mode", "collapsed"}),
    "a slab without its spike": ("spike", SPIKE.second, {"mode", "collapsed"}),
    "a little mass far away": ("far", FAR.first, {"far", "mode", "collapsed"}),
    "one box of two": ("boxes", BOXES.first, {"mode", "collapsed"}),
    "a disc for a ring": ("ring", normals(2, RADIUS), {"shape"}),
}


def checked(law: dist.TorchDistribution, scale: float, of_guide: dist.TorchDistribution) -> pf.Check:
    """Check draws of a distribution against a posterior, whose prior is normal with a given scale."""
    return check(with_posterior(law, normals(law.event_shape[0], scale)), sampling(x=of_guide))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_neck_behind_the_draws_of_a_guide_is_found(seed: int) -> None:
    """Climbs reach it through the guide's draws, where most of them end."""
    pyro.set_rng_seed(seed)
    found = checked(Funnel(10), 9.0, Funnel(10, -1.5))
    assert found.verdict == "do not trust"


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_attacks_are_found_out(name: str) -> None:
    target, law, kinds = WRONG[name]
    found = checked(*LAWS[target], law)
    assert kinds & {finding.kind for finding in found.findings}, found.findings
    if kinds != {"shape"}:
        assert found.verdict == "do not trust"
        assert found.missing.place is not None
    if target == "labels":
        assert found.missing.share == pytest.approx(0.5, abs=4 * found.missing.share_se + 0.02)
        assert found.missing.place.tolist() == pytest.approx([4, -4], abs=1.5)
        assert found.misses_a_mode
    assert found.verdict == ("do not trust" if "do not trust" in [f.verdict for f in found.findings] else "reweight")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
def test_right_guides_of_each_geometry_are_believed(name: str) -> None:
    found = checked(*LAWS[name], LAWS[name][0])
    assert (found.verdict, found.findings) == ("trust", ())


@pytest.mark.slow
def test_weights_that_count_unequally_ask_for_resampling() -> None:
    """The guide has the posterior's marginals, but a second arm that the posterior does not have."""
    law = CROSS.first
    model, guide = with_posterior(law, normals(2, 3.0)), sampling(x=CROSS)
    found = check(model, guide)
    assert found.verdict == "reweight", found.findings
    kinds = {finding.kind: finding for finding in found.findings}
    assert kinds["weights"].verdict == "reweight"
    assert 0.4 < kinds["weights"].size < 0.5  # half of the draws lie on the other arm
    assert "resample" in found.reason
    draws = pf.resample(model, guide, num_samples=10_000)["x"]
    torch.testing.assert_close(torch.cov(draws.T), law.covariance_matrix, atol=0.08, rtol=0)


@pytest.mark.slow
def test_weights_that_hardly_vary_are_believed_whatever_their_tail() -> None:
    """If weights are equal up to rounding, k-hat has no meaning."""
    law = dist.StudentT(2.5, torch.zeros(2), 1.0).to_event(1)

    def model() -> None:
        x = pyro.sample("x", law)
        pyro.factor("hardly", 1e-3 * (1 + x.square().sum(-1)).log())

    found = check(model, sampling(x=law))
    assert found.verdict == "trust"
    assert not any(finding.kind == "tails" for finding in found.findings)


def angles() -> None:
    """Model of an angle with two modes at ±1, each with half of the mass."""
    pyro.sample("x", dist.Normal(0.0, 1.0))
    angle = pyro.sample("angle", dist.VonMises(0.0, 1e-3))
    parts = dist.VonMises(torch.tensor([-1.0, 1.0]), 32.0)
    pyro.factor("data", parts.log_prob(angle.unsqueeze(-1)).logsumexp(-1))


@pytest.mark.slow
@pytest.mark.parametrize("modes", [[1.0], [-1.0, 1.0]])
def test_a_mode_of_an_angle_is_found_where_it_is_lost(modes: list[float]) -> None:
    parts = dist.Categorical(torch.ones(len(modes))), dist.VonMises(torch.tensor(modes), 32.0)
    found = check(angles, sampling(x=dist.Normal(0.0, 1.0), angle=dist.MixtureSameFamily(*parts)))
    assert found.trusted == (len(modes) == 2)
    assert found.missing.share == pytest.approx(1 - len(modes) / 2, abs=0.05)


@pytest.mark.slow
def test_a_mode_that_is_orders_of_magnitude_smaller_is_found() -> None:
    """Draws of the prior are rarely that small."""
    parts = dist.Gamma(torch.tensor([9.0, 9.0]), torch.tensor([9e3, 0.9]))  # near .001 and 10
    both = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)
    for _ in range(3):
        found = check(with_posterior(both, dist.Gamma(1.0, 0.1)), sampling(x=dist.Gamma(9.0, 0.9)))
        assert found.misses_a_mode
        assert found.missing.share == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_a_needle_in_the_middle_of_the_prior_is_found() -> None:
    """The guide draws only the broad mode."""
    law = Mixture(0.3, normals(5, 0.01), normals(5, 1.0, 3.0))
    found = checked(law, 3.0, law.second)
    assert found.misses_a_mode
    assert found.missing.share == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(
    ("dim", "scale", "place"), [(2, 0.01, 0.5), (3, 0.05, 0.9), (4, 0.05, 0.5), (5, 0.1, 0.4), (3, 0.05, 2.5)]
)
def test_a_needle_that_no_ascent_meets_is_found(dim: int, scale: float, place: float) -> None:
    """The needle lies within the broad mode that the guide keeps, and the last one beside it."""
    law = Mixture(0.67, normals(dim), normals(dim, scale, place))
    found = checked(law, 3.0, law.first)
    assert found.verdict == "do not trust"
    assert found.missing.share == pytest.approx(0.33, abs=0.05)
    assert 0 < found.missing.narrowest < 1


def test_the_limit_of_narrow_modes_agrees_with_counts() -> None:
    """Draws of the guide within the reach of a mode of the narrowest scale are about as many as predicted."""
    for dim in (2, 4):
        scale = narrowest_shown(dim, 60_000)
        excess = math.log(SEARCH.share / (1 - SEARCH.share)) - dim * math.log(scale) + dim / 2
        draws = torch.randn(2_000_000, dim, generator=torch.Generator().manual_seed(0))
        near = (draws - 1.0).norm(dim=-1) < scale * math.sqrt(2 * excess)  # |c|² = D
        shown = 60_000 * float(near.double().mean())
        assert shown == pytest.approx(SEARCH.shown, rel=0.4)


def test_rounding_errors_of_cancelling_densities_are_no_modes() -> None:
    """Far out the prior's log-density is as large as 1e16 and cancels, so that the sum is noise."""
    prior, logs = dist.Exponential(1.0), dist.Gamma(4.0, 2.0)

    def log_prob(x: Tensor) -> Tensor:
        z = x.log()
        return torch.where(z > 0, logs.log_prob(z.clamp_min(1e-30)), -math.inf) - z

    def model() -> None:
        x = pyro.sample("x", prior)
        pyro.factor("data", log_prob(x) - prior.log_prob(x))

    guide = sampling(x=dist.TransformedDistribution(logs, [dist.transforms.ExpTransform()]))
    assert check(model, guide).missing.share < 0.05
