"""Models without a posterior or a density.

Errors name the site, and models that only look faulty are accepted.
"""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import sampling
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, init_to_median
from pyro.infer.reparam import ProjectedNormalReparam
from torch.distributions import constraints

from pyro_flows import (
    AutoFlow,
    AutoPlateFlow,
    AutoStructuredFlow,
    anneal,
    check,
    fit_svi,
    flows,
    psis,
    resample,
    to_arviz,
)
from pyro_flows.diagnostics.guide_space import prior_of
from pyro_flows.fitting.program_checks import check_bounded
from pyro_flows.programs.density import Density
from pyro_flows.programs.model_and_guide import Task
from pyro_flows.sampling.annealed_population import Reference

small = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(8,))
SHORT = {"steps": 1, "num_particles": 4, "warm_start": False, "progress": False}
DATA = torch.tensor([0.5, 1.0, 2.0, 4.0])


def flat(name: str, support=constraints.real, shape=()):
    return pyro.sample(name, dist.ImproperUniform(support, (), shape))


def fit(model, *args, recipe=small, **settings):
    return fit_svi(model, AutoFlow(model, recipe), *args, **{**SHORT, **settings})


# Supports without volume.

POINTS = {
    "a Delta": lambda: dist.Delta(torch.tensor(1.0)),
    "a vector of Deltas": lambda: dist.Delta(torch.ones(3)).to_event(1),
    "a masked Delta": lambda: dist.Delta(torch.ones(3), event_dim=1).mask(True),
}


@pytest.mark.parametrize("name", POINTS)
def test_points_follow_from_the_model_and_are_left_out(name):
    model = sampling(x=dist.Normal(0.0, 1.0), fixed=POINTS[name]())
    guide = AutoFlow(model).setup()
    assert guide.latent_dim == 1
    fit_svi(model, guide, **SHORT)
    assert (resample(model, guide, num_samples=5)["fixed"] == 1).all()


@pytest.mark.parametrize("infer", [{}, {"periodic": True}], ids=["interval", "circle"])
@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.0), (2.0, 1.0), (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))]
)
def test_intervals_without_volume_are_refused(low, high, infer):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("thin", dist.Uniform(low, high, validate_args=False), infer=infer)

    with pytest.raises(ValueError, match=r"support of latent site 'thin', .*, has no volume"):
        AutoFlow(model).setup()


by_row = functools.partial(AutoPlateFlow, plate="row")
every_guide = pytest.mark.parametrize("build", [AutoFlow, AutoStructuredFlow, by_row], ids=["joint", "tree", "plate"])


def directions():
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 3):
        place = pyro.sample("direction", dist.ProjectedNormal(torch.tensor([3.0, 4.0])))
        pyro.sample("y", dist.Normal(place + shift.unsqueeze(-1), 0.5).to_event(1), obs=torch.tensor([0.0, 1.0]))


@every_guide
@pytest.mark.parametrize("start", [{}, {"init_loc_fn": init_to_median}], ids=["default", "median"])
def test_spheres_are_refused_with_the_way_out(build, start):
    with pytest.raises((ValueError, NotImplementedError), match=r"'direction'.*ProjectedNormalReparam"):
        build(directions, **start).setup()


@every_guide
def test_the_way_out_of_spheres_works(build):
    """The reparametrised site starts at the mean direction."""
    model = poutine.reparam(directions, {"direction": ProjectedNormalReparam()})
    guide = build(model, init_scale=1e-3).setup()
    normal = guide.sample(1000)["direction_normal"]  # the direction is that of the normal plus the concentration
    found = torch.nn.functional.normalize(normal + torch.tensor([3.0, 4.0]), dim=-1)
    torch.testing.assert_close(found.mean(0), torch.tensor([0.6, 0.8]).expand(3, 2), rtol=0, atol=0.01)
    assert fit_svi(model, guide, **{**SHORT, "steps": 3}).losses.isfinite().all()


# Posteriors that are improper.


def nothing():
    flat("loose")


def unused(support=constraints.real):
    x = flat("x")
    flat("loose", support)
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


def unused_positive():
    unused(constraints.positive)


def log_uniform():
    scale = flat("loose", constraints.positive)
    pyro.factor("prior", -scale.log())
    pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(1.0))


def unused_column():
    w = flat("loose", constraints.real_vector, (3,))
    x = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 2.0], [1.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=DATA)


def unused_row():
    with pyro.plate("row", 4):
        z = flat("loose")
        pyro.sample("y", dist.Normal(z, 1.0).mask(torch.arange(4) > 0), obs=DATA)


