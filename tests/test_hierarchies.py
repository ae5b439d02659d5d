"""Amortised hierarchies: one AutoPlateFlow for datasets with any number of rows, trained on simulations.

Answers for a batch of datasets are those for each alone, masked rows are as rows that are not there, and a trained
guide finds the exact posterior of a conjugate hierarchy.
"""

import copy
import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import in_groups
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor

import pyro_flows as pf
from pyro_flows import AutoFlow, AutoPlateFlow, AutoStructuredFlow, calibrate, fit_amortized, fit_svi, simulate
from pyro_flows.encoders import Arguments, MLPEncoder, SetEncoder, Standardize
from pyro_flows.fitting.amortized import PlateRows
from pyro_flows.programs.simulator import Simulator


def hierarchy(y: Tensor | None = None, groups: int = 6) -> Tensor:
    """Sample groups of three numbers around a mean of their own."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    return in_groups(mu, y, groups)


def masked(y: Tensor | None = None, present: Tensor | None = None, groups: int = 6) -> None:
    """Sample the same groups, some of which are absent."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with poutine.mask(mask=True if present is None else present):
        in_groups(mu, y, groups)


class OfRows(MLPEncoder):
    """The context of each row from its three numbers alone."""

    def forward(self, y: Tensor, *_: object, **__: object) -> Tensor:
        return super().forward(y)


def amortised(model=hierarchy, **settings) -> AutoPlateFlow:
    encoder = OfRows(3, context_dim=4, hidden_dims=(16,))
    return AutoPlateFlow(model, "group", encoder=encoder, global_encoder=SetEncoder(4, 8, (16,)), **settings)


@pytest.fixture(scope="module")
def trained() -> AutoPlateFlow:
    pyro.set_rng_seed(0)
    guide = amortised()
    fit_amortized(hierarchy, guide, simulations=100, max_epochs=2, progress=False)
    return guide


