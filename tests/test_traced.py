"""Functions of tensors and their graphs: the same numbers, or the function as it is."""

import functools
import math
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_median
from torch import Tensor

from pyro_flows import AutoFlow, AutoStructuredFlow, check, fit_svi
from pyro_flows.bijectors import Affine
from pyro_flows.conditioners import MADE
from pyro_flows.flows import realnvp
from pyro_flows.graphs import Traced, packages
from pyro_flows.graphs.code import Code, agree
from pyro_flows.graphs.graph import Graph
from pyro_flows.graphs.recording import Recording, record
from pyro_flows.objectives import PathELBO
from pyro_flows.programs.density import Density
from pyro_flows.programs.log_density import SPARE, or_nan, standard_sizes
from pyro_flows.programs.model_and_guide import Task
from pyro_flows.transforms import Autoregressive
from pyro_flows.vjp import value_and_score

DATA = torch.linspace(-1, 2, 6)
ROWS = 5


def calls_of(traced: Traced, number: int = 5, *shape: int) -> list[tuple[Tensor, ...]]:
    """Return the results of a traced function and of the function itself, at several inputs."""
    found = []
    for _ in range(number):
        x = torch.randn(*(shape or (ROWS, 3)))
        found.append((traced(x), tuple(traced.function(x))))
    return found


def assert_same(traced: Traced, number: int = 5) -> None:
    for found, expected in calls_of(traced, number):
        assert all(map(torch.equal, found, expected))


def counted(function):
    """Return a function with a count of its runs."""

    @functools.wraps(function)
    def run(*inputs):
        run.count += 1
        return function(*inputs)

    run.count = 0
    return run


def cholesky(x: Tensor) -> tuple[Tensor]:
    return (torch.linalg.cholesky(torch.eye(3) + x[:, :, None] * x[:, None, :]),)


