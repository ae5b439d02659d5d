"""The main job: ``python -m pyro_flows`` prints an answer and a verdict, and writes two files.

Options stand before and after a command, and bad ones are refused before training.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import arviz as az
import pytest
from models import prior_answer

import pyro_flows
from pyro_flows import AutoFlow, fit_svi, flows
from pyro_flows.__main__ import main
from pyro_flows.commands import eight_schools as job
from pyro_flows.commands import fit

WROTE = "Wrote eight_schools.nc and eight_schools.png.\n"
ROWS = ["mu", "tau", *(f"theta[{school}]" for school in "ABCDEFGH")]


@pytest.fixture
def quick(monkeypatch):
    """Answer with draws of the prior."""
    monkeypatch.setattr(fit, "posterior", prior_answer)


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
@pytest.mark.parametrize("quiet", [True, False])
def test_as_a_command(quiet, tmp_path):
    """The module runs as a command, in a separate process."""
    root = Path(pyro_flows.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "pyro_flows", *(["--quiet"] if quiet else [])]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check_files(tmp_path)
    if quiet:
        assert (done.stdout, done.stderr) == (f"Trust these draws. {WROTE}", "")
    else:
        assert table_of(done.stdout)["mu"][0] == pytest.approx(4.4, abs=0.5)
        assert "Trust these draws." in done.stdout
        assert "posterior: check" in done.stderr


@pytest.mark.usefixtures("quick")
def test_prints_table_evidence_and_verdict(tmp_path, capsys):
    out = tmp_path / "new" / "folder" / "eight_schools.nc"
    assert main(["--out", str(out)]) == 0
    check_files(out.parent)
    said = capsys.readouterr().out
    table = table_of(said)
    assert list(table) == ROWS
    for mean, sd, low, high in table.values():
        assert sd > 0
        assert low < mean < high
    for words in ("log evidence  -31.300 ± 0.004 nats", "2.0 s (fit 1.5 s, check 0.5 s)", "Trust these draws. For a"):
        assert words in said
    assert f"Wrote {out} and {out.with_suffix('.png')}." in said


@pytest.mark.usefixtures("quick")
def test_quiet_prints_one_line_with_the_verdict_that_is_the_exit_status(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for verdict, said, status in (
        ("trust", "Trust these draws.", 0),
        ("do not trust", "Do not trust these draws. For a test.", 3),
    ):
        monkeypatch.setattr(fit, "posterior", functools.partial(prior_answer, verdict=verdict))
        assert main(["--quiet"]) == status
        assert capsys.readouterr() == (f"{said} {WROTE}", "")
        check_files(tmp_path)


@pytest.mark.usefixtures("quick")
def test_the_same_seed_gives_the_same_table(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tables = []
    for seed in ("7", "7", "8"):
        main(["--seed", seed])
        tables.append(table_of(capsys.readouterr().out))
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


@pytest.mark.slow
def test_realnvp_survives_its_first_steps():
    """Eight layers of scales compound, so that full first steps of Adam would overflow float32 on the funnel."""
    guide = AutoFlow(job.eight_schools, flows.realnvp)
    data = job.EFFECTS, job.STANDARD_ERRORS
    fit = fit_svi(job.eight_schools, guide, *data, steps=150, num_particles=64, warm_start=False, progress=False)
    assert fit.skipped < 30
    assert fit.losses[-50:].nanmean() < 33  # the log evidence is -31.3


def test_ctrl_c_writes_beside_the_old_files_and_ends_with_130(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fit, "posterior", functools.partial(prior_answer, said="interrupted"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eight_schools.nc").write_text("good draws")
    with pytest.raises(SystemExit) as exit_:
        main(["--quiet"])
    assert exit_.value.code == 130
    assert "python -m pyro_flows: interrupted; wrote" in capsys.readouterr().err
    assert (tmp_path / "eight_schools.nc").read_text() == "good draws"
    kept = ["eight_schools.interrupted.nc", "eight_schools.interrupted.png", "eight_schools.nc"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


@pytest.mark.parametrize(
    "words",
    ["--quiet --seed 3 --seconds 9 fit a:b --out x.nc", "fit a:b --quiet --out=x.nc --seed=3 --seconds=9"],
)
def test_common_options_stand_before_or_after_a_command(words, monkeypatch):
    seen = []
    monkeypatch.setattr(fit, "run", lambda wish: seen.append(wish) or True)
    assert main(words.split()) == 0
    assert (seen[0].quiet, seen[0].seed, seen[0].out, seen[0].seconds) == (True, 3, Path("x.nc"), 9.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps"], "unrecognized arguments: --steps"),
        (["--seconds", "many"], "--seconds: invalid float value: 'many'"),
        (["--seed", "-1"], "must be between 0 and"),
        (["fitt"], "invalid choice: 'fitt' (choose from"),
        (["--seconds", "3", "density", "table.csv"], "unrecognized arguments: --seconds; use --epochs"),
        (["fit", "models.py:normal", "--stps"], "unrecognized arguments: --stps"),
        (["density", "table.csv", "--flow", "glowworm"], "invalid choice: 'glowworm' (choose from"),
        (["density", "table.csv", "--seed", "many"], "--seed: invalid"),
    ],
)
def test_bad_options_are_refused(words, said, capsys, monkeypatch):
    monkeypatch.setattr(fit, "posterior", None)
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_help_tells_the_rules(capsys):
    for command, words in {
        "fit": ("FILE.py:NAME", "--data", "--seconds", "A JSON list of integers becomes real numbers too"),
        "density": ("TABLE", "--columns", "--epochs", "sylvester_flow", "rows with missing values"),
    }.items():
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for word in (*words, "--out", "--seed", "--double", "--quiet", "The exit status is 0"):
            assert word in text
