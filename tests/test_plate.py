"""AutoPlateFlow is an exact Pyro guide of models with plates, whole or subsampled.

It scores its draws, and its minibatches are the rows that the model sees.  It finds the known posteriors of conjugate
hierarchies, with an encoder and without.  It meets Pyro's requirements on a guide, and refuses all else with a message.
"""

import copy
import functools
import math
import sys
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_guides import Line
from models import draws_of, same, sampling, state
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_flows import AutoFlow, AutoPlateFlow, Flow, fit_svi, flows, psis, to_arviz
from pyro_flows.bijectors import Affine
from pyro_flows.encoders import MLPEncoder, Standardize
from pyro_flows.guides.blocks import Drawn, Frame
from pyro_flows.objectives import PathELBO
from pyro_flows.programs import Program
from pyro_flows.programs.plate_rows import Shuffled
from pyro_flows.transforms import ActNorm, Elementwise, FixedAffine

small_local = functools.partial(flows.nsf, num_transforms=2, hidden_dims=(8,))
small_global = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(8,))
plate_flow = functools.partial(AutoPlateFlow, local_flow=small_local, global_flow=small_global, embedding_dim=2)


def stir(guide: Any, scale: float = 0.2) -> Any:
    """Move a guide away from its start, so that its flows are not the identity."""
    with torch.no_grad():
        for parameter in learned(guide):
            tables = [block.contexts.embedding for block in guide.posterior.blocks if block.contexts]
            embedded = any(table is not None and parameter is table.weight for table in tables)
            parameter.add_(scale / (10 if embedded else 1) * torch.randn_like(parameter))
    return guide


def learned(guide: Any) -> list[nn.Parameter]:
    """Return the trained parameters: all but the fixed affine maps of flows and encoders."""
    parts = [part for part in guide.modules() if isinstance(part, FixedAffine | Frame | Standardize)]
    fixed = {id(parameter) for part in parts for parameter in part.parameters()}
    fixed |= {id(block.unit) for block in guide.posterior.blocks}
    return [parameter for parameter in guide.parameters() if id(parameter) not in fixed]


# Models; all have rows of data (N, 3).


def hierarchy(y, size=None, rows=None):
    """Sample mean ~ N(0, 1), level_i ~ N(mean, 1), y_ij ~ N(level_i, 1), a model with a known posterior."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("group", len(y), subsample_size=size, subsample=rows) as i:
        level = pyro.sample("level", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(level[..., None], torch.ones(3)).to_event(1), obs=y[i])


def locals_only(y, size=None):
    """Sample like a variational autoencoder, without latents outside of the plate."""
    with pyro.plate("group", len(y), subsample_size=size) as i:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1, keepdim=True), torch.ones(3)).to_event(1), obs=y[i])


def globals_only(y, size=None):
    """Sample without latents in the plate."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("group", len(y), subsample_size=size) as i:
        location = torch.stack(torch.broadcast_tensors(mean, mean, mean), -1)
        pyro.sample("y", dist.Normal(location, scale[..., None]).to_event(1), obs=y[i])


def inner(y, size=None):
    """Put the plate of rows at dim -1, inside another plate."""
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("side", 3, dim=-2):
        middle = pyro.sample("middle", dist.LogNormal(top, 0.5))
        with pyro.plate("group", len(y), subsample_size=size, dim=-1) as i:
            leaf = pyro.sample("leaf", dist.Normal(middle, 1.0))
            pair = pyro.sample("pair", dist.Dirichlet(torch.ones(3)))
            pyro.sample("y", dist.Normal(leaf + pair[..., 0], 1.0), obs=y[i].T)


def outer(y, size=None):
    """Put the plate of rows, with latents, at dim -2, around another plate."""
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("group", len(y), subsample_size=size, dim=-2) as i:
        middle = pyro.sample("middle", dist.LogNormal(top, 0.5))
        with pyro.plate("side", 3, dim=-1):
            leaf = pyro.sample("leaf", dist.Normal(middle, 1.0))
            pair = pyro.sample("pair", dist.Dirichlet(torch.ones(3)))
            pyro.sample("y", dist.Normal(leaf + pair[..., 0], 1.0), obs=y[i])


def crossed(y, size=None):
    """Sample latents outside of the rows in another plate, at the same dim and at another one."""
    with pyro.plate("treatment", 3, dim=-1):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    with pyro.plate("season", 2, dim=-2):
        shift = pyro.sample("shift", dist.HalfNormal(1.0))
    with pyro.plate("group", len(y), subsample_size=size, dim=-1) as i:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        scale = 0.5 + shift.sum(-2, keepdim=True)[..., None]
        pyro.sample("y", dist.Normal(level[..., None] + effect[..., None, :], scale).to_event(1), obs=y[i])


def supports(y, size=None):
    """Sample all kinds of support, outside of the plate and in it."""
    pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    pyro.sample("sorted", dist.ImproperUniform(dist.constraints.ordered_vector, (), (3,)))
    with pyro.plate("group", len(y), subsample_size=size) as i:
        weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0, 4.0])))
        positive = pyro.sample("positive", dist.Gamma(2.0, 1.0))
        between = pyro.sample("between", dist.Uniform(-1.0, 4.0))
        pyro.sample("corr", dist.LKJCholesky(3, 1.0))
        pyro.sample("vector", dist.HalfNormal(torch.ones(2)).to_event(1))
        location = (weights[..., 0] + positive + between)[..., None]
        pyro.sample("y", dist.Normal(location, torch.ones(3)).to_event(1), obs=y[i])


