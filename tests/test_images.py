"""Image flows.

They are exact at every scale, with and without context.  Models of integers give mass to integers only, with a total of
at most one.  Training shows progress, stops, resumes and saves.
"""

import functools
import math
from pathlib import Path
from typing import Any

import laws
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from grouped_options import grouped
from models import stirred
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pyro_flows as pf
from pyro_flows import Fit, Flow, fit_density, flows, transforms
from pyro_flows.bijectors import Affine
from pyro_flows.conditioners import CausalTransformer, ConvNet, LipschitzMLP
from pyro_flows.encoders import ClassEmbedding, ConvEncoder, Flatten
from pyro_flows.flows import Dequantized
from pyro_flows.flows.image import checkerboard
from pyro_flows.programs import Program
from pyro_flows.programs.model_and_guide import Task

IMAGES: dict[str, functools.partial[Flow]] = {
    "realnvp_image": functools.partial(flows.realnvp_image, num_steps=2, hidden_dim=8, num_blocks=1),
    "glow": functools.partial(flows.glow, num_steps=2, hidden_dim=8),
    "flowpp_image": functools.partial(flows.flowpp_image, num_steps=2, hidden_dim=8, num_blocks=1, components=4),
    "tarflow": functools.partial(flows.tarflow, num_transforms=2, num_layers=1, hidden_dim=16),
}
SHAPE = (2, 4, 4)
every_recipe = pytest.mark.parametrize("name", IMAGES)
CONTEXTS: dict[str, tuple[dict[str, Any], Tensor | None]] = {
    "plain": ({}, None),
    "vector": ({"context_dim": 3}, laws.normal(5, 3, seed=2)),
    "image": ({"context_dim": (3, 4, 4)}, laws.normal(5, 3, 4, 4, seed=2)),
    "index": ({"num_classes": 4}, torch.tensor([0, 3, 1, 1, 2])),
    "one_hot": ({"num_classes": 4}, F.one_hot(torch.tensor([0, 3, 1, 1, 2]), 4).double()),
}
every_context = pytest.mark.parametrize("kind", CONTEXTS)


def random(name: str, shape: tuple[int, int, int] = SHAPE, scale: float = 0.5, **options: Any) -> Flow:
    flow = IMAGES[name](shape, **options)
    return laws.randomise(flow, scale=scale).double()


def through(
    flow: Flow, value: Tensor, context: Tensor | None = None, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the value and the log-determinant after all transforms, or before them."""
    total = torch.zeros(())
    for view in reversed(flow(context).transforms) if inverse else flow(context).transforms:
        verb = view.transform.inverse_and_log_det if inverse else view.transform.forward_and_log_det
        value, log_det = verb(value, view.context)
        total = total + log_det
    return value, total


def slogdet(function: Any, x: Tensor) -> Tensor:
    """Return the log-determinants of the full Jacobians."""
    rows = [torch.autograd.functional.jacobian(function, row.unsqueeze(0)).reshape(row.numel(), -1) for row in x]
    return torch.linalg.slogdet(torch.stack(rows)).logabsdet


# ------------------------------------------------------------ exact


@every_context
@every_recipe
def test_densities_are_those_of_the_whole_jacobian(name: str, kind: str) -> None:
    options, contexts = CONTEXTS[kind]
    # The precision of slogdet depends on the condition number of the matrix.
    scale = 0.3 if name == "tarflow" else 2.0
    flow, x = random(name, scale=scale, **options), laws.normal(5, *SHAPE, seed=1, scale=2.0)
    score = flow(contexts).log_prob(x)
    for place in range(5):
        row, context = x[place : place + 1], None if contexts is None else contexts[place : place + 1]
        back = lambda value, context=context: through(flow, value, context, inverse=True)[0]  # noqa: E731
        wanted = flow.base().log_prob(back(row)) + slogdet(back, row)
        torch.testing.assert_close(score[place : place + 1], wanted, atol=1e-8, rtol=1e-8)


@every_context
@every_recipe
def test_samples_are_scored_and_found_again(name: str, kind: str) -> None:
    options, contexts = CONTEXTS[kind]
    flow = random(name, scale=0.1 if name == "flowpp_image" else 0.5, **options)
    x, score = flow.rsample_and_log_prob((3,), contexts)
    assert x.shape == (3, *([] if contexts is None else [5]), *SHAPE)
    torch.testing.assert_close(flow(contexts).log_prob(x), score, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(flow.log_prob(x, contexts), score, atol=1e-8, rtol=1e-8)


@every_recipe
def test_each_starts_at_its_base(name: str) -> None:
    flow, x = IMAGES[name](SHAPE).double(), laws.normal(5, *SHAPE)
    torch.testing.assert_close(flow.log_prob(x), flow.base().log_prob(x), atol=1e-9, rtol=1e-9)


def test_a_rotation_follows_from_the_recipe_alone() -> None:
    """Thus Pyro's parameter store, which has parameters and no buffers, contains a complete Glow."""
    flow, x = random("glow"), laws.normal(5, *SHAPE)
    torch.manual_seed(7)
    other = IMAGES["glow"](SHAPE).double()
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), flow.parameters(), strict=True):
            mine.copy_(theirs)
    assert torch.equal(other.log_prob(x), flow.log_prob(x))


