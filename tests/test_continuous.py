"""Continuous transforms.

Exact divergences equal those of the Jacobian, and estimated ones are unbiased.  Rows do not affect each other.
Gradients are those of the solution.  Errors of the solver name the reason and the remedy.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import laws
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_guides import conjugate, simulator
from models import normals
from torch import Tensor, nn

from pyro_flows import AutoFlow, fit_amortized, fit_density, fit_svi, flows, ode_report
from pyro_flows.conditioners import MLPField, VectorField
from pyro_flows.distributions import MixtureBase
from pyro_flows.encoders import MLPEncoder, Standardize
from pyro_flows.flows import Flow
from pyro_flows.objectives import FlowMatching, Likelihood
from pyro_flows.training import Training
from pyro_flows.transforms import ActNorm, Continuous, Coupling, Solver

in_both_directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def field_of(dim: int = 3, context_dim: int = 0, hidden_dims: tuple[int, ...] = (8, 6), **options: Any) -> MLPField:
    return laws.randomise(MLPField(dim, context_dim, hidden_dims, **options), scale=1.5).double()


def tight(field: VectorField, **options: Any) -> Continuous:
    return Continuous(field, Solver("dopri8", **{"rtol": 1e-11, "atol": 1e-11, **options}))


class Opaque(VectorField):
    """Field without known structure."""

    def __init__(self, field: VectorField) -> None:
        super().__init__(field.input_dim, field.context_dim)
        self.field = field

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.field(t, x, context)


class Given(VectorField):
    """Field given by a function of time and place."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], dim: int = 2) -> None:
        super().__init__(dim)
        self.function = function
        self.size = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.size * self.function(t, x)


# ------------------------------------------------------------ fields


@pytest.mark.parametrize("hidden_dims", [(7,), (8, 6), (8, 6, 7)], ids=str)
@pytest.mark.parametrize("activation", [nn.ELU, nn.SiLU, nn.Softplus, nn.Tanh])
def test_the_jacobian_of_a_network_is_autograds(hidden_dims: tuple[int, ...], activation: type[nn.Module]) -> None:
    """Trace and products agree for both methods, at the time and context of each point."""
    field = field_of(3, 2, hidden_dims, activation=activation)
    t, x, context = torch.rand(5).double(), laws.normal(5, 3), laws.normal(5, 2, seed=1)
    v, jacobian = field.at(context)(t, x)
    torch.testing.assert_close(v, field(t, x, context))
    matrix = laws.jacobian(lambda value: field(t, value, context), x)
    probes = laws.normal(4, 5, 3, seed=2)
    for found in (jacobian, Opaque(field).at(context)(t, x)[1]):
        torch.testing.assert_close(found.trace(), torch.einsum("nii->n", matrix))
        torch.testing.assert_close(found.pull(probes), torch.einsum("kni,nij->knj", probes, matrix))


def test_the_exact_divergence_of_two_hidden_layers_takes_one_pass_in_any_dimension() -> None:
    """No operation in the graph stores a number per row, feature and unit."""
    rows, dim, width = 32, 200, 16
    field = laws.randomise(MLPField(dim, 0, (width, width)))
    with laws.bytes_kept() as held:
        _, jacobian = field.at()(torch.tensor(0.5), torch.randn(rows, dim, requires_grad=True))
        jacobian.trace()
    assert max(held.values()) <= 4 * dim * max(rows, width)  # of four bytes each
    assert field.cheap_trace
    assert not MLPField(dim, 0, (width,) * 3).cheap_trace


@pytest.mark.parametrize("exact", [True, False])
def test_fields_of_any_kind_are_solved_in_inference_mode(exact: bool) -> None:
    field, x, context = field_of(3, 2), laws.normal(4, 3), laws.normal(4, 2, seed=1)
    for kind in (field, Opaque(field)):
        layer, found = Continuous(kind, exact=exact), []
        for mode in (False, True):
            torch.manual_seed(0)
            with torch.inference_mode(mode):
                found.append(layer.forward_and_log_det(x + 0, context + 0))
        torch.testing.assert_close([part.clone() for part in found[1]], list(found[0]))


# ------------------------------------------------------------ solutions


