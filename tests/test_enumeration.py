"""Enumeration: discrete latents are summed out for many draws, and sampled afterwards, as in sums by hand."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import called, sampling
from pyro import poutine
from pyro.infer import Predictive, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyro_flows as pf
from pyro_flows import AutoFlow
from pyro_flows.objectives import PathELBO
from pyro_flows.programs import Program
from pyro_flows.programs.density import Density
from pyro_flows.programs.discrete import Parallel
from pyro_flows.programs.model_and_guide import Task

DATA = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
BITS = [torch.tensor(0.0), torch.tensor(1.0)]
STATES = {f"state_{t}": torch.arange(3) for t in range(4)}
ENGINES = pytest.mark.parametrize("engine", ["vmap", "loop"])


def settled(model, *args, vectorize="auto", **settings) -> Task:
    """Return the task of a model and a new guide, whose engine is chosen."""
    return Task(Program(model, vectorize=vectorize), AutoFlow(model, **settings).setup(*args), args, {}).settle()


def terms(model, held, values, *args) -> Tensor:
    """Return the log-density at all values of discrete sites, one after the other, for one draw of the others."""
    found = []
    for row in itertools.product(*values.values()):
        data = {**held, **dict(zip(values, row, strict=True))}
        found.append(poutine.trace(poutine.condition(model, data=data)).get_trace(*args).log_prob_sum())
    return torch.stack(found)


def assert_summed(model, values, *args, **settings) -> tuple[Task, dict[str, Tensor]]:
    """Compare densities of draws with sums over the values of discrete sites; return the task and the draws."""
    task = settled(model, *args, **settings)
    draws = task.draw(6)
    for row in range(6):
        held = {name: value[row] for name, value in draws.latents.items()}
        wanted = terms(model, held, values, *args).logsumexp(0)
        torch.testing.assert_close(draws.log_p[row], wanted, rtol=1e-4, atol=1e-4)
    return task, draws.latents


def assert_drawn_jointly(model, held, values, *args) -> None:
    """Compare draws of the discrete sites, given one draw of the others, with their exact joint distribution."""
    shares = terms(model, held, values, *args).softmax(0)
    given = {name: value.expand(10_000, *value.shape) for name, value in held.items()}
    drawn, codes = settled(model, *args).complete(given), torch.zeros(10_000, dtype=torch.long)
    for name, each in values.items():
        codes = codes * len(each) + drawn[name].long()
    found = torch.bincount(codes, minlength=len(shares)) / 10_000
    assert ((found - shares).abs() < 4.5 * (shares * (1 - shares) / 10_000).sqrt() + 1e-3).all()


def parameters():
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        return weights, scale, pyro.sample("locs", dist.Normal(0.0, 10.0))


def mixture(data):
    """Model of Pyro's ``gmm.ipynb``, without its decorator."""
    weights, scale, locs = parameters()
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)


def mixture_by_hand(data):
    weights, scale, locs = parameters()
    with pyro.plate("data", len(data)):
        rows = dist.Normal(locs.unsqueeze(-2), scale.unsqueeze(-1)).log_prob(data.unsqueeze(-1))  # (*draws, 5, 2)
        pyro.factor("obs", (weights.log() + rows).logsumexp(-1))


def hidden_markov(data):
    transition = pyro.sample("transition", dist.Dirichlet(torch.eye(3) + 0.5).to_event(1))
    means = pyro.sample("means", dist.Normal(torch.tensor([0.0, 5.0, 10.0]), 1.0).to_event(1))
    state = 0
    for t in pyro.markov(range(len(data))):
        state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]))
        pyro.sample(f"obs_{t}", dist.Normal(means[state], 1.0), obs=data[t])


@ENGINES
def test_a_mixture_has_the_density_of_the_sum_by_hand(engine):
    task = settled(mixture, DATA, vectorize=engine, init_scale=0.5)
    assert task.model.enumerated == ("assignment",)
    draws = task.draw(20)
    wanted = Task(mixture_by_hand, task.guide.call, (DATA,), {}).settle().model.log_prob(draws.latents, 20)
    torch.testing.assert_close(draws.log_p, wanted, rtol=1e-5, atol=1e-4)


