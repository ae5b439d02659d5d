"""Rules for vmap: every distribution of Pyro and torch has the log-density, gradient and draws of single runs."""

import copy
import inspect
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import nn

import pyro_flows as pf
from pyro_flows import AutoFlow
from pyro_flows.programs import Program
from pyro_flows.programs.engines import is_refusal
from pyro_flows.programs.model_and_guide import Task
from pyro_flows.programs.program import trace_of
from pyro_flows.programs.runner import Runner

T = torch.tensor([0.6, 1.1, 1.7], dtype=torch.float64)
TIMES = torch.tensor([0.0, 0.0, 0.5, 1.0], dtype=torch.float64)
PAIR = torch.tensor([0.0, 1.0], dtype=torch.float64)
EVERY_OTHER = torch.tensor([True, False, True])


pytestmark = pytest.mark.usefixtures("double")


def vec(t, *shape):
    return torch.linspace(0.3, 0.9, math.prod(shape)).reshape(shape) + 0.2 * t


def logits(t, *shape):
    return torch.linspace(-1.0, 1.0, math.prod(shape)).reshape(shape) * t


def cov(t, dim=3):
    return torch.eye(dim) * (1.5 + 0.1 * t) + 0.2


def tril(t, dim=3):
    return torch.linalg.cholesky(cov(t, dim))


def mvn(t, dim):
    return dist.MultivariateNormal(torch.zeros(dim) + t, scale_tril=tril(t, dim))


def gaussian_hmm(kind, t, *scale):
    steps = mvn(t, 2), torch.eye(2) * 0.9 + 0.01 * t, mvn(t, 2), vec(t, 2, 3), mvn(t, 3)
    return kind(*scale, *steps, duration=4)


def independent_hmm(t):
    one = torch.eye(1).expand(2, 1, 1, 1)
    start = dist.MultivariateNormal(vec(t, 2, 1), torch.eye(1))
    noise = dist.MultivariateNormal(vec(t, 2, 1, 1), torch.eye(1))
    return dist.IndependentHMM(dist.GaussianHMM(start, one * (0.8 + 0.01 * t), noise, one, noise, duration=4))