def masked_prior():
    pyro.sample("loose", dist.Normal(0.0, 1.0).mask(False))
    pyro.sample("x", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("settings", [{}, {"warm_start": True}, {"recipe": None}], ids=["cold", "warm", "default"])
@pytest.mark.parametrize(
    "model", [nothing, unused, unused_positive, log_uniform, unused_column, unused_row, masked_prior]
)
def test_what_nothing_bounds_is_refused(model, settings):
    with pytest.raises(ValueError, match="nothing in the model bounds latent site 'loose', whose prior is flat"):
        fit(model, **settings)


def total():
    a, b = flat("a"), flat("b")
    pyro.sample("c", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(a + b, 0.1), obs=DATA)


def difference():
    """Item response model without an anchor: abilities minus difficulties."""
    a, b = flat("a", constraints.real_vector, (5,)), flat("b", constraints.real_vector, (4,))
    logits = a[..., :, None] - b[..., None, :]
    seen = (torch.arange(20).reshape(5, 4) % 3 == 0).float()
    pyro.factor("y", dist.Bernoulli(logits=logits).log_prob(seen).sum((-1, -2)))


def product():
    a, b = flat("a", constraints.positive), flat("b", constraints.positive)
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(a * b, 1.0), obs=DATA)


@pytest.mark.parametrize("model", [total, difference, product])
def test_directions_that_nothing_bounds_are_refused(model):
    with pytest.raises(ValueError, match="nothing in the model bounds latent sites 'a', 'b', whose prior is flat"):
        fit(model)


def factors(y):
    """Masked priors leave factors and loadings improper along curves, which no search for lines finds."""
    with pyro.poutine.mask(mask=False):
        loadings = pyro.sample("loadings", dist.Normal(0.0, 1.0).expand([6, 2]).to_event(2))
        pyro.sample("free", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
    held = pyro.sample("factors", dist.Normal(0.0, 1.0).expand([2, 5]).to_event(2).mask(False))
    pyro.sample("y", dist.Normal(loadings @ held, scale[..., None, None]).to_event(2), obs=y)


WORDS = r"the priors of latent sites 'loadings', 'free', 'scale', 'factors' are masked, and so flat\. Take the mask off"


@pytest.mark.parametrize("build", [lambda model: AutoFlow(model, small), AutoStructuredFlow, AutoNormal])
def test_masked_priors_are_named_before_the_first_step(build):
    free = pytest.raises(ValueError, match=r"nothing in the model bounds latent site 'free'")
    with free, pytest.warns(UserWarning, match=f"fit_svi: the posterior may be improper: {WORDS}"):
        fit_svi(factors, build(factors), torch.randn(6, 5), steps=1, progress=False)


@pytest.mark.parametrize("use", [psis, check, to_arviz])
def test_weights_that_are_not_finite_name_site_and_way_out(use):
    guide = sampling(scale=dist.LogNormal(0.0, 45.0))  # 5 % of its draws overflow

    def model(mask):
        with pyro.poutine.mask(mask=mask):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(1.0))

    def broken(mask):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.factor("f", torch.where(scale > 3, math.nan, 0.0))

    sound = sampling(scale=dist.LogNormal(0.0, 1.0))
    counts = rf"{use.__name__}: \d+ of 10*0 log-weights are NaN or \+inf: "
    with pytest.raises(ValueError, match=counts + "the guide draws latent site 'scale' at inf.*prior of .*'scale' is"):
        use(model, guide, False, num_samples=1000)
    with pytest.raises(ValueError, match=counts + "the log-density of the model's site 'f' is nan. Fit a new guide"):
        use(broken, sound, True, num_samples=1000)


# Posteriors that are proper.


def regression(x, y):
    w = flat("w", constraints.real_vector, (x.shape[-1],))
    sigma = flat("sigma", constraints.positive)
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), sigma), obs=y)


def design(kind: str) -> torch.Tensor:
    t = torch.linspace(0, 1, 20)
    if kind == "collinear":
        return torch.stack([torch.ones(20), t, t + 0.003 * torch.sin(50 * t)], -1)
    scale = {"plain": 1.0, "tiny": 1e-3, "huge": 1e3}[kind]
    return torch.stack([torch.ones(20), scale * t, t**2], -1)


@pytest.mark.parametrize("kind", ["plain", "tiny", "huge", "collinear"])
@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e5])
def test_flat_regressions_are_welcome(kind, unit):
    """A column in unusual units is valid, unlike a missing column."""
    x = design(kind)
    y = unit * (x @ torch.tensor([1.0, 2.0, -1.0]) + 0.1 * torch.sin(20 * x[:, 2]))
    assert fit(regression, x, y).steps == 1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