def test_long_chains_are_summed_at_all_values_at_once():
    """Pyro uses a dimension again for every second state; the values one after the other would be too many."""
    assert isinstance(settled(hidden_markov, torch.linspace(-1.0, 1.0, 12)).model.enumeration, Parallel)


@ENGINES
def test_a_hidden_markov_model_has_the_density_of_the_sum_over_all_paths(engine):
    assert_summed(hidden_markov, STATES, DATA[1:], vectorize=engine, init_scale=0.3)


def test_discrete_draws_have_the_marginals_of_the_mixture():
    data = torch.tensor([0.0, 1.0, 4.0, 5.5, 9.0])
    weights, scale, locs = torch.tensor([0.4, 0.6]), torch.tensor(2.5), torch.tensor([1.0, 8.0])
    given = {"weights": weights.expand(10_000, 2), "scale": scale.expand(10_000), "locs": locs.expand(10_000, 2)}
    drawn = settled(mixture, data).complete(given)["assignment"]
    wanted = (weights.log() + dist.Normal(locs, scale).log_prob(data.unsqueeze(-1))).softmax(-1)[:, 1]
    assert (drawn.double().mean(0) - wanted).abs().max() < 0.02  # four standard errors of the largest error


def test_states_of_a_chain_are_drawn_jointly():
    transition = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])
    held = {"transition": transition, "means": torch.tensor([0.0, 1.0, 2.5])}
    assert_drawn_jointly(hidden_markov, held, STATES, torch.tensor([0.5, 1.0, 1.7, 0.2]))


@pytest.mark.slow
def test_a_mixture_goes_through_all_verbs():
    guide = AutoFlow(mixture)
    fit = pf.fit_svi(mixture, guide, DATA, steps=200, progress=False)
    assert fit.losses.isfinite().all()
    assert guide.median(DATA).keys() == {"weights", "scale", "locs"}
    found = pf.psis(mixture, guide, DATA, num_samples=1000)
    by_hand = pf.psis(mixture_by_hand, guide, DATA, num_samples=1000)
    assert abs(found.log_evidence - by_hand.log_evidence) < 4 * (found.log_evidence_se + by_hand.log_evidence_se) + 0.01
    assert pf.check(mixture, guide, DATA, num_samples=500, num_chains=16).names[0] == "weights[0]"
    assert pf.refine(mixture, guide, DATA, num_samples=10, transitions=4).draws["locs"].shape == (10, 2)
    data = pf.to_arviz(mixture, guide, DATA, num_samples=30, posterior_predictive=True)
    assert data["posterior"]["assignment"].dims == ("chain", "draw", "data")
    assert data["posterior_predictive"]["obs"].shape == (1, 30, 5)
    assert pf.resample(mixture, guide, DATA, num_samples=10)["assignment"].shape == (10, 5)


