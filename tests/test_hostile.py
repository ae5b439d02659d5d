"""Files that ask for more than they hold end in one line, in a second, and take no memory; each is made here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_flows as pf
from pyro_flows import flows

ROOT = Path(pf.__file__).parents[1]


def small() -> flows.Flow:
    return flows.realnvp(3, num_transforms=2, hidden_dims=(8,))


def nested(depth: int) -> Any:
    """A tuple of two that are one and the same, and so on: 2**depth nodes in a few bytes each."""
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
    """The arguments of a network."""
    return content["spec"]["arguments"]["transforms"][0]["arguments"]["conditioner"]["arguments"]


def cyclic(content: dict[str, Any]) -> None:
    own: list[Any] = []
    own.append(own)
    mlp(content).update(hidden_dims=own)


def keyed(content: dict[str, Any]) -> None:
    content["spec"]["arguments"][nested(15)] = 1  # hashing more would take the test for ever


def with_site(plate: tuple[str, int, int, int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A guide with one latent, in a plate."""
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
    "shared tuples as a key": (keyed, "keys that are neither words nor numbers"),
    "shared tuples frozen": (lambda c: c["spec"].update(frozen=[nested(40)]), "unfold to more than the"),
    "a list in itself": (cyclic, "nested more than 100 deep|unfold"),
    "deep tuples": (lambda c: mlp(c).update(hidden_dims=deep(500)), "nested more than 100 deep"),
    "a layer of 4 GB": (lambda c: mlp(c).update(hidden_dims=(32_768, 32_768)), "asks for larger tensors than a file"),
    "a number beyond all": (lambda c: mlp(c).update(hidden_dims=WIDE), "hidden_dims holds 0x3b9aca00, beyond the"),
    "a loop": (lambda c: mlp(c).update(input_dim=10**12), "input_dim holds 0x"),
    "layers without end": (lambda c: mlp(c).update(hidden_dims=LONG), "asks for more tensors than a file"),
    "a number of a megabyte": (lambda c: mlp(c).update(input_dim=1 << 2**21), "input_dim holds 0x"),
    "a large activation": (lambda c: mlp(c).update(activation={"torch.nn": "Transformer"}), "larger tensors|refuses"),
    "a plate far to the left": (with_site(("p", -(10**9), 1, 1)), "plates holds -0x3b9aca00"),
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


def test_small_files_cost_little(tmp_path: Path) -> None:
    """In a process of its own, whose memory is measured."""
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
        assert float(seconds) < 10, line  # on a quiet machine below one
        assert int(megabytes) < 100, line
