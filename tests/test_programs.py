"""Pyro programs as users write them: each runs, or is refused before training, in one line with cause and way out.

They run under a plate of draws if the user asks for it, and otherwise by any engine that can run them."""

import contextlib
import functools
import inspect
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import sampling
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.poutine.util import prune_subsample_sites
from torch import nn

import pyro_flows as pf
from pyro_flows import AutoFlow, AutoPlateFlow
from pyro_flows.encoders import MLPEncoder
from pyro_flows.guides.contexts import places_of
from pyro_flows.objectives import PathELBO, PathEnumELBO, TemperedELBO
from pyro_flows.programs.checks import quoted
from pyro_flows.programs.model_and_guide import Task

X = torch.tensor([0.3, -1.2, 0.8, 2.1, -0.4, 0.9, 1.7])
QUICK = {"steps": 3, "progress": False}


in_both_stores = pytest.mark.usefixtures("local_params")


def evidence(model, *args, low=-4.0, high=4.0):
    """Return the log evidence of a model with one real latent, by a sum over a grid."""
    trace = prune_subsample_sites(poutine.trace(model).get_trace(*args))
    (name,) = [name for name, _ in trace.iter_stochastic_nodes()]
    grid = torch.linspace(low, high, 81)
    heights = [poutine.trace(poutine.condition(model, {name: z})).get_trace(*args).log_prob_sum() for z in grid]
    return float(torch.stack(heights).double().logsumexp(0)) + math.log((high - low) / 80)


# A model that does not run under a plate of draws.


def asserts(y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    if w.shape != (3,):
        raise AssertionError  # an error without words, like a bare assert; pytest would add words to the latter
    pyro.sample("y", dist.Normal(w.sum(-1), 1.0), obs=y)


def converts(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(w.exp() if math.exp(w) > 0 else w, 1.0), obs=y)


def misses(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(w if w.dim() == 0 else w.absent, 1.0), obs=y)


FAULTS = {
    asserts: r"`raise AssertionError .*`: AssertionError\.",
    converts: r"`pyro.sample\(\"y\", dist.Normal\(w.exp\(\) if math.exp\(w\) > .*`: (ValueError|RuntimeError): .*\.",
    misses: r"`pyro.sample\(\"y\", dist.Normal\(w if .*`: AttributeError: .*absent'\.",
}


every_fault = pytest.mark.parametrize("model", FAULTS, ids=lambda model: model.__name__)


def way(model):
    first = inspect.getsourcelines(model)[1]
    lines = "|".join(str(first + number) for number in range(1, 5))
    return rf"the model does not run vectorised over draws: test_programs.py:({lines}), {FAULTS[model]} Let the model.*"


@every_fault
def test_a_model_that_does_not_run_under_a_plate_is_refused_by_its_own_line(model):
    y = torch.tensor(1.0)
    for use in (pf.psis, pf.check, pf.refine, pf.resample, pf.to_arviz):
        with pytest.raises(ValueError, match=way(model)) as error:
            use(pf.Program(model, vectorize="plate"), model, y)
        assert "\n" not in str(error.value)
        assert type(error.value.__cause__).__name__ in str(error.value)


@every_fault
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": PathELBO(8, vectorize_particles=True)},
        {"objective": TemperedELBO(3)},
        {"objective": Trace_ELBO(8, vectorize_particles=True)},
        {"num_particles": 1, "warm_start": True},
    ],
    ids=["default", "path", "tempered", "trace", "warm"],
)
def test_fit_svi_says_before_training_that_a_model_does_not_run_under_a_plate(model, settings):
    guide = AutoFlow(model)
    with pytest.raises(ValueError, match=way(model)):
        pf.fit_svi(pf.Program(model, vectorize="plate"), guide, torch.tensor(1.0), **QUICK, **settings)
    assert guide.is_fresh