class Case(NamedTuple):
    model: Any
    nesting: int
    globals_: dict[str, tuple[int, ...]]
    locals_: dict[str, tuple[int, ...]]


N = 5
CASES = {
    "both": Case(hierarchy, 1, {"mean": ()}, {"level": (N,)}),
    "locals_only": Case(locals_only, 1, {}, {"z": (N, 2)}),
    "globals_only": Case(globals_only, 1, {"mean": (), "scale": ()}, {}),
    "inner": Case(inner, 2, {"top": (), "middle": (3, 1)}, {"leaf": (3, N), "pair": (3, N, 3)}),
    "outer": Case(outer, 2, {"top": ()}, {"middle": (N, 1), "leaf": (N, 3), "pair": (N, 3, 3)}),
    "crossed": Case(crossed, 2, {"effect": (3,), "shift": (2, 1)}, {"level": (N,)}),
    "supports": Case(
        supports,
        1,
        {"share": (3,), "factor": (3, 3), "sorted": (3,)},
        {"weights": (N, 4), "positive": (N,), "between": (N,), "corr": (N, 3, 3), "vector": (N, 2)},
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
with_locals = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.locals_], ids=[n for n in CASES if n != "globals_only"]
)
both_ways = pytest.mark.parametrize("amortised", [True, False], ids=["encoder", "rows"])


def data(rows: int = N, seed: int = 0) -> Tensor:
    return 1 + torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))


def line(dim: int, context_dim: int) -> Flow:
    return Flow([Elementwise(Affine(), dim, Line(context_dim, dim))])


class Rows(MLPEncoder):
    """Encoder of the data alone, which ignores the other arguments of the model."""

    def __init__(self, context_dim: int = 4, hidden_dims: tuple[int, ...] = (8,)) -> None:
        super().__init__(3, context_dim, hidden_dims)

    def forward(self, y: Tensor, *_: Any) -> Tensor:
        return super().forward(y)


def build(case: Case, amortised: bool, **settings: Any) -> AutoPlateFlow:
    guide = plate_flow(case.model, "group", encoder=Rows() if amortised else None, init_scale=0.5, **settings)
    return stir(guide.setup(data()))


# Densities.


@both_ways
@every_case
def test_log_prob_is_that_of_the_trace(case, amortised):
    guide, y = build(case, amortised), data()
    for _ in range(3):
        trace = poutine.trace(guide).get_trace(y)
        values = {name: trace.nodes[name]["value"] for name in (*case.globals_, *case.locals_)}
        assert {name: tuple(value.shape) for name, value in values.items()} == {**case.globals_, **case.locals_}
        scale = sum(value.numel() for value in values.values())
        torch.testing.assert_close(guide.log_prob(values, y), trace.log_prob_sum(), rtol=1e-4, atol=1e-4 * scale)


@both_ways
@every_case
def test_draws_have_the_shapes_and_supports_of_the_model(case, amortised):
    guide, y = build(case, amortised), data()
    draws = guide.sample(6, y)
    assert {name: tuple(value.shape[1:]) for name, value in draws.items()} == {**case.globals_, **case.locals_}
    alone = {name: value[0] for name, value in draws.items()}
    prior = poutine.trace(poutine.condition(case.model, alone)).get_trace(y).nodes
    for name, value in draws.items():
        assert len(value) == 6
        assert prior[name]["fn"].support.check(value).all(), name
    scores = guide.log_prob(draws, y)
    alone = torch.stack([guide.log_prob({name: value[k] for name, value in draws.items()}, y) for k in range(6)])
    assert scores.shape == (6,)
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-3)
    twice = {name: value.reshape(2, 3, *value.shape[1:]) for name, value in draws.items()}
    torch.testing.assert_close(guide.log_prob(twice, y), scores.reshape(2, 3), rtol=1e-4, atol=1e-3)


@both_ways
@every_case
def test_three_ways_to_the_same_elbo(case, amortised):
    """Vectorised draws, single runs and Pyro's own ELBO agree, within four standard errors."""
    guide, y = build(case, amortised), data()
    with torch.no_grad():
        wide = psis(case.model, guide, y, num_samples=1000).log_weights.double()
        few = psis(Program(case.model, vectorize="loop"), guide, y, num_samples=60).log_weights.double()
    spread = wide.std()
    assert spread > 0.01
    assert abs(wide.mean() - few.mean()) < 4 * max(spread, few.std()) * math.sqrt(1 / 1000 + 1 / 60)
    elbo = Trace_ELBO(1000, max_plate_nesting=case.nesting, vectorize_particles=True).loss(case.model, guide, y)
    assert abs(wide.mean() + elbo) < 4 * spread * math.sqrt(2 / 1000)


