"""Data files of the commands: files with false sizes or ambiguous content are errors of one line."""

import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy

from pyro_flows.commands import Refused
from pyro_flows.commands.model import read_data
from pyro_flows.commands.table_file import read_arrays, read_table_file


def header(shape: Any, descr: Any = "<f8", version: tuple[int, int] = (1, 0)) -> bytes:
    """Return a file that consists of a header alone."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    size = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
    return npy.magic(*version) + size + text


def raw(text: bytes) -> bytes:
    return npy.magic(1, 0) + len(text).to_bytes(2, "little") + text


CLAIMS = {
    "10^14 numbers": header((10**7, 10**7)),
    **{f"10^14 numbers, version {number}": header((10**14,), version=(number, 0)) for number in (2, 3)},
    "one long word": header((1,), "<U500000000"),
    "a long field": header((1,), [("a", "<f8", (10**8,))]),
    "words without letters": header((10**14,), "<U0"),
    "columns without rows": header((0, 10**14)),
    "negative": header((-1, -(10**14))),
    "objects": header((1,), "|O") + b"cos\nsystem\n(S'true'\ntR.",
    "an object in a field": header((1,), [("a", "|O")]),
    "brackets": raw(b"(" * 5000 + b"\n"),
    "minus signs": raw(b"-" * 9000 + b"1\n"),
    "a long header": npy.magic(2, 0) + (2**31).to_bytes(4, "little") + b"{",
    "no version": npy.magic(9, 0) + b"xx",
    "nothing": b"",
}


@pytest.fixture
def little_memory() -> Any:
    """Limit the memory of the process to 256 MiB beyond its present use."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", CLAIMS)
def test_headers_that_claim_more_than_there_is_are_refused(name: str, tmp_path: Path) -> None:
    content = CLAIMS[name]
    (tmp_path / "x.npy").write_bytes(content)
    for file, kind in (("x.npz", zipfile.ZIP_STORED), ("small.npz", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / file, "w", kind) as archive:
            archive.writestr("x.npy", content)
    for file in ("x.npy", "x.npz", "small.npz"):
        with pytest.raises(Refused, match="is not a NumPy file of plain arrays") as error:
            read_arrays(tmp_path / file)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500
    with pytest.raises(Refused, match="is not a NumPy file of plain arrays"):
        read_data(tmp_path / "x.npz")


@pytest.mark.usefixtures("little_memory")
def test_an_npz_bomb_is_refused(tmp_path: Path) -> None:
    """The header is correct: a gigabyte of zeros, compressed to a megabyte."""
    packed = zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with packed as archive, archive.open("x.npy", "w", force_zip64=True) as part:
        part.write(header((2**15, 2**12)))
        for _ in range(2**10):
            part.write(bytes(2**20))
    for read in (read_arrays, read_data):
        with pytest.raises(Refused, match=r"unpack from \d+ to 107\d+ bytes; if right, write it by numpy.savez"):
            read(tmp_path / "bomb.npz")


def test_compressed_tables_of_much_the_same_numbers_are_read(tmp_path: Path) -> None:
    """The compression ratio is above 100, but the data fit into memory."""
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((10_000, 300)))
    assert read_arrays(tmp_path / "x.npz")[0].shape == (10_000, 300)
    np.savez(tmp_path / "y.npz", x=np.asfortranarray(np.arange(6.0).reshape(2, 3)), columns=["α", "b", "c"])
    columns, _ = read_arrays(tmp_path / "y.npz")
    assert {name: column.tolist() for name, column in columns.items()} == {"α": [0, 3], "b": [1, 4], "c": [2, 5]}
    with pytest.warns(UserWarning, match="format 3.0"):
        np.save(tmp_path / "named.npy", np.array([(1.0, 2)], dtype=[("φ", "f8"), ("n", "i4")]))
    assert list(read_arrays(tmp_path / "named.npy")[0]) == ["φ", "n"]


def test_damaged_npz_files_are_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((50, 2)))
    whole = (tmp_path / "x.npz").read_bytes()
    for place in range(20, len(whole), 97):
        spoiled = bytearray(whole)
        spoiled[place] ^= 0xFF
        (tmp_path / "y.npz").write_bytes(spoiled)
        try:
            read_arrays(tmp_path / "y.npz")
        except Refused as error:
            assert "\n" not in str(error)  # noqa: PT017
    np.savez(tmp_path / "twice.npz", x=np.ones((3, 2)))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "twice.npz", "a") as archive:
        archive.writestr("x.npy", header((1,)) + bytes(8))
    with pytest.raises(Refused, match="several arrays of one name"):
        read_arrays(tmp_path / "twice.npz")


def test_a_table_without_values_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((0, 3)))
    with pytest.raises(Refused, match="holds no values"):
        read_table_file(tmp_path / "x.npy")


JSON = {
    "deeply nested": ('{"y": ' + "[" * 100_000 + "]" * 100_000 + "}", "is nested too deeply"),
    "nested": ('{"y": ' + "[" * 300 + "1" + "]" * 300 + "}", "lists of unequal lengths"),
    "deep objects": ('{"y":' * 100_000 + "1" + "}" * 100_000, "is nested too deeply"),
    "a name twice": ('{"y": [1.0], "z": 2, "y": [2.0]}', "gives 'y' more than once; keep one of each"),
    "a name twice within": ('{"y": {"a": 1, "a": 2}}', "gives 'a' more than once"),
    "a number of 400 digits": ('{"y": 1' + "0" * 400 + "}", "'y' holds integers beyond 64 bits"),
    "a number of 5000 digits": ('{"y": 1' + "0" * 5000 + "}", "is not JSON"),
    "a list of such": ('{"y": [1.5, 1' + "0" * 400 + "]}", "'y' holds integers beyond 64 bits"),
}


@pytest.mark.parametrize("name", JSON)
def test_hostile_json_is_refused(name: str, tmp_path: Path) -> None:
    text, words = JSON[name]
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(Refused, match=words) as error:
        read_data(tmp_path / "d.json")
    assert "\n" not in str(error.value)
