"""A mask removes elements from model and guide, or is refused by name; sites that come and go are refused too."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import stirred
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal, init_to_value
from torch import Tensor

import pyro_flows as pf
from pyro_flows import AutoFlow, AutoPlateFlow, AutoStructuredFlow, check, fit_svi, flows, objectives, psis
from pyro_flows.encoders import MLPEncoder

ROWS = 10
Y = torch.linspace(-2.0, 3.0, ROWS)
SEEN = torch.arange(ROWS) % 3 != 1
ALL = torch.ones(ROWS, dtype=torch.bool)
EVIDENCE = dist.Normal(0.0, 2**0.5).log_prob(Y)


def masked(y: Tensor, seen: Any = SEEN, size: int | None = None) -> None:
    """Sample rows z ~ N(0, 1), y ~ N(z, 1), under a mask."""
    with pyro.plate("row", len(y), subsample_size=size) as rows:
        mask = seen[rows] if isinstance(seen, Tensor) and seen.dim() else seen
        with poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def hierarchy(y: Tensor, seen: Tensor = SEEN) -> None:
    """Sample rows as ``masked``, with a shared mean and a latent of two numbers per row."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), dim=-1), poutine.mask(mask=seen):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        w = pyro.sample("w", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, w.sum(-1)), obs=y)


def chain(x: Tensor, lengths: Tensor | None = None, *, latents_masked: bool = True) -> None:
    """Sample a deep Markov model without networks: a latent per time step, masked by the lengths of the series."""
    steps = x.shape[1]
    seen = torch.arange(steps) < (torch.full((len(x),), steps) if lengths is None else lengths)[:, None]
    with pyro.plate("series", len(x)):
        z = torch.zeros(len(x))
        for t in range(steps):
            with poutine.mask(mask=seen[:, t] if latents_masked else torch.tensor(True)):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            with poutine.mask(mask=seen[:, t]):
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


X, LENGTHS = torch.arange(12.0).reshape(3, 4) / 5, torch.tensor([4, 2, 3])


def small(dim: int, context_dim: int = 0) -> flows.Flow:
    return flows.realnvp(dim, context_dim, num_transforms=2, hidden_dims=(4,))


def plate_guide(model: Callable[..., Any], plate: str = "row", **settings: Any) -> AutoPlateFlow:
    return AutoPlateFlow(model, plate, local_flow=small, global_flow=small, **settings)


def counts(guide: Any, *args: Any) -> Tensor:
    """Return which rows have a density in a trace of the guide."""
    trace = poutine.trace(guide).get_trace(*args)
    trace.compute_log_prob()
    return next(site for name, site in trace.nodes.items() if name.endswith("_latent"))["log_prob"] != 0


def train(guide: Any, model: Callable[..., Any], *args: Any, steps: int = 150, lr: float = 0.05) -> list[float]:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO(num_particles=10, vectorize_particles=True))
    return [svi.step(*args) for _ in range(steps)]


GUIDES = [AutoFlow, lambda model: plate_guide(model, "series")]
either_guide = pytest.mark.parametrize("build", GUIDES, ids=["AutoFlow", "AutoPlateFlow"])

# ------------------------------------------------------------ rows removed by a mask


@pytest.mark.slow
def test_the_entropy_of_masked_rows_does_not_grow(local_params: bool) -> None:
    """Without the mask in the guide, standard deviations reached 6,270 after 150 steps, and the loss had no bound."""
    guide = plate_guide(masked)
    losses = train(guide, masked, Y)
    draws = guide.sample(2000, Y)["z"]
    assert draws.std(0).max() < 5
    assert min(losses) > -EVIDENCE[SEEN].sum() - 3  # the mean of the loss is at least this
    assert sum(losses[-20:]) / 20 < -EVIDENCE[SEEN].sum() + 1


@pytest.mark.slow
@pytest.mark.parametrize("seen", [SEEN, ~ALL, ALL, False])
def test_the_evidence_is_that_of_the_rows_that_count(seen: Any) -> None:
    guide = plate_guide(masked).setup(Y, seen)
    if seen is not False:
        train(guide, masked, Y, seen, steps=60)
    found = psis(masked, guide, Y, seen, num_samples=4000)
    rows = torch.as_tensor(seen).expand(ROWS)
    assert abs(found.log_evidence - float(EVIDENCE.where(rows, 0.0).sum())) < 0.05 + 4 * found.log_evidence_se