# A distribution from a module, `pyro.distributions` or `torch.distributions`, and a number that differs between draws.
# Names are those of the classes, with a variant in parentheses.
DISTRIBUTIONS = {
    "AVFMultivariateNormal": lambda d, t: d.AVFMultivariateNormal(vec(t, 3), tril(t), vec(t, 2, 2, 3) * 0.1),
    "AffineBeta": lambda d, t: d.AffineBeta(t + 1, t + 2, -t, 2 * t),
    "AsymmetricLaplace": lambda d, t: d.AsymmetricLaplace(t, t, t),
    "Bernoulli": lambda d, t: d.Bernoulli(torch.sigmoid(t)),
    "Bernoulli(logits)": lambda d, t: d.Bernoulli(logits=t),
    "Beta": lambda d, t: d.Beta(t + 1, torch.ones(()) * 2),
    "BetaBinomial": lambda d, t: d.BetaBinomial(t + 1, t + 2, 7),
    "Binomial": lambda d, t: d.Binomial(7, torch.sigmoid(t)),
    "Binomial(counts)": lambda d, t: d.Binomial(torch.tensor([7.0, 3.0]), logits=vec(t, 2)),
    "Categorical": lambda d, t: d.Categorical(logits(t, 4).softmax(-1)),
    "Categorical(logits)": lambda d, t: d.Categorical(logits=logits(t, 5, 4)),
    "Cauchy": lambda d, t: d.Cauchy(t, t),
    "Chi2": lambda d, t: d.Chi2(t + 1),
    "CoalescentTimes": lambda d, t: d.CoalescentTimes(TIMES, t),
    "CoalescentTimesWithRate": lambda d, t: d.CoalescentTimesWithRate(TIMES, vec(t, 12)),
    "ContinuousBernoulli": lambda d, t: d.ContinuousBernoulli(torch.sigmoid(t)),
    "Delta": lambda d, t: d.Delta(vec(t, 3), t, event_dim=1),
    "Dirichlet": lambda d, t: d.Dirichlet(vec(t, 3)),
    "DirichletMultinomial": lambda d, t: d.DirichletMultinomial(vec(t, 3), 6),
    "DirichletMultinomial(sparse)": lambda d, t: d.DirichletMultinomial(vec(t, 3), 6, is_sparse=True),
    "DiscreteHMM": lambda d, t: d.DiscreteHMM(
        logits(t, 2), logits(t, 2, 2), d.Normal((PAIR * t).expand(5, 2), torch.ones(5, 2)), duration=5
    ),
    "DiscreteHMM(masked)": lambda d, t: DISTRIBUTIONS["DiscreteHMM"](d, t).expand([3]).mask(EVERY_OTHER).to_event(1),
    "Empirical": lambda d, t: d.Empirical(torch.tensor([0.0, 1.0, 2.0]), logits(t, 3)),
    "ExpandedDistribution": lambda d, t: d.ExpandedDistribution(d.Normal(t, t), (4,)),
    "Exponential": lambda d, t: d.Exponential(t),
    "ExtendedBetaBinomial": lambda d, t: d.ExtendedBetaBinomial(t + 1, t + 2, 7),
    "ExtendedBinomial": lambda d, t: d.ExtendedBinomial(7, torch.sigmoid(t)),
    "FisherSnedecor": lambda d, t: d.FisherSnedecor(t + 3, t + 5),
    "FoldedDistribution": lambda d, t: d.FoldedDistribution(d.Normal(t, t)),
    "Gamma": lambda d, t: d.Gamma(t, t + 1),
    "GammaGaussianHMM": lambda d, t: gaussian_hmm(d.GammaGaussianHMM, t, d.Gamma(t + 1, t)),
    "GammaPoisson": lambda d, t: d.GammaPoisson(t + 1, t),
    "GaussianHMM": lambda d, t: gaussian_hmm(d.GaussianHMM, t),
    "GaussianMRF": lambda d, t: d.GaussianMRF(mvn(t, 2), mvn(t, 4).expand([4]), mvn(t, 5).expand([4])),
    "GaussianScaleMixture": lambda d, t: d.GaussianScaleMixture(vec(t, 3), logits(t, 2), vec(t, 2)),
    "GeneralizedPareto": lambda d, t: d.GeneralizedPareto(0 * t, t, 0 * t + 0.2),
    "Geometric": lambda d, t: d.Geometric(torch.sigmoid(t)),
    "GroupedNormalNormal": lambda d, t: d.GroupedNormalNormal(
        vec(t, 2), vec(t, 2), vec(t, 5), torch.tensor([0, 0, 1, 1, 1])
    ),
    "Gumbel": lambda d, t: d.Gumbel(t, t),
    "HalfCauchy": lambda d, t: d.HalfCauchy(t),
    "HalfNormal": lambda d, t: d.HalfNormal(t),
    "ImproperUniform": lambda d, t: d.ImproperUniform(constraints.positive, (), (2,)),
    "Independent": lambda d, t: d.Independent(d.Normal(vec(t, 3), vec(t, 3)), 1),
    "IndependentHMM": lambda d, t: independent_hmm(t),
    "InverseGamma": lambda d, t: d.InverseGamma(t + 1, t),
    "Kumaraswamy": lambda d, t: d.Kumaraswamy(t + 1, t + 2),
    "LKJ": lambda d, t: d.LKJ(3, t),
    "LKJCholesky": lambda d, t: d.LKJCholesky(3, t),
    "LKJCorrCholesky": lambda d, t: d.LKJCorrCholesky(3, t),
    "Laplace": lambda d, t: d.Laplace(t, t),
    "LinearHMM": lambda d, t: gaussian_hmm(d.LinearHMM, t),
    "LogNormal": lambda d, t: d.LogNormal(t, t),
    "LogNormalNegativeBinomial": lambda d, t: d.LogNormalNegativeBinomial(5, t, t),
    "Logistic": lambda d, t: d.Logistic(t, t),
    "LogisticNormal": lambda d, t: d.LogisticNormal(vec(t, 3), vec(t, 3)),
    "LowRankMultivariateNormal": lambda d, t: d.LowRankMultivariateNormal(vec(t, 4), vec(t, 4, 2), vec(t, 4)),
    "MaskedDistribution": lambda d, t: d.Normal(vec(t, 3), t).mask(EVERY_OTHER),
    "MaskedDistribution(draws)": lambda d, t: d.Normal(vec(t, 3), t).mask(vec(t, 3) > 0.7),
    "MaskedMixture": lambda d, t: d.MaskedMixture(EVERY_OTHER, d.Normal(vec(t, 3), 1.0), d.Normal(-vec(t, 3), 2.0)),
    "MaskedMixture(draws)": lambda d, t: d.MaskedMixture(vec(t, 3) > 0.7, d.Normal(vec(t, 3), 1.0), d.Normal(t, 2.0)),
    "MixtureOfDiagNormals": lambda d, t: d.MixtureOfDiagNormals(vec(t, 2, 3), vec(t, 2, 3), logits(t, 2)),
    "MixtureOfDiagNormalsSharedCovariance": lambda d, t: d.MixtureOfDiagNormalsSharedCovariance(
        vec(t, 2, 3), vec(t, 3), logits(t, 2)
    ),
    "MixtureSameFamily": lambda d, t: d.MixtureSameFamily(
        d.Categorical(logits=logits(t, 2)), d.Normal(vec(t, 2), vec(t, 2))
    ),
    "Multinomial": lambda d, t: d.Multinomial(6, logits(t, 3).softmax(-1)),
    "MultivariateNormal": lambda d, t: d.MultivariateNormal(vec(t, 3), scale_tril=tril(t)),
    "MultivariateNormal(covariance)": lambda d, t: d.MultivariateNormal(vec(t, 3), cov(t)),
    "MultivariateNormal(precision)": lambda d, t: d.MultivariateNormal(vec(t, 3), precision_matrix=cov(t)),
    "MultivariateStudentT": lambda d, t: d.MultivariateStudentT(t + 2, vec(t, 3), tril(t)),
    "NanMaskedMultivariateNormal": lambda d, t: d.NanMaskedMultivariateNormal(vec(t, 3), cov(t)),
    "NanMaskedNormal": lambda d, t: d.NanMaskedNormal(vec(t, 3), t),
    "NegativeBinomial": lambda d, t: d.NegativeBinomial(t, torch.sigmoid(t)),
    "NegativeBinomial(logits)": lambda d, t: d.NegativeBinomial(5.0, logits=t),
    "Normal": lambda d, t: d.Normal(t, t),
    "OMTMultivariateNormal": lambda d, t: d.OMTMultivariateNormal(vec(t, 3), tril(t)),
    "OneHotCategorical": lambda d, t: d.OneHotCategorical(logits=logits(t, 3)),
    "OneHotCategoricalStraightThrough": lambda d, t: d.OneHotCategoricalStraightThrough(logits=logits(t, 3)),
    "OneOneMatching": lambda d, t: d.OneOneMatching(logits(t, 3, 3)),
    "OneTwoMatching": lambda d, t: d.OneTwoMatching(logits(t, 4, 2)),
    "OrderedLogistic": lambda d, t: d.OrderedLogistic(t, torch.tensor([-1.0, 0.0, 1.5])),
    "OrderedLogistic(draws)": lambda d, t: d.OrderedLogistic(vec(t, 5), torch.tensor([-1.0, 0.0, 1.5]) * t),
    "Pareto": lambda d, t: d.Pareto(t, t),
    "Poisson": lambda d, t: d.Poisson(t),
    "Poisson(sparse)": lambda d, t: d.Poisson(vec(t, 4), is_sparse=True),
    "ProjectedNormal": lambda d, t: d.ProjectedNormal(vec(t, 2)),
    "ProjectedNormal(3)": lambda d, t: d.ProjectedNormal(vec(t, 3)),
    "ProjectedNormal(4)": lambda d, t: d.ProjectedNormal(vec(t, 4)),
    "Rejector": lambda d, t: d.Rejector(d.Normal(t, 1.5), lambda x: -x.square() / 50, 0 * t - 0.05),
    "RelaxedBernoulli": lambda d, t: d.RelaxedBernoulli(t, logits=t),
    "RelaxedBernoulliStraightThrough": lambda d, t: d.RelaxedBernoulliStraightThrough(t, logits=t),
    "RelaxedOneHotCategorical": lambda d, t: d.RelaxedOneHotCategorical(t, logits=logits(t, 3)),
    "RelaxedOneHotCategoricalStraightThrough": lambda d, t: d.RelaxedOneHotCategoricalStraightThrough(
        t, logits=logits(t, 3)
    ),
    "SineBivariateVonMises": lambda d, t: d.SineBivariateVonMises(t, t, t + 2, t + 3, correlation=t),
    "SineBivariateVonMises(weighted)": lambda d, t: d.SineBivariateVonMises(
        t, t, t + 2, t + 3, weighted_correlation=0.5 * torch.tanh(t)
    ),
    "SineSkewed": lambda d, t: d.SineSkewed(d.VonMises(vec(t, 2), t).to_event(1), vec(t, 2) * 0.2),
    "SkewLogistic": lambda d, t: d.SkewLogistic(t, t, t),
    "SoftAsymmetricLaplace": lambda d, t: d.SoftAsymmetricLaplace(t, t, t, t),
    "SoftLaplace": lambda d, t: d.SoftLaplace(t, t),
    "SpanningTree": lambda d, t: d.SpanningTree(logits(t, 6), {"backend": "python"}),
    "Stable": lambda d, t: d.Stable(0 * t + 1.5, 0 * t + 0.1, t, t),
    "StableWithLogProb": lambda d, t: d.StableWithLogProb(1.2 + 0.1 * t, 0.1 * t, t, t),
    "StudentT": lambda d, t: d.StudentT(t + 1, t, t),
    "TransformedDistribution": lambda d, t: d.TransformedDistribution(
        d.Normal(vec(t, 3), vec(t, 3)), [torch.distributions.AffineTransform(t, t), d.transforms.SigmoidTransform()]
    ),
    "TruncatedPolyaGamma": lambda d, t: d.TruncatedPolyaGamma(t),
    "Uniform": lambda d, t: d.Uniform(-t, t + 1),
    "Unit": lambda d, t: d.Unit(t, has_rsample=False),
    "VonMises": lambda d, t: d.VonMises(t, t),
    "VonMises3D": lambda d, t: d.VonMises3D(vec(t, 3)),
    "Weibull": lambda d, t: d.Weibull(t, t + 1),
    "Wishart": lambda d, t: d.Wishart(t + 4, scale_tril=tril(t)),
    "Wishart(covariance)": lambda d, t: d.Wishart(t + 4, cov(t)),
    "ZeroInflatedDistribution": lambda d, t: d.ZeroInflatedDistribution(d.Poisson(t), gate=torch.sigmoid(-t)),
    "ZeroInflatedNegativeBinomial": lambda d, t: d.ZeroInflatedNegativeBinomial(t, logits=t, gate_logits=-t),
    "ZeroInflatedPoisson": lambda d, t: d.ZeroInflatedPoisson(t, gate=torch.sigmoid(-t)),
}
for ordered in ("Ordered", "SimplexToOrdered"):
    DISTRIBUTIONS[f"TransformedDistribution({ordered})"] = lambda d, t, kind=f"{ordered}Transform": (
        d.TransformedDistribution(
            d.Dirichlet(vec(t, 3)) if "Simplex" in kind else d.Independent(d.Normal(vec(t, 3), vec(t, 3)), 1),
            [getattr(dist.transforms, kind)()],
        )
    )