def test_a_model_that_asserts_shapes_is_simulated():
    def model(x=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        assert not w.dim()
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    amortized = AutoFlow(model, encoder=lambda x: x[..., None])
    for use in (
        lambda program: pf.simulate(program, num_simulations=20),
        lambda program: pf.fit_amortized(program, amortized, simulations=20, max_epochs=1, progress=False),
        lambda program: pf.calibrate(program, amortized, num_simulations=20, num_samples=20),
    ):
        with pytest.raises(ValueError, match=r"the model does not .*test_programs.py:\d+, `assert not w.dim\(\)`"):
            use(pf.Program(model, vectorize="plate"))
        use(model)


def test_a_guide_that_does_not_run_under_a_plate_is_called_the_guide():
    model = sampling(w=dist.Normal(0.0, 1.0))

    def guide():
        loc = pyro.param("loc", torch.zeros(()))
        w = pyro.sample("w", dist.Normal(loc, 1.0))
        assert not w.dim()

    def looped():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        float(w)

    assert Task(model, guide, (), {}).settle().guide.engine == "vmap"
    assert pf.psis(model, guide, num_samples=25).log_weights.abs().max() < 1e-6
    assert pf.fit_svi(model, guide, **QUICK).losses.isfinite().all()
    with pytest.warns(UserWarning, match=r"^the guide runs one draw at a time\. .* guide does not run .*: test_prog"):
        assert pf.psis(model, looped, num_samples=25).log_weights.abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"^fit_svi: the guide does not run vectorised over draws: test_programs"):
        pf.fit_svi(model, guide, objective=PathELBO(4, vectorize_particles=True), **QUICK)


def test_an_error_without_a_line_of_the_users_is_told_by_its_kind():
    with pytest.raises(RuntimeError) as error:
        torch.zeros(2) + torch.zeros(3)
    assert quoted(error.value).startswith("test_programs.py:")
    assert quoted(error.value.with_traceback(None)).startswith("RuntimeError: The size of tensor a (2)")


def test_a_check_that_a_fit_need_not_make_leaves_its_random_numbers(monkeypatch):
    model = sampling(w=dist.Normal(0.0, 1.0))

    def losses():
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        return pf.fit_svi(model, AutoFlow(model), objective=PathELBO(4, vectorize_particles=True), **QUICK).losses

    def unseen(task):
        task.model, task.guide = task.model.by("plate"), task.guide.by("plate")
        return task

    checked = losses()
    monkeypatch.setattr(Task, "settle", unseen)
    assert torch.equal(checked, losses())


# Latents that the guide lacks.


def several(y):
    for i in range(2):
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + 4 * k, 1.0), obs=y)


@in_both_stores
@pytest.mark.parametrize("settings", [{}, {"objective": PathELBO()}, {"warm_start": True}])
def test_all_continuous_latents_that_a_guide_lacks_are_named_before_training(settings):
    guide = AutoFlow(poutine.block(several, hide=["z_0", "z_1", "k"]))
    words = r"^fit_svi: latent sites 'z_0', 'z_1' of the model are not in the guide\. .* continuous: .*condition"
    with pytest.raises(ValueError, match=words):
        pf.fit_svi(several, guide, X, **QUICK, **settings)
    assert guide.is_fresh


@pytest.mark.parametrize("use", [pf.fit_svi, pf.psis, pf.check, pf.refine, pf.resample, pf.to_arviz, pf.neutra])
def test_a_blocked_guide_with_the_whole_model_is_refused_by_name(use):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(x, 1.0))
        pyro.sample("n", dist.Poisson(2.0))

    part = poutine.block(model, hide=["w", "n"])
    guide = AutoFlow(part)
    pf.fit_svi(part, guide, **QUICK)
    words = r"latent sites 'w', 'n' of the model are not in the guide\. 'n' is discrete with infinite.*'w' is cont"
    with pytest.raises(ValueError, match=words):
        use(model, guide, **(QUICK if use is pf.fit_svi else {}))