def test_gradients_of_the_sum_are_those_of_the_sum_by_hand(double):
    data, found = DATA.double(), []
    guide = AutoFlow(mixture, init_scale=0.3).setup(data)
    task = Task(mixture, guide, (data,), {})
    parameters = list(guide.parameters())
    for program in (task.broadcasting, mixture_by_hand):
        pyro.set_rng_seed(1)
        loss = PathELBO(5, max_plate_nesting=1, vectorize_particles=True).differentiable_loss(program, guide, data)
        found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for one, other in zip(*found, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_the_way_of_pyro_still_works():
    """Pyro's ELBO sums out the sites that the model marks, and the guide skips them."""
    guide = AutoFlow(mixture)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    svi = pyro.infer.SVI(config_enumerate(mixture), guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert all(svi.step(DATA) < 1e6 for _ in range(5))
    assert "assignment" not in guide(DATA)


def test_guides_of_pyro_and_by_hand_leave_discrete_sites_out_too():
    guide = called(AutoNormal(poutine.block(mixture, hide=["assignment"])), DATA)
    draws = Task(mixture, guide, (DATA,), {}).settle().draw(10)
    wanted = Task(mixture_by_hand, guide, (DATA,), {}).settle().model.log_prob(draws.latents, 10)
    torch.testing.assert_close(draws.log_p, wanted, rtol=1e-5, atol=1e-4)


def coin(flips):
    bias = pyro.sample("bias", dist.Beta(2.0, 2.0))
    kind = pyro.sample("kind", dist.Bernoulli(bias))
    shape = pyro.sample("shape", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
    with pyro.plate("flips", len(flips)):
        fair = (shape * torch.tensor([0.2, 0.5, 0.9])).sum(-1)
        pyro.sample("flip", dist.Bernoulli(0.5 * kind * fair + 0.1 + 0.3 * bias), obs=flips)


def test_other_discrete_distributions_and_events():
    task, draws = assert_summed(coin, {"kind": BITS, "shape": torch.eye(3)}, torch.tensor([1.0, 0.0, 1.0]))
    drawn = task.complete(draws)
    assert (drawn["kind"].shape, drawn["shape"].shape) == ((6,), (6, 3))
    assert (drawn["shape"].sum(-1) == 1).all()


def test_scales_stand_outside_of_the_sum_and_masks_inside():
    """As in ``TraceEnum_ELBO``, a scaled mixture has s times its log-density, and masked rows are left out."""
    mask = torch.tensor([True, True, False, True, True])

    def scaled(data):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("data", len(data)), poutine.scale(scale=3.0), poutine.mask(mask=mask):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(torch.tensor([0.0, 10.0])[assignment], 1.0), obs=data)

    draws = settled(scaled, DATA).draw(3)
    likelihood = dist.Normal(torch.tensor([0.0, 10.0]), 1.0).log_prob(DATA[mask].unsqueeze(-1))
    rows = torch.logsumexp(draws.latents["weights"].log().unsqueeze(1) + likelihood, -1).sum(-1)
    wanted = dist.Dirichlet(torch.ones(2)).log_prob(draws.latents["weights"]) + 3 * rows
    torch.testing.assert_close(draws.log_p, wanted, rtol=1e-4, atol=1e-3)


def test_a_start_that_random_states_make_impossible_is_none():
    """Capture–recapture: an animal that is dead and seen later has a density of zero, but the sum is positive."""
    seen = torch.tensor([1.0, 1.0, 0.0, 1.0])

    def survival(seen):
        stays = pyro.sample("stays", dist.Uniform(0.0, 1.0))
        caught = pyro.sample("caught", dist.Uniform(0.0, 1.0))
        alive = torch.ones(())
        for t in pyro.markov(range(len(seen))):
            alive = pyro.sample(f"alive_{t}", dist.Bernoulli(stays * alive))
            pyro.sample(f"seen_{t}", dist.Bernoulli(caught * alive), obs=seen[t])

    draws = settled(survival, seen).draw(5)
    stays, caught = draws.latents["stays"], draws.latents["caught"]
    wanted = 4 * stays.log() + 3 * caught.log() + (1 - caught).log()
    torch.testing.assert_close(draws.log_p, wanted, rtol=1e-3, atol=1e-3)


def branching(y):
    """Model as in Pyro's ``intro_part_i.ipynb``: the discrete value is a key."""
    cloudy = pyro.sample("cloudy", dist.Bernoulli(0.3))
    mean = {"cloudy": 55.0, "sunny": 75.0}["cloudy" if cloudy.item() == 1.0 else "sunny"]
    heat = pyro.sample("heat", dist.Normal(mean, 10.0))
    pyro.sample("y", dist.Normal(heat, 5.0), obs=y)


def test_a_model_that_branches_on_discrete_values_is_summed_one_value_after_the_other():
    y = torch.tensor(62.0)
    task, _ = assert_summed(branching, {"cloudy": BITS}, y)
    latents = task.draw(2000).latents
    kinds = [torch.tensor(p).log() + dist.Normal(m, 10.0).log_prob(latents["heat"]) for p, m in ((0.3, 55), (0.7, 75))]
    assert abs((task.complete(latents)["cloudy"] - torch.stack(kinds).softmax(0)[0]).mean()) < 0.05
    pf.fit_svi(branching, task.guide.call, y, steps=5, progress=False)
    space = Density(task)
    before = space.constrain(space.prior(space.vectors(400, 400)))["heat"]  # in searches for other modes
    assert abs(before.mean() - 69.0) < 3.0
    assert abs(before.std() - 13.6) < 2.0


def growing(y):
    kind = pyro.sample("kind", dist.Bernoulli(0.5))
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if kind.item():
        pyro.sample("more", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def test_sites_that_only_some_discrete_values_lead_to_are_refused():
    def weigh():
        for seed in range(4):  # for each value of the first run
            pyro.set_rng_seed(seed)
            pf.psis(growing, sampling(x=dist.Normal(0.0, 1.0)), torch.tensor(1.0), num_samples=30)

    with pytest.raises(ValueError, match="other sites from run to run: 'more' is in some runs only"):
        weigh()


def crowded(y):
    with pyro.plate("rows", 12):
        k = pyro.sample("k", dist.Bernoulli(0.5))
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x + sum(float(one) for one in k), 1.0), obs=y)


def test_discrete_latents_that_cannot_be_summed_out_are_refused_with_the_site_and_the_way_out():
    words = r"discrete latents 'k' cannot be summed out: site 'y' outside of plate 'rows' .* Draw each row at a site"
    with pytest.raises(ValueError, match=words):
        AutoFlow(crowded).setup(torch.tensor(1.0))


# Sequential enumeration by row, supports that Pyro does not list, and factorial chains.


def stubborn(data, unsized=False):
    """Mixture whose rows do not broadcast over discrete values, as in Pyro's AIR and semi-supervised VAE."""
    locs = pyro.sample("locs", dist.Normal(torch.tensor([0.0, 5.0, 10.0]), 1.0).to_event(1))
    share = torch.tensor([0.5, 0.3, 0.2])
    with pyro.plate("data", None if unsized else len(data), dim=-1):
        kind = pyro.sample("kind", dist.OneHotCategorical(share.expand(len(data), 3)))
        wide = pyro.sample("wide", dist.Bernoulli(torch.full((len(data),), 0.25)))
        scale = torch.cat((wide[:, None], kind), -1)[:, 0] + 0.5
        pyro.sample("obs", dist.Normal(kind @ locs, scale), obs=data)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("unsized", [False, True])
def test_rows_that_do_not_run_at_all_values_at_once_have_a_sum_each(scale, unsized):
    def model(data):
        return poutine.scale(stubborn, scale=scale)(data, unsized)

    task = settled(model, DATA)
    draws = task.draw(2000)
    locs = draws.latents["locs"]  # (N, 3)
    rows = [
        torch.tensor(weight * share).log() + dist.Normal(locs[:, None, kind], 0.5 + wide).log_prob(DATA)
        for kind, weight in enumerate((0.5, 0.3, 0.2))
        for wide, share in ((0, 0.75), (1, 0.25))
    ]
    log_p = torch.stack(rows)
    prior = dist.Normal(torch.tensor([0.0, 5.0, 10.0]), 1.0).log_prob(locs).sum(-1)
    torch.testing.assert_close(draws.log_p, scale * (prior + log_p.logsumexp(0).sum(-1)), rtol=1e-4, atol=1e-3)
    drawn = task.complete(draws.latents)
    assert drawn["kind"].shape == (2000, 5, 3)
    shares = log_p.softmax(0).reshape(3, 2, 2000, 5).mean(2)
    torch.testing.assert_close(drawn["kind"].mean(0).T, shares.sum(1), rtol=0, atol=4 * 0.5 / 2000**0.5)
    torch.testing.assert_close(drawn["wide"].mean(0), shares.sum(0)[1], rtol=0, atol=4 * 0.5 / 2000**0.5)


def test_latents_that_discrete_ones_mask_are_refused():
    """A masked latent has no density, so the sum cannot be normalised."""

    def model(y):
        seen = pyro.sample("seen", dist.Bernoulli(0.5))
        with poutine.mask(mask=seen.bool()):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(seen * z, 1.0), obs=y)

    def setup():
        for seed in range(6):  # the first run may draw either value
            pyro.set_rng_seed(seed)
            AutoFlow(model).setup(torch.tensor(1.0))

    with pytest.raises(ValueError, match="latent site 'z' is masked"):
        setup()


