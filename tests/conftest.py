"""Setup of every test: one seed, an empty parameter store, validation on, one thread; and tests in turns."""

import io
import itertools
import os
import signal
import zlib
from collections.abc import Iterator

import pyro
import pytest
import torch

os.environ["PYRO_FLOWS_COMPILE"] = "graph"  # compilers would take the cores, also those of programs that tests start

from pyro_flows import atomic_files
from pyro_flows.training import loop

TURNS = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--turn", type=int, help=f"run one test in {TURNS}, others for other numbers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (turn := config.getoption("--turn")) is not None:
        chosen = [item for item in items if zlib.crc32(item.nodeid.encode()) % TURNS == turn % TURNS]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def pytest_sessionstart() -> None:
    # The tensors are tiny, so a second thread only adds waiting, up to minutes on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_start() -> None:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)


@pytest.fixture
def double() -> Iterator[None]:
    """Let new tensors have double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[False, True], ids=["store", "local"])
def local_params(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Use Pyro's parameter store, and then parameters stored in modules."""
    with pyro.settings.context(module_local_params=request.param):
        yield request.param


@pytest.fixture
def every_call() -> Iterator[None]:
    """Let each step call the model, for models that count their calls."""
    with pyro.settings.context(pyro_flows_compile="off"):
        yield


@pytest.fixture
def ctrl_c():
    """Restore Python's handler of SIGINT, which a shell withholds from background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each call of the clock advance it by a minute, so that every step ends with a checkpoint."""
    clock = itertools.count(step=60)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))


@pytest.fixture
def small_disk(monkeypatch):
    """Limit every file of ours to 20 kB, until the returned function is called."""
    room = 20_000

    class Small(io.FileIO):
        def write(self, data):
            if self.tell() + memoryview(data).nbytes > room:
                raise OSError(28, "No space left on device")
            return super().write(data)

    def make_room():
        nonlocal room
        room = 10**9

    monkeypatch.setattr(atomic_files, "open", lambda file, _: io.BufferedWriter(Small(file, "w")), raising=False)
    return make_room
