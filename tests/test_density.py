"""Densities of tables, in nats of the unscaled table.

Fits find known densities at all scales, with contexts and encoders, from tensors, arrays, frames and loaders.  Outliers
do no harm, integers have a mass, and runs stop and resume.  Columns without a density are an error or a warning before
training.
"""

import copy
import functools
import itertools
import math
import pickle
from typing import Any

import laws
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from grouped_options import grouped
from models import silent
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from pyro_flows import Fit, Flow, dequantize, fit_density, flows, load, save
from pyro_flows.distributions import NormalBase, StudentTBase
from pyro_flows.encoders import MLPEncoder, Standardize
from pyro_flows.flows.distribution import Columns
from pyro_flows.training import loop
from pyro_flows.transforms import ActNorm, FixedAffine, LULinear, Orthogonal

small = functools.partial(flows.nsf, num_transforms=2, hidden_dims=(16,))


def quick(flow: Any, x: Any, *args: Any, **settings: Any) -> Fit:
    """Fit in two epochs; options of training may be given one by one."""
    return fit_density(flow, x, *args, **{"max_epochs": 2, "progress": False, **grouped(settings)})


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


LOC, TRIL = torch.tensor([1e4, -3e-4]), torch.tensor([[10.0, 0.0], [8e-5, 6e-5]])
TARGET = dist.MultivariateNormal(LOC.double(), scale_tril=TRIL.double())


def correlated(rows: int, seed: int = 0) -> Tensor:
    """Return normals with correlation 0.8: 1e4 ± 10, and -3e-4 ± 1e-4."""
    return (LOC + normal(rows, 2, seed=seed) @ TRIL.T).float()


# -------------------------------------------------------------------------------------------------------- known answers


def test_a_density_of_bad_scales_is_found_in_nats_of_the_data() -> None:
    x, unseen = correlated(2000).double(), correlated(2000, seed=1).double()
    flow = small(2).double()
    fit = quick(flow, x, max_epochs=10, lr=0.01)
    gap = TARGET.log_prob(unseen) - flow.log_prob(unseen)  # its mean is the divergence, which is not negative
    assert -4 * gap.std().item() / math.sqrt(2000) < gap.mean().item() < 0.06
    assert (gap - gap.mean()).abs().quantile(0.9) < 0.5
    assert fit.guide is flow
    assert not flow.training
    assert fit.losses[-20:].mean().item() == pytest.approx(TARGET.entropy().item(), abs=0.15)
    assert fit.held_out.min().item() == fit.best_loss
    assert fit.stopped == "steps"
    draws = flow().sample((5000,))
    assert ((draws.mean(0) - LOC) / TARGET.stddev).abs().max() < 0.1
    assert (draws.T.cov() / TARGET.covariance_matrix - 1).abs().max() < 0.15


@pytest.mark.slow
def test_a_conditional_density_of_bad_scales_is_found() -> None:
    """y ~ N(±(c - 5000), 1): two crossing lines, with contexts in the thousands."""
    context = 5000 + 100 * normal(2000, 1, seed=1)
    side = torch.where(torch.arange(2000) % 2 == 0, 1.0, -1.0)[:, None]
    x = 7 + 0.03 * (side * (context - 5000) / 100 + 0.3 * normal(2000, 1))
    flow = flows.nsf(1, context_dim=1, num_transforms=2, hidden_dims=(32,))
    fit = quick(flow, x, context, max_epochs=15, lr=0.01)
    halves = [dist.Normal(7 + 0.03 * s * (context - 5000) / 100, 0.009).log_prob(x) for s in (1, -1)]
    exact = torch.logsumexp(torch.stack(halves), 0) - math.log(2)
    gap = (exact.squeeze(1) - flow.log_prob(x, context)).mean().item()
    assert -0.03 < gap < 0.12
    assert abs(fit.best_loss + exact.mean().item()) < 0.25
    assert isinstance(flow.encoder, Standardize)
    assert flow.encoder.loc.item() == pytest.approx(5000, abs=15)
    assert flow.encoder.scale.item() == pytest.approx(100, rel=0.1)
    assert flow(context[:5]).sample((3,)).shape == (3, 5, 1)


MIX = normal(5, 5, seed=103)


