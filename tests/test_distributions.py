"""Bases and distributions.

A base is a module that builds a Pyro distribution in its own dtype.  Its density integrates to one, and draws follow
it.  Gradients of draws are those of the integrals.
"""

import copy
import math
import pickle
from collections.abc import Callable

import laws
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_flows import flows
from pyro_flows.distributions import CircularBase, ContaminatedNormalBase, MixtureBase, ModesBase, StudentTBase
from pyro_flows.flows import Flow
from pyro_flows.transforms import ActNorm

every_base = pytest.mark.parametrize("name", laws.BASES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
every_learner = pytest.mark.parametrize("name", ["normal", "student_t", "mixture"])


def random(name: str, dim: int = 3, seed: int = 0) -> nn.Module:
    """Return a base in float64 with parameters away from their initial values."""
    base = laws.BASES[name](dim).double()
    with torch.no_grad():
        for place, parameter in enumerate(base.parameters()):
            parameter.add_(laws.normal(*parameter.shape, seed=seed + place, scale=0.5))
    return base


def quadrature(base: nn.Module) -> tuple[Tensor, Tensor]:
    """Return points ``(N, 1)`` and weights of an integral over the support of the first feature."""
    unit = (torch.arange(20001, dtype=torch.float64) + 0.5) / 20001 * 2 - 1
    if isinstance(base, CircularBase):
        return base.bound * unit.unsqueeze(-1), torch.full_like(unit, 2 * base.bound / len(unit))
    steps = 32 * unit  # equidistant in arsinh x, for tails as heavy as those of a Cauchy
    return steps.sinh().unsqueeze(-1), steps.cosh() * (64 / len(unit))


def bounded(x: Tensor) -> Tensor:
    """Return a smooth bounded function, with the period of the circular base if there is one."""
    return torch.sin(math.pi / 2 * x + 0.5).sum(-1)


def skewed(x: Tensor) -> Tensor:
    return torch.sigmoid(2 * x - 1).sum(-1)


# -------------------------------------------------------------------------------------------------------- distribution


@every_base
@every_dtype
def test_shapes_and_dtypes(name: str, dtype: torch.dtype) -> None:
    base = laws.BASES[name](3).to(dtype)
    for batch in ((), (5,), (4, 5)):
        q = base().expand(torch.Size(batch))
        assert (q.batch_shape, q.event_shape, q.has_rsample) == (batch, (3,), True)
        for shape in ((), (1,), (7,), (2, 6)):
            x = q.rsample(torch.Size(shape))
            assert x.shape == (*shape, *batch, 3) == q.sample(torch.Size(shape)).shape
            assert q.log_prob(x).shape == (*shape, *batch)
            assert x.dtype == q.log_prob(x).dtype == dtype
            assert x.reshape(-1, 3).unique(dim=0).shape[0] == math.prod((*shape, *batch))  # no repeated draws
            torch.testing.assert_close(q.log_prob(x), base().log_prob(x))
    assert isinstance(base(), TorchDistributionMixin)


@every_base
def test_the_density_integrates_to_one_and_its_draws_follow_it(name: str) -> None:
    base = random(name, 1)
    x, weight = quadrature(base)
    with torch.no_grad():
        mass = base().log_prob(x).exp() * weight
        draws = base().sample((40000,))
    assert mass.sum().item() == pytest.approx(1, abs=1e-6)
    for function in (bounded, skewed):
        seen = function(draws)
        standard_error = seen.std().item() / len(seen) ** 0.5
        assert seen.mean().item() == pytest.approx((mass * function(x)).sum().item(), abs=4 * standard_error)


@every_base
def test_features_are_scored_with_the_others(name: str) -> None:
    """In two dimensions, the mean of exp(log q - log p) over draws of p is one."""
    p, q = random(name, 2, seed=0), random(name, 2, seed=9)
    with torch.no_grad():
        x = p().sample((40000,))
        ratio = (q().log_prob(x) - p().log_prob(x)).exp()
    assert ratio.mean().item() == pytest.approx(1, abs=4 * ratio.std().item() / 200 + 1e-12)


# ------------------------------------------------------------------------------------------------------------ training


@every_learner
@every_dtype
@pytest.mark.parametrize("function", [bounded, skewed])
def test_gradients_of_draws_are_those_of_the_integral(name: str, dtype: torch.dtype, function: Callable) -> None:
    """d/dθ ∫ p f = E[f'(x) dx/dθ] for one feature, within four standard errors over 40 batches."""
    base = random(name, 1)
    x, weight = quadrature(base)

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(base.parameters()))]).double()

    wanted = gradient((base().log_prob(x).exp() * weight * function(x)).sum())
    base = copy.deepcopy(base).to(dtype)
    batches = torch.stack([gradient(function(base().rsample((2000,))).mean()) for _ in range(40)])
    error = batches.mean(0) - wanted
    assert (error.abs() <= 4 * batches.std(0) / 40**0.5 + 1e-7).all()


