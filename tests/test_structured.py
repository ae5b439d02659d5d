"""AutoStructuredFlow reads the structure of models, is an exact guide of them, and finds known posteriors.

Models have plates that are nested, crossed or subsampled, and sequences: chains, walks, grids and panels.
"""

import copy
import functools
import math
import pickle
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import draws_of, same, stirred
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor

import pyro_flows as pf
from pyro_flows import AutoStructuredFlow, fit_svi
from pyro_flows.encoders import MLPEncoder
from pyro_flows.fitting.guide_start import density_of_all_rows
from pyro_flows.guides.read_structure import Nesting, Structure
from pyro_flows.programs.density import Density
from pyro_flows.programs.model_and_guide import Task
from pyro_flows.training.loop import Descent

normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))


def walk(y):
    """Sample a random walk as one vector, whose steps a factor joins."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), (len(y),)))
    before = torch.cat((torch.zeros_like(x[..., :1]), x[..., :-1]), -1)
    pyro.factor("steps", dist.Normal(before, scale[..., None]).log_prob(x).sum(-1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def chain(y):
    """Sample a chain site by site, as examples of Pyro do."""
    scale, x = pyro.sample("scale", dist.LogNormal(0.0, 0.5)), torch.tensor(0.0)
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x_{t}", dist.Normal(x, scale))
        pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])


def crossed(y, users=None, items=None):
    """Sample effects of users and items."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    rows = pyro.plate("users", y.shape[0], users, dim=-2)
    columns = pyro.plate("items", y.shape[1], items, dim=-1)
    with rows:
        kind = pyro.sample("kind", dist.Normal(0.0, 1.0))
    with columns:
        good = pyro.sample("good", dist.Normal(0.0, 1.0))
    with rows as i, columns as j:
        pyro.sample("y", dist.Normal(mean + kind + good, 1.0), obs=y[i][:, j])


def nested(y, shared=True):
    """Sample pupils in schools, which share a mean or nothing."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0)) if shared else 0.0
    with pyro.plate("schools", y.shape[0], dim=-2):
        school = pyro.sample("school", dist.Normal(mean, 1.0))
        with pyro.plate("pupils", y.shape[1], dim=-1):
            pupil = pyro.sample("pupil", dist.Normal(school, 1.0))
            pyro.sample("y", dist.Normal(pupil, 1.0), obs=y)


def panel(y):
    """Sample a chain for each person, around a level of their own."""
    share = pyro.sample("share", dist.Uniform(0.0, 1.0))
    with pyro.plate("people", len(y)):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        x = level
        for t in pyro.markov(range(y.shape[1])):
            x = pyro.sample(f"x{t}", dist.Normal(level + share * x, 1.0))
            pyro.sample(f"y{t}", dist.Normal(x, 1.0), obs=y[:, t])


def grid(y):
    """Sample a field on a grid, whose neighbours factors join."""
    x = pyro.sample("x", dist.Normal(torch.zeros(y.shape), 5.0).to_event(2))
    pyro.factor("down", -(x[..., 1:, :] - x[..., :-1, :]).square().sum((-1, -2)))
    pyro.factor("right", -(x[..., :, 1:] - x[..., :, :-1]).square().sum((-1, -2)))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(2), obs=y)


def mixture(y):
    """Sample means of components, which data couple, and a shift of each row."""
    with pyro.plate("components", 3):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        kind = pyro.sample("kind", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mean[kind] + shift, 1.0), obs=y)


def dense(y):
    """Sample a walk by its increments: all of them are coupled."""
    steps = pyro.sample("steps", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(steps.cumsum(-1), 1.0).to_event(1), obs=y)


def ragged(y, school, pupils_dim=-1):
    """Sample pupils who each belong to a school by an index."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("schools", 70, dim=-1):
        level = pyro.sample("level", dist.Normal(mean, 1.0))
    along = level[..., school].reshape(*level.shape[:-1], -1, *(1,) * (-1 - pupils_dim))
    with pyro.plate("pupils", len(school), dim=pupils_dim):
        pupil = pyro.sample("pupil", dist.Normal(along, 1.0))
        pyro.sample("y", dist.Normal(pupil, 1.0), obs=y.reshape(-1, *(1,) * (-1 - pupils_dim)))