def test_events_of_several_discrete_numbers_have_joint_values():
    def model(y):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        on = pyro.sample("on", dist.Bernoulli(p).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal((on * torch.tensor([1.0, 2.0, 4.0])).sum(-1), 0.5), obs=y)

    values = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    task, draws = assert_summed(model, {"on": values}, torch.tensor(3.0))
    assert task.complete(draws)["on"].shape == (6, 3)


def test_a_binomial_of_a_latent_number_of_trials_is_summed_out():
    def model(y):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        number = pyro.sample("number", dist.Binomial(4, 0.5))
        found = pyro.sample("found", dist.Binomial(number, p))
        pyro.sample("y", dist.Normal(found, 0.5), obs=y)

    with pyro.validation_enabled(False):  # more successes than trials have a density of zero
        task, _ = assert_summed(model, {"number": torch.arange(5.0), "found": torch.arange(5.0)}, torch.tensor(2.0))
    drawn = task.complete(task.draw(300).latents)
    assert (drawn["found"] <= drawn["number"]).all()


def factorial(data):
    """Two chains with a joint observation, as in model 3 of Pyro's ``hmm.py``."""
    stay = pyro.sample("stay", dist.Beta(4.0, 2.0))
    w = x = torch.tensor(0)
    for t in pyro.markov(range(len(data))):
        w = pyro.sample(f"w_{t}", dist.Bernoulli(torch.where(w == 1, stay, 1 - stay))).long()
        x = pyro.sample(f"x_{t}", dist.Bernoulli(torch.where(x == 1, 0.7 * stay, 0.2 * stay))).long()
        pyro.sample(f"y_{t}", dist.Normal((w + 2 * x).to(stay.dtype), 1.0), obs=data[t])


