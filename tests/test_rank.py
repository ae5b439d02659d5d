"""Planar, radial and Sylvester transforms and rotations are the maps of their papers, to the last bits."""

import copy
import math

import laws
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from pyro_flows import flows
from pyro_flows.compiler_state import NEW_COMPILER
from pyro_flows.conditioners import MLP
from pyro_flows.transforms import FlowTransform, Householder, Orthogonal, Permute, Planar, Radial, Sylvester
from pyro_flows.transforms.linear import unit

ROWS = 8
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def with_params(layer: FlowTransform, params: Tensor) -> FlowTransform:
    layer = layer.to(params.dtype)
    with torch.no_grad():
        next(layer.parameters()).copy_(params)
    return layer


def close(got: object, wanted: object) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-11, rtol=1e-11)


def three_steps(layer: FlowTransform, dim: int) -> None:
    """Take three Adam steps from the start, towards draws that are not centred, of different scales, and dependent."""

    def loss() -> Tensor:
        x, log_det = layer.inverse_and_log_det(0.5 * laws.normal(64, dim, seed=1).cumsum(-1) + 1)
        return (0.5 * (torch.arange(1, dim + 1) * x.square()).sum(-1) - log_det).mean()

    laws.descend(layer.parameters(), loss)


SYLVESTER = Sylvester(2, 2, 1, MLP(3, 1, Sylvester.count_params(2, 2, 1), (4,)))
COMPILED = [Radial(2, MLP(3, 1, 4, (4,))), SYLVESTER, Householder(3, reflections=2), Orthogonal(3)]


@pytest.mark.slow
@pytest.mark.parametrize("layer", COMPILED, ids=lambda layer: type(layer).__name__)
def test_it_compiles_to_one_graph(layer: FlowTransform) -> None:
    if isinstance(layer, Sylvester) and not NEW_COMPILER:
        pytest.skip("torch.compile of Sylvester: torch 2.13, not yet 2.6")
    context = laws.normal(4, layer.context_dim, seed=1) if layer.context_dim else None
    laws.compiles(laws.randomise(layer).double(), laws.normal(4, *layer.event_shape), context)


test_errors_name_argument_and_value = laws.refusals(
    (lambda: Radial(3, MLP(2, 1, 4)), r"Radial: .*num_params\) = \(1, 5\), got \(1, 4\)"),
    (lambda: Planar(3, MLP(2, 1, 6)), r"num_params\) = \(1, 7\), got \(1, 6\)"),
    (lambda: Sylvester(3, rank=4), "Sylvester: rank .* between 1 and input_dim = 3, got 4"),
    (lambda: Sylvester(3, rank=0), "Sylvester: rank .* between 1 and input_dim = 3, got 0"),
    (lambda: Sylvester(3, rank=2.0), "Sylvester: rank must be an integer .*got 2.0"),
    (lambda: Sylvester(3, reflections=-1), "Sylvester: reflections .* at least 0, got -1"),
    (lambda: Sylvester(3, 2, 1, MLP(2, 1, 7)), r"Sylvester: .* = \(1, 11\), got \(1, 7\)"),
    (lambda: flows.sylvester_flow(3, rank=4), "sylvester_flow: rank .* input_dim = 3, got 4"),
    (lambda: flows.sylvester_flow(3, reflections=-2), "sylvester_flow: reflections .*got -2"),
    (lambda: Householder(3, 3), "Householder: reflections must be positive and even, got 3"),
    (lambda: Radial(2, MLP(3, 1, 4))(torch.zeros(2)), "Radial: context is missing; its width is 3"),
    (lambda: Sylvester(2, 1, 1, MLP(3, 1, 5))(torch.zeros(2)), "Sylvester: context is missing; its width is 3"),
)


# ------------------------------------------------------------ radial


def test_radial_is_the_map_it_says() -> None:
    """y = x + β (x - x₀) / (α + r), where log(α / √D) and log(1 + β / α) are bounded by 4."""
    params, x = laws.normal(5, scale=3.0), laws.normal(ROWS, 3, seed=1)
    y, _ = with_params(Radial(3), params).forward_and_log_det(x)
    alpha = 3**0.5 * torch.exp(4 * torch.tanh(params[3] / 4))
    beta = alpha * torch.expm1(4 * torch.tanh(params[4] / 4))
    away = x - params[:3]
    close(y, x + beta * away / (alpha + away.norm(dim=-1, keepdim=True)))