def classes(y, school, teacher):
    """Sample pupils within classes, which belong to teachers, who belong to schools."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("schools", 66):
        level = pyro.sample("level", dist.Normal(mean, 1.0))
    with pyro.plate("teachers", len(school), dim=-2):
        skill = pyro.sample("skill", dist.Normal(level[..., school].unsqueeze(-1), 1.0))
    with pyro.plate("classes", len(teacher)):
        size = pyro.sample("size", dist.Normal(0.0, 1.0).expand((2,)).to_event(1))
        middle = (size.sum(-1) + skill[..., teacher, 0] + level[..., school[teacher]]).unsqueeze(-2)
        with pyro.plate("pupils", len(y), dim=-2):
            pupil = pyro.sample("pupil", dist.Normal(middle, 1.0))
            pyro.sample("y", dist.Normal(pupil, 1.0), obs=y)


def index(number: int, size: int) -> Tensor:
    """Return the outer rows of some rows."""
    return torch.randint(number, (size,), generator=torch.Generator().manual_seed(number))


def pupils_of(y, mean, schools=None, pupils=None):
    """Sample pupils whose mean is a function of 70 schools, and of the rows of both."""
    with pyro.plate("schools", 70, schools) as rows:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("pupils", len(y), pupils) as i:
        pupil = pyro.sample("pupil", dist.Normal(mean(level, rows, i), 1.0))
        pyro.sample("y", dist.Normal(pupil, 1.0), obs=y[i])


class Case(NamedTuple):
    model: Any
    args: tuple[Any, ...]
    blocks: dict[str, tuple[int, ...]]  # the size of each block's vector, and its parents


CASES = {
    "walk": Case(walk, (normal(100),), {"latent": (1,), "x_steps": (100, 0)}),
    "chain": Case(chain, (normal(70),), {"latent": (1,), "x_0_steps": (70, 0)}),
    "crossed": Case(crossed, (normal(70, 80),), {"latent": (71,), "items_latent": (1, 0)}),
    "crossed_large": Case(
        crossed, (normal(200, 210),), {"latent": (1,), "users_latent": (1, 0), "items_latent": (1, 0)}
    ),
    "crossed_small": Case(crossed, (normal(6, 90),), {"latent": (7,), "items_latent": (1, 0)}),
    "nested": Case(
        nested, (normal(70, 5),), {"latent": (1,), "schools_latent": (1, 0), "schools_pupils_latent": (1, 0, 1)}
    ),
    "rows_alone": Case(nested, (normal(70, 5), False), {"schools_latent": (1,), "schools_pupils_latent": (1, 0)}),
    "panel": Case(panel, (normal(70, 9),), {"latent": (1,), "people_latent": (1, 0), "people_x0_steps": (9, 0, 1)}),
    "grid": Case(grid, (normal(10, 12),), {"x_steps": (120,)}),
    "mixture": Case(mixture, (normal(80),), {"latent": (3,), "rows_latent": (1, 0)}),
    "dense": Case(dense, (normal(80),), {"latent": (80,)}),
    "ragged": Case(
        ragged, (normal(150), index(70, 150)), {"latent": (1,), "schools_latent": (1, 0), "pupils_latent": (1, 0, 1)}
    ),
    "ragged_apart": Case(
        ragged,
        (normal(150), index(70, 150), -3),
        {"latent": (1,), "schools_latent": (1, 0), "pupils_latent": (1, 0, 1)},
    ),
    "classes": Case(
        classes,
        (normal(3, 90), index(66, 80), index(80, 90)),
        {
            "latent": (1,),
            "schools_latent": (1, 0),
            "teachers_latent": (1, 0, 1),
            "classes_latent": (2, 0, 1, 2),
            "pupils_classes_latent": (1, 0, 1, 2, 3),
        },
    ),
    "few": Case(nested, (normal(4, 3),), {"latent": (17,)}),
}


every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.slow
@every_case
def test_the_structure_is_that_of_the_model(case: Case) -> None:
    guide = AutoStructuredFlow(case.model).setup(*case.args)
    found = {block.name: (block.packing.size, *block.parents) for block in guide.posterior.blocks}
    assert found == case.blocks


def started(model: Any, *args: Any, **settings: Any) -> AutoStructuredFlow:
    """Return a guide after one step without length, where training starts, or after the steps that are given."""
    torch.manual_seed(0)
    guide = AutoStructuredFlow(model)
    fit_svi(model, guide, *args, **{"steps": 1, "lr": 1e-9, "num_particles": 2, "progress": False, **settings})
    return guide


def in_one_plate(y):
    """Sample five numbers outside of a plate, and one in each row."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        level = pyro.sample("level", dist.Normal(loc.sum(-1, keepdim=True), 1.0))
        pyro.sample("y", dist.Normal(level, 1.0), obs=y)


