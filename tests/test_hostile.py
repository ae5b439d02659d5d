"""Files that claim more than they contain: each is an error of one line, within a second, without much memory."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows.guides.default_flows import affine_couplings
from pyro_flows.persistence import safe_archive, size_limit
from pyro_flows.persistence.safe_archive import Archive

ROOT = Path(pf.__file__).parents[1]


def small() -> flows.Flow:
    return affine_couplings(3, num_transforms=2, hidden_dims=(8,))


def nested(depth: int) -> Any:
    """Return a nested pair of identical tuples, with 2**depth nodes in a few bytes per level."""
    found: Any = (1,)
    for _ in range(depth):
        found = (found, found)
    return found


def deep(depth: int) -> Any:
    found: Any = (1,)
    for _ in range(depth):
        found = (found,)
    return found


def edited(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    pf.save(small(), file)
    content = torch.load(file, weights_only=True)
    torch.save(edit(content) or content, file)


def mlp(content: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a network."""
    return content["spec"]["arguments"]["transforms"][0]["arguments"]["conditioner"]["arguments"]


def cyclic(content: dict[str, Any]) -> None:
    own: list[Any] = []
    own.append(own)
    mlp(content).update(hidden_dims=own)


def keyed(content: dict[str, Any]) -> None:
    content["spec"]["arguments"][nested(15)] = 1  # hashing a deeper tuple would not end