def test_a_linear_field_is_solved_by_the_exponential() -> None:
    """The solution of dx/dt = A x is exp(A) x, with log-determinant tr A and known regularisers."""
    matrix = laws.normal(3, 3)
    layer = tight(Given(lambda t, x: x @ matrix.T, 3))
    x = laws.normal(5, 3, seed=1)
    found = layer.solve(x, costs=True, num_probes=2000)
    torch.testing.assert_close(found.value, x @ torch.matrix_exp(matrix).T)
    torch.testing.assert_close(found.log_det, matrix.trace().expand(5))
    times = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    paths = torch.einsum("tij,nj->tni", torch.matrix_exp(times[:, None, None] * matrix), x)
    torch.testing.assert_close(found.kinetic, (paths @ matrix.T).square().sum(-1).mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.jacobian, matrix.square().sum().expand(5), rtol=0.1, atol=0)
    assert found.evaluations == layer.solve(x).evaluations  # regularisers do not affect the step size
    back = layer.solve(found.value, inverse=True, costs=True)
    torch.testing.assert_close(back.kinetic, found.kinetic)
    torch.testing.assert_close(back.log_det, -found.log_det)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["dopri5", "dopri8", "bosh3", "adaptive_heun"])
def test_adaptive_solvers_keep_their_tolerance(solver: str) -> None:
    layer, x = tight(field_of()), laws.normal(20, 3)
    wanted = layer.solve(x)
    counts = []
    for tolerance in (1e-3, 1e-6):
        found = Continuous(layer.field, solver=Solver(solver, rtol=tolerance, atol=tolerance)).solve(x)
        assert (found.value - wanted.value).abs().max() < 20 * tolerance
        assert (found.log_det - wanted.log_det).abs().max() < 20 * tolerance
        counts.append(found.evaluations)
    assert counts[0] < counts[1]


@pytest.mark.parametrize(("solver", "order"), [("rk4", 4), ("heun3", 3), ("midpoint", 2), ("euler", 1)])
def test_fixed_steps_converge_at_their_order(solver: str, order: int) -> None:
    """Each of these methods has as many stages as its order."""
    layer, x = tight(field_of()), laws.normal(20, 3)
    wanted, errors = layer.solve(x), []
    for number in (49, 98):
        found = Continuous(layer.field, solver=Solver(solver, num_steps=number)).solve(x)
        assert found.evaluations == order * number
        errors.append((found.value - wanted.value).norm().item() + (found.log_det - wanted.log_det).norm().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.35)


@pytest.mark.slow
def test_the_density_of_a_plane_integrates_to_one() -> None:
    """The field is trained, in float32 with the default tolerances."""
    torch.manual_seed(0)
    z = torch.randn(500, 2)
    x = torch.stack((z[:, 0], z[:, 0].square() + 0.5 * z[:, 1]), -1)
    flow = flows.cnf(2, hidden_dims=(16, 16))
    fit_density(flow, x, training=Training(objective=FlowMatching()), max_epochs=60, progress=False)
    bounds, count = torch.tensor([[-6.0, 6.0], [-8.0, 24.0]]), 240
    axes = [low + (high - low) * (torch.arange(count) + 0.5) / count for low, high in bounds.tolist()]
    with torch.no_grad():
        mass = flow.log_prob(torch.cartesian_prod(*axes)).double().exp().sum() * (bounds[:, 1] - bounds[:, 0]).prod()
        assert mass.item() / count**2 == pytest.approx(1, abs=0.01)
        assert ode_report(flow, x).round_trip.max() < 1e-4


@pytest.mark.slow
def test_rows_do_not_change_each_others_answer_beyond_the_tolerance() -> None:
    """One row in 10,000 moves fast.  A mean error over the batch would allow it a hundred times the error."""
    layer = Continuous(Given(lambda t, x: torch.where(x[..., :1] > 5, 30 * torch.sin(40 * t), 0.1).expand_as(x)))
    quiet, loud = torch.zeros(9999, 2).double(), torch.full((1, 2), 10.0).double()
    together, _ = layer.forward_and_log_det(torch.cat((quiet, loud)))
    alone, _ = layer.forward_and_log_det(loud)
    wanted = torch.full((1, 2), 10 + 30 * (1 - math.cos(40)) / 40).double()
    for exact in (wanted, alone):
        torch.testing.assert_close(together[-1:], exact, rtol=20 * layer.solver.rtol, atol=0)
    assert (together[:-1] - 0.1).abs().max() < 1e-6


@pytest.mark.parametrize("exact", [True, False])
def test_batches_may_be_empty_or_have_many_dimensions(exact: bool) -> None:
    layer = Continuous(field_of(), exact=exact)
    for batch in ((), (2, 3), (0,), (2, 0)):
        y, log_det = layer.forward_and_log_det(laws.normal(*batch, 3))
        assert (y.shape, log_det.shape) == ((*batch, 3), batch)