@every_learner
def test_three_steps_from_the_start_move_every_parameter(name: str) -> None:
    base = laws.BASES[name](3).double()
    before = [parameter.detach().clone() for parameter in base.parameters()]
    laws.descend(base.parameters(), lambda: -base().log_prob(laws.normal(64, 3).cumsum(-1) + 1).mean())
    assert all((parameter != old).all() for parameter, old in zip(base.parameters(), before, strict=True))


@every_learner
def test_a_flow_trains_its_base_by_its_draws(name: str) -> None:
    base = laws.BASES[name](2)
    flow = Flow([ActNorm(2)], base)
    x, log_prob = flow.rsample_and_log_prob((64,))
    (log_prob + 0.5 * x.square().sum(-1)).mean().backward()
    assert all((p.grad != 0).all() and p.grad.isfinite().all() for p in flow.parameters())


# ---------------------------------------------------------------------------------------------------------------- flow


@every_base
@pytest.mark.parametrize("context_dim", [0, 2], ids=["plain", "context"])
def test_it_is_the_base_of_a_flow(name: str, context_dim: int) -> None:
    flow = laws.randomise(Flow(flows.nsf(3, context_dim, hidden_dims=(8,)).transforms, random(name)), scale=0.3)
    flow = flow.double()
    context = laws.normal(4, context_dim) if context_dim else None
    q = flow(context)
    x = q.rsample((5,))
    assert x.shape == ((5, 4, 3) if context_dim else (5, 3))
    torch.testing.assert_close(flow(context).log_prob(x.detach().clone()), q.log_prob(x))
    again, log_prob = flow.rsample_and_log_prob((5,), context)
    torch.testing.assert_close(flow.log_prob(again, context), log_prob)
    assert flow.float()(None if context is None else context.float()).sample().dtype == torch.float32


@every_base
def test_copies_and_states_agree(name: str) -> None:
    base, x, fresh = random(name), laws.normal(6, 3), laws.BASES[name](3).double()
    fresh.load_state_dict(base.state_dict(), strict=True)
    for twin in (copy.deepcopy(base), pickle.loads(pickle.dumps(base)), fresh):
        assert torch.equal(twin().log_prob(x), base().log_prob(x))


@pytest.mark.slow
@every_base
@pytest.mark.parametrize("verb", ["log_prob", "rsample_and_log_prob"])
def test_flows_over_it_compile_to_one_graph(name: str, verb: str) -> None:
    pyro.enable_validation(False)  # a check of values is control flow that depends on data
    flow = Flow([ActNorm(3)], random(name)).double()
    argument = laws.normal(4, 3) if verb == "log_prob" else (4,)
    torch._dynamo.reset()
    plain = getattr(flow, verb)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*laws.seeded(lambda: plain(argument), lambda: compiled(argument)))


# ------------------------------------------------------------------------------------------------------------ student t


@every_dtype
@pytest.mark.parametrize("df", [1.001, 1.5, 10.0, 100.0, 999.0])
def test_student_t_is_the_same_in_float32_from_cauchy_to_normal(df: float, dtype: torch.dtype) -> None:
    base = StudentTBase((4,), df=df, max_df=1000.0).to(dtype)
    torch.testing.assert_close(base.degrees_of_freedom, torch.full((4,), df, dtype=dtype), atol=0, rtol=1e-5)
    x = torch.tensor([0.0, 1.0, -10.0, 1e4], dtype=dtype)
    exact = dist.StudentT(base.degrees_of_freedom.double(), torch.zeros(4, dtype=torch.float64), 1.0)
    torch.testing.assert_close(base().base_dist.log_prob(x).double(), exact.log_prob(x.double()), atol=5e-4, rtol=1e-5)
    draws = base().rsample((10000,))
    (base().log_prob(draws).mean() + draws.abs().log1p().mean()).backward()
    assert draws.isfinite().all()
    assert base.free_df.grad.isfinite().all()


@pytest.mark.parametrize("free", [-50.0, 50.0])
def test_degrees_of_freedom_stay_between_their_bounds(free: float) -> None:
    base = StudentTBase((2,), df=5.0, min_df=2.0, max_df=50.0)
    nn.init.constant_(base.free_df, free)
    torch.testing.assert_close(base.degrees_of_freedom, torch.full((2,), 2.0 if free < 0 else 50.0))


