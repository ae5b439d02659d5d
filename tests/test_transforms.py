"""Every transform is a learnable bijection that obeys the same laws.

The laws are tested at large random parameters, in both dtypes, with and without a context.  A transform starts at the
identity, its verbs are inverse to each other, and its log-determinant is that of autograd.  Its gradients reach every
parameter.  It copies, pickles, saves, compiles and maps, and it works in Pyro and torch."""

import copy
import functools
import math
import pickle

import laws
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TransformModule
from pyro.distributions.conditional import ConditionalTransform
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import transforms as torch_transforms

from pyro_flows.bijectors import Affine, RationalQuadraticSpline
from pyro_flows.conditioners import MADE, MLP
from pyro_flows.flows import Flow
from pyro_flows.transforms import (
    ActNorm,
    Autoregressive,
    Compose,
    Coupling,
    Elementwise,
    FlowTransform,
    LULinear,
    Permute,
    QuantileMap,
    Recomputed,
    Sigmoid,
)

ROWS = 8
SIZES = [1, 2, 5, 33]
CONTEXTS = ["no_context", "context", "batched_context"]


class Case:
    """Transform of the registry, at one size and with one kind of context."""

    def __init__(self, name: str, dim: int, context: str) -> None:
        self.name, self.context_kind = name, context
        self.kind = laws.TRANSFORMS[name]
        self.dim = dim * self.kind.size
        self.context_dim = 0 if context == "no_context" else laws.CONTEXT_DIM

    def __repr__(self) -> str:
        return f"{self.name}-{self.dim}-{self.context_kind}"

    def start(self) -> FlowTransform:
        return self.kind.build(self.dim, self.context_dim)

    def random(self, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> FlowTransform:
        return laws.randomise(self.start(), scale=scale).to(dtype)

    def context(self, dtype: torch.dtype = torch.float64) -> Tensor | None:
        batch = (ROWS,) if self.context_kind == "batched_context" else ()
        return laws.normal(*batch, self.context_dim, seed=2, dtype=dtype) if self.context_dim else None

    def values(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return rows: half of them lie where the map bends, and half far outside."""
        near, far = laws.normal(ROWS // 2, self.dim, seed=1, scale=3.0), laws.normal(ROWS // 2, self.dim, seed=3)
        far = far.clamp(-2, 2) * (10 if self.name == "noncentred" else 500)  # exponents of exponents lose all digits
        return torch.cat((near, far)).to(dtype)


def cases(sizes: list[int], contexts: list[str]) -> list[Case]:
    return [
        Case(name, dim, context)
        for name, kind in laws.TRANSFORMS.items()
        for dim in sizes
        if kind.least_dim <= dim <= kind.most_dim
        for context in (contexts if kind.takes_context else ["no_context"])
    ]


def is_white(case: Case) -> bool:
    """True if size and context form a white square of a chessboard; without a context all sizes are white."""
    square = SIZES.index(case.dim // case.kind.size) + CONTEXTS.index(case.context_kind)
    return square % 2 == 0 or not case.kind.takes_context


def is_black(case: Case) -> bool:
    return not is_white(case) or not case.kind.takes_context


EVERYWHERE = cases(SIZES, CONTEXTS)
# float64 tests half of the squares of sizes and contexts of every transform, and float32 the other half.
white_cases = pytest.mark.parametrize("case", list(filter(is_white, EVERYWHERE)), ids=repr)
black_cases = pytest.mark.parametrize("case", list(filter(is_black, EVERYWHERE)), ids=repr)
every_case_in_a_dtype = pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case!r}-{name}")
        for name, dtype, belongs in (("float64", torch.float64, is_white), ("float32", torch.float32, is_black))
        for case in filter(belongs, EVERYWHERE)
    ],
)
# Properties that do not depend on sizes are tested at one size, where no feature is special.
every_transform = pytest.mark.parametrize("case", cases([5], ["batched_context"]), ids=repr)
every_learner = pytest.mark.parametrize(
    "case", [case for case in cases([5], ["no_context", "batched_context"]) if case.kind.learns], ids=repr
)


# ------------------------------------------------------------ the bijection


@every_case_in_a_dtype
def test_it_starts_at_the_identity(case: Case, dtype: torch.dtype) -> None:
    transform, x = case.start().to(dtype), case.values(dtype)
    if case.kind.start == "identity":
        laws.starts_at_identity(transform, x, case.context(dtype))
        return
    y, log_det = transform.forward_and_log_det(x, case.context(dtype))
    assert log_det.abs().max() < laws.TINY[dtype] * case.dim
    if case.kind.start == "permutation":
        torch.testing.assert_close(y.sort(-1).values, x.sort(-1).values)
    else:  # a rotation, which is not the identity
        lengths = x.norm(dim=-1)
        assert ((y @ y.T - x @ x.T).abs() < 10 * laws.TINY[dtype] * lengths * lengths[:, None]).all()
        assert case.dim == 1 or not torch.allclose(y, x, rtol=0.1)


@white_cases
def test_the_two_verbs_undo_each_other(case: Case) -> None:
    transform, x, context = case.random(), case.values(), case.context()
    # Far from the start a deep stack of steep splines amplifies the last bit of y by the condition number of its
    # Jacobian, up to 1e20 at D = 33, for any inverse.  There only the backward error below is a useful test.
    matrix = laws.square_jacobian(lambda value: transform.forward_and_log_det(value, context)[0], x)
    with torch.no_grad():
        laws.undoes_itself(transform, x, context, (1e-13 * torch.linalg.cond(matrix)).clamp_min(1e-9))


@every_case_in_a_dtype
def test_the_inverse_is_exact_backwards(case: Case, dtype: torch.dtype) -> None:
    x = torch.empty(64, case.dim, dtype=dtype).uniform_(-10, 10)
    if case.context_kind == "batched_context":
        x = x.unflatten(0, (-1, ROWS))
    with torch.no_grad():
        laws.inverts(case.random(dtype), x, case.context(dtype), {4: 1e-4, 8: 1e-11}[dtype.itemsize])


@black_cases
def test_log_det_is_that_of_autograds_jacobian(case: Case) -> None:
    laws.log_det_is_slogdet(case.random(), case.values(), case.context())


@every_case_in_a_dtype
def test_the_log_dets_are_opposite(case: Case, dtype: torch.dtype) -> None:
    x = case.values(dtype)
    if "circular" in case.name and dtype == torch.float32:
        x = x.clamp(-10, 10)  # float32 knows a radian of 1000 to 6e-5, and a slope may double within that
    with torch.no_grad():
        laws.log_dets_are_opposite(case.random(dtype), x, case.context(dtype), {4: 1e-2, 8: 1e-9}[dtype.itemsize])


@pytest.mark.parametrize(
    "case", [case for case in filter(is_white, EVERYWHERE) if laws.order_of(case.start()) is not None], ids=repr
)
def test_autoregressive_jacobians_are_triangular(case: Case) -> None:
    laws.is_triangular(case.random(scale=1.0), laws.normal(ROWS, case.dim, seed=1, scale=3.0), case.context())


@every_transform
def test_values_and_contexts_broadcast(case: Case) -> None:
    transform, context = case.random(), case.context()
    x = laws.normal(3, 1, case.dim, seed=1)
    for verb in (transform.forward_and_log_det, transform.inverse_and_log_det):
        y, log_det = verb(x, context)
        batch = (3, ROWS) if transform.context_dim else (3, 1)
        assert y.shape == (*batch, case.dim)
        assert log_det.shape == batch
        wanted = verb(x.expand(3, ROWS, case.dim), context)
        torch.testing.assert_close(y.expand_as(wanted[0]), wanted[0], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(log_det.expand_as(wanted[1]), wanted[1], atol=1e-9, rtol=1e-9)


@white_cases
def test_scores_are_carried_along(case: Case) -> None:
    laws.carries_the_score(case.random(scale=1.0), laws.normal(ROWS, case.dim, seed=1), case.context(), 1e-8)


@pytest.mark.parametrize("case", cases([2, 5], ["no_context"]), ids=repr)
def test_gradients_are_carried_back(case: Case) -> None:
    laws.carries_the_gradient(case.random(scale=1.0), laws.normal(ROWS, case.dim, seed=1), 1e-7)


# ------------------------------------------------------------ learning


@every_learner
@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
def test_gradients_reach_every_parameter(case: Case, backwards: bool) -> None:
    transform, x = case.random(scale=1.0), laws.normal(8, ROWS, case.dim, seed=1, scale=2.0)
    y, log_det = (transform.inverse_and_log_det if backwards else transform.forward_and_log_det)(x, case.context())
    (y.square().sum() + log_det.sum()).backward()
    for name, parameter in transform.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@every_learner
def test_three_steps_from_the_start_move_every_parameter(case: Case) -> None:
    """All transforms start at the identity, where no parameter may be stuck."""
    transform, context = case.start().double(), case.context()
    before = {name: p.detach().clone() for name, p in transform.named_parameters()}
    data = 0.5 * laws.normal(8, ROWS, case.dim, seed=1).cumsum(-1) + 1

    def loss() -> Tensor:
        x, log_det = transform.inverse_and_log_det(data, context)
        return (0.5 * x.square().sum(-1) - log_det).mean()

    losses = laws.descend(transform.parameters(), loss)
    assert losses[0] > losses[1] > losses[2]
    for name, parameter in transform.named_parameters():
        assert (parameter != before[name]).any(), name


# ------------------------------------------------------------ copy and state


@functools.cache
def used(case: Case) -> FlowTransform:
    """Return a transform after forward and backward passes, with any caches filled."""
    transform, x, context = case.random(), case.values(), case.context()
    for verb in (transform.forward_and_log_det, transform.inverse_and_log_det):
        y, log_det = verb(x.requires_grad_(), context)
        (y.sum() + log_det.sum()).backward()
    return transform


def both_ways(transform: FlowTransform, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
    return *transform.forward_and_log_det(x, context), *transform.inverse_and_log_det(x, context)


@every_transform
def test_copies_and_loaded_states_agree_and_are_independent(case: Case) -> None:
    transform, fresh, x, context = used(case), case.start().double(), case.values(), case.context()
    fresh.load_state_dict(transform.state_dict(), strict=True)
    wanted = both_ways(transform, x, context)
    for twin in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform)), fresh):
        assert laws.bits_equal(both_ways(twin, x, context), wanted)
        laws.randomise(twin, seed=7)
        assert laws.bits_equal(both_ways(transform, x, context), wanted)


PRIORS = {
    "uniform": (torch.distributions.Uniform(0.0, 1.0), torch.logit),
    "half-normal": (torch.distributions.HalfNormal(3.0), torch.log),
    "half-Cauchy": (torch.distributions.HalfCauchy(1.0), torch.log),
    "heavy tails": (torch.distributions.StudentT(0.5), torch.clone),
}


@pytest.mark.parametrize("name", list(PRIORS))
def test_a_quantile_map_takes_a_normal_to_the_distribution_of_draws(name: str) -> None:
    prior, free = PRIORS[name]
    torch.manual_seed(0)
    layer = QuantileMap(1).double()
    layer.set(free(prior.sample((10_000, 1)).double()))
    uniform = torch.special.ndtr(layer.inverse_and_log_det(free(prior.sample((20_000, 1)).double()))[0])
    shares = torch.histc(uniform, 20, 0, 1) / 20_000
    assert (shares - 0.05).abs().max() < 5 * (0.05 * 0.95 * (1 / 20_000 + 1 / 10_000)) ** 0.5


def test_a_quantile_map_keeps_far_draws_in_proportion() -> None:
    torch.manual_seed(0)
    draws = torch.randn(10_000, 1).double().abs()
    layer = QuantileMap(1).double()
    layer.set(draws.log())
    assert layer(torch.tensor([[6.0]]).double()).exp().item() < 12  # the exponential of a normal would give 160


def test_a_quantile_map_bears_few_draws_and_equal_draws() -> None:
    layer = QuantileMap(2).double()
    x = torch.linspace(-5.0, 5.0, 101).double()[:, None].expand(-1, 2)
    layer.set(torch.randn(20, 2).double())
    assert torch.allclose(layer(x), x, atol=1e-12)
    layer.set(torch.randn(1000, 2).double().clamp(min=0.0), torch.tensor([False, True]))
    y, log_det = layer.forward_and_log_det(x)
    assert torch.allclose(y[:, 1], x[:, 1], atol=1e-12)
    assert (y.diff(dim=0) > 0).all()
    assert log_det.isfinite().all()
    layer.set(torch.tensor([1.0, -1.0, *[0.0] * 998]).double()[:, None].expand(-1, 2))  # all knots between are equal
    y, log_det = layer.forward_and_log_det(x)
    assert (y.diff(dim=0) > 0).all()
    assert log_det.isfinite().all()


def _autoregressive(order: list[int]) -> FlowTransform:
    return Autoregressive(Affine(), MADE(4, 2, (8,), order=order))


def _coupling(*mask: bool) -> FlowTransform:
    return Coupling(Affine(), MLP(2, 2, 2, (8,)), mask)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Permute([1, 2, 3, 0]), Permute([0, 1, 2, 3])),
        (_coupling(True, True, False, False), _coupling(False, True, False, True)),
        (_autoregressive([3, 1, 0, 2]), _autoregressive([0, 1, 2, 3])),
        (Compose([Permute([1, 2, 3, 0])]), Compose([Permute([0, 1, 2, 3])])),
    ],
    ids=["permute", "coupling", "autoregressive", "compose"],
)
def test_permutations_masks_and_orders_are_part_of_the_state(one: FlowTransform, other: FlowTransform) -> None:
    """Without them, a strict load into a differently built instance would silently give another function."""
    laws.randomise(one, seed=1)
    laws.randomise(other, seed=2)
    x = torch.randn(6, 4)
    assert not torch.equal(other(x), one(x))
    other.load_state_dict(one.state_dict(), strict=True)
    assert laws.bits_equal(both_ways(other, x), both_ways(one, x))


# ------------------------------------------------------------ the inverse


@every_transform
def test_the_inverse_is_the_opposite_direction(case: Case) -> None:
    transform, x, context = case.random(), case.values(), case.context()
    forward, backward = both_ways(transform, x, context)[:2], both_ways(transform, x, context)[2:]
    assert laws.bits_equal(both_ways(transform.inv, x, context), (*backward, *forward))
    assert (transform.inv.event_shape, transform.inv.context_dim) == (transform.event_shape, transform.context_dim)


@pytest.mark.parametrize("case", [c for c in cases([5], ["no_context"]) if c.name != "inverse"], ids=repr)
def test_inverting_twice_gives_the_very_same_module(case: Case) -> None:
    transform = case.start()
    assert transform.inv.inv is transform


@every_learner
@pytest.mark.parametrize("holder_type", [nn.Module, PyroModule], ids=["nn", "pyro"])
def test_holding_the_inverse_registers_its_parameters(case: Case, holder_type: type) -> None:
    transform = case.start()
    own = {id(parameter) for parameter in transform.parameters()}
    holder = holder_type()
    holder.layer = transform.inv
    assert own == {id(parameter) for parameter in holder.parameters()} != set()
    assert len(holder.state_dict()) == len(transform.state_dict())


# ------------------------------------------------------------ compilers


COMPILED = "coupling_spline", "shuffled_affine", "autoregressive_spline_2_bins", "compose", "planar", "conv_affine"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMPILED, "tokens"])
def test_it_compiles_to_one_graph(name: str) -> None:
    case = Case(name, 3, "batched_context")
    inverse = "eager" if name == "compose" else "aot_eager"  # its parts are lowered separately
    laws.compiles(case.random(scale=0.3), laws.normal(ROWS, case.dim), case.context(), inverse)


@pytest.mark.parametrize("case", [c for c in cases([5], ["batched_context"]) if c.kind.maps], ids=repr)
def test_it_maps_under_vmap(case: Case) -> None:
    transform = case.random(scale=1.0)
    laws.maps(transform, laws.normal(3, ROWS, case.dim, scale=2.0), case.context(), in_dims=(0, None))


# ------------------------------------------------------------ Pyro and torch


@every_transform
def test_it_is_one_of_pyros_own(case: Case) -> None:
    transform = case.start()
    for kind in (TransformModule, ConditionalTransform, torch_transforms.Transform):
        assert isinstance(transform, kind)
    assert transform.bijective
    assert transform.domain.event_dim == transform.codomain.event_dim == 1
    for kind in (type(transform), PyroModule):
        assert issubclass(PyroModule[type(transform)], kind)


@every_learner
def test_pyro_registers_its_parameters(case: Case) -> None:
    transform = case.start()
    pyro.module("layer", transform)
    assert len(pyro.get_param_store()) == len(list(transform.parameters()))


NUMBERS = torch_transforms.SigmoidTransform(), torch_transforms.ExpTransform(), torch_transforms.TanhTransform()


# One transform of numbers, and one of events, in turn.
AMONG = [
    (case, other)
    for place, case in enumerate(cases([5], ["no_context"]))
    for other in (NUMBERS[place % 3], torch_transforms.StickBreakingTransform())
]


@pytest.mark.parametrize(
    ("case", "other"), AMONG, ids=lambda of: repr(of) if isinstance(of, Case) else type(of).__name__
)
def test_it_stands_among_torchs_transforms(case: Case, other: torch_transforms.Transform) -> None:
    """It scores new values in a list of transforms and in torch's composition."""
    transform = case.random(scale=0.3)
    base = dist.Normal(torch.zeros(case.dim, dtype=torch.float64), 1.0).to_event(1)
    x = laws.normal(ROWS, case.dim, scale=0.5)
    middle, log_det = transform.forward_and_log_det(x)
    y = other(middle)
    of_other = other.log_abs_det_jacobian(middle, y)
    wanted = base.log_prob(x) - log_det - (of_other.sum(-1) if of_other.dim() == 2 else of_other)
    chain = torch_transforms.ComposeTransform([transform, other])
    for parts in ([transform, other], [chain], chain):
        score = dist.TransformedDistribution(base, parts).log_prob(y.detach().clone())
        torch.testing.assert_close(score, wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(chain.inv(y), x, atol=1e-6, rtol=1e-6)


@every_transform
def test_conditioning_gives_a_plain_transform(case: Case) -> None:
    transform, context, x = case.random(), case.context(), laws.normal(ROWS, case.dim, scale=3.0)
    if context is None:
        assert transform.condition(torch.zeros(3)) is transform
    fixed = transform if context is None else transform.condition(context)
    y, log_det = transform.forward_and_log_det(x, context)
    assert torch.equal(fixed(x), y)
    torch.testing.assert_close(fixed.log_abs_det_jacobian(x, y), log_det)
    assert torch.equal(fixed.inv(y.clone()), transform.inverse_and_log_det(y, context)[0])
    assert torch.equal(fixed._call(x), y)  # torch's protocol of transforms
    assert torch.equal(fixed._inverse(y), fixed.inv(y))


def test_domains_and_codomains_are_those_of_what_is_inside() -> None:
    sigmoid = Sigmoid((2,), low=-1.0)
    for layer in (sigmoid.inv.inv, Compose([ActNorm(2), sigmoid]), Compose([sigmoid.inv]).inv, Recomputed(sigmoid)):
        assert (str(layer.domain), str(layer.codomain)) == (str(sigmoid.domain), str(sigmoid.codomain))
        assert (layer.inv.domain, layer.inv.codomain) == (layer.codomain, layer.domain)


def test_the_support_of_a_flow_is_that_of_its_last_transform() -> None:
    last = Sigmoid((2,))
    for transforms in ([ActNorm(2), last], [Compose([ActNorm(2), last])], [ActNorm(2), last.inv.inv]):
        q = Flow(transforms)()
        assert q.support.check(q.sample((5,))).all()
        assert not q.support.check(torch.tensor([0.5, 2.0]))
    assert Flow([Sigmoid((2,)), Compose([last.inv])])().support.check(torch.tensor([0.5, 2.0]))


def test_actnorm_sets_itself_from_data() -> None:
    norm = ActNorm(3).double()
    data = torch.cat((3 + 2 * laws.normal(100, 2), torch.full((100, 1), 4.0, dtype=torch.float64)), -1)
    norm.initialize(data)
    x, _ = norm.inverse_and_log_det(data)
    torch.testing.assert_close(x.mean(0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(x.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))


# ------------------------------------------------------------ errors


def _with_context(context_dim: int) -> FlowTransform:
    return Autoregressive(Affine(), MADE(2, 2, context_dim=context_dim))


test_errors_name_argument_and_value = laws.refusals(
    (lambda: LULinear(2).set_scale(1e4), "logarithm within ±8.0, got 10000.0"),
    (lambda: Permute([1, 2]), r"permutation .*got \[1, 2\]"),
    (lambda: Coupling(Affine(), MLP(1, 1, 2), [True, True]), r"mask .*got \[True, True\]"),
    (lambda: Coupling(Affine(), MLP(1, 2, 2), [True, False]), r"\(1, 2\), got \(2, 2\)"),
    (lambda: Coupling(Affine(), MLP(2, 1, 2), [True, False]), "take the 1 features .*got 2"),
    (lambda: Autoregressive(RationalQuadraticSpline(), MADE(3, 2)), r"\(3, 23\), got \(3, 2\)"),
    (lambda: Autoregressive(Affine(), MLP(3, 3, 2)), "a MADE or a CausalTransformer, got MLP", TypeError),
    (lambda: Elementwise(Affine(), 3, MLP(2, 4, 2)), r"\(3, 2\), got \(4, 2\)"),
    (lambda: Compose([]), "transforms must not be empty"),
    (lambda: Compose([ActNorm(2), ActNorm(3)]), r"transforms\[1\] must act on .* \(2,\), .*got \(3,\)"),
    (lambda: Compose([ActNorm(2), torch_transforms.ExpTransform()]), r"transforms\[1\] .*ExpTransform", TypeError),
    (lambda: Compose([_with_context(1), _with_context(2)]), r"must share one context_dim, got \[1, 2\]"),
    (lambda: Flow([ActNorm(2)], dist.Normal(0.0, 1.0)), r"base has event shape \(\)"),
)


def test_lu_linear_is_the_matrix_it_says() -> None:
    """y = L U x + t with bounded pivots: even an extreme parameter gives an invertible matrix."""
    layer = laws.randomise(LULinear(4)).double()
    with torch.no_grad():
        layer.factors.fill_diagonal_(-1e6)
    x = torch.eye(4, dtype=torch.float64)
    y, log_det = layer.forward_and_log_det(x)
    matrix = (y - layer.shift).T
    lower, upper = layer.factors.tril(-1) + x, layer.factors.triu(1) + math.exp(-8) * x
    torch.testing.assert_close(matrix, lower @ upper)
    torch.testing.assert_close(log_det, torch.full((4,), -32.0, dtype=torch.float64))