# ------------------------------------------------------------ estimates


@pytest.mark.slow
@pytest.mark.parametrize(("inverse", "opaque"), [(False, False), (True, True)])
def test_estimates_are_unbiased(inverse: bool, opaque: bool) -> None:
    """Estimates and their stated errors agree with exact values within 3 standard errors."""
    field = field_of(3, 2)
    x, context = laws.normal(6, 3), laws.normal(6, 2, seed=1)
    wanted = tight(field).solve(x, context, inverse=inverse).log_det
    layer = Continuous(Opaque(field) if opaque else field, exact=False, num_probes=400)
    torch.manual_seed(0)
    with torch.no_grad():
        found = layer.solve(x, context, inverse=inverse)
        assert ((found.log_det - wanted).abs() < 3 * found.log_det_se).all()
        layer.num_probes = 1
        single = torch.stack([layer.solve(x, context, inverse=inverse).log_det for _ in range(60)])
    spread = found.log_det_se * math.sqrt(400)
    assert (single.std(0) / spread - 1).abs().max() < 0.6  # the standard error of the ratio is .1 to .2


def test_the_noise_is_one_draw_for_a_solve() -> None:
    """The noise is equal in all evaluations of a solve."""
    states = []
    for number in (1, 50):
        torch.manual_seed(0)
        Continuous(field_of(), exact=False, solver=Solver("rk4", num_steps=number)).solve(laws.normal(4, 3))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_what_is_exact_says_so() -> None:
    narrow, deep = MLPField(3, 0, (8, 8)), MLPField(40, 0, (8, 8, 8))
    for field in (narrow, MLPField(400), Opaque(MLPField(16))):
        assert Continuous(field).is_exact
    for field in (deep, Opaque(MLPField(17))):
        assert not Continuous(field).is_exact
    assert Continuous(deep, exact=True).is_exact
    assert not Continuous(narrow, exact=False).is_exact
    x = torch.randn(4, 3)
    assert (Continuous(narrow).solve(x).log_det_se == 0).all()
    assert Continuous(narrow, exact=False).solve(x).log_det_se.isnan().all()
    exact = laws.randomise(flows.cnf(3), scale=1.0)
    assert torch.equal(exact.log_prob(x), exact.eval().log_prob(x))


@pytest.mark.parametrize("context_dim", [0, 2])
def test_the_estimated_flow_starts_at_its_base_and_scores_about_as_the_exact_one(context_dim: int) -> None:
    flow = flows.ffjord(3, context_dim, num_transforms=2, hidden_dims=(8, 8, 8), num_probes=200).double()
    x, context = laws.normal(6, 3), laws.normal(6, 2, seed=1) if context_dim else None
    torch.testing.assert_close(flow.log_prob(x, context), flow.base().log_prob(x))
    laws.randomise(flow, scale=1.0)
    torch.manual_seed(0)
    report = ode_report(flow, x, context, num_probes=200)
    estimate = flow.log_prob(x, context)
    for layer in flow.transforms:
        layer.exact = True
    exact = flow.log_prob(x, context)
    assert (report.log_prob_se > 0).all()
    for found in (report.log_prob, estimate):
        assert ((found - exact).abs() < 4 * report.log_prob_se).all()
    assert (ode_report(flow, x, context).log_prob_se == 0).all()


# ------------------------------------------------------------ gradients


in_both_ways = pytest.mark.parametrize(
    ("solver", "inverse", "opaque"),
    [("dopri5", False, False), ("dopri5", True, True), ("rk4", True, False), ("rk4", False, True)],
)


@pytest.mark.slow
@in_both_ways
def test_gradients_are_those_of_the_solution(solver: str, inverse: bool, opaque: bool) -> None:
    """Gradients are checked for value, context and all parameters."""
    field = field_of(2, 2, (4, 3))
    layer = Continuous(Opaque(field) if opaque else field, solver=Solver(solver, rtol=1e-9, atol=1e-9, num_steps=5))
    values = laws.normal(2, 2, seed=1), laws.normal(2, 2, seed=2)
    solve = lambda layer, *given: layer.solve(*given, inverse=inverse)[:2]  # noqa: E731
    assert laws.passes(torch.autograd.gradcheck, solve, layer, *values, fast_mode=True, atol=1e-6)


