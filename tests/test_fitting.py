"""Training loop.

It reaches known evidences, trains all parameters, and survives steps that are not finite.  At the end of any run, the
parameters have their best state.
"""

import functools
import math
import re
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from grouped_options import grouped
from models import beyond, sampling
from pyro.infer import JitTrace_ELBO, RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_flows import AutoFlow, Fit, fit_svi, flows, psis
from pyro_flows.objectives import TemperedELBO
from pyro_flows.programs import Program
from pyro_flows.training import Gradients, loop
from pyro_flows.training.interrupts import hold_interrupts, uninterrupted
from pyro_flows.training.loop import Best, Descent, Settings
from pyro_flows.transforms import Elementwise

small = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(16,))
GUIDES = [functools.partial(AutoFlow, flow=small), AutoNormal]
both_guides = pytest.mark.parametrize("build", GUIDES, ids=["AutoFlow", "AutoNormal"])

Y = torch.tensor([2.0, 3.0, 2.5])


def conjugate(y):
    """mu ~ N(0, 1), y_i ~ N(mu, 1): posterior and evidence are known."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def log_evidence(y: Tensor) -> float:
    """Return the exact log evidence: y is Gaussian with covariance I + 1 1ᵀ."""
    return dist.MultivariateNormal(torch.zeros(len(y)), torch.eye(len(y)) + 1).log_prob(y).item()


def quick(*args: Any, **settings: Any) -> Fit:
    """Fit in five steps; options of gradients may be given one by one."""
    usual = {"steps": 5, "num_particles": 2, "warm_start": False, "progress": False}
    return fit_svi(*args, **{**usual, **grouped(settings, Gradients)})


# Fits that converge.


def test_record():
    guide = AutoFlow(conjugate, small)
    fit = quick(conjugate, guide, Y, steps=60, num_particles=4)
    assert fit.guide is guide
    assert (fit.losses.shape, fit.losses.dtype) == ((60,), torch.float64)
    assert fit.losses.isfinite().all()
    assert (fit.steps, fit.skipped, fit.stopped) == (60, 0, "steps")
    assert fit.best_step in (50, 60)
    assert 0 < fit.seconds < 60
    assert re.match(r"Fit\(best_loss=.*steps=60, skipped=0", repr(fit))


@pytest.mark.parametrize("objective", [None, Trace_ELBO()])
@both_guides
def test_the_best_loss_of_a_short_fit_is_that_of_the_state_that_it_kept(build, objective):
    """The mean of the running losses is nats above it, since the first steps are among them."""
    guide = build(conjugate)
    fit = fit_svi(conjugate, guide, Y + 5, steps=40, lr=0.1, warm_start=False, progress=False, objective=objective)
    losses = torch.tensor([Trace_ELBO().loss(conjugate, guide, Y + 5) for _ in range(1000)], dtype=torch.float64)
    # At least 10 losses, each of at least one draw, make up the best loss.
    assert abs(fit.best_loss - losses.mean()) < 4 * losses.std() * (1 / 10 + 1 / 1000) ** 0.5
    assert fit.losses.mean() - losses.mean() > 5


@pytest.mark.slow
@pytest.mark.parametrize("build", [*GUIDES, AutoMultivariateNormal])
def test_conjugate_model_reaches_its_evidence(build):
    """Each of these guides can represent the Gaussian posterior, so the ELBO equals the evidence."""
    guide = build(conjugate)
    fit = quick(conjugate, guide, Y, steps=450, lr=0.03, num_particles=16)
    weights = psis(conjugate, guide, Y, num_samples=2000).log_weights.double()
    gap = log_evidence(Y) - weights.mean().item()
    # The gap is the divergence of the guide from the posterior; only noise can make it negative.
    error = weights.std().item() / math.sqrt(2000)
    assert -4 * error - 1e-5 < gap < 0.02 + 4 * error
    # The recorded loss is the mean of at least ten losses at the end.
    spread = fit.losses[-50:].std().item() / math.sqrt(10)
    assert abs(fit.best_loss + log_evidence(Y)) < 0.03 + 4 * spread


def test_progress_bar_shows_loss_and_is_silent_on_request(capsys):
    quick(conjugate, AutoFlow(conjugate, small), Y, steps=50, progress=True)
    assert re.search("50/50.*loss", capsys.readouterr().err)
    quick(conjugate, AutoFlow(conjugate, small), Y)
    captured = capsys.readouterr()
    assert "/5" not in captured.err
    assert not captured.out


@pytest.mark.slow
def test_trains_parameters_of_the_model():
    """y_i ~ N(theta + z, 1) with z ~ N(0, 1): the marginal likelihood is highest at the mean of y."""

    def model(y):
        theta = pyro.param("theta", torch.tensor(0.0))
        noise = pyro.param("noise", torch.tensor(3.0), constraint=dist.constraints.positive)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(theta + z, noise), obs=y)

    fit = quick(model, AutoFlow(model, small), Y, steps=500, lr=0.03, num_particles=32)
    assert fit.losses[-50:].mean() < fit.losses[:10].mean()
    assert pyro.param("theta").item() == pytest.approx(2.5, abs=0.1)
    # Variance of the residuals with two degrees of freedom; z takes the third.
    assert pyro.param("noise").item() == pytest.approx(Y.var().sqrt().item(), abs=0.1)


def test_trains_modules_of_the_model():
    net = torch.nn.Linear(1, 1)

    def model(y):
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(net(torch.ones(1)) + z, 1.0), obs=y)

    before = net.bias.item()
    quick(model, AutoFlow(model, small), Y)
    assert net.bias.item() != before


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        TraceMeanField_ELBO(num_particles=4),
        RenyiELBO(alpha=0.5, num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        JitTrace_ELBO(num_particles=4, ignore_jit_warnings=True),
        ReweightedWakeSleep(num_particles=16, vectorize_particles=True, max_plate_nesting=1),
    ],
    ids=lambda objective: type(objective).__name__,
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_other_objectives(objective):
    guide = AutoNormal(conjugate)
    fit = fit_svi(conjugate, guide, Y, steps=200, lr=0.05, objective=objective, progress=False)
    assert fit.losses[-20:].mean() < fit.losses[:5].mean()
    assert guide.median()["mu"].item() == pytest.approx(7.5 / 4, abs=0.5)


def test_keyword_arguments_reach_the_model():
    seen = []

    def model(y, scale=None, steps=None):
        seen.append((scale, steps))
        conjugate(y)

    program = Program(model, kwargs={"steps": "the model's own"})
    fit = quick(program, AutoFlow(program, small), Y, scale=2.0)
    assert (fit.steps, set(seen)) == (5, {(2.0, "the model's own")})


def test_a_breakdown_at_the_very_first_loss_ends_no_fit():
    guide = AutoFlow(conjugate, small).setup(Y)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True)
    whole, broken = elbo.differentiable_loss, []

    def loss(*args, **kwargs):
        if not broken:
            broken.append(True)
            raise torch.linalg.LinAlgError("the input is not positive-definite")
        return whole(*args, **kwargs)

    elbo.differentiable_loss = loss
    fit = quick(conjugate, guide, Y, objective=elbo)
    assert (broken, fit.skipped) == ([True], 0)


@both_guides
def test_module_local_params_make_no_difference(build):
    losses = []
    for local in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        with pyro.settings.context(module_local_params=local):
            fit = quick(conjugate, build(conjugate), Y, steps=20, lr=0.05, num_particles=16)
        losses.append(fit.losses)
    assert torch.equal(*losses)
    assert losses[0][-5:].mean() < losses[0][0]


# The best state.


def run(loss, parameters, *, steps=100, clip_norm=10.0) -> Fit:
    optimizers = [torch.optim.Adam(parameters)]
    settings = Settings("fit_svi", steps, 0.1, clip_norm, "skip", progress=False, window=10)
    return Descent(loss, parameters, optimizers, settings, None, lambda: "the diagnosis").fit()


class Bowl:
    """The loss (x - 1)² until step ``turn``, and ``after`` from then on."""

    def __init__(self, after, turn: int) -> None:
        self.x, self.after, self.turn, self.seen = torch.zeros((), requires_grad=True), after, turn, []

    def __call__(self) -> Tensor:
        self.seen.append(self.x.item())
        return self.after(self.x) if len(self.seen) >= self.turn else (self.x - 1) ** 2


def test_a_loss_that_blows_up_is_undone():
    bowl = Bowl(lambda x: 1000 - 100 * x, turn=51)  # from here on, the gradient moves x away
    fit = run(bowl, [bowl.x])
    assert abs(bowl.seen[-1] - 1) > 1  # x has diverged
    assert 20 <= fit.best_step <= 50
    assert bowl.x.item() == bowl.seen[fit.best_step]  # the next step starts from the state that this step left
    assert bowl.x.item() == pytest.approx(1, abs=0.1)
    assert fit.best_loss == pytest.approx(fit.losses[fit.best_step - 10 : fit.best_step].mean().item())


def test_step_size_falls_to_zero_along_a_cosine():
    x = torch.zeros((), requires_grad=True)
    seen = []

    def slope() -> Tensor:  # with a constant gradient, Adam's steps equal the step size
        seen.append(x.item())
        return -x

    run(slope, [x])
    moves = torch.tensor([*seen, x.item()]).diff()
    expected = 0.05 * (1 + torch.cos(math.pi * torch.arange(100) / 100))
    torch.testing.assert_close(moves[50:], expected[50:], rtol=1e-3, atol=1e-5)
    assert (moves[:50] <= expected[:50] + 1e-5).all()  # warm-up may shorten the first steps


def test_gradients_are_clipped():
    x = torch.zeros(2, requires_grad=True)
    run(lambda: 1e6 * x.sum(), [x], steps=1, clip_norm=5.0)
    assert x.grad.norm().item() == pytest.approx(5.0, rel=1e-4)


# Steps that are not finite.


def test_nonfinite_steps_are_skipped_and_counted():
    calls = []
    x = torch.zeros((), requires_grad=True)

    def loss() -> Tensor:
        calls.append(x.item())
        return (x - 1) ** 2 * (math.nan if len(calls) % 4 == 0 else 1.0)

    fit = run(loss, [x], steps=200)
    assert (fit.steps, fit.skipped) == (200, 50)
    assert torch.equal(fit.losses.isnan(), torch.arange(1, 201) % 4 == 0)
    assert calls[3] == calls[4]  # the fourth step changed nothing
    assert x.item() == pytest.approx(1, abs=0.01)
    assert math.isfinite(fit.best_loss)


def test_nonfinite_gradient_of_a_finite_loss_is_skipped():
    x = torch.zeros((), requires_grad=True)
    fit = run(lambda: x.sqrt() + 1, [x], steps=5)  # the gradient at zero is infinite
    assert (fit.skipped, x.item()) == (5, 0)


def poisoned(after: int):
    """Return the conjugate model with a site "wall" that is NaN after some calls, and the list of its calls."""
    calls = []

    def model(y):
        calls.append(0)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        pyro.factor("wall", mu * (math.nan if len(calls) > after else 0.0))

    return model, calls


@pytest.mark.usefixtures("every_call")
@pytest.mark.slow
@both_guides
def test_many_nonfinite_steps_in_a_row_name_the_site(build):
    model, _ = poisoned(after=30)
    message = r"at step 1\d\d and at the 99 before: .*'wall'.*smaller lr \(now 0.01"
    with pytest.raises(FloatingPointError, match=message):
        quick(model, build(conjugate), Y, steps=300, lr=0.01)


@pytest.mark.usefixtures("every_call")
@both_guides
def test_on_nonfinite_raise_stops_at_the_first(build):
    model, calls = poisoned(after=30)
    with pytest.raises(FloatingPointError, match=r"at step \d+: .*'wall'"):
        quick(model, build(conjugate), Y, steps=300, on_nonfinite="raise")
    assert len(calls) < 60


def test_many_skipped_steps_are_told():
    model = beyond(-2.0)
    with pytest.warns(UserWarning, match=r"\d+ of 60 steps were skipped.*'wall' has a log-density of -inf"):
        fit_svi(model, AutoNormal(model, init_scale=1.0), steps=60, lr=1e-4, progress=False)


@pytest.mark.usefixtures("every_call")
def test_a_fit_that_ends_without_a_finite_loss_says_so():
    model, _ = poisoned(after=100)
    with pytest.warns(UserWarning, match=r"\d+ of 120 steps .*; the last \d+ among them: the model's site 'wall'"):
        fit_svi(model, AutoNormal(model), Y, steps=120, num_particles=1, progress=False)


def test_a_hard_edge_in_the_likelihood_points_to_the_door():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("wall", dist.Delta(y, log_density=torch.where(mu > y, -math.inf, 0.0)), obs=y)

    with pytest.raises(FloatingPointError, match=r"'wall' has a log-density of -inf .*hard edge.*pf.posterior"):
        quick(model, AutoFlow(model, flow=small), torch.tensor(0.05), steps=150, num_particles=32)


@pytest.mark.usefixtures("every_call")
def test_a_draw_that_a_distribution_refuses_counts_as_nonfinite():
    """Pyro's validation raises an error for negative scales; it counts as a bad step, and training continues."""
    calls = []

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        calls.append(0)
        scale = torch.where(torch.tensor((len(calls) + 1) % 5 == 0), -1.0, 1.0)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    fit = fit_svi(model, AutoNormal(conjugate), Y, steps=40, progress=False)
    assert (fit.skipped, fit.losses.isfinite().sum()) == (8, 32)


