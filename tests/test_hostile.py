"""Files that claim more than they contain: each is an error of one line, within a second, without much memory."""

import contextlib
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from saved_files import Edit, edited, parts_of, small, written
from torch import Tensor

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows.persistence.allowance import Allowance
from pyro_flows.persistence.packing import pack, unpack

ROOT = Path(pf.__file__).parents[1]


def deep(depth: int) -> Any:
    return functools.reduce(lambda inner, _: [inner], range(depth), [1])


def mlp(content: dict[str, Any], **changes: Any) -> None:
    """Change the arguments of a network."""
    content["arguments"]["transforms"][0]["arguments"]["conditioner"]["arguments"].update(changes)


def doubled(content: dict[str, Any], _: dict[str, Tensor]) -> None:
    """Nest a chain of a layer twice in a chain, and so on: 2**40 modules, unless each is counted once."""
    part, place = content["arguments"]["transforms"][0], "transforms[0]" + ".transforms[0]" * 40
    for _ in range(40):
        place = place.removesuffix(".transforms[0]")
        part = {"class": "transforms.Compose", "arguments": {"transforms": [part, {"same": f"{place}.transforms[0]"}]}}
    content["arguments"]["transforms"][0] = part


def one_row() -> None:
    with pyro.plate("p", 1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def in_plate(*plate: Any) -> Edit:
    """Change the plate of the only latent of a guide."""
    return lambda content, _: content["arguments"]["sites"][0]["arguments"].update(plates=[plate])


LARGER = "asks for larger tensors than a file"
SPECS: dict[str, tuple[Edit, str]] = {
    "deep lists": (lambda c, _: mlp(c, hidden_dims=deep(900)), "RecursionError|refuses"),
    "chains of chains": (doubled, "unfolds to more than"),
    "a layer of 4 GB": (lambda c, _: mlp(c, hidden_dims=[32_768, 32_768]), LARGER),
    "a number beyond all": (lambda c, _: mlp(c, hidden_dims=[10**9]), r"hidden_dims\[0\] holds 1000000000, far beyond"),
    "a loop": (lambda c, _: mlp(c, input_dim=10**12), "input_dim holds 1000000000000, far"),
    "layers without end": (lambda c, _: mlp(c, hidden_dims=[1] * 100_000), "asks for more tensors than a file"),
    "an empty matrix as an excuse": (
        lambda c, t: (mlp(c, hidden_dims=[32_768, 32_768]), t.update(more=torch.zeros(0, 2**40))),
        LARGER,
    ),
    "a name of 500 kB": (lambda c, _: c["arguments"].update({"n" * 500_000: [0] * 1000}), "has no argument 'nnn"),
    "a large activation": (lambda c, _: mlp(c, activation={"torch.nn": "Transformer"}), "larger tensors|refuses"),
    "a plate far to the left": (in_plate("p", -(10**9), 1, 1), r"plates\[0\]\[1\] holds -1000000000, far"),
    "a plate of many rows": (in_plate("p", -1, 10**10, 10**10), LARGER),
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
        pf.save(pf.AutoFlow(one_row, small).setup() if "plate" in name else small(), tmp_path / name)
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


def with_header(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Save a flow, and change the header of its file."""
    pf.save(small(), file)
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    edit(header)
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + data[end:])


WEIGHT, BIAS = (f"transforms.0.conditioner.hidden.0.{name}" for name in ("weight", "bias"))
HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "beyond the end": lambda header: header[WEIGHT].update(shape=[2**30], data_offsets=[0, 2**32]),
    "a larger shape": lambda header: header[WEIGHT].update(shape=[10**6, 10**6]),
    "two of the same bytes": lambda header: header[BIAS].update(data_offsets=header[WEIGHT]["data_offsets"]),
    "an unknown dtype": lambda header: header[WEIGHT].update(dtype="F7"),
    "a size that overflows": lambda header: header[WEIGHT].update(shape=[2**40, 2**40]),
    "metadata that are no words": lambda header: header.update(__metadata__={"pyro_flows": 1}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_claim_more_are_refused(name: str, tmp_path: Path) -> None:
    with_header(tmp_path / "flow", HEADERS[name])
    with pytest.raises(ValueError, match=r"^load: .*is not a file of pyro_flows\.save, or was cut off"):
        pf.load(tmp_path / "flow")


@pytest.mark.parametrize("text", ["1", "[]", '{"format": 2}', "{", "[" * 200_000, "1" * 10_000, '{"format": NaN}'])
def test_metadata_that_describe_nothing_are_refused(text: str, tmp_path: Path) -> None:
    pf.save(small(), tmp_path / "flow")
    written(tmp_path / "flow", text, parts_of(tmp_path / "flow")[1])
    with pytest.raises(ValueError, match=r"^load: .*cannot be restored"):
        pf.load(tmp_path / "flow")


def test_no_file_ends_otherwise_than_in_a_refusal(tmp_path: Path) -> None:
    """The test flips bits and truncates files at any place."""
    file, random = tmp_path / "flow", np.random.default_rng(0)
    pf.save(small(), file)
    data = file.read_bytes()
    for number in range(300):
        spoiled = bytearray(data[: random.integers(1, len(data))] if number % 4 == 0 else data)
        for place in random.integers(0, len(spoiled), 1 + number % 3):
            spoiled[place] ^= 1 << random.integers(0, 8)
        file.write_bytes(spoiled)
        with contextlib.suppress(ValueError):
            pf.load(file)


def many_sites() -> None:
    for number in range(60):
        pyro.sample(f"real{number}", dist.Normal(0.0, 1.0))
        pyro.sample(f"simplex{number}", dist.Dirichlet(torch.ones(3)))
        pyro.sample(f"unit{number}", dist.Beta(2.0, torch.ones(2)).to_event(1))


@pytest.mark.parametrize("make", [
    lambda: flows.maf(2, num_transforms=2, hidden_dims=(1500,)),
    lambda: flows.nsf(200, num_transforms=2, hidden_dims=(600,)),
    lambda: flows.maf(1000, num_transforms=3, hidden_dims=(50,)),
    lambda: flows.glow((3, 16, 16), num_steps=8, hidden_dim=128),
    lambda: flows.tarflow((1, 8, 8)),
    lambda: flows.sylvester_flow(400, num_transforms=4),
    lambda: pf.AutoFlow(many_sites, lambda dim: flows.realnvp(dim, num_transforms=1, hidden_dims=(4,))).setup(),
])  # fmt: skip
def test_large_flows_stay_far_within_their_allowance(make: Callable[[], torch.nn.Module]) -> None:
    """Large flows and guides of many sites load even with half of the limits."""
    flow = make()
    content, tensors = pack(flow)
    limit = Allowance(tensors.values())
    limit.bytes_left, limit.tensors_left = limit.bytes_left // 2, limit.tensors_left // 2
    with limit:
        state = unpack(content, tensors).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in flow.state_dict().items())


def test_a_long_row_in_the_file_allows_no_large_matrix() -> None:
    """The file has 60 kB, but the square of its longer side would be gigabytes."""
    assert Allowance([torch.zeros(1, 60_000, dtype=torch.uint8)]).bytes_left < 60e6


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
def test_operations_are_refused_before_they_make_large_tensors(name: str) -> None:
    with pytest.raises(ValueError, match=LARGER), Allowance([torch.ones(250)]), torch.device("cpu"):
        LARGE[name]()


def test_small_results_of_all_kinds_are_let_through_unchanged() -> None:
    with Allowance([torch.ones(250)]), torch.device("cpu"):
        seeded = torch.randn(3, generator=torch.Generator().manual_seed(1))
        assert torch.equal(seeded, torch.randn(3, generator=torch.Generator().manual_seed(1)))
        assert torch.broadcast_shapes((3, 1), (4,)) == (3, 4)
        assert torch.linalg.qr(torch.eye(3)).R.device.type == "cpu"
        assert torch.bincount(torch.tensor([0, 2, 2])).tolist() == [1, 0, 2]
        assert torch.arange(5)[torch.arange(5) > 2].tolist() == [3, 4]


def test_metadata_of_null_are_refused(tmp_path: Path) -> None:
    header = b'{"__metadata__":null}'
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"is not a file of pyro_flows\.save"):
        pf.load(tmp_path / "file")
