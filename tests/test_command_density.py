"""The command ``density``: it fits a flow to a user's table, and reports invalid input in one line."""

import csv
import functools
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
from models import silent

import pyro_flows
from pyro_flows.__main__ import main
from pyro_flows.commands import Refused, density
from pyro_flows.commands.density import DENSITIES, gaussian_of, report
from pyro_flows.commands.table_file import read_table_file, split_names
from pyro_flows.fitting import fit_density

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((120, 2))
X[:, 1] += X[:, 0] ** 2


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a working folder, with a table of 120 rows and two columns, ``a`` and ``b``."""
    monkeypatch.chdir(tmp_path)
    write("table.csv", ["a", "b"], X)
    return tmp_path


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("it trained")

    monkeypatch.setattr(density, "fit_density", refuse)


def write(name: str, names: list[str], rows: object) -> None:
    """Write a table as CSV."""
    with open(name, "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def run(*words: str, epochs: int = 2) -> int:
    """Return the exit status of a short run."""
    return main(["density", *words, "--epochs", str(epochs)])


def interrupted(capsys, *words: str, epochs: int = 2) -> tuple[str, str]:
    """Return what an interrupted run prints to the two streams."""
    with pytest.raises(SystemExit) as exit_:
        run("table.csv", *words, epochs=epochs)
    assert exit_.value.code == 130
    return capsys.readouterr()


def said(capsys) -> str:
    """Return the printed text as one line."""
    return " ".join(capsys.readouterr().out.split())


refused = functools.partial(command_line.refused, "density")


def nats(out: str) -> dict[str, list[float]]:
    """Return the rows of the printed table: train, validation, test, and two standard errors of test."""
    rows = [line.replace("±", "").split() for line in out.splitlines()]
    rows = [row for row in rows if len(row) == 5 and row[0] in ("Gaussian", "nsf")]
    return {row[0]: [float(word) for word in row[1:]] for row in rows}


# Valid input.


@pytest.mark.slow
def test_prints_nats_beside_a_gaussian_and_writes_both_files(folder, capsys):
    assert run("table.csv", "--out", "new/folder/bend.pt", epochs=30) == 0
    captured = capsys.readouterr()
    assert sorted(path.name for path in (folder / "new" / "folder").iterdir()) == ["bend.png", "bend.pt"]
    picture = (folder / "new" / "folder" / "bend.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")  # a complete image
    table = nats(captured.out)
    assert list(table) == ["Gaussian", "nsf"]
    assert table["nsf"][0] > table["Gaussian"][0] + 0.1  # certain on the training rows only
    # The file contains the flow with the printed nats: 96, 12 and 12 rows.
    flow = pyro_flows.load("new/folder/bend.pt")
    total = flow.log_prob(torch.from_numpy(X).float()).sum().item()
    assert total / 12 == pytest.approx(8 * table["nsf"][0] + table["nsf"][1] + table["nsf"][2], abs=0.01)
    out = " ".join(captured.out.split())
    for words in (
        "Columns: 'a', 'b'. Rows: 120 (96 to train on, 12 to validate, 12 to test).",
        "nats per row over the Gaussian",
        "time",
        "for rows x of float32 with the columns in the order above: flow = pyro_flows.load('new/folder/bend.pt');",
        f"Wrote {Path('new/folder/bend.pt')} and {Path('new/folder/bend.png')}.",
        "epochs",
    ):
        assert words in out
    assert "nats]" in captured.err  # the progress bar
    assert "noise" not in out


def test_the_line_of_python_runs(folder, capsys):
    assert run("table.csv") in (0, 3)
    line = capsys.readouterr().out.splitlines()[-1].strip()
    exec(line, {"pyro_flows": pyro_flows, "x": torch.zeros(3, 2)})


@pytest.mark.parametrize("flow", sorted(DENSITIES))
def test_every_flow_runs(flow, folder, monkeypatch):
    monkeypatch.setattr(density, "SAMPLES", 50)
    assert run("table.csv", "--flow", flow, "--quiet", epochs=1) in (0, 3)
    assert pyro_flows.load("model.pt").log_prob(torch.zeros(2)).isfinite()


def test_the_same_seed_gives_the_same_table(folder, capsys):
    tables = []
    for seed in ("7", "7", "8"):
        run("table.csv", "--seed", seed)
        tables.append(nats(capsys.readouterr().out))
    assert tables[0] == tables[1]
    assert tables[0]["Gaussian"][0] != tables[2]["Gaussian"][0]  # other rows


def test_double_calculates_in_float64_and_leaves_no_trace(folder, capsys):
    assert run("table.csv", "--double") in (0, 3)
    assert pyro_flows.load("model.pt")().sample().dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    assert "rows x of float64" in said(capsys)


def test_integers_get_noise(folder, capsys, monkeypatch):
    """Training, the Gaussian and the nats use noise: a Gaussian of 0 and 1 without noise has more nats."""
    asked = []
    monkeypatch.setattr(density, "fit_density", lambda *a, **k: asked.append(k["discrete"]) or fit_density(*a, **k))
    flips = RANDOM.integers(0, 2, 4000)
    write("table.csv", ["a", "flip"], zip(RANDOM.standard_normal(4000), flips, strict=True))
    assert run("table.csv", epochs=1) in (0, 3)
    assert asked == [[1]]
    out = capsys.readouterr().out
    with_noise = -0.5 * math.log(2 * math.pi * math.e) * 2 - 0.5 * math.log(0.25 + 1 / 12)
    assert nats(out)["Gaussian"][0] == pytest.approx(with_noise, abs=0.06)
    assert "Integers: 'flip'. Noise from [0, 1) is added to them;" in out
    assert "lower bound of the log-mass" in " ".join(out.split())
    assert "; x = pyro_flows.dequantize(x, [1]); flow.log_prob(x)" in out
    assert "copies" not in out
    flow = pyro_flows.load("model.pt")
    assert flow.columns.names == ("a", "flip")
    assert set(flow.sample((200,))[:, 1].tolist()) == {0.0, 1.0}
    with pytest.warns(UserWarning, match=r"integers with noise in columns 'flip'"):
        flow.log_prob(torch.zeros(3, 2))


def test_spikes_and_copies_are_told_of_by_name(folder, capsys):
    """The command prints lines, not Python warnings."""
    x = np.stack((X[:, 0], X[:, 1].clip(0), X[:, 0].round(1)), 1)
    write("table.csv", ["a", "hurdle", "grid"], np.concatenate((x, x[:10])))
    with silent():
        run("table.csv", epochs=1)
    captured = capsys.readouterr()
    out = " ".join(captured.out.split())
    for words in ("Warning: column 'hurdle' repeats", "column 'grid' holds multiples of 0.1", "are copies of others."):
        assert words in out
    assert out.count("Warning: ") == 2  # of columns and of rows
    assert "fit_density" not in out + captured.err
    assert ".py" not in captured.err


@pytest.mark.parametrize("far", ["integers", "shifted", "huge", "tiny"])
def test_columns_that_float32_rounds_are_calculated_in_float64(folder, capsys, far):
    """Rounding would remove the noise between integers, and the density would consist of spikes."""
    column = {
        "integers": 16_000_000 + np.arange(len(X)) % 6,
        "shifted": 1.6e9 + 1000 * X[:, 1],
        "huge": 1e39 * X[:, 1],
        "tiny": 1e-46 * X[:, 1],
    }[far]
    write("table.csv", ["a", "far"], zip(X[:, 0], column, strict=True))
    run("table.csv", epochs=1)
    out = said(capsys)
    assert "Calculated in float64, since float32 rounds 'far'." in out
    assert "Warning" not in out
    assert "rows x of float64" in out


def test_warnings_of_others_are_shown_as_ever(folder, monkeypatch):
    def warning(*arguments, **options):
        warnings.warn("of another kind", stacklevel=1)
        return fit_density(*arguments, **options)

    monkeypatch.setattr(density, "fit_density", warning)
    with pytest.warns(UserWarning, match="of another kind"):
        run("table.csv", "--quiet", epochs=1)


def test_quiet_prints_one_line(folder, capsys):
    write("table.csv", ["a", "b", "c"], [[a, round(b, 1), "word"] for a, b in X])
    assert run("table.csv", "--quiet") in (0, 3)
    captured = capsys.readouterr()
    assert captured.out.endswith("Wrote model.pt and model.png.\n")
    assert captured.out.count("\n") == 1
    assert captured.err == ""


@pytest.fixture
def untrained(monkeypatch) -> list:
    """Replace the fit by one that leaves the flow untrained, and return its training and validation data."""
    given = []

    def idle(_, x, *, training, **__):
        given.extend((x, training.validation))
        return types.SimpleNamespace(stopped="steps", best_step=1, held_out=torch.zeros(1), skipped=2)

    monkeypatch.setattr(density, "fit_density", idle)
    return given


@pytest.mark.usefixtures("untrained")
def test_a_flow_below_the_gaussian_ends_with_3(folder, capsys):
    write("table.csv", ["a", "b"], 10 * X)
    assert run("table.csv") == 3
    out = said(capsys)
    assert "The flow is worse than a Gaussian. Try more --epochs or another --flow." in out
    assert ", 1 epochs, 2 steps skipped" in out
    assert (folder / "model.png").exists()


def test_a_flow_within_the_error_of_the_gaussian_ends_with_0(folder, untrained):
    """The data are standard normal, as the untrained flow is."""
    write("table.csv", ["a", "b"], RANDOM.standard_normal((2000, 2)))
    assert run("table.csv", "--quiet") == 0


def test_the_rows_are_divided_into_80_10_and_10_of_100(folder, untrained):
    run("table.csv", "--quiet")
    train, judge = ({tuple(row) for row in part.to_numpy().tolist()} for part in untrained)
    assert (len(train), len(judge)) == (96, 12)
    assert not train & judge
    assert train | judge < {tuple(row) for row in X.astype(np.float32).tolist()}


def test_ctrl_c_writes_the_best_state_beside_the_old_files_and_ends_with_130(folder, capsys, monkeypatch, ctrl_c):
    """Files of an earlier interrupted run are not overwritten."""
    command_line.interrupt_after(9, monkeypatch)  # an epoch has two steps
    write("table.csv", ["a", "b"], 10 * X)
    (folder / "model.pt").write_text("a good model")
    (folder / "model.png").write_text("its picture")
    for name in ("model.interrupted", "model.interrupted-2"):
        assert not (folder / f"{name}.pt").exists()
        out, err = interrupted(capsys, epochs=50_000)
        assert re.search(r"Interrupted after 1\d steps; kept the best state", err)
        assert err.endswith(f"python -m pyro_flows density: interrupted; wrote {name}.pt and {name}.png\n")
        assert f"Wrote {name}.pt and {name}.png." in out
        flow = pyro_flows.load(f"{name}.pt")
        assert flow.log_prob(torch.from_numpy(10 * X).float()).mean() > -8  # at least standardised
    assert (folder / "model.pt").read_text() == "a good model"
    assert (folder / "model.png").read_text() == "its picture"


def press_twice(*_, **__):
    for _ in range(2):
        signal.raise_signal(signal.SIGINT)


def break_an_import(*_, **__):
    """Raise as compiled modules do when Ctrl-C comes while they are imported."""
    raise ImportError("initialization failed") from KeyboardInterrupt()


@pytest.mark.parametrize(
    ("place", "stop"),
    [("_log_prob", press_twice), ("plots.pairs", press_twice), ("plots.pairs", break_an_import)],
)
def test_a_second_ctrl_c_after_the_model_is_written_names_it(place, stop, folder, capsys, monkeypatch, ctrl_c):
    monkeypatch.setattr(f"{density.__name__}.{place}", stop)
    assert interrupted(capsys, "--quiet")[1].endswith("density: interrupted; wrote model.pt\n")
    assert pyro_flows.load("model.pt").event_shape == (2,)
    assert not (folder / "model.png").exists()


def test_ctrl_c_while_the_model_is_written_waits_for_it(folder, capsys, monkeypatch, ctrl_c):
    def slow(flow, path):
        signal.raise_signal(signal.SIGINT)
        pyro_flows.save(flow, path)

    monkeypatch.setattr(density, "save", slow)
    assert interrupted(capsys, "--quiet")[1].endswith("interrupted; wrote model.pt and model.png\n")
    assert pyro_flows.load("model.pt").event_shape == (2,)


@pytest.mark.slow
@pytest.mark.parametrize("storm", [False, True], ids=["once", "again and again"])
def test_ctrl_c_in_a_real_process_damages_nothing(storm, folder, ctrl_c):
    (folder / "model.pt").write_text("a good model")
    words = [sys.executable, "-m", "pyro_flows", "density", "table.csv", "--epochs", "100000"]
    root = Path(pyro_flows.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        seen = ""
        while process.poll() is None and not re.search(r" [2-9]\d/300000 ", seen):  # the progress bar's steps
            seen += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        while storm and process.poll() is None:
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert (folder / "model.pt").read_text() == "a good model"
    kept = {path.name for path in folder.iterdir()} - {"model.pt", "table.csv"}
    assert kept <= {"model.interrupted.pt", "model.interrupted.png"}  # and no temporary files
    if not storm:
        assert len(kept) == 2
        assert "interrupted; wrote model.interrupted.pt and model.interrupted.png" in said
    if "model.interrupted.pt" in kept:
        assert pyro_flows.load("model.interrupted.pt").event_shape == (2,)


def test_nothing_half_written_is_left_behind(folder, monkeypatch):
    """The disk fills up while the plot is written: earlier files stay, and no temporary file remains."""

    class Picture:
        def savefig(self, path, **_):
            Path(path).write_bytes(b"\x89PNG half a pic")
            raise OSError(28, "No space left on device")

    (folder / "model.png").write_bytes(b"the old one")
    monkeypatch.setattr(density.plots, "pairs", lambda *_, **__: Picture())
    with pytest.raises(OSError, match="No space left"):
        run("table.csv", "--quiet", epochs=1)
    assert (folder / "model.png").read_bytes() == b"the old one"
    assert sorted(path.name for path in folder.iterdir()) == ["model.png", "model.pt", "table.csv"]


# The nats.


def test_the_gaussian_is_that_of_maximal_likelihood():
    x = torch.from_numpy(RANDOM.standard_normal((50, 3)) @ RANDOM.standard_normal((3, 3)) * (1e-6, 1.0, 1e6))
    x += x.std(0) * 5
    gaussian = gaussian_of(x, "abc")
    assert gaussian_of(x.float(), "abc").loc.dtype == torch.float64
    covariance = torch.cov(x.T, correction=0)
    best = -1.5 * math.log(2 * math.pi * math.e) - 0.5 * torch.logdet(covariance).item()
    assert gaussian.log_prob(x).mean().item() == pytest.approx(best, abs=1e-6)


def test_columns_that_determine_one_another_are_refused_by_name():
    x = torch.from_numpy(RANDOM.standard_normal((50, 4)))
    x[:, 1] = 3.0
    with pytest.raises(Refused, match="constant in 'b'; choose other columns by --columns"):
        gaussian_of(x, "abcd")
    x[:, 1] = 1000 * x[:, 3] - 500 * x[:, 0] + 7
    with pytest.raises(Refused, match="the columns 'a', 'b', 'd' determine one another"):
        gaussian_of(x, "abcd")


def test_the_report_tells_errors_of_means_and_of_the_gain():
    gaussian = [torch.tensor(part) for part in ([-1.0, -3.0], [-2.0], [-11.0, -13.0, -12.0, -16.0])]
    flow = [part + 1 for part in gaussian]
    lines, usable = report(flow, gaussian, "nsf")
    assert usable
    error = 2 * torch.tensor([-11.0, -13.0, -12.0, -16.0]).std().item() / 2
    assert lines == [
        "           train  validation             test",
        f"Gaussian  -2.000      -2.000  -13.000 ± {error:.3f}",
        f"nsf       -1.000      -1.000  -12.000 ± {error:.3f}",
        "",
        "gain  1.000 ± 0.000 nats per row over the Gaussian, on the test rows one by one",
    ]


# Tables.


def read(text: str, chosen: list[str] | None = None, name: str = "t.csv") -> tuple[list[str], list, list[str]]:
    """Return the columns, rows and remarks of a table with some text."""
    Path(name).write_text(text, encoding="utf-8")
    return contents(name, chosen)


def contents(name: str, chosen: list[str] | None = None) -> tuple[list[str], list, list[str]]:
    """Return the columns, rows and remarks of a table in a file."""
    table, remarks = read_table_file(Path(name), chosen)
    assert set(table.dtypes) == {np.dtype(np.float64)}
    return list(table.columns), table.to_numpy().tolist(), remarks


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2.5\n3,-4e1\n",
        "\ufeffa,b\r\n1,2.5\r\n3,-4e1\r\n",  # as written by Excel
        "a;b\n1;2.5\n3;-4e1",
        "a\tb\n1\t2.5\n3\t-4e1\n",
        '"a", "b"\n"1", 2.5\n 3 ,"-4e1"\n',
        "\na,b\n\n1,2.5\n  \n3,-4e1\n\n",
        "# a b\n1 2.5\n3 -4e1\n",  # as written by NumPy
        "# a,b\n1,2.5\n3,-4e1\n",
        "   a     b\n   1   2.5\n\n   3  -4e1\n",
    ],
)
def test_text_is_read_whatever_parts_it(text, folder):
    assert read(text) == (["a", "b"], [[1.0, 2.5], [3.0, -40.0]], [])


def test_names_may_hold_the_delimiter_and_lines(folder):
    assert read('"height, cm";"two\nlines"\n1;2\n3;5\n') == (["height, cm", "two\nlines"], [[1, 2], [3, 5]], [])
    assert read('"a, b",c\n1,2\n3,5\n', split_names('"a, b", c'))[0] == ["a, b", "c"]


def test_a_first_line_of_numbers_is_data(folder):
    assert read("1.5,NA\n2,3\n7,5\n3,9") == (
        ["column 1", "column 2"],
        [[2, 3], [7, 5], [3, 9]],
        ["Left out 1 of 4 rows, where values are missing: in 'column 2' (1 row)."],
    )
    assert read("3\n1\n2\n") == (["column 1"], [[3], [1], [2]], [])


def test_a_first_line_of_words_and_numbers_is_names_and_said_to_be(folder):
    columns, _, remarks = read("name,2019,2020\na,1,2\nb,2,4\n")
    assert columns == ["2019", "2020"]
    assert remarks[0] == "The first line (name, 2019, 2020) was taken for names."


def test_columns_without_a_name_are_numbered_and_row_numbers_left_out(folder):
    assert read(",b,\n1,5,0\n2,5.5,7\n3,1,3\n") == (
        ["b", "column 3"],
        [[5, 0], [5.5, 7], [1, 3]],
        ["Left out row numbers: 'column 1'."],
    )
    assert read("time,b\n1,5\n2,5.5\n3,1\n")[0] == ["time", "b"]  # the column has a name
    assert read(",b\n1,5\n2,5.5\n4,1\n")[0] == ["column 1", "b"]  # not a running index: 1, 2, 4


@pytest.mark.parametrize("word", ["", "NA", "NaN", "nan", "null", "NULL", "None", "n/a", "#N/A", "?", "-", ".", " NA "])
def test_rows_with_missing_values_are_left_out_and_counted(word, folder):
    table = read(f"a,b,c\n1,2,x\n{word},3,{word}\n2,{word},x\n5,1,y\n{word},4,y\n6,7,y\n7,7,z\n8,8,z")
    assert table[:2] == (["a", "b"], [[1, 2], [5, 1], [6, 7], [7, 7], [8, 8]])
    assert table[2] == [
        "Left out columns that are not numbers: 'c' ('x' in 7 rows).",
        "Left out 3 of 8 rows, where values are missing: in 'a' (2 rows), 'b' (1 row).",
    ]


def test_numbers_are_read_to_the_last_digit(folder):
    numbers = RANDOM.standard_normal((1000, 2)) * (1e-9, 1e12)
    write("t.csv", ["a", "b"], [map(repr, row) for row in numbers.tolist()])
    assert (read_table_file(Path("t.csv"))[0].to_numpy() == numbers).all()


def test_columns_without_a_density_are_left_out_by_name(folder):
    columns, _, remarks = read("a,red,most,none,same,flag\n1,r,1,,3,True\n2,g,2 cm,NA,3.0,False\n3,b,3,?,,True\n")
    assert columns == ["a"]
    assert remarks == [
        "Left out columns that are not numbers: 'red' ('r'), 'most' ('2 cm' in 1 row), 'flag' ('True').",
        "Left out empty columns: 'none'.",
        "Left out constant columns: 'same' (3).",
    ]


def test_a_short_row_lacks_its_last_values(folder):
    assert read("a,b\n1,2\n3\n4,5\n")[2] == ["Left out 1 of 3 rows, where values are missing: in 'b' (1 row)."]


def test_a_column_that_is_constant_in_the_rows_that_are_left_is_left_out(folder):
    columns, rows, (*_, last) = read("a,b\n1,5\n2,5\n3,5\n,6\n")
    assert (columns, rows, last) == (["a"], [[1], [2], [3]], "Left out constant columns: 'b' (5).")


def test_chosen_columns_come_in_the_order_asked_for_and_nothing_is_said_of_others(folder):
    text = ",a,b,c,d\n1,1,NA,x,7\n2,2,3,y,5\n3,5,4,z,5\n"
    assert read(text, ["d", "a"]) == (["d", "a"], [[7, 1], [5, 2], [5, 5]], [])
    assert read(text, ["b"])[2] == ["Left out 1 of 3 rows, where values are missing: in 'b' (1 row)."]


def test_numpy_files_hold_a_matrix_or_vectors(folder):
    x = np.array([[1.5, 2], [3, 5]], dtype=np.float32)
    np.savez("t.npz", x=x)
    assert contents("t.npz") == (["column 1", "column 2"], x.tolist(), [])
    np.savez("t.npz", x=x, columns=np.array(["a", "b"]), other=x, y=x[0])
    assert contents("t.npz") == (["a", "b"], x.tolist(), ["Used the array 'x' alone, without 'other', 'y'."])
    np.savez("t.npz", data=x)
    assert contents("t.npz")[1] == x.tolist()
    vectors = {"u": np.array([1, 2, 5]), "v": np.array([np.nan, 1, 2]), "w": np.array(["a", "b", "c"])}
    np.savez("t.npz", **vectors, flag=np.array([True, False, True]))
    columns, rows, remarks = contents("t.npz")
    assert (columns, rows, len(remarks)) == (["u", "v", "flag"], [[2, 1, 0], [5, 2, 1]], 2)
    np.save("t.npy", x.astype(">f8"))
    assert contents("t.npy")[1] == x.tolist()
    np.save("t.npy", np.array([(1, 2.5), (2, 3.5)], dtype=[("p", int), ("q", float)]))
    assert contents("t.npy")[0] == ["p", "q"]
    days, waves = np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"), np.array([1j, 2])
    np.savez("t.npz", a=x[:, 0], days=days, waits=days - days[0], waves=waves)
    columns, _, (remark,) = contents("t.npz")
    assert columns == ["a"]
    assert "columns that are not numbers: 'days' ('2020-01-01" in remark


# Invalid input.


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the table 't.csv' is empty"),
        ("\n \n", "the table 't.csv' is empty"),
        ("a,b\n", "the table 't.csv' holds no values"),
        ("a,b\n1,2\n3,4,5\n", "the table 't.csv' cannot be read: Expected 2 fields in line 3, saw 3"),
        ("a,b\n1,2\n\n3,4,5\n", "Expected 2 fields in line 4, saw 3"),
        ('a,b\n1,2\n"3,4\n', "cannot be read: EOF inside string"),
        ('a,b\n1,2\n3,"4\n5,6"\n7,8\n', r"row 2 holds '4\n5,6'; is a quotation mark missing"),
        ("a,b,a\n1,2,3\n", "several columns named 'a'; rename them"),
        ("column 2,\n1,2\n", "several columns named 'column 2'"),
        ("a;b\n1,5;2,5\n3,5;1,0\n", "column 'a' holds numbers with commas, such as '1,5'; write them with a decimal"),
        ("a;b\n1;2,5\n3;1,0\n", "column 'b' holds numbers with commas, such as '2,5'"),
        ('a,b\n1,"1,200"\n3,"1,300"\n', "column 'b' holds numbers with commas, such as '1,200'"),
        ("a\n1 2\n3 4\n", "Left out columns that are not numbers: 'a' ('1 2')."),
        ("a,b\n1,x\n1,y\n", "Left out columns that are not numbers: 'b' ('x'). Left out constant columns: 'a' (1)."),
        ("a,b\n1,2\n2,inf\n3,-Infinity\n", "the table holds inf in 'b' (2 rows); leave these rows out"),
        ("a,b\n1,2\n2,\n3,\n4,5\n5,\n", "values are missing in 3 of 5 rows: in 'b' (3 rows); choose other columns by"),
        ("a,b\n" + "1.5,2\n0.1,3\n" * 20, "the table has 40 rows, too few for a density of 2 columns"),
    ],
)
def test_bad_tables_are_refused_before_training(text, words, folder, capsys):
    (folder / "t.csv").write_text(text)
    assert words in refused(capsys, "t.csv")
    assert not (folder / "model.pt").exists()


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("delimiter", [",", "\t", " "])
def test_a_line_of_millions_of_cells_is_refused_at_once(delimiter, folder, capsys):
    (folder / "t.csv").write_text("\n" + delimiter.join(["0.5"] * 5_000_000))
    start = time.process_time()
    assert "must have at most 20000 columns, and its first row has 5000000" in refused(capsys, "t.csv")
    assert time.process_time() - start < 10


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("a,z", "argument --columns: there is no 'z'; the table has 'a', 'b', 'c', 'd', 'e'"),
        ("c", "argument --columns: columns that are not numbers have no density: 'c' ('x')"),
        ("a,d", "argument --columns: constant columns have no density: 'd' (1)"),
        ("e,a", "argument --columns: empty columns have no density: 'e'"),
        ("a,a", "argument --columns: names must be parted by commas, each there once, got 'a,a'"),
        ("", "argument --columns: names must be parted by commas, each there once, got ''"),
        ("a,,b", "argument --columns: names must be parted by commas"),
    ],
)
def test_bad_columns_are_refused(columns, words, folder, capsys):
    write("t.csv", list("abcde"), [[*row, "x", 1, ""] for row in X])
    assert words in refused(capsys, "t.csv", "--columns", columns)


def arrays(**named):
    return lambda file: np.savez(file, **named)


MUST = "must hold a matrix 'x' with as many names in 'columns', or vectors of one length: "
BAD_FILES = {
    "absent.csv": (lambda file: None, "cannot read the table 'absent.csv': No such file"),
    "table.xlsx": (lambda file: None, "must end with .csv or .tsv or .txt or .npz or .npy"),
    "latin.csv": (lambda file: file.write_bytes("größe,b\n1,2\n".encode("latin-1")), "is not UTF-8 text; save it as"),
    "text.npz": (lambda file: file.write_text("a,b\n1,2\n"), "is not a NumPy file of plain arrays"),
    "cut.npz": (lambda file: file.write_bytes(b"PK\x03\x04" + bytes(100)), "is not a NumPy file of plain arrays"),
    "objects.npz": (arrays(x=np.array([{}, {}], dtype=object)), "is not a NumPy file of plain arrays"),
    "many.npz": (arrays(u=np.zeros((2, 2)), v=np.zeros((2, 2))), MUST),
    "unequal.npz": (arrays(u=np.zeros(2), v=np.zeros(3)), MUST),
    "cube.npz": (arrays(u=np.zeros((2, 2, 2))), MUST),
    "names.npz": (arrays(x=X, columns=np.array(["a"])), MUST),
    "twice.npz": (arrays(x=X, columns=np.array(["a", "a"])), "several columns named 'a'"),
    "inf.npz": (arrays(x=np.array([[1.0, np.inf], [2.0, 1.0]])), "the table holds inf in 'column 2' (1 row)"),
    "wide.npy": (
        lambda file: np.save(file, np.zeros((1, 20_001))),
        "at most 20000 columns, and its first row has 20001",
    ),
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused(name, folder, capsys):
    write_file, words = BAD_FILES[name]
    write_file(folder / name)
    assert words in refused(capsys, name)


@pytest.mark.usefixtures("no_training")
def test_a_bad_place_for_the_files_is_refused_before_training(folder, capsys, monkeypatch):
    assert "argument --out: 'a.png' must end with .pt" in refused(capsys, "table.csv", "--out", "a.png")
    assert "argument --out: cannot write 'table.csv'" in refused(capsys, "table.csv", "--out", "table.csv/a.pt")
    (folder / "a.png").mkdir()
    assert "argument --out: cannot write 'a.png': it is a folder" in refused(capsys, "table.csv", "--out", "a.pt")

    long = "n" * 245  # too long for the suffix ".interrupted"
    assert "nn.interrupted.pt': File name too long" in refused(capsys, "table.csv", "--out", f"{long}.pt")

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", denied)  # simulated, because an administrator may write anywhere
    assert "cannot write 'b.pt': Permission denied" in refused(capsys, "table.csv", "--out", "b.pt")


@pytest.mark.parametrize("error", [ValueError, FloatingPointError])
def test_what_training_refuses_is_one_line(error, folder, capsys, monkeypatch):
    def refuse(*_, **__):
        raise error("fit_density: x is\nnot to my taste.")

    monkeypatch.setattr(density, "fit_density", refuse)
    assert refused(capsys, "table.csv", "--quiet") == "x is not to my taste.\n"
