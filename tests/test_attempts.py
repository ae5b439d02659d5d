"""Files that a run writes: a path that cannot be written is an error before training, and never ends it later."""

import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_guides import simulator
from torch import Tensor, nn

from pyro_flows import AutoFlow, Fit, fit_amortized, fit_density, fit_svi, flows
from pyro_flows.encoders import MLPEncoder
from pyro_flows.objectives import Likelihood
from pyro_flows.training import Training, loop

X = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))


class At(nn.Module):
    """Likelihood with a callback at one of its calls in training."""

    def __init__(self, when: int, what: Callable[[], object]) -> None:
        super().__init__()
        self.calls, self.when, self.what = 0, when, what

    def forward(self, flow: Any, x: Tensor, context: Tensor | None) -> Tensor:
        self.calls += flow.training
        if self.calls == self.when and flow.training:
            self.what()
        return Likelihood()(flow, x, context)

    def __repr__(self) -> str:
        return "At()"


def density(file: Path | None, objective: At | None = None) -> Fit:
    """Train a flow with a state of 60 kB for eight steps."""
    torch.manual_seed(1)
    flow = flows.realnvp(2, num_transforms=2, hidden_dims=(32,))
    training = Training(objective=objective or At(0, int))
    return fit_density(flow, X, max_epochs=4, batch_size=36, training=training, checkpoint=file, progress=False)


def warned(call: Callable[[], Fit]) -> tuple[Fit, list[str]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit = call()
    return fit, [str(warning.message) for warning in seen]


@pytest.mark.usefixtures("hasty", "small_disk")
def test_a_full_disk_is_told_once_and_at_the_end_and_training_goes_on(tmp_path: Path) -> None:
    fit, said = warned(lambda: density(tmp_path / "run"))
    assert (fit.stopped, fit.steps) == ("steps", 8)
    assert torch.equal(fit.losses, density(None).losses)
    start = f"fit_density: checkpoint='{tmp_path / 'run'}' could not be written"
    assert len(said) == 2
    assert said[0].startswith(f"{start} (No space left on device). Training goes on")
    assert said[1].startswith(f"{start} at the end (No space left on device)")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("hasty")
def test_a_checkpoint_is_tried_again_and_a_run_goes_on_from_it(tmp_path: Path, small_disk: Callable[[], None]) -> None:
    """The disk is full until the sixth step, and the run is interrupted at the seventh."""
    file, whole = tmp_path / "run", density(None)

    def at_seven() -> None:
        if objective.calls == 6:
            small_disk()
            objective.when = 7
        else:
            raise SystemExit

    objective = At(6, at_seven)
    with pytest.raises(SystemExit):
        warned(lambda: density(file, objective=objective))
    again, said = warned(lambda: density(file))
    assert not said
    assert torch.equal(again.losses, whole.losses)


@pytest.mark.usefixtures("hasty")
def test_nothing_is_said_at_the_end_when_the_last_checkpoint_was_written(
    tmp_path: Path, small_disk: Callable[[], None]
) -> None:
    _, said = warned(lambda: density(tmp_path / "run", At(6, small_disk)))
    assert len(said) == 1
    assert "could not be written (No space left on device). Training goes on" in said[0]


@pytest.mark.usefixtures("hasty", "ctrl_c")
def test_an_interrupted_run_promises_no_checkpoint_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_disk: Callable[[], None]
) -> None:
    for file, promised in ((tmp_path / "run", False), (tmp_path / "room", True)):
        if promised:
            small_disk()
        fit, _ = warned(lambda file=file: density(file, At(5, lambda: signal.raise_signal(signal.SIGINT))))
        assert fit.stopped == "interrupted"
        assert ("resumes from the checkpoint" in capsys.readouterr().err) == promised


noise = simulator(lambda theta: dist.Normal(theta, 0.5).to_event(1))


@pytest.mark.usefixtures("small_disk")
def test_simulations_that_find_no_room_are_used_all_the_same(tmp_path: Path) -> None:
    guide = AutoFlow(noise, lambda n, c: flows.realnvp(n, c, num_transforms=1), encoder=MLPEncoder(2, context_dim=4))
    file = tmp_path / "run"
    settings = {"simulations": 2000, "max_epochs": 1, "checkpoint": file, "progress": False}
    fit, said = warned(lambda: fit_amortized(noise, guide, **settings))
    assert fit.stopped == "steps"
    assert f"checkpoint='{file}.simulations' could not be written (No space left on device)" in said[0]
    assert f"checkpoint='{file}' could not be written at the end" in said[-1]


def test_pictures_that_find_no_room_do_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(draft: str, *_: Any, **__: Any) -> None:
        Path(draft).write_bytes(b"half a pic")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.image.imsave", full)
    images = torch.rand(40, 1, 4, 4)
    flow, file = flows.glow((1, 4, 4), num_scales=1, num_steps=1, hidden_dim=4), tmp_path / "grid-{epoch}.png"
    fit, said = warned(lambda: fit_density(flow, images, max_epochs=2, training=Training(samples=file), progress=False))
    assert fit.stopped == "steps"
    assert [f"fit_density: samples='{file}' could not be written" in words for words in said] == [True, True]
    assert not list(tmp_path.iterdir())


def normal(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def svi(**settings: Any) -> Fit:
    return fit_svi(normal, AutoFlow(normal), torch.tensor(1.0), progress=False, **settings)


def amortized(**settings: Any) -> Fit:
    return fit_amortized(noise, AutoFlow(noise, encoder=MLPEncoder(2, context_dim=4)), progress=False, **settings)


def table(**settings: Any) -> Fit:
    return fit_density(flows.realnvp(2), X, progress=False, **settings)


CALLERS = {"fit_svi": svi, "fit_amortized": amortized, "fit_density": table}


@pytest.mark.parametrize("caller", CALLERS)
def test_names_that_are_too_long_are_refused_before_training(caller: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(loop.Descent, "fit", None)
    length = 250 if caller == "fit_amortized" else 256  # the file of simulations has a longer name
    with pytest.raises(ValueError, match=rf"^{caller}: checkpoint='.*n' cannot be written.*\(File name too long\)"):
        CALLERS[caller](checkpoint=tmp_path / ("n" * length))
    with pytest.raises(ValueError, match=rf"^{caller}: checkpoint='.*run' cannot be written.*\(there is no folder"):
        CALLERS[caller](checkpoint=tmp_path / "no" / "run")
    assert not list(tmp_path.iterdir())


def test_paths_that_are_no_files_are_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "no" / "run")
    for file, why in (
        ("/dev/null", "it is a device or a pipe"),
        (tmp_path, "it is a folder"),
        (tmp_path / "link", "there is no folder '.*no'"),
    ):
        with pytest.raises(ValueError, match=rf"checkpoint='{file}' cannot be written \({why}"):
            table(checkpoint=file)