@pytest.mark.parametrize(("rows", "plates"), [(64, ()), (65, ("rows",))])
def test_few_numbers_in_a_plate_are_left_to_one_flow(rows: int, plates: tuple[str, ...]) -> None:
    assert AutoStructuredFlow(in_one_plate).setup(torch.zeros(rows)).structure.plates == plates


@every_case
def test_log_prob_is_that_of_the_trace(case: Case) -> None:
    guide = stirred(AutoStructuredFlow(case.model).setup(*case.args))
    trace = poutine.trace(guide).get_trace(*case.args)
    values = {name: trace.nodes[name]["value"] for name, _ in guide.prototype_trace.iter_stochastic_nodes()}
    torch.testing.assert_close(guide.log_prob(values, *case.args), trace.log_prob_sum(), rtol=1e-4, atol=1e-2)
    draws = guide.sample(3, *case.args)
    assert {name: value.shape[1:] for name, value in draws.items()} == {n: v.shape for n, v in values.items()}
    assert guide.log_prob(draws, *case.args).isfinite().all()


@every_case
def test_its_transform_leads_from_the_bases_to_the_draws(case: Case) -> None:
    guide = stirred(AutoStructuredFlow(case.model).setup(*case.args))
    space = Density(Task(case.model, guide, case.args, {}))
    z, transform = space.vectors(5, 5), guide.get_transform(*case.args)
    x = transform.inv(z)
    torch.testing.assert_close(transform(x), z, rtol=1e-4, atol=1e-3)
    sizes, blocks = [math.prod(shape) for shape in transform.transform.shapes], guide.posterior.blocks
    parts = [part.unflatten(-1, (-1, b.packing.size)) for b, part in zip(blocks, x.split(sizes, -1), strict=True)]
    log_base = sum(b.flow.base().log_prob(part).sum(-1) for b, part in zip(blocks, parts, strict=True))
    log_q = log_base - transform.log_abs_det_jacobian(x, z)
    torch.testing.assert_close(log_q, space.log_q(z), rtol=1e-4, atol=1e-2)


@every_case
def test_copies_pickles_and_files_have_the_same_density(case: Case, tmp_path: Any) -> None:
    guide = stirred(AutoStructuredFlow(case.model).setup(*case.args))
    draws = guide.sample(3, *case.args)
    wanted = guide.log_prob(draws, *case.args)
    torch.testing.assert_close(copy.deepcopy(guide).log_prob(draws, *case.args), wanted)
    torch.testing.assert_close(pickle.loads(pickle.dumps(guide)).log_prob(draws), wanted)
    pf.save(guide, tmp_path / "guide")
    torch.testing.assert_close(pf.load(tmp_path / "guide").log_prob(draws), wanted)
    fresh = AutoStructuredFlow(case.model).setup(*case.args)
    fresh.load_state_dict(guide.state_dict())
    torch.testing.assert_close(fresh.log_prob(draws, *case.args), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(20, 30), (70, 30), (20, None)])
def test_crossed_plates_may_each_be_subsampled(sizes: tuple[int | None, int | None], local_params: None) -> None:
    y = CASES["crossed"].args[0]
    guide = AutoStructuredFlow(crossed)
    svi = SVI(crossed, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(y, *sizes) for _ in range(30)]
    assert all(loss < 1e6 for loss in losses)
    draw = guide(y, *sizes)
    assert draw["kind"].shape == (sizes[0] or 70, 1)
    assert draw["good"].shape == (sizes[1] or 80,)
    found = Predictive(crossed, guide=guide, num_samples=4)(y)
    assert found["kind"].shape == (4, 70, 1)