def test_several_sites_of_another_models_guide_are_named_at_once():
    normal = dist.Normal(0.0, 1.0)
    with pytest.raises(ValueError, match="sites 'a', 'b' of the guide are not in the model"):
        pf.psis(sampling(x=normal), sampling(x=normal, a=normal, b=normal))


@config_enumerate
def mixture(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(loc + 3 * k, 1.0), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("local_params", "objective"),
    [
        (False, lambda: PathEnumELBO(max_plate_nesting=1)),
        (True, lambda: PathEnumELBO()),
        (True, lambda: PathEnumELBO(32, max_plate_nesting=1, vectorize_particles=True)),
        (False, lambda: TraceEnum_ELBO(32, max_plate_nesting=1, vectorize_particles=True)),
    ],
    indirect=["local_params"],
)
def test_enumeration_goes_on_with_the_whole_model(local_params, objective):
    guide = AutoFlow(poutine.block(mixture, hide=["k"]))
    fit = pf.fit_svi(mixture, guide, X, objective=objective(), steps=150, lr=0.05, progress=False)

    def summed(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        first, second = (dist.Normal(loc + shift, 1.0).log_prob(y) + math.log(p) for shift, p in ((0, 0.7), (3, 0.3)))
        pyro.factor("y", torch.logaddexp(first, second).sum())

    assert abs(float(fit.losses[-50:].mean()) + evidence(summed, X)) < 0.1


@pytest.mark.slow
def test_latents_that_are_not_enumerated_are_named_with_an_enumerating_objective():
    guide = AutoFlow(poutine.block(several, hide=["k", "z_1"]))
    for model in (several, config_enumerate(several)):
        with pytest.raises(ValueError, match="fit_svi: latent site 'z_1' of the model"):
            pf.fit_svi(model, guide, X, objective=PathEnumELBO(max_plate_nesting=1), **QUICK)
    objective = PathEnumELBO(max_plate_nesting=1)
    fit = pf.fit_svi(several, AutoFlow(several), X, objective=objective, warm_start=True, **QUICK)
    assert fit.losses.isfinite().all()


# Observations with more rows than their distribution.


def coin(y):
    """Sample the observations of Pyro's tutorial SVI Part III, in a plate without a size."""
    heads = pyro.sample("heads", dist.Beta(10.0, 10.0))
    with pyro.plate("data_plate"):
        pyro.sample("obs", dist.Bernoulli(heads), obs=y)


def plateless(y):
    heads = pyro.sample("heads", dist.Beta(10.0, 10.0))
    pyro.sample("obs", dist.Bernoulli(heads), obs=y)


@pytest.mark.slow
@in_both_stores
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (coin, {}),
        (coin, {"vectorize": "loop"}),
        (plateless, {"vectorize": "loop"}),
        (plateless, {"max_plate_nesting": 1}),
    ],
)
def test_to_arviz_takes_the_shape_of_a_log_likelihood_from_itself(model, settings, validate):
    y = torch.tensor([1.0] * 6 + [0.0] * 4)
    with pyro.validation_enabled(validate):
        guide = AutoFlow(model)
        pf.fit_svi(pf.Program(model, max_plate_nesting=1), guide, y, steps=3, progress=False)
        found = pf.to_arviz(pf.Program(model, **settings), guide, y, num_samples=100, posterior_predictive=True)
    heads = torch.tensor(found["posterior"]["heads"].values[0])
    rows = torch.tensor(found["log_likelihood"]["obs"].values[0])
    assert rows.shape == (100, 10)
    assert torch.allclose(rows, dist.Bernoulli(heads[:, None]).log_prob(y))
    drawn = found["posterior_predictive"]["obs"]
    assert drawn.dims == found["log_likelihood"]["obs"].dims == ("chain", "draw", *found["observed_data"]["obs"].dims)
    assert 0 < drawn.values[0].std(1).mean() < 1  # each row has a separate draw