@pytest.mark.parametrize("shared", [True, False], ids=["with a global", "without"])
def test_density_integrates_to_one(shared):
    """On a grid, in float64, at random parameters: one global and one local latent, or two local ones of one row."""
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def model():
        if shared:
            pyro.sample("a", dist.LogNormal(zero, one))
        with pyro.plate("group", 1):
            pyro.sample("b", dist.Uniform(zero - 2, one))
            if not shared:
                pyro.sample("a", dist.LogNormal(zero, one))

    guide = stir(plate_flow(model, "group", encoder=lambda: one.reshape(1, 1), init_scale=0.8).setup(), 0.2)
    step = 0.05
    z = torch.arange(-11, 11, step, dtype=torch.float64)
    za, zb = torch.meshgrid(z, z, indexing="ij")
    a, b = za.exp(), torch.sigmoid(zb) * 3 - 2
    change = za + math.log(3) + torch.nn.functional.logsigmoid(zb) + torch.nn.functional.logsigmoid(-zb)
    values = {"a": a if shared else a[..., None], "b": b[..., None]}
    with torch.no_grad():
        mass = (guide.log_prob(values) + change).exp().sum() * step**2
    assert mass.item() == pytest.approx(1, abs=2e-3)


def test_density_is_zero_outside_of_the_support():
    guide, y = build(CASES["supports"], True), data()
    draws = guide.sample(3, y)
    for name, row in (("positive", 2), ("between", 4), ("weights", 0), ("share", None)):
        off = {key: value.clone() for key, value in draws.items()}
        (off[name][1] if row is None else off[name][1, row]).sub_(10)
        scores = guide.log_prob(off, y)
        assert scores[1] == -math.inf, name
        assert scores[[0, 2]].isfinite().all()
    with pytest.raises(ValueError, match="lack the latent site 'between'"):
        guide.log_prob({key: value for key, value in draws.items() if key != "between"}, y)


# Packing.


def coordinates(name: str, value: Tensor) -> Tensor:
    """Return a value of a site in flat unconstrained coordinates."""
    if name in ("weights", "share", "pair"):
        return value[..., :-1].flatten()
    if name in ("corr", "factor"):
        rows, columns = torch.tril_indices(3, 3, -1)
        return value[..., rows, columns].flatten()
    return value.flatten()


def double(packing: Any) -> Any:
    packing = copy.copy(packing)
    packing.parts = {name: part._replace(start=part.start.double()) for name, part in packing.parts.items()}
    return packing


@with_locals
def test_log_det_of_packing_is_autograds(case):
    guide = build(case, False)
    for packing in map(double, guide.packings.values()):
        shape = (1,) * max(1, *(len(part.batch) for part in packing.parts.values()))

        def constrained(z: Tensor, packing: Any = packing, shape: Any = shape) -> Tensor:
            found = packing.unpack(z.reshape(*shape, -1))
            return torch.cat([coordinates(name, value) for name, _, value, _ in found])

        z = torch.randn(packing.size, dtype=torch.float64)
        matrix = torch.autograd.functional.jacobian(constrained, z)
        log_det = sum(change.sum() for *_, change in packing.unpack(z.reshape(*shape, -1)))
        torch.testing.assert_close(log_det, torch.linalg.slogdet(matrix).logabsdet, rtol=1e-8, atol=1e-8)


# Without local, or without global latents.


def test_without_locals_it_is_what_autoflow_is():
    """The same recipe at the same parameters has the same density."""
    y = data()
    guide = stir(plate_flow(globals_only, "group", init_scale=0.5).setup(y))
    joint = AutoFlow(globals_only, small_global, init_scale=0.5).setup(y)
    joint.flow.load_state_dict(guide.posterior.blocks[0].flow.state_dict())
    draws = joint.sample(20)
    torch.testing.assert_close(guide.log_prob(draws, y), joint.log_prob(draws))
    assert set(guide(y)) == {"mean", "scale"}
    losses = fit_svi(globals_only, guide, y, 2, steps=60, num_particles=8, progress=False).losses
    assert losses[-20:].mean() < losses[:5].mean()


def test_without_globals_rows_are_independent():
    y = data()
    guide = stir(plate_flow(locals_only, "group", encoder=Rows()).setup(y))
    assert len(guide.posterior.blocks) == 1
    whole = guide.sample(4, y)
    by_row = sum(guide.log_prob({"z": whole["z"][:, [i]]}, y[[i]]) for i in range(N))
    torch.testing.assert_close(guide.log_prob(whole, y), by_row, rtol=1e-4, atol=1e-4)


# Minibatches.


