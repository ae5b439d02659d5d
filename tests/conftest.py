"""What every test starts from: one seed, no parameters left over, validation on, one thread."""

from __future__ import annotations

import resource
import signal

import pyro
import pytest
import torch


def pytest_sessionstart() -> None:
    # The tensors are tiny: two threads only wait for each other, for minutes where the machine is busy.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_start() -> None:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)


@pytest.fixture
def ctrl_c():
    """Python's own handler, which a shell withholds from what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def small_disk():
    """No file may have more than 20 kB."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