def with_site(plate: tuple[str, int, int, int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a guide with one latent, in a plate."""
    site = {
        "name": "z",
        "support": {"class": "constraints.real", "arguments": {}},
        "value": torch.zeros(1),
        "batch_shape": (1,),
        "event_shape": (),
        "plates": (plate,),
    }

    def edit(content: dict[str, Any]) -> dict[str, Any]:
        arguments = {
            "sites": [{"class": "guides.Site", "arguments": site}],
            "flow": {"class": "flows.Flow", "arguments": content["spec"]["arguments"]},
            "encoder": None,
            "context_dim": 0,
            "init_scale": 0.1,
            "name": "g",
        }
        spec = {"class": "guides.AutoFlow", "arguments": arguments, "frozen": [], "dtypes": {}}
        return {**content, "spec": spec}

    return edit


WIDE, LONG = (10**9,), (1,) * 100_000
SPECS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "shared tuples": (lambda c: mlp(c).update(hidden_dims=nested(40)), "its data unfold to more than the"),
    "shared tuples in the state": (lambda c: c["state"].update(more=nested(40)), "unfold to more than the"),
    "shared tuples as a key": (keyed, "keys that are neither strings nor integers"),
    "shared tuples frozen": (lambda c: c["spec"].update(frozen=[nested(40)]), "unfold to more than the"),
    "a list in itself": (cyclic, "nested more than 100 deep|unfold"),
    "deep tuples": (lambda c: mlp(c).update(hidden_dims=deep(500)), "nested more than 100 deep"),
    "a layer of 4 GB": (lambda c: mlp(c).update(hidden_dims=(32_768, 32_768)), "asks for larger tensors than a file"),
    "a number beyond all": (
        lambda c: mlp(c).update(hidden_dims=WIDE),
        r"hidden_dims\[0\] holds 1000000000, far beyond the bytes",
    ),
    "a loop": (lambda c: mlp(c).update(input_dim=10**12), "input_dim holds 1000000000000, far"),
    "layers without end": (lambda c: mlp(c).update(hidden_dims=LONG), "asks for more tensors than a file"),
    "a number of a megabyte": (lambda c: mlp(c).update(input_dim=1 << 2**21), "nothing of it was run"),
    "an empty matrix as an excuse": (
        lambda c: (
            mlp(c).update(hidden_dims=(32_768, 32_768)),
            c["state"].update(more=torch.zeros(0, 2**40)),
        )[:0],
        "asks for larger tensors than a file",
    ),
    "a name of 500 kB": (lambda c: c["spec"]["arguments"].update({"n" * 500_000: [0] * 1000}), "names of more than"),
    "a large activation": (lambda c: mlp(c).update(activation={"torch.nn": "Transformer"}), "larger tensors|refuses"),
    "a plate far to the left": (with_site(("p", -(10**9), 1, 1)), r"plates\[0\]\[1\] holds -1000000000, far"),
    "a plate of many rows": (with_site(("p", -1, 10**10, 10**10)), "asks for larger tensors"),
}
LIMITED = """
import resource, sys, time
import pyro_flows as pf

pf.load(sys.argv[1])  # what is loaded lazily is loaded by now
began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sys.argv[2:]:
    try:
        pf.load(file)
        print("loaded", flush=True)
    except ValueError as error:
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        print(f"{time.perf_counter() - began:.2f} {more} {error}".replace(chr(10), " "), flush=True)
    began = time.perf_counter()
"""


@pytest.mark.slow
def test_small_files_cost_little(tmp_path: Path) -> None:
    """The memory is measured in a separate process."""
    pf.save(small(), tmp_path / "good")
    for name, (edit, _) in SPECS.items():
        edited(tmp_path / name, edit)
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "good"), *(str(tmp_path / name) for name in SPECS)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
    lines = ended.stdout.splitlines()
    assert len(lines) == len(SPECS), ended.stderr
    for line, (name, (_, words)) in zip(lines, SPECS.items(), strict=True):
        seconds, megabytes, said = line.split(" ", 2)
        assert said.startswith(f"load: '{tmp_path / name}'"), line
        with pytest.raises(ValueError, match=words):
            raise ValueError(said)
        assert len(said) < 900
        assert float(seconds) < 10, line  # below one second on an idle machine
        assert int(megabytes) < 100, line


def parts_of(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as found:
        return {name: found.read(name) for name in found.namelist()}


def rewritten(file: Path, edit: Callable[[dict[str, bytes]], Any], kind: int = zipfile.ZIP_STORED) -> None:
    """Change the parts of a saved flow."""
    pf.save(small(), file)
    parts = parts_of(file)
    edit(parts)
    with zipfile.ZipFile(file, "w", kind) as new:
        for name, content in parts.items():
            new.writestr(name, content)


def refused(file: Path) -> str:
    began = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"^load: '{file}' ") as error:
            pf.load(file)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 10  # below a tenth of a second on an idle machine
    return str(error.value)


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb"
    rewritten(file, lambda parts: parts.update({"archive/data/0": bytes(10**8)}), zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 200_000
    assert "its parts are compressed or encrypted" in refused(file)


def test_parts_that_claim_to_be_larger_than_the_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "flow"
    pf.save(small(), file)
    raw = bytearray(file.read_bytes())
    place = raw.rindex(b"PK\x01\x02")  # the directory states a size of a gigabyte for the last part
    raw[place + 20 : place + 28] = struct.pack("<II", 2**30, 2**30)
    file.write_bytes(raw)
    assert "its parts claim to be larger than it is" in refused(file)


def test_parts_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "flow"
    rewritten(file, lambda parts: parts.update({"archive/DATA/0": b"x"}))
    assert "it has parts of one name" in refused(file)


def test_a_tensor_has_no_more_numbers_than_its_part(tmp_path: Path) -> None:
    """torch would read the memory beyond the part."""
    file = tmp_path / "flow"
    rewritten(file, lambda parts: parts.update({"archive/data/3": parts["archive/data/3"][:4]}))
    assert "numbers, which its part '3' has not" in refused(file)


def pickled(content: Any) -> bytes:
    """Return a file of torch.save, as bytes."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, file)
    return file.getvalue()


def test_a_stride_that_repeats_numbers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "flow"
    edited(file, lambda c: c["state"].update({next(iter(c["state"])): torch.ones(1).expand(10**6, 10**6)}))
    assert "a tensor of shape (1000000, 1000000) is to be made of 1 numbers" in refused(file)


def test_a_function_is_called_with_a_short_tuple_only(tmp_path: Path) -> None:
    """If many calls unpack a long string, time and memory are unbounded."""
    text = b"X" + struct.pack("<I", 300_000) + b"a" * 300_000 + b"q\x01"
    start = b"\x80\x02]ctorch._utils\n_rebuild_parameter\nq\x00" + text + b"\x86a"
    pickle_of_calls = start + b"(" + b"h\x00h\x01R" * 60_000 + b"e."
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle_of_calls)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"a\.pt"):
        pf.load(tmp_path / "a.pt")
    assert time.perf_counter() - began < 5


