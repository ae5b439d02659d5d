"""Mistakes of new users end in one clear error: it names the argument or site, the fault and the way out."""

import inspect
import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import sampling, silent
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows.diagnostics.findings import Finding
from pyro_flows.encoders import MLPEncoder
from pyro_flows.fitting import Observed

X, Y = torch.randn(20, 3), torch.randn(20)
small = partial(flows.realnvp, num_transforms=2, hidden_dims=(8,))
SHORT = {"steps": 3, "num_particles": 4, "warm_start": False, "progress": False}


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def hierarchy(y):
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(pyro.sample("level", dist.Normal(0.0, 1.0)), 1.0), obs=y)


@pytest.fixture(scope="module")
def guide():
    found = pf.AutoFlow(model, small)
    pf.fit_svi(model, found, X, Y, **SHORT)
    return found


CALLS = {
    "fit_svi": lambda guide, *data: pf.fit_svi(model, guide, *data, **SHORT),
    "fit_svi of a new guide": lambda _, *data: pf.fit_svi(model, pf.AutoFlow(model, small), *data, **SHORT),
    "setup": lambda _, *data: pf.AutoFlow(model, small).setup(*data),
    "check": lambda guide, *data: pf.check(model, guide, *data, num_samples=100, num_chains=16),
    "psis": lambda guide, *data: pf.psis(model, guide, *data, num_samples=100),
    "to_arviz": lambda guide, *data: pf.to_arviz(model, guide, *data, num_samples=100),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def refused(kind, words, call, *args, **kwargs):
    with pytest.raises(kind, match=words) as caught:
        call(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1  # Pyro appends the shapes of a trace
    return caught.value


# Guides that were never trained.


@pytest.mark.parametrize("build", [pf.AutoFlow, partial(pf.AutoPlateFlow, plate="row")], ids=["AutoFlow", "by row"])
def test_summaries_of_an_untrained_guide_warn(build):
    guide = build(hierarchy)
    with pytest.warns(UserWarning, match=r"Auto\w+\.quantiles: the Auto\w+ was never trained.*fit_svi\(model, guide"):
        guide.median(Y)
    with pytest.warns(UserWarning, match=r"to_arviz: the Auto\w+ was never trained"):
        pf.to_arviz(hierarchy, guide, Y, num_samples=30)
    with silent():
        guide.sample(3, Y)


def test_summaries_of_a_trained_guide_are_silent(tmp_path):
    guide = pf.AutoFlow(model, small)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(X, Y)
    pf.save(guide, tmp_path / "guide.pt")
    with silent():
        for trained in (guide, pf.load(tmp_path / "guide.pt")):
            trained.median()
        warnings.filterwarnings("ignore", "to_arviz: k-hat")  # after one step it is not near the posterior
        pf.to_arviz(model, guide, X, Y, num_samples=30)


@pytest.mark.parametrize("number", [(10, 2), -1, 2.5])
def test_numbers_of_draws_are_checked(guide, number):
    refused(ValueError, r"AutoFlow\.sample: num_samples must be an integer of at least 1, got", guide.sample, number)


# Data that the model does not take.


@every_call
def test_a_model_that_fails_is_quoted_with_its_arguments(call, guide):
    where = r"the model fails.*: test_mistakes\.py:\d+, `pyro\.sample\(\"y\".*RuntimeError: "
    given = r"It was run with x: Tensor float32 \(20, 4\), y: Tensor float32 \(20,\)"
    error = refused((RuntimeError, ValueError), where + ".*" + given, call, guide, torch.randn(20, 4), Y)
    assert isinstance(error.__cause__, RuntimeError)
    refused((RuntimeError, ValueError), r"x: Tensor int64 \(20, 3\)", call, guide, torch.ones(20, 3).long(), Y)
    refused(TypeError, r"run with x: ndarray float32 \(20, 3\)", call, guide, X.numpy(), Y)


@every_call
def test_data_of_different_lengths_name_the_site(call, guide):
    words = r"observed site 'y' has data of shape \(15,\), but a distribution of batch shape \(20,\)\. Give the model"
    refused(ValueError, words, call, guide, X, Y[:15])


@every_call
def test_nan_in_the_data_names_site_and_argument(call, guide):
    holes = torch.where(torch.arange(20) == 3, math.nan, Y)
    words = r"observed site 'y' holds 1 NaN; argument 'y' holds 1 NaN\. Leave those rows out"
    refused(ValueError, words, call, guide, X, holes)
    words = r"`pyro\.sample\(\"y\".* x: Tensor float32 \(20, 3\) with 3 NaN|site 'y' .*; argument 'x' holds 3 NaN"
    refused(ValueError, words, call, guide, torch.where(torch.arange(20)[:, None] == 3, math.nan, X), Y)


def test_nan_is_named_where_discrete_latents_are_summed_out():
    def mixture(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            side = pyro.sample("side", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(loc * side, 1.0), obs=y)

    y = torch.where(torch.arange(20) == 3, math.nan, Y)
    refused(ValueError, r"AutoFlow: observed site 'y' holds 1 NaN", pf.AutoFlow(mixture, small).setup, y)


@pytest.mark.parametrize("y", [math.nan, -1.0])
def test_a_scalar_outside_of_the_support_is_named(y):
    def scalar(y):
        pyro.sample("y", dist.LogNormal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    words = "'y' holds 1 NaN" if math.isnan(y) else r"outside of the support of LogNormal \(1 of 1, such as -1\)"
    for build in (pf.AutoFlow, AutoNormal):
        refused(ValueError, words, pf.fit_svi, scalar, build(scalar), torch.tensor(y), **SHORT)


@pytest.mark.parametrize("hold", [lambda x, y: {"x": x, "y": y}, lambda x, y: (y, [x.numpy()])])
@pytest.mark.parametrize("validate", [True, False])
def test_nan_in_nested_arguments_is_named(hold, validate):
    def nested(data):
        x, y = (data["x"], data["y"]) if isinstance(data, dict) else (torch.as_tensor(data[1][0]), data[0])
        model(x, y)

    bad = X.clone()
    bad[3] = math.nan
    words = {True: "data: a (dict|tuple) with 3 NaN", False: "'y' has a density of NaN; argument 'data' holds 3 NaN"}
    with pyro.validation_enabled(validate):
        error = refused(ValueError, words[validate], pf.fit_svi, nested, pf.AutoFlow(nested), hold(bad, Y), **SHORT)
        assert "init_loc_fn" not in str(error)
        pf.AutoFlow(nested).setup(hold(X, Y))


def test_masked_nan_is_no_fault():
    def masked(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)), pyro.poutine.mask(mask=~y.isnan()):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y.nan_to_num())

    guide = pf.AutoFlow(masked, small)
    y = torch.where(torch.arange(20) == 3, math.nan, Y)
    pf.fit_svi(masked, guide, y, **SHORT)
    assert pf.psis(masked, guide, y, num_samples=30).log_weights.isfinite().all()


@pytest.mark.parametrize("own", [False, True], ids=["handler", "distribution"])
def test_masked_nan_passes_where_densities_hide_it(own):
    def masked(y):
        fn = dist.Normal(pyro.sample("loc", dist.Normal(0.0, 1.0)) * torch.ones(20), 1.0)
        with pyro.poutine.mask(mask=True if own else ~y.isnan()):
            pyro.sample("y", fn.mask(~y.isnan()).to_event(1) if own else fn, obs=y)

    y = torch.where(torch.arange(20) == 3, math.nan, Y)
    guide = pf.AutoFlow(masked, small).setup(y)
    assert all(value.isfinite().all() for value in guide.sample(3).values())


# Data outside of a support.


def coin(y, fn=dist.Bernoulli, **settings):
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", fn(p, **settings), obs=y)


def trained_on(model, *data):
    guide = pf.AutoFlow(model, small)
    pf.fit_svi(model, guide, *data, **SHORT)
    return guide


@pytest.mark.parametrize(
    ("fn", "y", "words"),
    [
        (dist.Bernoulli, 1.0 + (Y > 0), r"support of Bernoulli \(\d+ of 20, such as 2\)\. Recode the data"),
        (dist.Poisson, Y.abs() + 0.5, "support of Poisson"),
        (dist.Exponential, -1 - Y.abs(), r"support of Exponential \(20 of 20, such as -"),
        (lambda p: dist.LogNormal(p, 1.0), -1 - Y.abs(), "support of LogNormal"),
        (lambda p: dist.Categorical(torch.stack((p, 1 - p), -1)), torch.full((20,), 2), "Categorical .* as 2"),
    ],
)
def test_data_outside_of_a_support_are_refused(fn, y, words):
    model = partial(coin, fn=fn)
    guide = trained_on(model, 1 + (Y > 9).float())
    for call in (
        lambda: pf.AutoFlow(model, small).setup(y),
        lambda: pf.fit_svi(model, pf.AutoFlow(model, small), y, **SHORT),
        lambda: pf.fit_svi(model, guide, y, **SHORT),
        lambda: pf.check(model, guide, y, num_samples=100, num_chains=16),
        lambda: pf.psis(model, guide, y, num_samples=100),
    ):
        refused(ValueError, words, call)


def test_data_that_pyro_accepts_are_accepted():
    """Grey values of Bernoulli pixels without validation, hidden data, and supports that depend on latents."""
    grey = torch.rand(20)
    assert trained_on(partial(coin, validate_args=False), grey)
    with pyro.validation_enabled(False):
        assert trained_on(coin, grey)

    def hidden(y):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("row", len(y)), pyro.poutine.mask(mask=y < 2):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    assert pf.AutoFlow(hidden, small).setup(torch.tensor([0.0, 1.0, 2.0]))

    def bounded(y):
        high = pyro.sample("high", dist.Gamma(2.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Uniform(0.0, high), obs=y)

    assert trained_on(bounded, torch.tensor([0.1, 3.0]))


def test_own_distributions_take_data_of_any_kind():
    class Ragged(dist.TorchDistribution):
        arg_constraints: dict = {}
        support = dist.constraints.real

        def __init__(self, loc):
            self.loc = loc
            super().__init__(batch_shape=torch.Size([5]), validate_args=False)

        def sample(self, sample_shape=()):
            return torch.zeros(1)

        def log_prob(self, rows):
            return sum(dist.Normal(self.loc, 1.0).log_prob(row).sum() for row in rows)

    def ragged(rows):
        pyro.sample("y", Ragged(pyro.sample("loc", dist.Normal(0.0, 1.0))), obs=rows)

    for rows in ([torch.ones(2), torch.ones(3)], torch.ones(6)):
        svi = SVI(ragged, pf.AutoFlow(ragged, small), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        assert math.isfinite(svi.step(rows))


@every_call
def test_arrays_are_refused_by_the_name_of_the_site(call, guide):
    words = r"observed site 'y' must hold a tensor, got ndarray\. Use torch\.as_tensor"
    refused(TypeError, words, call, guide, X, Y.numpy())


def test_a_fit_without_data_warns():
    with pytest.warns(UserWarning, match=r"fit_svi: the model observes no data, since y=None is drawn\. Give y="):
        pf.fit_svi(model, pf.AutoFlow(model, small), X, **SHORT)


def test_an_error_is_told_for_arguments_of_any_kind(guide):
    class Odd:
        shape, dtype = 3, None

    def broken(x, y):
        raise ValueError("boo")

    parts = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for value in (Odd(), parts, torch.ones(2, device="meta")):
        refused(ValueError, "boo", pf.psis, broken, guide, value, Y)


def test_arguments_that_are_not_dense_are_no_fault():
    def counts(rows, parts, y):
        rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(rate * rows.to_dense().sum() * parts.size(0), 1.0), obs=y)

    guide = pf.AutoFlow(counts, small)
    rows, parts = torch.eye(3).to_sparse(), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert pf.psis(counts, guide, rows, parts, torch.tensor(1.0), num_samples=30).log_weights.isfinite().all()


def test_an_error_of_the_user_keeps_its_class(guide):
    class Strange(Exception):
        def __init__(self, one, two):
            super().__init__(one + two)

    def own(x, y=None):
        model(x, y)
        raise Strange("one", "two")

    with pytest.raises(Strange, match=r"^onetwo"):
        pf.check(own, guide, X, Y)


# Arguments that are swapped, forgotten or mistyped.


@pytest.mark.parametrize("call", [pf.check, pf.fit_svi, pf.psis, pf.to_arviz])
def test_a_guide_in_place_of_the_model_is_refused(call, guide):
    refused(TypeError, r"model must be a Pyro model, got a guide, AutoFlow\. Give the model", call, guide, model, X, Y)
    refused(TypeError, "got a guide, AutoNormal", call, AutoNormal(model), model, X, Y)


@pytest.mark.parametrize("build", [pf.AutoFlow, partial(pf.AutoPlateFlow, plate="row")], ids=["AutoFlow", "by row"])
def test_a_guide_of_a_guide_is_refused(build, guide):
    refused(TypeError, "model must be a Pyro model, got a guide, AutoFlow", build, guide)


@pytest.mark.parametrize("call", [CALLS[name] for name in ("fit_svi", "check", "psis", "to_arviz")])
def test_forgotten_data_are_asked_for(call, guide):
    refused(ValueError, r"site 'y' .* not in the guide\. Perhaps data are missing here: give y=\.\.\.", call, guide, X)


def test_mistyped_keywords_are_corrected(guide):
    for words, call in {
        "fit_svi: .*, got 'step'. Did you mean 'steps'": partial(pf.fit_svi, model, guide, X, Y, step=100),
        "check: .*, got 'num_sample'. Did you mean 'num_samples'": partial(pf.check, model, guide, X, Y, num_sample=9),
        "fit_density: .*, got 'epochs'. Did you mean 'max_epochs'": partial(pf.fit_density, flows.nsf(3), X, epochs=3),
        "^AutoFlow: .*, got 'enocder'. Did you mean 'encoder'": partial(pf.AutoFlow, model, enocder=None),
        "AutoPlateFlow: .*, got 'nam'. Did you mean 'name'": partial(pf.AutoPlateFlow, model, "row", nam="a"),
    }.items():
        refused(TypeError, words, call)
    words = r"psis: .* parameters of psis or of the model, got 'zzz', which would be passed on to the model\. Leave it"
    refused(TypeError, words, pf.psis, model, guide, X, Y, zzz=1)
    refused(TypeError, "fit_svi: .*, got 'optim', which would", pf.fit_svi, model, pf.AutoFlow(model), X, Y, optim=None)


@pytest.mark.parametrize("build", [pf.AutoFlow, partial(pf.AutoPlateFlow, plate="row")], ids=["AutoFlow", "by row"])
def test_keywords_of_recipes_are_named(build):
    words = (
        r"got 'num_transforms', which a recipe takes\. Give a recipe with it, functools\.partial\(flows\.nsf, num_tr"
    )
    refused(TypeError, words, build, model, num_transforms=3)


@pytest.mark.parametrize("name", [name for name, _ in inspect.getmembers(flows, inspect.isfunction)])
def test_recipes_correct_mistyped_keywords(name):
    recipe = getattr(flows, name)
    for parameter in inspect.signature(recipe).parameters:
        words = f"^{name}: keyword arguments .*, got '{parameter}x'. Did you mean '{parameter}'"
        refused(TypeError, words, recipe, **{f"{parameter}x": 1})


def test_keywords_that_only_a_call_shows_are_left_to_the_model():
    def stepped(prior, link, x, step=1):
        pyro.sample("y", dist.Normal(link(pyro.sample("z", prior)) * step, 1.0), obs=x)

    class Module(torch.nn.Module):
        def __call__(self, x, step=1):
            return stepped(dist.Normal(0.0, 1.0), torch.exp, x, step)

    bound = partial(stepped, dist.Normal(0.0, 1.0), torch.exp)
    for program in (bound, Module()):
        pf.fit_svi(program, pf.AutoFlow(program, small), torch.tensor(1.0), step=2, **SHORT)


def test_keywords_of_the_model_are_its_own():
    def other(step, **more):
        pyro.sample("x", dist.Normal(step * more["lrs"], 1.0))

    assert pf.fit_svi(other, pf.AutoFlow(other, small), step=1.0, lrs=2.0, **SHORT).steps == 3


@pytest.mark.parametrize("call", ["simulate", "fit_amortized", "calibrate"])
def test_a_simulator_without_open_data_says_so(call):
    def needs(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)

    guide = pf.AutoFlow(needs, small_with_context, encoder=MLPEncoder(2, context_dim=2)).setup(torch.zeros(2))
    run = partial(getattr(pf, call), needs, *([] if call == "simulate" else [guide]))
    refused(ValueError, rf"{call}: .*missing a required argument: 'x'.*must be optional, `def model\(x=None\)`", run)
    refused(ValueError, rf"{call}: .*'x' is observed though no argument was left open for it", run, torch.zeros(2))


def small_with_context(input_dim, context_dim):
    return flows.nsf(input_dim, context_dim, num_transforms=1, hidden_dims=(8,))


# Guides of other programs, and calls that suit other guides.


def simulator(x=None):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    return pyro.sample("x", dist.Delta(mean + 0.1 * torch.randn_like(mean), event_dim=1), obs=x)


@pytest.fixture(scope="module")
def amortised():
    found = pf.AutoFlow(simulator, small_with_context, encoder=MLPEncoder(2, context_dim=2))
    pf.fit_amortized(simulator, found, simulations=50, max_epochs=1, progress=False)
    return found


@pytest.mark.parametrize("call", [pf.check, pf.psis, pf.resample, pf.sample, pf.fit_svi])
def test_a_simulator_has_no_likelihood(call, amortised):
    words = rf"{call.__name__}: model must have a likelihood, got only Delta .* site 'x'\. Judge .* by calibrate"
    words += ".* local_c2st and misspecification"
    refused(ValueError, words, call, simulator, amortised, torch.zeros(2))


def test_a_point_at_the_data_is_a_factor():
    def scored(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Delta(x, log_density=-((x - mean) ** 2).sum(), event_dim=1), obs=x)

    assert math.isfinite(pf.fit_svi(scored, pf.AutoFlow(scored, small), torch.ones(2), **SHORT).best_loss)


@pytest.mark.parametrize("seed", range(4))
def test_a_point_may_depend_on_discrete_latents(seed):
    def coins(total):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        first, second = (pyro.sample(name, dist.Bernoulli(p)) for name in ("first", "second"))
        pyro.sample("total", dist.Delta(first + second), obs=total)

    pyro.set_rng_seed(seed)
    fit = pf.fit_svi(coins, pf.AutoFlow(coins, small), torch.tensor(1.0), **SHORT)
    assert math.isfinite(fit.best_loss)
    assert not fit.skipped


def test_a_simulator_with_a_point_at_other_data_has_no_likelihood():
    def timed(x, times):
        pyro.sample("times", dist.Delta(times, event_dim=1), obs=times)
        simulator(x)

    words = "fit_svi: model must have a likelihood, got only Delta distributions at observed sites 'times', 'x'"
    guide = sampling(mean=dist.Normal(torch.zeros(2), 1.0).to_event(1))
    refused(ValueError, words, pf.fit_svi, timed, guide, torch.zeros(2), torch.ones(3), steps=3, progress=False)


def test_a_mask_that_a_model_draws_whatever_is_given_is_named():
    """Rows are masked by the data, and the mask is drawn anew: no draw of the latents has a density."""

    def masked(y=None, mask=None, *, keeps=False):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        drawn = mask if keeps and mask is not None else (torch.arange(8) < torch.randint(1, 5, ())).float()
        mask = pyro.sample("mask", dist.Delta(drawn, event_dim=1), obs=mask)
        pyro.sample("y", dist.Normal(mean, 1.0).expand([8]).mask(mask.bool()).to_event(1), obs=y)

    guide, few = sampling(mean=dist.Normal(0.0, 1.0)), {"steps": 3, "progress": False}
    data = torch.zeros(8), (torch.arange(8) < 6).float()
    words = "observed site 'mask' is a Delta at other values than its data.* let it take what is given: value = draw"
    refused(ValueError, f"fit_svi: {words}", pf.fit_svi, masked, guide, *data, **few)
    refused(ValueError, f"psis: {words}", pf.psis, masked, guide, *data, num_samples=25)
    assert math.isfinite(pf.psis(partial(masked, keeps=True), guide, *data, num_samples=25).log_evidence)


def test_data_that_are_infinite_are_named():
    y = torch.where(torch.arange(20) < 2, math.inf, Y)
    words = r"AutoFlow: .* 'y' is -inf at the guide's start; its data hold 2 infinite numbers\. Leave those rows out"
    refused(ValueError, words, pf.fit_svi, model, pf.AutoFlow(model, small), X, y, **SHORT)

    def masked(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0).mask(y.isfinite()), obs=y)

    pf.AutoFlow(masked, small).setup(X, y)


def test_a_guide_of_the_model_without_its_condition_names_the_site():
    conditioned = pyro.condition(model, data={"y": Y})
    words = "fit_svi: site 'y' of the guide is observed in the model; .* from the conditioned one"
    for settings in (SHORT, {**SHORT, "warm_start": None}):
        refused(ValueError, words, pf.fit_svi, conditioned, pf.AutoFlow(model, small), X, **settings)
    pf.fit_svi(conditioned, pf.AutoFlow(conditioned, small), X, **SHORT)


@pytest.fixture(scope="module")
def by_row():
    found = pf.AutoPlateFlow(hierarchy, "row")
    pf.fit_svi(hierarchy, found, Y, **SHORT)
    return found


def test_a_guide_of_rows_asks_for_its_data(by_row):
    for method, given in {"sample": 5, "quantiles": [0.5], "log_prob": {}}.items():
        words = rf"AutoPlateFlow\.{method}: the model's arguments .* 'y'\. Use guide\.{method}\(\.\.\., y\)"
        refused(TypeError, words, getattr(by_row, method), given)
    refused(TypeError, "AutoPlateFlow.quantiles: the model's arguments", by_row.median)


@pytest.mark.slow
def test_exact_draws_start_from_a_guide_of_rows(by_row):
    found = pf.sample(hierarchy, by_row, Y, num_draws=100, progress=False)
    assert found.converged
    assert found.flat["level"].shape[1:] == Y.shape


def test_classes_and_swapped_programs_are_refused(guide, amortised):
    words = r"guide must be a Pyro program, got the class AutoFlow, uncalled\. Give an instance, AutoFlow\(model\)"
    refused(TypeError, words, pf.fit_svi, model, pf.AutoFlow, X, Y)
    refused(TypeError, words, pf.check, model, pf.AutoFlow, X, Y)
    refused(TypeError, "model must be a Pyro model, got a guide, AutoFlow", pf.fit_amortized, amortised, simulator)
    words = r"anneal: the arguments after the model .* got a guide, AutoFlow\. Leave it out: anneal\(model, \.\.\.\)"
    refused(TypeError, words, pf.anneal, model, guide, X, Y)


# Arrays and tables in place of tensors and draws.


def test_arrays_are_to_be_made_tensors(guide, amortised):
    array, way = X.numpy(), r" must be a tensor, got ndarray\. Use torch\.as_tensor\(\.\.\.\)"
    refused(TypeError, r"Simulations: latents\['w'\]" + way, pf.Simulations, {"w": array}, {"x": array})
    refused(TypeError, r"AutoFlow\.log_prob: values\['w'\]" + way, guide.log_prob, {"w": array[0]})
    refused(TypeError, r"log_prob: values must be .*, got Tensor float32 \(4,\)", guide.log_prob, torch.zeros(4))
    refused(TypeError, r"data must be a dict of tensors by name, got Tensor float32 \(2,\)", Observed, Y[:2])
    refused(TypeError, r"data\['x'\]" + way, Observed, {"x": array[0, :2]})
    refused(TypeError, "data for the encoder must be tensors, got ndarray", amortised.sample, 5, array[0, :2])
    refused(TypeError, r"must get the model's data, got no arguments\. Give them, as in", amortised.sample, 5)


def test_plots_of_a_guide_ask_for_its_draws(guide):
    refused(ValueError, r"such as guide\.sample\(1000\).*got AutoFlow", pf.plots.marginals, guide)


def test_tensors_are_quoted_without_their_numbers():
    refused(TypeError, r"got \{'x': Tensor float32 \(20, 3\)\}\.", pf.fit_svi, model, {"x": X}, X, Y)
    refused(ValueError, r"got tensor\(-1\.\)", pf.fit_svi, model, pf.AutoFlow(model), X, Y, lr=torch.tensor(-1.0))


def test_shapes_are_written_once(guide):
    refused(ValueError, r"must have shape \(\*batch, 3\), got \(4,\)", guide.log_prob, {"w": torch.zeros(4)})


# What print shows.


def test_a_finding_of_all_mass_has_a_sentence():
    assert str(Finding("mode", size=1.0)).endswith("draws nothing where nearly all of the posterior's mass was found.")
    share = Finding("far", "x", 0.82, 0.003, of="sd", share=0.0043)
    assert str(share).endswith("far away: 0.43% of the posterior's (sd of x 0.820 ± 0.003 times the posterior's).")
    assert Finding("mean", "x", 0.5, 0.00004).moment == "mean of x off by +0.5000 ± 0.0000 sd"
    assert "draws nothing where 37% of the posterior's mass was found" in str(Finding("collapsed", "x", size=0.37))


@pytest.mark.slow
def test_a_check_ends_with_a_next_step():
    def target():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    def far():
        pyro.sample("x", dist.Normal(5.0, 0.1))

    def narrow():
        pyro.sample("x", dist.Normal(0.0, 0.7))

    found = pf.check(target, far, num_samples=500, num_chains=16)
    assert repr(found).endswith(f"{found.reason} {found.findings[0].next}")
    assert repr(pf.check(target, narrow)).endswith("Use pf.resample(model, guide, ...).")
    assert repr(pf.check(target, target, num_samples=500)).endswith(" sd.")


def test_a_guide_and_a_flow_print_in_a_few_lines(guide):
    assert repr(pf.AutoFlow(model)) == "AutoFlow(not set up)"
    new = pf.AutoFlow(model, small).setup(X, Y)
    assert repr(new).startswith("AutoFlow(untrained; latents w (3,))\n  GuideFlow((3,), context_dim=0, ")
    assert repr(guide).startswith("AutoFlow(trained; ")
    assert len(repr(guide).splitlines()) == 4
    flow = flows.nsf_ar(2, context_dim=3, num_transforms=2)
    head, *lines = repr(flow).splitlines()
    assert head == f"Flow((2,), context_dim=3, {sum(p.numel() for p in flow.parameters())} parameters)"
    layers = "2 Inverse(Autoregressive(RationalQuadraticSpline)), 1 Inverse(Elementwise(RationalQuadraticSpline))"
    assert lines == ["  base: StandardNormal", f"  transforms: {layers}"]