def test_a_glow_of_28_by_28_pixels_goes_there_and_back_in_float32() -> None:
    flow = stirred(flows.glow((1, 28, 28), hidden_dim=16))
    x = laws.normal(4, 1, 28, 28, dtype=torch.float32)
    with torch.no_grad():
        z, there = through(flow, x)
        back, log_det = through(flow, z, inverse=True)
    assert there.abs().min() > 10  # far from the identity
    assert laws.gap(back, x, 3).max() < 1e-4
    torch.testing.assert_close(log_det, -there, atol=0, rtol=1e-4)


@every_recipe
def test_gradients_of_samples_are_those_of_finite_steps(name: str) -> None:
    flow = random(name, context_dim=3)
    z, context = laws.normal(1, *SHAPE), laws.normal(1, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda context: through(flow, z, context)[0], context, atol=1e-6)


@every_recipe
def test_gradients_reach_every_parameter_either_way(name: str) -> None:
    flow = random(name, num_classes=4)
    labels = torch.arange(4)
    for loss in (flow(labels).rsample((8,)).square().sum(), flow(labels).log_prob(laws.normal(8, 4, *SHAPE)).sum()):
        flow.zero_grad()
        loss.backward()
        for parameter_name, parameter in flow.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert (parameter.grad != 0).any(), parameter_name


@every_recipe
def test_activations_that_are_computed_again_change_nothing(name: str) -> None:
    plain, again = (random(name, recompute=recompute) for recompute in (False, True))
    again.load_state_dict(dict(zip(again.state_dict(), plain.state_dict().values(), strict=True)))
    x = laws.normal(5, *SHAPE)
    grads = [torch.autograd.grad(flow.log_prob(x).sum(), list(flow.parameters())) for flow in (plain, again)]
    assert laws.bits_equal(*grads)


def test_random_numbers_are_the_same_when_computed_again() -> None:
    """An estimated log-determinant uses such random numbers."""
    inner = laws.randomise(transforms.Residual(LipschitzMLP(5, (16, 16))), scale=1.0).double()
    x, grads = laws.normal(50, 5), []
    for layer in (inner, transforms.Recomputed(inner)):
        torch.manual_seed(0)
        y, log_det = layer.forward_and_log_det(x)
        grads.append(torch.autograd.grad(y.square().sum() + log_det.sum(), list(inner.parameters())))
    assert laws.bits_equal(*grads)


@pytest.mark.parametrize(
    ("size", "patches"), [(4, 16), (8, 16), (13, 169), (22, 121), (28, 49), (31, 961), (32, 64), (64, 64)]
)
def test_patches_are_neither_few_nor_wide(size: int, patches: int) -> None:
    flow = flows.tarflow((1, size, size), num_transforms=1, num_layers=1, hidden_dim=4, num_heads=1)
    assert flow.transforms[0].inner.event_shape[0] == patches  # type: ignore[union-attr]