def in_place(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.zeros(ROWS, 3)
    y[:, 1] = x[:, 0].exp()
    z = y.view(-1)
    y += 1
    return y.sum(-1), z * 2


def score(x: Tensor) -> tuple[Tensor, Tensor]:
    with pyro.validation_enabled(False):
        return value_and_score(lambda z: dist.StudentT(4.0, z[:, 0]).log_prob(DATA[:, None]).sum(0) * z[:, 1].exp(), x)


LAYER = Autoregressive(Affine(), MADE(3, num_params=2)).requires_grad_(False)
torch.nn.init.normal_(LAYER.conditioner.output.weight)


def normalised(x: Tensor) -> Tensor:
    """Return the gradient of a layer norm's bias alone; torch's operation has none for the weight."""
    with torch.enable_grad():
        bias = torch.zeros(3, requires_grad=True)
        return torch.autograd.grad(torch.nn.functional.layer_norm(x, (3,), torch.ones(3), bias).exp().sum(), bias)[0]


SOUND = {
    "score": score,
    "cholesky": cholesky,
    "in place": in_place,
    "parts": lambda x: tuple(part * 2 for part in x.split(1, -1)),
    "one part": lambda x: tuple(part * 2 for part in x.split(3, -1)),
    "constants": lambda x: (x + DATA.exp()[:3], DATA.exp(), torch.zeros(3)),
    "its input": lambda x: (x, x, x.detach()),
    "a branch on data": lambda x: (x * 2 if bool((DATA > 0).any()) else x,),
    "a mask of data": lambda x: (x.sum(-1, keepdim=True) * DATA[DATA > 0],),
    "the data of a tensor": lambda x: ((x * 2).data * 2,),
    "tensors without numbers": lambda x: (torch.cat((x[:0, 0] * 2, torch.tensor([]), x[:, 0])),),
    "an autoregressive inverse": lambda x: LAYER.inverse_and_log_det(x.float()),
    "results that are left out": lambda x: (normalised(x),),
    "vmap": torch.func.vmap(lambda row: (row.sin() @ row,)),
}


@pytest.mark.parametrize("function", SOUND.values(), ids=SOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_graph_gives_the_same_bits(function, dtype):
    torch.set_default_dtype(dtype)
    try:
        run = counted(function)
        traced = Traced(run)
        for _ in range(8):
            x = torch.randn(ROWS, 3)
            found, expected = traced(x), function(x)
            assert all(map(torch.equal, found, expected))
    finally:
        torch.set_default_dtype(torch.float32)
    assert not traced.refusal
    assert run.count == 3  # the first time, recorded, and compared


def out_of_sight(x: Tensor) -> tuple[Tensor]:
    return (torch.from_numpy(np.exp(x.numpy())) + x,)


def writes_elsewhere(x: Tensor) -> tuple[Tensor]:
    HELD.copy_(x)
    return (HELD * 2,)


HELD = torch.zeros(ROWS, 3)


def read(function):
    """Return a function that reads its input in a way and branches on what it finds, to a rare branch."""
    return lambda x: (x * 2 if function(x) < 9 else x,)


READS = {
    "numpy": lambda x: x.detach().numpy().max(),
    "an array": lambda x: np.asarray(x).max(),
    "a shared array": lambda x: np.from_dlpack(x).max(),
    "a list": lambda x: max(x.flatten().tolist()),
    "text": lambda x: float(repr(x[0, 0]).split("(")[1].split(",")[0].rstrip(")")),
    "a tensor of a list": lambda x: torch.tensor([[x[0, 0], 1.0]]).max().item(),
    "a new tensor": lambda x: DATA.new_tensor([x[0, 0], 1.0]).max().item(),
}
UNSOUND = {
    "a number": lambda x: (x * float(x[0, 0]),),
    "a mask of values": lambda x: (x[x > 0].sum(),),
    "a shape of values": lambda x: (x.sum() + torch.nonzero(x > 0).sum(),),
    "numpy": out_of_sight,
    "shared memory": lambda x: (torch.from_numpy(x.numpy()) * 2,),
    "writes elsewhere": writes_elsewhere,
    "noise": lambda x: (x + 0 * torch.randn(3),),
    "noise that depends on values": lambda x: (torch.bernoulli(x.sigmoid() * 0),),
    **{f"a read by {name}": read(function) for name, function in READS.items()},
}


@pytest.mark.parametrize("function", UNSOUND.values(), ids=UNSOUND)
def test_what_may_differ_from_call_to_call_runs_as_it_is(function):
    traced = Traced(function)
    assert_same(traced)
    assert traced.refusal


def test_long_lists_of_operations_are_refused(monkeypatch):
    monkeypatch.setattr("pyro_flows.graphs.recording.MOST", 50)
    run = counted(lambda x: (functools.reduce(lambda y, _: y + 1, range(60), x),))
    traced = Traced(run)
    assert_same(traced)
    assert traced.refusal == "it calls more than 50 operations"
    assert run.count == 10  # half of them for comparison; none is repeated


@pytest.mark.parametrize("draws", [False, True])
def test_a_branch_that_is_rarely_taken_runs_the_function_on_the_same_draws(draws):
    def function(x: Tensor) -> tuple[Tensor]:
        y = x + torch.randn(3) if draws else x
        return (y if x[0, 0] < 9 else -y,)

    run, found = counted(function), []
    for one in (function, Traced(run, draws=draws)):
        torch.manual_seed(0)
        inputs = [torch.full((ROWS, 3), 10.0 if number in (10, 40) else 1.0) for number in range(60)]
        found.append(torch.cat([one(x)[0] for x in inputs]))
    assert torch.equal(*found)
    assert run.count == 3 + 2 + 1  # the first three, the two rare ones, and the 16th


def test_a_run_that_breaks_down_while_it_is_recorded_starts_again_with_the_same_draws():
    def function() -> tuple[Tensor]:
        x = torch.randn(())
        if x < 0:
            raise FloatingPointError
        return (x,)

    def draws_of(one) -> list[float]:
        found = []
        for _ in range(30):
            try:
                found.append(float(one()[0]))
            except FloatingPointError:
                found.append(math.inf)
        return found

    for seed in range(5):
        found = []
        for one in (function, Traced(function, draws=True)):
            torch.manual_seed(seed)
            found.append(draws_of(one))
        assert found[0] == found[1]


def test_a_truth_value_may_have_any_shape_of_one_element():
    run = counted(lambda x: (x * 2 if x.sum() < 1e9 and (x[:1, :1] < 1e9) else x,))
    traced = Traced(run)
    assert_same(traced, 8)
    assert not traced.refusal
    assert run.count == 3 + 8  # the comparisons of this test


def test_a_branch_that_is_often_taken_runs_as_it_is():
    traced = Traced(lambda x: (x if x.sum() > 0 else -x,))
    assert_same(traced, 60)
    assert "branches" in traced.refusal


def test_a_branch_that_is_taken_in_the_first_calls_alone_leaves_a_graph():
    run = counted(lambda x: (x if x[0, 0] > 0 else -x,))
    traced = Traced(run)
    for number in range(40):
        x = torch.full((ROWS, 3), -1.0 if number in (2, 4, 5, 7) else 1.0)
        assert torch.equal(traced(x)[0], torch.ones(ROWS, 3))
    assert not traced.refusal
    assert run.count == 1 + 1 + 4 + 1 + 1  # the first, the recorded, the four others, the comparison, and the 16th


def test_a_function_that_is_not_the_same_twice_is_refused():
    numbers = iter(range(100))
    traced = Traced(lambda x: (x + next(numbers),))
    assert [float(traced(torch.zeros(1))[0]) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert "other numbers" in traced.refusal


def test_a_function_that_changes_later_is_found_out():
    state = {"calls": 0}

    def function(x: Tensor) -> tuple[Tensor]:
        state["calls"] += 1
        return (x + (state["calls"] > 3),)

    traced = Traced(function)
    for _ in range(80):
        traced(torch.zeros(1))
    assert "other numbers" in traced.refusal


def test_constants_that_change_are_recorded_anew():
    data = torch.zeros(3)
    traced = Traced(lambda x: (x + data,))
    for number in range(12):
        data.fill_(number // 4)
        assert torch.equal(traced(torch.zeros(3))[0], data)
    assert not traced.refusal


def test_parameters_are_inputs():
    weight = torch.nn.Parameter(torch.ones(3))

    def loss():
        with torch.enable_grad():
            value = (weight**3).sum()
            return value.detach(), *torch.autograd.grad(value, weight)

    run = counted(loss)
    traced = Traced(run)
    for _ in range(6):
        with torch.no_grad():
            weight.add_(torch.randn(3))
        value, gradient = traced()
        assert torch.equal(gradient, 3 * weight.detach() ** 2)
        assert not value.requires_grad
    assert run.count == 3


@pytest.mark.parametrize("alias", [Tensor.detach, lambda weight: torch.from_numpy(weight.detach().numpy())])
def test_other_names_of_the_memory_of_a_parameter_change_with_it(alias):
    weight = torch.nn.Parameter(torch.ones(3))
    other = alias(weight)
    traced = Traced(lambda: ((other.norm() + weight).detach(),))
    for _ in range(6):
        weight.data.add_(1e-5)  # as fused optimisers do; less than the rounding errors that a comparison allows
        assert torch.equal(traced()[0], weight.detach().norm() + weight.detach())


def test_draws_are_those_of_the_function():
    def draw():
        kept = torch.empty(4).bernoulli_(0.5).div_(0.5)
        return kept, torch.randn(2), torch.empty(3).normal_(), torch.rand_like(DATA), torch.normal(DATA, 1.0)

    found, traced = [], Traced(draw, draws=True)
    for function in (traced, draw):
        torch.manual_seed(0)
        found.append(torch.cat([part for _ in range(6) for part in function()]))
    assert torch.equal(*found)
    assert not traced.refusal


def test_a_generator_of_its_own_advances_only_as_the_function_asks():
    found, generator = [], torch.Generator()

    def draw():
        return (torch.randn(3, generator=generator),)

    for function in (Traced(draw, draws=True), draw):
        generator.manual_seed(0)
        found.append(torch.cat([function()[0] for _ in range(6)]))
    assert torch.equal(*found)


def test_matrices_without_a_factor_have_one_of_nan():
    traced = Traced(lambda x: (torch.linalg.cholesky(x),))
    for _ in range(3):
        traced(torch.eye(2).expand(2, 2, 2))
    assert traced(torch.stack((torch.eye(2), -torch.eye(2))))[0].isnan().any(-1).any(-1).tolist() == [False, True]


def test_draws_at_which_a_model_breaks_down_are_no_part_of_a_graph():
    def density(z: Tensor) -> Tensor:
        return torch.linalg.solve(torch.diag_embed(z.exp()), torch.ones(len(z), 2, 1)).sum((-2, -1))

    traced, singular = Traced(lambda z: (or_nan(density)(z),)), torch.tensor([[0.0, 0.0], [0.0, -800.0]])
    assert [traced(singular)[0].isnan().tolist() for _ in range(3)] == [[False, True]] * 3
    for _ in range(4):
        assert traced(torch.zeros(2, 2))[0].tolist() == [2, 2]


def test_the_first_call_is_recorded_if_more_are_sure_to_follow():
    run = counted(SOUND["score"])
    traced = Traced(run, first=1)
    for _ in range(5):
        traced(torch.randn(ROWS, 3))
    assert run.count == 2  # recorded, and compared


def test_what_only_fills_memory_runs():
    traced = Traced(lambda: (torch.randn(3, out=torch.empty(3)),), draws=True)
    assert all(len(traced()[0].unique()) == 3 for _ in range(5))


def test_results_may_be_written_into():
    traced = Traced(lambda x: (torch.zeros(3), x, x, x * 2))
    for _ in range(6):
        for one in traced(torch.ones(3)):
            one.add_(7.0)
    assert [one.tolist() for one in traced(torch.ones(3))] == [[0, 0, 0], [1, 1, 1], [1, 1, 1], [2, 2, 2]]


def test_traced_functions_inside_others_keep_their_own_graphs():
    inner, other = Traced(counted(lambda x: (x.exp(),))), Traced(counted(lambda x: (x.sin(),)))
    outer = Traced(counted(lambda x: (inner(x * 2)[0] + other(x * 2)[0] * 3, x)))
    assert_same(outer, 8)
    assert not any(one.refusal for one in (inner, outer, other))
    before = inner.function.count
    outer(torch.randn(ROWS, 3))
    assert inner.function.count == before


def test_segments_that_do_the_same_have_the_same_source():
    """So programs share their compiled code, whatever comes before."""
    inner, x = Traced(lambda x: (x.exp(),)), torch.ones(3)

    def last_source(function) -> str:
        outputs, calls = record(function, [x])
        *_, (code, _, _) = Graph(Recording([x], outputs, calls))._steps
        return code._job["source"]

    one = last_source(lambda x: (inner(x)[0] * 2 + DATA[:3],))
    other = last_source(lambda x: (inner((x - 3).sin() + DATA[3:])[0] * 2 + DATA[:3],))
    assert one == other


def test_an_error_in_a_graph_ends_in_the_function(monkeypatch):
    traced = Traced(SOUND["score"])
    assert_same(traced)
    monkeypatch.setattr(Graph, "run", lambda self, inputs: 1 / 0)
    assert_same(traced)
    assert "ZeroDivisionError" in traced.refusal


def test_the_setting_turns_graphs_off():
    run = counted(SOUND["score"])
    with pyro.settings.context(pyro_flows_compile="off"):
        for _ in range(5):
            Traced(run)(torch.randn(ROWS, 3))
    assert run.count == 5
    with pytest.raises(ValueError, match="pyro_flows_compile must be one of"):
        pyro.settings.set(pyro_flows_compile="on")


def test_the_environment_sets_the_setting():
    """The tests themselves run with ``graph``, set in ``conftest.py``."""
    assert pyro.settings.get("pyro_flows_compile") == "graph"
    environment = {**os.environ, "PYRO_FLOWS_COMPILE": "sometimes"}
    done = subprocess.run([sys.executable, "-c", "import pyro_flows"], env=environment, capture_output=True, text=True)
    assert "must be one of auto, graph, off, got 'sometimes'" in done.stderr


@pytest.mark.parametrize("largest", [1, 3, 20, 300, 5000])
def test_parts_of_standard_sizes_hold_all_vectors(largest):
    seen = set()
    for number in range(1, 1200, 7):
        sizes = standard_sizes(number, largest)
        assert number <= sum(sizes) <= number + largest // SPARE
        assert max(sizes) <= largest
        seen.update(sizes)
    assert all(size & (size - 1) == 0 for size in seen)


def regression(y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(slope[0] + slope[1] * DATA.to(y), scale), obs=y)


def test_fits_and_verdicts_are_the_same_to_rounding(double):
    found = {}
    for mode in ("off", "graph"):
        with pyro.settings.context(pyro_flows_compile=mode):
            pyro.set_rng_seed(0)
            guide = AutoFlow(regression)
            fit = fit_svi(regression, guide, DATA.double() * 2, steps=30, progress=False)
            verdict = check(regression, guide, DATA.double() * 2)
            found[mode] = fit.losses, torch.tensor([fit.best_loss, verdict.khat, verdict.log_evidence])
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_the_model_is_not_called_once_its_density_is_a_graph(double):
    model = counted(regression)
    guide = AutoFlow(model).setup(DATA.double())
    space = Density(Task(model, guide, (DATA.double(),), {}))
    for _ in range(3):
        space.log_prob(torch.randn(64, 3).requires_grad_())
    before = model.count
    z = torch.randn(64, 3).requires_grad_()
    (slope,) = torch.autograd.grad(space.log_prob(z).sum(), z)
    assert model.count == before
    torch.testing.assert_close(slope, value_and_score(space._log_prob, z)[1], rtol=1e-12, atol=1e-12)


GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoStructuredFlow": AutoStructuredFlow,
    "AutoFlow of few draws": functools.partial(AutoFlow, flow=realnvp),
    "a function": lambda model: by_hand,
}


def by_hand(y):
    place = pyro.param("place", torch.zeros(2).to(y))
    spread = pyro.param("spread", torch.ones(2).to(y), constraint=dist.constraints.positive)
    pyro.sample("slope", dist.Normal(place, spread).to_event(1))
    pyro.sample("scale", dist.LogNormal(pyro.param("size", torch.zeros(()).to(y)), 0.3))


@pytest.mark.parametrize("build", GUIDES.values(), ids=GUIDES)
def test_steps_of_any_guide_are_graphs(double, build):
    losses, counts = [], []
    for mode in ("off", "graph"):
        with pyro.settings.context(pyro_flows_compile=mode):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            model = counted(regression)
            losses.append(fit_svi(model, build(model), DATA.double() * 2, steps=40, num_particles=8, progress=False))
            counts.append(model.count)
    torch.testing.assert_close(losses[1].losses, losses[0].losses, rtol=1e-10, atol=1e-10)
    assert abs(losses[1].best_loss - losses[0].best_loss) < 1e-10
    assert counts[1] <= counts[0] - 30  # all but the first steps, and comparisons


@pytest.mark.parametrize("mode", ["off", "graph"])
@pytest.mark.parametrize("number", [1, 64])
def test_hooks_of_parameters_run_once_per_step(double, mode, number):
    calls = []
    guide = AutoFlow(regression).setup(DATA.double())
    for parameter in guide.parameters():
        parameter.register_hook(lambda gradient: calls.append(None))
        break
    with pyro.settings.context(pyro_flows_compile=mode):
        fit_svi(regression, guide, DATA.double(), steps=8, num_particles=number, warm_start=False, progress=False)
    assert len(calls) == 8


def test_arguments_that_a_distribution_refuses_are_refused_in_a_graph_too(double):
    """A gamma distribution has a finite log-density at negative shapes, but it is none."""

    def model():
        shape = pyro.sample("shape", dist.Normal(1.0, 0.5))
        pyro.sample("y", dist.Gamma(shape, 1.0), obs=torch.tensor(2.0))

    fits = []
    for mode in ("off", "graph"):
        with pyro.settings.context(pyro_flows_compile=mode):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            guide = AutoNormal(model, init_loc_fn=init_to_median, init_scale=0.5)
            fits.append(fit_svi(model, guide, steps=100, num_particles=1, warm_start=False, progress=False))
    assert 0 < fits[0].skipped == fits[1].skipped
    torch.testing.assert_close(fits[1].losses, fits[0].losses, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_a_step_whose_gradient_is_a_score_runs_as_it_is():
    def model():
        pyro.sample("count", dist.Poisson(3.0))

    def guide():
        pyro.sample("count", dist.Poisson(pyro.param("rate", torch.tensor(2.0), constraint=dist.constraints.positive)))

    losses = []
    for mode in ("off", "graph"):
        with pyro.settings.context(pyro_flows_compile=mode):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            losses.append(fit_svi(model, guide, objective=PathELBO(), steps=20, progress=False).losses)
    assert torch.equal(*losses)


SOURCE = "def run(x):\n    return (aten_mul_Tensor(x, 2),)\n"


class Instant:
    """A package whose code is there at once."""

    def __init__(self, code):
        self.code, self.removed = code, False

    def load(self):
        return self.code

    def remove(self):
        self.removed = True


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_compiled_code_takes_over_if_it_agrees(monkeypatch, error):
    package = Instant(lambda given: [given[0] * 2 + error])
    monkeypatch.setattr("pyro_flows.graphs.code.Package", lambda job: package)
    monkeypatch.setattr("pyro_flows.graphs.code._timed", lambda run, given: (run(given), -run(given)[0].sum()))
    code = Code(
        SOURCE,
        {"aten_mul_Tensor": torch.ops.aten.mul.Tensor},
        [torch.ones(3)],
        1e-7,
        is_pure=True,
    )
    with pyro.settings.context(pyro_flows_compile="auto"):
        results = [code([torch.ones(3)])[0] for _ in range(3)]
    torch.testing.assert_close(results, [torch.full((3,), 2.0)] * 3, rtol=0, atol=0)
    assert package.removed == bool(error)


@pytest.fixture
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    yield tmp_path
    for worker in packages._workers:
        worker.kill()
        worker.wait()
    packages._workers.clear()


SOURCE = "def run(x):\n    return (aten_mul_Tensor(x, 2),)\n"
JOB = {
    "source": SOURCE,
    "operations": {"aten_mul_Tensor": "aten.mul.Tensor"},
    "specs": [([3], [1], "torch.float32")],
}


def test_without_a_compiler_nothing_is_asked_for(monkeypatch, own_folder):
    monkeypatch.setenv("PATH", str(own_folder))
    monkeypatch.delenv("CXX", raising=False)
    assert not packages.Package(JOB).request()
    assert not packages._workers


def test_a_folder_that_cannot_be_used_is_left_alone(monkeypatch, own_folder):
    file = own_folder / "file"
    file.touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(file))
    assert packages.folder() is None
    assert not packages.Package(JOB).request()
    assert packages.Package(JOB).load() is None
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(own_folder))
    packages.folder().chmod(0o777)
    assert packages.folder() is None  # others could write libraries


def test_a_folder_that_others_can_replace_is_left_alone(monkeypatch, own_folder):
    above = own_folder / "above"
    above.mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(above))
    above.chmod(0o777)
    assert packages.folder() is None
    above.chmod(0o1777)  # as /tmp has it: others can add to it, but not rename
    assert packages.folder() == above / "pyro_flows"
    packages.folder().rmdir()
    (own_folder / "other").mkdir()
    (above / "pyro_flows").symlink_to(own_folder / "other")
    assert packages.folder() is None


def test_a_compiler_that_failed_is_tried_again_after_a_day(monkeypatch, own_folder):
    monkeypatch.setattr(packages, "can_compile", lambda: True)
    monkeypatch.setattr(packages, "_start_worker", lambda folder: None)
    package = packages.Package(JOB)
    package._with(".failed").touch()
    assert not package.request()
    os.utime(package._with(".failed"), (time.time() - packages.RETRIED - 60,) * 2)
    assert package.request()


def test_libraries_that_were_changed_are_removed(own_folder):
    package = packages.Package(JOB)
    package._with(".done").write_text('{".so": "0123"}')
    package._with(".so").write_bytes(b"foreign")
    assert package.load() is None
    assert not package._with(".so").exists()
    package._with(".done").write_text("{")
    assert package.load() is None
    assert not package._with(".done").exists()


def test_the_least_recently_used_libraries_make_room(monkeypatch, own_folder):
    folder = packages.folder()
    for number in range(4):
        file = folder / f"{number}.so"
        file.write_bytes(bytes(1000))
        os.utime(file, (time.time() + number,) * 2)
    monkeypatch.setattr(packages, "LARGEST", 2500)
    packages._make_room(folder)
    assert {path.name for path in folder.iterdir()} == {"2.so", "3.so"}


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") and hasattr(torch._C, "_aoti")), reason="no compiler")
def test_another_process_compiles_and_the_next_one_finds_it(own_folder):
    package = packages.Package(JOB)
    assert package.load() is None
    assert package.request()
    assert packages._workers[0].wait(300) == 0
    assert package._with(".done").exists(), package._with(".failed").read_text()
    assert packages.Package(JOB).load()([torch.ones(3)])[0].tolist() == [2, 2, 2]
    traced = Traced(score)
    with pyro.settings.context(pyro_flows_compile="auto"):
        for _ in range(25):
            traced(torch.randn(ROWS, 3))
        assert packages._workers[0].wait(300) == 0
        for found, expected in calls_of(Traced(score), 5):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert math.isfinite(float(found[0].sum()))


def test_truth_values_of_compiled_code_must_be_the_same():
    numbers = torch.tensor([1.0, 2.0])
    assert agree([numbers, torch.tensor(True)], [numbers, torch.tensor(True)], 1e-16)
    assert not agree([numbers, torch.tensor(True)], [numbers, torch.tensor(False)], 1e-16)
    assert not agree([torch.tensor(1)], [torch.tensor(2)], 1.0)
