"""The log-likelihood of each row is exact for an exact guide, and otherwise a bound that rises with the draws."""

import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import sampling
from pyro import poutine
from torch import Tensor

from pyro_flows import AutoPlateFlow, fit_svi, flows, importance_log_likelihood
from pyro_flows.diagnostics.importance import Weighing
from pyro_flows.programs import Program

X = torch.tensor([[0.5, 1.0, 2.0], [-1.0, 0.3, -0.2], [3.0, 2.0, 4.0], [0.0, 0.0, 0.0]])


def model(x, seen=None):
    """Sample rows z ~ N(0, 1) and, for three j, x_j ~ N(z, 1)."""
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=torch.tensor(True) if seen is None else seen):
            pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x)


def guide_of(width: float = 1.0, shift: float = 0.0):
    def guide(x, seen=None):
        with pyro.plate("row", len(x)):
            pyro.sample("z", dist.Normal(x.sum(-1) / 4 + shift, width * 0.5))

    return guide


def exact(x: Tensor) -> Tensor:
    return dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x)


score = functools.partial(importance_log_likelihood, plate="row")


def is_exact(found: Tensor, wanted: Tensor | None = None, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, exact(X) if wanted is None else wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("draws", [1, 7, 120])
def test_exact_where_the_guide_is(draws):
    """All draws have the same weight, so that any number of them, in any batches, gives the exact likelihood."""
    is_exact(score(model, guide_of(), X, num_samples=draws))


def test_a_bound_that_rises_with_the_draws():
    """The mean over many estimates rises with the number of draws, within standard errors."""
    guide, repeats = guide_of(1.6, 0.4), 400
    many = X[:1].expand(repeats, 3)
    means, errors = [], []
    for draws in (1, 4, 32, 600):
        found = score(model, guide, many, num_samples=draws)
        means.append(found.mean().item())
        errors.append(found.std().item() / math.sqrt(repeats))
    wanted = exact(X[:1]).item()
    for (lower, one), (higher, other) in itertools.pairwise(zip(means, errors, strict=True)):
        assert lower < higher + 3 * math.hypot(one, other)
    assert means[0] < wanted - 5 * errors[0]
    assert means[1] > means[0] + 3 * math.hypot(errors[0], errors[1])
    assert abs(means[-1] - wanted) < 0.01 + 4 * errors[-1]
    # With one draw it is the ELBO: the log-evidence minus KL(q, p) of normals.
    divergence = -math.log(1.6) + (1.6**2 + (0.4 / 0.5) ** 2 - 1) / 2
    assert abs(means[0] - (wanted - divergence)) < 4 * errors[0]


def test_rows_do_not_touch_each_other():
    found = score(model, guide_of(1.2), X, num_samples=2000)
    assert (found - exact(X)).abs().max() < 0.05
    pyro.set_rng_seed(1)
    alone = torch.cat([score(model, guide_of(1.2), x[None], num_samples=2000) for x in X])
    assert (found - alone).abs().max() < 0.05


@pytest.mark.parametrize("size", [37, 50, 1000])
def test_batches_do_not_matter(size, monkeypatch):
    monkeypatch.setattr(Weighing, "at_once", lambda *_: size)
    found = score(model, guide_of(1.2), X, num_samples=1000)
    assert (found - exact(X)).abs().max() < 0.06


def test_masks():
    """A masked row has likelihood zero, except for the difference of prior and guide at the draws."""
    seen = torch.tensor([True, False, True, False])

    def guide(x, seen):
        with pyro.plate("row", len(x)):
            loc = torch.where(seen, x.sum(-1) / 4, 0.0)
            pyro.sample("z", dist.Normal(loc, torch.where(seen, 0.5, 1.0)))

    is_exact(score(model, guide, X, seen, num_samples=20), exact(X).where(seen, 0.0))


def outer(x):
    """Put the rows at dim -2, around a plate of three with the data and a latent."""
    with pyro.plate("row", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("column", 3, dim=-1):
            w = pyro.sample("w", dist.Normal(z, 0.5))
            pyro.sample("x", dist.Normal(w, math.sqrt(0.75)), obs=x)


def outer_guide(x):
    """Sample z given x, as above, and w given z and x from the normal between the two."""
    precision = 1 / 0.25 + 1 / 0.75
    with pyro.plate("row", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(x.sum(-1, keepdim=True) / 4, 0.5))
        with pyro.plate("column", 3, dim=-1):
            pyro.sample("w", dist.Normal((z / 0.25 + x / 0.75) / precision, precision**-0.5))


def test_rows_at_another_dimension():
    is_exact(score(outer, outer_guide, X, num_samples=20), tolerance=1e-4)
    # The columns are no rows of the likelihood, because z lies outside of them.
    with pytest.raises(ValueError, match="site 'z' lies outside of plate 'column'"):
        score(outer, outer_guide, X, plate="column")


def test_inner_rows():
    """Put the rows at dim -1, inside a plate of two."""

    def program(x):
        with pyro.plate("side", 2, dim=-2), pyro.plate("row", x.shape[-2], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("side", 2, dim=-2), pyro.plate("row", x.shape[-2], dim=-1):
            pyro.sample("z", dist.Normal(x.sum(-1) / 4, 0.5))

    x = torch.stack((X, X.flip(0) + 1))
    is_exact(score(program, guide, x, num_samples=5), exact(x).sum(0))


@pytest.mark.parametrize("local", [False, True])
def test_an_auto_plate_flow_knows_its_plate(local):
    with pyro.settings.context(module_local_params=local):
        small = functools.partial(flows.nsf, num_transforms=1, hidden_dims=(8,))
        guide = AutoPlateFlow(model, "row", encoder=lambda x, *_: x, local_flow=small, init_scale=1.0)
        fit_svi(model, guide, X, steps=20, num_particles=4, progress=False)
        found = importance_log_likelihood(model, guide, X, num_samples=3000)
        assert (found - exact(X)).abs().max() < 0.25
        new = torch.randn(9, 3)
        assert importance_log_likelihood(model, guide, new, num_samples=50).shape == (9,)


def test_seeds_repeat_and_gradients_are_off():
    found = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        found.append(score(model, guide_of(1.3), X.clone().requires_grad_(), num_samples=10))
    assert torch.equal(*found)
    assert not found[0].requires_grad


def test_deterministic_sites_and_keywords_that_clash():
    def program(x, *, num_samples):
        pyro.deterministic("outside", torch.tensor(2.0))
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("double", 2 * z)
            pyro.sample("x", dist.Normal(z[..., None], torch.ones(num_samples)).to_event(1), obs=x)

    is_exact(score(Program(program, kwargs={"num_samples": 3}), guide_of(), X, num_samples=5))


# Errors.


def flat(x):
    """Have no plate."""
    pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0).expand(x.shape).to_event(2), obs=x)


def test_a_plate_is_asked_for_if_the_model_has_several_or_none():
    is_exact(importance_log_likelihood(model, guide_of(), X, num_samples=2))
    for program, guide, plate, words in (
        (outer, outer_guide, None, r"the model has 'row', 'column'\. Pass plate='row'"),
        (flat, sampling(z=dist.Normal(0.0, 1.0)), None, r"the model has none\. Put the rows into a pyro\.plate"),
        (model, guide_of(), "rows", "plate 'rows'"),
    ):
        with pytest.raises(ValueError, match=words):
            importance_log_likelihood(program, guide, X, plate=plate)


def test_a_subsampled_plate_is_refused():
    def program(x, size=2):
        with pyro.plate("row", len(x), subsample_size=size) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x[i])

    def guide(x, size=2):
        with pyro.plate("row", len(x), subsample_size=size) as i:
            pyro.sample("z", dist.Normal(x[i].sum(-1) / 4, 0.5))

    with pytest.raises(ValueError, match=r"plate 'row', which is subsampled \(2 of 4 rows\).*run over all rows"):
        score(program, guide, X)
    is_exact(score(program, guide, X, 4, num_samples=2))


def test_latents_outside_of_the_plate_are_refused_with_the_way_out():
    def program(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(0.0, 1.0))
        guide_of()(x)

    with pytest.raises(ValueError, match=r"site 'mean' lies outside of plate 'row'.*poutine\.condition"):
        score(program, guide, X)
    # The way out is to fix the site and to hide it from the guide.
    fixed = poutine.condition(program, data={"mean": torch.tensor(0.0)})
    hidden = poutine.block(guide, hide=["mean"])
    is_exact(score(fixed, hidden, X, num_samples=3))


@pytest.mark.parametrize("value", [0, 10.0, True])
def test_numbers_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match="importance_log_likelihood: num_samples must be an integer of at least 1"):
        score(model, guide_of(), X, num_samples=value)


def test_guides_of_other_latents_are_refused():
    def other(x, seen=None):
        with pyro.plate("row", len(x)):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'z' of the model is not in the guide"):
        score(model, other, X)
