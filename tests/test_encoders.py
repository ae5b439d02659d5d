"""Encoders map each row of data to a context, for all batches and dtypes, and for any order of a set."""

import contextlib
import copy
import inspect
import itertools
import pickle
from typing import NamedTuple

import laws
import pytest
import torch
from models import silent
from torch import Tensor, nn

from pyro_flows.encoders import (
    Arguments,
    ConvEncoder,
    Encoder,
    Flatten,
    GRUEncoder,
    Identity,
    MLPEncoder,
    Scalars,
    SetEncoder,
    Standardize,
    TransformerEncoder,
)
from pyro_flows.encoders.training_record import recorded, unjudged

CONTEXT_DIM = 6


class Kind(NamedTuple):
    """Registry entry: class of an encoder, its arguments, and the shape of a row of its data."""

    type: type[Encoder]
    arguments: tuple[object, ...]
    row: tuple[int, ...]
    named: dict[str, object] = {}

    def build(self) -> Encoder:
        return self.type(*self.arguments, **self.named)


ENCODERS: dict[str, Kind] = {
    "mlp": Kind(MLPEncoder, (3, CONTEXT_DIM, [16, 8]), (3,)),
    "mlp_of_numbers": Kind(MLPEncoder, (1, CONTEXT_DIM, (16,)), (1,), {"activation": nn.Tanh}),
    "set": Kind(SetEncoder, (2, CONTEXT_DIM, [16, 8]), (7, 2)),
    "set_one_query": Kind(SetEncoder, (2, CONTEXT_DIM, (16,)), (3, 2), {"num_queries": 1, "activation": nn.PReLU}),
    "image": Kind(ConvEncoder, ([1, 28, 28], CONTEXT_DIM, [4, 8], 16), (1, 28, 28)),
    "image_small": Kind(ConvEncoder, ((3, 8, 8), CONTEXT_DIM, (4, 4, 8), 16), (3, 8, 8)),
    "image_odd": Kind(ConvEncoder, ((2, 5, 11), CONTEXT_DIM, (4, 8), 16), (2, 5, 11), {"activation": nn.Tanh}),
    "flat_image": Kind(Flatten, ([1, 2, 3],), (1, 2, 3)),
    "identity": Kind(Identity, ([2, 3],), (2, 3)),
    "gru": Kind(GRUEncoder, (2, CONTEXT_DIM, 8), (5, 2)),
    "gru_deep": Kind(GRUEncoder, (1, CONTEXT_DIM, 8), (3, 1), {"num_layers": 2}),
    "transformer": Kind(TransformerEncoder, (2, CONTEXT_DIM, 8), (5, 2), {"num_heads": 2}),
}
every_encoder = pytest.mark.parametrize("kind", ENCODERS.values(), ids=ENCODERS.keys())