def kept_for_the_gradient(flow: Flow, x: Tensor) -> int:
    """Return the bytes of all tensors that a graph keeps, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in flow.parameters()}
    with laws.bytes_kept() as held:
        score = flow.log_prob(x).sum()
    assert score.requires_grad
    return sum(size for storage, size in held.items() if storage not in own)


@every_recipe
def test_memory_grows_less_than_half_as_fast_where_activations_are_computed_again(name: str) -> None:
    depth = "num_transforms" if name == "tarflow" else "num_steps"
    x = torch.randn(64, *SHAPE)
    growth = []
    for recompute in (False, True):
        few, many = (IMAGES[name](SHAPE, **{depth: number, "recompute": recompute}) for number in (2, 6))
        growth.append(kept_for_the_gradient(many, x) - kept_for_the_gradient(few, x))
    assert 0 < growth[1] < growth[0] / 2


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_tokens_depend_on_those_of_lower_rank_alone(order: list[int]) -> None:
    net = CausalTransformer(4, 2, 2, 8, order=order)
    layer = laws.randomise(transforms.Autoregressive(Affine(), net), scale=1.0).double()
    x, rank = laws.normal(4, 2), torch.tensor(order).repeat_interleave(2)
    for verb in (layer.forward_and_log_det, layer.inverse_and_log_det):
        matrix = torch.autograd.functional.jacobian(lambda value, verb=verb: verb(value)[0], x).reshape(8, 8)
        assert (matrix[rank[:, None] < rank] == 0).all()
        assert (matrix[rank[:, None] > rank] != 0).all()
        within = matrix[rank[:, None] == rank].reshape(4, 2, 2)
        assert (within - torch.diag_embed(within.diagonal(dim1=1, dim2=2)) == 0).all()


# ------------------------------------------------------------ the parts


def test_a_checkerboard_is_one() -> None:
    """The conditioning pixels, and no others, are unchanged: the squares of one colour."""
    board = checkerboard(1, 0)
    layer = transforms.Squeezed(transforms.Coupling(Affine(), ConvNet(2, 2, 2, (3, 3), 4), board))
    laws.randomise(layer)
    x = torch.randn(1, 6, 6)
    same = (layer(x) == x)[0]
    place = torch.arange(6)
    assert torch.equal(same, (place[:, None] + place) % 2 == 0)


def test_an_invertible_1x1_convolution_is_one() -> None:
    linear = laws.randomise(transforms.LULinear(3)).double()
    x = laws.normal(5, 3, 4, 4)
    lower, upper, log_pivots = linear._lower_upper_log_pivots()
    y, log_det = transforms.PerPixel(linear, (4, 4)).forward_and_log_det(x)
    torch.testing.assert_close(y, F.conv2d(x, (lower @ upper)[:, :, None, None], linear.shift))
    torch.testing.assert_close(log_det, 16 * log_pivots.sum().expand(5))


def test_what_leaves_early_meets_the_base_as_it_is() -> None:
    split = transforms.Split(laws.randomise(transforms.PerPixel(transforms.LULinear(2), (2, 2))), 5).double()
    x = laws.normal(3, 5, 2, 2)
    y, _ = split.forward_and_log_det(x)
    assert torch.equal(y[:, 2:], x[:, 2:])
    assert not torch.equal(y[:, :2], x[:, :2])


def test_data_set_the_norms_at_every_scale() -> None:
    flow = flows.glow((1, 8, 8), num_steps=2, hidden_dim=8).double()
    x = 3 + 5 * laws.normal(200, 1, 8, 8).cumsum(-1)
    flow.initialize(x)
    norms = [part for part in flow.modules() if isinstance(part, transforms.ActNorm)]
    assert len(norms) == 6
    assert all((norm.log_scale != 0).any() for norm in norms)
    z, _ = through(flow, x, inverse=True)
    assert z.mean().abs() < 0.1
    assert abs(z.std() - 1) < 0.1


def test_the_sigmoid_has_the_logits_jacobian() -> None:
    layer, z = transforms.Sigmoid((1, 2, 2), high=256.0), laws.normal(7, 1, 2, 2, scale=2.0)
    y, log_det = layer.forward_and_log_det(z)
    share = 0.05 + 0.9 * y / 256
    torch.testing.assert_close(z, torch.logit(share))
    torch.testing.assert_close(-log_det, (math.log(0.9 / 256) - share.log() - (1 - share).log()).sum((1, 2, 3)))
    torch.testing.assert_close(layer.inverse_and_log_det(y)[0], z)
    assert layer.codomain.check(y).all()
    assert layer.inverse_and_log_det(torch.tensor([[[0.0, 256.0]]]))[0].isfinite().all()


NO_CLASSES = (
    *(torch.tensor([number]) for number in (4, -1)),
    torch.zeros(2, 3),
    F.one_hot(torch.tensor([0, 3]), 4),
    torch.tensor([[5.0, -2.0, -1.0, -1.0]]),
    torch.full((2, 4), math.nan),
)
test_bad_sizes_and_what_is_no_class_are_refused_by_name = laws.refusals(
    *((lambda labels=labels: ClassEmbedding(4, 2)(labels), "ClassEmbedding: ") for labels in NO_CLASSES),
    (lambda: flows.glow((1, 7, 8)), "can be halved 0 times"),
    (lambda: flows.realnvp_image((1, 8, 8), 3, num_classes=2), "not both"),
    (lambda: flows.realnvp_image((1, 8, 8), (1, 4, 4)), "must have the shape"),
    (lambda: flows.tarflow((1, 8, 8), patch_size=3), "patch_size must divide"),
    (lambda: flows.tarflow((1, 8, 8), hidden_dim=10), "multiple of num_heads"),
    (lambda: flows.tarflow((1, 8, 8), patch_size=8), "into 4 patches at least"),
    (lambda: Dequantized(flows.glow((1, 8, 8)), noise=flows.glow((1, 8, 8), 8)), "noise must be"),
    (lambda: transforms.Squeezed(transforms.PerPixel(transforms.ActNorm(3), (2, 2))), "multiple of factor²"),
    (lambda: transforms.Reshaped(transforms.LULinear(4), (1, 3)), "Reshaped: "),
    (lambda: transforms.Split(transforms.LULinear(4), 4), "Split: input_dim"),
    (lambda: transforms.PerPixel(transforms.PerPixel(transforms.LULinear(4), (2, 2)), (2, 2)), "PerPixel: inner"),
    (lambda: transforms.Sigmoid((1,), low=1.0), "Sigmoid: low"),
    (lambda: ConvNet(1, 1, 2, (4, 4), context_shape=(1, 6, 6)), "ConvNet: context_shape"),
)


# ------------------------------------------------------------ integers


def quantised(levels: int = 4, noise: bool = False, **options: Any) -> Dequantized:
    """Return a random flow over images of two pixels, whose masses can be summed."""
    shape, masks = (2, 1, 1), ([True, False], [False, True])

    def couplings(**context: Any) -> list[transforms.Coupling]:
        return [transforms.Coupling(Affine(), ConvNet(1, 1, 2, (1, 1), 8, 0, **context), mask) for mask in masks]

    of_noise = Flow(couplings(context_shape=shape), encoder=Flatten(shape)) if noise else None
    model = Dequantized(Flow(couplings()), levels=levels, noise=of_noise, **options)
    return laws.randomise(model, scale=0.5).double()


def every_image(levels: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(levels), torch.arange(levels))[:, :, None, None]


def masses(model: Dequantized, levels: int) -> Tensor:
    """Return the mass of each image of two pixels, by a grid over its cell; end cells are unbounded."""
    interval, fine = model.pixels.codomain.base_constraint, 60
    ranges = (interval.lower_bound, 0, 40), (0, levels, levels * fine), (levels, interval.upper_bound, 40)
    edges = [torch.linspace(low, high, number + 1, dtype=torch.float64) for low, high, number in ranges]
    points, widths = torch.cat([(e[1:] + e[:-1]) / 2 for e in edges]), torch.cat([e.diff() for e in edges])
    grid = torch.cartesian_prod(points, points)
    density = model.flow().followed_by(model.pixels).log_prob(grid[:, :, None, None]).exp()
    weights = torch.cartesian_prod(widths, widths).prod(-1)
    cells = torch.bucketize(grid, torch.arange(1, levels).double(), right=True)
    found = torch.zeros(levels * levels, dtype=torch.float64)
    return found.index_add(0, cells[:, 0] * levels + cells[:, 1], density * weights)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [False, True], ids=["uniform", "variational"])
def test_masses_are_bounded_from_below_and_the_bound_tightens(noise: bool) -> None:
    model, images = quantised(noise=noise), every_image(4)
    true = masses(model, 4)
    assert abs(true.sum() - 1) < 1e-3
    assert model.log_prob(images[:0]).shape == (0,)
    torch.manual_seed(0)
    gaps = []
    for number in (1, 8, 64):
        with torch.no_grad():
            draws = model.log_prob(images.expand(400, *images.shape), num_samples=number)
        mean, error = draws.mean(0), draws.std(0) / 20
        assert (mean - 4 * error <= true.log() + 2e-3).all()
        gaps.append((true.log() - mean).mean().item())
    assert gaps[0] > gaps[1] > gaps[2] > -0.01


def test_samples_have_these_masses() -> None:
    model = quantised()
    torch.manual_seed(0)
    draws = model().sample((20_000,)).long().squeeze()
    share = torch.bincount(draws[:, 0] * 4 + draws[:, 1], minlength=16) / 20_000
    true = masses(model, 4)
    assert ((share - true).abs() < 5 * (true * (1 - true) / 20_000).sqrt() + 1e-3).all()


def test_variational_noise_starts_as_uniform() -> None:
    flow = flows.realnvp_image((1, 4, 4), num_steps=1, hidden_dim=4)
    noise = flows.realnvp_image((1, 4, 4), (1, 4, 4), num_steps=1, hidden_dim=4)
    model, images = Dequantized(flow, noise=noise).double(), torch.randint(0, 256, (300, 1, 4, 4))
    u, log_q = model._noise(images.double(), model.num_samples)
    assert torch.as_tensor(log_q).abs().max() < 1e-9
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * u.numel())
    assert abs(u.var() - 1 / 12) < 0.005


def test_noise_is_trained_with_the_flow() -> None:
    model = quantised(noise=True)
    (-model.log_prob(every_image(4)).mean()).backward()
    assert model.noise is not None
    grads = [parameter.grad for parameter in model.noise.transforms.parameters()]  # type: ignore[attr-defined]
    assert all(grad is not None and (grad != 0).any() for grad in grads)


def image_of(value: object) -> Tensor:
    return torch.full((3, 1, 8, 8), value)  # type: ignore[arg-type]


def shallow(context_dim: int = 0, **options: Any) -> Dequantized:
    return Dequantized(flows.glow((1, 8, 8), context_dim, num_steps=1, hidden_dim=4), **options)


test_what_is_no_image_of_integers_is_one_clear_error = laws.refusals(
    (lambda: shallow().log_prob(image_of(1.0)), "must hold integers from 0 to 255, got torch.float32"),
    (lambda: shallow().log_prob(image_of(math.nan)), "with NaN or inf"),
    (lambda: shallow().log_prob(image_of(256)), "from 0 to 255, got some from 256 to 256"),
    (lambda: shallow().log_prob(torch.zeros(3, 8, 8, dtype=torch.uint8)), "must have the event shape"),
)


def test_out_of_range_there_is_no_mass() -> None:
    model = shallow()
    with pyro.validation_enabled(False):
        score = model.log_prob(torch.cat((image_of(255.0), *map(image_of, (256.0, -1.0, 0.5, math.nan)))))
    assert score.isfinite().tolist() == [True] * 3 + [False] * 12
    assert (score[3:] == -math.inf).all()
    score[:3].sum().backward()  # other values do no harm
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_values_are_checked_after_something_was_compiled() -> None:
    """Compiling turns torch's own validation off."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        with pytest.raises(ValueError, match="must hold integers"):
            shallow().log_prob(image_of(0.5))
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