def exact(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean and standard deviation of mu, and of each theta, given groups ``(groups, 3)``."""
    within, between = 1 / 3, 0.25
    precision = 1 + len(y) / (within + between)
    centre = y.mean(-1).sum() / (within + between) / precision
    share = between / (within + between)
    mean = share * y.mean(-1) + (1 - share) * centre
    sd = (share * within + (1 - share) ** 2 / precision) ** 0.5
    return centre, precision**-0.5, mean, torch.as_tensor(sd)


@pytest.mark.filterwarnings("ignore:.*trained on 1 to 6")
def test_any_number_of_rows_and_a_batch_of_datasets(trained):
    y = torch.randn(4, 5, 3)
    draws = trained.sample(7, y, groups=5)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {"mu": (7, 4), "theta": (7, 4, 5)}
    together = trained.log_prob(draws, y, groups=5)
    assert together.shape == (7, 4)
    for place in range(4):
        alone = trained.log_prob({name: value[:, place] for name, value in draws.items()}, y[place], groups=5)
        assert torch.allclose(alone, together[:, place], atol=1e-4)
    assert trained.sample(2, torch.randn(9, 3), groups=9)["theta"].shape == (2, 9)


def test_a_row_so_far_that_its_draws_are_not_finite_is_refused(trained):
    y = torch.randn(6, 3)
    draws = trained.sample(2, y)
    y[4, 1] = -1e20
    words = "the data lie up to .*e\\+19 standard deviations from the mean of those in training. Correct the data"
    for use in (lambda y: trained.sample(2, y), lambda y: trained.log_prob(draws, y), trained.bind, trained):
        with pytest.raises(FloatingPointError, match=f"AutoPlateFlow: the draw of latent site .*, got nan: {words}"):
            use(y)


def test_a_number_of_rows_that_differs_from_the_data_is_refused(trained):
    y = torch.randn(4, 3)
    for call in (trained.sample, trained.bind):
        with pytest.raises(ValueError, match=r"has 6 rows of plate 'group', and the data have 4\. Give the model"):
            call(*[2] * (call == trained.sample), y, groups=6)


def test_rows_have_no_order(trained):
    y, order = torch.randn(6, 3), torch.randperm(6)
    draws = trained.sample(10, y)
    moved = {"mu": draws["mu"], "theta": draws["theta"][:, order]}
    assert torch.allclose(trained.log_prob(draws, y), trained.log_prob(moved, y[order]), atol=1e-4)


def test_masked_rows_are_as_rows_that_are_not_there():
    guide = amortised(masked)
    fit_amortized(masked, guide, simulations=60, max_epochs=1, progress=False)
    y, present = torch.randn(6, 3), torch.tensor([True, False, True, True, False, True])
    draws = guide.sample(10, y[present], groups=4)
    wide = {"mu": draws["mu"], "theta": torch.zeros(10, 6)}
    wide["theta"][:, present] = draws["theta"]
    y[~present] = 100.0
    assert torch.allclose(guide.log_prob(wide, y, present), guide.log_prob(draws, y[present], groups=4), atol=1e-4)
    assert Trace_ELBO().loss(masked, guide, y, present) < 1000


def test_masks_of_rows_are_those_of_one_dataset_and_of_a_guide_with_a_model(tmp_path):
    y, present = torch.randn(2, 6, 3), torch.rand(2, 6) < 0.5
    guide = AutoPlateFlow(masked, "group", encoder=Arguments(MLPEncoder(3, 4), 0), global_encoder=SetEncoder(4, 8))
    guide.setup(y[0])
    with pytest.raises(ValueError, match=r"given one by one.*Loop over them"):
        guide.sample(3, y, present)
    guide.sample(3, y[0], present[0])
    pf.save(guide, tmp_path / "guide.pt")
    with pytest.warns(UserWarning, match=r"has no model to see masks.*Leave the absent rows out"):
        pf.load(tmp_path / "guide.pt").sample(3, y[0], present[0])


def test_an_encoder_of_all_rows_is_told_from_the_global_encoder():
    guide = AutoPlateFlow(hierarchy, "group", encoder=Arguments(SetEncoder(3, 4), 0), global_encoder=SetEncoder(4, 8))
    with pytest.raises(ValueError, match=r"the encoder must return one vector for each row of plate 'group', .*\(4,\)"):
        guide.setup(torch.randn(3, 3), groups=3)


def test_double_precision_is_kept():
    def model(y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        in_groups(mu, y, 4)

    guide, y = amortised(model), torch.randn(4, 3, dtype=torch.float64)
    own = guide.setup(y).bind(y)
    assert own.sample(3, y)["theta"].dtype == torch.float64


def of_rows(y: Tensor) -> None:
    """Sample the same groups, as many as there are in the data."""
    hierarchy(y, groups=len(y))


@pytest.mark.parametrize(
    ("guide", "rows"),
    [
        (lambda: AutoFlow(of_rows), 4),
        (lambda: AutoPlateFlow(of_rows, "group"), 4),
        (lambda: AutoPlateFlow(of_rows, "group", encoder=MLPEncoder(3, 4), global_encoder=SetEncoder(4, 8)), 4),
        (lambda: AutoStructuredFlow(of_rows), 70),
    ],
    ids=["one_flow", "learned_rows", "amortised", "structured"],
)
def test_a_guide_that_is_made_double_draws_scores_trains_and_is_saved(guide, rows, tmp_path):
    y = torch.randn(rows, 3)
    narrow = guide().setup(y)
    wide, y = copy.deepcopy(narrow).double(), y.double()
    draws = wide.sample(5, y)
    assert {value.dtype for value in (*draws.values(), *wide.median(y).values(), wide.log_prob(draws, y))} == {y.dtype}
    pf.save(wide, tmp_path / "guide.pt")
    torch.testing.assert_close(pf.load(tmp_path / "guide.pt").log_prob(draws, y), wide.log_prob(draws, y))
    fit_svi(of_rows, wide, y, steps=2, progress=False)
    assert wide.sample(5, y)["theta"].dtype == y.dtype
    assert wide.float().sample(5, y.float())["theta"].dtype == torch.float32
    assert narrow.sample(5, y.float())["theta"].dtype == torch.float32


def test_the_rows_are_those_of_the_simulations():
    guide = amortised().setup(torch.randn(3, 3), groups=3)
    fit_amortized(hierarchy, guide, groups=8, simulations=40, max_epochs=1, datasets=(4, 8), progress=False)
    assert guide.row_range == (4, 8)

    def outside(y: Tensor | None = None, size: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("size", dist.Normal(torch.zeros(6), 1.0).to_event(1), obs=size)
        in_groups(mu, y)

    with pytest.raises(ValueError, match=r"'size' has 6 entries.*Draw it inside of the plate"):
        fit_amortized(outside, amortised(outside), simulations=40, progress=False)


def test_bind_makes_a_guide_of_one_dataset(trained, tmp_path):
    y = torch.randn(5, 3)
    own = trained.bind(y, groups=5)
    draws = trained.sample(20, y, groups=5)
    assert own.global_encoder is None
    assert torch.allclose(own.log_prob(draws, y, groups=5), trained.log_prob(draws, y, groups=5), atol=1e-4)
    assert Predictive(hierarchy, guide=own, num_samples=3)(y, 5)["theta"].var(0).max() > 1e-4
    fit_svi(hierarchy, own, y, groups=5, steps=2, progress=False)
    assert not torch.allclose(own.log_prob(draws, y, groups=5), trained.log_prob(draws, y, groups=5), atol=1e-4)
    pf.save(own, tmp_path / "own.pt")
    again = pf.load(tmp_path / "own.pt")
    assert torch.allclose(again.log_prob(draws, y, groups=5), own.log_prob(draws, y, groups=5), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_what_weighs_draws_takes_the_guide_and_the_bound_guide(trained):
    y = torch.randn(5, 3)
    for guide in (trained, trained.bind(y, groups=5)):
        assert pf.psis(hierarchy, guide, y, groups=5, num_samples=100).log_weights.shape == (100,)
        assert pf.resample(hierarchy, guide, y, groups=5, num_samples=10)["theta"].shape == (10, 5)


def test_it_is_a_guide_of_one_dataset_for_svi(local_params):
    guide, y = amortised(), torch.randn(6, 3)
    before = copy.deepcopy(guide.setup(y).state_dict())
    svi = SVI(hierarchy, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):  # last layers start at zero, and pass no gradient on in the first step
        svi.step(y)
    moved = [name for name, value in guide.state_dict().items() if not torch.equal(value, before[name])]
    assert all(any(part in name for name in moved) for part in ("global_encoder", "contexts.encoder"))


def test_files_hold_both_encoders(trained, tmp_path):
    with pytest.raises(ValueError, match="OfRows"):  # a class of the user
        pf.save(trained, tmp_path / "guide.pt")
    bare = AutoPlateFlow(only_data, "group", encoder=Standardize((3,)), global_encoder=SetEncoder(3, 8, (16,)))
    fit_amortized(only_data, bare, simulations=40, max_epochs=1, datasets=(2, 5), progress=False)
    pf.save(bare, tmp_path / "guide.pt")
    again = pf.load(tmp_path / "guide.pt")
    y = torch.randn(4, 3)
    draws = bare.sample(5, y)
    assert torch.allclose(again.log_prob(draws, y), bare.log_prob(draws, y), atol=1e-5)
    assert again.row_range == (2, 5)


def only_data(y: Tensor | None = None) -> None:
    hierarchy(y, 5 if y is None else y.shape[-2])


def test_a_step_sees_the_same_rows_of_data_and_latents(trained):
    known = simulate(hierarchy, num_simulations=8)
    simulator = Simulator("test", hierarchy, (), {"groups": 6})
    rows = PlateRows("test", simulator, trained, (2, 4))
    sizes = set()
    for _ in range(50):
        packed = trained.packed({"mu": known.latents["mu"], "theta": known.data["y"].sum(-1)})
        args, kwargs, (_, (z, log_det)) = rows.some(known.data, packed)
        y = kwargs.get("y", args[0] if args else None)
        assert torch.equal(y.sum(-1), z.squeeze(-1))
        assert log_det.shape == z.shape[:-1]
        sizes.add(z.shape[1])
    assert sizes == {2, 3, 4}


def test_calibrate_names_hyperparameters_and_rows(trained):
    found = calibrate(hierarchy, trained, groups=4, num_simulations=40, num_samples=20)
    assert found.names == ["mu", "theta[row]"]
    assert found.ranks.shape == (40, 2)


def test_a_number_of_rows_outside_of_training_warns():
    guide = amortised()
    fit_amortized(hierarchy, guide, simulations=40, max_epochs=1, datasets=(3, 5), progress=False)
    with pytest.warns(UserWarning, match="have 6 rows of plate 'group', and the guide was trained on 3 to 5"):
        guide.sample(2, torch.randn(6, 3))


def flat(y: Tensor | None = None) -> None:
    in_groups(0.0, y)


def test_what_does_not_fit_is_refused_with_the_way_out():
    encoder, pool, wide, y = OfRows(3, 4), SetEncoder(4, 8), MLPEncoder(4, 2), torch.randn(6, 3)
    build = functools.partial(AutoPlateFlow, hierarchy, "group")
    fit = functools.partial(fit_amortized, hierarchy, simulations=40, progress=False)
    for words, call in {
        "global_encoder takes the contexts .*Give encoder=": lambda: build(global_encoder=pool),
        "global_encoder must be a network": lambda: build(encoder=encoder, global_encoder=3),
        "one kind is missing.*Use AutoFlow": lambda: amortised(flat).setup(y),
        r"one vector \(n,\), got shape \(6, 2\)": lambda: build(encoder=encoder, global_encoder=wide).setup(y),
        "without a global_encoder.*Give both": lambda: fit(build(encoder=encoder)),
        "for an AutoPlateFlow, got .* for AutoFlow": lambda: fit(AutoFlow(hierarchy, encoder=encoder), datasets=(1, 2)),
        r"from 1 to the 6 rows.*got \(1, 9\)": lambda: fit(amortised(), datasets=(1, 9)),
        "bind: the guide has no global_encoder": lambda: build(encoder=encoder).bind(y),
    }.items():
        with pytest.raises((TypeError, ValueError), match=words):
            call()
    for wrong in (5, (0, 3), (4, 2), (2.5, 4)):
        with pytest.raises(ValueError, match=r"datasets must be .* integers"):
            fit(amortised(), datasets=wrong)


@pytest.mark.slow
def test_a_trained_guide_finds_the_exact_posterior():
    """Means lie within .1 standard deviations and ratios of standard deviations in .93 to 1.07, for unseen sizes."""
    pyro.set_rng_seed(1)
    guide = amortised()
    fit_amortized(hierarchy, guide, groups=20, simulations=6000, max_epochs=40, progress=False)
    for groups in (2, 7, 19):
        errors, ratios = [], []
        for y in simulate(hierarchy, groups=groups, num_simulations=20).data["y"]:
            draws, (centre, sd, mean, each) = guide.sample(4000, y, groups=groups), exact(y)
            errors += [(draws["mu"].mean() - centre) / sd, *((draws["theta"].mean(0) - mean) / each)]
            ratios += [draws["mu"].std() / sd, *(draws["theta"].std(0) / each)]
        assert torch.stack(errors).square().mean().sqrt() < 0.1
        assert 0.93 < torch.stack(ratios).median() < 1.07
    assert calibrate(hierarchy, guide, groups=5, num_simulations=500, num_samples=200).calibrated


@pytest.mark.slow
def test_check_takes_the_guide_of_one_dataset():
    guide, y = amortised(), torch.randn(5, 3)
    fit_amortized(hierarchy, guide, simulations=2000, max_epochs=20, progress=False)
    own = guide.bind(y, groups=5)
    fit_svi(hierarchy, own, y, groups=5, progress=False)
    assert pf.check(hierarchy, own, y, groups=5).trusted