def test_a_flat_location_with_a_known_scale_is_welcome(scale):
    def model():
        x = flat("x")
        pyro.sample("y", dist.Normal(x, scale), obs=torch.tensor(0.0))

    def beside():
        model()
        sharp = flat("sharp")
        pyro.sample("z", dist.Normal(sharp, 0.01), obs=torch.tensor(0.0))
        rate = flat("rate", constraints.positive)
        pyro.sample("w", dist.Exponential(rate), obs=torch.tensor(1.0))

    fit(model)
    fit(beside)


def bounded():
    flat("p", constraints.unit_interval)
    flat("q", constraints.simplex, (3,))
    flat("c", constraints.corr_cholesky, (3, 3))
    flat("i", constraints.interval(-5.0, 70.0), (2,))


def circle():
    pyro.sample("angle", dist.ImproperUniform(constraints.interval(0.0, 1.0), (), ()), infer={"periodic": True})
    pyro.sample("other", dist.VonMises(0.0, 1.0))


def two_modes():
    x = flat("x")
    pyro.factor("y", torch.logaddexp(dist.Normal(-30.0, 1.0).log_prob(x), dist.Normal(30.0, 1.0).log_prob(x)))


def change_point():
    """Model with a step function of tau: its slope is zero almost everywhere, and it ends far out."""
    tau = flat("tau")
    t = torch.linspace(-3, 3, 7)
    likelihood = dist.Normal((t > tau.unsqueeze(-1)).float(), 0.1).log_prob((t > 0).float()).sum(-1)
    pyro.factor("y", likelihood + 0.0 * tau - 100.0 * (tau.abs() > 40))


def heavy():
    x = flat("x")
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Cauchy(x, 0.1), obs=DATA)


def far_scale():
    """Model that starts far above the data, where the likelihood is nearly linear in log sigma."""
    sigma = flat("sigma", constraints.positive)
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(0.0, sigma), obs=1e-3 * DATA)


def ordered():
    x = flat("x", dist.constraints.ordered_vector, (3,))
    pyro.factor("y", dist.Normal(torch.arange(3.0), 1.0).log_prob(x).sum(-1))


def vague():
    """Model with a very wide proper prior, which is valid."""
    a = pyro.sample("a", dist.Normal(0.0, 1e6))
    b = flat("b")
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(a + b, 0.1), obs=DATA)


@pytest.mark.parametrize("model", [bounded, circle, two_modes, change_point, heavy, far_scale, ordered, vague])
def test_proper_posteriors_are_welcome(model):
    assert fit(model, recipe=None if model is circle else small).steps == 1


# Densities that anneal refuses before it moves a particle.


def growing():
    loose = pyro.sample("loose", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0))
    pyro.factor("growth", loose**2)


def growing_scale():
    pyro.factor("growth", 1.5 * pyro.sample("loose", dist.Exponential(1.0)))


def level():
    """Log-density that levels off far out, as that of a mixture's component does."""
    pyro.factor("f", torch.logaddexp(dist.Normal(0.0, 1.0).log_prob(flat("loose")), torch.tensor(-2.0)))


def separated():
    pyro.sample("y", dist.Bernoulli(logits=flat("loose")), obs=torch.tensor(1.0))


@pytest.mark.parametrize("model", [growing, growing_scale, level, separated, unused_positive, total])
def test_anneal_refuses_a_density_without_an_end(model):
    with pytest.raises(ValueError, match=r"anneal: the posterior is improper: .* latent sites? '(loose|a', 'b)'"):
        anneal(model, num_particles=64, fit=False)


def heavy_tails():
    pyro.sample("cauchy", dist.Cauchy(0.0, 1.0))
    pyro.sample("scale", dist.HalfCauchy(1.0))
    pyro.sample("t", dist.StudentT(0.7, 0.0, 1.0))


def many_supports():
    pyro.sample("angle", dist.VonMises(0.0, 1.0))
    pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    pyro.sample("factor", dist.LKJCholesky(3, 1.0))
    pyro.sample("turn", dist.Uniform(0.0, 1.0), infer={"periodic": True})
    pyro.sample("part", dist.Beta(0.5, 0.5))


def wide_prior():
    """Separated data: the likelihood levels off far out, and a very wide prior bounds it."""
    pyro.sample("y", dist.Bernoulli(logits=pyro.sample("x", dist.Normal(0.0, 1e6))), obs=torch.tensor(1.0))


def no_counts():
    rate = pyro.sample("x", dist.Normal(0.0, 5.0)).exp()
    pyro.sample("y", dist.Poisson(rate), obs=torch.tensor(0.0))


@pytest.mark.parametrize("model", [heavy_tails, many_supports, wide_prior, no_counts])
def test_wide_and_heavy_tails_have_an_end(model):
    guide = AutoFlow(model).setup()
    space = Density(Task(model, guide, (), {}))
    with pyro.validation_enabled(False):
        check_bounded("anneal", guide, space, Reference(prior_of(space), guide.start[0]).draw(100))