def exact_walk(y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of a walk of known scale."""
    below = torch.eye(len(y)) - torch.diag(torch.ones(len(y) - 1), -1)
    covariance = torch.linalg.inv((below.T @ below / scale**2 + torch.eye(len(y))).double())
    return covariance @ y.double(), covariance.diagonal().sqrt()


@pytest.mark.slow
@pytest.mark.parametrize("model", [walk, chain])
def test_a_walk_of_known_scale_is_found_exactly(model: Any) -> None:
    y = normal(70).cumsum(0)
    known = poutine.condition(model, data={"scale": torch.tensor(0.7)})
    draws = started(known, y).sample(4000, y)
    x = draws["x"] if "x" in draws else torch.stack([draws[f"x_{t}"] for t in range(len(y))], -1)
    mean, deviation = exact_walk(y, 0.7)
    error = (x.double().mean(0) - mean) / deviation * 4000**0.5
    assert error.abs().max() < 4.5  # standard errors, of 70
    assert ((x.double().std(0) / deviation - 1).abs() < 4.5 * 8000**-0.5).all()


def test_rows_without_shared_latents_are_found_exactly() -> None:
    y = CASES["rows_alone"].args[0]
    draws, means = started(nested, y, False).sample(4000, y, False), y.mean(1, keepdim=True)
    mean, deviation = means * 5 / 7, (2 / 7) ** 0.5  # y - school ~ N(0, 2) for each of five pupils
    error = (draws["school"].mean(0) - mean) / deviation * 4000**0.5
    assert error.abs().max() < 4.5
    torch.testing.assert_close(draws["pupil"].mean(0), (y + mean) / 2, atol=0.06, rtol=0)
    assert abs(float(draws["school"].std(0).mean()) / deviation - 1) < 0.01


def pairs_of(structure: Structure) -> list[tuple[str, str]]:
    return [(nesting.plate, nesting.outer) for nesting in structure.nestings]


def test_the_index_of_rows_is_found() -> None:
    """Rows of a chain of plates, and rows that do not depend on any other."""
    _, school, teacher = args = CASES["classes"].args
    found = AutoStructuredFlow(classes).setup(*args).structure
    assert pairs_of(found) == [("teachers", "schools"), ("classes", "teachers"), ("classes", "schools")]
    torch.testing.assert_close([n.rows for n in found.nestings], [school, teacher, school[teacher]])

    def alone(y, school):
        with pyro.plate("schools", 70):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("pupils", len(y)):
            pupil = pyro.sample("pupil", dist.Normal(0.0, 1.0))
            belongs = torch.arange(len(y)) != 3
            pyro.sample("y", dist.Normal(pupil + belongs * level[..., school], 1.0), obs=y)

    y, school = CASES["ragged"].args
    (nesting,) = AutoStructuredFlow(alone).setup(y, school).structure.nestings
    torch.testing.assert_close(nesting.rows, school.index_fill(0, torch.tensor(3), 0))


def test_rows_may_be_nested_in_more_rows_than_they_are() -> None:
    own, school = torch.randperm(150, generator=torch.Generator().manual_seed(0)), index(40, 70)

    def model(y):
        with pyro.plate("schools", 150):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("buildings", 150):
            state = pyro.sample("state", dist.Normal(level[..., own], 1.0))
        with pyro.plate("pupils", 70):
            pupil = pyro.sample("pupil", dist.Normal(state[..., school], 1.0))
            pyro.sample("y", dist.Normal(pupil, 1.0), obs=y)

    found = AutoStructuredFlow(model).setup(normal(70)).structure
    assert ("pupils", "buildings") in pairs_of(found)
    assert len(found.nestings) == 2


def test_a_row_that_belongs_to_two_chains_is_nested_in_one() -> None:
    """Patients of a doctor may belong to another hospital than the doctor: then hospitals are crossed with them."""
    home, doctor, other = index(70, 150), index(150, 400), index(69, 400)

    def model(y):
        with pyro.plate("hospitals", 70):
            hospital = pyro.sample("hospital", dist.Normal(0.0, 1.0))
        with pyro.plate("doctors", 150):
            skill = pyro.sample("skill", dist.Normal(hospital[..., home], 1.0))
        with pyro.plate("patients", 400):
            patient = pyro.sample("patient", dist.Normal(skill[..., doctor], 1.0))
            pyro.sample("y", dist.Normal(patient + hospital[..., other], 0.5), obs=y)

    found = AutoStructuredFlow(model).setup(normal(400)).structure
    assert pairs_of(found) == [("doctors", "hospitals"), ("patients", "doctors")]


@pytest.mark.parametrize("kind", ["scales", "covariates", "counts"])
def test_an_index_is_found_whatever_the_scales_of_rows(kind: str) -> None:
    school, size = index(70, 300), torch.arange(300) % 5
    covariate = torch.linspace(-1000, 1000, 300)

    def model(y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0)).unsqueeze(-1)
        with pyro.plate("schools", 70):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("pupils", 300):
            scale = torch.where(size == 0, 0.03, 30.0) if kind == "scales" else torch.tensor(1.0)
            pupil = pyro.sample("pupil", dist.Normal(level[..., school], scale))
            along = slope * covariate if kind == "covariates" else 0.0
            if kind == "counts":
                pyro.sample("y", dist.Poisson((pupil + 2.0 * size).exp()), obs=y.abs().round())
            else:
                pyro.sample("y", dist.Normal(pupil + along, scale), obs=y)

    (nesting,) = AutoStructuredFlow(model).setup(normal(300)).structure.nestings
    torch.testing.assert_close(nesting.rows, school)


def test_plates_that_are_given_all_rows_or_hold_both_sides_still_fit() -> None:
    school = index(70, 150)

    def model(y, rows=None, both=True):
        outer = pyro.plate("schools", 70, dim=-2)
        inner = pyro.plate("pupils", 150, subsample=rows, dim=-1)
        with outer:
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        if both:
            with outer, inner:
                taste = pyro.sample("taste", dist.Normal(0.0, 1.0))
        with inner as i:
            own = level[..., school[i], 0].unsqueeze(-2)
            pupil = pyro.sample("pupil", dist.Normal(own, 1.0))
            liked = taste[..., school[i], torch.arange(len(i))].unsqueeze(-2) if both else 0.0
            pyro.sample("y", dist.Normal(pupil + liked, 1.0), obs=y[i])

    guide = AutoStructuredFlow(model)
    fit_svi(model, guide, normal(150), steps=2, progress=False)
    assert len(guide.structure.nestings) == 1
    assert AutoStructuredFlow(model).setup(normal(150), torch.randperm(150), False).structure.nestings == ()


def test_outer_rows_must_all_be_there() -> None:
    school = index(70, 150)

    def model(y, size=None):
        def own(level, rows, _):
            return torch.zeros(*level.shape[:-1], 70).index_copy(-1, rows, level)[..., school]

        pupils_of(y, own, size)

    guide = AutoStructuredFlow(model).setup(normal(150))
    with pytest.raises(ValueError, match="plate 'schools' takes 20 of its 70 rows"):
        guide(normal(150), 20)


def test_rows_of_two_others_are_not_nested() -> None:
    first, second = index(70, 150), index(69, 150)

    twice = functools.partial(pupils_of, mean=lambda level, *_: level[..., first] + level[..., second])
    assert AutoStructuredFlow(twice).setup(normal(150)).structure.nestings == ()


@pytest.mark.parametrize("name", ["nested", "ragged", "ragged_apart", "classes"])
def test_a_tree_of_rows_starts_at_the_posterior(name: str) -> None:
    """The posterior is Gaussian with the structure of the guide, so the log-weights of draws are all the same."""
    model, args, _ = CASES[name]
    draws = Density(Task(model, started(model, *args), args, {})).draw(1000, 100)
    log_weights = draws.log_p - draws.log_q
    assert log_weights.std() < 0.1, "of more than 200 latents in single precision, with draws of second derivatives"


def test_a_gain_depends_on_the_scale_of_the_rows() -> None:
    """The gain of pupils in their school is 1 / (1 + scale²), in 300 rows; a constant gain makes the scale too sure."""

    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0)).unsqueeze(-1)
        with pyro.plate("schools", y.shape[0], dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("pupils", y.shape[1], dim=-1):
                pupil = pyro.sample("pupil", dist.Normal(level, scale.unsqueeze(-1)))
                pyro.sample("y", dist.Normal(pupil, 1.0), obs=y)

    generator = torch.Generator().manual_seed(0)
    y = torch.randn(100, 1, generator=generator) + 2**0.5 * torch.randn(100, 5, generator=generator)
    scale = torch.linspace(0.3, 2.5, 500, dtype=torch.float64)
    covariance = torch.ones(5, 5) + (1 + scale**2)[:, None, None] * torch.eye(5)
    log_p = dist.MultivariateNormal(torch.zeros(5).double(), covariance).log_prob(y.double()[:, None]).sum(0)
    share = torch.softmax(log_p + dist.LogNormal(0.0, 1.0).log_prob(scale), 0)
    mean = (share * scale).sum()
    deviation = (share * (scale - mean).square()).sum().sqrt()
    found = started(model, y).sample(4000, y)["scale"].double()
    assert abs(found.mean() - mean) / deviation < 0.2
    assert 0.9 < found.std() / deviation < 1.1


@pytest.mark.parametrize("structure", ["x", {"plates": ()}, AutoStructuredFlow])
def test_a_structure_of_another_kind_is_refused(structure: Any) -> None:
    with pytest.raises(TypeError, match=r"structure must be a Structure, such as guide\.structure of another"):
        AutoStructuredFlow(crossed, structure=structure)


@pytest.mark.parametrize(
    ("rows", "sizes", "message"),
    [
        (index(70, 9), (), r"one index of 'schools' for each row of 'pupils', \(150,\), .*got .*\(9,\)"),
        (index(99, 150), (), "from 0 to 69"),
        (index(70, 150), (20,), "plate 'pupils' takes some of its rows"),
        (index(70, 150).tolist(), (), r"from 0 to 69, got \["),
    ],
)
def test_nestings_must_fit_the_model(rows: Any, sizes: tuple[int, ...], message: str) -> None:
    def model(y, school, size=None):
        pupils_of(y, lambda level, _, i: level[..., school[i]], None, size)

    args = CASES["ragged"].args
    structure = Structure(("schools", "pupils"), nestings=(Nesting("pupils", "schools", rows),))
    with pytest.raises(ValueError, match=message):
        AutoStructuredFlow(model, structure=structure).setup(*args, *sizes)
    both = Nesting("pupils", "schools", rows), Nesting("schools", "pupils", rows)
    with pytest.raises(ValueError, match=r"have the cycle (pupils, schools, pupils|schools, pupils, schools)"):
        AutoStructuredFlow(model, structure=Structure(("schools", "pupils"), nestings=both)).setup(*args)
    structure = Structure(("pupils",), nestings=(Nesting("pupils", "towns", rows),))
    with pytest.raises(ValueError, match=r"a nesting of 'pupils' in 'towns'. Its plates are pupils"):
        AutoStructuredFlow(model, structure=structure).setup(*args)


def effects() -> tuple[Tensor, Tensor, Tensor]:
    """Return data of crossed effects, and the exact means and standard deviations of mean, users and items."""
    generator = torch.Generator().manual_seed(1)
    users, items = torch.randn(70, 1, generator=generator), torch.randn(80, generator=generator)
    y = 0.5 + users + items + torch.randn(70, 80, generator=generator)
    size = 1 + 70 + 80
    design = torch.zeros(70, 80, size, dtype=torch.float64)
    design[..., 0] = 1
    design[range(70), :, range(1, 71)] = 1
    design[:, range(80), range(71, size)] = 1
    rows = design.reshape(-1, size)
    prior = torch.ones(size, dtype=torch.float64)
    prior[0] = 0.25
    covariance = torch.linalg.inv(rows.T @ rows + torch.diag(prior))
    return y, covariance @ (rows.T @ y.double().flatten()), covariance.diagonal().sqrt()


def fitted_effects(y: Tensor, *args: int, **settings: Any) -> Tensor:
    draws = started(crossed, y, *args, **settings).sample(4000, y)
    return torch.cat((draws["mean"][:, None], draws["kind"][..., 0], draws["good"]), -1).double()


@pytest.mark.parametrize("sizes", [(), (30, 35)], ids=["all rows", "minibatches"])
def test_crossed_effects_start_at_the_exact_means(sizes: tuple[int, ...]) -> None:
    """The mean, all users and all items are shifted against each other at hardly any cost."""
    y, mean, deviation = effects()
    found = fitted_effects(y, *sizes)
    assert ((found.mean(0) - mean) / deviation).abs().max() < 0.1
    assert abs(float(found[:, 0].std() / deviation[0]) - 1) < 0.06
    ratio = found[:, 1:].std(0) / deviation[1:]
    assert 0.75 < ratio.min() < ratio.max() < 1.1  # users and items are independent given the mean


def test_a_small_crossed_plate_joins_the_shared_latents() -> None:
    """Users are independent given all items: then the start is the exact Gaussian, with the exact deviations."""
    y, mean, deviation = effects()
    guide = AutoStructuredFlow(crossed).setup(y)
    assert guide.structure.plates == ("items",), "the users are fewer"
    found = fitted_effects(y)
    ratio = found.std(0) / deviation
    assert ((found.mean(0) - mean) / deviation).abs().max() < 0.1
    assert (ratio - 1).abs().max() < 4.5 * 8000**-0.5


def scaled(y, schools=None, pupils=None):
    """Sample pupils in schools, each with a scale, where both plates may be subsampled."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    outer = pyro.plate("schools", y.shape[0], schools, dim=-2)
    inner = pyro.plate("pupils", y.shape[1], pupils, dim=-1)
    with outer as i:
        spread = pyro.sample("spread", dist.LogNormal(mean, 1.0))
        with inner as j:
            pupil = pyro.sample("pupil", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(pupil.sum(-1), spread), obs=y[i][:, j])


def markov(y, people=None):
    """Sample a chain for each person; people may be subsampled."""
    share = pyro.sample("share", dist.Uniform(0.0, 1.0))
    with pyro.plate("people", len(y), people) as i:
        x = torch.zeros(())
        for t in pyro.markov(range(y.shape[1])):
            x = pyro.sample(f"x{t}", dist.Normal(share * x, 1.0))
            pyro.sample(f"y{t}", dist.Normal(x, 1.0), obs=y[i, t])


def test_each_sequence_starts_where_its_row_does() -> None:
    first = torch.linspace(-30.0, 30.0, 9)

    def model(y):
        with pyro.plate("people", 9):
            x = first
            for t in pyro.markov(range(12)):
                x = pyro.sample(f"x{t}", dist.Normal(x, 1.0))
                pyro.sample(f"y{t}", dist.Normal(x, 1.0), obs=y[t])

    y = first + normal(12, 9)
    guide = AutoStructuredFlow(model).setup(y)
    assert len(guide.structure.sequences) == 1
    torch.testing.assert_close(guide.sample(10, y)["x11"].mean(0), first, atol=1.0, rtol=0)


@pytest.mark.parametrize(
    ("model", "y", "sizes"), [(crossed, (9, 7), (4, 3)), (scaled, (9, 7), (4, 3)), (markov, (9, 8), (4,))]
)
def test_parts_of_minibatches_add_up_to_the_density_of_all_rows(
    model: Any, y: tuple[int, ...], sizes: tuple[int, ...], local_params: bool, double: None
) -> None:
    """Plates are not divisible by the size of a minibatch; scores count too."""
    data = normal(*y).double()
    some = AutoStructuredFlow(model, structure=AutoStructuredFlow(model).setup(data, *sizes).structure)
    task = Task(model, some.setup(data, *sizes), (data, *sizes), {})
    density = density_of_all_rows(some, task.settle())
    every = AutoStructuredFlow(model, structure=some.structure).setup(data)
    space = Density(Task(model, every, (data,), {}))
    z = torch.randn(3, space.dim, requires_grad=True)
    values = density(z), space.log_prob(z)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), z)[0] for value in values))