def test_student_t_learns_the_tails_of_each_feature() -> None:
    """Fits recover the parameters within four standard errors, by the Fisher information of 4000 draws."""
    true = torch.tensor([1.5, 6.0], dtype=torch.float64)
    data = dist.StudentT(true, 0.0, 1.0).sample((4000,))
    base = StudentTBase((2,)).double()
    optimiser = torch.optim.LBFGS(base.parameters(), line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = -base().log_prob(data).sum()
        value.backward()
        return value

    optimiser.step(loss)
    df = base.degrees_of_freedom.detach().requires_grad_()
    score = torch.autograd.grad(dist.StudentT(df, 0.0, 1.0).log_prob(data).sum(), df, create_graph=True)[0]
    curvature = -torch.autograd.grad(score.sum(), df)[0]
    assert ((df - true).abs() < 4 / curvature.sqrt()).all()


# -------------------------------------------------------------------------------------------------------------- mixture


@pytest.mark.parametrize("num_components", [2, 3, 8, 30])
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_a_mixture_starts_with_unit_variance_and_components_apart(dim: int, num_components: int) -> None:
    base = MixtureBase(dim, num_components).double()
    torch.testing.assert_close(base().mean, torch.zeros(dim, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(base().variance, torch.ones(dim, dtype=torch.float64), atol=1e-6, rtol=0)
    assert all(len(column.unique()) == num_components for column in base.loc.T)
    assert torch.equal(base.loc, MixtureBase(dim, num_components).double().loc)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": lambda z: torch.sin(z[:, 0] + 2 * z[:, 1]),
    "x": lambda z: z[:, 0],
    "y^2": lambda z: z[:, 1].square(),
    "x y": lambda z: z.prod(-1),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_draws_of_a_mixture_move_as_the_density_does(function: Callable[[Tensor], Tensor]) -> None:
    """E[∇f · dx/dθ] = d/dθ ∫ p f for locations, scales and logits; both sides are sums over one grid, so exact."""
    base = random("mixture", 2)
    axis = torch.linspace(-9, 9, 301, dtype=torch.float64)
    grid, area = torch.cartesian_prod(axis, axis), (axis[1] - axis[0]) ** 2
    density = base().log_prob(grid).exp() * area
    wanted = torch.autograd.grad((density * function(grid)).sum(), list(base.parameters()))
    mixture = base()
    mixture.sample = lambda _: grid
    found = torch.autograd.grad((density.detach() * function(mixture.rsample())).sum(), list(base.parameters()))
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


def test_gradients_of_a_mixture_are_finite_where_components_are_far_apart() -> None:
    """Float32 is compared with float64; in a tail, the distribution function rounds to one, its derivative does not."""
    base = MixtureBase(3, 4)
    with torch.no_grad():
        base.loc.mul_(10)
        base.logits.add_(torch.tensor([0.0, 2.0, -3.0, 1.0]))
    draws, found = base().sample((20000,)), []
    for dtype in (torch.float32, torch.float64):
        twin = copy.deepcopy(base).to(dtype)
        mixture = twin()
        mixture.sample = lambda _, dtype=dtype: draws.to(dtype)
        found.append(torch.autograd.grad(torch.sin(mixture.rsample()).sum() / len(draws), list(twin.parameters())))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------------- contaminated normal


def test_weights_of_a_normal_are_bounded_under_the_contaminated_one():
    base, x = ContaminatedNormalBase(1).double()(), torch.linspace(-60, 60, 2401, dtype=torch.float64).unsqueeze(-1)
    normal = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    log_weights = normal.log_prob(x).sum(-1) - base.log_prob(x)
    assert log_weights.max() <= -math.log(1 - 0.02) + 1e-12
    assert log_weights[0] < -1000  # far beyond the normal component


def test_the_contaminated_normal_is_a_mixture_in_each_feature():
    x = laws.normal(50, 2, scale=3.0)
    density = 0.8 * dist.Normal(0.0, 1.0).log_prob(x).exp() + 0.2 * dist.Normal(0.0, 2.0).log_prob(x).exp()
    base = ContaminatedNormalBase(2, share=0.2, scale=2.0).double()
    torch.testing.assert_close(base().log_prob(x), density.log().sum(-1))


# ------------------------------------------------------------------------------------------------------------- circular


def test_angles_are_uniform_and_scored_by_any_representative() -> None:
    base = CircularBase([True, False, True], bound=2.0).double()
    x = base().sample((20000,))
    assert (x[:, [0, 2]].abs() <= 2).all()
    assert x[:, 1].abs().max() > 2
    assert (x.std(0) - torch.tensor([2 / 3**0.5, 1, 2 / 3**0.5])).abs().max() < 0.03
    turned = x + torch.tensor([4.0, 0.0, -400.0], dtype=torch.float64)
    torch.testing.assert_close(base().log_prob(turned), base().log_prob(x))
    wanted = dist.Normal(0.0, 1.0).log_prob(x[:, 1]) - 2 * math.log(4)
    torch.testing.assert_close(base().log_prob(x), wanted)


# --------------------------------------------------------------------------------------------------------------- errors


test_errors_name_argument_and_value = laws.refusals(
    (lambda: StudentTBase((2,), df=1.0), "StudentTBase: df must lie between min_df = 1.0 and .*got 1.0"),
    (lambda: StudentTBase((2,), df=300.0), "StudentTBase: df must .* max_df = 200.0, .*got 300.0"),
    (lambda: MixtureBase(2, 1), "MixtureBase: num_components must be .* at least 2, got 1"),
    (lambda: CircularBase([]), r"CircularBase: circular must hold one bool for each feature, got \[\]"),
    (lambda: CircularBase([[True]]), r"CircularBase: circular .*got \[\[True\]\]"),
    (lambda: ModesBase(0, 1), "ModesBase"),
    (lambda: ModesBase(2, 0), "ModesBase"),
    (lambda: ModesBase(2.5, 1), "ModesBase"),
    (lambda: ModesBase(2, 3, circular=[True]), r"ModesBase: circular must hold one bool .*got \[True\]"),
)


def test_modes_are_the_mixture_that_they_are_set_to() -> None:
    base = ModesBase(2, 3).double()
    loc, factor = laws.normal(3, 2).double(), torch.eye(2).double() + 0.4 * laws.normal(3, 2, 2).double().tril(-1)
    base.set(loc, factor, torch.tensor([1.0, 2.0, 5.0]).double())
    x = laws.normal(50, 2, seed=1).double()
    parts = torch.distributions.MultivariateNormal(loc, factor @ factor.mT).log_prob(x.unsqueeze(1))
    exact = (parts + torch.tensor([1.0, 2.0, 5.0]).double().div(8).log()).logsumexp(-1)
    torch.testing.assert_close(base().log_prob(x), exact)
    assert list(base.parameters()) == []


def modes_of_angles(sd: float) -> ModesBase:
    """Return two modes of an angle, a number and another angle, all correlated."""
    base = ModesBase(3, 2, circular=[True, False, True]).double()
    factor = sd * torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.3, 0.0], [-0.6, 0.2, 0.5]]).double()
    base.set(torch.tensor([[3.0, 1.0, 0.0], [0.5, -1.0, -3.0]]).double(), factor.expand(2, 3, 3), torch.ones(2))
    return base