def test_densities_are_a_sum_over_the_rows_that_count() -> None:
    """log q of ``log_prob``, of the trace, of vectorised particles and of ``to_arviz`` agree."""
    guide = stirred(plate_guide(hierarchy).setup(Y))
    plain = copy.deepcopy(guide)
    plain._model = (lambda y, seen=None: hierarchy(y, ALL),)
    with pyro.plate("particles", 5, dim=-2):
        trace = poutine.trace(guide).get_trace(Y)
    trace.compute_log_prob()
    values = {name: trace.nodes[name]["value"] for name in ("mean", "z", "w")}
    values["mean"] = values["mean"][:, 0]
    parts = [site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample" and site["name"] != "row"]
    wanted = torch.stack([part.reshape(5, -1).sum(-1) for part in parts]).sum(0)
    torch.testing.assert_close(guide.log_prob(values, Y), wanted, rtol=1e-4, atol=1e-4)
    # The remaining rows have the density of the same guide without a mask.
    assert (guide.sample(5, Y)["z"][:, ~SEEN] == 0).all()  # the origin
    moved = {**values, "z": torch.where(SEEN, values["z"], 7.0)}
    torch.testing.assert_close(guide.log_prob(moved, Y), wanted, rtol=1e-4, atol=1e-4)
    assert (plain.log_prob(moved, Y) - plain.log_prob(values, Y)).abs().min() > 0.1
    data = pf.to_arviz(hierarchy, guide, Y, num_samples=30)
    draws = {name: torch.as_tensor(data.posterior[name].values[0].copy()) for name in values}
    log_q = torch.as_tensor(data.sample_stats["log_q"].values[0].copy()).float()
    torch.testing.assert_close(guide.log_prob(draws, Y).detach(), log_q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["vectorised", "looped"])
def test_minibatches_take_the_mask_of_their_own_rows(kind: str) -> None:
    """The loss of a minibatch of known rows is a sum by hand, scaled as Pyro scales it."""
    guide = stirred(plate_guide(masked, encoder=lambda y, *_: y[:, None]).setup(Y, SEEN, 4))
    for seed in range(4):
        pyro.set_rng_seed(seed)
        with pyro.plate("particles", 3, dim=-2) if kind == "vectorised" else poutine.block(hide=[]):
            trace = poutine.trace(guide).get_trace(Y, SEEN, 4)
        trace.compute_log_prob()
        rows = trace.nodes["row"]["value"]
        assert len(rows) == 4
        full = copy.deepcopy(guide)
        full._model = (lambda y, *_: masked(y, True),)
        values = trace.nodes["z"]["value"]
        for place, row in enumerate(rows):
            found = sum(s["log_prob"][..., place] for n, s in trace.nodes.items() if n == "z" or n.endswith("_latent"))
            assert bool((found == 0).all()) != bool(SEEN[row])
            alone = full.log_prob({"z": values[..., place, None]}, Y[row][None]).detach()
            torch.testing.assert_close(
                found.detach(), torch.where(SEEN[row], alone * ROWS / 4, 0.0), rtol=1e-4, atol=1e-4
            )


def test_a_mask_that_changes_between_calls_is_followed() -> None:
    """A mask that the model itself holds may change while the arguments stay the same."""
    own = {"seen": SEEN}

    def model(y: Tensor) -> None:
        masked(y, own["seen"])

    guide = plate_guide(model).setup(Y)
    for seen in (SEEN, ~SEEN, ALL, SEEN):
        own["seen"] = seen
        assert torch.equal(counts(guide, Y), seen)


def test_masked_rows_in_a_list_of_guides() -> None:
    guide = AutoGuideList(masked)
    guide.append(plate_guide(masked))
    guide(Y)
    assert torch.equal(counts(guide, Y), SEEN)


def test_log_prob_of_masked_rows_that_are_not_seen_is_refused() -> None:
    guide = plate_guide(masked, encoder=lambda y, *_: y[:, None]).setup(Y, SEEN, 4)
    assert guide.sample(3, Y, SEEN, 4)["z"].shape == (3, ROWS)
    with pytest.raises(ValueError, match=r"AutoPlateFlow.log_prob: latent site 'z' is masked.*4 of 10 rows.*Let the p"):
        guide.log_prob({"z": Y}, Y, SEEN, 4)


# ------------------------------------------------------------ absent elements of one vector


def missing(x: Tensor, seen: Tensor, size: int | None = None) -> None:
    """Sample rows x ~ N(mean, 1), some of them missing, and y ~ N(x, .5) of each."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x), subsample_size=size) as rows:
        value = pyro.sample("x", dist.Normal(mean, 1.0), obs=x[rows], obs_mask=seen[rows])
        pyro.sample("y", dist.Normal(value, 0.5), obs=Y[rows] + 0.1)


def missing_posterior(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return means and standard deviations of the mean and of the missing rows, and the log evidence."""
    number = 1 + len(x)
    precision, linear = torch.eye(number), torch.zeros(number)
    precision[0, 0] += len(x)
    precision[0, 1:] = precision[1:, 0] = -1.0
    precision[1:, 1:] += 4.0 * torch.eye(len(x))
    linear[1:] = 4.0 * (Y + 0.1)
    free = torch.cat((torch.tensor([True]), ~seen))
    given = torch.where(seen, x, 0.0)
    linear = linear[free] - precision[free][:, 1:] @ given
    covariance = torch.linalg.inv(precision[free][:, free])
    joint = torch.ones(len(x), len(x)) + torch.eye(len(x)) + 0.25 * torch.eye(len(x))  # of y
    cross = torch.ones(len(x), len(x)) + torch.eye(len(x))  # of x and y, and of x
    rows = torch.cat((torch.cat((cross[seen][:, seen], cross[seen]), 1), torch.cat((cross[:, seen], joint), 1)))
    evidence = dist.MultivariateNormal(torch.zeros(len(rows)), rows).log_prob(torch.cat((x[seen], Y + 0.1)))
    return covariance @ linear, covariance.diagonal().sqrt(), evidence


def largest_error(guide: Any, *args: Any) -> float:
    """Return the largest error of means, in standard deviations of the posterior, and of ratios of these."""
    loc, scale, _ = missing_posterior(Y, SEEN)
    draws = guide.sample(4000, *args)
    found = torch.cat((draws["mean"][:, None], draws["x_unobserved"][:, ~SEEN]), 1)
    return max(((found.mean(0) - loc) / scale).abs().max(), (found.std(0) / scale - 1).abs().max())


BUILDERS = {"AutoFlow": AutoFlow, "AutoStructuredFlow": AutoStructuredFlow, "AutoPlateFlow": plate_guide}


@pytest.mark.slow
@pytest.mark.parametrize("holes", [0.0, torch.nan], ids=["numbers", "NaN"])
@pytest.mark.parametrize("name", BUILDERS)
def test_missing_data_are_imputed(name: str, holes: float, local_params: bool) -> None:
    """``obs_mask`` leaves latents where data are missing, and nothing elsewhere: exact in a conjugate model."""
    x = Y.where(SEEN, holes)
    loc, scale, evidence = missing_posterior(Y, SEEN)
    guide = BUILDERS[name](missing)
    fit = fit_svi(missing, guide, x, SEEN, progress=False)
    assert largest_error(guide, x, SEEN) < 0.1
    assert bool((guide.sample(4000, x, SEEN)["x_unobserved"][:, SEEN] == 0).all())
    weighed = psis(missing, guide, x, SEEN, num_samples=2000)
    assert abs(weighed.log_evidence - evidence) < 4 * weighed.log_evidence_se + 0.01
    assert abs(fit.best_loss + evidence) < 0.1
    assert check(missing, guide, x, SEEN).trusted
    data = pf.to_arviz(missing, guide, x, SEEN, num_samples=500)
    imputed = torch.as_tensor(data.posterior["x"].values[0].copy())
    assert bool((imputed[:, SEEN] == Y[SEEN]).all())
    assert ((imputed.mean(0)[~SEEN] - loc[1:]) / scale[1:]).abs().max() < 0.3
    predicted = Predictive(missing, guide=guide, num_samples=20)(x, SEEN)
    assert bool((predicted["x"][:, ~SEEN] == predicted["x_unobserved"][:, ~SEEN]).all())
    assert bool((predicted["x"][:, SEEN] == Y[SEEN]).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AutoStructuredFlow", "AutoPlateFlow"])
def test_missing_data_in_a_subsampled_plate_are_imputed(name: str) -> None:
    guide = BUILDERS[name](missing)
    fit_svi(missing, guide, Y, SEEN, 5, steps=1500, lr=0.01, progress=False)
    assert largest_error(guide, Y, SEEN, 5) < 0.2


@pytest.mark.parametrize("name", BUILDERS)
def test_draws_of_missing_data_have_the_density_of_the_trace(name: str, local_params: bool) -> None:
    guide = stirred(BUILDERS[name](missing).setup(Y, SEEN))
    trace = poutine.trace(guide).get_trace(Y, SEEN)
    values = {name: trace.nodes[name]["value"] for name in ("mean", "x_unobserved")}
    torch.testing.assert_close(guide.log_prob(values, Y, SEEN), trace.log_prob_sum(), rtol=1e-4, atol=1e-4)
    assert bool((values["x_unobserved"][SEEN] == 0).all())
    moved = {**values, "x_unobserved": values["x_unobserved"].where(~SEEN, torch.nan)}
    torch.testing.assert_close(guide.log_prob(moved, Y, SEEN), trace.log_prob_sum(), rtol=1e-4, atol=1e-4)
    with pyro.plate("particles", 3, dim=-2):
        assert guide(Y, SEEN)["x_unobserved"].shape == (3, ROWS)
    if name == "AutoFlow":
        assert guide.latent_dim == 1 + int((~SEEN).sum())


@pytest.mark.parametrize("name", BUILDERS)
def test_a_guide_of_missing_data_is_kept_by_files(name: str, tmp_path: Path) -> None:
    guide = stirred(BUILDERS[name](missing).setup(Y, SEEN))
    pf.save(guide, tmp_path / "guide.pt")
    loaded = pf.load(tmp_path / "guide.pt")
    draws = guide.sample(5, Y, SEEN)
    if name == "AutoPlateFlow":  # rows that the model alone knows to be hidden are drawn
        assert loaded.sample(5, Y, SEEN)["x_unobserved"].shape == (5, ROWS)
        return
    torch.testing.assert_close(loaded.log_prob(draws), guide.log_prob(draws, Y, SEEN))
    assert bool((loaded.sample(5)["x_unobserved"][:, SEEN] == 0).all())


def test_another_mask_than_at_setup_is_refused() -> None:
    guide = AutoFlow(missing).setup(Y, SEEN)
    guide(Y + 1, SEEN.clone())
    with pytest.raises(ValueError, match=r"the mask of latent site 'x_unobserved' differs .* was built with"):
        guide(Y, ~SEEN)


@pytest.mark.filterwarnings("error:.*flat")
def test_absent_steps_have_no_flat_priors() -> None:
    fit_svi(walk, AutoFlow(walk), torch.zeros(6), 4, steps=2, progress=False)


def test_noise_of_a_model_is_no_dependence() -> None:
    generator = torch.Generator().manual_seed(0)

    def model(y: Tensor) -> None:
        masked(y)
        pyro.factor("noise", 0.1 * torch.randn((), generator=generator))

    assert AutoFlow(model).setup(Y).latent_dim == int(SEEN.sum())


def test_masks_of_other_shapes_are_taken_or_named() -> None:
    assert AutoFlow(levels).setup(Y, SEEN[None]).latent_dim == 1 + int(SEEN.sum())

    def wider(y: Tensor) -> None:
        with poutine.mask(mask=SEEN):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"latent site 'mean' is masked by shape \(10,\), but its batch shape is \(\)"):
        AutoFlow(wider).setup(Y)


@pytest.mark.parametrize("later", [~SEEN, ALL], ids=["others", "none"])
def test_a_flat_prior_may_stand_beside_data_under_any_mask(later: Tensor) -> None:
    def model(y: Tensor, seen: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0).mask(False))
        with pyro.plate("row", len(y)), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    for first, then in (SEEN, later), (later, SEEN):
        guide = AutoFlow(model, small).setup(Y, first)
        assert set(guide(Y + 1, then)) == {"mean"}
        assert guide.log_prob(guide.sample(2, Y, then), Y + 2, then).isfinite().all()