def test_draws_of_factorial_chains_are_joint():
    """The reference sums over the pairs of both chains at all times."""
    values = {f"{chain}_{t}": BITS for t in range(3) for chain in "wx"}
    assert_drawn_jointly(factorial, {"stay": torch.tensor(0.8)}, values, torch.tensor([0.5, 2.5, 3.0]))


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("by_rows", [False, True], ids=["joint", "rows"])
def test_predictions_have_the_discrete_latents_of_the_posterior(parallel, by_rows):
    """Pyro's ``Predictive`` samples them given the data, not from their prior."""

    def model(data):
        z = None if by_rows else pyro.sample("z", dist.Normal(0.0, 0.1))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(0.0, 0.1)) if by_rows else z
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("obs", dist.Normal(10.0 * kind + z, 1.0), obs=data)

    guide = (pf.AutoPlateFlow(model, "data") if by_rows else AutoFlow(model)).setup(DATA)
    draws = Predictive(model, guide=guide, num_samples=7, parallel=parallel)(DATA)
    assert draws["kind"].shape == (7, 5)
    assert len(draws["z"].unique()) == (35 if by_rows else 7)
    assert (draws["kind"] == (DATA > 5)).all()
    assert (draws["obs"] == DATA).all()


@pytest.mark.slow
def test_where_data_are_missing_predictions_draw_discrete_latents_as_the_model_does():
    def model(y=None, number=4):
        z = pyro.sample("z", dist.Normal(0.0, 0.1))
        with pyro.plate("rows", number):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(z, 0.01 + 5 * kind), obs=y)

    guide = AutoFlow(model).setup(torch.tensor([0.3, 2.1, -0.5, 8.0]))
    for parallel in (False, True):
        draws = Predictive(model, guide=guide, num_samples=400, parallel=parallel)(None, 4)
        torch.testing.assert_close(draws["kind"].mean(0), torch.full((4,), 0.5), rtol=0, atol=4.5 * 0.5 / 20)