def outlying(rows: int, seed: int, far: float = 50.0) -> Tensor:
    """Return five correlated normals, with five rows many standard deviations away."""
    x = normal(rows, 5, seed=seed) @ MIX
    if far:
        x[:: rows // 5][:5] = far * MIX.norm(dim=0) * nn.functional.normalize(normal(5, 5, seed=seed + 1), dim=1)
    return x


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [flows.maf, flows.nsf, flows.nsf_ar])
def test_outliers_do_no_harm(recipe: Any) -> None:
    """Networks are arbitrary far from the data: an affine map may send new outliers to 1e5."""
    x, others, clean = outlying(1000, 30), outlying(1000, 40), outlying(1000, 50, far=0.0)
    flow = recipe(5, num_transforms=2, hidden_dims=(32,))
    assert quick(flow, x, max_epochs=15, batch_size=60, lr=0.01).skipped == 0
    assert isinstance(flow.base, StudentTBase)
    gaussian = dist.MultivariateNormal(x.mean(0), x.T.cov())
    with torch.no_grad():
        for rows in (x, others, clean):
            nats = flow.log_prob(rows)
            assert nats.isfinite().all()
            assert nats.mean() > gaussian.log_prob(rows).mean() + 1
    exact = dist.MultivariateNormal(torch.zeros(5), MIX.T @ MIX)
    assert (exact.log_prob(clean) - flow.log_prob(clean)).mean() < 0.5


def test_only_outliers_change_the_base() -> None:
    x = outlying(200, 3)
    for rows, outliers in ((normal(200, 5), False), (x, True)):
        for heavy_tails in (None, not outliers):  # by default, the rows decide
            changed = outliers if heavy_tails is None else heavy_tails
            assert isinstance(quick(small(5), rows, heavy_tails=heavy_tails).guide.base, StudentTBase) == changed
    laplace = dist.Laplace(torch.zeros(5), 1.0).to_event(1)
    assert quick(Flow(small(5).transforms, laplace), x).guide.base.distribution is laplace
    trained = quick(small(5), normal(200, 5)).guide
    assert not isinstance(quick(trained, x).guide.base, StudentTBase)  # the density would jump
    assert quick(small(5).double(), x).guide.base.free_df.dtype == torch.float64


@pytest.mark.slow
def test_integers_get_a_mass() -> None:
    """The mean log-density with noise bounds the log-mass, and the entropy is a lower bound of its mean."""
    k = torch.distributions.Poisson(3.0).sample((2000,))
    x = torch.stack((k, 0.5 * k + normal(2000)), 1)
    flow = flows.nsf(2, num_transforms=2, hidden_dims=(32,))
    with silent():
        fit = quick(flow, x, discrete=[0], max_epochs=12, lr=0.01)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    rows = x[order[:1800]].double()
    spread = rows.var(0, correction=0) + torch.tensor([1 / 12, 0])
    torch.testing.assert_close(flow.transforms[-1].loc.double(), rows.mean(0) + torch.tensor([0.5, 0]))
    torch.testing.assert_close(flow.transforms[-1].scale.double(), spread.sqrt())
    support = torch.arange(30.0)
    p = torch.distributions.Poisson(3.0).log_prob(support)
    entropy = -(p.exp() * p).sum().item() + dist.Normal(0.0, 1.0).entropy().item()
    error = math.sqrt(1 / 200)
    assert -4 * error < fit.best_loss - entropy < 0.2 + 4 * error
    # The noise of held-out rows is fixed, so the kept state reproduces its stated loss.
    noisy = dequantize(x[order[1800:]], [0], generator=torch.Generator().manual_seed(0))
    assert -flow.log_prob(noisy).mean().item() == pytest.approx(fit.best_loss, abs=1e-4)


def test_a_flow_of_integers_draws_integers_and_warns_of_them(tmp_path: Any) -> None:
    x = torch.stack((normal(300), torch.arange(300.0) % 3 - 1), 1)
    fitted = quick(small(2), pd.DataFrame(x.numpy(), columns=["size", "sign"]), discrete=["sign"]).guide
    save(fitted, tmp_path / "flow")
    for flow in (fitted, load(tmp_path / "flow"), copy.deepcopy(fitted)):
        assert flow.columns == Columns(("size", "sign"), ((1, -1.0, 1.0),))
        for draws in (flow.sample((500,)), flow.sample((500,), chunk_size=99), flow().sample((500,))):
            assert set(draws[:, 1].tolist()) == {-1.0, 0.0, 1.0}
            assert not (draws[:, 0] == draws[:, 0].round()).any()
        assert not (flow().rsample((50,)) == flow().rsample((50,)).round()).all(0).any()
        for score in (flow.log_prob, flow().log_prob):
            with pytest.warns(UserWarning, match=r"in columns 'sign', .*dequantize\(value, \[1\]\)") as caught:
                score(x)
            assert caught[0].filename == __file__
            with silent():
                score(dequantize(x, [1]))
    with silent():
        quick(fitted, x, discrete=[1])  # judges no rows
    assert fitted.columns.names == ("size", "sign")
    assert quick(small(2), normal(300, 2)).guide.columns is None


