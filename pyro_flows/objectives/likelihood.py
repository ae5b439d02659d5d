"""Maximum likelihood of a flow, -E log p(x | context), with penalties that keep continuous flows easy to solve."""

from typing import Any

from torch import Tensor, nn

from ..arguments import check_numbers
from ..flows import Flow
from ..flows.continuous import continuous_of, solved


class Likelihood(nn.Module):
    """Maximum likelihood of rows, with optional penalties on the fields of continuous transforms.

    The loss, in nats, is a mean over the rows of a batch.  v is the field along each row's path and J its Jacobian::

        loss = -E log p(x | context) + λ_K E ∫ |v|² dt + λ_J E ∫ |J|² dt

    The penalties prefer fields with straight paths of even speed, which a solver follows in few evaluations (Finlay,
    Jacobsen, Nurbekyan, Oberman 2020, arXiv:2002.02798).  The probes of the divergence also estimate the Frobenius norm
    of J.

    Args:
        kinetic: The weight λ_K of the kinetic energy.
        jacobian: The weight λ_J of the squared Frobenius norm of the Jacobian.

    Raises:
        ValueError: If a weight is negative or not finite.  In use, if there is a penalty but no continuous transform,
            or if one lies inside another transform.

    Example::

        >>> import torch
        >>> from pyro_flows import flows, fit_density
        >>> from pyro_flows.training import Training
        >>> x, flow = torch.randn(20, 2), flows.cnf(2, hidden_dims=(16,))
        >>> torch.equal(Likelihood()(flow, x), -flow.log_prob(x).mean())
        True
        >>> objective = Likelihood(kinetic=0.01, jacobian=0.01)
        >>> fit = fit_density(flow, x, training=Training(objective=objective), max_epochs=1, progress=False)
    """

    in_nats = True
    trains_base = True

    def __init__(self, *, kinetic: float = 0.0, jacobian: float = 0.0) -> None:
        super().__init__()
        check_numbers("Likelihood", least=0, kinetic=kinetic, jacobian=jacobian)
        self.kinetic, self.jacobian = kinetic, jacobian

    def forward(self, flow: Any, x: Tensor, context: Any = None) -> Tensor:
        """Return the loss, a scalar, for rows ``(N, *event_shape)`` and their contexts."""
        if not (self.kinetic or self.jacobian):
            return -flow.log_prob(x, context).mean()
        if not isinstance(flow, Flow):
            got = f"got {type(flow).__name__}. Use flows.cnf(2)"
            raise ValueError(f"Likelihood: flow must be a Flow if there are penalties, {got}.")
        continuous_of(flow, f"Likelihood({self.extra_repr()})")
        _, log_prob, solutions = solved(flow(context), x)
        # Layers without a context cost the same for all contexts, so the costs of the layers broadcast.
        costs = (self.kinetic * found.kinetic + self.jacobian * found.jacobian for found in solutions)
        return sum(costs, -log_prob).mean()

    def extra_repr(self) -> str:
        return f"kinetic={self.kinetic}, jacobian={self.jacobian}"
