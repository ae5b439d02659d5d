"""The command ``fit``: it fits and checks a user's model, and reports invalid input in one line."""

import functools
import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import command_line
import command_models
import numpy as np
import pytest
import torch
from models import prior_answer

from pyro_flows.__main__ import main
from pyro_flows.answers import Posterior
from pyro_flows.answers.table import table_of
from pyro_flows.commands import Refused, fit
from pyro_flows.commands.model import load_model, read_data, readings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

RANDOM = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a working folder with a file of models, and data."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(command_models.__file__, tmp_path / "models.py")
    (tmp_path / "data.json").write_text('{"y": [1.5, 2.5, 3.0]}')
    return tmp_path


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("it trained")

    monkeypatch.setattr(fit, "posterior", refuse)


def run(*words: str) -> int:
    """Return the exit status of a run."""
    return main(["fit", *words])


refused = functools.partial(command_line.refused, "fit")


@pytest.fixture
def quick(monkeypatch) -> None:
    """Answer with draws of the prior."""
    monkeypatch.setattr(fit, "posterior", prior_answer)


# Valid input.


@pytest.mark.slow
def test_prints_table_and_verdict_and_writes_both_files(folder, capsys):
    assert run("models.py:normal", "--data", "data.json", "--out", "new/folder/answer.nc") == 0
    captured = capsys.readouterr()
    assert sorted(path.name for path in (folder / "new" / "folder").iterdir()) == ["answer.nc", "answer.png"]
    rows = {words[0]: [float(word) for word in words[1:]] for words in map(str.split, captured.out.splitlines()[2:4])}
    variance = 1 / (1 / 9 + 3)
    assert rows["x"][:2] == pytest.approx([variance * 7, variance**0.5], abs=0.06)
    assert rows["twice"] == pytest.approx([2 * number for number in rows["x"]], abs=0.02)
    for words in ("log evidence", "nats", "time", "Trust these draws. ", "Wrote ", str(Path("new/folder/answer.png"))):
        assert words in captured.out
    assert "posterior: check" in captured.err
    data = az.from_netcdf("new/folder/answer.nc")
    assert set(data.posterior) == {"x", "twice"}
    assert data.observed_data["y"].values.tolist() == [1.5, 2.5, 3.0]
    assert data.log_likelihood["y"].shape == (1, 4000, 3)
    assert (folder / "new" / "folder" / "answer.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.usefixtures("quick")
def test_the_plates_name_the_dimensions(folder):
    (folder / "data.json").write_text(json.dumps({"y": [[1.0, 2.0, 0.5], [0.0, 1.0, 1.5]]}))
    run("models.py:nested", "--data", "data.json", "--quiet")
    data = az.from_netcdf("posterior.nc")
    assert data.posterior["level"].dims == ("chain", "draw", "school")
    assert data.log_likelihood["y"].dims == ("chain", "draw", "class", "school")


@pytest.mark.usefixtures("quick")
def test_a_module_is_a_model_and_names_of_arguments_may_be_those_of_options(folder):
    assert run("models.py:instance", "--data", "data.json", "--quiet") == 0
    (folder / "data.json").write_text('{"steps": [1.0, 2.0], "lr": 0.5, "warm_start": true}')
    assert run("models.py:clash", "--data", "data.json", "--quiet") == 0


@pytest.mark.usefixtures("quick")
def test_a_model_without_arguments_needs_no_data_and_one_that_observes_nothing_is_told_of(folder, capsys):
    assert run("models.py:no_arguments", "--quiet") == 0
    assert "Nothing is observed" in capsys.readouterr().err
    assert run("models.py:normal", "--data", "data.json", "--quiet") == 0
    assert "Nothing is observed" not in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number", ["2", "1.5"])
def test_a_single_number_is_observed(number, folder):
    (folder / "data.json").write_text(f'{{"y": {number}}}')
    assert run("models.py:single", "--data", "data.json", "--quiet") == 0
    assert float(az.from_netcdf("posterior.nc").observed_data["y"]) == float(number)


@pytest.mark.usefixtures("quick")
def test_double_calculates_in_float64_and_leaves_no_trace(folder):
    assert run("models.py:normal", "--data", "data.json", "--quiet", "--double") == 0
    assert az.from_netcdf("posterior.nc").posterior["x"].dtype == np.float64
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("last", [1, 8])
def test_ctrl_c_writes_the_best_state_beside_the_old_files_and_ends_with_130(last, folder, capsys, monkeypatch, ctrl_c):
    command_line.interrupt_after(last, monkeypatch)
    (folder / "posterior.nc").write_text("good draws")
    with pytest.raises(SystemExit) as exit_:
        run("models.py:normal", "--data", "data.json")
    assert exit_.value.code == 130
    said = capsys.readouterr().err
    files = "posterior.interrupted.nc and posterior.interrupted.png"
    assert (folder / "posterior.nc").read_text() == "good draws"
    if last == 1:
        assert said.endswith("fit: interrupted before there was anything to keep; nothing was written\n")
        return
    assert said.endswith(f"python -m pyro_flows fit: interrupted; wrote {files}\n")
    assert az.from_netcdf("posterior.interrupted.nc").posterior.sizes["draw"] == 4000
    assert not (folder / "posterior.png").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("model", ["subsampled", "half", "complexes"])
def test_no_answer_is_lost_for_its_sites(model, folder, capsys):
    assert run(f"models.py:{model}", "--data", "data.json") == 0
    captured = capsys.readouterr()
    assert "Trust these draws." in captured.out
    assert captured.err.count("The file holds no log-likelihood, only draws: ") == (model == "subsampled")
    data = az.from_netcdf("posterior.nc")
    assert data.posterior.sizes["draw"] == 4000
    assert set(data.posterior) == {"x", *{"half": {"d"}, "complexes": {"re d", "im d"}}.get(model, set())}


@pytest.mark.usefixtures("quick")
def test_a_file_that_cannot_be_written_does_not_cost_the_report(folder, capsys, monkeypatch):
    monkeypatch.setattr(Posterior, "to_arviz", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("models.py:normal", "--data", "data.json")
    assert "Trust these draws." in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_the_likelihood_of_very_many_observations_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr(fit, "MOST_OBSERVED", 2)
    run("models.py:normal", "--data", "data.json", "--quiet")
    assert not hasattr(az.from_netcdf("posterior.nc"), "log_likelihood")


@pytest.mark.slow
def test_the_example_of_the_docs_runs(tmp_path, monkeypatch):
    """One list must become integers, because it is an index; another must not, because a Bernoulli refuses integers."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parents[1] / "docs" / "commands.md").read_text()
    for name in ("drug.py", "data.json"):
        Path(name).write_text(re.search(rf"<!-- {name} -->\n```\n(.*?)```", page, flags=re.DOTALL).group(1))
    command = re.search(r"python -m pyro_flows (fit drug.*)\n", page).group(1)
    assert main([*command.split(), "--quiet"]) == 0
    data = az.from_netcdf("posterior.nc")
    assert data.posterior["level"].dims == ("chain", "draw", "clinics")
    assert data.observed_data["cured"].dtype == np.float32


# The table.


def table(draws: dict[str, np.ndarray]) -> list[str]:
    return list(table_of(draws, {}))


def test_long_sites_are_cut_short_where_there_are_many_rows():
    shapes = {"short": (100,), "long": (100, 10, 50), "matrix": (100, 2, 2)}
    names = [line.split("  ")[0] for line in table({name: RANDOM.standard_normal(shapes[name]) for name in shapes})]
    assert names[1] == "short"
    assert names[2:5] == ["long[0, 0]", "long[0, 1]", "long[0, 2]"]
    assert names[-6:] == ["(488 more of long)", "long[9, 49]", *(f"matrix[{i}, {j}]" for i in (0, 1) for j in (0, 1))]


@pytest.mark.parametrize(("scale", "words"), [(100.0, "123"), (1.0, "1.23"), (1e-3, "0.00123"), (1e-7, "1.234e-07")])
def test_decimals_follow_the_standard_deviation(scale, words):
    values = RANDOM.standard_normal(2000)
    values = scale * (1.234 + (values - values.mean()) / values.std())
    assert table({"x": values})[1].split()[1].startswith(words)


def test_as_many_labels_as_numbers():
    with pytest.raises(ValueError, match="summary: 'x' has 3 numbers and got 2 labels"):
        list(table_of({"x": np.ones((5, 3))}, {"x": ["one", "two"]}))


def test_columns_stay_apart_and_level():
    lines = table({"a_rather_long_name": 1e6 + RANDOM.standard_normal(99), "b": 1e-9 * RANDOM.standard_normal(99)})
    assert len({len(line) for line in lines}) == 1
    assert all(len(line.split()) == 5 for line in lines[1:])


# The data.


def read(folder: Path, text: str) -> dict[str, object]:
    (folder / "d.json").write_text(text)
    return next(readings(read_data(folder / "d.json")))


def test_json_becomes_what_its_values_are(tmp_path):
    text = '{"a": 1, "b": 1.5, "c": true, "d": "word", "e": null, "f": ["v", "w"], "g": [1, 2.5], "h": [[true, false]]}'
    found = read(tmp_path, text)
    assert [found[name] for name in "abcdef"] == [1, 1.5, True, "word", None, ["v", "w"]]
    assert found["c"] is True
    assert type(found["a"]) is int
    assert (found["g"].dtype, found["g"].tolist()) == (torch.float32, [1.0, 2.5])
    assert (found["h"].dtype, found["h"].tolist()) == (torch.bool, [[True, False]])


def test_lists_of_integers_are_real_numbers_first_and_integers_then(tmp_path):
    (tmp_path / "d.json").write_text('{"a": [1, 2], "b": [[3], [4]], "c": [1.0, 2], "d": true, "e": "1"}')
    found = readings(read_data(tmp_path / "d.json"))
    kinds = [tuple(reading[name].dtype == torch.int64 for name in "abc") for reading in found]
    assert kinds == [(False, False, False), (True, False, False), (False, True, False), (True, True, False)]


def test_numbers_are_numbers_first_and_tensors_then(tmp_path):
    (tmp_path / "d.json").write_text('{"a": 1}')
    first, second = (reading["a"] for reading in readings(read_data(tmp_path / "d.json")))
    assert type(first) is int
    assert torch.equal(second, torch.tensor(1.0))


def test_npz_keeps_kinds(tmp_path):
    kinds = {"real": "f8", "half": "f2", "integer": "u1", "flag": "?", "big_endian": ">f8"}
    scalars = {"n": np.array(3), "x": np.array(0.5), "word": np.array("w")}
    np.savez(tmp_path / "d.npz", **{name: np.ones(2, kind) for name, kind in kinds.items()}, **scalars)
    found = next(readings(read_data(tmp_path / "d.npz")))
    others = {"integer": torch.int64, "flag": torch.bool}
    assert {name: found[name].dtype for name in kinds} == {**dict.fromkeys(kinds, torch.float32), **others}
    assert found["big_endian"].tolist() == [1.0, 1.0]
    assert [found["n"], found["x"], found["word"]] == [3, 0.5, "w"]
    assert type(found["n"]) is int


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[1]", "must hold an object"),
        ('{"y": {"a": 1}}', "'y' holds object"),
        ('{"y": [1, [2]]}', "'y' holds int, lists of unequal lengths"),
        ('{"y": [[1], [1, 2]]}', "'y' holds lists of unequal lengths"),
        ('{"y": [1, null]}', "'y' holds int, null"),
        ('{"y": [1, true]}', "'y' holds bool, int"),
        ('{"y": [1, 99999999999999999999]}', "'y' holds integers beyond 64 bits"),
        ('{"y": [1.0, NaN, Infinity]}', r"'y' holds NaN or inf \(2 of 3 numbers\)"),
        ('{"y": [1.0, 1e60]}', r"'y' holds NaN or inf \(1 of 2 numbers\)"),
        ('{"y": NaN}', r"'y' holds NaN or inf \(1 of 1 numbers\)"),
    ],
)
def test_bad_json_is_refused(text, words, tmp_path):
    with pytest.raises(Refused, match=words):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_text("no archive"), "is not a NumPy file of plain arrays"),
        (lambda path: np.savez(path, y=np.array([{}])), "is not a NumPy file of plain arrays"),
        (lambda path: np.savez(path, y=np.array([1j])), "'y' is an array of complex128"),
        (lambda path: np.savez(path, y=np.array([2**63], dtype="u8")), "'y' holds integers beyond 64 bits"),
        (lambda path: np.save(path.open("wb"), np.ones(2)), "one array without a name"),
    ],
)
def test_bad_npz_is_refused(write, words, tmp_path):
    write(tmp_path / "d.npz")
    with pytest.raises(Refused, match=words):
        read_data(tmp_path / "d.npz")


# The model.


def test_a_file_may_import_its_neighbours_and_shadows_none(folder):
    (folder / "neighbour_of_a_model.py").write_text("def model(): pass")
    (folder / "json.py").write_text("from neighbour_of_a_model import model")
    before = list(sys.path)
    assert load_model(str(folder / "json.py:model"))() is None
    assert sys.path == before
    assert sys.modules["json"] is json


# Invalid input.


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("models.py", "must be given as FILE.py:NAME, got 'models.py'"),
        (":normal", "must be given as FILE.py:NAME"),
        ("models.py:", "must be given as FILE.py:NAME"),
        ("absent.py:normal", "there is no file 'absent.py'"),
        (".:normal", "there is no file '.'"),
        ("data.json:normal", "'data.json' is not a Python file"),
        ("models.py:norma", "'models.py' has no 'norma'; its functions are anything, by_position, clash"),
        ("models.py:number", "'number' in 'models.py' is of type int"),
        ("models.py:Class", "'Class' in 'models.py' is a class"),
        ("models.py:by_position", "'y'"),
        ("models.py:clash", "unexpected keyword argument 'y'"),
        ("models.py:faulty", "RuntimeError: inconsistent tensor size"),
    ],
)
def test_a_bad_model_is_refused_before_training(spec, words, folder, capsys):
    assert words in refused(capsys, spec, "--data", "data.json")
    assert {path.name for path in folder.iterdir()} <= {"models.py", "data.json", "__pycache__"}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module' (broken.py, line 1)"),
        ("def model(:", "SyntaxError: invalid syntax"),
        ("\nraise ValueError('two\\nlines')", "ValueError: two lines (broken.py, line 2)"),
        ("raise SystemExit(0)", "SystemExit: 0 (broken.py, line 1)"),
        ("import os\nos.chdir('..')\n1 / 0", "ZeroDivisionError: division by zero (broken.py, line 3)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_refused(text, words, folder, capsys):
    (folder / "broken.py").write_text(text)
    message = refused(capsys, "broken.py:model")
    assert message.startswith("'broken.py' cannot be imported: ")
    assert words in message


@pytest.mark.usefixtures("no_training")
def test_a_fault_of_a_model_without_arguments_is_told_in_its_own_words(folder, capsys):
    message = refused(capsys, "models.py:no_arguments_but_faulty")
    assert message.startswith("TypeError: object of type 'int' has no len() (models.py, line ")


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.json", None, "cannot read the data file 'absent.json': No such file"),
        ("data.csv", "y\n1", "the data file 'data.csv' must end with .json or .npz"),
        ("data.json", "{'y': 1}", "is not JSON"),
        ("data.json", '{"y": [1.0, NaN]}', "argument 'y' holds NaN or inf (1 of 2 numbers)"),
        ("data.json", '{"y": [1.0], "z": 1}', "unexpected keyword argument 'z'; the model takes (y, scale=1.0)"),
        ("data.json", "{}", "missing 1 required positional argument: 'y'"),
    ],
)
def test_bad_data_are_refused_before_training(name, content, words, folder, capsys):
    if content is not None:
        (folder / name).write_text(content)
    assert words in refused(capsys, "models.py:normal", "--data", name)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("suffix", ["json", "npz"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"group": [1, 2, 3]}, "index 3 is out of bounds for dimension 0 with size 3 (models.py, line"),
        ({"x": [0.5, 1.5]}, "The size of tensor a (3) must match the size of tensor b (2)"),
        ({"y": [-1, 2, 0]}, "observed site 'y' holds data outside of the support of Poisson (1 of 3, such as -1). Re"),
    ],
)
def test_the_fault_of_the_data_is_told_and_not_that_of_a_reading(fault, words, suffix, folder, capsys):
    data = {"x": [0.5, 1.5, 2.5], "group": [0, 1, 2], "y": [1, 2, 0], "groups": 3, **fault}
    (folder / "d.json").write_text(json.dumps(data))
    np.savez("d.npz", **data)
    assert words in refused(capsys, "models.py:counts", "--data", f"d.{suffix}")


@pytest.mark.usefixtures("no_training")
def test_an_error_that_quotes_all_data_is_cut_short(folder, capsys):
    (folder / "long.py").write_text("def model(y): raise ValueError('bad: ' + '-1, ' * 500)")
    message = refused(capsys, "long.py:model", "--data", "data.json")
    assert message.startswith("ValueError: bad: -1, -1, ")
    assert message.endswith("[...] (long.py, line 1)\n")
    assert len(message) < 700


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("improper", "the posterior is improper"),
        ("no_latents", "must have a continuous latent site"),
        ("discrete", "must have a continuous latent site"),
        ("exits", "SystemExit: 0 (models.py, line "),
        ("exits_late", "SystemExit: 0 (models.py, line "),
        ("lacks_a_key", "KeyError: 'colour' (models.py, line "),
    ],
)
def test_what_training_refuses_and_a_model_that_ends_or_fails_are_told_of_in_one_line(model, words, folder, capsys):
    assert words in refused(capsys, f"models.py:{model}", "--data", "data.json", "--quiet")
    assert not (folder / "posterior.nc").exists()


@pytest.mark.usefixtures("quick")
def test_an_end_outside_of_the_file_of_the_model_is_told(folder, capsys, monkeypatch):
    monkeypatch.setattr(fit, "posterior", lambda *_, **__: sys.exit(0))
    assert refused(capsys, "models.py:normal", "--data", "data.json", "--quiet").startswith("SystemExit: 0")
    assert not (folder / "posterior.nc").exists()


@pytest.mark.usefixtures("quick")
def test_a_model_that_changes_the_working_directory_moves_no_file(folder):
    (folder / "elsewhere").mkdir()
    (folder / "moving.py").write_text(f"{(folder / 'models.py').read_text()}\nimport os\nos.chdir('elsewhere')\n")
    assert run("moving.py:normal", "--data", "data.json", "--quiet", "--out", "there/a.nc") == 0
    assert sorted(path.name for path in (folder / "there").iterdir()) == ["a.nc", "a.png"]
    assert not list((folder / "elsewhere").iterdir())
