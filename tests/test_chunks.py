"""Draws and densities in chunks: values and gradients equal those without chunks, from small batches."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import laws
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_compiled import counted, random
from torch import Tensor

from pyro_flows import AutoFlow, AutoPlateFlow, Flow, flows
from pyro_flows.encoders import MLPEncoder
from pyro_flows.flows import Dequantized
from pyro_flows.flows.distribution import chunk_for

recipes = pytest.mark.parametrize("recipe", [flows.nsf, flows.maf, flows.iaf, flows.planar_flow])
sizes = pytest.mark.parametrize("chunk_size", [1, 4, 17, 1000])


def close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)


def same_random(function: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return function()


def gradients(found: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(found.square().sum(), inputs, allow_unused=True, materialize_grads=True)


def with_gradients_close(got: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    close(got, wanted)
    close(gradients(got, inputs), gradients(wanted, inputs))


@contextmanager
def batches_seen(flow: Flow) -> Iterator[list[int]]:
    """Return the number of events that reach the transforms of a flow, for each call."""
    seen: list[int] = []

    def counted(plain: Callable[..., Any], value: Tensor, *rest: Any) -> Any:
        seen.append(value.shape[: value.dim() - len(flow.event_shape)].numel())
        return plain(value, *rest)

    with pytest.MonkeyPatch.context() as patch:
        for transform in flow.transforms:
            for verb in ("forward_and_log_det", "inverse_and_log_det"):
                patch.setattr(transform, verb, functools.partial(counted, getattr(transform, verb)), raising=False)
        yield seen


# -------------------------------------------------------------------------------------------------------------- flows


@recipes
@sizes
def test_values_and_gradients_are_those_of_one_batch(recipe: Callable[..., Flow], chunk_size: int) -> None:
    flow, x = random(recipe, 3), laws.normal(5, 7, 3).requires_grad_()
    at_once, chunked = flow.log_prob(x), flow.log_prob(x, chunk_size=chunk_size)
    with_gradients_close(chunked, at_once, [x, *flow.parameters()])
    with torch.no_grad():
        close(flow.log_prob(x, chunk_size=chunk_size), at_once)
    draw = functools.partial(flow.rsample_and_log_prob, (4, 3))
    for part in (0, 1):
        at_once, chunked = (same_random(use)[part] for use in (draw, functools.partial(draw, chunk_size=chunk_size)))
        with_gradients_close(chunked, at_once, list(flow.parameters()))


@pytest.mark.slow
@sizes
@pytest.mark.parametrize(
    "batches", [((7, 5), (5,)), ((7, 5), ()), ((7, 5), (7, 5)), ((), (7, 5)), ((5,), (7, 1)), ((1, 5), (7, 1))], ids=str
)
def test_contexts_are_split_along_with_their_events(batches: tuple[tuple[int, ...], ...], chunk_size: int) -> None:
    flow = random(flows.nsf, 3, 2)
    x, context = laws.normal(*batches[0], 3).requires_grad_(), laws.normal(*batches[1], 2, seed=2).requires_grad_()
    at_once, chunked = flow.log_prob(x, context), flow.log_prob(x, context, chunk_size=chunk_size)
    with_gradients_close(chunked, at_once, [x, context])


@sizes
def test_draws_are_the_same_with_and_without_chunks(chunk_size: int) -> None:
    flow, context = random(flows.iaf, 3, 2), laws.normal(5, 2)
    wanted = same_random(lambda: flow(context).sample((4,)))
    close(same_random(lambda: flow.sample((4,), context)), wanted)
    drawn = same_random(lambda: flow.sample((4,), context, chunk_size=chunk_size))
    close(drawn, wanted)
    assert not drawn.requires_grad
    plain = random(flows.nsf, 2)
    close(same_random(lambda: plain.sample(chunk_size=chunk_size)), same_random(plain.sample))
    assert plain.sample((0,), chunk_size=chunk_size).shape == (0, 2)


def test_an_encoder_sees_each_context() -> None:
    flow = random(flows.nsf, 3, 2)
    encoded = Flow(flow.transforms, encoder=MLPEncoder(4, context_dim=2).double())
    x, context = laws.normal(9, 3), laws.normal(9, 4, seed=2)
    close(encoded.log_prob(x, context, chunk_size=2), encoded.log_prob(x, context))


@pytest.mark.parametrize("grad", [True, False])
def test_no_transform_sees_more_than_a_chunk(grad: bool) -> None:
    flow = random(flows.nsf, 2, 2)
    x, context = laws.normal(101, 2), laws.normal(101, 2, seed=2)
    with torch.set_grad_enabled(grad), batches_seen(flow) as seen:
        found = flow.log_prob(x, context, chunk_size=10)
        value, log_prob = flow.rsample_and_log_prob((3,), context, chunk_size=10)
        flow.sample((3,), context, chunk_size=10)
        if grad:
            (found.sum() + value.sum() + log_prob.sum()).backward()
    assert max(seen) == 10
    assert min(seen) >= 9, "chunks differ by one at most, so that none is so short that a compiler makes it anew"


def test_the_graph_keeps_the_inputs_of_chunks_alone() -> None:
    flow, x = random(flows.nsf, 4), laws.normal(1000, 4)
    kept = []
    for chunk_size in (100, None):
        with laws.bytes_kept() as held:
            flow.log_prob(x, chunk_size=chunk_size)
        kept.append(sum(held.values()))
    assert kept[0] < kept[1] / 20


@pytest.mark.slow
def test_compiled_flows_take_chunks_of_all_sizes() -> None:
    torch._dynamo.reset()
    flow, x = random(flows.realnvp, 3), laws.normal(103, 3)
    plain, graphs = flow.log_prob(x), counted(flow)
    for chunk_size in (10, 20, 25, 50):
        close(flow.log_prob(x, chunk_size=chunk_size), plain)
        with torch.no_grad():
            close(flow.log_prob(x, chunk_size=chunk_size), plain)
    assert graphs.number == 2, "one with gradients, one without"
    torch._dynamo.reset()


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, True, "10"])
def test_a_size_that_is_none_is_refused(chunk_size: Any) -> None:
    flow = random(flows.nsf, 2)
    for use, first in (
        (flow.log_prob, torch.zeros(5, 2).double()),
        (flow.sample, (5,)),
        (flow.rsample_and_log_prob, ()),
    ):
        with pytest.raises(ValueError, match="chunk_size must be an integer of at least 1, got"):
            use(first, chunk_size=chunk_size)


def test_a_base_with_a_batch_is_refused() -> None:
    flow = Flow(random(flows.nsf, 2).transforms, dist.Normal(torch.zeros(3, 2).double(), 1.0).to_event(1))
    assert flow.sample((5,)).shape == (5, 3, 2)
    with pytest.raises(ValueError, match=r"chunk_size needs a base without a batch, got one of \(3,\)"):
        flow.sample((5,), chunk_size=2)


def test_dequantized_images_in_chunks() -> None:
    flow = flows.realnvp_image((1, 4, 4), context_dim=2, num_blocks=1, hidden_dim=4)
    model = Dequantized(laws.randomise(flow, scale=0.1).double(), levels=5, num_samples=3)
    context = laws.normal(11, 2)
    wanted = same_random(lambda: model(context).sample((2,)))
    images = same_random(lambda: model.sample((2,), context, chunk_size=4))
    assert images.dtype == torch.uint8
    assert torch.equal(images, wanted)
    with batches_seen(flow) as seen, torch.no_grad():
        bound = model.log_prob(images, context, num_samples=200, chunk_size=4)
        assert max(seen) <= 4 * 200
    again = model.log_prob(images, context, num_samples=200)
    torch.testing.assert_close(bound, again, atol=0.5, rtol=0)  # an estimate with its own noise


# ------------------------------------------------------------------------------------------------------------- guides


def with_rows(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0, 1).expand([2]).to_event(1))
    with pyro.plate("row", len(y)):
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        pyro.sample("y", dist.Normal(mean[..., :1].sum(-1, keepdim=True), scale), obs=y)


Y = torch.linspace(-1, 1, 4)


def test_a_guide_takes_chunks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = AutoFlow(with_rows, flows.nsf).setup(Y)
    laws.randomise(guide.flow, scale=0.1)
    wanted = same_random(lambda: guide.sample(50, Y))
    log_q = guide.log_prob(wanted, Y)
    monkeypatch.setattr("pyro_flows.guides.auto.chunk_for", lambda numbers: 7)
    with batches_seen(guide.flow) as seen:
        got = same_random(lambda: guide.sample(50, Y))
        torch.testing.assert_close(guide.log_prob(got, Y), log_q, atol=1e-4, rtol=1e-4)
    assert max(seen) <= 7
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [(50,), (10, 5)])
def test_a_guide_of_rows_scores_many_in_chunks(monkeypatch: pytest.MonkeyPatch, batch: tuple[int, ...]) -> None:
    guide = AutoPlateFlow(with_rows, "row").setup(Y)
    laws.randomise(guide.posterior, scale=0.1)
    values = {name: value.reshape(*batch, *value.shape[1:]) for name, value in guide.sample(50, Y).items()}
    inputs = [parameter for parameter in guide.parameters() if parameter.requires_grad]
    wanted = guide.log_prob(values, Y)
    monkeypatch.setattr("pyro_flows.guides.blocks.chunk_for", lambda numbers: 7)
    with batches_seen(guide.posterior.blocks[0].flow) as seen:
        got = guide.log_prob(values, Y)
    assert max(seen) <= 7 * 50 / batch[0]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients(got, inputs), gradients(wanted, inputs), atol=1e-2, rtol=1e-3)
    one = {name: value[(0,) * len(batch)] for name, value in values.items()}
    torch.testing.assert_close(guide.log_prob(one, Y), wanted[(0,) * len(batch)], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="values lack the latent site 'mean'"):
        guide.log_prob({"scale": values["scale"]}, Y)


def test_chunks_of_wide_events_are_shorter() -> None:
    assert [chunk_for(numbers) for numbers in (0, 1, 10, 1000, 10**7)] == [5000, 5000, 5000, 1000, 1]