@pytest.mark.parametrize("name", BUILDERS)
def test_missing_counts_are_named(name: str) -> None:
    def model(x: Tensor, seen: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x, obs_mask=seen)

    with pytest.raises(ValueError, match="latent site 'x_unobserved' is discrete"):
        BUILDERS[name](model).setup(torch.ones(ROWS), SEEN)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_traced_elbo_takes_missing_data(name: str) -> None:
    guide = BUILDERS[name](missing).setup(Y, SEEN)
    svi = SVI(missing, guide, pyro.optim.Adam({"lr": 0.01}), JitTrace_ELBO(ignore_jit_warnings=True))
    assert all(torch.tensor(svi.step(Y, SEEN)).isfinite() for _ in range(2))


def test_a_flat_prior_may_stand_beside_missing_data() -> None:
    def model(x: Tensor, seen: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0).mask(False))
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x, obs_mask=seen)

    assert AutoFlow(model).setup(Y, SEEN).latent_dim == 1 + int((~SEEN).sum())


def test_absent_elements_may_have_supports_that_depend_on_other_latents() -> None:
    def model(x: Tensor, seen: Tensor) -> None:
        top = pyro.sample("top", dist.LogNormal(1.0, 0.1))
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.Uniform(0.0, top), obs=x, obs_mask=seen)

    guide = stirred(AutoFlow(model).setup(Y.abs() / 9, SEEN))
    trace = poutine.trace(guide).get_trace(Y.abs() / 9, SEEN)
    values = {name: trace.nodes[name]["value"] for name in ("top", "x_unobserved")}
    assert guide.latent_dim == 1 + int((~SEEN).sum())
    log_q = guide.log_prob(values, Y.abs() / 9, SEEN)
    torch.testing.assert_close(log_q, trace.log_prob_sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [AutoFlow, AutoStructuredFlow], ids=["AutoFlow", "AutoStructuredFlow"])
