"""Files of ``pf.save`` for tests of ``pf.load``: a small flow, and changes of what a file holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from pyro_flows.flows import Flow
from pyro_flows.guides.guide_flow import affine_couplings
from pyro_flows.persistence.packing import checksum

Edit = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def small(dim: int = 3) -> Flow:
    return affine_couplings(dim, num_transforms=2, hidden_dims=(8,), activation=torch.nn.ReLU)


def parts_of(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON and the tensors in a file."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["pyro_flows"]), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - the file is no dict


def written(path: Path, text: str, tensors: dict[str, Tensor]) -> None:
    """Write a file with the right checksum."""
    safetensors.torch.save_file(tensors, path, {"pyro_flows": text, "crc32": checksum(text, tensors)})


def edited(path: Path, edit: Edit) -> None:
    """Change what is in a file."""
    content, tensors = parts_of(path)
    edit(content, tensors)
    written(path, json.dumps(content), tensors)