class Watched(Trace_ELBO):
    """Record of the rows that guide and model see, and of the scales of their sites."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Tensor] = []

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        programs = poutine.trace(model), poutine.trace(guide)
        found = super()._get_trace(*programs, args, kwargs)
        looked = [program.trace.nodes["group"]["value"] for program in programs]  # before Pyro removes these sites
        assert torch.equal(*looked)
        self.seen.append(looked[0].clone())
        for program in programs:
            for node in program.trace.nodes.values():
                frames = [f for f in node.get("cond_indep_stack", ()) if f.name == "group"]
                if node["type"] == "sample" and frames:
                    assert node["scale"] == frames[0].full_size / len(looked[0])
        return found


@both_ways
@pytest.mark.parametrize("vectorize", [True, False])
def test_model_and_guide_look_at_the_same_rows(vectorize, amortised, local_params):
    y, elbo = data(12), Watched(2, max_plate_nesting=1, vectorize_particles=vectorize)
    guide = plate_flow(hierarchy, "group", encoder=Rows() if amortised else None).setup(y, 4)
    svi = SVI(hierarchy, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert all(math.isfinite(svi.step(y, 4)) for _ in range(6))
    assert len(elbo.seen) == (6 if vectorize else 12)
    for epoch in torch.stack(elbo.seen).reshape(-1, 12):  # every row once per epoch
        assert epoch.sort().values.tolist() == list(range(12))
    assert len({tuple(rows.tolist()) for rows in elbo.seen}) > 2


def test_minibatches_that_do_not_divide_the_rows():
    shuffled, seen = Shuffled(), torch.zeros(10)
    for epoch in range(300):
        first, second = shuffled.next(10, 4), shuffled.next(10, 4)
        assert len({*first.tolist(), *second.tolist()}) == 8, epoch
        seen[torch.cat((first, second))] += 1
    # An epoch omits each row with probability .2: a binomial count, within four standard deviations.
    assert ((seen - 240).abs() < 4 * math.sqrt(300 * 0.2 * 0.8)).all()
    assert shuffled.next(3, 3).sort().values.tolist() == [0, 1, 2]  # another size restarts
    kept = shuffled.next(6, 2)
    before = kept.clone()
    for _ in range(10):
        shuffled.next(6, 2)
    assert torch.equal(kept, before)


@both_ways
def test_subsampled_loss_is_that_of_all_rows_on_average(amortised):
    y = data(12)
    guide = stir(plate_flow(hierarchy, "group", encoder=Rows() if amortised else None, init_scale=0.5).setup(y, 4), 0.1)
    elbo = Trace_ELBO(20, max_plate_nesting=1, vectorize_particles=True)

    def losses(number: int, *args: Any) -> Tensor:
        return torch.stack([elbo.differentiable_loss(hierarchy, guide, y, *args).detach() for _ in range(number)])

    whole, part = losses(40), losses(120, 4)
    epochs = part.reshape(40, 3).mean(1)
    assert part.std() > 3 * epochs.std()  # their noise cancels within an epoch; independent ones give √3
    assert abs(whole.mean() - epochs.mean()) < 4 * math.hypot(whole.std(), epochs.std()) / math.sqrt(40)


def exact(y: Tensor) -> tuple[Tensor, float, Tensor, Tensor]:
    """Return the posterior of :func:`hierarchy`: mean and sd of the global latent and of each level."""
    precision = 1 + len(y) / (1 + 1 / 3)
    mean = y.mean(1).sum() / (1 + 1 / 3) / precision
    return mean, precision**-0.5, (mean + 3 * y.mean(1)) / 4, torch.tensor(1 / 4 + 1 / precision / 16).sqrt()


@pytest.mark.slow
@both_ways
def test_subsampled_hierarchy_finds_the_exact_posterior(amortised):
    y = 1.5 + torch.randn(60, 1) + torch.randn(60, 3)
    guide = plate_flow(hierarchy, "group", encoder=Rows(8, (32,)) if amortised else None, local_flow=line)
    fit = fit_svi(hierarchy, guide, y, 20, steps=200, num_particles=4, lr=0.03, progress=False)
    assert fit.skipped == 0
    draws = guide.sample(2000, y)
    mean, mean_sd, levels, level_sd = exact(y)
    assert draws["level"].shape == (2000, 60)
    # Errors are in standard deviations of the posterior: 2000 draws have a mean error of 0.02, an sd error of 1.6 %.
    off = (draws["level"].mean(0) - levels) / level_sd
    assert off.square().mean().sqrt() < 0.15
    assert (draws["level"].std(0) / level_sd).log().square().mean().sqrt() < 0.15
    assert abs(draws["mean"].mean() - mean) < 0.75 * mean_sd
    assert 0.6 < draws["mean"].std() / mean_sd < 1.6


@pytest.mark.parametrize("kind", ["encoder", "table", "rows"])
def test_given_rows_are_respected(kind):
    """An encoder may also return a table of features for all rows, of which the guide takes those of the minibatch."""
    y, rows, table = data(6), torch.tensor([4, 0, 3]), torch.randn(6, 2)
    encoder = {"encoder": Rows(), "table": lambda *_: table, "rows": None}[kind]
    guide = stir(plate_flow(hierarchy, "group", encoder=encoder).setup(y))
    trace = poutine.trace(guide).get_trace(y, None, rows)
    assert torch.equal(trace.nodes["group"]["value"], rows)
    assert trace.nodes["level"]["value"].shape == (3,)
    assert trace.nodes["level"]["scale"] == 2
    # Each row is drawn from its conditional, which is that of the whole plate at its index.
    name = next(name for name in trace.nodes if name.endswith("group_latent"))
    pyro.set_rng_seed(5)
    part = poutine.trace(guide).get_trace(y, None, rows).nodes[name]["fn"]
    pyro.set_rng_seed(5)
    whole = poutine.trace(guide).get_trace(y).nodes[name]["fn"]
    probe = torch.tensor([0.3])
    torch.testing.assert_close(part.log_prob(probe), whole.log_prob(probe)[rows])
    assert whole.log_prob(probe).unique().numel() == 6
    elbo = Watched(2, max_plate_nesting=1, vectorize_particles=True)
    assert math.isfinite(SVI(hierarchy, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step(y, None, rows))


def by_batch(y, total):
    with pyro.plate("group", total, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1, keepdim=True), torch.ones(3)).to_event(1), obs=y)


def test_minibatches_as_arguments_with_a_ragged_last_one():
    """Minibatches come as from a DataLoader, and the latents of each row depend on its data."""
    y = data(10)
    guide = stir(plate_flow(by_batch, "group", encoder=Rows()).setup(y[:4], 10))
    svi = SVI(by_batch, guide, pyro.optim.Adam({"lr": 0.01}), Watched(3, max_plate_nesting=1, vectorize_particles=True))
    name = f"_{guide._pyro_name}_group_latent"
    for _ in range(3):
        for batch in (y[:4], y[4:8], y[8:], y[9:], y):
            assert math.isfinite(svi.step(batch, 10))
            trace = poutine.trace(guide).get_trace(batch, 10)
            assert trace.nodes["z"]["value"].shape == (len(batch), 2)
            assert trace.nodes["z"]["scale"] == 10 / len(batch)
            block = guide.posterior.blocks[0]
            wanted = block.flow(block.contexts.encoder(batch)).log_prob(torch.zeros(2))
            torch.testing.assert_close(trace.nodes[name]["fn"].log_prob(torch.zeros(2)), wanted)


def test_rows_never_seen_are_encoded():
    y, new = data(6), data(40, seed=9)
    guide = stir(plate_flow(hierarchy, "group", encoder=Rows()).setup(y, 2))
    draws = guide.sample(7, new)
    assert draws["level"].shape == (7, 40)
    assert guide.log_prob(draws, new).shape == (7,)
    assert guide.median(new)["level"].shape == (40,)
    assert guide.quantiles([0.1, 0.9], new)["level"].shape == (2, 40)


def test_rows_never_seen_need_an_encoder():
    guide = stir(plate_flow(hierarchy, "group").setup(data(6), 2))
    draws, new = guide.sample(2, data(6)), data(4)
    values = {"mean": draws["mean"], "level": draws["level"][:, :4]}
    for ask in (guide, lambda y: guide(y, 2), lambda y: guide.sample(2, y), lambda y: guide.log_prob(values, y)):
        with pytest.raises(ValueError, match="knows the 6 rows of plate 'group' that it was built for, not 4"):
            ask(new)


def test_data_that_are_not_tied_to_the_rows_are_refused():
    def untied(y):
        with pyro.plate("group", 100, subsample_size=len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.randn(5)
    with pytest.raises(ValueError, match=r"plate 'group' is subsampled \(5 of 100 rows\).*the same whatever its ind"):
        plate_flow(untied, "group").setup(y)
    # The ways out of the errors: an encoder, or indices.
    plate_flow(untied, "group", encoder=lambda y: y[:, None]).setup(y)
    plate_flow(hierarchy, "group").setup(data(9), None, torch.tensor([2, 3]))


# Requirements of Pyro on a guide.


@with_locals
def test_to_arviz_names_dimensions_after_plates(case, local_params):
    y = data()
    found = to_arviz(case.model, build(case, True), y, num_samples=50)
    for name, shape in {**case.globals_, **case.locals_}.items():
        variable = found["posterior"][name]
        assert variable.shape == (1, 50, *shape)
        assert ("group" in variable.dims) == (name in case.locals_)
    assert found["posterior"].sizes["group"] == N


@pytest.mark.usefixtures("double")
def test_psis_of_an_exact_guide_is_exact():
    y = data(4)
    found = psis(hierarchy, conjugate_guide(y), y, num_samples=200)
    assert found.log_weights.std() < 1e-9
    # y_i is Gaussian, with covariance I + 1 1' + 1 1' within a group, and 1 across groups.
    cov = torch.kron(torch.eye(4), torch.eye(3) + 1) + 1
    wanted = dist.MultivariateNormal(torch.zeros(12), cov).log_prob(y.flatten())
    assert found.log_evidence == pytest.approx(float(wanted), abs=1e-8)


@pytest.mark.parametrize("size", [None, 2])
@both_ways
def test_member_of_a_list_of_guides(amortised, size):
    y = data(6)

    def program(y, size=None):
        hierarchy(y, size)
        pyro.sample("other", dist.Normal(3.0, 1.0))

    guide = AutoGuideList(program, create_plates=lambda y, n=None: pyro.plate("group", len(y), n, dim=-1))
    mine = plate_flow(poutine.block(program, hide=["other"]), "group", encoder=Rows() if amortised else None)
    guide.append(mine)
    guide.append(AutoNormal(poutine.block(program, expose=["other"])))
    elbo = Watched(4, max_plate_nesting=1, vectorize_particles=True)
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    svi.step(y, size)
    before = state(mine)
    assert all(math.isfinite(svi.step(y, size)) for _ in range(19))
    assert not same(state(mine), before)
    assert set(guide(y, size)) == {"mean", "level", "other"}
    assert len(elbo.seen[-1]) == (size or 6)


# Training.


@pytest.mark.slow
@both_ways
@pytest.mark.usefixtures("hasty")
def test_a_killed_run_goes_on_to_the_same_end(amortised, tmp_path):
    """The state includes the order of the rows, so that minibatches continue too."""
    y, file, since = data(12), tmp_path / "run", []

    def checkpointed(model, file):
        pyro.set_rng_seed(1)
        guide = plate_flow(hierarchy, "group", encoder=Rows() if amortised else None, local_flow=line)
        fit = fit_svi(model, guide, y, 4, steps=55, num_particles=2, progress=False, checkpoint=file)
        return fit.losses, state(guide)

    def mortal(y, size):
        since.extend([0] * file.exists())
        if len(since) > 10:
            sys.exit()
        hierarchy(y, size)

    whole = checkpointed(hierarchy, tmp_path / "whole")
    with pyro.settings.context(pyro_flows_compile="off"), pytest.raises(SystemExit):  # graphs do not call the model
        checkpointed(mortal, file)
    assert 0 < len(torch.load(file, weights_only=True)["losses"]) < 50
    pyro.clear_param_store()
    resumed = checkpointed(hierarchy, file)
    assert torch.equal(resumed[0], whole[0])
    assert same(resumed[1], whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["module", "pyro_module", "function"])
def test_encoders_are_trained(kind, local_params):
    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.layer = PyroModule[nn.Linear](3, 4)

        def forward(self, y, *_):
            return self.layer(y)

    y, encoder = data(), {"module": Rows(), "pyro_module": Net(), "function": lambda y, *_: y}[kind]
    guide = plate_flow(hierarchy, "group", encoder=encoder)
    fit_svi(hierarchy, guide, y, 2, steps=3, num_particles=2, progress=False)
    mine = dict(encoder.named_parameters()) if kind != "function" else {}
    assert {id(parameter) for parameter in mine.values()} <= {id(parameter) for parameter in guide.parameters()}
    stored = [name for name in list(pyro.get_param_store()) if "encoder" in name]
    assert len(stored) == (0 if local_params else len(mine))
    before = {name: parameter.detach().clone() for name, parameter in mine.items()}
    losses = fit_svi(hierarchy, guide, y, steps=40, num_particles=8, lr=0.03, progress=False).losses
    assert losses[-10:].mean() < losses[:10].mean() - 1
    still = [name for name, parameter in mine.items() if torch.equal(before[name], parameter)]
    assert still == [name for name in mine if name.startswith("standardize")]


@both_ways
@pytest.mark.parametrize("case", [CASES["both"], CASES["outer"]], ids=["both", "outer"])
@pytest.mark.filterwarnings("error")
def test_every_parameter_learns(case, amortised):
    y = data()
    guide = AutoPlateFlow(case.model, "group", encoder=Rows() if amortised else None).setup(y)
    before = copy.deepcopy(learned(guide))
    fit_svi(case.model, guide, y, 2, steps=12, num_particles=4, progress=False)
    assert not any(torch.equal(old, new) for old, new in zip(before, learned(guide), strict=True))


def test_rows_see_the_latents_outside_from_the_middle_of_their_flow():
    """Rows depend on globals relative to the middle of their flow, because an offset would hide how these vary."""
    y = data()
    posterior = stir(plate_flow(hierarchy, "group", encoder=Rows(), init_scale=0.3).setup(y), 1.0).posterior
    middle = torch.zeros(1)
    top, _ = posterior.blocks
    for transform in top.flow.transforms:
        middle, _ = transform.forward_and_log_det(middle)
    assert middle.abs() > 0.01
    for distance in (0.0, 1.0, -2.0):  # in units of ten times init_scale
        seen = Drawn(top, middle + 3 * distance, top.flow()).relative
        torch.testing.assert_close(seen, torch.full_like(seen, distance), atol=1e-5, rtol=1e-5)


def test_fit_svi_shows_the_data_to_the_encoder_of_a_new_guide(tmp_path):
    y, encoder = 500 + 100 * data(50), Rows()
    guide = AutoPlateFlow(locals_only, "group", encoder=encoder, local_flow=small_local, name="standardised")
    quick = functools.partial(fit_svi, locals_only, guide, steps=2, progress=False)
    quick(y, 10)  # all rows, not those of a minibatch
    standardize = encoder.standardize
    torch.testing.assert_close(standardize.loc.detach(), y.mean(0))
    torch.testing.assert_close(standardize.scale.detach(), y.std(0, correction=0))
    quick(y + 100)  # a trained guide keeps its parameters
    torch.testing.assert_close(standardize.loc.detach(), y.mean(0))
    SVI(locals_only, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(y)
    wanted = draws_of(guide, y)
    pyro.get_param_store().save(str(tmp_path / "params"))
    del guide, quick, encoder
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "params"))
    fresh = AutoPlateFlow(locals_only, "group", encoder=Rows(), local_flow=small_local, name="standardised")
    assert same(draws_of(fresh.setup(y), y), wanted)


@pytest.mark.parametrize("way", ["set", "frozen"])
def test_encoders_that_know_their_data_keep_what_they_know(way):
    y, encoder = data(), Rows()
    encoder.initialize(7 * y + 1) if way == "set" else encoder.requires_grad_(False)
    before = copy.deepcopy(encoder.standardize.state_dict())
    fit_svi(locals_only, plate_flow(locals_only, "group", encoder=encoder), y, steps=1, progress=False)
    assert all(torch.equal(before[name], value) for name, value in encoder.standardize.state_dict().items())


@both_ways
def test_without_globals_rows_start_at_unit_scale(amortised):
    y = data(300)
    for model, scale in ((locals_only, 1.0), (hierarchy, 0.1)):
        guide = AutoPlateFlow(model, "group", encoder=(lambda y: y) if amortised else None)
        draws = guide.setup(y).sample(300, y)["z" if model is locals_only else "level"]
        assert (draws - draws.mean(0)).std().item() == pytest.approx(scale, rel=0.03)
        spread = amortised and model is locals_only  # by the encoder; else a decoder would learn to ignore latents
        assert (draws.mean(0).std() > 0.15) == spread  # the noise of 300 draws is 0.06
        assert guide.is_fresh


def test_starts_at_loc_and_scale():
    y = data(300)
    start = {"mean": torch.tensor(2.0), "level": torch.full((300,), -3.0)}
    for encoder in (Rows(), None):
        settings = {"init_loc_fn": init_to_value(values=start), "init_scale": 0.3}
        draws = AutoPlateFlow(hierarchy, "group", encoder=encoder, **settings).setup(y).sample(300, y)
        # 90,000 draws of levels; the default base of globals is 2 % wider than a normal one.
        assert abs(draws["level"].mean() + 3) < 4 * 0.3 / 300
        assert draws["level"].std().item() == pytest.approx(0.3, rel=0.03)
        assert abs(draws["mean"].mean() - 2) < 4 * 0.31 / math.sqrt(300)


# Path gradients.


def conjugate_guide(y: Tensor) -> AutoPlateFlow:
    """Return the posterior of :func:`hierarchy` as a guide, set by hand."""
    guide = AutoPlateFlow(
        hierarchy,
        "group",
        encoder=lambda y: y.mean(-1, keepdim=True),
        local_flow=line,
        global_flow=lambda dim: Flow([ActNorm(dim)]),
        init_scale=1.0,
    ).setup(y)
    mean, sd, _, _ = exact(y)
    flow, local = (block.flow for block in guide.posterior.blocks)
    norm, net = flow.transforms[0], local.transforms[0].conditioner
    learned_norm, fixed = flow.transforms[1:]
    assert learned_norm.log_scale.item() == fixed.loc.item() == 0
    assert fixed.scale.item() == 1
    with torch.no_grad():
        norm.loc.fill_(mean)
        norm.log_scale.fill_(math.log(sd))
        # The context of rows has the mean relative to the middle of its flow, in units of ten times init_scale.
        net.output.bias[1] = mean / 4
        # level | mean, y ~ N((mean + 3 average) / 4, 1 / 4): a is where b tanh(a / 4b) is log(1 / 2), with b = 3.
        net.output.bias[0] = 12 * math.atanh(math.log(0.5) / 3)
        net.output.weight[1] = torch.tensor([3 / 4, 10 / 4])
    return guide


def gradients(guide: Any, elbo: Any, model: Any, *args: Any) -> Tensor:
    guide.zero_grad()
    elbo.loss_and_grads(model, guide, *args)
    found = [parameter.grad for parameter in learned(guide)]
    return torch.cat([grad.flatten() for grad in found if grad is not None])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("vectorize", [True, False])
def test_path_gradients_vanish_at_the_posterior(vectorize):
    y = data(4)
    guide = conjugate_guide(y)
    options = {"num_particles": 3, "max_plate_nesting": 1, "vectorize_particles": vectorize}
    assert gradients(guide, PathELBO(**options), hierarchy, y).abs().max() < 1e-9
    assert gradients(guide, Trace_ELBO(**options), hierarchy, y).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("amortised", "size"), [(True, 2), (False, None)], ids=["encoder", "rows"])
def test_path_gradients_have_the_same_mean(amortised, size):
    y = data(4)
    guide = stir(plate_flow(hierarchy, "group", encoder=Rows() if amortised else None, init_scale=0.5).setup(y), 0.1)
    found = []
    for kind in (Trace_ELBO, PathELBO):
        elbo = kind(20, max_plate_nesting=1, vectorize_particles=True)
        found.append(torch.stack([gradients(guide, elbo, hierarchy, y, size) for _ in range(60)]).double())
    plain, path = found
    error = ((plain.var(0) + path.var(0)) / 60).sqrt()
    off = (plain.mean(0) - path.mean(0)).abs() / error.clamp_min(1e-6)
    # Some hundred parameters have independent errors, so the root mean square of their normal errors is 1.
    assert off.square().mean().sqrt() < 1.3
    assert off.max() < 6


# Errors.


def refused(model, words, *args, plate="group", **settings):
    guide = plate_flow(model, plate, **settings)
    for _ in range(2):  # a failed setup can be repeated
        with pytest.raises((ValueError, NotImplementedError), match=words):
            guide.setup(*args)


def sequential():
    for i in pyro.plate("group", 3):
        pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))


def another_is_subsampled():
    with pyro.plate("other", 8, subsample_size=3, dim=-2):
        pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 4, dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_plates_that_do_not_fit_are_refused():
    refused(inner, r"the model enters no plate 'groups'.*it has group, side", data(), plate="groups")
    refused(sampling(x=dist.Normal(0.0, 1.0)), r"no plate 'group' of known size; it has none")
    refused(sequential, "sequential")
    refused(another_is_subsampled, r"'x' lies in plate 'other', which is subsampled \(3 of 8 rows\)")


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (lambda y: y[:3], r"one vector for each of the 5 rows of plate 'group', .* got shape \(3, 3\)"),
        (lambda y: y[..., None], r"\(5, context_dim\), got shape \(5, 3, 1\)"),
        (lambda y: y.sum(), r"must return a floating tensor \(\*batch, context_dim\), got \(\)"),
        (lambda y: y.long(), "must return a floating tensor"),
        (lambda y: "context", "got str"),
        (MLPEncoder(4, 2), r"the encoder fails on the arguments that the model is given, \(5, 3\): MLPEncoder"),
    ],
    ids=["rows", "dimensions", "scalar", "integers", "words", "fails"],
)
def test_an_encoder_that_does_not_fit_is_refused(encoder, words):
    refused(hierarchy, words, data(), encoder=encoder)


def test_an_encoder_that_changes_its_width_is_refused():
    guide = plate_flow(hierarchy, "group", encoder=lambda y: y[:, :2] if len(y) == 5 else y).setup(data())
    with pytest.raises(ValueError, match=r"width 3 \(shape \(7, 3\)\), but the guide was built for width 2"):
        guide(data(7))


def test_recipes_must_fit():
    for name in ("local_flow", "global_flow"):
        with pytest.raises(TypeError, match=f"{name} must be a recipe"):
            AutoPlateFlow(hierarchy, "group", **{name: flows.nsf(1)})
    words = r"local_flow\(1, 5\) must return a Flow .* with contexts of width 5"
    refused(hierarchy, words, data(), local_flow=lambda dim, width: flows.nsf(dim))
    words = r"global_flow\(1\) must return a Flow over events of shape \(1,\)"
    refused(hierarchy, words, data(), global_flow=lambda dim: flows.nsf(dim + 1))


def test_latents_that_it_cannot_answer_for_are_refused():
    def program(latent, size=None):
        with pyro.plate("group", 6, subsample_size=size):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            latent(x)

    refused(program, "'k' is discrete", lambda x: pyro.sample("k", dist.Poisson(0.5)))
    refused(program, "'a' is an angle; only AutoFlow", lambda x: pyro.sample("a", dist.VonMises(0.0, 1.0)))
    refused(
        program,
        "support of latent site 'u'.*differs from row to row.*stretch it",
        lambda x: pyro.sample("u", dist.Uniform(0.0, torch.arange(1.0, 7.0))),
    )
    refused(program, "support of latent site 'u'", lambda x: pyro.sample("u", dist.Uniform(x, x + 2)))
    for left_out in (dist.Delta, lambda x: dist.Bernoulli(logits=x)):  # a point, and an enumerated site
        guide = plate_flow(program, "group").setup(lambda x, fn=left_out: pyro.sample("d", fn(x)))
        assert [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()] == ["x"]

    def scaled(x):
        u = pyro.sample("u", dist.Uniform(0.0, 1.0))
        pyro.deterministic("v", u * torch.arange(1.0, 7.0))

    plate_flow(program, "group").setup(scaled)  # the way out in the error works


def test_other_arguments_must_not_move_the_supports():
    def model(y, top):
        with pyro.plate("group", len(y)):
            u = pyro.sample("u", dist.Uniform(0.0, top))
            pyro.sample("y", dist.Normal(u, 1.0), obs=y)

    guide = plate_flow(model, "group", encoder=lambda y, top: y[:, None]).setup(torch.rand(6), 5.0)
    draws = guide.sample(3, torch.rand(9), 5.0)
    for ask in (lambda *args: guide.sample(3, *args), lambda *args: guide.log_prob(draws, *args)):
        with pytest.raises(ValueError, match=r"'u' has another support .*upper_bound=10.*built for .*upper_bound=5"):
            ask(torch.rand(9), 10.0)
    assert guide.log_prob(draws, torch.rand(9), 5.0).shape == (3,)


def test_rows_may_have_a_support_that_is_shared():
    """Bounds that a plate expands to its rows work, and so do data of other rows."""

    def model(top, rows):
        with pyro.plate("group", rows):
            pyro.sample("u", dist.Uniform(torch.zeros(rows), torch.full((rows,), top)))

    guide = plate_flow(model, "group", encoder=lambda top, rows: torch.zeros(rows, 1), init_scale=2.0).setup(5.0, 4)
    draws = guide.sample(200, 5.0, 9)["u"]
    assert draws.shape == (200, 9)
    assert 0 < draws.min() < 1 < 4 < draws.max() < 5


def test_fit_svi_refuses_what_is_for_autoflow():
    with pytest.raises(ValueError, match="AutoPlateFlow"):
        fit_svi(hierarchy, plate_flow(hierarchy, "group"), data(), steps=5, warm_start=True, progress=False)


def test_guides_without_the_plate_are_trained_on_minibatches_too():
    """Only the model subsamples rows; the rows differ, so that minibatches have different densities."""
    y = torch.tensor([0.0, 5.0, 9.0, 100.0])

    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("group", len(y), subsample_size=2) as i:
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[i])

    for guide in (AutoFlow(model, small_global), plate_flow(model, "group")):
        assert fit_svi(model, guide, y, steps=5, num_particles=4, progress=False).losses.isfinite().all()


@pytest.mark.slow
def test_rows_start_alike_and_learn_apart():
    """Without an encoder all rows start with the same distribution, and each converges to its posterior."""
    y = torch.tensor([[-4.0], [0.0], [4.0]]).expand(3, 3)
    guide = plate_flow(hierarchy, "group", local_flow=line).setup(y)
    draws = guide.sample(500, y)["level"]
    assert (draws.mean(0)).abs().max() < 5 * 0.1 / math.sqrt(500)
    fit_svi(hierarchy, guide, y, 1, steps=100, num_particles=4, lr=0.05, progress=False)
    _, _, levels, sd = exact(y)
    assert ((guide.sample(500, y)["level"].mean(0) - levels) / sd).abs().max() < 0.5