def made(kind: Kind, seed: int = 0) -> Encoder:
    """Return an encoder in float64, initialised from data."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = kind.build().double()
    encoder.initialize(data(kind, 20, seed=seed + 100))
    return encoder


def data(kind: Kind, *batch: int, seed: int = 1) -> Tensor:
    """Return data that are far from standardised."""
    return 30.0 + 7.0 * laws.normal(*batch, *kind.row, seed=seed)


# ------------------------------------------------------------ laws of all encoders


@every_encoder
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,), (2, 0)], ids=str)
def test_contexts_have_the_batch_shape_of_the_data(kind: Kind, batch: tuple[int, ...]) -> None:
    context = made(kind)(data(kind, *batch))
    assert context.shape == (*batch, CONTEXT_DIM)
    assert context.isfinite().all()


@every_encoder
def test_rows_do_not_touch_each_other(kind: Kind) -> None:
    encoder, x = made(kind), data(kind, 2, 3)
    together = encoder(x)
    alone = torch.stack([torch.stack([encoder(row) for row in rows]) for rows in x])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together[0, 0], together[1, 2])  # the context depends on the data


@every_encoder
def test_a_gradient_reaches_every_parameter_and_the_data(kind: Kind) -> None:
    encoder, x = made(kind), data(kind, 16).requires_grad_()
    encoder(x).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        if name.startswith("standardize"):  # set from data, not trained
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().sum() > 0, name
    assert x.grad.abs().sum() > 0


@every_encoder
def test_float32_and_float64_agree(kind: Kind) -> None:
    encoder, x = made(kind), data(kind, 5)
    narrow = copy.deepcopy(encoder).float()
    assert encoder(x).dtype == torch.float64
    assert narrow(x.float()).dtype == torch.float32
    torch.testing.assert_close(narrow(x.float()).double(), encoder(x), atol=1e-4, rtol=1e-4)


@every_encoder
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("own", [torch.float32, torch.float64], ids=str)
def test_data_of_any_dtype_are_converted_to_the_networks(kind: Kind, dtype: torch.dtype, own: torch.dtype) -> None:
    x = (3.0 * laws.normal(6, *kind.row, seed=1).abs()).to(dtype)
    encoder = kind.build().to(own)
    other = copy.deepcopy(encoder)
    encoder.initialize(x)
    other.initialize(x.to(own))
    assert encoder(x).dtype == own
    assert torch.equal(encoder(x), other(x.to(own)))


@every_encoder
def test_copies_pickles_and_strict_states_are_the_same_function(kind: Kind) -> None:
    encoder, x = made(kind), data(kind, 4)
    fresh = kind.build().double()
    assert not torch.allclose(fresh(x), encoder(x))
    fresh.load_state_dict(encoder.state_dict(), strict=True)
    for other in (fresh, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other(x), encoder(x))


@every_encoder
def test_arguments_are_kept_under_their_names(kind: Kind) -> None:
    encoder, taken = kind.build(), inspect.signature(kind.type).bind(*kind.arguments, **kind.named)
    taken.apply_defaults()
    wanted = {name: tuple(value) if isinstance(value, list) else value for name, value in taken.arguments.items()}
    assert {name: getattr(encoder, name) for name in wanted} == wanted
    again = kind.type(**wanted)
    assert [p.shape for p in again.parameters()] == [p.shape for p in encoder.parameters()]


@every_encoder
def test_data_shape_describes_a_row(kind: Kind) -> None:
    assert all(size in (None, given) for size, given in zip(kind.build().data_shape, kind.row, strict=True))


@every_encoder
def test_initialising_standardises_the_data(kind: Kind) -> None:
    encoder, x = kind.build().double(), data(kind, 4, 5)
    assert torch.equal(encoder.standardize(x), x)
    encoder.initialize(x)
    z = encoder.standardize(x)
    shape = encoder.standardize.shape
    shared = tuple(place - len(shape) for place in range(len(shape)) if shape[place] == 1)
    over = (*range(z.dim() - len(shape)), *shared)
    torch.testing.assert_close(z.mean(over), torch.zeros_like(z.mean(over)), atol=1e-10, rtol=0.0)
    torch.testing.assert_close(z.std(over, correction=0), torch.ones_like(z.mean(over)))


@every_encoder
def test_standardised_data_make_units_irrelevant(kind: Kind) -> None:
    encoder = kind.build().double()
    other, x = copy.deepcopy(encoder), data(kind, 10)
    encoder.initialize(x)
    other.initialize(1000.0 * x - 3.0)
    torch.testing.assert_close(encoder(x), other(1000.0 * x - 3.0))


@pytest.mark.slow
@every_encoder
def test_encoders_compile_and_map(kind: Kind) -> None:
    encoder, x = made(kind), data(kind, 3)
    torch.testing.assert_close(torch.func.vmap(encoder)(x), encoder(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(encoder, fullgraph=True, backend="aot_eager")(x), encoder(x))


@every_encoder
def test_data_of_another_shape_are_refused(kind: Kind) -> None:
    encoder = made(kind)
    wide = torch.zeros(2, *kind.row[:-1], kind.row[-1] + 1)
    for use in (encoder, encoder.initialize):
        for wrong in (wide, torch.zeros(())):
            with pytest.raises(ValueError, match=rf"^{type(encoder).__name__}: data must have shape \(.*, got "):
                use(wrong)


# ------------------------------------------------------------ standardisation


def test_a_constant_feature_keeps_the_scale_1() -> None:
    for dtype in (torch.float32, torch.float64):
        for value in (0.1, -1e30, 0.0):
            standardize = Standardize((2,)).to(dtype)
            x = torch.stack((torch.full((1001,), value), torch.linspace(-1, 1, 1001)), -1).to(dtype)
            standardize.initialize(x)
            assert standardize.scale[0] == 1.0
            assert (standardize(x)[:, 0] == 0.0).all()


@pytest.mark.parametrize(
    ("dtype", "loc", "scale"),
    [
        *((torch.float32, loc, scale) for loc, scale in ((0.0, 1e35), (1e7, 10.0), (0.0, 1e-40))),
        *((torch.float64, loc, scale) for loc, scale in ((1e200, 1e199), (0.0, 1e-200), (1.7e9, 1e-3))),
    ],
)
def test_extreme_values_are_standardised(dtype: torch.dtype, loc: float, scale: float) -> None:
    x = (loc + scale * laws.normal(1000, 3)).to(dtype)
    standardize = Standardize((3,)).to(dtype)
    standardize.initialize(x)
    z = standardize(x).double()
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3).double(), atol=1e-3, rtol=0.0)
    assert (z.mean(0).abs() < 0.1).all()


def test_a_size_of_1_shares_its_scale_along_the_dimension() -> None:
    standardize = Standardize((2, 1)).double()
    x = laws.normal(10, 2, 5) * torch.tensor([[1.0], [50.0]])
    standardize.initialize(x)
    torch.testing.assert_close(standardize.scale, x.std((0, 2), correction=0)[:, None])
    standardize.initialize(x[0])  # one row, no batch
    torch.testing.assert_close(standardize.loc, x[0].mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]]), r"finite in torch\.float32, got 2 NaN or infinite of 4"),
        (torch.tensor([[1e300, 0.0]], dtype=torch.float64), r"finite in torch\.float32, got 1 NaN or infinite of 2"),
        (torch.zeros(0, 2), r"at least one row, got the shape \(0, 2\)"),
        (torch.zeros(4, 3), r"end with the shape \(2,\), got \(4, 3\)"),
        (torch.zeros(()), r"end with the shape \(2,\), got \(\)"),
    ],
)
def test_data_that_cannot_set_a_scale_are_refused(x: Tensor, message: str) -> None:
    standardize = Standardize((2,))
    with pytest.raises(ValueError, match=f"^Standardize: data must (be|hold)? ?{message}"):
        standardize.initialize(x)
    assert torch.equal(standardize(torch.ones(2)), torch.ones(2))  # unchanged


@pytest.mark.parametrize("shape", [(), (2,), (2, 1)], ids=str)
def test_a_mask_of_entries_standardises_each_feature_by_its_own_entries(shape: tuple[int, ...]) -> None:
    x = 5.0 + 3.0 * laws.normal(50, 2, 4)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    x, mask = (x, mask) if len(shape) == 2 else (x.mT, mask.mT)
    standardize = Standardize(shape).double()
    standardize.initialize(torch.where(mask, x, torch.nan), mask)
    place = x.dim() - len(shape)
    for k in range(2 if shape else 1):
        column = x.select(place, k)[mask.select(place, k)] if shape else x[mask]
        torch.testing.assert_close(standardize.loc.flatten()[k], column.mean())
        torch.testing.assert_close(standardize.scale.flatten()[k], column.std(correction=0))


def test_a_feature_that_is_hidden_everywhere_keeps_the_identity() -> None:
    standardize = Standardize((2,))
    standardize.initialize(torch.tensor([[1.0, 9.0], [3.0, 9.0]]), torch.tensor([[True, False], [True, False]]))
    assert standardize.loc.tolist() == [2.0, 0.0]
    assert standardize.scale.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"^Standardize: data must hold at least one row"):
        standardize.initialize(torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.bool))


# ------------------------------------------------------------ sets


def encoded_sets(n: int = 7) -> tuple[SetEncoder, Tensor]:
    encoder = made(ENCODERS["set"])
    assert isinstance(encoder, SetEncoder)
    return encoder, 30.0 + 7.0 * laws.normal(3, n, 2, seed=4)


@pytest.mark.parametrize("n", [1, 2, 7, 500])
def test_the_order_of_a_set_does_not_matter(n: int) -> None:
    encoder, x = encoded_sets(n)
    order = laws.shuffled(n)
    torch.testing.assert_close(encoder(x[:, order]), encoder(x))
    mask = torch.rand(3, n, generator=torch.Generator().manual_seed(0)) < 0.5
    torch.testing.assert_close(encoder(x[:, order], mask[:, order]), encoder(x, mask))


@pytest.mark.parametrize("filler", [0.0, -1e9, torch.nan, torch.inf])
def test_masked_elements_do_not_matter(filler: float) -> None:
    encoder, x = encoded_sets()
    mask = torch.arange(7) < torch.tensor([[2], [7], [0]])
    filled = torch.where(mask[..., None], x, filler).requires_grad_()
    context = encoder(filled, mask)
    torch.testing.assert_close(context, torch.stack([encoder(row[there]) for row, there in zip(x, mask, strict=True)]))
    context.sum().backward()
    assert torch.equal(filled.grad.abs().sum(-1) > 0, mask)
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    again = copy.deepcopy(encoder)
    again.initialize(filled.detach(), mask)
    encoder.initialize(x[mask])
    assert torch.equal(again.standardize.loc, encoder.standardize.loc)
    assert torch.equal(again.standardize.scale, encoder.standardize.scale)


def test_what_forward_makes_of_the_data_is_what_is_standardised() -> None:
    class Log(MLPEncoder):
        def forward(self, x: torch.Tensor, size: int | None = None) -> torch.Tensor:
            return super().forward(x.log())

    x = (3 + 5 * torch.randn(1000, 2)).exp()
    encoder = Log(2, CONTEXT_DIM)
    encoder.initialize(x, size=4)
    torch.testing.assert_close(encoder.standardize.loc, x.log().mean(0))
    torch.testing.assert_close(encoder.standardize.scale, x.log().std(0, correction=0))
    assert not encoder.standardize._forward_pre_hooks


def test_a_full_mask_is_no_mask() -> None:
    encoder, x = encoded_sets()
    for dtype in (torch.bool, torch.float32):  # as a Bernoulli distribution draws it
        assert torch.equal(encoder(x, torch.ones(3, 7, dtype=dtype)), encoder(x))


def test_the_size_of_a_set_is_known() -> None:
    """Repeating every element keeps all means, but doubles the evidence."""
    encoder, x = encoded_sets()
    assert (encoder(x.repeat(1, 2, 1)) - encoder(x)).abs().max() > 1e-3


def test_elements_are_also_seen_relative_to_their_set() -> None:
    """Place and scale of a set do not change its shape; a set of equal elements has none."""
    encoder, x = encoded_sets()
    mask = torch.arange(7) < torch.tensor([[2], [7], [0]])
    seen: list[Tensor] = []
    encoder.phi.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., 2:][mask]))
    for data in (x, 100.0 * x - 5000.0, x[:, :1].expand_as(x)):
        encoder(data, mask)
    shape, moved, none = seen
    torch.testing.assert_close(moved, shape, rtol=1e-3, atol=1e-3)  # an epsilon keeps equal elements finite
    torch.testing.assert_close(shape[2:].square().mean(0), torch.ones(2).to(shape), rtol=1e-3, atol=0)
    assert not none.any()


def test_a_mask_that_does_not_fit_is_refused() -> None:
    encoder, x = encoded_sets()
    masks = torch.full((3, 7), 0.5), torch.ones(3, 6, dtype=torch.bool), torch.ones(7, dtype=torch.bool)
    for use, mask in itertools.product((encoder, encoder.initialize), masks):
        with pytest.raises(ValueError, match=r"^SetEncoder: mask must (have shape \(3, 7\), .* got|hold .*, got 0\.5)"):
            use(x, mask)


@pytest.mark.slow
def test_a_set_encoder_learns_what_a_set_says() -> None:
    """It learns mean, sd, maximum and size of ragged sets, also for sets larger than those in training."""
    torch.manual_seed(0)
    encoder = SetEncoder(1, 4, (32, 32))

    def draw(low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
        size = torch.randint(low, high + 1, (128, 1))
        mask = torch.arange(high) < size
        x = torch.randn(128, 1) + torch.randn(128, 1).mul(0.3).exp() * torch.randn(128, high)
        mean = (x * mask).sum(1, keepdim=True) / size
        spread = (((x - mean).square() * mask).sum(1, keepdim=True) / size).sqrt()
        largest = x.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
        return x[..., None], mask, torch.cat((mean, spread, largest, size.log()), -1)

    def error(low: int, high: int) -> Tensor:
        x, mask, wanted = draw(low, high)
        return (encoder(x, mask) - wanted).square().mean(0)

    laws.descend(encoder.parameters(), lambda: error(4, 30).mean(), steps=400, lr=5e-3)
    for sizes in ((4, 30), (31, 40)):
        assert (error(*sizes).sqrt() < 0.3).all()


# ------------------------------------------------------------ series

SERIES = {"gru": GRUEncoder, "transformer": TransformerEncoder}
every_series = pytest.mark.parametrize("build", SERIES.values(), ids=SERIES.keys())
BuildSeries = type[GRUEncoder] | type[TransformerEncoder]


def encoded_series(build: BuildSeries, length: int = 6) -> tuple[Encoder, Tensor, Tensor]:
    """Return an initialised encoder with series ``(4, length, 2)`` and their times."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = build(2, CONTEXT_DIM, 8).double()
    x, times = 30.0 + 7.0 * laws.normal(4, length, 2, seed=4), 1e3 + laws.normal(4, length, seed=5).exp().cumsum(-1)
    encoder.initialize(x, times=times)
    return encoder, x, times


