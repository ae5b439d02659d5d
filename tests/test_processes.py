"""Two processes find the result of one process, and they stop, skip, save and fail together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes_job as job
import pytest
import torch
from filelock import FileLock  # a dependency of torch

from pyro_flows.training import distributed

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
CLOSE = {"rtol": 1e-8, "atol": 1e-10}
pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run_both(folder: Path) -> None:
    """Run two processes in a folder in which one process has left a checkpoint."""
    folder.mkdir()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    left = job.density(checkpoint=folder / "left_by_one", objective=job.At(6, 0, job.interrupt))
    signal.signal(signal.SIGINT, before)
    assert left["stopped"] == "interrupted"
    command = [*TORCHRUN, job.__file__, str(folder)]
    ended = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240, check=False)
    files = [folder / f"found_{rank}" for rank in range(2)]
    assert all(file.exists() for file in files), ended.stderr
    seconds = time.time() - max(file.stat().st_mtime for file in files)
    torch.save((ended.returncode, ended.stderr, seconds), folder / "ended")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return the folder, the results of both processes and their exit; computed once for all workers of pytest."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "pair_of_processes"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            run_both(folder)
    found = [torch.load(folder / f"found_{rank}", weights_only=False) for rank in range(2)]
    return folder, found, torch.load(folder / "ended")


def assert_same(one, two, **close):
    for name in ("losses", "held_out", "state"):
        torch.testing.assert_close(one[name], two[name], equal_nan=True, **close)
    assert [one[k] for k in ("best", "stopped", "skipped")] == [two[k] for k in ("best", "stopped", "skipped")]


@pytest.mark.parametrize("name", [*job.RUNS, "full_disk", "noise", "minibatches"])
def test_both_processes_end_in_one_state(name, pair):
    zero, one = (found[name] for found in pair[1])
    assert_same(zero, one, rtol=0, atol=0)
    assert torch.equal(zero["random"], one["random"])  # so that they also continue with the same numbers


@pytest.mark.parametrize("name", [*job.RUNS, "full_disk"])
def test_two_processes_find_what_one_finds(name, pair):
    found = pair[1][0][name]
    assert_same(job.RUNS.get(name, job.density)(), found, **CLOSE)
    assert found["skipped"] == (name in ("skipped", "unsolved"))


def test_a_checkpoint_that_cannot_be_written_is_told_by_process_0_alone(pair):
    zero, one = (found["full_disk"] for found in pair[1])
    assert ["could not be written (File too large)" in words for words in zero["said"]] == [True, False]
    assert "could not be written at the end" in zero["said"][1]
    assert (one["said"], one["there"]) == ([], False)


def test_a_gradient_that_one_process_lacks_is_zero_there_and_one_that_both_lack_is_none(pair):
    for found in (pair[1][0]["missing"], pair[1][1]["missing"]):
        a, b, c = found["grads"]
        assert (a, b, c) == (torch.tensor(2.25), torch.tensor(1.25).double(), None)
        assert (a.dtype, b.dtype) == (torch.float32, torch.float64)
        assert (found["loss"], found["wishes"]) == (3.5, [True, False])


def test_rounds_divide_the_simulations(pair):
    assert_same(*(found["amortized"]["rounds"] for found in pair[1]), rtol=0, atol=0)


def test_particles_are_divided_and_their_noise_differs(pair):
    """The same noise in both processes would double the variance of the losses."""
    two, one = pair[1][0]["noise"]["losses"], job.noise()["losses"]
    error = (two.var() / len(two) + one.var() / len(one)).sqrt()
    assert (two.mean() - one.mean()).abs() < 4 * error
    # The log ratio of two variances has a standard error of 2 / √400 = 0.1, and somewhat more for heavier tails.
    assert (two.var() / one.var()).log().abs() < 0.4


def test_each_process_takes_minibatches_of_its_own(pair):
    zero, one = (found["minibatches"]["seen"] for found in pair[1])
    assert not any(map(torch.equal, zero, one))


def test_draws_that_each_process_keeps_are_in_the_checkpoint(pair):
    for found in pair[1]:
        runs = found["replayed"]
        assert runs["broken"]["stopped"] == "interrupted"
        assert len(runs["broken"]["losses"]) < len(runs["whole"]["losses"])
        assert_same(runs["whole"], runs["resumed"], rtol=0, atol=0)


def test_ctrl_c_in_one_stops_both_and_the_run_goes_on_in_two_or_one(pair):
    folder, found, _ = pair
    for runs in (found[0]["resumed"], found[1]["resumed"]):
        assert (runs["broken"]["stopped"], len(runs["broken"]["losses"])) == ("interrupted", 6)
    assert found[0]["resumed"]["half"]["stopped"] == "interrupted"
    assert_same(found[0]["loader"], found[0]["resumed"]["loaded"], rtol=0, atol=0)
    whole = found[0]["density"]
    assert_same(whole, found[0]["resumed"]["again"], rtol=0, atol=0)
    assert_same(whole, found[0]["resumed"]["left"], **CLOSE)
    assert_same(whole, job.density(checkpoint=folder / "left_by_two", objective=job.At(0, 0, job.interrupt)), **CLOSE)
    assert "Interrupted" in found[0]["said"]
    assert "Interrupted" not in found[1]["said"]


def test_a_fit_on_a_stream_of_rows_resumes_in_two(pair):
    folder, found, _ = pair
    for runs in (found[0]["resumed_stream"], found[1]["resumed_stream"]):
        assert runs["broken"]["stopped"] == "interrupted"
        assert_same(runs["whole"], runs["resumed"], rtol=0, atol=0)
    assert_same(found[0]["resumed_stream"]["whole"], job.streamed(checkpoint=folder / "streamed"), **CLOSE)


def test_the_number_of_draws_is_that_of_one_process(pair):
    folder, found, _ = pair
    again = job.many_rows(folder / "many_rows")  # refused as another run if the numbers differed
    assert torch.equal(again["losses"], found[0]["many_rows"]["losses"])


def test_what_fails_in_one_fails_in_both(pair):
    zero, one = pair[1]
    assert zero["failed"] == "Parted: process 1 of 2 has failed: KeyError: 'the step of process 1'"
    assert one["failed"] == "KeyError: 'the step of process 1'"
    assert "fit_density: process 1 of 2: KeyError: 'the step of process 1'\n" in one["said"]


def test_a_step_that_ends_the_run_ends_it_in_both_for_the_reason_that_one_knows(pair):
    zero, one = (found["raised"] for found in pair[1])
    assert zero == one
    assert "FloatingPointError: The loss or its gradient was not finite at step 4" in zero
    assert "an equation of process 1" in zero


def test_processes_that_do_not_fit_the_same_are_refused(pair):
    for found in pair[1]:
        different = "ValueError: fit_density: processes 0 and 1 are to fit different things (their data)."
        assert found["refused"].startswith(different)
        assert "fit_svi: num_particles=3 are those of all 2 processes together" in found["uneven"]


FAILURES = {
    "unreadable": (0, "Broken: row 7 of data.csv"),
    "unsendable": (0, "pickle"),
    "gap": (1, "ValueError: fit_density: the data hold NaN or inf in column 1"),
    "ugly": (0, "ArithmeticError: the picture is ugly"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_in_one_outside_of_its_loss_fails_in_both(name, pair):
    rank, said = FAILURES[name]
    told = [found[name] for found in pair[1]]
    assert said in told[rank]
    assert not told[rank].startswith("Parted")
    assert told[1 - rank] == f"Parted: process {rank} of 2 has failed: {told[rank]}"


def test_one_draw_for_each_process_starts_as_two_draws_do(pair):
    assert pair[1][0]["far_off"] < 10


def test_a_process_that_ends_ends_the_job_and_is_named(pair):
    status, said, seconds = pair[2]
    assert status
    assert seconds < 20
    assert "fit_density: process 1 of 2: ValueError: the data hold NaN or inf in column 1 (1 of 150 rows)." in said
    summary = said[said.index("Root Cause") :]
    assert "rank      : 1 " in summary
    assert "ValueError: fit_density: the data hold NaN or inf in column 1" in summary


def test_a_process_alone_makes_no_group():
    assert (distributed.size(), distributed.rank(), distributed.share(7)) == (1, 0, (slice(0, 7), 1.0))
    state = torch.get_rng_state()
    distributed.sync()
    distributed.seed()
    assert (distributed.all_gather(lambda: 1), distributed.broadcast(lambda: 2)) == ([1], 2)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.distributed.is_initialized()
