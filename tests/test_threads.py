"""Small jobs use one thread, slow ones as many as help, and afterwards the number of threads is restored."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows import AutoFlow, check, fit_density, fit_svi, flows
from pyro_flows.programs.density import Density
from pyro_flows.programs.model_and_guide import Task
from pyro_flows.threads import TRIED, Threads, allowed, using


@pytest.fixture(autouse=True)
def two():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_fits_and_checks_of_small_models_use_one_thread_and_restore_it():
    seen: list[int] = []

    def model():
        seen.append(torch.get_num_threads())
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoFlow(model).setup()
    seen.clear()
    fit_svi(model, guide, steps=30, progress=False)
    assert torch.get_num_threads() == 2
    check(model, guide)
    assert torch.get_num_threads() == 2
    assert len(seen) > 50
    assert {*seen} == {1}


def test_densities_too():
    fit_density(flows.nice(2, num_transforms=1, hidden_dims=(8,)), torch.randn(100, 2), max_epochs=1, progress=False)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_model_of_many_rows_tries_all_threads(draws, gradient):
    seen = []

    def large():
        seen.append(torch.get_num_threads())
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        mean = x.unsqueeze(-1).expand([*x.shape, 300_000])
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.zeros(300_000))

    space = Density(Task(large, AutoFlow(large).setup(), (), {}))
    assert space.task.model.chunk == 1
    z, seen[:] = torch.zeros(draws, 1, requires_grad=gradient), []
    # A graph would not run the model.
    with using(1), torch.set_grad_enabled(gradient), pyro.settings.context(pyro_flows_compile="off"):
        for _ in range(TRIED + 1):
            space.log_prob(z)
            assert torch.get_num_threads() == 1
    assert seen[:TRIED] == [1] * TRIED
    assert seen[TRIED] == 2


def test_a_step_within_a_step_leaves_the_number_alone():
    threads = Threads()
    with using(1):
        for _ in range(TRIED):
            with threads.turn(1):
                assert torch.get_num_threads() == 1
        with threads.turn(1):
            assert torch.get_num_threads() == 2
            with threads.turn(1):
                assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), threads.turn(1):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 1


def test_a_large_part_of_a_job_takes_what_the_user_allows():
    with using(1):
        with using(1), using(8):
            assert torch.get_num_threads() == allowed() == 2
        assert torch.get_num_threads() == 1
    torch.set_num_threads(1)
    assert allowed() == 1  # again for the next job


def test_the_number_that_a_user_allows_is_the_most():
    torch.set_num_threads(1)
    with using(2):
        assert torch.get_num_threads() == 1


TIMES = {  # work, seconds of a step at first and later, and the number of threads after each
    "small": (1e6, (0.2, 0.2, 0.2), [1, 1, 1]),
    "faster": (1e9, (0.2, 0.1, 0.1), [2, 2, 2]),
    "no faster": (1e9, (0.2, 0.19, 0.2), [2, 1, 1]),
    "busy later": (1e9, (0.2, 0.1, 0.4), [2, 2, 1]),
}


@pytest.mark.parametrize(("work", "times", "wanted"), TIMES.values(), ids=TIMES)
def test_large_steps_try_more_and_keep_them_while_they_are_faster(work, times, wanted):
    threads, found = Threads(work), []
    with using(1):
        for seconds in times:
            for _ in range(TRIED):
                threads.saw(seconds)
            found.append(threads.number)
    assert found == wanted
    assert torch.get_num_threads() == 2