@pytest.mark.slow
def test_training_keeps_what_the_start_has_found() -> None:
    y, mean, deviation = effects()
    found = fitted_effects(y, steps=60, lr=None)
    assert ((found.mean(0) - mean) / deviation).abs().max() < 0.3


def test_training_by_minibatches_keeps_it_too() -> None:
    y, mean, deviation = effects()
    found = fitted_effects(y, 35, 40, num_particles=1, steps=200, lr=None)
    assert ((found.mean(0) - mean) / deviation).abs().max() < 0.3


def test_rows_of_a_plate_may_have_an_encoder() -> None:
    """New users have contexts from their data, and items belong to the shared latents."""
    y = CASES["crossed"].args[0]
    encoders, structure = {"users": MLPEncoder(80, context_dim=4)}, Structure(("users",))

    some = functools.partial(crossed, users=20)
    guide = AutoStructuredFlow(some, encoders=encoders, structure=structure)
    fit_svi(some, guide, y, steps=5, progress=False)
    assert guide.sample(3, y[:50])["kind"].shape == (3, 50, 1)


def levels(y, size=None):
    """Sample levels of rows."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(y), size) as i:
        level = pyro.sample("level", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(level[..., None], 1.0).to_event(1), obs=y[i])


class First(MLPEncoder):
    """An encoder that sees the first of four numbers."""

    def forward(self, y, size=None):
        return super().forward(y[..., :1])


@pytest.mark.slow
def test_learned_vectors_correct_what_an_encoder_cannot_tell() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(80, 4, generator=generator) + 2 * torch.randn(80, 1, generator=generator)
    errors = {}
    for name, corrected in (("encoder", ()), ("both", ("rows",))):
        torch.manual_seed(0)
        guide = AutoStructuredFlow(levels, encoders={"rows": First(1, context_dim=4)}, semi_amortized=corrected)
        fit_svi(levels, guide, y, 40, steps=600, num_particles=2, progress=False)
        wanted = (y.sum(1) + guide.sample(2000, y)["mean"].mean()) / 5
        errors[name] = (guide.sample(2000, y)["level"].mean(0) - wanted).square().mean().sqrt() / 5**-0.5
    assert errors["encoder"] > 0.8
    assert errors["both"] < 0.3
    alone = guide.for_new_rows()
    new = alone.sample(500, torch.linspace(-3, 3, 80)[:, None].expand(80, 4))["level"].mean(0)
    assert torch.corrcoef(torch.stack((new, torch.linspace(-3, 3, 80))))[0, 1] > 0.95
    assert guide.sample(3, y[:50])["level"].shape == (3, 50)  # other rows


def test_encoders_and_vectors_come_back_from_a_file(tmp_path: Any) -> None:
    def some(y):
        levels(y, 40)

    y, encoder = normal(80, 4), MLPEncoder(4, context_dim=3)
    guide = AutoStructuredFlow(some, encoders={"rows": encoder}, semi_amortized=("rows",))
    fit_svi(some, guide, y, steps=5, lr=0.1, num_particles=2, progress=False)
    pf.save(guide, tmp_path / "guide")
    assert same(draws_of(pf.load(tmp_path / "guide"), y), draws_of(guide, y))
    assert not same(draws_of(guide.for_new_rows(), y), draws_of(guide, y))


def test_errors_name_the_argument() -> None:
    encoder = MLPEncoder(4, context_dim=3)
    for settings, words in (
        ({"embedding_dim": 0}, "AutoStructuredFlow: embedding_dim must be .* got 0"),
        ({"encoders": {"rows": 3}}, "AutoStructuredFlow: encoder must be"),
        ({"semi_amortized": "rows"}, "plate 'rows' is semi-amortised and has no encoder"),
        ({"encoders": {"rowz": encoder}}, "'rowz', which holds no latents .*Its plates are none"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            AutoStructuredFlow(levels, **settings).setup(normal(20, 4))
    with pytest.raises(ValueError, match=r"for_new_rows: call setup"):
        AutoStructuredFlow(levels).for_new_rows()


def given(y, rows):
    """Sample means of rows that the user chooses."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", 80, subsample=rows):
        level = pyro.sample("level", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(level, 1.0), obs=y[rows])


