"""Block neural autoregressive transform: one network in which x_i reaches y_i by increasing paths alone.

Hidden layer l bends K_l copies of each of D features.  The copies h_i lead from x_i to y_i; later features see t_i:

    m_iˡ = P_iˡ h_iˡ⁻¹,    t_iˡ = tanh(a_iˡ (m_iˡ + Σ_{j<i} W_ijˡ t_jˡ⁻¹ + b_iˡ)),    h_iˡ = m_iˡ + γ_iˡ t_iˡ / a_iˡ,
    y_i = exp(s_i) p_i h_iᴸ + o_i,    (s_i, o_i) = Σ_{j<i} V_ij t_jᴸ + c_i,    h_i⁰ = t_i⁰ = x_i,

with p and the rows of P on the simplex, a > 0 and γ > -1, elementwise, and W, V free.  The slopes of a layer are
mixtures of the slopes below, times 1 + γ (1 - t²), which is within exp(±B) if log(1 + γ) is within ±B.  So it is a
bijection of R^D at any parameters, and the identity if γ, V and c are zero.  In the paper h is t, and any positive
weights replace P; then slopes have no bounds, and no inverse is given.

The inverse goes from feature to feature.  The contributions of known features to the later ones are summed as the
features become known, in about one pass.  One increasing scalar equation in x_i remains, with a bracket in closed form
since |t| < 1.  Its root has the derivatives of the implicit function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..arguments import check_numbers, check_sizes
from ..bijectors.base import bounded
from ..bijectors.continued import bracketed_root, implicit_root
from ..conditioners import Conditioner
from ..conditioners.base import Network
from ..conditioners.made import MaskedLinear
from .elementwise import Conditional

STEPS = 11  # of the search to the last bits, and one more for each nat of max_log_slope in each layer


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
        max_log_slope: The bound B of log(1 + γ) in each hidden layer, and the bound of s and of log a, in nats.

    Raises:
        ValueError: If a size or ``max_log_slope`` is out of its range, or the conditioner's sizes do not fit.
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
    ) -> None:
        check_sizes("BlockAutoregressive", hidden_dims=hidden_dims)
        super().__init__(input_dim, conditioner, (input_dim, sum(hidden_dims) + 2))
        check_numbers("BlockAutoregressive", above=0, max_log_slope=max_log_slope)
        self.hidden_dims = widths = tuple(hidden_dims)
        self.max_log_slope = max_log_slope
        cross = [_cross(input_dim, *sizes) for sizes in pairwise((1, *widths))]
        for layer in cross:  # the bends are spread over the range of a standard normal
            nn.init.uniform_(layer.bias, -3, 3)
        cross.append(_cross(input_dim, widths[-1], 2, zero=True))
        self.cross = nn.ModuleList(cross)  # type: ignore[assignment]
        self.mixtures = nn.ParameterList(torch.randn(input_dim, k, below) for below, k in pairwise((*widths, 1)))
        self.steepness = nn.ParameterList(1.5 * torch.rand(input_dim, k, 1) for k in widths)
        self.gates = nn.ParameterList(torch.zeros(input_dim, k, 1) for k in widths)

    def compiles(self, inverse: bool) -> bool:
        return not inverse

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, columns, net = self._read(x, context)
        height, log_slope, seen = net.ascend(columns)
        log_scale, shift = self._scale_and_shift(net.shift(-1, seen[-1]))
        y = torch.addcmul(shift, height, log_scale.exp())
        return _event(y, batch), (log_scale + log_slope).sum((0, 1)).reshape(batch)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, columns, net = self._read(y, context)
        widths = *self.hidden_dims, 2
        steps = STEPS + math.ceil(self.max_log_slope * len(self.hidden_dims))
        weights = [w.split(below, 1) for w, below in zip(net.weights, (1, *self.hidden_dims), strict=True)]
        sums = net.biases  # the contributions of known features to each layer, from the next feature on
        x, log_dets = [], []
        for feature, value in enumerate(columns.split(1)):
            *shifts, out = (rows[:width].unsqueeze(0) for rows, width in zip(sums, widths, strict=True))
            layers: list[_Layer] = [tuple(part[feature, None] for part in layer) for layer in net.layers]  # type: ignore[misc]
            own = _Net(layers, net.last[feature, None], shifts, [])
            log_scale, shift = self._scale_and_shift(out)
            root = own.root((value - shift) * torch.exp(-log_scale), steps)
            _, log_slope, seen = own.ascend(root)
            x.append(root)
            log_dets.append(-log_scale - log_slope)
            if feature + 1 < self.input_dim:
                sums = [
                    torch.addmm(rows[width:], part[feature][(feature + 1) * width :], known[0])
                    for rows, width, part, known in zip(sums, widths, weights, seen, strict=True)
                ]
        return _event(torch.cat(x), batch), torch.stack(log_dets).sum((0, 1, 2)).reshape(batch)

    def _read(self, value: Tensor, context: Tensor | None) -> tuple[torch.Size, Tensor, _Net]:
        """Return the batch of N events, the features as rows ``(D, 1, N)``, and the network of this call."""
        params = None if self.conditioner is None else self._params(context).flatten(-2)
        batch, rows, params = self._rows_of(value, params)
        weights = [layer.matrix() for layer in self.cross]
        biases = [layer.shift() for layer in self.cross]
        if params is not None:
            added = params.T.unflatten(0, (self.input_dim, -1)).split((*self.hidden_dims, 2), 1)  # (D, K, N) each
            biases = [bias + more.flatten(0, 1) for bias, more in zip(biases, added, strict=True)]
        *mixtures, last = torch.ones_like(self.gates[0]), *(torch.softmax(raw, -1) for raw in self.mixtures)
        layers = []
        for number, mixture in enumerate(mixtures):
            a = bounded(self.steepness[number], self.max_log_slope).exp()
            # The copies share one unit of slope: the more there are, the faster each has to move.
            gate = torch.expm1(bounded(self.hidden_dims[number] ** 0.5 * self.gates[number], self.max_log_slope))
            layers.append((mixture, a * mixture, gate, gate / a))
            weights[number] = a.flatten(0, 1) * weights[number]
            biases[number] = a.flatten(0, 1) * biases[number]
        return batch, rows.T.contiguous().unsqueeze(1), _Net(layers, last, biases, weights)

    def _scale_and_shift(self, out: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = out.split(1, 1)
        return bounded(log_scale, self.max_log_slope), shift


# Of a hidden layer: the mixture P and a P, (D, K, K'); γ and γ / a, (D, K, 1).
_Layer = tuple[Tensor, Tensor, Tensor, Tensor]


class _Net(NamedTuple):
    """The network of one call: of all features, or of one feature once all earlier ones are known."""

    layers: list[_Layer]
    last: Tensor  # p: (D, 1, K)
    biases: list[Tensor]  # a b of each layer and c: (D K, 1), or (D K, N) with a context; of one feature: (1, K, …)
    weights: list[Tensor]  # a W of each layer and V: (D K, D K'), zero except from features to later ones; of one: none

    def shift(self, layer: int, seen: Tensor) -> Tensor:
        """Return what a layer adds to the copies of each feature, ``(D, K, N)``, from what it sees of earlier ones."""
        if not self.weights:
            return self.biases[layer]
        shift = torch.addmm(self.biases[layer], self.weights[layer], seen.flatten(0, 1))
        return shift.unflatten(0, (len(seen), -1))

    def ascend(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return p h and its log-slope, ``(D, 1, N)`` each, and what later features see in each layer."""
        copies, slopes, seen = x, x.new_ones(len(x), 1, 1), [x]  # (D, K, N) in each layer
        for number, (mixture, steep, gate, reach) in enumerate(self.layers):
            t = torch.tanh(torch.baddbmm(self.shift(number, seen[-1]), steep, copies))
            copies = torch.baddbmm(reach * t, mixture, copies)
            slopes = (1 + gate * (1 - t * t)) * torch.bmm(mixture, slopes)
            seen.append(t)
        return torch.bmm(self.last, copies), torch.bmm(self.last, slopes).log(), seen

    def root(self, value: Tensor, steps: int) -> Tensor:
        """Return the x of one feature with p h = value, ``(1, 1, N)``, and the derivatives of the implicit function."""
        net, y = tree_map(Tensor.detach, (self, value))  # not by ``no_grad``, which torch.jit does not record
        radius = torch.zeros_like(net.last[..., :1])  # how far the copies can be from x
        for mixture, _, _, reach in net.layers:
            radius = torch.baddbmm(reach.abs(), mixture, radius)
        radius = torch.bmm(net.last, radius)
        low, high = y - radius, y + radius
        x = bracketed_root(net._slope, y, (low, *net._slope(low)), (high, *net._slope(high)), steps)
        return implicit_root(self._slope, x, value)

    def _slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ascend(x)[:2]


def _event(rows: Tensor, batch: torch.Size) -> Tensor:
    """Return features as rows ``(D, 1, N)`` as events ``(*batch, D)``."""
    return rows.squeeze(1).T.reshape(*batch, len(rows))


def _cross(input_dim: int, below: int, width: int, *, zero: bool = False) -> MaskedLinear:
    """Build a layer from what is seen of each feature to the units of later ones."""
    layer = MaskedLinear(input_dim * below, input_dim * width, zero=zero)
    feature = torch.arange(input_dim)
    layer.mask = (feature.repeat_interleave(width)[:, None] > feature.repeat_interleave(below)).to(layer.weight)
    return layer