def random_mask(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6


@every_series
@pytest.mark.parametrize("filler", [0.0, -1e300, torch.nan, torch.inf])
def test_missing_steps_are_as_if_removed(build: BuildSeries, filler: float) -> None:
    encoder, x, times = encoded_series(build)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    filled = torch.where(mask[..., None], x, filler).requires_grad_()
    when = torch.where(mask, times, filler).requires_grad_()
    context = encoder(filled, mask, when)
    rows = zip(x, times, mask, strict=True)
    torch.testing.assert_close(context, torch.stack([encoder(row[m], times=t[m]) for row, t, m in rows]))
    context.square().sum().backward()
    assert torch.equal(filled.grad.abs().sum(-1) > 0, mask)
    assert when.grad.isfinite().all()
    assert (when.grad[~mask] == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    assert torch.equal(encoder(filled, mask.double(), when), context)  # as a Bernoulli distribution draws it
    assert torch.equal(encoder(filled, mask[..., None].expand(x.shape), when), context)


@every_series
def test_padding_changes_nothing(build: BuildSeries) -> None:
    encoder, x, _ = encoded_series(build)
    padded = torch.cat((x, torch.full((4, 3, 2), torch.nan)), 1)
    mask = (torch.arange(9) < 6).expand(4, 9)
    torch.testing.assert_close(encoder(padded, mask=mask), encoder(x))
    assert torch.equal(encoder(x, mask=mask[:, :6]), encoder(x))


@every_series
@pytest.mark.parametrize("filler", [-1e300, torch.nan])
def test_missing_entries_do_not_matter(build: BuildSeries, filler: float) -> None:
    encoder, x, times = encoded_series(build)
    mask = random_mask(4, 6, 2)
    filled = torch.where(mask, x, filler).requires_grad_()
    context = encoder(filled, mask, times)
    assert torch.equal(context, encoder(x, mask, times))
    assert (context - encoder(x, times=times)).abs().amin(0).max() > 1e-4
    context.square().sum().backward()
    assert torch.equal(filled.grad != 0, mask)
    fresh = build(2, CONTEXT_DIM, 8).double()
    fresh.initialize(filled.detach(), mask, times)
    wanted = torch.stack([x[..., k][mask[..., k]].mean() for k in range(2)])
    torch.testing.assert_close(fresh.standardize.loc.detach(), wanted)


@every_series
def test_units_of_time_do_not_matter_but_times_do(build: BuildSeries) -> None:
    encoder, x, times = encoded_series(build)
    other = copy.deepcopy(encoder)
    other.initialize(x, times=60.0 * times - 5.0)
    torch.testing.assert_close(other(x, times=60.0 * times - 5.0), encoder(x, times=times))
    assert (encoder(x, times=times) - encoder(x)).abs().min() > 1e-5
    torch.testing.assert_close(encoder(x, times=times[0]), encoder(x, times=times[:1].expand(4, 6)))
    torch.testing.assert_close(encoder(x, times=times.long()), encoder(x, times=times.long().double()))


@every_series
def test_seconds_since_1970_keep_their_gaps(build: BuildSeries) -> None:
    """Networks of float32 see gaps of a second, whose times differ in float64 only."""
    _, x, times = encoded_series(build)
    narrow, later = build(2, CONTEXT_DIM, 8), 1.7e9 + times
    narrow.initialize(x.float(), times=times)
    again = copy.deepcopy(narrow)
    again.initialize(x.float(), times=later)
    gaps = [net.steps(x.float(), None, t)[0][..., 8:10] for net, t in ((narrow, times), (again, later))]
    torch.testing.assert_close(*gaps, atol=1e-3, rtol=1e-3)


@every_series
@pytest.mark.parametrize("length", [0, 1, 40])
def test_series_of_any_length_have_a_context(build: BuildSeries, length: int) -> None:
    encoder, _, _ = encoded_series(build)
    for batch in ((), (3,), (0,), (2, 3)):
        x = laws.normal(*batch, length, 2)
        context = encoder(x, times=torch.arange(length))
        assert context.shape == (*batch, CONTEXT_DIM)
        assert context.isfinite().all()
    fresh = build(2, CONTEXT_DIM, 8).double()
    refusal = pytest.raises(ValueError, match=r"^Standardize: data must hold at least one row")
    with contextlib.nullcontext() if length else refusal:
        fresh.initialize(laws.normal(3, length, 2))
    assert all(p.isfinite().all() for p in fresh.parameters())


@every_series
def test_times_and_masks_that_do_not_fit_are_refused(build: BuildSeries) -> None:
    encoder, x, times = encoded_series(build)
    name = build.__name__
    for use in (encoder, encoder.initialize):
        with pytest.raises(ValueError, match=rf"^{name}: times must have shape \(4, 6\) or \(6,\), .* got \(4, 5\)\.$"):
            use(x, times=times[:, 1:])
        for mask in (random_mask(6), random_mask(4, 6, 1), torch.full((4, 6), 0.5)):
            match = rf"^{name}: mask must (have shape \(4, 6, 2\) or \(4, 6\), .* got|hold .*, got 0\.5)"
            with pytest.raises(ValueError, match=match):
                use(x, mask, times)


@pytest.mark.slow
@every_series
def test_encoders_of_series_compile_and_map_with_masks(build: BuildSeries) -> None:
    encoder, x, times = encoded_series(build)
    mask = random_mask(4, 6, 2)
    torch.testing.assert_close(torch.func.vmap(encoder)(x, mask, times), encoder(x, mask, times))
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask, times), encoder(x, mask, times))


