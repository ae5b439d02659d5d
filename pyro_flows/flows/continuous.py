"""Recipes of continuous flows: points follow a vector field from the base to the data."""

from functools import partial

from torch import Tensor, nn

from ..arguments import Activation, Widths, suggests_keywords
from ..conditioners import MLPField
from ..transforms import Continuous
from ..transforms.continuous import DEFAULT, Solution, Solver
from .arguments import checked_sizes
from .distribution import FlowDistribution
from .flow import Flow


def continuous_of(flow: Flow, caller: str) -> list[Continuous]:
    """Return the continuous transforms of a flow.

    Raises:
        ValueError: If the flow has no continuous transform, or has one inside of another transform.
    """
    found = [part for part in flow.transforms if isinstance(part, Continuous)]
    hidden = sum(isinstance(part, Continuous) for part in flow.modules()) - len(found)
    if hidden or not found:
        names = ", ".join(dict.fromkeys(type(part).__name__ for part in flow.transforms))
        what = f"{hidden} of them inside of others" if hidden else "none"
        needs = "it needs continuous transforms in the list of the flow itself, as flows.cnf has them"
        raise ValueError(f"{caller}: {needs}; among its {names} there are {what}.")
    return found


def solved(flow: FlowDistribution, x: Tensor, num_probes: int | None = None) -> tuple[Tensor, Tensor, list[Solution]]:
    """Follow rows from data to base, with the costs of the paths.

    Returns:
        The places in the base, ``(*batch, D)``, the log-densities of the rows, ``(*batch)``, and the solution of each
        continuous transform.
    """
    log_prob, solutions = x.new_zeros(x.shape[:-1]), []
    for view in reversed(flow.transforms):
        if isinstance(view.transform, Continuous):
            solutions.append(view.transform.solve(x, view.context, inverse=True, costs=True, num_probes=num_probes))
            x, log_det = solutions[-1][:2]
        else:
            x, log_det = view.transform.inverse_and_log_det(x, view.context)
        log_prob = log_prob + log_det
    return x, log_prob + flow.base_dist.log_prob(x), solutions


@suggests_keywords
def cnf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 1,
    hidden_dims: Widths = (64, 64),
    activation: Activation = nn.SiLU,
    solver: Solver = DEFAULT,
) -> Flow:
    """Continuous normalizing flow (Chen et al. 2018, arXiv:1806.07366), with exact divergences.

    A point of the base x(0) follows a network v, a field of velocities, to the data x(1)::

        dx/dt = v(t, x, context),    log p(x(1)) = log p_base(x(0)) - ∫₀¹ tr ∂v/∂x dt

    Densities and samples cost the same, one solve, whose number of evaluations of the field depends on the tolerances.
    With one or two hidden layers the exact divergence costs at most as much as the field, in any dimension.  A flow of
    one transform can also be trained without a solve, by :class:`~pyro_flows.objectives.FlowMatching`.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of fields, one after the other.
        hidden_dims: The widths of the hidden layers of each field.
        activation: The class of the nonlinearity: ``torch.nn``'s ``ELU``, ``SiLU``, ``Softplus`` or ``Tanh``.
        solver: The method and its settings, such as ``Solver("rk4", num_steps=10)`` of ``pyro_flows.transforms``.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If an argument is out of its range.
        FloatingPointError: In use, if the field is too stiff for the solver, or not finite on the path.

    Example::

        >>> import torch
        >>> flow = cnf(4)
        >>> round(flow().log_prob(torch.zeros(4)).item(), 3)  # at the start it is the standard normal
        -3.676
    """
    checked_sizes("cnf", input_dim, context_dim, num_transforms, hidden_dims)
    field = partial(MLPField, input_dim, context_dim, hidden_dims, activation=activation)
    return Flow(Continuous(field(), solver, exact=True) for _ in range(num_transforms))


@suggests_keywords
def ffjord(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 1,
    hidden_dims: Widths = (64, 64, 64),
    activation: Activation = nn.SiLU,
    exact: bool = False,
    num_probes: int = 1,
    solver: Solver = DEFAULT,
) -> Flow:
    """Free-form continuous flow (Grathwohl et al. 2018, arXiv:1810.01367): divergences estimated without bias.

    It is :func:`cnf` with tr ∂v/∂x = E εᵀ (∂v/∂x) ε estimated by a few random vectors ε, fixed along a path.
    Log-densities differ from call to call, by torch's generators.  With several probes
    :func:`~pyro_flows.ode_report` reports their standard error.  They are unbiased, but importance weights, as in
    :func:`~pyro_flows.psis`, are not: set ``exact`` before.  With at most two hidden layers :func:`cnf` is as fast, and
    exact.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of fields, one after the other.
        hidden_dims: The widths of the hidden layers of each field.
        activation: The class of the nonlinearity: ``torch.nn``'s ``ELU``, ``SiLU``, ``Softplus`` or ``Tanh``.
        exact: True for exact divergences; in a trained flow, set ``exact`` of its transforms.
        num_probes: The number of random vectors ε of an estimate.
        solver: The method and its settings, such as ``Solver("rk4", num_steps=10)`` of ``pyro_flows.transforms``.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If an argument is out of its range.
        FloatingPointError: In use, as for :func:`cnf`.

    Example::

        >>> import torch
        >>> flow = ffjord(40, num_probes=4)
        >>> flow().log_prob(torch.zeros(3, 40)).shape
        torch.Size([3])
    """
    checked_sizes("ffjord", input_dim, context_dim, num_transforms, hidden_dims)
    field = partial(MLPField, input_dim, context_dim, hidden_dims, activation=activation)
    return Flow(Continuous(field(), solver, exact=exact, num_probes=num_probes) for _ in range(num_transforms))