def test_plates_name_the_dimensions_of_log_likelihoods_from_the_right():
    """The site's distribution has an extra dimension to the left of a plate, of the same size."""

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(loc, 1.0).expand([3, 3]), obs=torch.zeros(3, 3))

    found = pf.to_arviz(pf.Program(model, vectorize="loop"), model, num_samples=25)
    assert found["log_likelihood"]["y"].dims == ("chain", "draw", "y_dim_0", "rows")
    assert found["observed_data"]["y"].dims == ("y_dim_0", "rows")


# The forms of subsample= that Pyro accepts.


def rows_model(plate):
    """Sample rows with a latent each, in a plate whose size and rows come from a function of the data."""

    def model(x):
        made, of = plate(x)
        with made as given:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            fn = dist.Normal(z, 1.0) if x.dim() == 1 else dist.Normal(z[..., None], torch.ones(2)).to_event(1)
            pyro.sample("x", fn, obs=of(given))

    return model


as_data = rows_model(lambda x: (pyro.plate("rows", len(x), subsample=x), lambda given: given))
all_rows = rows_model(lambda x: (pyro.plate("rows", len(x)), lambda _: x))


class Column(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, *rest):
        return self.scale * x.float().reshape(len(x), -1)


def losses(model, build, *args, **settings):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = build(model)
    return pf.fit_svi(model, guide, *args, **QUICK, **settings).losses, guide


@pytest.mark.parametrize("encoder", [None, Column], ids=["learned", "encoder"])
@pytest.mark.parametrize("x", [X, torch.stack((X, X), 1), torch.tensor([3, 1, 1, 0])], ids=["x", "xx", "counts"])
def test_data_given_as_subsample_are_the_rows_in_their_order(encoder, x):
    def build(model):
        return AutoPlateFlow(model, "rows", encoder=encoder and encoder())

    found, guide = losses(as_data, build, x)
    assert torch.equal(found, losses(all_rows, build, x)[0])
    assert guide.sample(5, x)["z"].shape == (5, len(x))
    assert pf.psis(as_data, guide, x, num_samples=25).log_weights.isfinite().all()


@pytest.mark.parametrize("num_particles", [1, 16])
@in_both_stores
def test_autoflow_leaves_a_model_the_data_that_it_gives_as_subsample(num_particles):
    """Indices in the guide's trace would replace the data, so that the guide would fit 0, 1, 2, ..."""

    found, guide = losses(as_data, AutoFlow, X, num_particles=num_particles)
    assert torch.equal(found, losses(all_rows, AutoFlow, X, num_particles=num_particles)[0])
    guide.start_at(X / 2, torch.eye(7) * 0.5**0.5)  # the known posterior
    exact = float(dist.Normal(0.0, 2**0.5).log_prob(X).sum())
    weights = pf.psis(as_data, guide, X, num_samples=200)
    assert abs(weights.log_evidence - exact) < 0.3


def test_subsamples_are_indices_where_they_can_be_and_data_else():
    order = torch.arange(4)
    for indices in (order, torch.tensor([3, 1, 0, 2]), torch.tensor([1, 3]), torch.tensor([2, 2])):
        assert places_of(indices, 4) is indices
    for data in (X[:4], torch.ones(4, 2), torch.tensor([1, 1, 2, 0]), torch.tensor([1, 2, 3, 4]), torch.ones(4) > 0):
        assert torch.equal(places_of(data, 4), order)
    for some in (X[:3], torch.ones(3, 4), torch.tensor([0, 4]), torch.tensor([-1, 0])):
        assert places_of(some, 4) is None


def test_rows_whose_order_cannot_be_told_are_refused():
    flipped = rows_model(lambda x: (pyro.plate("rows", len(x), subsample=x.flip(0)), lambda given: given))
    batch = rows_model(lambda x: (pyro.plate("rows", 100, subsample=x), lambda given: given))
    permuted = rows_model(
        lambda x: (pyro.plate("rows", len(x), subsample=torch.arange(len(x)).flip(0)), lambda given: x[given])
    )
    for model, encoder, words in (
        (flipped, None, "'rows' is given as subsample= must be an argument of the model, as it is"),
        (batch, None, r"the data of 7 of 100 rows .* Give an encoder"),
        (permuted, Column(), "in another order, by subsample="),
    ):
        with pytest.raises(ValueError, match=words):
            pf.fit_svi(model, AutoPlateFlow(model, "rows", encoder=encoder), X, **QUICK)
    for model, encoder in ((batch, Column()), (permuted, None)):
        guide = AutoPlateFlow(model, "rows", encoder=encoder)
        assert pf.fit_svi(model, guide, X, **QUICK).losses.isfinite().all()


