"""Reader of MNIST's four original files."""

import gzip
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def idx(name: str, header: int) -> np.ndarray:
    """Return the bytes of one of MNIST's four files, without its header."""
    here = Path(__file__).resolve()
    path = Path(os.environ.get("PYRO_FLOWS_DATA", here.parents[2] / "shared" / "data")) / "images" / f"{name}-ubyte.gz"
    if not path.is_file():
        sys.exit(
            f"mnist: PYRO_FLOWS_DATA must be a folder with images/{path.name}, got no such file in {path.parent}. Get "
            "MNIST's four files with torchvision.datasets.MNIST(folder, download=True), from folder/MNIST/raw."
        )
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header).copy()


def mnist(part: str) -> tuple[Tensor, Tensor]:
    """Return MNIST's images, ``(N, 1, 28, 28)``, and their classes.  ``part`` is ``"train"`` or ``"t10k"``."""
    pixels = torch.from_numpy(idx(f"{part}-images-idx3", 16)).reshape(-1, 1, 28, 28)
    return pixels, torch.from_numpy(idx(f"{part}-labels-idx1", 8)).long()