def test_discrete_latents_are_those_of_the_arguments_at_hand():
    """Labels that are now data stay fixed, and a shorter series has fewer states."""

    def labelled(y, kind=None):
        z = pyro.sample("z", dist.Normal(0.0, 0.1))
        with pyro.plate("rows", len(y)):
            kind = pyro.sample("kind", dist.Bernoulli(0.5), obs=kind)
            pyro.sample("y", dist.Normal(z + 5 * kind, 1.0), obs=y)

    y, ones = torch.tensor([5.0, 0.0, 5.0]), torch.ones(3)
    guide = AutoFlow(labelled).setup(y)
    assert (Predictive(labelled, guide=guide, num_samples=5)(y, ones)["kind"] == 1).all()
    guide = AutoFlow(factorial).setup(torch.tensor([0.5, 2.5, 3.0]))
    draws = Predictive(factorial, guide=guide, num_samples=5)(torch.tensor([0.5, 2.5]))
    assert "w_1" in draws
    assert "w_2" not in draws


@pytest.mark.slow
def test_discrete_latents_of_several_chains_in_plates_are_drawn_back():
    """Pyro's own ring for samples fails here, as it does for the mixed hidden Markov models of its examples."""

    def two_chains(data):
        probs = pyro.sample("probs", dist.Beta(torch.ones(2, 2), 1.0).to_event(2))
        with pyro.plate("sequence", 3, dim=-2):
            w, x = torch.tensor(0), torch.tensor(0)
            for t in pyro.markov(range(3)):
                w = pyro.sample(f"w_{t}", dist.Bernoulli(0.2 + 0.6 * w))
                x = pyro.sample(f"x_{t}", dist.Bernoulli(0.2 + 0.6 * x))
                with pyro.plate(f"tone_{t}", 4, dim=-1):
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs[..., w.long(), x.long()]), obs=data[:, t])

    data = (torch.rand(3, 3, 4) < 0.5).float()
    guide = AutoFlow(two_chains).setup(data)
    drawn = Predictive(two_chains, guide=guide, num_samples=100)(data)
    assert {value.unique().numel() for name, value in drawn.items() if name[0] in "wx"} == {2}


@pytest.mark.parametrize("parallel", [False, True])
def test_predictions_draw_discrete_latents_in_sequential_plates(parallel):
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 0.1))
        for i in pyro.plate("rows", 3):
            kind = pyro.sample(f"kind_{i}", dist.Bernoulli(0.5))
            pyro.sample(f"y_{i}", dist.Normal(z + 9 * kind, 1.0), obs=y[i])

    y = torch.tensor([0.0, 9.0, 9.0])
    draws = Predictive(model, guide=AutoFlow(model).setup(y), num_samples=6, parallel=parallel)(y)
    assert [draws[f"kind_{i}"].flatten().tolist() for i in range(3)] == [[0] * 6, [1] * 6, [1] * 6]


