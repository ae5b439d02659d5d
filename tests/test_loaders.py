"""A DataLoader among the arguments of fit_svi: each step gets the next batch, and runs resume within an epoch."""

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_flows import AutoFlow, AutoPlateFlow, AutoStructuredFlow, fit_svi
from pyro_flows.encoders import MLPEncoder

N = 60
Y = 1 + torch.randn(N, 5, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 1, N)[:, None]
WIDE, SMALL = 0.7, 5**-0.5  # the standard deviation of a level, and of the mean of its five data


def rows(size: int = 20, **settings: Any) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(N), Y), batch_size=size, shuffle=True, **settings)


def hierarchy(i, y, spread=lambda level: level[..., None]):
    """Sample levels of the rows in a batch, and spread each over its data."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", N, subsample=i):
        level = pyro.sample("level", dist.Normal(mean, WIDE))
        pyro.sample("y", dist.Normal(spread(level), 1.0).to_event(1), obs=y)


def exact() -> tuple[torch.Tensor, float]:
    """Return the posterior mean of all levels, and the standard deviation of the mean."""
    variance = WIDE**2 + SMALL**2
    precision = N / variance + 1 / 25
    mean, share = Y.mean(1).sum() / variance / precision, WIDE**2 / variance
    return share * Y.mean(1) + (1 - share) * mean, precision**-0.5


@pytest.mark.slow
def test_learned_rows_of_a_loader_find_the_posterior() -> None:
    guide = AutoStructuredFlow(hierarchy)
    fit = fit_svi(hierarchy, guide, rows(), steps=600, num_particles=2, progress=False)
    assert fit.steps == 600
    draws, (mean, deviation) = guide.sample(4000, torch.arange(N), Y), exact()
    assert abs(float(draws["mean"].std()) / deviation - 1) < 0.15
    assert ((draws["level"].mean(0) - mean) / draws["level"].std(0)).abs().max() < 0.3


@pytest.mark.slow
def test_an_encoder_serves_rows_that_no_batch_had() -> None:
    def model(y):
        hierarchy(y, y)

    guide = AutoPlateFlow(model, "rows", encoder=MLPEncoder(5, context_dim=4))
    fit_svi(model, guide, DataLoader(Y, batch_size=16, shuffle=True), steps=400, progress=False)
    new = guide.sample(2000, torch.linspace(-2, 3, N)[:, None].expand(N, 5))["level"].mean(0)
    assert torch.corrcoef(torch.stack((new, torch.linspace(-2, 3, N))))[0, 1] > 0.98


class Counted(IterableDataset):
    """A dataset without a length."""

    def __iter__(self) -> Any:
        return iter(Y[:9])


LOADERS = DataLoader(Y, batch_size=20), DataLoader(Counted(), batch_size=4)


@pytest.mark.parametrize("loader", LOADERS, ids=["tensor", "stream"])
def test_each_batch_comes_once_in_an_epoch_at_the_place_of_the_loader(loader: DataLoader) -> None:
    seen = []

    def model(first, y, last=None):
        assert (first, last) == (3, "word")
        seen.append(float(y.sum()))
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", N, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(mean[..., None], 1.0).expand((1, 5)).to_event(1), obs=y)

    fit_svi(model, AutoFlow(model), 3, loader, last="word", steps=9, num_particles=1, progress=False)
    order = [total for total, before in zip(seen, [None, *seen], strict=False) if total != before]
    batches = [float(batch.sum()) for batch in loader]
    assert len(batches) == 3
    assert len(order) > 9
    assert order == [batches[place % 3] for place in range(len(order))]


def test_a_run_resumes_on_batches_of_the_same_size_alone(tmp_path: Path) -> None:
    settings = {"steps": 5, "num_particles": 1, "checkpoint": tmp_path / "run", "progress": False}
    fit_svi(hierarchy, AutoStructuredFlow(hierarchy), rows(), **settings)
    with pytest.raises(ValueError, match=r"is of another run \(data=.*batches"):
        fit_svi(hierarchy, AutoStructuredFlow(hierarchy), rows(8), **settings)


def test_mistakes_are_named() -> None:
    guide = AutoStructuredFlow(hierarchy)
    with pytest.raises(ValueError, match="two DataLoaders"):
        fit_svi(hierarchy, guide, rows(), rows())
    with pytest.raises(ValueError, match=r"y= is a DataLoader\. Give it as a positional argument"):
        fit_svi(hierarchy, guide, torch.arange(3), y=rows())
    with pytest.raises(TypeError, match=r"is a dict; give tuples"):
        fit_svi(hierarchy, guide, DataLoader([{"i": 0, "y": 1.0}]))
    with pytest.raises(ValueError, match="has no batches"):
        fit_svi(hierarchy, guide, DataLoader(Y, batch_size=100, drop_last=True))
    with pytest.raises(ValueError, match="and not a DataLoader"):
        fit_svi(hierarchy, AutoFlow(hierarchy), rows(), warm_start=True)


def test_batches_of_other_sizes_are_refused_where_the_model_cannot_take_them() -> None:
    def model(i, y):
        hierarchy(i, y, lambda level: level.reshape(len(y), 1))  # it runs under vmap alone

    with pytest.raises(ValueError, match=r"have \[\d+, \d+\] numbers of rows after .* drop_last=True"):
        fit_svi(model, AutoStructuredFlow(model), rows(32), steps=5, num_particles=2, progress=False)
    fit_svi(model, AutoStructuredFlow(model), rows(32, drop_last=True), steps=5, num_particles=2, progress=False)


def test_sums_over_discrete_latents_need_batches_of_one_size() -> None:
    def model(i, y):
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", N, subsample=i):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal((mean + k)[..., None], 1.0).expand((len(y), 5)).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"as its discrete latents are summed out\. .*drop_last=True"):
        fit_svi(model, AutoFlow(model), rows(32), steps=5, num_particles=2, progress=False)
    fit_svi(model, AutoFlow(model), rows(32, drop_last=True), steps=5, num_particles=2, progress=False)


@pytest.mark.filterwarnings("error:Found plate statements")
def test_an_engine_that_runs_a_model_of_given_rows_warns_of_no_plate() -> None:
    def single(i, y):
        hierarchy(i, y, lambda level: level.reshape(len(y), 1))  # many draws at once are refused

    fit = fit_svi(single, AutoStructuredFlow(single), rows(), steps=2, num_particles=3, progress=False)
    assert fit.losses.isfinite().all()
