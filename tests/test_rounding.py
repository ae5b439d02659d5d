"""Round-off of float32 is reported, grows with the condition number of the map, and makes fits warn if it matters."""

import copy
import warnings

import laws
import pytest
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows.flows import Flow
from pyro_flows.transforms import Compose

every_recipe = pytest.mark.parametrize("recipe", ["nsf", "nsf_ar", "maf", "realnvp"])


def shaken(recipe: str, amount: float) -> Flow:
    return laws.randomise(getattr(flows, recipe)(4), scale=amount)


def condition_number(flow: Flow, y: Tensor) -> Tensor:
    """Return the ratio of the extreme singular values of dy/dx, at each row."""

    def to_base(value: Tensor) -> Tensor:
        for transform in reversed(flow.transforms):
            value, _ = transform.inverse_and_log_det(value)
        return value

    singular = torch.linalg.svdvals(torch.func.vmap(torch.func.jacrev(to_base))(y))
    return singular[:, 0] / singular[:, -1]


@every_recipe
def test_round_off_is_about_the_condition_number_times_the_precision(recipe: str) -> None:
    """The flows reach from nearly the identity to flows too steep for float32, whose error is reported."""
    seen = []
    for amount in (0.05, 0.15, 0.3):
        flow = shaken(recipe, amount)
        y = flow().sample((40,))
        kappa = condition_number(flow.double(), y.double()).median()
        error = pf.round_off(flow.float(), y).median()
        seen.append((float(kappa), float(error)))
    for kappa, error in seen:
        if kappa < 1e5:
            assert error < 0.01
    assert seen == sorted(seen)


def test_the_round_off_of_float64_is_none_by_definition() -> None:
    flow = shaken("nsf", 0.3).double()
    assert float(pf.round_off(flow, torch.randn(50, 4, dtype=torch.float64)).max()) == 0


@torch.no_grad()
def test_draws_that_are_scored_in_the_same_pass_are_not_affected() -> None:
    """The log-density that comes with a draw is right where float32 scores the draw tens of nats off."""
    flow = shaken("nsf", 2.0)
    exact = copy.deepcopy(flow).double()
    torch.manual_seed(0)
    y, log_prob = flow.rsample_and_log_prob((500,))
    torch.manual_seed(0)
    x = flow.base().sample((500,)).double()
    _, log_det = Compose(exact.transforms).forward_and_log_det(x)
    error = (log_prob - (exact.base().log_prob(x) - log_det)).abs()
    assert float((flow.log_prob(y) - log_prob).abs().median()) > 10
    assert float(error.quantile(0.9)) < 0.1


def test_a_fit_whose_density_float32_cannot_hold_warns() -> None:
    flow = shaken("nsf", 0.5)
    x = flow().sample((600,))
    with pytest.warns(UserWarning, match=r"round-off moves the log-densities of \d+ of 256 rows.*flow\.double\(\)"):
        pf.fit_density(flow, x, max_epochs=1, lr=1e-8, progress=False)


@pytest.mark.parametrize("build", [flows.nsf, flows.residual_flow, flows.cnf], ids=lambda build: build.__name__)
def test_a_sound_fit_does_not_warn_of_round_off(build: object) -> None:
    x = torch.randn(300, 2) @ torch.tensor([[1.0, 0.5], [0.0, 0.2]])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*round-off")
        pf.fit_density(build(2), x, max_epochs=1, progress=False)


def test_contexts_and_encoders_are_widened_too() -> None:
    flow = laws.randomise(flows.nsf(3, context_dim=2), scale=0.1)
    error = pf.round_off(flow, torch.randn(5, 3), torch.randn(5, 2))
    assert (error.shape, error.dtype) == ((5,), torch.float64)
    assert float(error.max()) < 1e-3