ABSTRACT = {"Distribution", "TorchDistribution", "ExponentialFamily"}
# Without a density, or without a gradient by the number, in single runs too.
NO_DENSITY = {"LinearHMM"}
NO_GRADIENT = {"GaussianScaleMixture", "ImproperUniform", "TruncatedPolyaGamma"}
# Their densities use functions of Pyro that have no rule for vmap, so programs with them run one draw at a time.
ALONE = {"CoalescentTimesWithRate", "DiscreteHMM", "DiscreteHMM(masked)"}
# Drawn values decide how many of them are counted, and vmap has one shape for all draws.
SHAPED_BY_VALUES = {"DirichletMultinomial(sparse)", "Poisson(sparse)"}


def classes_of(module):
    found = {name: kind for name, kind in vars(module).items() if inspect.isclass(kind)}
    return {name for name, kind in found.items() if issubclass(kind, torch.distributions.Distribution)} - ABSTRACT


def test_every_distribution_of_pyro_and_torch_is_tried():
    tried = {name.partition("(")[0] for name in DISTRIBUTIONS}
    assert classes_of(dist) | classes_of(torch.distributions) == tried


# Values of distributions that cannot be drawn; by default numbers between 1 and 2.
VALUES = {
    "CoalescentTimesWithRate": lambda t: dist.CoalescentTimes(TIMES, t).sample(),
    "GaussianMRF": lambda t: torch.randn(4, 3),
    "GroupedNormalNormal": lambda t: torch.randn(5),
    "LogNormalNegativeBinomial": lambda t: torch.tensor(3.0),
    "VonMises3D": lambda t: torch.nn.functional.normalize(torch.randn(3), dim=-1),
}