def test_integers_of_16_bits_are_read() -> None:
    model = shallow(levels=2**16)
    assert model.log_prob(image_of(60_000).to(torch.uint16)).isfinite().all()
    fit = quick(model, torch.randint(0, 2**16, (60, 1, 8, 8)).to(torch.uint16))
    assert fit.held_out.isfinite().all()


def test_models_of_integers_are_pyros() -> None:
    model, h = shallow(3), torch.randn(4, 3)
    q = model(h)
    assert (q.batch_shape, q.event_shape) == ((4,), (1, 8, 8))
    draws = q.sample((5,))
    assert draws.dtype == torch.uint8
    assert q.support.check(draws).all()
    assert q.expand((2, 4)).log_prob(draws[0]).shape == (2, 4)
    assert model(h, num_samples=3).log_prob(draws).shape == (5, 4)

    def program(images: Tensor | None = None) -> Tensor:
        with pyro.plate("image", 4):
            return pyro.sample("x", model(h), obs=images)

    trace = pyro.poutine.trace(program).get_trace(draws[0])
    assert trace.log_prob_sum().isfinite()
    assert program().shape == (4, 1, 8, 8)
    with pyro.poutine.mask(mask=False):
        assert pyro.poutine.trace(program).get_trace(draws[0]).log_prob_sum() == 0


