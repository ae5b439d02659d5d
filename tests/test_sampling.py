"""Exact draws: measures of convergence, a kernel that preserves the posterior, and known posteriors."""

import math
import os
import signal

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import called, normals, sampling, stirred
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_flows as pf
from pyro_flows import AutoFlow
from pyro_flows.diagnostics.guide_space import base_of, chain_coordinates
from pyro_flows.programs.density import Density
from pyro_flows.programs.model_and_guide import Task
from pyro_flows.sampling.chains import Chains
from pyro_flows.sampling.converged_chains import Goal, Record
from pyro_flows.sampling.convergence import convergence
from pyro_flows.sampling.coordinates import White

# Convergence.


def autoregressive(slope: float, chains: int, length: int) -> torch.Tensor:
    """Return chains of three quantities, (chains, length, 3): normal, log-normal, and rounded with many ties."""
    x, found = torch.randn(chains, 3), []
    for _ in range(length):
        x = slope * x + math.sqrt(1 - slope**2) * torch.randn(chains, 3)
        found.append(x)
    draws = torch.stack(found, 1).double()
    return torch.stack((draws[..., 0], draws[..., 1].exp(), draws[..., 2].round()), -1)


@pytest.mark.parametrize(("df", "share"), [(math.inf, 1.0), (9.0, 0.625)])
def test_the_sd_has_an_effective_sample_size_of_its_own(df, share):
    """For independent draws of kurtosis κ its share is 2 / (κ - 1): 1 for normals, 5 / 8 for Student's t with 9 df."""
    law = dist.Normal(0.0, 1.0) if df == math.inf else dist.StudentT(df)
    found = convergence(law.sample((256, 400, 8)))
    assert found.ess_sd.mean() / (256 * 400) == pytest.approx(share, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "chains"), [(dist.StudentT(3.0), 16), (dist.StudentT(3.0), 256), (dist.Normal(0, 1), 4)]
)
def test_an_unknown_sd_lengthens_a_run_and_fails_none(law, chains):
    """The variance of a Student's t with 3 df has a large error, and the sds of 4 chains show little."""
    model = sampling(x=law.expand((20,)).to_event(1))
    found = pf.sample(model, model, num_draws=2000, num_chains=chains, progress=False)
    assert found.converged
    assert found.sweeps < 700


@pytest.mark.parametrize(
    ("slope", "chains", "length"),
    [
        *((slope, 4, 1000) for slope in (0.0, 0.5, 0.95)),
        *((0.9, 4, length) for length in (16, 24)),
        *((-0.4, 4, 999), (0.9, 8, 301), (0.3, 256, 16), (0.99, 64, 400)),
    ],
)
def test_convergence_is_that_of_arviz(slope, chains, length):
    draws = autoregressive(slope, chains, length)
    draws[0] += 0.3  # one chain lies elsewhere
    found = convergence(draws)
    data = {f"x{k}": draws[..., k].numpy() for k in range(3)}
    data = az.from_dict(data) if hasattr(az, "psislw") else az.from_dict({"posterior": data})
    sizes = ("bulk", found.ess_bulk, None), ("tail", found.ess_tail, (0.05, 0.95))  # by default ArviZ 1.x has others
    for name, ours, levels in (("rhat", found.rhat, None), *sizes):
        theirs = az.rhat(data) if name == "rhat" else az.ess(data, method=name, prob=levels)
        tolerance = 1e-3 if name == "rhat" else 0.02
        theirs = torch.tensor([float(theirs[f"x{k}"]) for k in range(3)])
        torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=0)


def test_convergence_of_many_quantities_is_that_of_each():
    draws = torch.cat([autoregressive(0.5, 64, 200) for _ in range(30)], -1)
    together, alone = convergence(draws), [convergence(draws[..., k : k + 1]) for k in range(draws.shape[-1])]
    for field, values in zip(together._fields, together, strict=True):
        torch.testing.assert_close(values, torch.cat([getattr(one, field) for one in alone]), rtol=1e-4, atol=1e-4)


def test_constants_have_converged_and_nan_has_not():
    draws = torch.randn(4, 100, 4)
    draws[..., 1], draws[0, 0, 2], draws[0, 0, 3] = 5.0, math.nan, math.inf
    found = convergence(draws)
    assert (found.rhat[1], found.ess[1], found.drift[1]) == (1, 400, 0)
    assert (found.rhat[2], found.ess[2]) == (math.inf, 0)
    assert found.rhat[3] < 1.1