def value_of(name, t):
    fn = DISTRIBUTIONS[name](dist, t)
    try:
        return VALUES[name](t) if name in VALUES else fn.sample()
    except NotImplementedError:
        return 1 + torch.rand(fn.shape())


def program_of(model):
    with pyro.validation_enabled(False):
        return Runner(model, (), {}, trace_of(model, (), {}), 0)


def densities(program, held, *, gradient, divides=False):
    """Return the log-densities of the draws by vmap and by the loop, or their gradients by the number."""
    found = []
    for engine in ("vmap", "loop"):
        t = T.clone().requires_grad_(gradient)
        log_p = program.by(engine).run(lambda view: {"p": view.log_prob()}, {**held, "t": t}, 3, divides=divides)["p"]
        found.append(torch.autograd.grad(log_p.sum(), t)[0] if gradient else log_p)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", [dist, torch.distributions], ids=["pyro", "torch"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_distribution_has_the_density_and_gradient_of_single_runs(name, module):
    make = DISTRIBUTIONS[name]
    if name.partition("(")[0] not in classes_of(module) or name in NO_DENSITY:
        return
    try:
        make(module, T[0])
    except TypeError:  # the variant is Pyro's
        return
    values = torch.stack([value_of(name, t) for t in T])

    def model():
        t = pyro.sample("t", dist.Uniform(0.5, 1.0))
        if module is dist:
            pyro.sample("value", make(module, t))
        else:
            value = pyro.sample("value", dist.Delta(values[0], event_dim=values[0].dim()))
            pyro.factor("density", make(module, t).log_prob(value).sum())

    program = program_of(poutine.condition(model, data={"value": values[0]}))
    if name in ALONE:
        with pytest.raises(RuntimeError, match="it must override the setup_context"):
            densities(program, {}, gradient=False)
        return
    for held in ({}, {"value": values}):
        if held and name in SHAPED_BY_VALUES:
            with pytest.raises(RuntimeError) as error:
                densities(program, held, gradient=False)
            assert is_refusal(error.value)
            many, alone = densities(program, held, gradient=False, divides=True)
            torch.testing.assert_close(many, alone)
            continue
        for gradient in (False, True) if name not in NO_GRADIENT else (False,):
            torch.testing.assert_close(*densities(program, held, gradient=gradient), equal_nan=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_differ_and_have_the_shape_of_single_runs(name):
    make = DISTRIBUTIONS[name]
    try:
        wanted = make(dist, T[0]).sample().shape
    except NotImplementedError:
        return

    def model():
        pyro.sample("x", make(dist, pyro.sample("t", dist.Uniform(0.5, 1.0))))

    program = program_of(model).by("vmap")
    found = program.sample(lambda view: {"x": view.read("x")}, {"t": T[:1].expand(50)}, 50)["x"]
    assert found.shape == (50, *wanted)
    assert name.startswith(("Delta", "Unit")) or len(found.unique(dim=0)) > 1


def cut_points_by_dirichlet():
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(4)))
    return torch.logit(shares.cumsum(-1)[..., :-1])


