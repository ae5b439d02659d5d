"""The main job: ``python -m pyro_flows`` prints an answer and a verdict, and writes two files.

It refuses bad options before training.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from models import with_verdict

import pyro_flows
from pyro_flows import AutoFlow, fit_svi, flows
from pyro_flows.__main__ import main
from pyro_flows.commands import RECIPES
from pyro_flows.commands import eight_schools as job
from pyro_flows.diagnostics import check, verdict
from pyro_flows.diagnostics.unreached import Missing
from pyro_flows.training import loop

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

ROWS = ["mu", "tau", *(f"theta[{school}]" for school in "ABCDEFGH")]


@pytest.fixture
def quick(monkeypatch):
    """Use short chains, no search, a fixed verdict, and only the draws that are written."""

    def coarse(*args, **_):
        return with_verdict(check(*args, num_samples=200, num_chains=16), "do not trust")

    monkeypatch.setattr(verdict, "search", lambda *_: Missing(0.0, 0.0))
    for name, number in {"ADAPT": 2, "TRIES": 1, "BLOCK": 2, "SWEEPS": 2}.items():
        monkeypatch.setattr(verdict, name, number)
    monkeypatch.setattr(job, "check", coarse)
    monkeypatch.setattr(job, "SHOWN", 4000)


def check_files(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["eight_schools.nc", "eight_schools.png"]
    data = az.from_netcdf(str(folder / "eight_schools.nc"))
    assert data.posterior["theta"].shape == (1, 4000, 8)
    assert data.observed_data["effect"].values.tolist() == [28, 8, -3, 7, -1, 1, 18, 12]
    picture = (folder / "eight_schools.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")  # the file is a complete picture


def table_of(text: str) -> dict[str, list[float]]:
    """Return the rows of the printed table: name -> mean, sd, 5 %, 95 %."""
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: [float(number) for number in row[1:]] for row in rows if row and row[0] in ROWS}


@pytest.mark.slow
def test_as_a_command(tmp_path):
    """The module runs as a command, in a separate process."""
    root = Path(pyro_flows.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "pyro_flows", "--steps", "30", "--quiet", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 3), done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    check_files(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_prints_table_diagnostics_and_verdict(tmp_path, capsys):
    assert main(["--steps", "30", "--out", str(tmp_path / "new" / "folder")]) == 3
    captured = capsys.readouterr()
    check_files(tmp_path / "new" / "folder")
    table = table_of(captured.out)
    assert list(table) == ROWS
    for mean, sd, low, high in table.values():
        assert sd > 0
        assert low < mean < high
    assert table["tau"][2] > 0
    said = " ".join(captured.out.split())  # lines break at any place
    for words in ("k-hat", "ESS", "log evidence", "nats", "time", "Do not trust these draws. ", "Try more steps"):
        assert words in said
    assert str(tmp_path / "new" / "folder" / "eight_schools.nc") in captured.out
    assert "30/30" in captured.err  # the progress bar


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_quiet_prints_nothing(tmp_path, capsys):
    assert main(["--steps", "3", "--quiet", "--out", str(tmp_path)]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    check_files(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_same_seed_gives_the_same_table(tmp_path, capsys):
    tables = []
    for seed in ("7", "7", "8"):
        assert main(["--steps", "3", "--seed", seed, "--out", str(tmp_path)]) == 3
        tables.append(table_of(capsys.readouterr().out))
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("flow", sorted(RECIPES))
def test_every_flow_runs(flow, tmp_path, capsys):
    assert main(["--flow", flow, "--steps", "3", "--out", str(tmp_path)]) == 3
    assert list(table_of(capsys.readouterr().out)) == ROWS
    check_files(tmp_path)


@pytest.mark.slow
def test_realnvp_survives_its_first_steps():
    """Eight layers of scales compound, so that full first steps of Adam would overflow float32 on the funnel."""
    guide = AutoFlow(job.eight_schools, flows.realnvp)
    data = job.EFFECTS, job.STANDARD_ERRORS
    fit = fit_svi(job.eight_schools, guide, *data, steps=150, num_particles=64, warm_start=False, progress=False)
    assert fit.skipped < 30
    assert fit.losses[-50:].nanmean() < 33  # the log evidence is -31.3


@pytest.mark.slow
@pytest.mark.parametrize(("verdict", "status"), [("trust", 0), ("reweight", 0), ("do not trust", 3)])
@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore:to_arviz")  # the fit is bad for any verdict
def test_the_verdict_is_the_exit_status(verdict, status, tmp_path, capsys, monkeypatch):
    quick = job.check
    monkeypatch.setattr(job, "check", lambda *a, **k: with_verdict(quick(*a, **k), verdict))
    assert main(["--steps", "3", "--out", str(tmp_path)]) == status
    out = capsys.readouterr().out
    assert ("Try more steps" in " ".join(out.split())) == (status == 3)  # lines are wrapped
    assert ("resampled by their weights" in out) == (verdict == "reweight")
    check_files(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_ctrl_c_writes_beside_the_old_files_and_ends_with_130(tmp_path, capsys, monkeypatch, ctrl_c):
    class Interrupting(loop.tqdm):
        def update(self, n=1):
            if self.n >= 60:
                signal.raise_signal(signal.SIGINT)
            self.n += n

    monkeypatch.setattr(loop, "tqdm", Interrupting)
    (tmp_path / "eight_schools.nc").write_text("good draws")
    with pytest.raises(SystemExit) as exit_:
        main(["--out", str(tmp_path), "--quiet"])
    assert exit_.value.code == 130
    assert "python -m pyro_flows: interrupted; wrote" in capsys.readouterr().err
    assert (tmp_path / "eight_schools.nc").read_text() == "good draws"
    kept = ["eight_schools.interrupted.nc", "eight_schools.interrupted.png", "eight_schools.nc"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


# Refused options.


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("it trained")

    monkeypatch.setattr(job, "fit_svi", refuse)


def refused(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("no_training")
def test_unknown_flow_is_refused(capsys):
    message = refused(["--flow", "glowworm"], capsys)
    assert "glowworm" in message
    assert all(name in message for name in ("iaf", "maf", "nice", "nsf", "nsf_ar", "realnvp"))


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("steps", ["0", "-3", "many"])
def test_bad_steps_are_refused(steps, capsys):
    message = refused(["--steps", steps], capsys)
    assert "--steps" in message
    assert steps in message


@pytest.mark.usefixtures("no_training")
def test_a_bad_seed_is_refused(capsys):
    assert "must be between 0 and" in refused(["--seed", "-1"], capsys)


@pytest.mark.usefixtures("no_training")
def test_a_word_that_is_no_command_is_refused(capsys):
    assert "invalid choice: 'fitt' (choose from" in refused(["fitt"], capsys)


@pytest.mark.usefixtures("no_training")
def test_options_before_a_command_are_refused(capsys):
    """Options before a command would be ignored."""
    assert "unrecognized arguments: --steps 3" in refused(["--steps", "3", "density", "table.csv"], capsys)


@pytest.mark.usefixtures("no_training")
def test_a_file_as_folder_is_refused_before_training(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("keep me")
    for out in (file, file / "below"):
        message = refused(["--out", str(out)], capsys)
        assert "--out" in message
        assert str(out) in message
    assert file.read_text() == "keep me"


@pytest.mark.usefixtures("no_training")
def test_an_unwritable_folder_is_refused_before_training(tmp_path, capsys, monkeypatch):
    """The test mocks the denied permission, because an administrator may write anywhere."""

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", denied)
    message = refused(["--out", str(tmp_path)], capsys)
    assert "Permission denied" in message
    assert str(tmp_path) in message
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_nothing_half_written_is_left_behind(tmp_path, monkeypatch):
    """If the disk fills up while the picture is written, the old files stay and no draft remains."""

    class Picture:
        def savefig(self, path, **_):
            Path(path).write_bytes(b"\x89PNG half a pic")
            raise OSError(28, "No space left on device")

    (tmp_path / "eight_schools.png").write_bytes(b"the old one")
    monkeypatch.setattr(job, "plot_funnel", lambda *_: Picture())
    with pytest.raises(OSError, match="No space left"):
        main(["--steps", "3", "--quiet", "--out", str(tmp_path)])
    assert (tmp_path / "eight_schools.png").read_bytes() == b"the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eight_schools.nc", "eight_schools.png"]