def test_chains_that_move_on_drift():
    draws = torch.randn(64, 40, 3)
    draws[:, :20, 1] += 0.2
    draws[:, :20, 2] *= 0.7
    assert (convergence(draws).drift > 4).tolist() == [False, True, True]


# The kernel: Getting It Right (Geweke 2004).  Start from values of the prior, and data given these values.  If a kernel
# preserves the posterior given these data, the values still have the prior distribution afterwards.


def funnel(y=None):
    v = pyro.sample("v", dist.Normal(0.0, 1.0))
    x = pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))
    return pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def bent(model, *args) -> AutoFlow:
    """Return a guide with a flow far from the identity and far from the posterior."""
    return stirred(AutoFlow(model, init_scale=1.0).setup(*args)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["white", "base", "units", "proposals", "all"])
def test_kernel_leaves_the_joint_distribution_as_it_is(kind):
    number = 20_000
    guide = bent(funnel, torch.tensor(0.7))
    space = Density.sound(Task(funnel, guide, (torch.tensor(0.7),), {}))
    v = torch.randn(number)
    x = (v / 2).exp() * torch.randn(number)
    y = x + 0.5 * torch.randn(number)  # each chain has different data

    @pyro.validation_enabled(False)
    def density(z):
        prior = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + dist.Normal(0.0, (z[:, 0] / 2).exp()).log_prob(z[:, 1])
        return prior + dist.Normal(z[:, 1], 0.5).log_prob(y.repeat(len(z) // number))

    def draw(size: int) -> tuple[torch.Tensor, ...]:
        found = space.draw(size, 10_000)
        return found.z, density(found.z), found.log_q

    z = torch.stack((v, x), -1)
    base, (units, _) = base_of(space, z[:1000]), chain_coordinates(space, z[:1000])
    charts = {"white": [White(z)], "base": [base], "units": [units]}.get(kind, [base, units, White(z)])
    chains = Chains(density, charts, z)
    for _ in range(2):
        if kind == "proposals":
            chains.log_p = density(chains.z)
        else:
            chains.sweep(adapt=False)
        if kind in ("proposals", "all"):
            _, chance = chains.propose(draw, space.log_q, 2)
            assert 0.1 < chance < 0.98
    moved = (chains.z - z).abs().gt(1e-6).any(-1).double().mean()
    assert moved > 0.3
    v, x = chains.z.double().unbind(-1)
    scaled, noise = x * (-v / 2).exp(), 2 * (y - x)  # standard normal, like v, and independent
    squares = [part.square() - 1 for part in (v, scaled, noise)]
    for value in (v, scaled, *squares, v * scaled.square(), v**3, noise * scaled, noise * v):
        assert abs(float(value.mean())) < 4.5 * float(value.std()) / math.sqrt(number)


# Known posteriors.


def agree(found, name: str, mean, sd, ess: int = 4000) -> None:
    """Assert that draws have a mean and a standard deviation, to within five standard errors."""
    values, error = found.flat[name].double(), 5 / math.sqrt(ess)
    assert found.converged
    assert (found.rhat <= 1.01).all()
    assert (found.ess_bulk >= ess).all()
    assert ((values.mean(0) - mean).abs() < error * torch.as_tensor(sd)).all()
    assert ((values.std(0) / sd - 1).abs() < error).all()


def conjugate(y=None):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0) if y is None else y)


# A guide that is off by two standard deviations, and half as wide.
wrong = sampling(x=dist.Normal(1.0 + 2 * 0.5**0.5, 0.5 * 0.5**0.5))


@pytest.mark.parametrize("local", [False, True])
def test_a_guide_that_is_off_does_no_harm(local):
    with pyro.settings.context(module_local_params=local):
        found = pf.sample(conjugate, wrong, progress=False)
    agree(found, "x", 1.0, 0.5**0.5)
    assert found.draws["x"].shape[0] == 256
    assert found.flat["x"].numel() == found.draws["x"].numel() >= 4000
    assert (found.names, found.guide, found.divergences) == (["x"], wrong, 0)
    assert all(word in repr(found) for word in ("converged", "R-hat", "ESS", "divergences", " s"))