def test_rows_that_see_each_other_are_refused():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            a, b = (int(one.item()) for one in kind)
            shift = torch.tensor([2.0 * a, 2.0 * b + 3.0 * (a and not b)])
            pyro.sample("y", dist.Normal(z + shift, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"'kind' cannot be .* site 'y' in plate 'rows' depends on the values"):
        AutoFlow(model).setup(torch.tensor([2.0, 3.0]))


NEXT = torch.tensor([0.5, 2.0, -1.0])


def see_next(y):
    """Let each row see the next one."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    rows = pyro.plate("rows", 3)
    with rows:
        kind = pyro.sample("kind", dist.Bernoulli(0.4))
    after = torch.cat([kind[..., 1:], kind[..., :1]], -1)
    with rows:
        pyro.sample("y", dist.Normal(z + kind + 2 * after, 1.0), obs=y)


def see_next_from_outside(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        kind = pyro.sample("kind", dist.Bernoulli(0.4))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(z + kind + 2 * kind.roll(-1, -1), 1.0), obs=y)


def one_by_one(y):
    """Have the density of ``see_next``, with a site for each row."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    kinds = [pyro.sample(f"kind_{i}", dist.Bernoulli(0.4)) for i in range(3)]
    for i in range(3):
        pyro.sample(f"y_{i}", dist.Normal(z + kinds[i] + 2 * kinds[(i + 1) % 3], 1.0), obs=y[i])


@pytest.mark.parametrize(
    ("model", "words"),
    [(see_next, "site 'y' in plate 'rows'"), (see_next_from_outside, "site 'y' outside of plate 'rows'")],
)
def test_rows_that_depend_on_each_other_are_named_with_a_way_out_that_works(model, words):
    with pytest.raises(ValueError, match=f"{words} depends on .*TraceEnum_ELBO raises no error.* Draw each row at a"):
        AutoFlow(model).setup(NEXT)
    assert_summed(one_by_one, {f"kind_{i}": BITS for i in range(3)}, NEXT)
    held = {"z": torch.tensor(0.3)}
    values = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    wanted = terms(model, held, {"kind": values}, NEXT).logsumexp(0)
    pyros = poutine.condition(config_enumerate(model), data=held)
    assert abs(-TraceEnum_ELBO(max_plate_nesting=1).loss(pyros, lambda y: None, NEXT) - wanted) > 0.01


@pytest.mark.parametrize("seed", range(3))
def test_a_branch_on_all_values_at_once_is_no_sum_at_once(seed):
    """``k.any()`` is wrong if k holds all values, so the values are enumerated sequentially."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        kind = pyro.sample("kind", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(z + 3.0 if kind.any() else z, 1.0), obs=y)

    pyro.set_rng_seed(seed)
    assert_summed(model, {"kind": BITS}, torch.tensor(0.0))


@pytest.mark.parametrize("what", ["mask", "support"])
def test_values_in_the_middle_are_looked_at_too(what):
    def model(y):
        kind = int(pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.3, 0.4]))).item())
        with poutine.mask(mask=torch.tensor(what != "mask" or kind != 1)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        trials = [1, 3, 1][kind] if what == "support" else 1
        more = pyro.sample("more", dist.Binomial(trials, 0.4))
        pyro.sample("y", dist.Normal(z + more, 1.0), obs=y)

    words = {"mask": "latent site 'z' is masked", "support": "the values that site 'more' can take depend"}[what]
    with pytest.raises(ValueError, match=words):
        AutoFlow(model).setup(torch.tensor(1.0))


def test_a_masked_discrete_latent_counts_nothing_however_it_is_summed():
    mask = torch.tensor([True, False, True])
    found = {}
    for branches in (False, True):

        def model(y, branches=branches):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", 3), poutine.mask(mask=mask):
                kind = pyro.sample("kind", dist.Bernoulli(0.3))
                mean = torch.tensor([float(one) for one in kind]) if branches else kind
                pyro.sample("y", dist.Normal(z + 4 * mean, 1.0), obs=y)

        task = settled(model, torch.tensor([0.0, 1.0, 4.0]))
        found[branches] = task.model.log_prob({"z": torch.tensor([0.0, 0.5])}, 2)
    torch.testing.assert_close(found[True], found[False])


def test_plates_that_cross_and_values_that_are_too_many_are_refused_by_name():
    def crossed(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Bernoulli(0.5))
        with columns:
            b = pyro.sample("b", dist.Bernoulli(0.5))
        with rows, columns:
            pyro.sample("y", dist.Normal(z + a * b, 1.0), obs=y)

    with pytest.raises(ValueError, match="discrete latents 'a', 'b' cannot be summed out"):
        AutoFlow(crossed).setup(torch.zeros(2, 3))

    def crowd(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        on = pyro.sample("on", dist.Bernoulli(0.5).expand([12]).to_event(1))
        pyro.sample("y", dist.Normal(z + on.sum(-1), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"'on' is discrete, and cannot be enumerated: .*more than 1000 in one event"):
        AutoFlow(crowd).setup(torch.tensor(3.0))


def test_a_discrete_latent_without_rows_in_a_plate_without_a_size_is_refused():
    """Pyro samples one value for all rows, but sums over one value per row."""

    def model(data):
        locs = pyro.sample("locs", dist.Normal(torch.tensor([0.0, 10.0]), 1.0).to_event(1))
        with pyro.plate("data"):
            kind = pyro.sample("kind", dist.Bernoulli(0.5)).long()
            pyro.sample("obs", dist.Normal(locs[..., kind], 1.0), obs=data)

    with pytest.raises(ValueError, match=r"'kind' has no dimension for the rows of plate 'data'.*pyro.plate"):
        AutoFlow(model).setup(DATA)
