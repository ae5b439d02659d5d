"""Flow matching: train the field of a continuous flow by regression, without solving it.

With a draw x₀ of the base and a row x₁ of the data, the point x_t = (1 - (1 - σ) t) x₀ + t x₁ moves along a line.  The
field that minimises

    E |v(t, x_t, context) - (x₁ - (1 - σ) x₀)|²,    t in [0, 1],

is the mean velocity of all lines through a point, and leads the base to the data, blurred by σ.  Rows and draws that
are paired by optimal transport within each batch cross less, so the field is simpler.

Flow Matching for Generative Modeling (Lipman, Chen, Ben-Hamu, Nickel, Le 2022, arXiv:2210.02747); Improving and
Generalizing Flow-Based Generative Models with Minibatch Optimal Transport (Tong et al. 2023, arXiv:2302.00482); Flow
Matching for Scalable Simulation-Based Inference (Dax et al. 2023, arXiv:2305.17161).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_choice, check_numbers
from ..bijectors import Affine, SoftplusAffine
from ..flows import Flow
from ..transforms import ActNorm, Continuous, Elementwise, FixedAffine, FlowTransform, LULinear, ScaledLinear

MOST_PAIRED = 128  # rows; the time of the search grows with the cube of their number


class FlowMatching(nn.Module):
    """The mean squared error of a continuous flow's field, against the velocities of lines from base to data.

    With a draw x₀ of the base, a row x₁ of the data and a time t in [0, 1]::

        loss = E |v(t, x_t, context) - (x₁ - (1 - σ) x₀)|²,    x_t = (1 - (1 - σ) t) x₀ + t x₁

    No equation is solved.  The loss is in squares of standardised units, not in nats, and not zero at the best field:
    it compares states of one flow on the same data.  Afterwards the flow is like any other: ``flow.log_prob`` solves
    for exact densities.  After Lipman, Chen, Ben-Hamu, Nickel, Le 2022, arXiv:2210.02747; pairing: Tong et al. 2023,
    arXiv:2302.00482; times: Dax et al. 2023, arXiv:2305.17161.

    Args:
        pairing: ``"independent"``, or ``"optimal"``: the pairs of a batch, or of each 128 of its rows, have the least
            total squared distance.  For flows without a context only: paired among rows of different contexts, the
            draws that go to one context are no longer those of the base.
        sigma_min: The width σ of what stands for a row, in the field's units, at least 0 and below 1.
        time_power: The times have the density (1 + a) t^a for a power a above -1; more than 0 puts them near the data.

    Raises:
        ValueError: If an argument is out of its range; in use, if the flow has not exactly one continuous transform, or
            a base or other transforms that need training, if rows do not fit the flow, or ``pairing="optimal"`` meets
            contexts.

    Example::

        >>> import torch
        >>> from pyro_flows import flows, fit_density
        >>> x = torch.randn(200, 2)
        >>> fit = fit_density(flows.cnf(2), x, objective=FlowMatching(), max_epochs=5, progress=False)
        >>> fit.guide.log_prob(x).shape
        torch.Size([200])
    """

    in_nats = False
    trains_base = False

    def __init__(self, *, pairing: str = "independent", sigma_min: float = 1e-4, time_power: float = 0.0) -> None:
        super().__init__()
        check_choice("FlowMatching", ("independent", "optimal"), pairing=pairing)
        check_numbers("FlowMatching", least=0, below=1, sigma_min=sigma_min)
        check_numbers("FlowMatching", above=-1, time_power=time_power)
        self.pairing, self.sigma_min, self.time_power = pairing, sigma_min, time_power

    def forward(self, flow: Any, x: Tensor, context: Any = None) -> Tensor:
        """The loss of a flow at rows ``(N, D)`` and their contexts, a scalar."""
        before, layer, after = _parts(flow)
        if x.dim() != 2 or x.shape[1:] != flow.event_shape:
            raise ValueError(f"FlowMatching: x must be rows (N, {flow.event_shape[0]}), got shape {tuple(x.shape)}.")
        if context is not None and self.pairing == "optimal":
            raise ValueError(
                "FlowMatching: pairing='optimal' is for flows without a context: it would pair rows of one context "
                "with some draws of the base rather than others.  Use pairing='independent'."
            )
        context = flow.encode(context)
        with torch.no_grad():
            for transform in reversed(after):
                x, _ = transform.inverse_and_log_det(x)
            start = flow.base().sample(x.shape[:1])
            for transform in before:
                start, _ = transform.forward_and_log_det(start)
            if self.pairing == "optimal":
                start = start[_pairs(start, x)]
            t = self._times(x)
            shrink = 1 - self.sigma_min
            point = start + t.unsqueeze(-1) * (x - shrink * start)
        error = layer.field(t, point, context) - (x - shrink * start)
        return error.square().sum(-1).mean()

    def _times(self, x: Tensor) -> Tensor:
        """A time for each row, one in each of as many equal parts of the law: so the batch covers it evenly."""
        number = len(x)
        places = torch.randperm(number, device=x.device) + torch.rand(number, dtype=x.dtype, device=x.device)
        return (places / number) ** (1 / (1 + self.time_power))

    def extra_repr(self) -> str:
        return f"pairing={self.pairing!r}, sigma_min={self.sigma_min}, time_power={self.time_power}"


def _is_affine(part: FlowTransform) -> bool:
    """Return True for an affine map, which may stand beside the field and is not trained."""
    if isinstance(part, Elementwise):
        return part.conditioner is None and isinstance(part.bijector, Affine | SoftplusAffine)
    return isinstance(part, ActNorm | FixedAffine | LULinear | ScaledLinear)


def _parts(flow: Any) -> tuple[list[FlowTransform], Continuous, list[FlowTransform]]:
    """The transforms before the continuous one, that one, and those after it."""
    transforms = list(flow.transforms) if isinstance(flow, Flow) else []
    places = [place for place, part in enumerate(transforms) if isinstance(part, Continuous)]
    if len(places) != 1:
        has = f"{len(places)} in this {type(flow).__name__}" if transforms else f"got {type(flow).__name__}"
        raise ValueError(
            "FlowMatching: it trains the field of a Flow with exactly one continuous transform, such as flows.cnf(2), "
            f"{has}."
        )
    still = [part for part in transforms if not (isinstance(part, Continuous) or _is_affine(part))]
    for part, name, more in (
        *((part, type(part).__name__, "") for part in still),
        (flow.base, f"the base {type(flow.base).__name__}", ", or keep the base by flow.base.requires_grad_(False)"),
    ):
        if any(p.requires_grad for p in part.parameters()):
            raise ValueError(
                f"FlowMatching: it trains the continuous transform alone, but {name} needs training too; train this "
                f"flow by likelihood{more}."
            )
    return transforms[: places[0]], transforms[places[0]], transforms[places[0] + 1 :]


def _pairs(start: Tensor, x: Tensor) -> Tensor:
    """Which draw goes to which row, of least total squared distance."""
    from scipy.optimize import linear_sum_assignment

    found = []
    for first in range(0, len(x), MOST_PAIRED):
        part = slice(first, first + MOST_PAIRED)
        _, draws = linear_sum_assignment(torch.cdist(x[part], start[part]).square().double().cpu().numpy())
        found.append(first + torch.as_tensor(draws, device=x.device))
    return torch.cat(found)