@pytest.mark.slow
def test_a_guide_without_correlations_does_no_harm():
    def narrow():
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        with pyro.plate("two", 2):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    guide = AutoNormal(narrow)
    pf.fit_svi(narrow, guide, steps=200, num_particles=16, progress=False)
    found = pf.sample(narrow, guide, progress=False, num_draws=1000, num_chains=64)
    agree(found, "v", 0.0, 1.0, 1000)
    assert abs(float((found.flat["v"] < -2).double().mean()) - 0.02275) < 5 * math.sqrt(0.0228 / 1000)


def neck():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("nine", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def flat():
    """Sample from a guide that never reaches the neck, so that no chain starts there."""
    pyro.sample("v", dist.Normal(2.0, 1.0))
    with pyro.plate("nine", 9):
        pyro.sample("x", dist.Normal(0.0, 2.0))


def test_chains_enter_the_neck_of_a_hierarchy():
    space = Density.sound(Task(neck, flat, (), {}))
    z = space.draw(500).z
    chains, places = Chains(space.log_prob, chain_coordinates(space, z)[:1], z), []
    for sweep in range(30):
        chains.sweep(adapt=sweep < 10)
        places.append(chains.z[:, 0])
    v = torch.cat(places[10:])
    assert abs(float(v.mean())) < 0.5
    assert abs(float(v.std()) / 3 - 1) < 0.1
    assert abs(float((v < -6).double().mean()) - 0.02275) < 0.01


def test_a_bad_guide_ends_within_max_sweeps():
    with pytest.warns(UserWarning, match="not converged after 20 sweeps"):
        found = pf.sample(neck, flat, progress=False, num_chains=64, max_sweeps=20)
    assert (found.sweeps, found.draws["v"].shape[:2]) == (20, (64, 8))


def test_discrete_latents_are_drawn_back():
    def mixture():
        kind = pyro.sample("kind", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        mean = pyro.deterministic("mean", x + 2 * kind)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(1.5))

    found = pf.sample(mixture, sampling(x=dist.Normal(0.5, 0.8)), progress=False)
    odds = torch.tensor([0.3, 0.7]) * torch.tensor([-(0.5**2) / 4, -(1.5**2) / 4]).exp()
    shares, means = odds / odds.sum(), torch.tensor([-0.25, 0.75])
    mean = shares @ means
    agree(found, "x", mean, (0.5 + shares @ means**2 - mean**2).sqrt())
    flat = found.flat
    assert abs(float(flat["kind"].mean() - shares[0])) < 5 * 0.5 / math.sqrt(4000)
    torch.testing.assert_close(flat["mean"], flat["x"] + 2 * flat["kind"])


def test_angles():
    def circle():
        angle = pyro.sample("angle", dist.VonMises(0.5, 2.0))
        pyro.sample("y", dist.Normal(angle.cos(), 0.5), obs=torch.tensor(0.2))

    grid = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)
    weight = (2 * (grid - 0.5).cos() - (0.2 - grid.cos()).square() / 0.5).softmax(0)
    found = pf.sample(circle, sampling(angle=dist.VonMises(1.0, 1.5)), progress=False)
    assert (found.converged, found.names) == (True, ["cos angle", "sin angle"])
    for function in (torch.cos, torch.sin):
        values, mean = function(found.flat["angle"]).double(), float((weight * function(grid)).sum())
        assert abs(float(values.mean()) - mean) < 5 * float(values.std()) / math.sqrt(4000)


def test_deterministic_sites_must_converge_too():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("square", x.square().sum())

    found = pf.sample(model, sampling(x=normals(2, 1.0, 1.0)), progress=False, num_draws=2000)
    assert (found.names, found.draws["x"].shape[2:]) == (["x[0]", "x[1]", "square"], (2,))
    torch.testing.assert_close(found.draws["square"], found.draws["x"].square().sum(-1))
    assert abs(float(found.flat["square"].mean()) - 2) < 5 * 2 / math.sqrt(2000)


@pytest.mark.slow
def test_models_that_run_one_draw_at_a_time():
    found = pf.sample(pf.Program(conjugate, vectorize="loop"), wrong, progress=False, num_draws=100)
    assert (len(found.draws["x"]), found.converged) == (16, True)
    assert abs(float(found.flat["x"].mean()) - 1) < 5 * 0.71 / math.sqrt(100)


def test_more_draws_come_from_the_guide():
    found = pf.sample(conjugate, sampling(x=dist.Normal(1.0, 0.75)), progress=False, num_draws=40_000)
    assert found.converged
    assert found.ess_tail.min() >= 40_000
    assert found.chance > 0.5
    assert found.sweeps < 200
    assert abs(float(found.flat["x"].mean()) - 1) < 5 * 0.71 / math.sqrt(40_000)