@in_both_stores
def test_latents_in_a_plate_without_a_size_are_those_that_pyro_draws():
    def unsized(x, shape=(7,)):
        with pyro.plate("rows"):
            z = pyro.sample("z", dist.Normal(torch.zeros(shape), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    shared = functools.partial(unsized, shape=())

    for build in (AutoFlow, lambda model: AutoPlateFlow(model, "rows")):
        found, guide = losses(unsized, build, X)
        assert torch.equal(found, losses(all_rows, build, X)[0])
        assert guide.sample(5, X)["z"].shape == (5, 7)
    assert losses(shared, AutoFlow, X)[1].sample(5)["z"].shape == (5,)
    assert SVI(unsized, AutoFlow(unsized), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(X) < 1e3
    with pytest.raises(ValueError, match=r"'z' has no dimension for .* 'rows'.*pyro.plate\('rows', len\(x\)\)"):
        AutoPlateFlow(shared, "rows").setup(X)
    guide = AutoPlateFlow(coin, "data_plate")  # no latent lies in it
    assert pf.fit_svi(coin, guide, torch.ones(4), **QUICK).losses.isfinite().all()


# Discrete latents.


@pytest.mark.parametrize("build", [AutoFlow, lambda model: AutoPlateFlow(model, "rows")], ids=["joint", "plate"])
def test_discrete_latents_are_left_out_and_infinite_ones_are_named(build):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("n", dist.Poisson(2.0))
            pyro.sample("c", dist.Categorical(torch.ones(3)))
            pyro.sample("g", dist.Geometric(0.3))

    with pytest.raises(ValueError, match=r"latent sites 'n', 'g' are discrete, and cannot be .*GammaPoisson"):
        build(model).setup()
    for hidden in (["n", "g"], ["k", "n", "c", "g"]):
        guide = build(poutine.block(model, hide=hidden)).setup()
        assert guide().keys() == {"x", "z"}


# The number of dimensions of plates.

SHIFTS = torch.tensor([[0.0], [2.0]])


def by_hand(y):
    """Sample two components in a manual dimension, left of the plate; a single run does not reveal it."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        rows = dist.Normal(loc + SHIFTS, 1.0).log_prob(y).logsumexp(-2, keepdim=True)
        pyro.factor("y", rows - math.log(2))


def free(y):
    """Sample rows without a plate."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


HIDDEN = {by_hand: 2, free: 1}  # models and the number of dimensions of their plates
every_hidden = pytest.mark.parametrize("model", HIDDEN, ids=lambda model: model.__name__)


@pytest.mark.slow
@every_hidden
def test_a_number_of_plates_that_is_given_holds_for_fits_and_verdicts(model):
    guide = AutoFlow(model)
    for validate in (True, False):
        with pyro.validation_enabled(validate):
            task = Task(pf.Program(model, vectorize="plate"), guide, (X,), {}).settle()
            assert task.model.nesting == HIDDEN[model]  # one run reveals them
    with pyro.validation_enabled(model is not free):  # Pyro itself needs a plate around rows
        program = pf.Program(model, max_plate_nesting=HIDDEN[model])
        pf.fit_svi(program, guide, X, steps=100, progress=False)
        exact = evidence(model, X)
        assert abs(pf.psis(program, guide, X).log_evidence - exact) < 0.02
        assert abs(pf.check(program, guide, X).log_evidence - exact) < 0.02
        draws = pf.refine(program, guide, X, num_samples=500).draws["loc"]
        assert draws.shape == (500,)
        assert pf.resample(program, guide, X, num_samples=50)["loc"].shape == (50,)
        assert pf.to_arviz(program, guide, X, num_samples=50)["posterior"]["loc"].shape == (1, 50)
        assert pf.neutra(program, guide, X).site == "loc_shared_latent"
        assert Task(model, guide, (X,), {}).settle().model.engine == "plate"  # if none is given
        assert abs(pf.psis(model, guide, X).log_evidence - exact) < 0.02
        assert pf.neutra(model, guide, X).site == "loc_shared_latent"
        program = pf.Program(model, vectorize="plate", max_plate_nesting=HIDDEN[model] - 1)  # one fewer is too few
        for use in (pf.psis, pf.check, pf.refine, pf.resample, pf.to_arviz):
            with pytest.raises(ValueError, match="vectorised over"):
                use(program, guide, X)


@pytest.mark.slow
@in_both_stores
@every_hidden
def test_an_objective_that_knows_the_number_of_plates_decides(model):
    """The warm start used the guess instead, and ended in a RuntimeError."""
    with pyro.validation_enabled(model is not free):
        objective = PathELBO(64, max_plate_nesting=HIDDEN[model], vectorize_particles=True)
        fit = pf.fit_svi(model, AutoFlow(model), X, objective=objective, steps=50, progress=False)
        assert abs(float(fit.losses[-10:].mean()) + evidence(model, X)) < 0.3
        objective = TemperedELBO(5, num_particles=64, max_plate_nesting=HIDDEN[model])
        assert pf.fit_svi(model, AutoFlow(model), X, objective=objective, progress=False).losses.isfinite().all()
        objective = PathELBO(64, vectorize_particles=True)  # an objective without the number gets it
        program = pf.Program(model, max_plate_nesting=HIDDEN[model])
        pf.fit_svi(program, AutoFlow(model), X, objective=objective, **QUICK)
        assert objective.max_plate_nesting == HIDDEN[model] + 1


def test_simulations_keep_the_number_of_plates():
    def model(y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        sides = (loc + torch.tensor([[-1.0], [1.0]])).logsumexp(-2, keepdim=True)
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(sides.mean((-2, -1)) if not loc.dim() else sides, 0.1), obs=y)

    program = pf.Program(model, max_plate_nesting=2)
    with pytest.raises(ValueError, match="max_plate_nesting"):
        pf.simulate(pf.Program(model, vectorize="plate"), num_simulations=50)
    found = pf.simulate(program, num_simulations=500)
    centre = found.latents["loc"] + math.log(math.exp(-1) + math.exp(1))
    assert found.data["y"].shape == (500, 3)
    assert (found.data["y"].mean(1) - centre).std() < 0.1
    guide = AutoFlow(model, encoder=MLPEncoder(3, 2))
    pf.fit_amortized(program, guide, simulations=60, max_epochs=1, progress=False)
    assert pf.calibrate(program, guide, num_simulations=20, num_samples=20).ranks.shape == (20, 1)


def test_the_log_likelihood_of_rows_keeps_the_number_of_plates():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            both = dist.Normal(z + SHIFTS, 1.0).log_prob(x).logsumexp(-2, keepdim=True) - math.log(2)
            pyro.factor("x", both)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    program = pf.Program(model, max_plate_nesting=2)
    found = pf.importance_log_likelihood(program, guide, X, plate="rows", num_samples=3000)
    exact = dist.Normal(SHIFTS, 2**0.5).log_prob(X).logsumexp(0) - math.log(2)
    assert torch.allclose(found, exact, atol=0.1)


@pytest.mark.parametrize("use", [pf.fit_svi, pf.psis, pf.check, pf.refine, pf.resample, pf.to_arviz, pf.neutra])
def test_an_impossible_number_of_plates_is_refused_by_name(use):
    guide = AutoFlow(by_hand)
    pf.fit_svi(pf.Program(by_hand, max_plate_nesting=2), guide, X, **QUICK)
    words = f"{use.__name__}: max_plate_nesting must be at least 1, got 0: plate 'rows' lies at dim=-1"
    with pytest.raises(ValueError, match=words):
        use(pf.Program(by_hand, max_plate_nesting=0), guide, X)


def test_the_numbers_of_plates_of_argument_and_objective_must_agree():
    guide = AutoFlow(by_hand)
    objective = PathELBO(8, max_plate_nesting=2, vectorize_particles=True)
    with pytest.raises(ValueError, match="fit_svi: max_plate_nesting must be that of the objective, 2, got 3"):
        pf.fit_svi(pf.Program(by_hand, max_plate_nesting=3), guide, X, objective=objective)
    with pytest.raises(ValueError, match="fit_svi: the objective's max_plate_nesting must be at least 1, got 0"):
        pf.fit_svi(by_hand, guide, X, objective=PathELBO(max_plate_nesting=0), **QUICK)


def test_an_enumerated_model_on_a_subsampled_plate_has_no_noise():
    """Runs are compared on one subsample, because the weights of draws need the density of all rows."""
    x = torch.tensor([0.0] * 4 + [30.0] * 4)

    def mixture():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 8, subsample_size=2) as rows:
            side = pyro.sample("side", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(loc + side, 1.0), obs=x[rows])

    program = Task(mixture, sampling(loc=dist.Normal(0.0, 1.0)), (), {}).check().settle().model
    assert (program.engine, program.choice.noise.deviation) == ("plate", 0)


@pytest.mark.slow
def test_plates_that_one_run_shows_need_no_number():
    """A manual plate far to the left, a plate of the guide alone, and a plate that depends on the data are found."""

    def far(y):
        with pyro.plate("far", 2, dim=-3):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            assert x.shape[-3:] == (2, 1, 1)

    def own(y):
        with pyro.plate("far", 2, dim=-3):
            pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("extra", 4, dim=-4):
            pyro.sample("noise", dist.Normal(torch.zeros(4, 1, 1, 1), 1.0), infer={"is_auxiliary": True})

    def some(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if y is not None:
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    assert pf.psis(far, far, X, num_samples=30).log_weights.abs().max() < 1e-4
    assert pf.psis(far, own, X, num_samples=30).log_weights.shape == (30,)
    for y in (None, X):
        guide = AutoFlow(some)
        pf.fit_svi(some, guide, y, steps=200, progress=False)
        assert pf.check(some, guide, y).trusted


def slope(x, y, batch=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)) if batch is None else contextlib.nullcontext():
        pyro.sample("y", dist.Normal(a * x if batch is None else torch.zeros(batch), 1.0), obs=y)


@pytest.mark.parametrize(
    ("rows", "batch"), [((5, 1), None), ((5, 1), (3,)), ((5,), (3, 1))], ids=["in a plate", "column", "row"]
)
def test_data_that_cross_their_distribution_are_refused(rows, batch):
    """Each row would be compared with all others without an error; Pyro's ELBO refuses it too."""
    arguments = (torch.ones(5), torch.ones(rows), batch)
    guide = AutoNormal(slope)
    with pytest.raises(ValueError, match=r"observed site 'y' has data of shape .* each row would meet every other"):
        pf.fit_svi(slope, guide, *arguments, progress=False)
    guide(torch.ones(5), torch.ones(5))
    with pytest.raises(ValueError, match="each row would meet every other"):
        pf.psis(slope, guide, *arguments)


@pytest.mark.parametrize(("rows", "batch"), [((), None), ((5,), (1, 1)), ((1, 5), (5,)), ((5, 3), (3,)), ((), (4, 2))])
def test_data_that_are_repeated_or_have_more_rows_are_not(rows, batch):
    arguments = (torch.ones(5), torch.ones(rows), batch)
    guide = AutoNormal(slope)
    guide(*arguments)
    assert pf.psis(slope, guide, *arguments, num_samples=100).log_weights.isfinite().all()