def test_angles_keep_their_scale() -> None:
    angle = 0.3 * normal(500) + math.pi  # across the seam
    x = torch.stack((torch.remainder(angle + math.pi, 2 * math.pi) - math.pi, 100 + 5 * normal(500, seed=1)), 1)
    flow = flows.circular_coupling(2, circular=[True, False], num_transforms=2, hidden_dims=(8,))
    fit = quick(flow, x, max_epochs=8, lr=0.01)
    affine = flow.transforms[-1]
    assert (affine.loc[0], affine.scale[0]) == (0, 1)
    assert affine.loc[1].item() == pytest.approx(100, abs=1)
    torch.testing.assert_close(flow.log_prob(x + torch.tensor([2 * math.pi, 0])), flow.log_prob(x), atol=1e-3, rtol=0)
    assert fit.best_loss < math.log(2 * math.pi) + dist.Normal(0.0, 5.0).entropy().item() - 0.3


# ---------------------------------------------------------------------------------------------------------- types of x


def losses_of(x: Any, *context: Any, dim: int = 2, **settings: Any) -> Tensor:
    pyro.set_rng_seed(3)
    return quick(small(dim, len(context)), x, *context, **settings).losses


def test_tables_of_every_kind_are_the_same_table() -> None:
    x = normal(100, 2).double()
    wanted = losses_of(x.float())
    assert len(wanted) == 2 * (90 // 32)
    backwards = x.flip(0, 1).numpy()[::-1, ::-1]
    for other in (x, x.numpy(), x.numpy().astype(np.float32), backwards, pd.DataFrame(x.numpy()), x.requires_grad_()):
        assert torch.equal(losses_of(other), wanted)
    assert torch.equal(*(losses_of(column, dim=1) for column in (normal(50, 1), normal(50).numpy())))
    k = (100 * normal(100, 2)).round()
    assert torch.equal(losses_of(k, discrete=[0, 1]), losses_of(k.long(), discrete=[0, 1]))
    frame = pd.DataFrame(k.numpy(), columns=["a", "b"])
    assert torch.equal(losses_of(frame, discrete=["b", "a"]), losses_of(k, discrete=[1, 0]))
    for columns in (np.array([1, 0]), pd.Index(["b", "a"])):
        assert torch.equal(losses_of(frame, discrete=columns), losses_of(k, discrete=[1, 0]))


def test_contexts_of_every_kind_are_the_same_context() -> None:
    x, context = normal(60, 2), normal(60, seed=1)
    wanted = losses_of(x, context[:, None])
    for other in (context, context.numpy(), pd.Series(context.numpy()), context.double()):
        assert torch.equal(losses_of(x, other), wanted)
    labels = torch.arange(60) % 3
    flow = Flow(small(2, 2).transforms, encoder=nn.Sequential(nn.Embedding(3, 2)))
    assert quick(flow, x, labels).losses.isfinite().all()  # integers reach an encoder unchanged
    assert quick(small(2, 1), x, labels).losses.isfinite().all()


def test_a_data_set_in_a_loader_is_divided() -> None:
    x, sizes = normal(100, 2), []

    def collate(rows: list[Tensor]) -> Tensor:
        sizes.append(len(rows))
        return torch.stack(rows)

    fit = quick(small(2), DataLoader(list(x), batch_size=32, collate_fn=collate))
    assert fit.steps == 2 * 3  # batches of 32, 32 and 26
    assert sizes == 3 * [32, 32, 26, 10]  # once to inspect, then once per epoch
    assert len(fit.held_out) == 2
    dropped = quick(small(2), DataLoader(TensorDataset(x), batch_size=32, drop_last=True, shuffle=True))
    assert dropped.steps == 2 * 2


def test_batches_may_come_from_anywhere_if_others_judge() -> None:
    x, context = normal(90, 2), normal(90, 1, seed=1)

    class Pairs(IterableDataset):
        def __iter__(self) -> Any:
            return iter(zip(x, context, strict=True))

    pairs = list(zip(x.split(30), context.split(30), strict=True))
    sampler = WeightedRandomSampler(torch.ones(90), 90)
    judges = [(x[:20], context[:20]), (x[:20].numpy(), context[:20].numpy()), pairs, DataLoader(Pairs(), batch_size=9)]
    sources = [pairs, DataLoader(Pairs(), batch_size=30),
               DataLoader(TensorDataset(x, context), batch_size=30, sampler=sampler)]  # fmt: skip
    for source, judge in [*itertools.product(sources, judges[:1]), *itertools.product(sources[:1], judges)]:
        with silent():  # rows repeated by a sampler are no reason for one
            assert quick(small(2, 1), source, validation=judge).steps == 6
    for source in sources:
        with pytest.raises(ValueError, match=r"x is a .*no rows of it can be held out; give others .*validation="):
            quick(small(2, 1), source)
    judged = quick(small(2), x, validation=x[:20])
    assert judged.steps == 2 * (90 // 32)  # all rows are used for training
    torch.testing.assert_close(judged.guide.transforms[-1].loc.detach(), x.mean(0))
    assert -judged.guide.log_prob(x[:20]).mean().item() == pytest.approx(judged.best_loss, abs=1e-4)


# -------------------------------------------------------------------------------------------------------- initial state


def test_a_new_flow_is_standardised_by_the_rows_it_is_trained_on() -> None:
    x = correlated(200)
    rows = x[torch.randperm(200, generator=torch.Generator().manual_seed(0))[:180]].double()
    for flow in (small(2), Flow([*small(2).transforms, FixedAffine(2)])):
        quick(flow, x)
        affine = flow.transforms[-1]
        assert isinstance(affine, FixedAffine)
        assert sum(isinstance(t, FixedAffine) for t in flow.transforms) == 1
        torch.testing.assert_close(affine.loc.double(), rows.mean(0))
        scale = affine.scale.diagonal() if affine.dense else affine.scale
        torch.testing.assert_close(scale.double(), rows.std(0, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("context_dim", [0, 2], ids=["plain", "context"])
@pytest.mark.parametrize("name", laws.RECIPES)
def test_flows_of_every_recipe_are_new_until_they_are_trained(name: str, context_dim: int) -> None:
    x = 1e3 + normal(60, 2)
    flow = laws.RECIPES[name](2, context_dim, num_transforms=2, hidden_dims=(8,))
    for rows in (x, x + 0.1):
        fit = quick(flow, rows, normal(60, 2) if context_dim else None, max_epochs=1, lr=0.05)
        assert fit.losses.isfinite().all()
        assert fit.best_loss < 10
        assert sum(isinstance(t, FixedAffine) for t in flow.transforms) == 1


def test_a_rotation_that_was_learned_is_not_new() -> None:
    x = normal(500, 2) * torch.tensor([3.0, 1.0])
    turn = Orthogonal(2)
    nn.init.constant_(turn.params, 0.5)
    for learned in ([turn], []):
        flow = quick(Flow([*learned, LULinear(2, rotation_seed=0)], NormalBase(2)), x).guide
        assert any(isinstance(t, FixedAffine) for t in flow.transforms) == (not learned)


def test_layers_that_start_from_data_see_standardised_ones() -> None:
    x = correlated(500)
    quick(Flow([LULinear(2), bent := ActNorm(2)]), x, lr=1e-9)
    assert bent.loc.abs().max() < 1e-4
    flow = Flow([LULinear(2), bent := ActNorm(2)])
    quick(flow, normal(500, 2) * 3 + 5, lr=1e-9, standardize=False)
    assert not any(isinstance(t, FixedAffine) for t in flow.transforms)
    torch.testing.assert_close(bent.loc.detach(), torch.tensor([5.0, 5.0]), rtol=0, atol=0.5)
    torch.testing.assert_close(bent.log_scale.exp().detach(), torch.tensor([3.0, 3.0]), rtol=0.1, atol=0)
    assert quick(flows.nice(2).inv, x).losses.isfinite().all()  # a flow whose layers cannot be initialised from data


@pytest.mark.slow
def test_a_second_fit_goes_on() -> None:
    flow, x, context = small(2, 1), correlated(500), normal(500, 1)
    first = quick(flow, x, context, max_epochs=8, lr=0.01)
    fixed = [p.clone() for p in (*flow.transforms[-1].parameters(), *flow.encoder.parameters())]
    depth = len(flow.transforms)
    second = quick(flow, x + torch.tensor([1.0, 1e-5]), context + 0.1, max_epochs=1, lr=1e-7)
    assert second.losses.mean() < first.losses[:5].mean()
    assert len(flow.transforms) == depth
    assert all(map(torch.equal, fixed, (*flow.transforms[-1].parameters(), *flow.encoder.parameters())))
    trained = laws.randomise(small(2), scale=0.3)
    quick(trained, normal(50, 2))
    assert not any(isinstance(t, FixedAffine) for t in trained.transforms)  # the flow was built for unscaled data


def test_only_what_has_a_gradient_is_handed_to_the_optimiser(monkeypatch: Any) -> None:
    seen, fit = [], loop.Descent.fit

    def watched(descent: loop.Descent) -> Any:
        seen.extend(p for o in descent.optimizers for group in o.param_groups for p in group["params"])
        descent.loss().backward()
        return fit(descent)

    monkeypatch.setattr(loop.Descent, "fit", watched)
    flow = Flow(small(2, 4).transforms, encoder=MLPEncoder(3, 4, (8,)))
    frozen = flow.transforms[0].conditioner.output.bias.requires_grad_(False)
    before = frozen.clone()
    quick(flow, correlated(100), normal(100, 3))
    assert all(p.grad is not None for p in seen)
    assert torch.equal(frozen, before)
    held = {id(p) for p in (*flow.transforms[-1].parameters(), *flow.encoder.standardize.parameters(), frozen)}
    assert {id(p) for p in seen} == {id(p) for p in flow.parameters()} - held


def test_what_was_fitted_is_saved_whole(tmp_path: Any) -> None:
    x, context = outlying(200, 3), 50 + normal(200, 2)
    flow = quick(small(5, 2), x, context).guide
    save(flow, tmp_path / "flow")
    assert torch.equal(load(tmp_path / "flow").log_prob(x, context), flow.log_prob(x, context))


# ---------------------------------------------------------------------------------------------- stopping and resuming


def test_early_stopping_restores_the_best_averaged_state() -> None:
    x = normal(100, 3)
    flow = flows.nsf(3, num_transforms=2, hidden_dims=(64,))
    fit = quick(flow, x, max_epochs=300, batch_size=35, lr=0.02, validation=0.3, patience=4)
    assert fit.stopped == "held-out"
    assert fit.steps == 2 * len(fit.held_out) < 600
    best = int(fit.held_out.argmin())
    assert len(fit.held_out) == best + 1 + 4
    assert (fit.best_step, fit.best_loss) == (2 * (best + 1), fit.held_out[best].item())
    held = x[torch.randperm(100, generator=torch.Generator().manual_seed(0))[70:]]
    assert -flow.log_prob(held).mean().item() == pytest.approx(fit.best_loss, abs=1e-4)


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Any) -> None:
    x = normal(100, 2)
    quick(small(2), x, checkpoint=tmp_path / "run")
    same = DataLoader(TensorDataset(x), batch_size=32)
    others = {"batch_size": 20}, {"validation": x}, {"validation": 0.2}
    for other, settings in ((-x, {}), (same, {}), *((x, settings) for settings in others)):
        with pytest.raises(ValueError, match=r"fit_density: checkpoint='.*/run' is of another run"):
            quick(small(2), other, checkpoint=tmp_path / "run", **settings)
    with pytest.raises(ValueError, match=r"cannot be written \(there is no folder"):
        quick(small(2), x, checkpoint=tmp_path / "no" / "run")


def test_progress_shows_held_out_nats(capsys: Any) -> None:
    fit = fit_density(small(2), normal(100, 2), max_epochs=2)
    assert f"held-out loss {fit.held_out[-1].item():.3f} nats" in capsys.readouterr().err
    quick(small(2), normal(100, 2))
    assert capsys.readouterr().err == ""


def test_steps_that_are_not_finite_are_skipped_or_end_the_run() -> None:
    class Broken(ActNorm):
        calls = 0

        def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            self.calls += self.training
            x, log_det = super().inverse_and_log_det(y, context)
            return x, log_det * (math.nan if self.training and self.calls % 3 == 0 else 1)

    class Worse(ActNorm):
        def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return super().inverse_and_log_det(y, context)[0] / 0, torch.zeros(len(y))

    fit = quick(Flow([*small(2).transforms, Broken(2)]), normal(200, 2), batch_size=30)
    assert 0 < fit.skipped < fit.steps
    assert math.isfinite(fit.best_loss)
    for layer, words in (
        (Broken(2), "all layers are finite on 180 rows, so the gradient is at fault"),
        (Worse(2), r"transforms\[\d\] of the flow, Worse, maps data to NaN or inf"),
    ):
        with pytest.raises(FloatingPointError, match=words):
            quick(Flow([*small(2).transforms, layer]), normal(200, 2), batch_size=30, on_nonfinite="raise")


# ------------------------------------------------------------------------------------------------------------ warnings


def test_spikes_are_told_of_once_by_column() -> None:
    x = normal(1000, 4)
    x[:, 1] = (10 * x[:, 1]).round() / 10
    x[:, 2] = (3 * x[:, 2]).round()
    x[:100, 3] = 0.0
    with pytest.warns(UserWarning, match="fit_density: column 1 holds multiples of 0.1") as told:
        quick(small(4), x, max_epochs=1)
    (words,) = [str(warning.message) for warning in told]
    for part in ("column 2 holds integers (", "column 3 repeats a value (0 in ", "without bound", "discrete=[...]"):
        assert part in words
    assert "column 0" not in words
    assert told[0].filename == __file__
    frame = pd.DataFrame({"a": x[:, 0].numpy(), "rooms": x[:, 2].numpy()})
    with pytest.warns(UserWarning, match="column 'rooms' holds integers"):
        quick(small(2), frame, max_epochs=1)
    with pytest.warns(UserWarning, match=r"4\d % of the rows are copies of others"):
        quick(small(2), normal(100, 2).repeat(2, 1), max_epochs=1)


def test_columns_that_determine_one_another_are_told_of() -> None:
    x = normal(500, 3)
    x[:, 2] = x[:, 0] - x[:, 1]
    with pytest.warns(UserWarning, match="column 0, column 1, column 2 determine one another .* Leave one of them"):
        quick(small(3), x, max_epochs=1)


def test_there_is_nothing_to_tell_of_spread_or_continuous_columns() -> None:
    x = normal(1000, 2)
    x[:, 1] = (3 * x[:, 1]).round()
    with silent():
        quick(small(2), normal(1000, 2), max_epochs=1)
        quick(small(2), x, max_epochs=1, discrete=[1])
        quick(small(2), dequantize(x), max_epochs=1)


def test_columns_whose_digits_are_lost_are_told_of() -> None:
    x = normal(100, 2).double() + torch.tensor([0.0, 1e6])
    with pytest.warns(UserWarning, match=r"torch.float32 rounds column 1 \(to 0.1 sd\), so far from zero; .*double"):
        quick(small(2), x, max_epochs=1)
    with silent():
        quick(small(2).double(), x, max_epochs=1)
        quick(small(2), torch.stack((x[:, 0], torch.full((100,), 7.0)), 1), max_epochs=1, discrete=[1])


# -------------------------------------------------------------------------------------------------------------- errors


def refused(words: str, flow: Any, *args: Any, error: type = ValueError, **settings: Any) -> None:
    """Assert the error message, and that the flow is unchanged."""
    before = copy.deepcopy(flow)
    with pytest.raises(error, match=words):
        quick(flow, *args, **settings)
    if isinstance(flow, Flow):
        assert len(flow.transforms) == len(before.transforms)
        assert flow.encoder is None or before.encoder is not None
        assert all(map(torch.equal, flow.parameters(), before.parameters()))


def test_what_is_no_flow_over_vectors_is_refused() -> None:
    refused("flow must be a Flow, .* got nsf, uncalled", flows.nsf, normal(50, 2), error=TypeError)
    refused("flow must be a Flow, .* got Linear", nn.Linear(2, 2), normal(50, 2), error=TypeError)
    refused("the flow has no parameters to train", small(2).requires_grad_(False), normal(50, 2))


def test_rows_that_do_not_fit_the_flow_are_refused() -> None:
    flow = small(3)
    for shape in ((50,), (50, 2), (50, 3, 1), (3,), ()):
        refused(rf"x must have shape \(N, 3\), .*got \({', '.join(map(str, shape))}", flow, torch.zeros(shape))
    refused(r"x must hold at least 20 rows, got 19", flow, normal(19, 3))
    refused(r"validation must have shape \(N, 3\)", flow, normal(50, 3), validation=normal(50, 2))
    refused(r"some rows to train on and some to judge by, got 50 and 0", flow, normal(50, 3), validation=normal(0, 3))
    refused(r"a batch must have shape \(N, 3\)", flow, DataLoader(TensorDataset(normal(50, 2))))
    refused("x must hold real numbers", flow, normal(50, 3).half())
    refused("x must hold real numbers", flow, normal(50, 3).to(torch.complex64))
    refused("column 'town' holds 'Rome'", flow, pd.DataFrame({"a": range(30), "town": "Rome", "c": 1.0}))
    frame = pd.DataFrame(normal(100, 2).numpy(), columns=["a", "b"])
    refused("columns of x in their order", small(2), frame, validation=frame[["b", "a"]])


def test_contexts_that_do_not_fit_are_refused_in_the_words_of_the_flow() -> None:
    x, context = normal(50, 2), normal(50, 3)
    refused("Flow: context is missing; this flow takes contexts of width 3", small(2, 3), x)
    refused("fit_density: context of shape .* is unexpected", small(2), x, context)
    refused("Flow: context must have width 3 on the right", small(2, 3), x, context[:, :2])
    trained = small(2, 3)
    quick(trained, x, context, max_epochs=1)
    refused(r"Flow: context must have shape \(\*batch, 3\), got \(1, 1\)", trained, x, context[:, :1])
    refused(r"context must have as many rows as x, 50, got shape \(49, 3\)", small(2, 3), x, context[:49])
    refused("Flow: context is missing", small(2, 3), x, context, validation=x)
    refused("Flow: context is missing", small(2, 3), DataLoader(TensorDataset(x)))
    refused("fit_density: context of shape .* is unexpected", small(2), DataLoader(TensorDataset(x, context)))
    refused("MLPEncoder: data must have shape", Flow(small(2, 3).transforms, encoder=MLPEncoder(4, 3)), x, context)
    refused("context is for a table x", small(2, 3), DataLoader(TensorDataset(x)), context)
    refused("batch_size is for a table x", small(2), DataLoader(TensorDataset(x)), batch_size=3)


def test_what_is_neither_a_table_nor_batches_is_refused() -> None:
    x = normal(50, 2)
    must = "x must be a tensor, an array, a data frame or a DataLoader, "
    refused(must + r"got a dataset; give DataLoader\(", small(2), TensorDataset(x), error=TypeError)
    refused(must + "got NoneType", small(2), None, error=TypeError)
    refused(must + "got str", small(2), "x.csv", error=TypeError)
    refused(must + "got a generator, which cannot", small(2), (b for b in [x]), validation=x, error=TypeError)
    refused("validation must be a tensor", small(2), x, validation="x", error=TypeError)
    refused("validation must be x, .x, context. or a loader, got 3", small(2), x, validation=(x, x, x))
    refused(r"batches must be x or \(x, context\), got dict", small(2), [{"x": x}], validation=x)
    refused(r"batches must be x or \(x, context\), got \(Tensor, Tensor, Tensor\)", small(2), [(x, x, x)], validation=x)
    refused(r"batches must be x or \(x, context\), got \(float, float\)", small(2), [[1.0, 2.0]], validation=x)
    refused("some rows to train on and some to judge by, got 0 and 50", small(2), [], validation=x)


def test_rows_that_are_not_finite_or_constant_are_refused_by_column() -> None:
    x = normal(50, 3)
    x[4, 1], x[5, 1], x[4, 2] = math.nan, math.inf, -math.inf
    words = r"hold NaN or inf in column 1 \(2 of 50 rows\), column 2 \(1 of 50 rows\)\. Leave those rows out"
    refused(words, small(3), x)
    refused(words, small(3), DataLoader(TensorDataset(x), batch_size=7))
    refused(r"hold NaN or inf in column 'b' \(2 of", small(3), pd.DataFrame(x.numpy(), columns=list("abc")))
    refused(r"hold NaN or inf in column 1 \(2 of 100 rows", small(3), normal(50, 3), validation=x)
    context = normal(50, 1)
    context[7] = math.nan
    refused("the contexts hold NaN or inf in 1 of 50 rows", small(3, 1), normal(50, 3), context)
    x = normal(50, 3)
    x[:, 2] = 4.5
    refused(r"x is constant in column 2 \(4.5\), which has no density. Leave it out", small(3), x)
    refused(r"x is constant in column 'c' \(4.5\)", small(3), pd.DataFrame(x.numpy(), columns=list("abc")))
    refused("discrete columns must hold integers only, unlike column 2", small(3), x, discrete=[2])
    refused("discrete must hold places from 0 to 2, got 3", small(3), x, discrete=[3])
    x[:, 2] = 4.0
    assert quick(small(3), x, discrete=[2]).losses.isfinite().all()  # a constant integer has a mass


def test_a_seldom_column_that_varies_in_few_rows_is_no_error() -> None:
    x = normal(1000, 2)
    x[:, 1] = 0.0
    x[::100, 1] = 1.0
    with pytest.warns(UserWarning, match="column 1 holds integers"):
        assert quick(small(2), x, max_epochs=1).losses.isfinite().all()


def test_numbers_out_of_range_are_refused() -> None:
    for name, values in {"batch_size": (0, True), "patience": (0.5,), "validation": (0.0, 1.0)}.items():
        for value in values:
            refused(f": {name} must", small(2), normal(50, 2), **{name: value})
    refused(": on_nonfinite must", small(2), normal(50, 2), on_nonfinite="ignore")


# -------------------------------------------------------------------------------------------------- flows with encoders


def encoded() -> tuple[Flow, Flow, nn.Module]:
    """Return a flow, the same flow with an encoder, and the encoder, at random parameters."""
    flow = laws.randomise(flows.nsf(3, 4, num_transforms=2, hidden_dims=(8,)).double(), scale=0.3)
    encoder = MLPEncoder(2, 4, (8,)).double()
    return flow, Flow(flow.transforms, flow.base, encoder=encoder), encoder


def close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


def test_contexts_pass_through_the_encoder_whatever_is_asked() -> None:
    flow, through, encoder = encoded()
    raw, x = laws.normal(6, 1, 2), laws.normal(6, 5, 3, seed=1)
    c = encoder(raw)
    q = through(raw)
    assert (q.batch_shape, q.event_shape, through.context_dim) == ((6, 1), (3,), 4)
    close(q.log_prob(x), flow(c).log_prob(x))
    close(through.condition(raw).log_prob(x), flow(c).log_prob(x))
    close(through.log_prob(x, raw), flow.log_prob(x, c))
    close(through.inv(raw).log_prob(x), flow.inv(c).log_prob(x))
    close(through.inv.inv.log_prob(x, raw), flow.log_prob(x, c))
    for ask in (lambda f, c: f.rsample_and_log_prob((4,), c), lambda f, c: f(c).rsample((4,))):
        close(*laws.seeded(functools.partial(ask, through, raw), functools.partial(ask, flow, c)))
    gradients = torch.autograd.grad(through(raw).log_prob(x).sum(), encoder.output.weight)
    assert (gradients[0] != 0).any()
    assert {id(p) for p in encoder.parameters()} < {id(p) for p in through.inv.parameters()}


def test_layers_start_from_data_at_encoded_contexts() -> None:
    flow, _, encoder = encoded()
    raw, x = laws.normal(50, 2), 5 + laws.normal(50, 3, seed=1)
    norms = []
    for given, net in ((raw, encoder), (encoder(raw), None)):
        norms.append(ActNorm(3).double())
        Flow([norms[-1], *flow.transforms], encoder=net).initialize(x, given)
    close(norms[0].loc, norms[1].loc)
    assert norms[0].loc.abs().max() > 0.1


def test_flows_with_encoders_are_copied_with_them() -> None:
    _, flow, _ = encoded()
    raw, x = laws.normal(6, 2), laws.normal(6, 3, seed=1)
    before, fresh = flow.log_prob(x, raw), encoded()[1]
    fresh.load_state_dict(flow.state_dict(), strict=True)
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), fresh):
        assert torch.equal(twin.log_prob(x, raw), before)
        nn.init.ones_(twin.encoder.output.weight)
        assert not torch.equal(twin.log_prob(x, raw), before)
        assert torch.equal(flow.log_prob(x, raw), before)
    assert not [name for name in small(2, 1).state_dict() if "encoder" in name]


def test_a_flow_with_an_encoder_compiles_to_one_graph() -> None:
    layers = flows.realnvp(3, 4, num_transforms=1, hidden_dims=(8,)).transforms
    flow = Flow(layers, encoder=MLPEncoder(2, 4, (8,))).double()
    raw, x = laws.normal(6, 2), laws.normal(6, 3, seed=1)
    torch._dynamo.reset()
    close(torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")(x, raw), flow.log_prob(x, raw))


def test_encoders_that_do_not_fit_are_refused() -> None:
    layers, raw = flows.nsf(3, 4).transforms, torch.zeros(5, 2)
    for make, words in (
        (lambda: Flow(flows.nsf(3).transforms, encoder=MLPEncoder(2, 4)), "encoder .* is of no use, as no transform"),
        (lambda: Flow(layers, encoder=MLPEncoder), "Flow: encoder must be a network from contexts to vectors; got"),
        (lambda: Flow(layers, encoder=lambda x: x), "Flow: encoder must be a network from contexts to vectors; got"),
        (lambda: Flow(layers, encoder=MLPEncoder(2, 3))(raw), r"must have width 4 .* got shape \(5, 3\)"),
        (lambda: Flow(layers, encoder=MLPEncoder(3, 4))(raw), "MLPEncoder: data must have shape"),
        (lambda: Flow(layers, encoder=MLPEncoder(2, 4))(), "Flow: context is missing"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    # The encoder checks the raw context.
    assert Flow(layers, encoder=nn.Embedding(7, 4))(torch.tensor([1, 6])).batch_shape == (2,)


# ------------------------------------------------------------ values beyond the precision


def test_integers_too_large_for_noise_are_refused() -> None:
    """In float32, 16,000,000 plus noise from [0, 1) takes two values, whose density is no bound."""
    x = torch.stack((16_000_000 + torch.randint(0, 6, (200,)).double(), torch.randn(200).double()), 1)
    refused(r"float32 leaves no room for noise .*column 0 \(up to 1.6e\+07\)", small(2), x, discrete=[0])
    assert quick(small(2).double(), x, discrete=[0]).steps
    with pytest.raises(ValueError, match=r"dequantize: torch.float32 leaves no room"):
        dequantize(x.float(), [0])