# Stored results, refused arguments, and messages.


def test_the_record_is_bounded():
    space = Density.sound(Task(conjugate, wrong, (), {}))
    record, times = Record(space.quantities, 20), 0
    for number in range(1, 101):
        times += record.keep(torch.full((4, 1), float(number)))
        assert len(record) <= 20
    assert times == 3
    assert (record.z()[0, 1:, 0] - record.z()[0, :-1, 0] == 8).all()
    record.judge(Goal(10, 10))


@pytest.mark.slow
def test_chains_that_have_not_converged_say_so():
    def two(share: float, sd: float) -> dist.MixtureSameFamily:
        places = dist.Normal(torch.tensor([-5.0, 5.0]), sd)
        return dist.MixtureSameFamily(dist.Categorical(torch.tensor([share, 1 - share])), places)

    apart = sampling(x=two(0.5, 1.0))
    with pytest.warns(UserWarning, match=r"not converged after 70 sweeps\. R-hat <= \d\.\d+ \(x\)"):
        found = pf.sample(apart, sampling(x=two(0.2, 0.5)), progress=False, max_sweeps=70)
    assert not found.converged
    assert "NOT converged" in repr(found)
    assert found.rhat > 1.01
    wide = sampling(x=dist.Normal(0.0, 5.0))  # its draws connect the two
    assert pf.sample(apart, wide, progress=False, num_draws=400).converged


def test_ctrl_c_returns_what_there_is(ctrl_c):
    calls = 0

    def slow():
        nonlocal calls
        calls += 1
        if calls == 300:
            os.kill(os.getpid(), signal.SIGINT)
        return conjugate()

    with pytest.warns(UserWarning, match="interrupted"):
        found = pf.sample(slow, wrong, progress=False, num_draws=1_000_000)
    assert not found.converged
    assert found.sweeps < 500
    assert found.draws["x"].shape[1] >= 8


@pytest.mark.parametrize(("name", "value"), [("num_draws", 0), ("num_chains", 2), ("max_sweeps", 1.5), ("progress", 1)])
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ValueError, match=f"sample: {name}.*{value}"):
        pf.sample(conjugate, wrong, **{name: value})


def test_guides_that_cannot_be_sampled_are_refused():
    with pytest.raises(ValueError, match="never trained"):
        pf.sample(conjugate, AutoFlow(conjugate))
    with pytest.raises(ValueError):
        pf.sample(conjugate, called(AutoDelta(conjugate)))


@pytest.mark.slow
def test_arviz_keeps_the_chains():
    found = pf.sample(conjugate, wrong, progress=False, num_chains=16, num_draws=400)
    data = pf.to_arviz(conjugate, found, posterior_predictive=True)
    posterior = data["posterior"]
    x = found.draws["x"]
    assert dict(posterior.sizes) == {"chain": 16, "draw": x.shape[1]}
    likelihood = dist.Normal(x, 1.0).log_prob(torch.tensor(2.0))
    log_p = dist.Normal(0.0, 1.0).log_prob(x) + likelihood
    stored = posterior["x"], data["sample_stats"]["log_p"], data["log_likelihood"]["y"]
    for given, wanted in zip(stored, (x, log_p, likelihood), strict=True):
        torch.testing.assert_close(torch.as_tensor(given.values), wanted)
    assert data["posterior_predictive"]["y"].shape == x.shape
    assert (posterior.attrs["converged"], posterior.attrs["inference_method"]) == (1, "mcmc")
    assert abs(float(az.rhat(data)["x"]) - float(found.rhat[0])) < 1e-3
    with pytest.raises(ValueError, match="importance"):
        pf.to_arviz(conjugate, found, importance=True)


@pytest.mark.parametrize("scale", [0.5, 0.7])
def test_a_narrow_guide_does_where_chains_come_and_go(scale):
    """Its weights have no bound, but Hamiltonian moves reach the tails."""
    model, narrow = sampling(x=dist.Normal(0.0, 1.0)), sampling(x=dist.Normal(0.3, scale))
    found = pf.sample(model, narrow, num_draws=1000, progress=False)
    assert found.converged
    assert found.flat["x"].std() == pytest.approx(1, abs=5 / math.sqrt(1000))