@every_dtype
@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("raw", [-1e4, -3.0, 0.0, 3.0, 1e4])
def test_radial_bends_no_more_than_its_bound_even_at_its_centre(raw: float, dim: int, dtype: torch.dtype) -> None:
    """At the centre the radius has no derivative, but the map has one: a multiple of the identity."""
    params = torch.tensor([1.0] * dim + [0.5, raw], dtype=dtype)
    layer = with_params(Radial(dim), params)
    for verb in (layer.forward_and_log_det, layer.inverse_and_log_det):
        x = torch.stack([params[:dim], params[:dim] + 1e-30, params[:dim] + 1, params[:dim] - 1e6]).requires_grad_()
        layer.zero_grad()
        y, log_det = verb(x)
        assert y.isfinite().all()
        assert log_det.abs().max() <= 4 * dim + 1e-4
        assert abs(log_det[0].abs().item() - dim * abs(4 * math.tanh(raw / 4))) < 1e-4
        (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        torch.testing.assert_close(slope[0].log(), (log_det[0] / dim).expand(dim), atol=1e-4, rtol=0)
        (y.sum() + log_det.sum()).backward()
        assert layer.params.grad.isfinite().all()
    score = layer.forward_and_score(x, -x)[2]
    assert score.isfinite().all()


@pytest.mark.parametrize("size", [-1e3, 0.0, 1e3])
@pytest.mark.parametrize("raw", [-1e3, -3.0, -1e-3, 1e-3, 3.0, 1e3])
def test_radial_inverts_to_the_last_bits_at_all_slopes(raw: float, size: float) -> None:
    """The root of the quadratic equation has no cancellation, from close to the centre to far outside."""
    y, again = there_and_back(with_params(Radial(1), torch.tensor([0.0, size, raw], dtype=torch.float64)))
    assert ((again - y).abs() <= 1e-13 * y.abs()).all()


@pytest.mark.parametrize("along", [-1e3, -10.0, -3.0, -1.0, -1e-3, 1e-3, 1.0, 3.0, 10.0, 1e3])
def test_planar_inverts_to_the_last_bits_at_all_slopes(along: float) -> None:
    """Slopes of exp(±4), on the ridge and far from it, are inverted within a bounded number of steps."""
    y, again = there_and_back(with_params(Planar(1), torch.tensor([along, 1.0, 0.3], dtype=torch.float64)))
    assert laws.gap(again, y, 1).max() < 1e-12


def there_and_back(layer: FlowTransform) -> tuple[Tensor, Tensor]:
    y = torch.cat((torch.linspace(-120, 120, 40001), torch.logspace(-12, 9, 3001))).double().unsqueeze(-1)
    with torch.no_grad():
        x, backward = layer.inverse_and_log_det(y)
        again, forward = layer.forward_and_log_det(x)
    assert (backward + forward).abs().max() < 1e-12
    return y, again


def net(num_params: int) -> MLP:
    return MLP(2, 1, num_params, (8,), activation=nn.Tanh)


SYLVESTERS = (Sylvester(3, 3, reflections, net(15 + 3 * reflections)) for reflections in (0, 2))
SMOOTH = [Planar(1, net(3)), Planar(3, net(7)), Radial(3, net(5)), *SYLVESTERS]


@pytest.mark.parametrize("layer", SMOOTH, ids=["planar_1", "planar_3", "radial", "triangular", "sylvester"])
def test_inverses_have_first_and_second_derivatives(layer: FlowTransform) -> None:
    """They are those of the implicit function, in the value and, through a context, in all parameters."""
    layer, rows = laws.randomise(layer, scale=1.0).double(), 2 if isinstance(layer, Sylvester) else 4
    inputs = laws.normal(rows, layer.input_dim, seed=1), laws.normal(rows, 2, seed=2)
    inputs = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(layer.inverse_and_log_det, inputs)
    assert torch.autograd.gradgradcheck(layer.inverse_and_log_det, inputs)


# ------------------------------------------------------------ planar


def test_planar_is_the_map_it_says() -> None:
    """y = x + û tanh(w·x + b), where û differs from u only along w, and 1 + w·û = exp(4 tanh(w·u / 4))."""
    u, w, x = laws.normal(3), laws.normal(3, seed=1), laws.normal(ROWS, 3, seed=2)
    y, _ = with_params(Planar(3), torch.cat((u, w, torch.tensor([0.5])))).forward_and_log_det(x)
    bent = u + (torch.expm1(4 * torch.tanh(w @ u / 4)) - w @ u) * w / (w @ w)
    close(y, x + torch.tanh(x @ w + 0.5).unsqueeze(-1) * bent)


def slopes_are_bounded(layer: FlowTransform, x: Tensor, most: float) -> None:
    for verb in (layer.forward_and_log_det, layer.inverse_and_log_det):
        layer.zero_grad()
        value, log_det = verb(x)
        assert log_det.abs().max() <= most + 1e-12
        (value.sum() + log_det.sum()).backward()
        assert value.isfinite().all()
        assert layer.params.grad.isfinite().all()


@pytest.mark.parametrize("scale_of_w", [0.0, 1e-9, 1.0, 1e4])
@pytest.mark.parametrize("scale_of_u", [1e-9, 1.0, 1e4])
def test_planar_slopes_are_bounded_whatever_the_parameters(scale_of_u: float, scale_of_w: float) -> None:
    """Its Jacobian has one eigenvalue other than 1, within exp(±4), so that no optimiser step can make it singular."""
    x = torch.cat((torch.zeros(1, 3), laws.normal(ROWS - 1, 3, seed=1)))
    for seed in range(20):
        u, w = laws.normal(3, seed=seed, scale=scale_of_u), laws.normal(3, seed=seed + 50, scale=scale_of_w)
        slopes_are_bounded(with_params(Planar(3), torch.cat((u, w, torch.zeros(1).double()))), x, 4)


# ------------------------------------------------------------ sylvester


def factors_of(layer: Sylvester) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Q (D, M), R and R̃ (M, M) and b (M), computed from the table."""
    dim, rank = layer.input_dim, layer.rank
    square, scales, b, vectors = layer.params.detach().split((rank * rank, rank, rank, layer.reflections * dim))
    square, q = square.view(rank, rank), torch.eye(dim, dtype=torch.float64)
    for v in vectors.view(layer.reflections, dim):
        q = q @ (torch.eye(dim, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v))
    scale = torch.exp(2 * torch.tanh(scales / 2))
    product = torch.expm1(4 * torch.tanh(square.diagonal() / 4))
    outer = torch.diag(product / scale) + square.triu(1) / rank**0.5
    inner = torch.diag(scale) + square.T.triu(1) / rank**0.5
    return q[:, :rank], outer, inner, b


SIZES = [(1, 1, 0), (2, 1, 1), (5, 2, 3), (5, 5, 2), (5, 5, 0), (33, 8, 8), (33, 33, 3)]


@pytest.mark.parametrize(("dim", "rank", "reflections"), SIZES)
def test_sylvester_is_the_map_it_says(dim: int, rank: int, reflections: int) -> None:
    """y = x + Q R tanh(R̃ Qᵀ x + b) with orthonormal columns of Q; log|det| agrees with formula and autograd."""
    layer = laws.randomise(Sylvester(dim, rank, reflections)).double()
    q, outer, inner, b = factors_of(layer)
    close(q.T @ q, torch.eye(rank, dtype=torch.float64))
    x = laws.normal(ROWS, dim, seed=1)
    t = torch.tanh(x @ q @ inner.T + b)
    y, log_det = layer.forward_and_log_det(x)
    close(y, x + t @ outer.T @ q.T)
    bend = (outer @ ((1 - t * t).unsqueeze(-1) * inner)).mT  # (ROWS, M, M), transposed
    close(log_det, torch.linalg.slogdet(torch.eye(rank, dtype=torch.float64) + bend).logabsdet)
    assert (y != x).any(0).sum() == (dim if reflections else rank)  # reflections mix; without them M features bend


def test_the_papers_kinds_are_choices_of_two_numbers() -> None:
    for dim, wanted in {1: (1, 0), 2: (2, 1), 5: (5, 4), 8: (8, 7), 33: (8, 8)}.items():
        layer = Sylvester(dim)
        assert (layer.rank, layer.reflections) == wanted
        assert layer.params.shape == (Sylvester.count_params(dim),)
    assert Sylvester(33, 4).reflections == 4
    assert Sylvester.count_params(5, 5, 0) == 35
    between = [type(layer) for layer in flows.sylvester_flow(3, num_transforms=3, reflections=0).transforms]
    assert between == [Sylvester, Permute, Sylvester, Permute, Sylvester]
    assert flows.sylvester_flow(3, num_transforms=2, reflections=0).transforms[1].permutation.tolist() == [2, 1, 0]
    assert all(type(layer) is Sylvester for layer in flows.sylvester_flow(3).transforms)


def test_sylvester_of_rank_one_is_planar() -> None:
    """With u along w they are the same map: w = R̃ q, û = R q."""
    layer = laws.randomise(Sylvester(4, rank=1, reflections=1)).double()
    q, _, inner, b = factors_of(layer)
    w = (q * inner).squeeze(-1)
    u = layer.params.detach()[0] * w / (w @ w)
    planar = with_params(Planar(4), torch.cat((u, w, b)))
    y = laws.normal(ROWS, 4, seed=1, scale=3.0)
    for verb in ("forward_and_log_det", "inverse_and_log_det"):
        close(getattr(layer, verb)(y), getattr(planar, verb)(y))


@pytest.mark.parametrize("scale", [1e-9, 10.0, 1e4])
def test_sylvester_stays_a_bijection_whatever_the_parameters(scale: float) -> None:
    """The log-det is bounded by slopes within exp(±4), and all gradients are finite, for any step of an optimiser."""
    for seed in range(5):
        layer = laws.randomise(Sylvester(4, rank=3), seed=seed, scale=scale).double()
        x = laws.normal(ROWS, 4, seed=1)
        slopes_are_bounded(layer, x, 3 * 4)
        laws.inverts(layer, x, None, max(1e-12, 1e-13 * scale))


@pytest.mark.parametrize("along", [-1e3, -3.0, -1e-3, 1e-3, 3.0, 1e3])
def test_sylvester_inverts_to_the_last_bits_at_all_slopes(along: float) -> None:
    layer = laws.randomise(Sylvester(3)).double()
    with torch.no_grad():
        layer.params[:9].view(3, 3).fill_diagonal_(along)
    y = torch.cat((torch.linspace(-120, 120, 4001), torch.logspace(-9, 6, 3001))).double().unsqueeze(-1)
    y = y * torch.tensor([1.0, -0.5, 0.3]) + 1
    with torch.no_grad():
        x, backward = layer.inverse_and_log_det(y)
        again, forward = layer.forward_and_log_det(x)
    assert laws.gap(again, y, 1).max() < 1e-11  # each ridge amplifies the round-off of the previous ones
    assert laws.gap(backward, -forward, 0).max() < 1e-10


def test_sylvester_inverse_keeps_the_bits_that_high_ridges_would_drown() -> None:
    """If R is large, y - Q R t alone loses bits of z.  A steep ridge amplifies the error, to 3e-4 at some of these.

    The bound is the error of the exact x, rounded to float32: its y is off by up to 6e-5 where the map is steep.
    """
    for seed in range(30):
        torch.manual_seed(seed)
        x = torch.empty(64, 5).uniform_(-10, 10)
        layer = laws.randomise(Sylvester(5), seed=seed)
        with torch.no_grad():
            y, _ = layer.forward_and_log_det(x)
            exact, _ = copy.deepcopy(layer).double().inverse_and_log_det(y.double())
            rounded, _ = layer.forward_and_log_det(exact.float())
            laws.inverts(layer, x, None, 3 * float(laws.gap(rounded, y, 1).max()) + 2e-6)


def test_no_two_ridges_coincide_and_each_number_moves() -> None:
    layer = Sylvester(5, rank=4).double()
    before = layer.params.detach().clone()
    three_steps(layer, 5)
    assert (layer.params != before).all()
    _, outer, inner, _ = factors_of(layer)
    for rows in (inner / inner.norm(dim=1, keepdim=True), outer.T / outer.T.norm(dim=1, keepdim=True)):
        assert ((rows @ rows.T).fill_diagonal_(0).abs() < 0.999).all()


# ------------------------------------------------------------ rotations


def matrix_of(layer: FlowTransform) -> Tensor:
    """Return Q, whose columns are the images of the unit vectors."""
    dtype = next(layer.parameters()).dtype
    return layer.forward_and_log_det(torch.eye(layer.event_shape[0], dtype=dtype))[0].T


@every_dtype
@pytest.mark.parametrize("dim", [1, 2, 5, 33])
@pytest.mark.parametrize("build", [Householder, Orthogonal])
def test_rotations_start_at_the_identity_to_the_last_bit(build: type, dim: int, dtype: torch.dtype) -> None:
    layer, x = build(dim).to(dtype), laws.normal(ROWS, dim, scale=1e3, dtype=dtype)
    for verb in (layer.forward_and_log_det, layer.inverse_and_log_det):
        assert laws.bits_equal(verb(x), (x, torch.zeros(ROWS, dtype=dtype)))


@every_dtype
@pytest.mark.parametrize("dim", [2, 5, 33])
@pytest.mark.parametrize("build", [Householder, Orthogonal])
def test_rotations_keep_lengths_and_orientation(build: type, dim: int, dtype: torch.dtype) -> None:
    layer = laws.randomise(build(dim)).to(dtype)
    q = matrix_of(layer)
    torch.testing.assert_close(q @ q.T, torch.eye(dim, dtype=dtype), atol={4: 1e-5, 8: 1e-13}[dtype.itemsize], rtol=0)
    assert torch.det(q) > 0
    assert (q - torch.eye(dim)).abs().max() > 0.1


def test_householder_is_the_product_of_its_reflections() -> None:
    """The first one acts first."""
    layer = laws.randomise(Householder(5, reflections=6)).double()
    wanted = torch.eye(5, dtype=torch.float64)
    for v in layer.vectors.detach():
        wanted = (torch.eye(5, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v)) @ wanted
    close(matrix_of(layer), wanted)


def test_two_reflections_turn_by_twice_the_angle_between_them() -> None:
    angle = 0.3
    vectors = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    turned = matrix_of(with_params(Householder(2, reflections=2), vectors))
    cos, sin = math.cos(2 * angle), math.sin(2 * angle)
    close(turned, torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64))


@every_dtype
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-25, 1e-12, 1.0, 1e30])
def test_reflections_have_no_length_to_fail_at(scale: float, dtype: torch.dtype) -> None:
    """Short and long vectors reflect alike, and a zero vector, which has no direction, reflects nothing."""
    vectors = laws.normal(4, 3, dtype=torch.float64)
    short = torch.stack([vectors[0], vectors[1] * scale, vectors[2], vectors[3] * scale]).to(dtype)
    householder = with_params(Householder(3, reflections=4), short)
    sylvester = with_params(Sylvester(3, 3, 4), torch.cat((laws.normal(15, seed=1, dtype=dtype), short.flatten())))
    exact = {4: 1e-5, 8: 1e-13}[dtype.itemsize]
    if scale not in (0.0, 1e-40):  # float32 has few or no bits for such small numbers
        torch.testing.assert_close(unit(short), nn.functional.normalize(vectors, dim=-1).to(dtype), atol=exact, rtol=0)
    q = matrix_of(householder)
    torch.testing.assert_close(q @ q.T, torch.eye(3, dtype=dtype), atol=exact, rtol=0)
    x = laws.normal(ROWS, 3, seed=2, dtype=dtype)
    for layer in (householder, sylvester):
        laws.inverts(layer, x, None, 10 * exact)
        for verb in (layer.forward_and_log_det, layer.inverse_and_log_det):
            layer.zero_grad()
            y, log_det = verb(x)
            (y.pow(3).sum() + log_det.sum()).backward()
            assert not next(layer.parameters()).grad.isnan().any()


def test_orthogonal_reaches_any_rotation() -> None:
    for seed in range(5):
        q = torch.linalg.qr(laws.normal(4, 4, seed=seed)).Q
        q[:, 0] *= torch.det(q).sign()
        generator = torch.as_tensor(scipy.linalg.logm(q.numpy()).real)
        rows, columns = torch.tril_indices(4, 4, -1)
        close(matrix_of(with_params(Orthogonal(4), generator[rows, columns])), q)


@pytest.mark.parametrize("build", [Householder, Orthogonal])
def test_rotations_learn_from_the_identity(build: type) -> None:
    """Three steps move each number, so that no two reflections coincide; sixty steps find a rotation."""
    torch.manual_seed(0)
    layer = build(5).double()
    before = next(layer.parameters()).detach().clone()
    three_steps(layer, 5)
    after = next(layer.parameters()).detach()
    assert (after != before).all()
    if build is Householder:
        cosines = unit(after) @ unit(after).T
        assert (cosines.fill_diagonal_(0).abs() < 1 - 1e-6).all()
    torch.manual_seed(1)
    wanted = matrix_of(laws.randomise(Orthogonal(5), scale=0.5).double()).detach()
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def miss() -> Tensor:
        optimiser.zero_grad()
        loss = (matrix_of(layer) - wanted).square().sum()
        loss.backward()
        return loss

    optimiser.step(miss)
    assert miss() < 1e-6
