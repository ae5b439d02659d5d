"""Block neural autoregressive transform: one network in which x_i reaches y_i by increasing paths alone.

Hidden layer l has K_l units t_i for each feature i of D, above t_i⁰ = x_i.  Its weights are triangular by blocks:

    t_iˡ = tanh(a_iˡ (P_iˡ (t_iˡ⁻¹ / a_iˡ⁻¹) + Σ_{j<i} W_ijˡ t_jˡ⁻¹ + b_iˡ)),    a > 0, rows of P on the simplex
    y_i = exp(s_i) (x_i + Σ_k γ_ik p_ik t_ikᴸ / a_ikᴸ) + o_i,    (s_i, o_i) = V_i t_<iᴸ + c_i,    p_i on the simplex

Since tanh(a z) / a has slopes in (0, 1], and so have mixtures and compositions of such maps, what stands in brackets
has slopes within exp(±B) if log(1 + γ) is within ±B: a bijection of R^D, at any parameters.  It is the identity where
γ, V and c are zero.  In the paper any positive weights stand in place of P and p; then slopes have no bounds and images
are not all of R^D, and no inverse is given.  It has no s, and one gate for all units.

The inverse goes from feature to feature.  What those known add to the later ones is summed up as they become known, in
about one pass; there remains one increasing scalar equation in x_i, bracketed in closed form since |t| < 1.  Its root
has the derivatives of the implicit function.

Block Neural Autoregressive Flow (De Cao, Titov, Aziz 2019, arXiv:1904.04676).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..bijectors.base import bounded
from ..bijectors.continued import bracketed_root, implicit_root
from ..conditioners import Conditioner
from ..conditioners.base import MaskedLinear
from .base import FlowTransform

STEPS = 10  # of the search, and two more for each nat of max_log_slope: what the last bits take at any parameters


class BlockAutoregressive(FlowTransform):
    """A block neural autoregressive transform of a vector, the identity at the start.

    Forward is one pass; the inverse takes about 23 evaluations of each feature's units, one feature after the other.

    Args:
        input_dim: The number D of features.
        hidden_dims: The numbers of units *of each feature* in the hidden layers, at least one layer.
        conditioner: A network from contexts to what is added to all b, s and o, with ``input_dim = context_dim``,
            ``output_dim = D`` and ``num_params = sum(hidden_dims) + 2``; by default there is no context.
        max_log_slope: The bound B of log(1 + γ), and those of s and of log a, in nats.

    Raises:
        ValueError: If a size is out of its range, or the conditioner's sizes do not fit.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import MLP
        >>> layer = BlockAutoregressive(3, (8, 8), MLP(4, 3, num_params=18))
        >>> y, log_det = layer.forward_and_log_det(torch.randn(5, 3), torch.randn(4))
        >>> y.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    cross: Sequence[MaskedLinear]  # W and b of each hidden layer; V and c at last
    mixtures: nn.ParameterList  # log P of each hidden layer but the first, where P is one; log p at last
    steepness: nn.ParameterList  # log a of each hidden layer

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] = (8, 8),
        conditioner: Conditioner | None = None,
        max_log_slope: float = 3.0,
    ) -> None:
        super().__init__((input_dim,), 0 if conditioner is None else conditioner.input_dim)
        self.input_dim = input_dim
        self.hidden_dims = tuple(hidden_dims)
        self.conditioner = conditioner
        self.max_log_slope = max_log_slope
        self._check()
        widths = self.hidden_dims
        cross = [_cross(input_dim, *sizes) for sizes in pairwise((1, *widths))]
        # The bends of the first layer are spread over what a standard normal covers, those above over what tanh does.
        for number, layer in enumerate(cross):
            nn.init.uniform_(layer.bias, *((-1.0, 1.0) if number else (-3.0, 3.0)))
        cross.append(_cross(input_dim, widths[-1], 2, zero=True))
        self.cross = nn.ModuleList(cross)  # type: ignore[assignment]
        self.mixtures = nn.ParameterList(torch.randn(input_dim, k, below) for below, k in pairwise((*widths, 1)))
        self.steepness = nn.ParameterList(1.5 * torch.rand(input_dim, k, 1) for k in widths)
        self.gates = nn.Parameter(torch.zeros(input_dim, 1, widths[-1]))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, columns, table = self._read(x, context)
        units = [columns.unsqueeze(1)]  # (D, K, N) of each layer
        slopes = columns.new_ones(self.input_dim, 1, 1)
        for weight, bias, own in zip(table.weights[:-1], table.biases[:-1], table.own, strict=True):
            shift = torch.addmm(bias, weight, units[-1].flatten(0, 1)).unflatten(0, (self.input_dim, -1))
            above, slopes = _ascend(units[-1], slopes, shift, own)
            units.append(above)
        value, log_slope = _close(units[0], units[-1], slopes, table.gates)
        out = torch.addmm(table.biases[-1], table.weights[-1], units[-1].flatten(0, 1))
        log_scale, shift = self._scale_and_shift(out.unflatten(0, (self.input_dim, 2)))
        y = torch.addcmul(shift, value, log_scale.exp())
        return _event(y, batch), (log_scale + log_slope).sum((0, 1)).reshape(batch)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, columns, table = self._read(y, context)
        widths, steps = (*self.hidden_dims, 2), STEPS + math.ceil(2 * self.max_log_slope)
        weights = [w.split(below, 1) for w, below in zip(table.weights, (1, *self.hidden_dims), strict=True)]
        sums = table.biases  # what the features known so far add to each layer, from the next feature on
        x, log_dets = [], []
        for feature, column in enumerate(columns.split(1)):
            *shifts, out = (rows[:width].unsqueeze(0) for rows, width in zip(sums, widths, strict=True))
            block = _Block(shifts, [part[feature, None] for part in table.own], table.gates[feature, None])
            log_scale, shift = self._scale_and_shift(out)
            root = block.root((column - shift) * torch.exp(-log_scale), steps)
            _, log_slope, units = block(root)
            x.append(root)
            log_dets.append(-log_scale - log_slope)
            if feature + 1 < self.input_dim:
                sums = [
                    torch.addmm(rows[width:], part[feature][(feature + 1) * width :], known[0])
                    for rows, width, part, known in zip(sums, widths, weights, units, strict=True)
                ]
        return _event(torch.cat(x), batch), torch.stack(log_dets).sum((0, 1, 2)).reshape(batch)

    def _read(self, value: Tensor, context: Tensor | None) -> tuple[torch.Size, Tensor, _Table]:
        """The batch of N events, the features as rows ``(D, N)``, and the weights of this call."""
        added: Sequence[Tensor | None] = [None] * (len(self.hidden_dims) + 1)
        batch = value.shape[:-1]
        if self.conditioner is not None:
            if context is None:
                raise ValueError(f"BlockAutoregressive: context is missing; its width is {self.context_dim}.")
            params = self.conditioner(context)  # (*batch, D, P)
            batch = torch.broadcast_shapes(batch, params.shape[:-2])
            params = params.expand(*batch, *params.shape[-2:]).reshape(batch.numel(), *params.shape[-2:])
            added = params.permute(1, 2, 0).split((*self.hidden_dims, 2), 1)  # (D, K, N) for each layer
        columns = value.expand(*batch, self.input_dim).reshape(batch.numel(), self.input_dim).T.contiguous()
        return batch, columns, self._table(added)

    def _table(self, added: Sequence[Tensor | None]) -> _Table:
        steep = [bounded(raw, self.max_log_slope).exp() for raw in self.steepness]  # (D, K, 1)
        mixtures = [torch.softmax(raw, -1) / a.mT for raw, a in zip(self.mixtures, steep, strict=True)]
        gain = self.hidden_dims[-1] ** 0.5  # the units share one unit of slope: as they get more, they get faster
        gates = torch.expm1(bounded(gain * self.gates, self.max_log_slope)) * mixtures.pop()
        own = [steep[0], *(a * mixture for a, mixture in zip(steep[1:], mixtures, strict=True))]
        weights, biases = [], []
        for layer, part, a in zip(self.cross, added, (*steep, None), strict=True):
            weight, bias = layer.weight * layer.mask, layer.bias.unsqueeze(-1)
            if part is not None:
                bias = bias + part.flatten(0, 1)
            weights.append(weight if a is None else a.flatten(0, 1) * weight)
            biases.append(bias if a is None else a.flatten(0, 1) * bias)
        return _Table(weights, biases, own, gates)

    def _scale_and_shift(self, out: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = out.split(1, 1)
        return bounded(log_scale, self.max_log_slope), shift

    def _check(self) -> None:
        if not self.hidden_dims or min(self.hidden_dims) < 1:
            raise ValueError(
                f"BlockAutoregressive: hidden_dims must hold at least one positive width, got {self.hidden_dims}."
            )
        if not 0 < self.max_log_slope < math.inf:
            raise ValueError(
                f"BlockAutoregressive: max_log_slope must be positive and finite, got {self.max_log_slope}."
            )
        if self.conditioner is not None:
            got = self.conditioner.output_dim, self.conditioner.num_params
            wanted = self.input_dim, sum(self.hidden_dims) + 2
            if got != wanted:
                raise ValueError(
                    f"BlockAutoregressive: conditioner must have (output_dim, num_params) = {wanted} for "
                    f"{self.input_dim} features with {self.hidden_dims} units each, got {got}."
                )


class _Table(NamedTuple):
    """The weights of one call, times the steepness of the units that they lead to."""

    weights: list[Tensor]  # W, and V at last: (D K, D K'), zero from a feature on to itself and to earlier ones
    biases: list[Tensor]  # b, and c at last, and what a context adds: (D K, 1) or (D K, N)
    own: list[Tensor]  # P: (D, K, K')
    gates: Tensor  # γ p: (D, 1, K)


class _Block(NamedTuple):
    """The units of one feature, once all earlier features are known: an increasing map of a number."""

    shifts: list[Tensor]  # (1, K, N) or (1, K, 1) for each layer
    own: list[Tensor]  # (1, K, K')
    gates: Tensor  # (1, 1, K)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The value, its log-slope, ``(1, 1, N)`` each, and all units, x first."""
        units, slopes = [x], x.new_ones(1, 1, 1)
        for shift, own in zip(self.shifts, self.own, strict=True):
            above, slopes = _ascend(units[-1], slopes, shift, own)
            units.append(above)
        return *_close(x, units[-1], slopes, self.gates), units

    def root(self, value: Tensor, steps: int) -> Tensor:
        """The x that is mapped to a value, ``(1, 1, N)``, with the derivatives of the implicit function."""
        with torch.no_grad():
            radius = self.gates.abs().sum()
            low, high = value - radius, value + radius
            x = bracketed_root(self._slope, value, (low, *self._slope(low)), (high, *self._slope(high)), steps)
        return implicit_root(self._slope, x, value)

    def _slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x)[:2]


def _ascend(units: Tensor, slopes: Tensor, shift: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """From units ``(D, K', N)`` and their slopes in x_i to those of the next layer, ``(D, K, N)``."""
    above = torch.tanh(torch.baddbmm(shift, own, units))
    return above, (1 - above * above) * torch.bmm(own, slopes)


def _close(x: Tensor, units: Tensor, slopes: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """What the last units add to x, and the log-slope of the sum, ``(D, 1, N)`` each."""
    return torch.baddbmm(x, gates, units), torch.log1p(torch.bmm(gates, slopes))


def _event(rows: Tensor, batch: torch.Size) -> Tensor:
    """Features as rows ``(D, 1, N)`` as events ``(*batch, D)``."""
    return rows.squeeze(1).T.reshape(*batch, len(rows))


def _cross(input_dim: int, below: int, width: int, *, zero: bool = False) -> MaskedLinear:
    """A layer that leads from the units of a feature to those of later ones."""
    layer = MaskedLinear(input_dim * below, input_dim * width, zero=zero)
    feature = torch.arange(input_dim)
    layer.mask = (feature.repeat_interleave(width)[:, None] > feature.repeat_interleave(below)).to(layer.weight)
    return layer