@every_context
@every_recipe
def test_models_come_back_from_files(name: str, kind: str, tmp_path: Path) -> None:
    options, contexts = CONTEXTS[kind]
    noise = flows.realnvp_image(SHAPE, SHAPE, num_steps=1, hidden_dim=4, recompute=True)
    model = Dequantized(random(name, **options), levels=7, noise=noise, num_samples=2).double()
    laws.randomise(model.noise, scale=0.1)
    pf.save(model, tmp_path / "model.pt")
    again = pf.load(tmp_path / "model.pt")
    images = torch.randint(0, 7, (5, *SHAPE))
    scores = laws.seeded(*(functools.partial(one.log_prob, images, contexts) for one in (model, again)))
    assert torch.equal(*scores)


def test_bits_per_dim() -> None:
    assert pf.bits_per_dim(torch.tensor([-12 * math.log(2)]), (1, 2, 3)).tolist() == [2.0]


# ------------------------------------------------------------ training


def stripes(number: int, levels: int = 16) -> tuple[Tensor, Tensor]:
    """Return noisy images of vertical or horizontal stripes, by class: ``(N, 1, 8, 8)`` of 0 … levels - 1."""
    source = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (number,), generator=source)
    phase = torch.randint(0, 4, (number, 1, 1), generator=source)
    place = torch.arange(8)
    wave = ((place + phase) % 4 < 2).expand(number, 8, 8)
    wave = torch.where(labels[:, None, None] == 0, wave, wave.mT)
    noise = torch.randint(0, 3, (number, 8, 8), generator=source)
    return (wave * (levels - 3) + noise).unsqueeze(1).to(torch.uint8), labels