# Errors and interrupts that end a run.


def in_use(guide) -> list[Tensor]:
    """Return the parameters in the guide's units; ``fit_svi`` stores tables in other units during training."""
    tables = [part for part in guide.modules() if isinstance(part, Elementwise)]
    units = {id(parameter): part.unit for part in tables for parameter in part.parameters()}
    return [units.get(id(parameter), 1.0) * parameter.detach() for parameter in guide.parameters()]


def ending(error: BaseException, after: int, watch=lambda: None):
    """Conjugate model that raises at a call, and keeps the values of ``watch`` at each call in ``seen``."""
    seen = []

    def model(y):
        seen.append(watch())
        if len(seen) == after:
            raise error
        conjugate(y)

    return model, seen


@pytest.mark.usefixtures("every_call")
@both_guides
def test_interrupt_keeps_the_best_state(build, capsys):
    guide = build(conjugate)
    guide(Y)
    state = functools.partial(in_use, guide)
    model, seen = ending(KeyboardInterrupt(), 66, state)
    fit = quick(model, guide, Y, steps=500, lr=0.03)
    assert (fit.stopped, fit.best_step) == ("interrupted", 50)
    assert 50 < fit.steps == len(fit.losses) < 60
    assert f"Interrupted after {fit.steps} steps; kept the best state, of step 50" in capsys.readouterr().err
    # The last call belongs to step fit.steps + 1; the call of step 51 saw the state after step 50.
    best = seen[51 - (fit.steps + 1) - 1]
    assert all(torch.equal(kept, then) for kept, then in zip(state(), best, strict=True))
    assert not all(torch.equal(kept, then) for kept, then in zip(state(), seen[-1], strict=True))


