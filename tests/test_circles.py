"""Latents on circles: results do not depend on the place of the seam."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import stir
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_flows import AutoFlow, fit_svi, flows, psis
from pyro_flows.bijectors import CircularSpline
from pyro_flows.distributions import ModesBase, StudentTBase
from pyro_flows.guides.packing import Circle, Wrap

PERIODIC = {"periodic": True}


def small(*circular: bool):
    """Return a recipe for latents that include some angles."""
    return lambda dim: flows.circular_coupling(dim, circular=circular, num_transforms=4, hidden_dims=(16, 16))


fit = functools.partial(fit_svi, steps=300, num_particles=64, lr=0.01, progress=False)


# The map onto a circle.

every_interval = pytest.mark.parametrize(("low", "high"), [(-math.pi, math.pi), (0.0, 1.0), (5.0, 365.0), (-3.0, -2.5)])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@every_dtype
@every_interval
def test_wrap_stays_on_the_circle_and_has_its_period(low, high, dtype):
    seam = torch.tensor([-math.pi, math.pi, 0.0, 3 * math.pi], dtype=dtype)
    near = torch.cat([seam, *(torch.nextafter(seam, torch.full_like(seam, way)) for way in (-9.0, 9.0)), seam - 1e-9])
    x = torch.cat([near, torch.linspace(-20, 20, 1001, dtype=dtype)])
    wrap = Wrap(low, high)
    y = wrap(x)
    assert y.dtype == dtype
    assert ((y >= low) & (y < high)).all()
    around = (wrap(x + 2 * math.pi) - y) / (high - low)  # in turns; at the seam, both ends are the same point
    assert (around - around.round()).abs().max() < 100 * torch.finfo(dtype).eps


@every_interval
def test_wrap_and_its_inverse_undo_each_other(low, high):
    wrap = biject_to(Circle(low, high))
    assert isinstance(wrap, Wrap)
    y = torch.linspace(low, high, 101, dtype=torch.float64)[:-1]
    x = wrap.inv(y)
    assert ((x >= -math.pi) & (x < math.pi)).all()
    torch.testing.assert_close(wrap(x), y)
    torch.testing.assert_close(wrap(torch.tensor(-math.pi, dtype=torch.float64)).item(), low)


@every_interval
def test_wraps_log_det_is_autograds(low, high):
    wrap, x = Wrap(low, high), 10 * torch.randn(50, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(lambda x: wrap(x).sum(), x)
    torch.testing.assert_close(wrap.log_abs_det_jacobian(x, wrap(x)), slope.log())


def test_circles_of_many_sizes_side_by_side():
    low, high = torch.zeros(3), torch.tensor([1.0, 24.0, 360.0])
    wrap = Wrap(low, high)
    y = wrap(torch.randn(100, 3))
    assert ((y >= low) & (y < high)).all()
    torch.testing.assert_close(wrap.log_abs_det_jacobian(wrap.inv(y), y)[0], (high / (2 * math.pi)).log())


# Which latents are circles.

SITES = {
    "von Mises": (lambda: dist.VonMises(1.0, 2.0), {}, [True]),
    "von Mises in an event": (lambda: dist.VonMises(torch.zeros(3), 2.0).to_event(1), {}, [True] * 3),
    "masked": (lambda: dist.VonMises(0.0, torch.ones(2)).mask(torch.arange(2) < 1).to_event(1), {}, [True] * 2),
    "periodic interval": (lambda: dist.Uniform(0.0, 24.0), PERIODIC, [True]),
    "periodic event": (lambda: dist.Uniform(0.0, torch.tensor([1.0, 24.0])).to_event(1), PERIODIC, [True] * 2),
    "periodic unit interval": (lambda: dist.Beta(2.0, 2.0), PERIODIC, [True]),
    "flat": (lambda: dist.ImproperUniform(constraints.interval(0.0, 4.0), (), ()), PERIODIC, [True]),
    "von Mises, marked": (lambda: dist.VonMises(1.0, 2.0), PERIODIC, [True]),
}


@pytest.mark.parametrize("name", SITES)
def test_sites_on_circles_get_circular_splines(name):
    build, infer, wanted = SITES[name]

    def model():
        pyro.sample("a", build(), infer=infer)
        pyro.sample("x", dist.Normal(0.0, 1.0))

    guide = AutoFlow(model).setup()
    assert guide.has_circles
    assert guide.flow.base.circular.tolist() == [*wanted, False]
    splines = [layer for layer in guide.flow.transforms if isinstance(getattr(layer, "bijector", None), CircularSpline)]
    assert len(splines) >= 2
    draws = stir(guide, 0.3).sample(200)
    assert draws["a"].shape == (200, *build().shape())
    assert guide.log_prob(draws).isfinite().all()
    trace = poutine.trace(poutine.replay(model, poutine.trace(guide).get_trace())).get_trace()
    assert trace.log_prob_sum().isfinite()


def test_intervals_that_are_not_marked_are_lines():
    def model():
        pyro.sample("a", dist.Uniform(0.0, 24.0))
        pyro.sample("b", dist.Uniform(0.0, 24.0), infer={"periodic": False})

    assert not AutoFlow(model).setup().has_circles


def test_observed_angles_are_left_alone():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.VonMises(x, 1.0), obs=torch.tensor(3.0))

    guide = AutoFlow(model).setup()
    assert not guide.has_circles
    assert guide.latent_dim == 1


@pytest.mark.parametrize("law", [dist.Normal(0.0, 1.0), dist.HalfNormal(1.0), dist.Dirichlet(torch.ones(3))])
def test_a_periodic_site_must_be_an_interval(law):
    def model():
        pyro.sample("phase", law, infer=PERIODIC)

    with pytest.raises(ValueError, match=r"'phase' is marked periodic, but its support is .* and no interval"):
        AutoFlow(model).setup()


@pytest.mark.slow
def test_a_circle_that_depends_on_another_latent_turns_with_it():
    def model():
        period = pyro.sample("period", dist.Uniform(1.0, 2.0))
        pyro.sample("phase", dist.Uniform(0.0, period), infer=PERIODIC)

    guide = AutoFlow(model).setup()
    draws = guide.sample(1000)
    turns = draws["phase"] / draws["period"]
    assert turns.min() >= 0
    assert turns.max() <= 1
    # The guide's density integrates to one: its mean over draws with the known density 1 / period shows this.
    period = torch.rand(500) + 1
    phase = torch.rand(500) * period
    heights = [guide.log_prob({"period": a, "phase": b}) for a, b in zip(period, phase, strict=True)]
    weights = torch.stack(heights).exp() * period
    assert abs(weights.mean() - 1) < 4 * weights.std() / 500**0.5


def angle_and_line():
    """An angle near the seam and a number that depends on it, without data: both densities are normalised."""
    angle = pyro.sample("angle", dist.VonMises(3.0, 2.0))
    pyro.sample("line", dist.Normal(2 * torch.cos(angle - 3.0), 0.5))


@pytest.mark.parametrize("settings", [{"flow": flows.nsf}, {"base": StudentTBase}], ids=["flow", "base"])
def test_what_has_no_place_for_angles_is_refused(settings):
    with pytest.raises(ValueError, match=r"some latents are angles.*circular=\[True, False\]"):
        AutoFlow(angle_and_line, **settings).setup()


def test_a_recipe_for_other_angles_is_refused():
    with pytest.raises(ValueError, match="some latents are angles"):
        AutoFlow(angle_and_line, lambda dim: flows.circular_coupling(dim, circular=[True, True])).setup()
    assert AutoFlow(angle_and_line, small(True, False)).setup().has_circles  # the remedy in the error


def test_a_start_is_one_of_the_latents_that_are_no_angles():
    guide = AutoFlow(angle_and_line).setup()
    guide.start_at(torch.tensor([1.0, 5.0]), torch.tensor([[0.5, 0.0], [0.3, 0.4]]))
    angle, place = torch.linspace(-3, 3, 7), torch.linspace(4, 6, 7)
    expected = dist.Normal(5.0, 0.5).log_prob(place) - math.log(2 * math.pi)
    torch.testing.assert_close(guide.log_prob({"angle": angle, "line": place}), expected)


def test_a_start_may_be_as_correlated_as_float32_holds():
    def model():
        pyro.sample("angle", dist.VonMises(3.0, 2.0))
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    factor = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 1e-4]])
    guide = AutoFlow(model).setup()
    guide.start_at(torch.zeros(3), factor)
    torch.testing.assert_close(guide.flow.transforms[-1].scale, factor, rtol=0, atol=1e-6)


def test_a_base_with_modes_has_a_place_for_angles():
    base = functools.partial(ModesBase, num_components=2, circular=[True, False])
    guide = AutoFlow(angle_and_line, base=base).setup()
    guide.flow.base.set(torch.tensor([[1.0, 0.0], [-3.0, 1.0]]), 0.1 * torch.eye(2).expand(2, 2, 2), torch.ones(2))
    angle = guide.sample(1000)["angle"]
    assert ((angle - 1).abs() < 0.5).float().mean() == pytest.approx(0.5, abs=0.1)
    turned = {"angle": torch.tensor([1.0, 1 + 2 * math.pi]), "line": torch.zeros(2)}
    assert guide.log_prob(turned).diff().abs() < 1e-3


# Densities.


def line(low: float, high: float, size: int) -> Tensor:
    """Return points of the trapezoidal rule, which is very accurate for smooth periodic functions."""
    return low + (high - low) * torch.arange(size, dtype=torch.float64) / size


@pytest.mark.parametrize(("low", "high"), [(-math.pi, math.pi), (0.0, 24.0)])
def test_the_density_of_an_angle_has_its_period_and_integrates_to_one(low, high):
    def model():
        edge = torch.tensor([low, high], dtype=torch.float64)
        pyro.sample("a", dist.Uniform(*edge), infer=PERIODIC)

    guide = stir(AutoFlow(model).setup(), 0.5)
    grid = line(low, high, 50_000)
    log_prob = guide.log_prob({"a": grid})
    assert log_prob.max() - log_prob.min() > 0.5  # the density is not uniform
    assert log_prob.exp().mean().item() * (high - low) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(guide.log_prob({"a": grid + (high - low)}), log_prob)
    ends = guide.log_prob({"a": torch.tensor([low, high - 1e-9], dtype=torch.float64)})
    torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_the_joint_density_of_angle_and_line_integrates_to_one():
    def model():
        pyro.sample("angle", dist.VonMises(torch.tensor(0.0, dtype=torch.float64), 1.0))
        pyro.sample("line", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))

    guide = stir(AutoFlow(model, small(True, False), init_scale=1.0).setup(), 0.2)
    places = torch.cartesian_prod(line(-math.pi, math.pi, 300), line(-40, 40, 4000))
    with torch.no_grad():
        density = guide.log_prob({"angle": places[:, 0], "line": places[:, 1]}).exp()
    assert density.mean().item() * 2 * math.pi * 80 == pytest.approx(1, abs=1e-3)


def test_draws_follow_the_density():
    def model():
        pyro.sample("a", dist.Uniform(0.0, 24.0), infer=PERIODIC)

    guide = stir(AutoFlow(model).setup(), 0.5)
    draws, grid = guide.sample(20_000)["a"], line(0.0, 24.0, 48_000)
    shares = guide.log_prob({"a": grid.float()}).detach().exp().reshape(8, -1).mean(-1).double() * 3
    found = torch.histc(draws, 8, 0.0, 24.0).double() / len(draws)
    assert ((found - shares).abs() < 4.5 * (shares * (1 - shares) / len(draws)).sqrt() + 1e-4).all()


# Fits.

SEEN = torch.tensor([3.0, -3.0, 2.6, -2.9])


def seam(y):
    """Model with a von Mises prior on the mean of von Mises angles, with all mass at the seam."""
    mean = pyro.sample("mean", dist.VonMises(math.pi, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.VonMises(mean, 1.0), obs=y)


def log_bessel(x: Tensor) -> Tensor:
    return torch.special.i0e(x).log() + x


def seam_evidence(y: Tensor) -> float:
    """Return the log evidence: products of exp(κ cos(x - μ)) add vectors of length κ and angle μ."""
    angles, lengths = torch.cat([torch.tensor([math.pi]), y]), torch.tensor([2.0, *[1.0] * len(y)])
    total = torch.hypot((lengths * angles.cos()).sum(), (lengths * angles.sin()).sum())
    constants = math.log(2 * math.pi) + log_bessel(lengths)
    return (math.log(2 * math.pi) + log_bessel(total) - constants.sum()).item()


@pytest.mark.slow
def test_a_posterior_across_the_seam_reaches_its_evidence():
    guide = AutoFlow(seam, small(True))
    fit(seam, guide, SEEN)
    found = psis(seam, guide, SEEN, num_samples=4000)
    weights = found.log_weights.double()
    error = weights.std().item() / math.sqrt(len(weights))
    assert -4 * error < seam_evidence(SEEN) - weights.mean().item() < 0.05 + 4 * error
    assert found.log_evidence == pytest.approx(seam_evidence(SEEN), abs=4 * found.log_evidence_se + 1e-3)
    draws = guide.sample(1000)["mean"]
    assert (draws > 2).float().mean() > 0.2  # on both sides of the seam
    assert (draws < -2).float().mean() > 0.2


def ring(y):
    """Model of three angles in a plate, each near the next angle and near its observation."""
    with pyro.plate("place", 3):
        angle = pyro.sample("angle", dist.Uniform(-math.pi, math.pi), infer=PERIODIC)
        pyro.sample("y", dist.VonMises(angle, 1.0), obs=y)
        pyro.factor("near", 2 * torch.cos(angle - angle.roll(1, -1)))


RING_Y = torch.tensor([3.0, -2.5, 2.0])


@pytest.mark.slow
def test_a_plate_of_angles_reaches_its_evidence():
    grid = line(-math.pi, math.pi, 48)
    angles = torch.cartesian_prod(grid, grid, grid)
    density = dist.VonMises(angles, 1.0).log_prob(RING_Y).sum(-1) + 2 * torch.cos(angles - angles.roll(1, -1)).sum(-1)
    evidence = (density.logsumexp(0) - math.log(len(angles))).item()  # the density of the prior is one over the volume

    guide = AutoFlow(ring, small(True, True, True))
    fit(ring, guide, RING_Y, steps=600)
    found = psis(ring, guide, RING_Y, num_samples=4000)
    weights = found.log_weights.double()
    assert found.log_evidence == pytest.approx(evidence, abs=4 * found.log_evidence_se + 1e-3)
    assert evidence - weights.mean().item() < 0.2


@pytest.mark.slow
def test_an_angle_beside_a_line_is_fitted():
    guide = AutoFlow(angle_and_line, small(True, False))
    fit(angle_and_line, guide)
    weights = psis(angle_and_line, guide, num_samples=4000).log_weights.double()
    assert -weights.mean().item() < 0.3  # the log evidence is 0


def test_pyros_own_tools_take_it():
    guide = AutoFlow(seam)
    svi = SVI(seam, guide, pyro.optim.ClippedAdam({"lr": 0.01}), Trace_ELBO(16, vectorize_particles=True))
    losses = [svi.step(SEEN) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    draws = Predictive(seam, guide=guide, num_samples=10)(torch.zeros(4))
    assert ((draws["mean"] >= -math.pi) & (draws["mean"] < math.pi)).all()