def small(**options: Any) -> Dequantized:
    torch.manual_seed(0)
    return Dequantized(flows.glow((1, 8, 8), num_steps=2, hidden_dim=16, **options), levels=16)


def quick(flow: Any, x: Any, *args: Any, **settings: Any) -> Fit:
    """Fit in two epochs; options of training may be given one by one."""
    return fit_density(flow, x, *args, **{"max_epochs": 2, "progress": False, **grouped(settings)})


@pytest.mark.slow
def test_classes_are_learned_and_drawn(tmp_path: Path) -> None:
    x, labels = stripes(600)
    model = small(num_classes=2)
    fit = quick(model, x, labels, max_epochs=8, lr=1e-2, samples=tmp_path / "samples-{epoch}.png")
    bits = pf.bits_per_dim(-fit.held_out[-1], (1, 8, 8))
    assert bits < 3.2  # 4 for an untrained flow, log2 3 = 1.585 at best
    draws = model(torch.tensor([0, 1])).sample((50,)).double()
    down, across = draws.diff(dim=-2).abs().mean((0, 2, 3, 4)), draws.diff(dim=-1).abs().mean((0, 2, 3, 4))
    assert down[0] < across[0]
    assert down[1] > across[1]
    assert len(list(tmp_path.glob("samples-*.png"))) == 8
    right = model.log_prob(x, labels, num_samples=4) - model.log_prob(x, 1 - labels, num_samples=4)
    assert (right > 0).float().mean() > 0.9


FORMS: dict[str, Any] = {
    "tensor": lambda *rows: rows,
    "array": lambda *rows: [part.numpy() for part in rows],
    "loader": lambda *rows: [DataLoader(TensorDataset(*rows), batch_size=50, shuffle=True)],
}


@pytest.mark.parametrize("form", FORMS)
def test_images_come_as_they_come(form: str) -> None:
    fit = quick(small(num_classes=2), *FORMS[form](*stripes(200)))
    assert fit.held_out.isfinite().all()
    assert fit.losses[-1] < fit.losses[0]


@pytest.mark.slow
def test_tables_of_integers_have_masses_too() -> None:
    source = torch.Generator().manual_seed(0)
    first = torch.randint(0, 10, (600, 1), generator=source)
    x = torch.cat((first, (first + torch.randint(0, 2, (600, 1), generator=source)) % 10), 1)
    model = Dequantized(flows.nsf(2, num_transforms=2, hidden_dims=(16,)), levels=10)
    fit = quick(model, x, max_epochs=20)
    assert math.log(20) < fit.best_loss + 0.05  # entropy of the rows
    assert fit.best_loss < math.log(100) - 0.3
    assert model().sample((5,)).shape == (5, 2)