@pytest.mark.usefixtures("every_call")
def test_interrupt_counts_the_steps_since_the_last_window():
    guide = AutoFlow(conjugate, small).setup(Y)
    model, seen = ending(KeyboardInterrupt(), 44, functools.partial(in_use, guide))
    fit = quick(model, guide, Y, steps=500, lr=0.03)
    assert fit.stopped == "interrupted"
    assert fit.best_step == fit.steps < 40
    assert all(torch.equal(kept, then) for kept, then in zip(in_use(guide), seen[-1], strict=True))


@pytest.mark.usefixtures("every_call")
def test_interrupt_at_once_keeps_the_start(capsys):
    guide = AutoFlow(conjugate, small).setup(Y)
    start = [parameter.detach().clone() for parameter in guide.parameters()]
    model, _ = ending(KeyboardInterrupt(), 16)
    fit = quick(model, guide, Y, steps=500)
    assert (fit.stopped, fit.best_step) == ("interrupted", 0)
    assert all(map(torch.equal, start, guide.parameters()))
    assert "kept the state at the start" in capsys.readouterr().err


def test_any_other_error_leaves_the_best_state():
    bowl = Bowl(lambda x: 1 / 0, turn=38)
    with pytest.raises(ZeroDivisionError):
        run(bowl, [bowl.x])
    assert bowl.x.item() == bowl.seen[30]
    assert bowl.x.item() != bowl.seen[37]