@pytest.mark.slow
@pytest.mark.parametrize("sd", [0.5, 2.0, 30.0])
def test_modes_of_angles_are_normalised_and_drawn_as_they_are_scored(sd: float) -> None:
    law = modes_of_angles(sd)()
    angle = (torch.arange(40).double() + 0.5) / 40 * 2 * math.pi - math.pi
    line = torch.linspace(-3 - 5 * sd, 3 + 5 * sd, 150).double()
    grid = torch.cartesian_prod(angle, line, angle)
    log_prob = law.log_prob(grid)
    cell = (2 * math.pi / 40) ** 2 * (line[1] - line[0])
    assert float(log_prob.exp().sum() * cell) == pytest.approx(1, abs=1e-3)
    draws = law.sample((40_000,))
    assert (draws[:, [0, 2]].abs() <= math.pi).all()
    turned = draws + 2 * math.pi * torch.tensor([1.0, 0.0, -2.0]).double()
    torch.testing.assert_close(law.log_prob(turned), law.log_prob(draws))
    for score in (lambda x: law.log_prob(x), lambda x: (x[:, 0] - x[:, 2]).cos(), lambda x: x[:, 1] * x[:, 0].sin()):
        found, exact = score(draws), (log_prob.exp() * cell) @ score(grid)
        assert abs(found.mean() - exact) < 4 * found.std() / 200


def test_narrow_modes_of_angles_are_gaussians() -> None:
    base = modes_of_angles(0.01)
    x = base.loc[0] + 0.01 * laws.normal(50, 3)
    exact = torch.distributions.MultivariateNormal(base.loc[0], scale_tril=base.scale_tril[0]).log_prob(x)
    torch.testing.assert_close(base().log_prob(x), exact - math.log(2))