@pytest.mark.slow
@every_series
def test_encoders_of_series_learn_what_series_say(build: BuildSeries) -> None:
    """They learn spread, roughness, last value and total time of ragged series, also of longer ones.

    A guess of the mean has an error of about 1 in each.
    """
    torch.manual_seed(0)
    encoder = build(1, 4, 32)

    def draw(low: int, high: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mask = torch.rand(128, high).argsort(-1) < torch.randint(low, high + 1, (128, 1))
        times = torch.randn(128, high).exp().cumsum(-1)
        smooth = 3.0 * torch.rand(128, 1)
        level = torch.randn(128, high).cumsum(-1) * smooth / high**0.5
        x = torch.randn(128, 1).mul(0.5).exp() * (level + torch.randn(128, high))
        wanted = []
        for v, t in ((row[m], t[m]) for row, t, m in zip(x, times, mask, strict=True)):
            roughness = (v.diff().square().mean() / v.var()).log()
            wanted.append(torch.stack((v.std().log(), roughness, v[-1], (t[-1] - t[0]).log())))
        return x[..., None], times, mask, torch.stack(wanted)

    x, times, mask, wanted = draw(5, 20)
    encoder.initialize(x, mask, times)
    loc, scale = wanted.mean(0), wanted.std(0)

    def error(low: int, high: int) -> Tensor:
        x, times, mask, wanted = draw(low, high)
        return (encoder(x, mask, times) - (wanted - loc) / scale).square().mean(0)

    laws.descend(encoder.parameters(), lambda: error(5, 20).mean(), steps=300, lr=5e-3)
    for sizes in ((5, 20), (21, 25)):
        assert (error(*sizes).sqrt() < 0.5).all()


# ------------------------------------------------------------ the choice of arguments


NO_PAIRS = (), (1,), (5, 1), (5, 3)  # shapes of data that would be spread over all features of a pair


class Recorded(nn.Module):
    """Network that returns its arguments."""

    def forward(self, *args: object, **kwargs: object) -> object:
        return args, kwargs


@pytest.mark.parametrize(
    ("places", "named", "wanted"),
    [
        ((0,), {}, (("a",), {})),
        ((1, 0), {}, (("b", "a"), {})),
        ((0,), {"mask": 1}, (("a",), {"mask": "b"})),
        ((0,), {"mask": 5}, (("a",), {"mask": None})),
        (("size",), {"times": "size", "mask": "none"}, (("n",), {"times": "n", "mask": None})),
        ((), {"network": 0, "positions": 1}, ((), {"network": "a", "positions": "b"})),
    ],
)
def test_arguments_are_chosen_by_position_or_name(
    places: tuple[int | str, ...], named: dict[str, int | str], wanted: object
) -> None:
    choice = Arguments(Recorded(), *places, **named)
    for found in (choice, copy.deepcopy(choice), pickle.loads(pickle.dumps(choice))):
        assert found("a", "b", size="n") == wanted


test_errors_name_argument_and_value = laws.refusals(
    (lambda: Arguments(None, 0), "^Arguments: network must be .*, got None", TypeError),
    (lambda: Arguments(MLPEncoder, 0), "^Arguments: network must be .*, got <class .*", TypeError),
    (lambda: Arguments(Recorded(), -1), "^Arguments: positions must be integers .*, got -1", TypeError),
    (lambda: Arguments(Recorded(), True), "^Arguments: positions must be .*, got True", TypeError),
    (lambda: Arguments(Recorded(), 0, mask=1.5), "^Arguments: mask must be .*, got 1.5", TypeError),
    (lambda: Arguments(Recorded()), "^Arguments: positions must name an argument of the model, got none. Give 0"),
    (lambda: TransformerEncoder(1, 2, 6, num_heads=4), "TransformerEncoder: hidden_dim .* num_heads = 4, got 6"),
    (lambda: ConvEncoder((1, 9, 3), 2), r"ConvEncoder: image_shape must .*at least 4.*got \(1, 9, 3\)"),
    (lambda: Identity((2, 0)), r"Identity: data_shape must .*, got \(2, 0\)"),
    *((lambda shape=shape: Standardize((2,))(torch.zeros(shape)), "must end with the shape") for shape in NO_PAIRS),
)


def test_what_all_of_training_has_given_cannot_be_left_out() -> None:
    choice = Arguments(Recorded(), 0, "size", mask=1, times="times")
    assert choice("a") == (("a", None), {"mask": None, "times": None})  # before any training
    with recorded():
        choice("a", "b")
        choice("a", "b", size="n")
        with torch.no_grad():
            choice("a")
    for found in (choice, copy.deepcopy(choice), pickle.loads(pickle.dumps(choice))):
        assert found("a", "b") == (("a", None), {"mask": "b", "times": None})  # training left out the size as well
        with pytest.raises(ValueError, match=r"^Arguments: mask \(argument 1 of the model\) must be given.* Give ones"):
            found("a")
        with pytest.warns(UserWarning, match=r"^Arguments: times \('times'\) was never given in training\. Leave it"):
            found("a", "b", times="t")
        with unjudged():
            assert found("a") == (("a", None), {"mask": None, "times": None})
    with recorded():
        choice("a")
    assert choice("a") == (("a", None), {"mask": None, "times": None})


LENGTHS = {kind.__name__: kind for kind in (SetEncoder, GRUEncoder, TransformerEncoder)}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_unlike_those_of_training_are_told(name: str) -> None:
    """By a mask too; a length just outside of the range is taken, and so is any before training and under a trace."""
    network = LENGTHS[name](1, 4)
    with silent():
        network(torch.randn(2, 50, 1))
        with recorded():
            network(torch.randn(4, 10, 1))
            network(torch.randn(3, 20, 1), mask=torch.arange(20) < torch.tensor([[15], [18], [20]]))
            with torch.no_grad():
                network(torch.randn(2, 50, 1))
        with unjudged():
            network(torch.randn(2, 50, 1))
        for number in (8, 10, 17, 25):
            network(torch.randn(2, number, 1))
        network(torch.randn(2, 50, 1), mask=torch.arange(50).expand(2, 50) < 20)
        torch.func.vmap(network)(torch.randn(2, 50, 1))
        network(torch.randn(0, 50, 1))
    (seen,) = [value for key, value in network.state_dict().items() if key.endswith("lengths.seen")]
    assert seen.tolist() == [10, 20]
    again = copy.deepcopy(network)
    short = torch.arange(12).expand(2, 12) < torch.tensor([[12], [3]])
    for shape, mask, number in (((2, 50), None, 50), ((7,), None, 7), ((2, 26), None, 26), ((2, 12), short, 3)):
        with pytest.warns(UserWarning, match=rf"^{name}: the data have {number} \w+, but training had 10 to 20"):
            again(torch.randn(*shape, 1), mask=mask)


@pytest.mark.parametrize("name", LENGTHS)
def test_elements_may_be_numbers(name: str) -> None:
    network = LENGTHS[name](1, 4)
    x, mask = torch.randn(3, 10), torch.rand(3, 10) < 0.7
    assert torch.equal(Scalars(network)(x, mask=mask), network(x[..., None], mask=mask))
    with pytest.raises(ValueError, match=rf"^{name}: data must .* got \(3, 10\)\. If .* Scalars\({name}\("):
        network(x)
    with pytest.raises(ValueError, match=r"^Scalars: data must have shape \(\*batch, n\), got \(\)"):
        Scalars(network)(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"^Scalars: network must be a network or a function, got <class"):
        Scalars(SetEncoder)