@pytest.mark.usefixtures("every_call")
def test_an_error_of_the_model_is_not_swallowed():
    model, _ = ending(ValueError("out of cheese"), 20)
    with pytest.raises(ValueError, match="out of cheese"):
        fit_svi(model, AutoNormal(conjugate), Y, steps=100, progress=False)


# Checkpoints.


@pytest.mark.usefixtures("ctrl_c", "every_call")
def test_a_second_ctrl_c_does_not_wait(capsys):
    def model(y):
        for _ in range(2 * (len(calls) == 30)):
            signal.raise_signal(signal.SIGINT)
        calls.append(0)
        conjugate(y)

    calls = []
    fit = quick(model, AutoFlow(conjugate, small), Y, steps=100)
    assert (fit.stopped, len(calls)) == ("interrupted", 30)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_that_somebody_else_listens_to_is_left_to_them():
    def model(y):
        signal.raise_signal(signal.SIGINT)
        conjugate(y)

    heard = []
    signal.signal(signal.SIGINT, lambda *_: heard.append(0))
    assert quick(model, AutoNormal(conjugate), Y).stopped == "steps"
    assert heard


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_the_end_of_an_import():
    def press(done: list[str]) -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("import")

    done = []
    with pytest.raises(KeyboardInterrupt):
        press(done)
    assert done
    with hold_interrupts() as asked, uninterrupted():
        signal.raise_signal(signal.SIGINT)
    assert asked()