def cut_points_by_order():
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    return pyro.sample("cuts", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))


def cut_points_sorted():
    return pyro.sample("raw", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 1.0).to_event(1)).sort(-1).values


X = torch.linspace(-2.0, 2.0, 36, dtype=torch.float64).reshape(12, 3)
GRADES = torch.arange(12) % 4


@pytest.mark.parametrize("cut_points", [cut_points_by_dirichlet, cut_points_by_order, cut_points_sorted])
def test_an_ordinal_regression_runs_by_vmap(cut_points):
    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        cuts = cut_points()
        with pyro.plate("data", 12):
            pyro.sample("y", dist.OrderedLogistic(X @ w, cuts), obs=GRADES)

    guide = AutoFlow(model).setup()
    task = Task(model, guide, (), {}).settle()
    assert task.model.engine == "vmap"
    draws = task.draw(4)
    torch.testing.assert_close(draws.log_p, task.model.by("loop").log_prob(draws.latents, 4))
    assert pf.fit_svi(model, guide, steps=3, progress=False, warm_start=False).losses.isfinite().all()


def writing(y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    mean, total, noise = torch.zeros(4), torch.tensor(0.0), torch.ones(4)
    assert w.dim() == 1
    for i in torch.arange(3):
        mean[i] = w[i] * 2
        total += w[i].exp()
        noise[1:] += w[i].square()
        pyro.deterministic(f"mean_{i}", mean[i])
    mean[3:] = total
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(mean, noise), obs=y)


