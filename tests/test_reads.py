"""Reads of numbers of tensors by Python, for each of which a GPU waits: their number in steps of fits and in draws."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_flows import AutoFlow, AutoPlateFlow, AutoStructuredFlow, fit_amortized, fit_density, fit_svi, flows
from pyro_flows.encoders import Arguments, MLPEncoder
from pyro_flows.graphs.recording import TO_PYTHON, Call
from pyro_flows.objectives.plain import PlainELBO
from pyro_flows.programs.plate_rows import Shuffled
from pyro_flows.training.loop import Descent

MOST = 3  # loss and gradient are read together, the truth values of a graph together, and one more may be needed
SETTLED = range(17, 24)  # steps from a graph that are not compared with the model
Y = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


class Reads(TorchDispatchMode):
    """Counter of reads; the step counts of Adam, which are on the CPU always, do not count."""

    def __init__(self, ignored: set[int] = frozenset()) -> None:
        super().__init__()
        self.count, self.ignored = 0, ignored

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = Call(func, args, kwargs or {}, None).read
        self.count += any(id(tensor) not in self.ignored for tensor in read)
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counter of reads into lists and arrays, which are no operations."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in TO_PYTHON
        return func(*args, **(kwargs or {}))


def reads_of(run, ignored: set[int] = frozenset()) -> int:
    with Reads(ignored) as reads, Lists() as lists:
        run()
    return reads.count + lists.count


def model(y, size=None):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(())))
    with pyro.plate("group", len(y), subsample_size=size) as rows:
        level = pyro.sample("level", dist.Normal(mean, scale))
        pyro.sample("y", dist.Normal(level[..., None], 1.0).to_event(1), obs=y[rows])


def simulator(x=None):
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)


def encoded(model):
    return AutoPlateFlow(model, "group", encoder=Arguments(MLPEncoder(3, context_dim=4), 0))


def learned(model):
    return AutoPlateFlow(model, "group")


def svi(build, *args):
    return fit_svi(model, build(model), *args, steps=24, progress=False)


FITS = {
    "AutoFlow": lambda: svi(AutoFlow, Y[:8]),
    "AutoStructuredFlow": lambda: svi(AutoStructuredFlow, Y[:8]),
    "AutoPlateFlow": lambda: svi(learned, Y[:8]),
    "AutoPlateFlow, encoded": lambda: svi(encoded, Y[:8]),
    "AutoPlateFlow, minibatches": lambda: svi(learned, Y, 5),
    "AutoPlateFlow, encoded minibatches": lambda: svi(encoded, Y, 5),
    "fit_amortized": lambda: fit_amortized(
        simulator, AutoFlow(simulator, encoder=MLPEncoder(2, context_dim=4)), simulations=400, batch_size=30,
        max_epochs=2, progress=False,
    ),
    "fit_density": lambda: fit_density(flows.nsf(2), torch.randn(800, 2), batch_size=30, max_epochs=1, progress=False),
}  # fmt: skip


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Return the numbers of reads in the steps of a fit."""
    counts, step = [], Descent._take_step

    def counted(self, asked):
        steps = {id(state["step"]) for one in self.optimizers for state in one.state.values() if "step" in state}
        results = []
        counts.append(reads_of(lambda: results.append(step(self, asked)), steps))
        return results[0]

    monkeypatch.setattr(Descent, "_take_step", counted)
    return counts


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_a_step_reads_few_numbers(reads, fit):
    fit()
    assert max(reads[number - 1] for number in SETTLED) <= MOST


@pytest.mark.parametrize("fit", [FITS[name] for name in ("AutoFlow", "fit_amortized", "fit_density")])
def test_a_step_without_checks_of_a_program_reads_few_numbers_without_graphs(reads, fit):
    with pyro.settings.context(pyro_flows_compile="off"):
        fit()
    assert max(reads[10:]) <= MOST


def test_draws_of_a_joint_guide_read_few_numbers():
    guide = AutoFlow(model).setup(Y[:8])
    assert reads_of(lambda: guide.sample(1000, Y[:8])) == 0
    amortised = AutoFlow(simulator, encoder=MLPEncoder(2, context_dim=4)).setup(torch.zeros(2))
    # The model may have other supports, and the context and the draws are checked: one each, and one for the start.
    assert reads_of(lambda: amortised.sample(1000, torch.zeros(2))) <= 4


def test_minibatches_of_two_plates_are_inputs_of_a_graph():
    def ratings(r):
        users, items = pyro.plate("users", 12, 4, dim=-2), pyro.plate("items", 10, 5, dim=-1)
        with users:
            kind = pyro.sample("kind", dist.Normal(0.0, 1.0))
        with items:
            good = pyro.sample("good", dist.Normal(0.0, 1.0))
        with users as u, items as i:
            runs.append(None)
            pyro.sample("r", dist.Normal(kind + good, 1.0), obs=r[u][:, i])

    losses, counts = [], []
    for mode in ("off", "graph"):
        with pyro.settings.context(pyro_flows_compile=mode):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            runs = []
            guide = AutoStructuredFlow(ratings)
            losses.append(fit_svi(ratings, guide, Y[:12, :1] + Y[:10, 1], steps=60, warm_start=False, progress=False))
            counts.append(len(runs))
    assert torch.equal(losses[0].losses, losses[1].losses)
    assert counts[1] <= counts[0] - 50  # all but the first steps, and comparisons


@pytest.mark.parametrize("build", [learned, encoded])
def test_minibatches_of_a_graph_are_those_of_the_program(build):
    """In another order of rows, or with the same rows in each step, the losses would differ."""
    losses, seen = [], []

    def watched(y, size):
        seen.append(len(seen))
        return model(y, size)

    for mode in ("off", "graph"):
        with pyro.settings.context(pyro_flows_compile=mode):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            seen.append(0)
            guide = build(watched)
            losses.append(fit_svi(watched, guide, Y, 5, steps=70, progress=False).losses)
            assert guide.minibatches[0].held is None
    assert torch.equal(*losses)


def test_a_shuffle_goes_on_where_its_buffers_say():
    shuffled = Shuffled()
    first = [shuffled.next(12, 4) for _ in range(2)]
    kept = {name: value.clone() for name, value in shuffled.named_buffers()}
    third = shuffled.next(12, 4)
    assert sorted(torch.cat([*first, third]).tolist()) == [*range(12)]
    shuffled.place.copy_(kept["place"])
    assert torch.equal(shuffled.next(12, 4), third)
    with torch.inference_mode():
        made = Shuffled()
        assert sorted(torch.cat([made.next(8, 4), made.next(8, 4)]).tolist()) == [*range(8)]


@pytest.mark.parametrize("vectorized", [False, True])
def test_the_plain_elbo_is_that_of_pyro(vectorized):
    guide, found = AutoFlow(model).setup(Y[:8]), []
    for kind in (Trace_ELBO, PlainELBO):
        pyro.set_rng_seed(0)
        loss = kind(3, max_plate_nesting=1, vectorize_particles=vectorized).differentiable_loss(model, guide, Y[:8])
        gradients = torch.autograd.grad(loss, list(guide.parameters()), allow_unused=True)
        found.append([loss, *(one for one in gradients if one is not None)])
    for mine, pyros in zip(*found, strict=True):
        torch.testing.assert_close(mine, pyros)