@pytest.mark.parametrize(
    "content", [b"", b"keep me", b"PK\x03\x04", {"weight": torch.zeros(2)}, 5, torch.zeros(2)], ids=type
)
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    file = tmp_path / "run"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=r"fit_svi: checkpoint='.*/run' is not a checkpoint .*remove this one"):
        quick(conjugate, AutoFlow(conjugate, small), Y, checkpoint=file)
    assert file.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 6}, r"\(steps=5 and not 6\).*remove this one"),
        ({"lr": 0.2}, "lr=0.01 and not 0.2"),
        ({"clip_norm": 1.0}, "clip_norm=100.0 and not 1.0"),
        ({"num_particles": 3}, "num_particles=2 and not 3"),
        ({"objective": Trace_ELBO(2, vectorize_particles=True)}, "objective='PathELBO' and not 'Trace_ELBO'"),
        ({"y": -Y}, "data=.* and not "),
        ({"guide": AutoNormal(conjugate), "warm_start": None}, ""),
        ({"guide": AutoFlow(conjugate, functools.partial(small, num_transforms=3))}, "shapes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused(change, words, tmp_path):
    def again(y=Y, guide=None, **settings):
        return quick(conjugate, guide or AutoFlow(conjugate, small), y, checkpoint=tmp_path / "run", **settings)

    again(lr=np.float64(0.01))  # a number of numpy leaves the file readable
    again()
    with pytest.raises(ValueError, match=rf"checkpoint='.*/run' is of another run .*{words}"):
        again(**change)


def test_a_checkpoint_of_another_version_is_refused_as_such(tmp_path):
    quick(conjugate, AutoFlow(conjugate, small), Y, checkpoint=tmp_path / "run")
    torch.save(torch.load(tmp_path / "run", weights_only=True) | {"format": 4}, tmp_path / "run")
    with pytest.raises(ValueError, match=r"was written by another version of pyro_flows\. Resume it with that version"):
        quick(conjugate, AutoFlow(conjugate, small), Y, checkpoint=tmp_path / "run")


def near(y):
    """Model with a Gaussian posterior, for which a part of the usual steps suffices."""
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def curved(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Normal(x**2, 0.3))


def tuned(y):
    """Model with a near-Gaussian posterior at any value of the parameter theta."""
    theta = pyro.param("theta", torch.tensor(0.0))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(theta + z, 1.0), obs=y[0])