@pytest.mark.slow
def test_series_of_several_lengths_have_the_smoother_of_each(build: Callable[..., Any]) -> None:
    """Steps beyond a length are no latents: the evidence and the smoother are those of a Kalman filter."""
    guide = build(chain)
    fit_svi(chain, guide, X, LENGTHS, progress=False)
    found = psis(chain, guide, X, LENGTHS, num_samples=4000)
    assert abs(found.log_evidence - chain_evidence()) < 4 * found.log_evidence_se + 0.01
    draws = guide.sample(4000, X, LENGTHS)
    values = torch.stack([draws[f"z_{t}"] for t in range(4)], -1)  # (N, series, t)
    for row, length in enumerate(LENGTHS.tolist()):
        walk = torch.minimum(*torch.meshgrid(*2 * [torch.arange(1.0, length + 1)], indexing="ij"))
        gain = walk @ torch.linalg.inv(walk + torch.eye(length))
        scale = (walk - gain @ walk).diagonal().sqrt()
        here = values[:, row, :length]
        assert ((here.mean(0) - gain @ X[row, :length]) / scale).abs().max() < 0.1
        assert (here.std(0) / scale - 1).abs().max() < 0.1
        assert bool((values[:, row, length:] == 0).all())
    assert check(chain, guide, X, LENGTHS).trusted


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_groups_of_several_lengths_are_exact(name: str) -> None:
    groups, most = 20, 4
    lengths = torch.randint(1, most + 1, (groups,))
    y, seen = torch.randn(groups, most) + torch.randn(groups, 1), torch.arange(most) < lengths[:, None]

    def model(y: Tensor, lengths: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", groups, dim=-2):
            level = pyro.sample("level", dist.Normal(mean, 1.0))
            with pyro.plate("each", most, dim=-1):
                shown = torch.arange(most) < lengths[:, None]
                z = pyro.sample("z", dist.Normal(level, 1.0).mask(shown))
                pyro.sample("y", dist.Normal(z, 1.0).mask(shown), obs=y)

    guide = BUILDERS[name](model)
    fit_svi(model, guide, y, lengths, progress=False)
    group = torch.arange(groups)[:, None].expand(groups, most)[seen]
    ones = torch.ones(len(group))
    covariance = 1 + (group[:, None] == group).float() + 2 * torch.eye(len(group))
    evidence = dist.MultivariateNormal(torch.zeros(len(group)), covariance).log_prob(y[seen])
    found = psis(model, guide, y, lengths, num_samples=2000)
    assert abs(found.log_evidence - evidence) < 4 * found.log_evidence_se + 0.01
    draws = guide.sample(4000, y, lengths)["mean"]
    scale = float(1 - ones @ torch.linalg.solve(covariance, ones)) ** 0.5
    assert abs(draws.mean() - ones @ torch.linalg.solve(covariance, y[seen])) < 0.1 * scale
    assert abs(draws.std() / scale - 1) < 0.1


def walk(x: Tensor, length: int) -> None:
    """Sample one walk with a common scale, whose steps beyond a length do not count."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    z = torch.zeros(())
    for t in pyro.markov(range(len(x))):
        with poutine.mask(mask=t < length):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 0.5))
            pyro.sample(f"x_{t}", dist.Normal(z, scale), obs=x[t])


def test_a_sequence_ends_where_its_mask_does() -> None:
    guide = AutoStructuredFlow(walk).setup(torch.zeros(80), 66)
    ((steps, sites),) = [(sequence.steps, len(sequence.sites)) for sequence in guide.structure.sequences]
    assert (steps, sites) == (66, 80)
    draws = guide.sample(3, torch.zeros(80), 66)
    assert bool((draws["z_65"] != 0).all())
    assert bool((draws["z_66"] == 0).all())


def levels(y: Tensor, seen: Tensor) -> None:
    """Sample rows around a mean, under a mask: given n of them, the mean has precision 1 + n / 1.25."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)), poutine.mask(mask=seen):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def errors_of_the_mean(guide: Any, y: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the error of the mean of ``levels`` in standard deviations, and the ratio of standard deviations."""
    precision, draws = 1 + float(seen.sum()) / 1.25, guide.sample(4000, y, seen)["mean"]
    return (draws.mean() - y[seen].sum() / 1.25 / precision).abs() * precision**0.5, draws.std() * precision**0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AutoFlow", "AutoPlateFlow"])
def test_check_looks_at_the_rows_that_count(name: str) -> None:
    """Rows that masks hide were walked by chains, and a right guide was not trusted."""

    guide = BUILDERS[name](levels)
    fit_svi(levels, guide, Y, SEEN, progress=False)
    assert errors_of_the_mean(guide, Y, SEEN)[0] < 0.1
    assert check(levels, guide, Y, SEEN).trusted


@pytest.mark.slow
def test_many_masked_rows_start_where_the_others_do() -> None:
    """A Gaussian start that masked rows took part in left the shared mean half a standard deviation off."""
    y, seen = torch.randn(200) * 1.2 + 1, torch.arange(200) % 3 != 1
    guide = AutoStructuredFlow(levels)
    fit_svi(levels, guide, y, seen, steps=200, progress=False)
    off, ratio = errors_of_the_mean(guide, y, seen)
    assert off < 0.15
    assert abs(ratio - 1) < 0.1


# ------------------------------------------------------------ refused masks


def whole(y: Tensor) -> None:
    with poutine.mask(mask=torch.tensor(False)):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def in_part(y: Tensor) -> None:
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).mask(torch.tensor([True, False])).to_event(1))
        pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=y)