def reading(y):
    """Read a tensor through a part that was made before the write."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    assert w.dim() == 0
    mean = torch.zeros(4)
    first = mean[0]
    mean[:] = w
    pyro.sample("y", dist.Normal(first, 1.0), obs=y[0])


def writing_through_a_part(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    assert w.dim() == 0
    mean = torch.zeros(4)
    first = mean[:1]
    first += w
    pyro.sample("y", dist.Normal(mean[0], 1.0), obs=y[0])


@pytest.mark.filterwarnings("ignore:the model runs one draw")
@pytest.mark.parametrize(("model", "engine"), [(writing, "vmap"), (reading, "loop"), (writing_through_a_part, "loop")])
def test_writes_into_new_tensors_have_the_density_and_gradient_of_single_runs(model, engine):
    y = torch.tensor([0.3, -1.0, 0.5, 2.0])
    task = Task(model, AutoFlow(model).setup(y), (y,), {}).settle()
    assert task.model.engine == engine
    found = {}
    for way in (engine, "loop"):
        w = torch.linspace(-1.0, 1.0, 9).reshape(3, 3)[:, : 3 if model is writing else 1]
        w = (w if model is writing else w[:, 0]).clone().requires_grad_()
        log_p = task.model.by(way).log_prob({"w": w}, 3)
        found[way] = log_p, torch.autograd.grad(log_p.sum(), w)[0]
    torch.testing.assert_close(found[engine], found["loop"])


STORE = torch.zeros(4, dtype=torch.float64)


def test_a_write_into_a_tensor_of_the_users_leaves_it_a_plain_tensor():
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        STORE[0] = w.detach()
        total = torch.tensor(0.0)
        total += w
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(0.3))

    with pytest.warns(UserWarning, match=r"Under torch\.func\.vmap, the model does not run .*`STORE\[0\] = w"):
        task = Task(model, AutoFlow(model).setup(), (), {}).settle()
    assert task.model.engine == "loop"
    assert STORE.tolist()[1:] == [0.0, 0.0, 0.0]


def test_draws_that_vmap_refuses_later_run_alone():
    """Pyro's stable distribution branches on whether a value is near to zero."""

    def model():
        x = pyro.sample("x", dist.Normal(2.0, 1.0))
        pyro.factor("stable", dist.StableWithLogProb(torch.tensor(1.5), torch.tensor(0.0)).log_prob(x))

    task = Task(Program(model, vectorize="vmap"), AutoFlow(model).setup(), (), {}).settle()
    near = {"x": torch.tensor([0.0, 1.0, 2.0])}
    found = task.model.log_prob(near, 3)
    torch.testing.assert_close(found, task.model.by("loop").log_prob(near, 3))
    assert found.isfinite().all()


def test_a_branch_of_a_users_is_refused_even_where_draws_agree():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1e-3))
        pyro.sample("y", dist.Normal(x if x > -1 else -x, 1.0), obs=torch.tensor(0.3))

    with pytest.raises(ValueError, match=r"`pyro.sample\(\"y\".*: RuntimeError: vmap: "):
        Task(Program(model, vectorize="vmap"), AutoFlow(model).setup(), (), {}).settle()


class Kernel(nn.Module):
    """A kernel as GPyTorch writes it: priors replace parameters, and equal inputs are found by their values."""

    def __init__(self):
        super().__init__()
        self.lengthscale, self.variance = nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.ones(1))

    def sampled(self):
        module = copy.deepcopy(self)
        for name, parameter in self.named_parameters():
            value = pyro.sample(name, dist.LogNormal(0.0, 1.0).expand(parameter.shape).to_event(parameter.dim()))
            delattr(module, name)
            setattr(module, name, value.expand(parameter.shape))
        return module

    def forward(self, x):
        one, other = x / self.lengthscale, x / self.lengthscale
        square = (one - other.T).square()
        if torch.equal(one, other):
            square = square.clone()
            square.fill_diagonal_(0.0)
        return self.variance * torch.exp(-square / 2) + 0.1 * torch.eye(len(x))


def test_a_module_whose_parameters_are_drawn_runs_by_vmap():
    kernel, x = Kernel(), torch.linspace(0.0, 1.0, 5).reshape(-1, 1)

    def model(y):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(5), kernel.sampled()(x)), obs=y)

    y = torch.sin(6 * x[:, 0])
    guide = AutoFlow(model).setup(y)
    task = Task(model, guide, (y,), {}).settle()
    assert task.model.engine == "vmap"
    latents = {name: torch.rand(3, *value.shape) + 0.5 for name, value in kernel.named_parameters()}
    found = [task.model.by(engine).log_prob(latents, 3) for engine in ("vmap", "loop")]
    torch.testing.assert_close(*found)
    assert [type(part) for part in kernel.parameters()] == [nn.Parameter, nn.Parameter]