@pytest.mark.slow
@in_both_ways
def test_the_adjoint_method_finds_the_same_gradients(solver: str, inverse: bool, opaque: bool) -> None:
    field, found = field_of(2, 2, (4, 3)), []
    method = Solver(solver, rtol=1e-9, atol=1e-9, num_steps=60, adjoint=True)
    for layer in (tight(field), Continuous(Opaque(field) if opaque else field, method)):
        x, context = laws.normal(5, 2).requires_grad_(), laws.normal(5, 2, seed=1).requires_grad_()
        y, log_det, *_ = layer.solve(x, context, inverse=inverse)
        found.append(torch.autograd.grad(y.square().sum() + log_det.sum(), [x, context, *field.parameters()]))
    torch.testing.assert_close(*reversed(found), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", [False, True], ids=["direct", "adjoint"])
def test_densities_and_samples_of_a_flow_have_gradients(adjoint: bool) -> None:
    flow = flows.cnf(2, 2, hidden_dims=(4, 3), solver=Solver(rtol=1e-9, atol=1e-9, adjoint=adjoint)).double()
    laws.randomise(flow, scale=1.0)
    x, context = (laws.normal(2, 2, seed=seed).requires_grad_() for seed in (1, 2))

    def drawn(context: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return flow.rsample_and_log_prob((3,), context)

    assert torch.autograd.gradcheck(flow.log_prob, (x, context), atol=1e-5, fast_mode=True)
    assert torch.autograd.gradcheck(drawn, (context,), atol=1e-5, fast_mode=True)


@pytest.mark.slow
def test_second_derivatives_are_there_but_for_the_adjoint_method() -> None:
    layer = Continuous(field_of(2, 0, (4, 3)), solver=Solver("rk4", num_steps=10))
    assert torch.autograd.gradgradcheck(layer.forward_and_log_det, (laws.normal(2, 2).requires_grad_(),))


def test_the_adjoint_method_keeps_no_steps() -> None:
    """The memory of the graph grows with the steps of the direct method, not of the adjoint method."""
    saved = {}
    for adjoint, number in itertools.product((False, True), (5, 50)):
        with laws.bytes_kept() as held:
            Continuous(field_of(), solver=Solver("rk4", num_steps=number, adjoint=adjoint)).solve(laws.normal(50, 3))
        saved[adjoint, number] = sum(held.values())
    assert saved[True, 50] == saved[True, 5] < saved[False, 5] < saved[False, 50] / 5


# ------------------------------------------------------------ safety


def test_a_stiff_field_ends_with_a_way_out() -> None:
    layer = Continuous(Given(lambda t, x: torch.sin(1e4 * x)), solver=Solver(max_num_steps=50))
    with pytest.raises(FloatingPointError, match=r"max_num_steps=50 steps, .*stiff near time 0\.\d+ .*rtol=.*kinetic="):
        layer.forward_and_log_det(laws.normal(4, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_field_that_jumps_underflows_with_an_explanation(dtype: torch.dtype) -> None:
    """No step size can cross the jump, and the error comes before the budget is used up."""
    layer = Continuous(Given(lambda t, x: -1e9 * (x - 1).sign() * t.gt(0.3)), Solver(max_num_steps=10**6)).to(dtype)
    with pytest.raises(FloatingPointError, match=r"dopri5 fell to steps .*float.* time 0\.3\d* "):
        layer.forward_and_log_det(torch.zeros(4, 2, dtype=dtype))


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
@in_both_directions
def test_a_field_that_is_not_finite_names_the_time(solver: str, inverse: bool) -> None:
    layer = Continuous(Given(lambda t, x: torch.where((t - 0.5).abs() < 0.2, math.nan, 1.0) * x), solver=Solver(solver))
    with pytest.raises(FloatingPointError, match=r"finite near time 0\.[1-9]\d* .*smaller lr"):
        layer.solve(laws.normal(4, 2), inverse=inverse)


def test_rows_that_are_not_finite_become_nan_and_leave_the_others_alone() -> None:
    flow = laws.randomise(flows.cnf(2), scale=1.0)
    x = torch.tensor([[0.0, 1.0], [math.inf, 0.0], [0.0, math.nan]])
    found = flow.log_prob(x)
    assert found.isfinite().tolist() == [True, False, False]
    torch.testing.assert_close(found[0], flow.log_prob(x[0]))


def test_a_step_into_places_without_a_field_names_the_time() -> None:
    layer = Continuous(Given(lambda t, x: -5 * x**99))
    with pytest.raises(FloatingPointError, match="field is not finite near time 0 "):
        layer.forward_and_log_det(torch.full((1, 2), 300.0).double())


@in_both_directions
def test_the_adjoint_equation_is_watched_too(inverse: bool) -> None:
    """A square root has no derivative at zero, which only the adjoint equation meets."""

    class Root(Given):
        def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
            return x * torch.where((t - 0.5).abs() < 0.2, (self.size - 1).sqrt(), 0.1)

    layer, x = Continuous(Root(lambda t, x: x), solver=Solver(adjoint=True)), laws.normal(4, 2).requires_grad_()
    y, *_ = layer.solve(x, inverse=inverse)
    with pytest.raises(FloatingPointError, match=r"gradients of the adjoint equation are not finite near time 0"):
        y.sum().backward()


@in_both_directions
def test_no_time_lies_beyond_the_ends(inverse: bool) -> None:
    times: list[float] = []

    class Watching(Opaque):
        def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
            times.append(float(t))
            return super().forward(t, x, context)

    x = laws.normal(4, 3).requires_grad_()
    y, log_det, *_ = Continuous(Watching(field_of()), solver=Solver(adjoint=True)).solve(x, inverse=inverse)
    there = len(times)
    (y.sum() + log_det.sum()).backward()
    assert 20 < there < len(times)
    assert 0 <= min(times) < 0.01 < 0.99 < max(times) <= 1


@pytest.mark.slow
def test_the_adjoint_equation_may_be_solved_many_times() -> None:
    layer = Continuous(field_of(), solver=Solver(adjoint=True, rtol=1e-4, atol=1e-4, max_num_steps=30))
    x = laws.normal(5, 3).requires_grad_()
    _, log_det = layer.forward_and_log_det(x)
    rows = [torch.autograd.grad(log_det[i % 5], x, retain_graph=True)[0] for i in range(30)]
    assert torch.equal(rows[0], rows[5])


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_the_adjoint_method_refuses_what_it_cannot_do(solver: str) -> None:
    layer, x = Continuous(field_of(), solver=Solver(solver, adjoint=True)), laws.normal(5, 3).requires_grad_()
    y, _ = layer.forward_and_log_det(x)
    with pytest.raises(FloatingPointError, match="gradient of the loss is not finite"):
        (y * math.nan).sum().backward()
    y, _ = layer.forward_and_log_det(x)
    with pytest.raises(RuntimeError, match="adjoint=True there are no second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    y, _ = layer.forward_and_log_det(x[:0])
    y.sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.slow
@in_both_directions
def test_the_adjoint_gradient_of_a_row_is_right_in_quiet_company(inverse: bool) -> None:
    def moves(t: Tensor, x: Tensor) -> Tensor:
        return torch.where(x[..., :1] > 5, 3 * torch.sin(40 * t) * torch.cos(10 * x), 0.1 + 0 * x)

    x, found = torch.cat((torch.zeros(1000, 2), torch.full((1, 2), 20.0))).double().requires_grad_(), []
    for layer in (tight(Given(moves), rtol=1e-8, atol=1e-8), Continuous(Given(moves), solver=Solver(adjoint=True))):
        y, log_det, *_ = layer.solve(x, inverse=inverse)
        found.append(torch.autograd.grad(y[-1].sum() + log_det[-1], x)[0][-1])
    torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=0)


class Sticky(Likelihood):
    """Likelihood that raises a solver error in its calls of a range."""

    def __init__(self, calls: range) -> None:
        super().__init__()
        self.stuck, self.calls = calls, 0

    def forward(self, flow: Any, x: Tensor, context: Any = None) -> Tensor:
        self.calls += flow.training
        stuck = flow.training and self.calls in self.stuck
        flow.transforms[0].solver = Solver(rtol=1e-3, atol=1e-3, max_num_steps=1 if stuck else 1000)
        return super().forward(flow, x, context)


@pytest.mark.slow
def test_a_fit_that_meets_a_stiff_field_skips_it_or_ends_with_what_was_best() -> None:
    x, kept = laws.normal(500, 2, dtype=torch.float32).cumsum(-1) + 3, []
    for stuck in (range(31, 34), range(31, 10**6)):
        torch.manual_seed(0)
        flow = flows.cnf(2, hidden_dims=(8,), solver=Solver(rtol=1e-3, atol=1e-3))
        training = Training(objective=Sticky(stuck), standardize=False)
        fit = functools.partial(fit_density, flow, x, training=training, max_epochs=4, batch_size=30, progress=False)
        if len(stuck) == 3:
            assert fit().skipped == 3
        else:
            with pytest.raises(FloatingPointError, match=r"at step 40 and at the 9 before: .*max_num_steps=1 "):
                fit()
        flow.transforms[0].solver = Solver(rtol=1e-3, atol=1e-3)
        kept.append(flow.log_prob(x).mean().item())
    start = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(x).mean().item()
    assert kept[0] > kept[1] > start + 0.3  # two epochs have reduced the loss


X = torch.zeros(3, 2)
test_errors_name_argument_and_value = laws.refusals(
    (lambda: Continuous(nn.Linear(2, 2)), "Continuous: field must be a VectorField .*got Linear", TypeError),
    (lambda: Solver("lsoda"), "method must be 'dopri5' or .*got 'lsoda'"),
    (lambda: flows.cnf(2, activation=nn.ReLU), "activation must be .* ELU, SiLU.*ReLU.*VectorField"),
    (lambda: MLPField(2, 3)(torch.zeros(()), torch.zeros(2)), "context is missing; .*width 3"),
    (lambda: ode_report(flows.nsf(2), X), "ode_report: .*among its Coupling.*none"),
    (lambda: ode_report(flows.cnf(2).inv, X), "Inverse there are 1 of them inside"),
    (lambda: ode_report(flows.cnf(2), torch.zeros(3, 3)), r"ode_report: x must have .*\(3, 3\)"),
    (lambda: Continuous(Given(lambda t, x: x[..., :1])).forward_and_log_det(X.double()), r"velocity .*got \(3, 1\)"),
    (lambda: FlowMatching()(Flow(flows.cnf(2).transforms, MixtureBase(2, 3)), X), "MixtureBase needs training too"),
    (lambda: FlowMatching(pairing="ot"), "pairing must be 'independent' or 'optimal', got 'ot'"),
    (lambda: Likelihood(jacobian=0.1)(flows.nsf(2), X), r"jacobian=0.1\): it needs continuous transforms"),
    (lambda: FlowMatching()(flows.nsf(2), X), "exactly one continuous transform.*0 in this Flow"),
    (lambda: FlowMatching()(Flow([*flows.nsf(2).transforms, *flows.cnf(2).transforms]), X), "Coupling needs training"),
    (lambda: FlowMatching(pairing="optimal")(flows.cnf(2, 1), X, X[:, :1]), "'optimal' is for flows without a context"),
    (
        lambda: fit_density(flows.cnf(2), torch.randn(50, 2), training=Training(objective=FlowMatching)),
        r"objective must be a module .*got the class FlowMatching, uncalled",
        TypeError,
    ),
)


# ------------------------------------------------------------ objectives


@pytest.mark.slow
def test_the_likelihood_is_the_mean_log_density_and_its_penalties_are_the_reports() -> None:
    flow = laws.randomise(Flow([*flows.cnf(2, 2).transforms, ActNorm(2)]), scale=0.5).double()
    x, context = laws.normal(20, 2), laws.normal(20, 2, seed=1)
    torch.testing.assert_close(Likelihood()(flow, x, context), -flow.log_prob(x, context).mean())
    flow.encoder = Standardize((2,)).double()
    flow.encoder.loc.data.fill_(0.5)
    plain, report = Likelihood()(flow, x, context), ode_report(flow, x, context)
    with_energy = Likelihood(kinetic=0.3)(flow, x, context)
    torch.testing.assert_close(with_energy, plain + 0.3 * report.kinetic.mean(), rtol=1e-4, atol=0)
    torch.manual_seed(0)
    parts = torch.stack([Likelihood(jacobian=0.3)(flow, x, context).detach() for _ in range(50)])
    error = parts.mean() - plain - 0.3 * report.jacobian.mean()
    assert error.abs() < 4 * parts.std() / 50**0.5 + 0.3 * 4 * report.jacobian.std() / (20 * 16) ** 0.5


def test_penalties_of_layers_with_and_without_a_context_add_up() -> None:
    """With several contexts for each row, the two kinds of layers have costs of different shapes."""
    flow = laws.randomise(Flow([*flows.cnf(2, 2).transforms, *flows.cnf(2).transforms]), scale=0.5).double()
    x, contexts = laws.normal(5, 2), laws.normal(3, 5, 2, seed=1)
    found = Likelihood(kinetic=0.3)(flow, x, contexts)
    each = [Likelihood(kinetic=0.3)(flow, x, context) for context in contexts]
    torch.testing.assert_close(found, torch.stack(each).mean(), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_penalties_make_a_field_cheaper() -> None:
    torch.manual_seed(0)
    angle = torch.rand(300) * 2 * math.pi
    x = torch.stack((angle.cos(), angle.sin()), -1) + 0.2 * torch.randn(300, 2)
    found = []
    for objective in (Likelihood(), Likelihood(kinetic=0.3, jacobian=0.3)):
        torch.manual_seed(1)
        flow = flows.cnf(2, hidden_dims=(16, 16), solver=Solver(rtol=1e-3, atol=1e-3))
        fit_density(flow, x, training=Training(objective=objective), max_epochs=10, progress=False)
        found.append(ode_report(flow, x))
    assert found[1].kinetic.mean() < 0.7 * found[0].kinetic.mean()
    assert found[1].jacobian.mean() < 0.7 * found[0].jacobian.mean()


def test_flow_matching_has_the_target_that_it_says() -> None:
    """The loss is zero for the velocity of the line x = x₀ + t (x₁ - (1 - σ) x₀)."""
    flow, x = flows.cnf(2).double(), laws.normal(50, 2, seed=1) * 3
    seen: list[tuple[Tensor, Tensor]] = []

    def straight(t: Tensor, point: Tensor) -> Tensor:
        seen.append((t, point))
        return (x - point) / (1 - t.unsqueeze(-1))

    def still(t: Tensor, point: Tensor) -> Tensor:
        seen.append((t, point))
        return torch.zeros_like(point)

    assert FlowMatching(sigma_min=0.0)(Flow([Continuous(Given(straight))], flow.base), x) < 1e-20
    t, point = seen[0]
    start = (point - t.unsqueeze(-1) * x) / (1 - t.unsqueeze(-1))
    assert start.mean().abs() < 0.5
    assert start.std() == pytest.approx(1, abs=0.3)
    assert ((t * 50).floor().sort().values == torch.arange(50)).all()  # one time per stratum, of 50 equal strata
    before, after = ActNorm(2).double(), ActNorm(2).double()
    before.loc.data.fill_(100.0)
    after.log_scale.data.fill_(2.0)
    loss = FlowMatching(sigma_min=0.3)(Flow([before, Continuous(Given(still)), after], flow.base), x)
    (t, point), rows = seen[-1], after.inverse_and_log_det(x)[0].detach()
    start = (point - t.unsqueeze(-1) * rows) / (1 - 0.7 * t.unsqueeze(-1))
    assert (start.mean(0) - 100).abs().max() < 0.5
    torch.testing.assert_close(loss, (rows - 0.7 * start).square().sum(-1).mean())


@pytest.mark.parametrize("power", [-0.5, 0.0, 1.0])
def test_times_follow_their_law(power: float) -> None:
    times: list[Tensor] = []
    flow = Flow([Continuous(Given(lambda t, x: times.append(t) or 0 * x, dim=1))]).double()
    FlowMatching(time_power=power)(flow, torch.zeros(10_000, 1, dtype=torch.float64))
    assert times[0].mean().item() == pytest.approx((1 + power) / (2 + power), abs=1e-3)


def test_optimal_pairs_have_the_least_distance() -> None:
    """In one dimension, each draw is paired with the row of its rank."""
    from pyro_flows.objectives.flow_matching import MOST_PAIRED, _pairs

    start, x = laws.normal(MOST_PAIRED, 1), laws.normal(MOST_PAIRED, 1, seed=1)
    paired = start[_pairs(start, x)]
    assert torch.equal(paired[x.flatten().argsort()], start.sort(0).values)
    many = laws.normal(3 * MOST_PAIRED + 5, 2)
    assert torch.equal(_pairs(many, many.flip(-1)).sort().values, torch.arange(len(many)))


@pytest.mark.slow
@pytest.mark.parametrize("pairing", ["independent", "optimal"])
def test_flow_matching_finds_a_correlated_normal(pairing: str) -> None:
    """Data are standardised, then matched; the density is then exact."""
    torch.manual_seed(0)
    law = dist.MultivariateNormal(torch.tensor([50.0, -3.0]), torch.tensor([[4.0, 1.8], [1.8, 1.0]]))
    x, fresh = law.sample((2000,)), law.sample((2000,))
    flow = flows.cnf(2, hidden_dims=(32, 32))
    training = Training(objective=FlowMatching(pairing=pairing))
    fit = fit_density(flow, x, training=training, max_epochs=60, progress=False)
    with torch.no_grad():
        divergence = (law.log_prob(fresh) - flow.log_prob(fresh)).mean()
        draws = flow().sample((4000,))
    assert -0.02 < divergence < 0.04
    assert (draws.mean(0) - law.mean).abs().max() < 0.15
    assert fit.held_out is not None
    assert fit.held_out[-1] < fit.held_out[0]


# ------------------------------------------------------------ in Pyro


@pytest.mark.slow
def test_it_is_the_flow_of_a_guide() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x**2, 0.5), obs=torch.tensor(1.0))

    torch.manual_seed(0)
    recipe = functools.partial(flows.cnf, hidden_dims=(16, 16), solver=Solver(rtol=1e-3, atol=1e-3))
    guide = AutoFlow(model, flow=recipe)
    fit = fit_svi(model, guide, steps=100, progress=False)
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    evidence = (dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid**2, 0.5).log_prob(torch.tensor(1.0))).exp()
    log_evidence = (evidence.sum() * 12 / 4000).log().item()
    assert -log_evidence - 0.01 < fit.best_loss < -log_evidence + 0.25
    assert guide.sample(7)["x"].shape == (7,)


@pytest.mark.slow
def test_it_answers_for_all_data_by_flow_matching() -> None:
    """The model is linear and normal, with the posterior N(0.8 x, 0.2)."""
    torch.manual_seed(0)
    recipe = functools.partial(flows.cnf, hidden_dims=(32, 32))
    guide = AutoFlow(conjugate, flow=recipe, encoder=MLPEncoder(2, context_dim=8, hidden_dims=(16,)))
    options = {"training": Training(objective=FlowMatching()), "max_epochs": 60, "lr": 5e-3, "progress": False}
    fit_amortized(conjugate, guide, simulations=4000, **options)
    x = torch.tensor([1.0, -0.5])
    draws = guide.sample(4000, x)["theta"]
    assert (draws.mean(0) - 0.8 * x).abs().max() < 0.1
    assert (draws.std(0) / 0.2**0.5 - 1).abs().max() < 0.12
    exact = dist.Normal(0.8 * x, 0.2**0.5).to_event(1).log_prob(draws)
    assert (exact - guide.log_prob({"theta": draws}, x)).mean().abs() < 0.1


def test_losses_of_latents_are_in_nats_as_the_model_has_them() -> None:
    """Latents of LogNormal(3, 0.1) are near 20, so the log-density of their logarithms differs by 3 nats."""
    prior = dist.LogNormal(torch.full((1,), 3.0), 0.1).to_event(1)
    model = simulator(lambda theta: dist.Normal(theta, 10.0).to_event(1), prior)
    torch.manual_seed(0)
    guide = AutoFlow(model, flow=flows.cnf, encoder=MLPEncoder(1, context_dim=2, hidden_dims=(4,)))
    fit = fit_amortized(model, guide, simulations=400, max_epochs=2, progress=False)
    assert fit.best_loss == pytest.approx(prior.entropy().item(), abs=0.3)


def test_it_is_a_prior_that_nuts_can_take() -> None:
    flow = laws.randomise(flows.cnf(2, hidden_dims=(8,)), scale=0.5)

    def model() -> None:
        pyro.module("flow", flow)
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(0.5))

    trace = pyro.poutine.trace(model).get_trace()
    assert trace.log_prob_sum().isfinite()
    trace.log_prob_sum().backward()
    assert all(p.grad is not None for p in flow.parameters())
    kernel = pyro.infer.NUTS(model, max_tree_depth=2, step_size=0.1, adapt_step_size=False)
    chain = pyro.infer.MCMC(kernel, num_samples=5, warmup_steps=2, disable_progbar=True)
    chain.run()
    assert chain.get_samples()["z"].unique(dim=0).shape == (5, 2)


def test_couplings_beside_a_field_are_trained_by_likelihood() -> None:
    flow = Flow([*flows.cnf(2, hidden_dims=(8,)).transforms, *flows.nice(2, num_transforms=2).transforms])
    fit = fit_density(flow, laws.normal(200, 2, dtype=torch.float32).cumsum(-1), max_epochs=2, progress=False)
    assert any(isinstance(part, Coupling) for part in flow.transforms)
    assert math.isfinite(fit.best_loss)


@pytest.mark.parametrize("dim", [1, 64, 65])
def test_flow_matching_trains_guides_of_any_width(dim: int) -> None:
    """Beyond 64 latents, a guide has a different learned affine map, which flow matching leaves unchanged."""
    model = simulator(lambda theta: dist.Normal(theta[..., :1], 1.0).to_event(1), normals(dim))
    guide = AutoFlow(model, functools.partial(flows.cnf, hidden_dims=(8,)), encoder=MLPEncoder(1, 2))
    guide.setup(torch.zeros(1))
    loss = FlowMatching()(guide.flow, torch.randn(6, dim), torch.randn(6, 2))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None for p in guide.flow.transforms[-2].parameters())
