"""Traps of Pyro's flow guides, which AutoFlow avoids.

Each case works, or is an error at setup that names the site.
"""

import copy
import functools
import math
import pickle

import laws
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import draws_of, normals, same, sampling, silent, state
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, init_to_value
from torch.distributions import constraints

from pyro_flows import AutoFlow, AutoPlateFlow, fit_svi, flows, psis
from pyro_flows.programs.model_and_guide import Task

small = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(16,))


def model():
    """x ~ N(0, 1), and y = x + noise is observed at 3: the optimal loss is -log N(3; 0, 2)."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    pyro.sample("y", dist.Normal(x, scale), obs=torch.tensor(3.0))


def train(guide, steps: int = 100, program=model) -> list[float]:
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(16, vectorize_particles=True))
    return [svi.step() for _ in range(steps)]


# Several guides in one process.


@pytest.mark.slow
def test_second_guide_trains():
    """The parameter store is not cleared, and the first guide stays identical."""
    first = AutoFlow(model, small)
    reached = train(first)
    kept = state(first)
    second = AutoFlow(model, small)
    losses = train(second)
    assert losses[0] > reached[-1] + 0.5  # it starts from new parameters
    # Losses are means of 16 draws, averaged over 20 steps; their sd is estimated from the steps.
    tails = torch.tensor([reached[-20:], losses[-20:]])
    assert (tails.mean(1).diff().abs() < 4 * (tails.var(1).sum() / 20).sqrt()).all()
    Trace_ELBO().loss(model, first)
    assert same(state(first), kept)


@pytest.mark.slow
def test_second_guide_list_starts_afresh():
    """AutoGuideList names its parts by position, so names are equal in every list."""

    lists = []
    for program in (model, model, sampling(z=normals(5))):
        guide = AutoGuideList(program)
        guide.append(AutoFlow(program, small))
        guide()
        lists.append((guide, state(guide[0].flow.transforms[-2]), train(guide, 30, program)))
    assert same(lists[0][1], lists[1][1])
    assert lists[1][2][0] > lists[0][2][-1] + 0.5


def test_same_explicit_name_of_two_live_guides_warns():
    first = AutoFlow(model, small, name="posterior")
    with pytest.warns(UserWarning, match="named 'posterior'"):
        second = AutoFlow(model, small, name="posterior")
    del first, second
    with silent():  # both guides are deleted, so the name is free
        AutoFlow(model, small, name="posterior").setup()


@pytest.mark.parametrize("local", [True, False])
def test_trains_with_and_without_module_local_params(local):
    losses = []
    for setting in (local, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        with pyro.settings.context(module_local_params=setting):
            guide = AutoFlow(model, small)
            losses.append(train(guide, 20))
            if setting:
                assert not pyro.get_param_store().keys()
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


# Parameters.


def test_parameters_exist_after_setup_under_clean_names():
    guide = AutoFlow(model, small).setup()
    names = [name for name, _ in guide.named_parameters(remove_duplicate=False)]
    assert names
    assert all(name.startswith("flow.transforms.") for name in names)
    # After the two couplings: a trained dense matrix and shift, and a fixed location and scale.
    assert names[-4:] == [f"flow.transforms.{place}" for place in ("2.factors", "2.shift", "3.loc", "3.scale")]
    assert len({id(p) for _, p in guide.named_parameters(remove_duplicate=False)}) == len(names)
    before = copy.deepcopy(laws.learned(guide))
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.01)
    for _ in range(2):  # in the first step, only the last layers change, because they start at zero
        optimizer.zero_grad()
        Trace_ELBO(2).differentiable_loss(model, guide).backward()
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, laws.learned(guide), strict=True))


def test_state_dict_restores_the_function():
    guide = AutoFlow(model, small)
    train(guide, 5)
    expected = draws_of(guide)
    fresh = AutoFlow(model, small).setup()
    assert not same(draws_of(fresh), expected)
    fresh.load_state_dict(guide.state_dict(), strict=True)
    assert same(draws_of(fresh), expected)


def test_param_store_file_restores_the_function(tmp_path):
    guide = AutoFlow(model, small, name="kept")
    train(guide, 5)
    expected = draws_of(guide)
    pyro.get_param_store().save(str(tmp_path / "params"))
    del guide
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "params"))
    fresh = AutoFlow(model, small, name="kept").setup()
    assert same(draws_of(fresh), expected)
    losses = train(fresh, 50)  # training continues from there
    assert losses[-1] < losses[0]
    assert not same(draws_of(fresh), expected)


def test_param_store_of_another_shape_is_refused():
    guide = AutoFlow(model, small, name="wide")
    train(guide, 1)
    narrow = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(8,))
    del guide
    with pytest.raises(ValueError, match=r"parameter store holds 'wide\.flow.*another name"):
        AutoFlow(model, narrow, name="wide").setup()


def test_pickling_leaves_the_live_guide_usable():
    guide = AutoFlow(model, small)
    train(guide, 5)
    before = draws_of(guide)
    twin = pickle.loads(pickle.dumps(guide))
    assert same(draws_of(guide), before)
    assert same(draws_of(twin), before)
    assert guide.model is not None
    train(guide, 2)
    assert not same(draws_of(guide), before)


# Difficult posteriors.


@pytest.mark.slow
def test_far_gaussian_is_reached_with_the_defaults():
    pyro.set_rng_seed(2)  # with half of the seeds, a step size that is too small also works
    loc, scale = torch.tensor([0.0, 10.0, -20.0, 0.0]), torch.tensor([1.0, 1.0, 0.1, 30.0])

    def far():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (4,)))
        pyro.factor("target", dist.Normal(loc, scale).log_prob(z).sum(-1))

    guide = AutoFlow(far)
    fit_svi(far, guide, steps=200, progress=False)
    checked = psis(far, guide, num_samples=4000)
    # The target is normalised, log Z = 0, so the divergence KL(q, p) is the mean of log q - log p; its standard error
    # is part of the answer: a divergence of 0.1 nats has log-weights with a spread of about sqrt(0.2).
    divergence = -checked.log_weights.mean().item()
    assert divergence + 2 * checked.log_weights.std().item() / math.sqrt(4000) < 0.1


@pytest.mark.slow
def test_improper_uniform_sites_start():
    def flat():
        x = pyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()))
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (3,)))
        p = pyro.sample("p", dist.ImproperUniform(constraints.simplex, (), (3,)))
        pyro.factor("data", dist.Gamma(3.0, 2.0).log_prob(x) - (z**2).sum(-1) + p.log().sum(-1))

    losses = train(AutoFlow(flat, small), 100, flat)
    assert sum(losses[-10:]) < sum(losses[:10])


# Models outside the scope of a joint flow are errors with the site's name.


def test_support_that_depends_on_another_latent_moves_with_it():
    def triangle():
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        pyro.sample("b", dist.Uniform(0.0, 1 - a))

    def stretched():
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        u = pyro.sample("u", dist.Uniform(0.0, 1.0))
        pyro.deterministic("b", (1 - a) * u)

    guide, twin = (AutoFlow(program, small, init_scale=1.0).setup() for program in (triangle, stretched))
    twin.load_state_dict(guide.state_dict())
    draws = guide.sample(100)
    assert (draws["b"] < 1 - draws["a"]).all()
    for a, b in zip(draws["a"], draws["b"], strict=True):  # the density of b is the scaled density of u
        found, wanted = guide.log_prob({"a": a, "b": b}), twin.log_prob({"a": a, "u": b / (1 - a)}) - (1 - a).log()
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="support of latent site 'b'"):
        AutoFlow(triangle, small, encoder=lambda: torch.zeros(2)).setup()  # outside the scope of amortised flows


def test_support_that_depends_on_the_data_alone_is_accepted():
    def bounded(top):
        pyro.sample("b", dist.Uniform(0.0, top))

    draws = AutoFlow(bounded, small, init_scale=2.0).setup(torch.tensor(5.0)).sample(500)["b"]
    assert 0 < draws.min() < 1 < 4 < draws.max() < 5


def test_support_without_a_bijection_is_refused():
    with pytest.raises((NotImplementedError, ValueError), match="'covariance'"):
        AutoFlow(sampling(covariance=dist.Wishart(torch.tensor(5.0), torch.eye(3))), small).setup()


def test_latents_of_mixtures_have_the_support_of_the_components():
    shares = dist.Categorical(torch.tensor([0.3, 0.7]))

    def two(components):
        pyro.sample("x", dist.MixtureSameFamily(shares, components))

    for components in (
        dist.Normal(torch.tensor([-1.0, 1.0]), 1.0),
        dist.LogNormal(torch.tensor([-1.0, 1.0]), 1.0),
        dist.Normal(torch.zeros(2, 3), 1.0).to_event(1),
    ):
        guide = AutoFlow(two, small).setup(components)
        draws = guide.sample(200)
        assert components.support.check(draws["x"].unsqueeze(-1 - components.event_dim)).all()
        assert guide.log_prob(draws).isfinite().all()
    # Before torch had MixtureSameFamilyConstraint, the support of the components was that of the mixture.
    with pytest.raises((NotImplementedError, ValueError), match=r"the support of (latent )?site 'x'"):
        AutoFlow(two, small).setup(dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0])))


def test_a_new_guide_asks_for_the_arguments_of_the_model():
    def shifted(y):
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    guide = AutoFlow(shifted, small)
    for ask in (lambda: guide.quantiles([0.5]), lambda: guide.sample(2), guide.median):
        with pytest.raises(TypeError, match=r"this guide is new.*missing 1 required .*Fit the guide first"):
            ask()
    assert guide.sample(2, torch.tensor(1.0))["x"].shape == (2,)


def test_a_recipe_that_fails_is_not_mistaken_for_a_model_without_arguments():
    with pytest.raises(TypeError, match=r"^AutoFlow: flow\(1\) fails: .*takes 0 positional arguments"):
        AutoFlow(sampling(x=dist.Normal(0.0, 1.0)), lambda: None).setup()


def test_latent_in_a_subsampled_plate_is_refused():
    def local():
        with pyro.plate("people", 10, subsample_size=4):
            pyro.sample("ability", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'ability' lies in plate 'people'.*4 of 10"):
        AutoFlow(local, small).setup()


@pytest.mark.slow
def test_subsampled_plate_of_observations_is_accepted():
    data = torch.linspace(1, 3, 20)

    def observed():
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        with pyro.plate("people", 20, subsample_size=5) as rows:
            pyro.sample("y", dist.Normal(x, 1.0), obs=data[rows])

    guide = AutoFlow(observed, small)
    losses = train(guide, 300, observed)
    assert sum(losses[-30:]) < sum(losses[:30])
    # The posterior is N(2, 1 / 20), which a noisy objective reaches approximately.
    assert guide.median()["x"].item() == pytest.approx(2, abs=0.3)


def test_a_discrete_latent_is_left_out_and_summed():
    def coin():
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        side = pyro.sample("side", dist.Bernoulli(p))
        pyro.sample("y", dist.Normal(side, 0.5), obs=torch.tensor(0.8))

    def by_hand():
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        tail, head = (dist.Normal(side, 0.5).log_prob(torch.tensor(0.8)) for side in (0.0, 1.0))
        pyro.factor("y", torch.logaddexp((1 - p).log() + tail, p.log() + head))

    guide = AutoFlow(coin, small)
    fit_svi(coin, guide, steps=20, warm_start=False, progress=False)
    assert guide.latent_dim == 1
    assert guide.sample(5).keys() == {"p"}
    draws = Task(coin, guide, (), {}).settle().draw(20)
    wanted = Task(by_hand, guide, (), {}).settle().model.log_prob(draws.latents, 20)
    torch.testing.assert_close(draws.log_p, wanted, rtol=1e-4, atol=1e-4)
    assert AutoFlow(poutine.block(coin, hide=["side"]), small).setup().latent_dim == 1  # as Pyro's guides need it


@pytest.mark.parametrize("prior", [dist.VonMises(0.0, 1.0), dist.ImproperUniform(dist.constraints.positive, (), ())])
def test_a_discrete_latent_is_summed_next_to_a_prior_that_cannot_be_sampled(prior):
    def model():
        x = pyro.sample("x", prior)
        side = pyro.sample("side", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(x + side, 1.0), obs=torch.tensor(1.0))

    guide = AutoFlow(model).setup()
    assert guide.sample(5).keys() == {"x"}
    assert Task(model, guide, (), {}).settle().draw(5).log_p.isfinite().all()


def test_impossible_start_is_refused():
    def narrow():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 6, 0.0, -math.inf))  # no draw of the prior is in this region

    with pytest.raises(ValueError, match=r"site 'wall' is -inf.*init_to_value"):
        AutoFlow(narrow, small).setup()
    guide = AutoFlow(narrow, small, init_loc_fn=init_to_value(values={"x": torch.tensor(7.0)})).setup()
    assert guide.median()["x"].item() == pytest.approx(7, abs=0.05)


def test_model_without_latents_is_refused():
    def empty():
        pyro.sample("fixed", dist.Delta(torch.tensor(1.0)))  # a point is none
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    with pytest.raises((RuntimeError, ValueError), match="no latent"):
        AutoFlow(empty, small).setup()


@pytest.mark.parametrize("wrong", [flows.nsf(2), "nsf", 3], ids=["a Flow", "a string", "a number"])
def test_flow_must_be_a_recipe(wrong):
    with pytest.raises(TypeError, match=f"flow must be a recipe.*got {type(wrong).__name__}"):
        AutoFlow(model, wrong)


@pytest.mark.parametrize(
    "wrong",
    [lambda size: flows.nsf(size + 1), lambda size: flows.nsf(size, context_dim=2), lambda size: None],
    ids=["of another size", "with a context", "nothing"],
)
def test_recipe_must_fit(wrong):
    with pytest.raises(ValueError, match=r"flow\(2\) must return a Flow over events of shape \(2,\)"):
        AutoFlow(model, wrong).setup()


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_init_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match=f"init_scale must be positive and finite, got {scale}"):
        AutoFlow(model, small, init_scale=scale)


class Hidden(torch.nn.Module):
    """Encoder whose network is in a plain list, which torch does not register."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = [torch.nn.Linear(2, 3)]

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.networks[0](y)