def test_files_of_machines_with_another_order_of_bytes_are_read(tmp_path: Path) -> None:
    file, flow = tmp_path / "flow", small().double()
    pf.save(flow, file)
    parts = parts_of(file)
    found = Archive(io.BytesIO(file.read_bytes()))
    widths = {key: values.itemsize for key, values in found._storages.items()}
    with zipfile.ZipFile(file, "w") as new:
        for name, content in parts.items():
            width = widths.get(name.rpartition("/")[2], 1) if "/data/" in name else 1
            swapped = np.frombuffer(content, f"u{width}").byteswap().tobytes() if width > 1 else content
            other = {"little": b"big", "big": b"little"}[sys.byteorder]
            new.writestr(name, other if name.endswith("byteorder") else swapped)
    state = pf.load(file).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in flow.state_dict().items())


def test_what_is_read_is_what_torch_reads(tmp_path: Path) -> None:
    """The test covers all dtypes, shapes, strides, shared storages, and other objects in checkpoints."""
    base = torch.arange(24.0)
    content = {
        "views": [base[3:9].view(2, 3).T, base, torch.zeros(0, 3), torch.tensor(5)],
        "dtypes": [base.to(dtype) for dtype in safe_archive.DTYPES.values()],
        "plain": (1, -2.5, None, True, "word", [], {}, 2**40, {3: (1, 2, 3)}),
        "parameter": torch.nn.Parameter(base[:2]),
        "state": torch.nn.Linear(2, 3).state_dict(),
    }
    file = tmp_path / "file"
    torch.save(content, file)
    with file.open("rb") as stream:
        found = Archive(stream).content
    wanted = torch.load(file, weights_only=True)
    assert repr(found) == repr({**wanted, "parameter": wanted["parameter"].data})
    assert found["views"][0].stride() == (1, 3)
    found["views"][1][3] = -1
    assert found["views"][0][0, 0] == -1  # they still share a storage


@pytest.mark.parametrize("value", [np.ones(2), torch.float32, slice(3), {(1, 2): 3}, torch.ones(2).to_sparse()])
def test_what_is_not_plain_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"_reconstruct|dtype|slice|strings nor integers|sparse|float32|a call|opcode"):
        Archive(io.BytesIO(pickled({"a": value})))


def test_no_pickle_ends_otherwise_than_in_a_refusal() -> None:
    """The test flips bits and truncates files at any place."""
    whole = pickled({"state": {"a": torch.ones(2)}, "spec": [(1, 2.0, "x"), None]})
    with zipfile.ZipFile(io.BytesIO(whole)) as found:
        parts = {name: found.read(name) for name in found.namelist()}
    data, random = parts["archive/data.pkl"], np.random.default_rng(0)
    for number in range(400):
        spoiled = bytearray(data[: random.integers(1, len(data))] if number % 4 == 0 else data)
        for place in random.integers(0, len(spoiled), 1 + number % 3):
            spoiled[place] ^= 1 << random.integers(0, 8)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as new:
            for name, content in parts.items():
                new.writestr(name, bytes(spoiled) if name.endswith("data.pkl") else content)
        with contextlib.suppress(ValueError):
            Archive(file)


