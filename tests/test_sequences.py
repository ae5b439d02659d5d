"""Recurrences, networks along steps, and coefficients that are given, beyond the laws of all transforms."""

import laws
import pytest
import torch

from pyro_flows.bijectors import Affine
from pyro_flows.conditioners import Given, StepNet
from pyro_flows.transforms import Elementwise, Recurrence
from pyro_flows.transforms.recurrence import Process, recur


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 16, 33])
@pytest.mark.parametrize("width", [1, 2, 6])
def test_the_scan_is_the_loop(steps: int, width: int) -> None:
    matrix = laws.normal(steps, width, width, seed=1) / width
    x, e, wanted = laws.normal(4, steps, width), torch.zeros(4, width, dtype=torch.float64), []
    for step in range(steps):
        e = e @ matrix[step].T * (step > 0) + x[:, step]
        wanted.append(e)
    torch.testing.assert_close(recur(matrix, x), torch.stack(wanted, 1), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("steps", "width"), [(5, 1), (4, 3), (1, 2)])
def test_a_process_is_the_map_of_its_tensors(steps: int, width: int) -> None:
    """Tensors may have a batch; both directions and the log-determinant are those of autograd."""
    loc, scale = laws.normal(6, steps, width), laws.normal(6, steps, width, width, seed=1).tril()
    matrix = laws.normal(6, steps, width, width, seed=2)
    process, x = Process(loc, matrix, scale), laws.normal(6, steps * width, seed=3)
    y, log_det = process.forward_and_log_det(x)
    back, back_log_det = process.inverse_and_log_det(y)
    torch.testing.assert_close(back, x, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(back_log_det, -log_det)
    for row in range(6):
        one = Process(loc[row], matrix[row], scale[row])
        jacobian = torch.autograd.functional.jacobian(lambda z, one=one: one.forward_and_log_det(z)[0], x[row])
        torch.testing.assert_close(log_det[row], torch.linalg.slogdet(jacobian).logabsdet, atol=1e-8, rtol=1e-8)


def test_steps_depend_on_neighbours_alone() -> None:
    """Each hidden layer sees one step further, so that time and memory are proportional to the steps."""
    net = laws.randomise(StepNet([False] * 20, 20, 2, (4,)).double())
    assert net(torch.zeros(0, dtype=torch.float64)).shape == (20, 2)
    mask = [place % 2 == 0 for place in range(20)]
    net = laws.randomise(StepNet(mask, 20, 2, (4, 4)).double())
    x = laws.normal(10).requires_grad_()
    (grad,) = torch.autograd.grad(net(x)[5].sum(), x)  # the feature at step 11, two steps from 10 and from 12
    assert grad.nonzero().flatten().tolist() == [5, 6]


def test_coefficients_are_linear_in_the_last_inputs() -> None:
    net = Given(2 * 2 * 3 + 1 + 2, 2, 2, num_factors=2)
    x = laws.normal(4, net.input_dim)
    constant, first, second = x[:, :12].unflatten(1, (3, 4)).unbind(1)
    wanted = constant + first * x[:, -2:-1] + second * x[:, -1:]
    torch.testing.assert_close(net(x).mT.flatten(1), wanted)
    assert torch.equal(Given(7, 2, 3)(x[:, :7]).mT.flatten(1), x[:, :6])
    layer = Elementwise(Affine(), 2, net)
    assert torch.equal(layer.forward_and_log_det(torch.ones(2).double(), torch.zeros(15).double())[0], torch.ones(2))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Recurrence(0), r"Recurrence: steps must be an integer of at least 1, got 0"),
        (lambda: Recurrence(3, 2, StepNet([False] * 6, 3, 3)), r"Recurrence: conditioner must have .* = \(6, 4\)"),
        (lambda: StepNet([False] * 5, 2, 1), r"StepNet: mask must hold 2 steps and a False, got "),
        (lambda: StepNet([True] * 4, 2, 1), r"StepNet: mask must hold 2 steps and a False, got "),
        (lambda: StepNet([False] * 4, 2, 1, (4, 8)), r"StepNet: hidden_dims must be alike, got \(4, 8\)"),
        (lambda: Given(4, 1, 2, 1), r"Given: input_dim must be at least 5 for these sizes, got 4"),
    ],
)
def test_errors_name_argument_and_value(build, words) -> None:
    with pytest.raises(ValueError, match=words):
        build()