def spread(i, y):
    """Sample means of rows that a user chooses, with an unknown standard deviation."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 2000, subsample=i):
        level = pyro.sample("level", dist.Normal(mean, scale))
        pyro.sample("y", dist.Normal(level[..., None], 1.0).to_event(1), obs=y)


def test_given_rows_start_from_a_minibatch_as_if_there_were_no_others() -> None:
    """Scaled like the data, priors of rows would draw their scale to 0, since their entropy is not scaled."""
    levels = 1 + 0.7 * normal(2000)
    y = levels[:, None] + normal(2000, 3)
    draws = started(spread, torch.arange(200), y[:200]).sample(1000, torch.arange(2000), y)
    deviation = ((0.7**2 + 1 / 3) / 200) ** 0.5  # of the mean, given the rows that it has seen
    assert abs(float(draws["mean"].std()) / deviation - 1) < 0.25
    assert abs(float(draws["mean"].mean()) - 1) < 4 * deviation
    assert abs(float(draws["scale"].mean()) - 0.7) < 0.3


@pytest.mark.parametrize(
    ("model", "args", "steps"),
    [(crossed, (), 500), (crossed, (35, 40), 500), (crossed, (5, 5), 4000), (given, (torch.arange(20),), 4000)],
    ids=["all rows", "some rows", "too few at a time", "given rows"],
)
def test_rows_that_start_near_their_posterior_take_few_steps(
    model: Any, args: tuple[Any, ...], steps: int, monkeypatch: Any
) -> None:
    """The rows of a minibatch alone tell little of the others, which have a long way to go."""
    seen = []
    monkeypatch.setattr(Descent, "fit", lambda descent: seen.append(descent.settings.steps) or stopped())
    y = CASES["crossed"].args[0]
    with pytest.raises(KeyboardInterrupt):
        fit_svi(model, AutoStructuredFlow(model), y if model is crossed else y[0], *args, progress=False)
    assert seen == [steps]


def stopped() -> None:
    raise KeyboardInterrupt
