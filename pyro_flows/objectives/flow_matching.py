"""Flow matching: train the field of a continuous flow by regression, without solving it.

For a draw x₀ of the base and a row x₁ of the data, the point x_t = (1 - (1 - σ) t) x₀ + t x₁ moves along a line.  The
field with the least mean squared error is the mean velocity of all lines through a point.  It transports the base to
the data, blurred by σ.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_choice, check_numbers
from ..bijectors import Affine, SoftplusAffine
from ..flows import Flow
from ..transforms import (
    ActNorm,
    Continuous,
    Elementwise,
    FixedAffine,
    FlowTransform,
    LULinear,
    QuantileMap,
    ScaledLinear,
    TriangularAffine,
)

MOST_PAIRED = 128  # rows; the time of the search grows with the cube of their number


class FlowMatching(nn.Module):
    """Mean squared error of a continuous flow's field against the velocities of lines from base to data.

    For a draw x₀ of the base, a row x₁ of the data and a time t in [0, 1]::

        loss = E |v(t, x_t, context) - (x₁ - (1 - σ) x₀)|²,    x_t = (1 - (1 - σ) t) x₀ + t x₁

    No differential equation is solved.  The loss is in squared standardised units, not in nats, and is not zero at the
    best field.  It compares states of one flow on the same data.  After training, ``flow.log_prob`` solves for exact
    densities as for any continuous flow.

    Flow matching: Lipman, Chen, Ben-Hamu, Nickel, Le 2022, arXiv:2210.02747.  Optimal pairing, whose lines cross less
    often: Tong et al. 2023, arXiv:2302.00482.  The distribution of times: Dax et al. 2023, arXiv:2305.17161.

    Args:
        pairing: ``"independent"`` or ``"optimal"``.  Optimal pairs have the least total squared distance within each
            128 rows of a batch.  They are for flows without a context: pairs across contexts would change the
            distribution of the draws that belong to one context.
        sigma_min: The standard deviation σ around each row, in the field's units, at least 0 and below 1.
        time_power: The power a, above -1, of the density (1 + a) t^a of times.  Positive powers favour times near the
            data.

    Raises:
        ValueError: If an argument is out of its range.  In use: if the flow does not have exactly one continuous
            transform, if its base or other transforms need training, if the rows do not fit the flow, or if
            ``pairing="optimal"`` is used with contexts.

    Example::

        >>> import torch
        >>> from pyro_flows import flows, fit_density
        >>> from pyro_flows.training import Training
        >>> x = torch.randn(200, 2)
        >>> fit = fit_density(flows.cnf(2), x, training=Training(FlowMatching()), max_epochs=5, progress=False)
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
        """Return the loss, a scalar, for rows ``(N, D)`` and their contexts."""
        before, layer, after = _parts(flow)
        if x.dim() != 2 or x.shape[1:] != flow.event_shape:
            raise ValueError(f"FlowMatching: x must be rows (N, {flow.event_shape[0]}), got shape {tuple(x.shape)}.")
        if context is not None and self.pairing == "optimal":
            fault = "with one it would change the distribution of the draws that belong to a context"
            way = "Use pairing='independent'"
            raise ValueError(f"FlowMatching: pairing='optimal' is for flows without a context; {fault}. {way}.")
        context = flow.encode(context)
        with torch.no_grad():
            for transform in reversed(after):
                x, _ = transform.inverse_and_log_det(x)
            start = flow.base().sample(x.shape[:1])
            for transform in before:
                start, _ = transform.forward_and_log_det(start)
            if self.pairing == "optimal":
                start = start[_pairs(start, x)]
            number = len(x)  # one time in each of as many parts of equal probability
            places = torch.randperm(number, device=x.device) + torch.rand(number, dtype=x.dtype, device=x.device)
            t = (places / number) ** (1 / (1 + self.time_power))
            shrink = 1 - self.sigma_min
            point = start + t.unsqueeze(-1) * (x - shrink * start)
        error = layer.field(t, point, context) - (x - shrink * start)
        return error.square().sum(-1).mean()

    def extra_repr(self) -> str:
        return f"pairing={self.pairing!r}, sigma_min={self.sigma_min}, time_power={self.time_power}"


def _stays(part: FlowTransform) -> bool:
    """Return True for an affine or fixed map, which a flow may have before or after the field; it is not trained."""
    if isinstance(part, TriangularAffine):
        return part.conditioner is None
    if isinstance(part, Elementwise):
        return part.conditioner is None and isinstance(part.bijector, Affine | SoftplusAffine)
    return isinstance(part, ActNorm | FixedAffine | LULinear | QuantileMap | ScaledLinear)


def _parts(flow: Any) -> tuple[list[FlowTransform], Continuous, list[FlowTransform]]:
    """Return the transforms before the continuous one, the continuous one, and the transforms after it."""
    transforms = list(flow.transforms) if isinstance(flow, Flow) else []
    places = [place for place, part in enumerate(transforms) if isinstance(part, Continuous)]
    if len(places) != 1:
        has = f"{len(places)} in this {type(flow).__name__}" if transforms else f"got {type(flow).__name__}"
        must = "flow must be a Flow with exactly one continuous transform"
        raise ValueError(f"FlowMatching: {must}, {has}. Use flows.cnf(2).")
    still = [part for part in transforms if not (isinstance(part, Continuous) or _stays(part))]
    for part in (*still, flow.base):
        if any(p.requires_grad for p in part.parameters()):
            raise ValueError(
                f"FlowMatching: only the continuous transform is trained, but {type(part).__name__} needs training "
                "too. Train this flow by likelihood, or keep that part as it is by requires_grad_(False)."
            )
    return transforms[: places[0]], transforms[places[0]], transforms[places[0] + 1 :]


def _pairs(start: Tensor, x: Tensor) -> Tensor:
    """Return the draw for each row that minimises the total squared distance, ``(N,)``."""
    from scipy.optimize import linear_sum_assignment

    found = []
    for first in range(0, len(x), MOST_PAIRED):
        part = slice(first, first + MOST_PAIRED)
        _, draws = linear_sum_assignment(torch.cdist(x[part], start[part]).square().double().cpu().numpy())
        found.append(first + torch.as_tensor(draws, device=x.device))
    return torch.cat(found)