def needed(y: Tensor, seen: Tensor = SEEN) -> None:
    with pyro.plate("row", len(y)):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(level + z, 1.0), obs=y)


def prior_alone(y: Tensor) -> None:
    with pyro.plate("row", len(y)):
        with poutine.mask(mask=SEEN):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def product(y: Tensor) -> None:
    """A product of latents does not change near its zero if one of them moves."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(SEEN))
        pyro.sample("y", dist.Normal(slope * z, 1.0), obs=y)


def faint(y: Tensor) -> None:
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(SEEN))
    pyro.factor("y", torch.tensor(-5e5) - 0.1 * (z[..., 1] - 4) ** 2)


def outside(y: Tensor) -> None:
    """A guide would collapse to points: the data count for the masked rows, but their entropy does not."""
    with pyro.plate("row", len(y)), poutine.mask(mask=SEEN):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


def two_plates(y: Tensor) -> None:
    """The pattern of one latent excuses no other."""
    seen = torch.arange(300) % 2 == 0
    with pyro.plate("a", 300), poutine.mask(mask=seen):
        pyro.sample("y1", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(3.0))
    with pyro.plate("b", 300):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(seen))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(3.0))


HIDES = "the mask of latent site 'z' hides a part .* as site 'y'"


def amortised(model: Callable[..., Any]) -> AutoFlow:
    return AutoFlow(model, encoder=MLPEncoder(ROWS, context_dim=4))


REFUSED = {
    "an event": (AutoFlow, in_part, "AutoFlow: the mask of latent site 'z' divides an event"),
    "all": (AutoFlow, whole, "AutoFlow: masks hide all latents, 'mean', 'z'. Mask the observed sites only"),
    "globals": (plate_guide, whole, "AutoPlateFlow: masks hide all latents outside of plate 'row', 'mean'"),
    "part of a row": (plate_guide, in_part, "mask of latent site 'z' divides an event"),
    "prior alone": (plate_guide, prior_alone, HIDES),
    "product": (AutoFlow, product, HIDES),
    "faint": (AutoFlow, faint, HIDES),
    "outside": (plate_guide, outside, HIDES),
    "two plates": (AutoStructuredFlow, two_plates, HIDES),
    "needed": (plate_guide, needed, "the mask of latent site 'z' hides a part of it that the rest .* depends on"),
    "needed by a vector": (AutoFlow, needed, "AutoFlow: " + HIDES),
    "any dataset": (amortised, masked, "AutoFlow: latent site 'z' is masked, and other datasets may have other"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_masks_that_a_guide_cannot_take_out_are_refused(name: str) -> None:
    build, model, words = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){words}"):
        build(model).setup(Y)


def test_a_mask_that_comes_after_setup_is_refused() -> None:
    guide = AutoFlow(chain, small).setup(X, torch.full((3,), 4))
    guide(X, torch.full((3,), 4))
    with pytest.raises(ValueError, match="'z_2'"):
        guide(X, LENGTHS)
    guide(X, torch.full((3,), 4))
    guide = plate_guide(needed).setup(Y, ALL)
    with pytest.raises(ValueError, match="the mask of latent site 'z' hides a part"):
        guide(Y, SEEN)


def chain_evidence() -> Tensor:
    """Return the log evidence of :func:`chain` for ``X`` and ``LENGTHS``: each series is a Gaussian walk with noise."""
    total = torch.zeros(())
    for x, length in zip(X, LENGTHS, strict=True):
        times = torch.arange(1, int(length) + 1)
        covariance = torch.minimum(times, times[:, None]).float() + torch.eye(len(times))
        total = total + dist.MultivariateNormal(torch.zeros(len(times)), covariance).log_prob(x[: len(times)])
    return total


@pytest.mark.slow
@pytest.mark.parametrize("by_encoder", [False, True])
def test_masked_steps_of_a_series_are_absent(by_encoder: bool, local_params: bool) -> None:
    """The evidence is that of the steps that are present, also in Pyro's own loop, and a draw has one density."""
    encoder = (lambda x, lengths: x) if by_encoder else None
    guide = plate_guide(chain, "series", encoder=encoder)
    fit_svi(chain, guide, X, LENGTHS, steps=150, lr=0.03, progress=False)
    found = psis(chain, guide, X, LENGTHS, num_samples=2000)
    assert abs(found.log_evidence - chain_evidence()) < 4 * found.log_evidence_se + 0.01
    trace = poutine.trace(guide).get_trace(X, LENGTHS)
    values = {name: trace.nodes[name]["value"] for name in (f"z_{t}" for t in range(4))}
    torch.testing.assert_close(guide.log_prob(values, X, LENGTHS), trace.log_prob_sum(), rtol=1e-4, atol=1e-4)
    assert SVI(chain, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(X, LENGTHS) < 1 - chain_evidence() + 4


def test_every_way_in_which_a_row_is_hidden_is_looked_at() -> None:
    """A missing step on which the next one depends is found at setup, in later calls, and among many rows."""

    def shown_chain(x: Tensor, shown: Tensor, size: int | None = None) -> None:
        with pyro.plate("series", len(x), subsample_size=size) as rows:
            z = torch.zeros(())
            for t in range(x.shape[1]):
                with poutine.mask(mask=shown[rows, t]):
                    z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[rows, t])

    encoder = lambda x, shown, size=None: x  # noqa: E731
    ends, gap = torch.arange(4) < torch.tensor([4, 3, 2])[:, None], torch.ones(3, 4, dtype=torch.bool)
    gap[1, 1] = False
    guide = plate_guide(shown_chain, "series").setup(X, ends)
    with pytest.raises(ValueError, match=r"'z_1' hides a part of it .* depends on, as site 'z_2'"):
        guide(X, gap)
    many = torch.ones(3000, 4, dtype=torch.bool)
    many[5, 1] = False
    with pytest.raises(ValueError, match="'z_1' hides a part"):
        plate_guide(shown_chain, "series", encoder=encoder).setup(X[:1].expand(3000, 4), many)
    # Series that are padded at their ends pass, in minibatches and with other numbers of rows.
    for size in (None, 2):
        guide = plate_guide(shown_chain, "series", encoder=encoder)
        fit_svi(shown_chain, guide, X, ends, size, steps=5, progress=False)
    guide = plate_guide(shown_chain, "series", encoder=encoder).setup(X, torch.ones(3, 4, dtype=torch.bool))
    assert guide(X[:2], ends[1:])["z_3"].shape == (2,)