def test_encoders_with_hidden_weights_are_refused():
    def observed(y: torch.Tensor) -> None:
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0).expand([2]).to_event(1), obs=y)

    y = torch.zeros(2)
    with pytest.raises(ValueError, match="parameters that the guide cannot see"):
        AutoFlow(observed, encoder=Hidden()).setup(y)
    assert AutoFlow(observed, encoder=lambda y: 2 * y).setup(y.clone().requires_grad_()).flow.context_dim == 2


def test_models_that_catch_exceptions_run_as_others():
    def catching(y: torch.Tensor) -> None:
        with pyro.plate("row", len(y)):
            try:
                x = pyro.sample("x", dist.Normal(0.0, 1.0))
            except Exception as error:
                raise RuntimeError("the model's own handler") from error
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    y = torch.randn(5)
    guide = AutoPlateFlow(catching, "row")
    fit_svi(catching, guide, y, steps=3, progress=False)
    assert guide.sample(2, y)["x"].shape == (2, 5)


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError, TypeError])
def test_an_error_of_a_recipe_or_of_a_start_is_not_called_the_model_s(kind):
    def fails(*_):
        raise kind("my own words")

    def one(y):
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0, 1)), 1), obs=y)

    for guide, words in ((AutoFlow(one, fails), "flow"), (AutoFlow(one, init_loc_fn=fails), "init_loc_fn")):
        with pytest.raises(kind, match=rf"{words}.* fails.*my own words") as caught:
            guide.setup(torch.tensor(1.0))
        assert "the model fails" not in str(caught.value)


@pytest.mark.parametrize("start", [3, lambda: 0.0], ids=["number", "no argument"])
def test_a_start_that_takes_no_site_is_named(start):
    with pytest.raises(TypeError, match="AutoFlow: init_loc_fn fails at site 'x': "):
        AutoFlow(lambda: pyro.sample("x", dist.Normal(0, 1)), init_loc_fn=start).setup()
