"""Block neural autoregressive transform: one network in which x_i reaches y_i by increasing paths alone.

Hidden layer l bends K_l copies of each of D features: h_i is what becomes of x_i, and t_i what later features see,

    m_iˡ = P_iˡ h_iˡ⁻¹,    t_iˡ = tanh(a_iˡ (m_iˡ + Σ_{j<i} W_ijˡ t_jˡ⁻¹ + b_iˡ)),    h_iˡ = m_iˡ + γ_iˡ t_iˡ / a_iˡ,
    y_i = exp(s_i) p_i h_iᴸ + o_i,    (s_i, o_i) = Σ_{j<i} V_ij t_jᴸ + c_i,    h_i⁰ = t_i⁰ = x_i,

with p and the rows of P on the simplex, a > 0 and γ > -1, elementwise, and W, V free.  The slopes of a layer are
mixtures of those below, times 1 + γ (1 - t²), which is within exp(±B) if log(1 + γ) is within ±B: a bijection of R^D,
at any parameters.  It is the identity where γ, V and c are zero.  In the paper h is t, and any positive weights stand
in place of P; then slopes have no bounds, and no inverse is given.

The inverse goes from feature to feature.  What those known add to the later ones is summed up as they become known, in
about one pass; there remains one increasing scalar equation in x_i, bracketed in closed form since |t| < 1.  Its root
has the derivatives of the implicit function.

Block Neural Autoregressive Flow (De Cao, Titov, Aziz 2019, arXiv:1904.04676).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import check_numbers, check_sizes
from ..bijectors.base import bounded
from ..bijectors.continued import bracketed_root, implicit_root
from ..conditioners import Conditioner
from ..conditioners.base import MaskedLinear, Network
from .conditional import Conditional, check_outputs

STEPS = 11  # of the search, and one more for each nat of max_log_slope in each layer: what the last bits take


class BlockAutoregressive(Network, Conditional):
    """A block neural autoregressive transform of a vector ``(*batch, D)``, the identity at the start::

        h_iˡ = m_iˡ + γ_iˡ t_iˡ / a_iˡ,    t_iˡ = tanh(a_iˡ (m_iˡ + Σ_{j<i} W_ijˡ t_jˡ⁻¹ + b_iˡ)),    m_iˡ = P_iˡ h_iˡ⁻¹
        y_i = exp(s_i) p_i h_iᴸ + o_i,    (s_i, o_i) = Σ_{j<i} V_ij t_jᴸ + c_i,    h_i⁰ = t_i⁰ = x_i

    with p and the rows of P on the simplex, a > 0 and γ > -1: an increasing map of x_i at any parameters.  Forward is
    one pass; the inverse takes some 22 evaluations of each feature's units, one feature after the other.

    Block Neural Autoregressive Flow (De Cao, Titov, Aziz 2019, arXiv:1904.04676).

    Args:
        input_dim: The number D of features.
        hidden_dims: The numbers of units *of each feature* in the hidden layers, at least one layer.
        conditioner: A network from contexts to what is added to all b, s and o, with ``input_dim = context_dim``,
            ``output_dim = D`` and ``num_params = sum(hidden_dims) + 2``; by default there is no context.
        max_log_slope: The bound B of log(1 + γ) in each hidden layer, and those of s and of log a, in nats.
        pace: How far W, V, b and c move in a step of an optimiser: see ``set_pace``.

    Raises:
        ValueError: If a size, ``max_log_slope`` or ``pace`` is out of its range, or the conditioner's sizes do not fit.
            In use, if there is a conditioner and no context is given.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import MLP
        >>> layer = BlockAutoregressive(3, (8,), MLP(4, 3, num_params=10))
        >>> _, x, context = torch.nn.init.normal_(layer.gates[0]), torch.randn(5, 3), torch.randn(4)
        >>> y, log_det = layer.forward_and_log_det(x, context)
        >>> torch.allclose(layer.inverse_and_log_det(y, context)[0], x, atol=1e-2), log_det.shape
        (True, torch.Size([5]))
    """

    cross: Sequence[MaskedLinear]  # W and b of each hidden layer; V and c at last
    mixtures: nn.ParameterList  # log P of each hidden layer but the first, where P is one; log p at last
    steepness: nn.ParameterList  # log a of each hidden layer
    gates: nn.ParameterList  # log(1 + γ) of each hidden layer

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] = (8, 8),
        conditioner: Conditioner | None = None,
        max_log_slope: float = 3.0,
        *,
        pace: float | None = None,
    ) -> None:
        super().__init__(input_dim, conditioner)
        check_sizes("BlockAutoregressive", hidden_dims=hidden_dims)
        check_numbers("BlockAutoregressive", above=0, max_log_slope=max_log_slope)
        if conditioner is not None:
            words = f"{input_dim} features with {tuple(hidden_dims)} units each"
            check_outputs("BlockAutoregressive", conditioner, (input_dim, sum(hidden_dims) + 2), words)
        self.hidden_dims = tuple(hidden_dims)
        self.max_log_slope = max_log_slope
        widths = self.hidden_dims
        cross = [_cross(input_dim, *sizes) for sizes in pairwise((1, *widths))]
        for layer in cross:  # the bends are spread over what a standard normal covers
            nn.init.uniform_(layer.bias, -3, 3)
        cross.append(_cross(input_dim, widths[-1], 2, zero=True))
        self.cross = nn.ModuleList(cross)  # type: ignore[assignment]
        self.mixtures = nn.ParameterList(torch.randn(input_dim, k, below) for below, k in pairwise((*widths, 1)))
        self.steepness = nn.ParameterList(1.5 * torch.rand(input_dim, k, 1) for k in widths)
        self.gates = nn.ParameterList(torch.zeros(input_dim, k, 1) for k in widths)
        self.set_pace(pace)

    def own_parts(self) -> Iterable[nn.Module]:
        return self, *self.cross

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, columns, net = self._read(x, context)
        seen = copies = columns.unsqueeze(1)  # (D, K, N) in each layer
        slopes = columns.new_ones(self.input_dim, 1, 1)
        for layer, weight, bias in zip(net.layers, net.weights[:-1], net.biases[:-1], strict=True):
            shift = torch.addmm(bias, weight, seen.flatten(0, 1)).unflatten(0, (self.input_dim, -1))
            copies, seen, slopes = layer.ascend(copies, slopes, shift)
        out = torch.addmm(net.biases[-1], net.weights[-1], seen.flatten(0, 1)).unflatten(0, (self.input_dim, 2))
        log_scale, shift = self._scale_and_shift(out)
        y = torch.addcmul(shift, torch.bmm(net.last, copies), log_scale.exp())
        log_det = log_scale + torch.bmm(net.last, slopes).log()
        return _event(y, batch), log_det.sum((0, 1)).reshape(batch)

    def compiles(self, inverse: bool) -> bool:
        return not inverse

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, columns, net = self._read(y, context)
        widths = *self.hidden_dims, 2
        steps = STEPS + math.ceil(self.max_log_slope * len(self.hidden_dims))
        weights = [w.split(below, 1) for w, below in zip(net.weights, (1, *self.hidden_dims), strict=True)]
        sums = net.biases  # what the features known so far add to each layer, from the next feature on
        x, log_dets = [], []
        for feature, column in enumerate(columns.split(1)):
            *shifts, out = (rows[:width].unsqueeze(0) for rows, width in zip(sums, widths, strict=True))
            block = _Block([layer.of(feature) for layer in net.layers], shifts, net.last[feature, None])
            log_scale, shift = self._scale_and_shift(out)
            root = block.root((column - shift) * torch.exp(-log_scale), steps)
            _, log_slope, seen = block.ascend(root)
            x.append(root)
            log_dets.append(-log_scale - log_slope)
            if feature + 1 < self.input_dim:
                sums = [
                    torch.addmm(rows[width:], part[feature][(feature + 1) * width :], known[0])
                    for rows, width, part, known in zip(sums, widths, weights, seen, strict=True)
                ]
        return _event(torch.cat(x), batch), torch.stack(log_dets).sum((0, 1, 2)).reshape(batch)

    def _read(self, value: Tensor, context: Tensor | None) -> tuple[torch.Size, Tensor, _Net]:
        """The batch of N events, the features as rows ``(D, N)``, and the weights of this call."""
        added: Sequence[Tensor | None] = [None] * len(self.cross)
        batch = value.shape[:-1]
        params = self._conditioned(context)  # (*batch, D, P)
        if params is not None:
            batch = torch.broadcast_shapes(batch, params.shape[:-2])
            params = params.expand(*batch, *params.shape[-2:]).reshape(batch.numel(), *params.shape[-2:])
            added = params.permute(1, 2, 0).split((*self.hidden_dims, 2), 1)  # (D, K, N) for each layer
        columns = value.expand(*batch, self.input_dim).reshape(batch.numel(), self.input_dim).T.contiguous()
        return batch, columns, self._net(added)

    def _net(self, added: Sequence[Tensor | None]) -> _Net:
        weights = [layer.matrix() for layer in self.cross]
        biases = [layer.paced(layer.bias).unsqueeze(-1) for layer in self.cross]
        biases = [b if more is None else b + more.flatten(0, 1) for b, more in zip(biases, added, strict=True)]
        *mixtures, last = torch.ones_like(self.gates[0]), *(torch.softmax(raw, -1) for raw in self.mixtures)
        layers = []
        for number, mixture in enumerate(mixtures):
            a = bounded(self.steepness[number], self.max_log_slope).exp()
            # The copies share one unit of slope: where they are more, each has to move faster.
            gate = torch.expm1(bounded(self.hidden_dims[number] ** 0.5 * self.gates[number], self.max_log_slope))
            layers.append(_Layer(mixture, a * mixture, gate, gate / a))
            weights[number] = a.flatten(0, 1) * weights[number]
            biases[number] = a.flatten(0, 1) * biases[number]
        return _Net(layers, weights, biases, last)

    def _scale_and_shift(self, out: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = out.split(1, 1)
        return bounded(log_scale, self.max_log_slope), shift


class _Layer(NamedTuple):
    """How a hidden layer bends the copies of features, of all or of one."""

    mixture: Tensor  # P: (D, K, K')
    steep: Tensor  # a P: (D, K, K')
    gate: Tensor  # γ: (D, K, 1)
    reach: Tensor  # γ / a: (D, K, 1)

    def ascend(self, copies: Tensor, slopes: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the copies ``(D, K', N)`` below and their slopes to ``(h, t, slopes of h)``, ``(D, K, N)`` each."""
        t = torch.tanh(torch.baddbmm(shift, self.steep, copies))
        bent = torch.baddbmm(self.reach * t, self.mixture, copies)
        return bent, t, (1 + self.gate * (1 - t * t)) * torch.bmm(self.mixture, slopes)

    def of(self, feature: int) -> _Layer:
        return _Layer(*(part[feature, None] for part in self))