def test_real_images_are_standardised_channel_by_channel() -> None:
    x = laws.normal(200, 2, 4, 4, dtype=torch.float32) * torch.tensor([10.0, 0.01])[:, None, None] + 5
    flow = flows.glow((2, 4, 4), num_steps=1, hidden_dim=8)
    fit = quick(flow, x)
    last = flow.transforms[-1]
    assert isinstance(last, transforms.PerPixel)
    torch.testing.assert_close(last.inner.scale.detach(), torch.tensor([10.0, 0.01]), rtol=0.1, atol=0)
    wanted = -dist.Normal(5.0, torch.tensor([10.0, 0.01])).log_prob(x.movedim(1, -1)).sum((1, 2, 3)).mean()
    assert abs(fit.held_out[-1] - wanted) < 3
    quick(flow, x + 1)  # even a little training makes the flow not new
    assert flow.transforms[-1] is last
    assert last.inner.loc.max() < 5.5


@pytest.mark.slow
def test_images_steer_images() -> None:
    seen = laws.normal(300, 1, 4, 4, dtype=torch.float32)
    x = 3 * seen + 0.1 * laws.normal(300, 1, 4, 4, seed=1, dtype=torch.float32)
    flow = flows.realnvp_image((1, 4, 4), (1, 4, 4), num_steps=2, hidden_dim=16, num_blocks=1)
    fit = fit_density(flow, x, seen, max_epochs=20, lr=1e-2, progress=False)
    alone = 16 * 0.5 * math.log(2 * math.pi * math.e * 9)
    assert fit.held_out[-1] < alone - 8


@pytest.mark.parametrize(
    ("model", "x", "options", "words"),
    [
        (small(), stripes(50)[0].float(), {}, "must hold integers from 0 to 15"),
        (small(), stripes(50)[0] + 1, {}, "integers from 0 to 15, got some from"),
        (small(), stripes(50)[0][:, 0], {}, r"must have shape \(N, 1, 8, 8\)"),
        (small().flow, stripes(50)[0], {}, "flows.Dequantized"),
        (small().flow, torch.full((50, 1, 8, 8), math.nan), {}, "NaN or inf"),
        (small().flow, torch.ones(50, 1, 8, 8), {}, "constant in a channel"),
        (small(), stripes(50)[0], {"samples": "no/where.png"}, "there is no folder"),
        (small(), stripes(50)[0], {"context": torch.zeros(50)}, "this flow takes none. Build it with"),
        (small(num_classes=2), stripes(50)[0], {}, "labels of 2 classes"),
        (small(num_classes=2), stripes(50)[0], {"context": torch.zeros(50, 1).long()}, r"have the shape \(N,\)"),
        (small().double(), stripes(50)[0], {"mixed_precision": True}, "mixed_precision is for flows in float32"),
        (flows.nsf(2), torch.randn(50, 2), {"samples": "x.png"}, "samples are drawn of images"),
    ],
)
def test_images_that_cannot_be_learned_are_refused(model: Any, x: Tensor, options: dict[str, Any], words: str) -> None:
    before = repr(model)
    with pytest.raises(ValueError, match=words):
        quick(model, x, **options)
    assert repr(model) == before
    assert model.training


@pytest.mark.slow
def test_what_is_kept_is_the_average(tmp_path: Path) -> None:
    x, labels = stripes(200)
    fits, models = [], []
    for decay in (0.0, 0.99):
        model = small(num_classes=2)
        torch.manual_seed(1)
        fits.append(quick(model, x, labels, ema_decay=decay, checkpoint=tmp_path / f"{decay}.pt"))
        models.append(model)
    assert torch.equal(fits[0].losses, fits[1].losses)  # the path is the same
    last = torch.load(tmp_path / "0.99.pt", weights_only=True)
    assert all(torch.equal(*pair) for pair in zip(last["parameters"], models[0].parameters(), strict=True))
    assert any(not torch.equal(*pair) for pair in zip(*(model.parameters() for model in models), strict=True))
    with pytest.raises(ValueError, match="of another run"):
        quick(small(num_classes=2), x, labels, ema_decay=0.5, checkpoint=tmp_path / "0.99.pt")


def test_a_checkpoint_of_another_design_is_refused(tmp_path: Path) -> None:
    """The shapes of both designs are equal."""
    x, labels = stripes(100)
    quick(small(num_classes=2), x, labels, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="of another run"):
        quick(Dequantized(small(num_classes=2).flow, levels=16, alpha=0.1), x, labels, checkpoint=tmp_path / "run.pt")


def test_levels_that_are_not_there_are_told_of() -> None:
    with pytest.warns(UserWarning, match=r"greatest integer in x is 15, but the flow has levels=256"):
        quick(shallow(), stripes(100)[0])