def test_what_is_hidden_may_stand_beside_discrete_latents() -> None:
    def model(x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("series", len(x)):
            z = 3 * pyro.sample("kind", dist.Bernoulli(torch.full((len(x),), 0.3)))
            for t in range(x.shape[1]):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    for seed in range(3):
        pyro.set_rng_seed(seed)
        assert plate_guide(model, "series").setup(X, LENGTHS)(X, LENGTHS)["z_3"].shape == (3,)


@pytest.mark.slow
def test_series_padded_to_one_length_are_fitted() -> None:
    """The recommended way out works: mask the observed sites, and leave the priors of the latents."""
    model = lambda x, lengths: chain(x, lengths, latents_masked=False)  # noqa: E731
    for guide in (AutoFlow(model, small), plate_guide(model, "series")):
        train(guide, model, X, LENGTHS, steps=60)
        assert guide.sample(1000, X, LENGTHS)["z_3"].std(0).max() < 3


@pytest.mark.slow
@pytest.mark.parametrize("build", [AutoFlow, plate_guide], ids=["AutoFlow", "AutoPlateFlow"])
def test_a_latent_masked_alone_has_a_flat_prior(build: Callable[..., Any]) -> None:
    """After Pyro's ``.mask(False)`` the prior is flat, and the guide fits the posterior under it."""

    def model(y: Tensor) -> None:
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = build(model)
    fit_svi(model, guide, Y, steps=300, num_particles=16, progress=False)
    draws = guide.sample(4000, Y)["z"]
    assert (draws.mean(0) - Y).abs().max() < 0.3
    assert (draws.std(0) - 1).abs().max() < 0.25


def test_masks_that_hide_nothing_are_welcome() -> None:
    guide = AutoFlow(masked, small).setup(Y, ALL)
    guide(Y, ALL)
    guide(Y, True)

    def wide(y: Tensor, seen: Tensor) -> None:
        with poutine.mask(mask=seen):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    assert AutoFlow(wide).setup(Y, ALL).latent_dim == 1


# ------------------------------------------------------------ refusals that need traces


def unmasked(y: Tensor) -> None:
    masked(y, True)


OBJECTIVES = {
    "PathELBO": lambda: objectives.PathELBO(),
    "vectorised PathELBO": lambda: objectives.PathELBO(num_particles=2, vectorize_particles=True),
    "PathEnumELBO": lambda: objectives.PathEnumELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    "RenyiELBO": lambda: objectives.RenyiELBO(0.5, 2),
    "ImportanceWeightedELBO": lambda: objectives.ImportanceWeightedELBO(2),
    "TemperedELBO": lambda: objectives.TemperedELBO(10, num_particles=2),
    "ForwardKL": lambda: objectives.ForwardKL(2, 10),
}


@pytest.mark.parametrize("guide", [AutoFlow, AutoNormal, plate_guide], ids=["AutoFlow", "AutoNormal", "AutoPlateFlow"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_refuse_a_mask_that_the_guide_does_not_know(name: str, guide: Callable[..., Any]) -> None:
    found = guide(unmasked)
    OBJECTIVES[name]().loss(unmasked, found, Y)
    with pytest.raises(ValueError, match=r"(ELBO|ForwardKL): latent site 'z' is masked in the model, and not in the g"):
        OBJECTIVES[name]().loss(poutine.mask(unmasked, mask=SEEN), found, Y)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_refuse_a_site_that_the_model_lacks(name: str) -> None:
    def shorter(y: Tensor) -> None:
        pyro.sample("other", dist.Normal(0.0, 1.0))

    def held(y: Tensor) -> None:
        poutine.condition(both, data={"z": Y})(y)

    def both(y: Tensor) -> None:
        unmasked(y)
        pyro.sample("other", dist.Normal(0.0, 1.0))

    guide = AutoNormal(both)
    OBJECTIVES[name]().loss(both, guide, Y)
    for model, how in ((shorter, "not in"), (held, "observed in")):
        with pytest.raises(ValueError, match=rf": site 'z' of the guide is {how} the model"):
            OBJECTIVES[name]().loss(model, guide, Y)


def test_a_point_has_no_entropy_to_mask() -> None:
    """Pyro's ``AutoDelta`` still finds the maximum of a masked model."""
    guide = AutoDelta(masked, init_loc_fn=init_to_value(values={"z": torch.full((ROWS,), 0.7)}))
    lost = -(dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.7)) + dist.Normal(0.7, 1.0).log_prob(Y))[SEEN].sum()
    assert objectives.PathELBO().loss(masked, guide, Y) == pytest.approx(float(lost), rel=1e-5)


@pytest.mark.parametrize("ask", [psis, check])
def test_diagnostics_refuse_a_mask_that_the_guide_does_not_know(ask: Callable[..., Any]) -> None:
    guide = plate_guide(unmasked)
    fit_svi(unmasked, guide, Y, steps=5, progress=False)
    with pytest.raises(ValueError, match="latent site 'z' is masked in the model, and not in the guide"):
        ask(poutine.mask(unmasked, mask=SEEN), guide, Y)


def test_a_mask_around_both_is_one_mask() -> None:
    """Pyro's way for guides written by hand works: the same handler around model and guide."""
    model, guide = (poutine.mask(one, mask=torch.tensor(False)) for one in (unmasked, AutoFlow(unmasked, small)))
    assert objectives.PathELBO().loss(model, guide, Y) == 0


# ------------------------------------------------------------ changing sites


@either_guide
def test_a_minibatch_of_fewer_time_steps_is_refused(build: Callable[..., Any], local_params: bool) -> None:
    """The entropy of missing sites would stay in the loss and grow."""
    guide = build(chain)
    svi = SVI(chain, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(X)
    with pytest.raises(ValueError, match=r"with these arguments latent site 'z_3' is not in the model.*shape \(3,\)"):
        svi.step(X[:, :3])
    svi.step(X.clone())


def test_other_shapes_are_refused_and_other_rows_are_not() -> None:
    guide = AutoFlow(chain, small).setup(X)
    with pytest.raises(ValueError, match=r"latent site 'z_0' has shape \(2,\), but the guide was built for \(3,\)"):
        guide(X[:2])
    rows = plate_guide(chain, "series", encoder=lambda x, *_: x).setup(X)
    assert rows(X[:2])["z_0"].shape == (2,)


def test_a_latent_that_is_new_or_observed_is_refused() -> None:
    def model(kind: str) -> None:
        if kind == "more":
            pyro.sample("a", dist.Normal(0.0, 1.0))
        obs = torch.tensor(0.5) if kind == "observed" else None
        pyro.sample("b", dist.Normal(0.0, 1.0), obs=obs)
        pyro.sample("c", dist.Normal(0.0, 1.0))

    guide = AutoFlow(model, small).setup("as ever")
    with pytest.raises(ValueError, match=r"the model has the latent site 'a' of shape \(\), which it had not"):
        guide("more")
    with pytest.raises(ValueError, match="with these arguments latent site 'b' is observed"):
        guide("observed")


def test_data_that_are_to_be_predicted_are_no_new_latents() -> None:
    """Pyro's ``Predictive`` runs guide and model without data, also data that come before latents."""

    def model(x: Tensor | None) -> None:
        z = torch.tensor(0.0)
        for t in range(3):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=None if x is None else x[t])

    guide = AutoFlow(model, small).setup(Y)
    found = Predictive(model, guide=guide, num_samples=4)(None)
    assert found["x_2"].shape[0] == 4


# ------------------------------------------------------------ cost of the test runs


def counted(model: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    runs: list[int] = []

    def count(*args: Any, **kwargs: Any) -> None:
        runs.append(1)
        model(*args, **kwargs)
        runs.append(-1)  # not reached if the run stops early

    return count, runs


def test_arguments_that_were_seen_are_not_looked_at_again() -> None:
    model, runs = counted(chain)
    guide = AutoFlow(model, small).setup(X)
    runs.clear()
    guide(X)
    guide(X)
    assert not runs
    other = X.clone()
    guide(other)
    assert runs == [1]  # the run stops at the last latent
    guide(other)
    assert runs == [1]
    other += 1.0  # changed in place: the same object with other contents
    guide(other)
    assert runs == [1, 1]
    guide({"x": X}["x"])
    assert runs == [1, 1, 1]


@either_guide
def test_a_look_leaves_the_random_numbers_as_they_are(build: Callable[..., Any]) -> None:
    """The test run of a model does not change the random state, even if the model draws at random."""

    def model(x: Tensor) -> None:
        with pyro.plate("series", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    guide = build(poutine.block(model, hide=["k"])).setup(X)
    found = []
    for x in (X, X.clone()):
        pyro.set_rng_seed(5)
        found.append(guide(x)["z"])
    assert torch.equal(*found)


def test_a_guide_that_was_set_up_draws_without_arguments() -> None:
    """Like Pyro's guides, ``guide()`` needs no data after the setup."""
    guide = AutoFlow(chain, small).setup(X)
    for other in (guide, copy.deepcopy(guide)):
        assert other()["z_0"].shape == (3,)


def test_copies_and_pickles_hold_no_data() -> None:
    guide = AutoFlow(chain, small).setup(X)
    assert guide._calls._last is not None
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert other._calls._last is None
    assert b"storage" not in pickle.dumps(guide._calls)


def test_rows_with_an_encoder_keep_their_mask() -> None:
    guide = plate_guide(lambda y, seen: masked(y[:, 0], seen), encoder=Rows()).setup(Y[:, None], SEEN)
    assert torch.equal(counts(guide, Y[:4, None], SEEN[:4]), SEEN[:4])


class Rows(MLPEncoder):
    """Encoder of the data alone."""

    def __init__(self) -> None:
        super().__init__(1, context_dim=2)

    def forward(self, y: Tensor, _: Tensor) -> Tensor:
        return super().forward(y)


def test_a_guide_leaves_iterators_to_the_model() -> None:
    """A test run would exhaust an iterator, so that the guide would fit the prior."""

    def model(rows: Any) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        for i, row in enumerate(rows):
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=torch.tensor(row))

    data = [5.0, 5.5, 6.0]
    guide = AutoFlow(model, small).setup(data)
    rows = iter(data)
    guide(rows)
    assert list(rows) == data