class _Net(NamedTuple):
    """What one call needs of parameters and context; weights and biases of hidden layers times their steepness."""

    layers: list[_Layer]
    weights: list[Tensor]  # a W of each layer and V: (D K, D K'), zero but from features to later ones
    biases: list[Tensor]  # a b of each layer and c: (D K, 1), or (D K, N) with a context
    last: Tensor  # p: (D, 1, K)


class _Block(NamedTuple):
    """An increasing map of a number: what the network makes of one feature once all earlier ones are known."""

    layers: list[_Layer]
    shifts: list[Tensor]  # (1, K, N) or (1, K, 1) for each layer
    last: Tensor  # (1, 1, K)

    def ascend(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The value and its log-slope, ``(1, 1, N)`` each, and what later features see in each layer."""
        copies, slopes, seen = x, x.new_ones(1, 1, 1), [x]
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            copies, t, slopes = layer.ascend(copies, slopes, shift)
            seen.append(t)
        return torch.bmm(self.last, copies), torch.bmm(self.last, slopes).log(), seen

    def root(self, value: Tensor, steps: int) -> Tensor:
        """The x that is mapped to a value, ``(1, 1, N)``, with the derivatives of the implicit function."""
        with torch.no_grad():
            radius = torch.zeros_like(self.last[..., :1])  # how far the copies can be from x
            for layer in self.layers:
                radius = torch.baddbmm(layer.reach.abs(), layer.mixture, radius)
            radius = torch.bmm(self.last, radius)
            low, high = value - radius, value + radius
            x = bracketed_root(self._slope, value, (low, *self._slope(low)), (high, *self._slope(high)), steps)
        return implicit_root(self._slope, x, value)

    def _slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ascend(x)[:2]


def _event(rows: Tensor, batch: torch.Size) -> Tensor:
    """Features as rows ``(D, 1, N)`` as events ``(*batch, D)``."""
    return rows.squeeze(1).T.reshape(*batch, len(rows))


def _cross(input_dim: int, below: int, width: int, *, zero: bool = False) -> MaskedLinear:
    """A layer from what is seen of each feature to the units of later ones."""
    layer = MaskedLinear(input_dim * below, input_dim * width, zero=zero)
    feature = torch.arange(input_dim)
    layer.mask = (feature.repeat_interleave(width)[:, None] > feature.repeat_interleave(below)).to(layer.weight)
    return layer