def test_what_is_not_a_number_is_not_drawn() -> None:
    model = laws.randomise(shallow(2))
    with pytest.raises(ValueError, match="sample: the flow gives NaN"):
        model(torch.full((2,), math.nan)).sample()


def test_noise_that_breaks_down_is_named() -> None:
    x, _ = stripes(200)
    noise = flows.realnvp_image((1, 8, 8), (1, 8, 8), num_steps=1, hidden_dim=4)
    model = shallow(levels=16, noise=noise)
    with torch.no_grad():
        next(part for part in noise.modules() if isinstance(part, ConvNet)).output.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"the flow's parameter noise\..*output.bias is not finite"):
        quick(model, x, on_nonfinite="raise")


def test_networks_alone_calculate_in_half_precision() -> None:
    x, _ = stripes(200)
    model, seen = small(), set()
    networks = [part for part in model.modules() if isinstance(part, ConvNet)]
    for net in networks:
        net.output.register_forward_hook(lambda m, i, y: seen.add(y.dtype))
    fit = quick(model, x, mixed_precision=True)
    assert torch.bfloat16 in seen
    assert fit.held_out[-1] < fit.held_out[0]
    seen.clear()
    assert model.log_prob(x[:5]).dtype == torch.float32
    assert seen == {torch.float32}
    assert not any(net._forward_hooks or net._forward_pre_hooks for net in networks)


def test_a_grid_shows_the_images(tmp_path: Path) -> None:
    from matplotlib.image import imread

    images = torch.zeros(3, 1, 4, 4)
    images[1] = 16.0
    pf.save_images(images, tmp_path / "grid.png", columns=2, levels=17)
    picture = np.asarray(imread(tmp_path / "grid.png"))[..., 0]
    assert picture.shape == (100, 100)
    assert (picture[0, 0], picture[0, 60], picture[60, 0], picture[60, 60]) == (0, 1, 0, 1)
    with pytest.raises(ValueError, match="save_images: images must have shape"):
        pf.save_images(torch.zeros(3, 2, 4, 4), tmp_path / "no.png")


# ------------------------------------------------------------ autoencoders


@pytest.mark.slow
def test_an_estimated_density_may_run_side_by_side() -> None:
    """Noise of the estimates is not reported as a fault of the model, but real faults are."""
    torch.manual_seed(0)
    decoder = Dequantized(flows.glow((1, 2, 2), 2, num_steps=1, hidden_dim=4), levels=16)
    x = torch.randint(0, 16, (20, 1, 2, 2))

    def model(x: Tensor, weight: float = 0.0) -> None:
        with pyro.plate("image", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.factor("all", -weight * z.square().sum() + 0 * z.sum(-1))
            pyro.sample("x", decoder(z), obs=x)

    def guide(x: Tensor, _: float = 0.0) -> None:
        with pyro.plate("image", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.warns(UserWarning, match="is an estimate, with a standard deviation of"):
        pf.psis(model, guide, x, num_samples=200)
    for seed in range(40):
        torch.manual_seed(seed)
        assert Task(model, guide, (x,), {}).settle().model.engine == "plate"
    with pytest.raises(ValueError, match="vectorised over draws"):
        Task(Program(model, vectorize="plate"), guide, (x, 100.0), {}).settle()


@pytest.mark.slow
def test_an_autoencoder_with_a_flow_for_a_decoder_learns() -> None:
    x, _ = stripes(300)
    torch.manual_seed(0)
    decoder = Dequantized(flows.glow((1, 8, 8), 4, num_steps=2, hidden_dim=16), levels=16)
    decoder.initialize(x, torch.zeros(300, 4))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("image", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", decoder(z), obs=x)

    guide = pf.AutoPlateFlow(model, "image", encoder=ConvEncoder((1, 8, 8), 16, (8,), 16))
    fit = pf.fit_svi(model, guide, x, steps=100, lr=1e-2, progress=False, num_particles=1)
    assert fit.losses[-20:].mean() < fit.losses[:20].mean()
    bound = pf.importance_log_likelihood(model, guide, x[:20], num_samples=8)
    assert bound.shape == (20,)
    assert pf.bits_per_dim(bound.mean(), (1, 8, 8)) < 3.6


@every_recipe
def test_empty_batches_of_images(name):
    flow = IMAGES[name]((1, 8, 8))
    for batch in ((0,), (2, 0)):
        assert flow.log_prob(torch.zeros(*batch, 1, 8, 8)).shape == batch
        assert flow.sample(batch).shape == (*batch, 1, 8, 8)