@pytest.mark.parametrize("make", [
    lambda: flows.maf(2, num_transforms=2, hidden_dims=(1500,)),
    lambda: flows.nsf(200, num_transforms=2, hidden_dims=(600,)),
    lambda: flows.maf(1000, num_transforms=3, hidden_dims=(50,)),
    lambda: flows.glow((3, 16, 16), num_steps=8, hidden_dim=128),
    lambda: flows.tarflow((1, 8, 8)),
    lambda: flows.sylvester_flow(400, num_transforms=4),
])  # fmt: skip
def test_large_flows_stay_far_within_their_allowance(
    make: Callable[[], flows.Flow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large flows load even with half of the limits."""
    halve(monkeypatch)
    flow = make()
    pf.save(flow, tmp_path / "flow")
    state = pf.load(tmp_path / "flow").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in flow.state_dict().items())


def test_guides_of_many_sites_stay_far_within_their_allowance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> None:
        for number in range(60):
            pyro.sample(f"real{number}", dist.Normal(0.0, 1.0))
            pyro.sample(f"simplex{number}", dist.Dirichlet(torch.ones(3)))
            pyro.sample(f"unit{number}", dist.Beta(2.0, torch.ones(2)).to_event(1))

    halve(monkeypatch)
    guide = pf.AutoFlow(model, lambda dim: flows.realnvp(dim, num_transforms=1, hidden_dims=(4,))).setup()
    pf.save(guide, tmp_path / "guide")
    assert len(pf.load(tmp_path / "guide").sample(3)) == 180


def halve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halve the limits."""
    for name in ("FREE_BYTES", "TIMES_BYTES", "TIMES_SQUARES", "FREE_TENSORS", "TIMES_TENSORS"):
        monkeypatch.setattr(size_limit, name, getattr(size_limit, name) // 2)


def test_a_long_row_in_the_file_allows_no_large_matrix() -> None:
    """The file has 60 kB, but the square of its longer side would be gigabytes."""
    assert size_limit.Allowance(60_000, 1, 60_000**2).bytes_left < 60e6


ROW = torch.ones(20_000)
LARGE: dict[str, Callable[[], object]] = {
    "outer": lambda: torch.outer(ROW, ROW),
    "diagonal": lambda: torch.diag(ROW),
    "identity": lambda: torch.eye(10**6),
    "padded": lambda: torch.nn.functional.pad(ROW, (0, 10**10)),
    "a sum of a view": lambda: ROW.expand(10**6, -1) + 0,
    "a stack": lambda: torch.stack([ROW] * 100_000),
    "resized": lambda: torch.ones(1).resize_(10**9),
    "by its values": lambda: torch.bincount(torch.tensor([10**10])),
    "repeated by its values": lambda: ROW.repeat_interleave(torch.tensor(10**6)),
    "random, with a generator": lambda: torch.randn(10**6, 10**6, generator=torch.Generator()),
    "random, without a device": lambda: torch.normal(0.0, 1.0, (10**6, 10**6)),
    "beyond all memory": lambda: torch.empty(2**40, 2**40),
}


@pytest.mark.parametrize("name", LARGE)
def test_functions_are_refused_before_they_make_large_tensors(name: str) -> None:
    limit = size_limit.Allowance(1000, 3, 10)
    with pytest.raises(ValueError, match="asks for larger tensors"), limit, torch.device("cpu"):
        LARGE[name]()


def test_small_results_of_all_kinds_are_let_through_unchanged() -> None:
    with size_limit.Allowance(1000, 3, 10), torch.device("cpu"):
        seeded = torch.randn(3, generator=torch.Generator().manual_seed(1))
        assert torch.equal(seeded, torch.randn(3, generator=torch.Generator().manual_seed(1)))
        assert torch.broadcast_shapes((3, 1), (4,)) == (3, 4)
        assert torch.linalg.qr(torch.eye(3)).R.device.type == "cpu"
        assert torch.bincount(torch.tensor([0, 2, 2])).tolist() == [1, 0, 2]
        assert torch.arange(5)[torch.arange(5) > 2].tolist() == [3, 4]
