"""What every test starts from: one seed, no parameters left over, validation on."""

from __future__ import annotations

import pyro
import pytest
import torch


def pytest_sessionstart() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def clean_start() -> None:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)