@pytest.fixture
def begun(monkeypatch) -> list[Descent]:
    """Return the list of runs, each of which ends with a checkpoint before its first step."""
    runs = []

    def stop(descent):
        runs.append(descent)
        descent.checkpoint.save(descent.state_dict())
        return SimpleNamespace(steps=descent.settings.steps, stopped="interrupted")

    monkeypatch.setattr(loop.Descent, "fit", stop)
    return runs


@pytest.mark.parametrize(("model", "steps"), [(near, 80), (curved, 400), (tuned, 1000)])
def test_few_steps_where_the_gaussian_is_near_also_when_resumed(model, steps, tmp_path, begun):
    for _ in range(2):
        fit_svi(model, AutoFlow(model, small), Y, progress=False, checkpoint=tmp_path / "run")
    assert [run.settings.steps for run in begun] == [steps, steps]


def test_steps_that_are_asked_for_take_as_many_draws_when_resumed(tmp_path, begun):
    """An explicit number of steps does not imply a Gaussian posterior, even if it equals the default for one."""
    for _ in range(2):
        fit_svi(curved, AutoFlow(curved, small), Y, steps=100, progress=False, checkpoint=tmp_path / "run")
    assert [run.companions[0].num_particles for run in begun] == [256, 256]


# Arguments.


WRONG = {"steps": [0, 1.5, True], "num_particles": [0], "lr": [-1.0, math.inf], "clip_norm": [math.nan, 0.0]}


@pytest.mark.parametrize(("argument", "values"), {**WRONG, "on_nonfinite": ["x"]}.items())
def test_bad_arguments_are_named(argument, values):
    for value in values:
        with pytest.raises(ValueError, match=f": {argument} must .*got {value!r}"):
            quick(conjugate, AutoFlow(conjugate, small), Y, **{argument: value})


def test_an_annealed_objective_sets_the_number_of_steps():
    fit = fit_svi(conjugate, AutoFlow(conjugate, small), Y, objective=TemperedELBO(7, num_particles=4), progress=False)
    assert fit.steps == 7
    with pytest.raises(ValueError, match="steps=5 end before the num_steps=7"):
        quick(conjugate, AutoFlow(conjugate, small), Y, objective=TemperedELBO(7, num_particles=4))


def test_a_single_step_is_kept():
    guide = AutoFlow(conjugate, small).setup(Y)
    start = [parameter.detach().clone() for parameter in guide.parameters()]
    fit = quick(conjugate, guide, Y, steps=1)
    assert fit.best_step == 1
    assert math.isfinite(fit.best_loss)
    assert not all(map(torch.equal, start, guide.parameters()))


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="neither the guide nor the model has parameters to train"):
        quick(conjugate, sampling(mu=dist.Normal(2.0, 0.5)), Y)


def test_a_diverged_state_is_not_kept_for_its_own_noise():
    """One exploding loss raises the standard error of its window, which must not make the window acceptable."""
    parameter = torch.zeros(())
    best = Best([parameter])
    best.offer([1.0, 1.1] * 25, 50)
    parameter.fill_(1e9)
    best.offer([1.0] * 49 + [1e8], 100)
    best.restore()
    assert (parameter, best.step) == (0, 50)


def test_a_point_guide_can_be_fitted():
    """psis rejects point guides, but training one is valid: it is maximum a posteriori."""
    fit = fit_svi(conjugate, AutoDelta(conjugate), Y, steps=20, progress=False)
    assert fit.losses.isfinite().all()
