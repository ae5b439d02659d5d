"""Residual transforms add a contraction: y = x + g(x) with Lip(g) < 1, without masks or triangular Jacobians.

If the network has a narrow layer, the determinant of I + J is computed, with J the Jacobian of g.  Otherwise its
logarithm is estimated without bias from its series.  A random vector v estimates each trace, tr(Jᵏ) = E vᵀ Jᵏ v
(Hutchinson 1990).  The sum takes its first terms and a random number of more, each divided by the probability that it
is reached (Russian roulette).  The roulette continues with probability Lip(g) after each term, as slowly as the terms
fall, so the variance is finite at any parameters.

The inverse solves x + g(x) = y.  The step x ← y - g(x) shrinks the residual at least by Lip(g); Newton's step squares
it near the root.  The search takes the best of these two and their mean, in each step and for each event, and a dozen
steps reach the last bits.  If J is never built, the first kind of step is repeated until its guarantee suffices.  The
derivatives are those of the implicit function.
"""

import math

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..arguments import check_flags, check_kind
from ..conditioners import LipschitzMLP
from ..conditioners.jacobian import Jacobian, Layers
from .base import FlowTransform

# Exact log-determinants take the time of estimates at a width of 16, and six times as much at 64.  But there one
# estimate has a noise of 0.3 nats, which only dozens of estimates would remove.
MAX_WAIST = 64
TERMS = 8  # of the series, always taken
STEPS = 4  # of the search, and one more for each doubling from the least slope of x + g, 1 - Lip(g), to the greatest


class Residual(FlowTransform):
    """A residual transform of a vector ``(*batch, D)``, which adds a contraction g, the identity at the start::

        y = x + g(x),    Lip(g) < 1,    log|det dy/dx| = log det(I + J) = Σ_{k≥1} (-1)^{k+1} tr(Jᵏ) / k

    with J the Jacobian of g.  The direction from x to y is the fast one: one pass of the network, and the
    log-determinant.  The inverse solves the equation to the last bits.

    Invertible Residual Networks (Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen 2018, arXiv:1811.00995);
    Residual Flows for Invertible Generative Modeling (Chen, Behrmann, Duvenaud, Jacobsen 2019, arXiv:1906.02735).

    Args:
        net: The network g of D numbers, with or without a context.
        exact: True for exact log-determinants, False for unbiased estimates that differ from call to call, by torch's
            generators.  By default they are exact if the network is at most 64 wide at its narrowest, inputs included.
            Estimates and their inverse need no matrix for each event.  They compile, but not to one graph, and map
            under ``vmap`` with ``randomness="same"``.

    Raises:
        TypeError: If ``net`` is not a ``LipschitzMLP``.
        ValueError: In use, if the network takes contexts and none is given.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import LipschitzMLP
        >>> residual = Residual(LipschitzMLP(3, context_dim=4))
        >>> _ = torch.nn.init.normal_(residual.net.output.weight)  # as if trained
        >>> x, context = torch.randn(5, 3), torch.randn(4)
        >>> y, log_det = residual.forward_and_log_det(x, context)
        >>> torch.allclose(residual.inverse_and_log_det(y, context)[0], x, atol=1e-3), log_det.shape
        (True, torch.Size([5]))
    """

    def __init__(self, net: LipschitzMLP, exact: bool | None = None) -> None:
        check_kind("Residual", LipschitzMLP, "a LipschitzMLP", net=net)
        super().__init__((net.input_dim,), net.context_dim)
        check_flags("Residual", optional=True, exact=exact)
        self.net = net
        self.exact = exact

    @property
    def is_exact(self) -> bool:
        """True if log-determinants are exact."""
        return min(self.net.input_dim, *self.net.hidden_dims) <= MAX_WAIST if self.exact is None else self.exact

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        change, jacobian = self.net.at(context).linearise(x)
        return x + change, self._log_det(jacobian)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layers = self.net.at(context)
        fixed, target = tree_map(Tensor.detach, (layers, y))  # not by ``no_grad``, which torch.jit does not record
        if self.is_exact:
            x = _search(fixed, target, self.net.lipschitz)
            for _ in range(2):  # each step doubles the order of the derivatives that are right
                change, jacobian = layers.linearise(x)
                x = x - jacobian.solve(x + change - y)
        else:
            steps = math.ceil(math.log(torch.finfo(y.dtype).eps) / math.log(self.net.lipschitz))
            x = target
            for _ in range(steps):
                x = target - fixed.linearise(x)[0]
            change, jacobian = layers.linearise(x)
            x = x - _neumann(jacobian, x + change - y, steps)
        return x, -self._log_det(layers.linearise(x)[1])

    def compiles(self, inverse: bool) -> bool:
        return self.is_exact and not inverse

    def _log_det(self, jacobian: Jacobian) -> Tensor:
        if self.is_exact:
            return jacobian.log_det()
        if torch._C._get_tracing_state():
            why = "since a trace repeats one random number of terms for ever"
            raise ValueError(f"Residual: torch.jit.trace needs exact log-determinants, {why}. Use exact=True.")
        return _series(jacobian.ring(), self.net.lipschitz)


def _search(layers: Layers, y: Tensor, lipschitz: float) -> Tensor:
    """Return the root x of x + g(x) = y.

    Networks bent by hill climbing to be hard for it took 8 of 11 steps at a bound of 0.9, 12 of 14 at 0.99 and 16 of 17
    at 0.999, including the two steps of Newton's that follow.  Random networks take 4 or 5.
    """
    steps = STEPS + math.ceil(math.log2((1 + lipschitz) / (1 - lipschitz)))
    x = y
    change, jacobian = layers.linearise(x)
    residual = x + change - y
    for _ in range(steps):
        newton = jacobian.solve(residual)
        trials = x - torch.stack((newton, (newton + residual) / 2, residual))
        change, jacobian = layers.linearise(trials)
        left = trials + change - y  # (3, *batch, D)
        best = left.square().sum(-1, keepdim=True).argmin(0, keepdim=True)
        x, residual, *slopes = (
            values.gather(0, best.expand(1, *values.shape[1:])).squeeze(0)
            for values in (trials, left, *jacobian.slopes)
        )
        jacobian = Jacobian(layers.weights, slopes)
    return x


def _neumann(jacobian: Jacobian, v: Tensor, steps: int) -> Tensor:
    """Return (I + J)⁻¹ v = Σ_{k≥0} (-J)ᵏ v, which has no gradient to J."""
    jacobian = Jacobian(*([factor.detach() for factor in factors] for factors in jacobian))
    total = v
    for _ in range(steps):
        total = v - jacobian.push(total)
    return total


def _series(ring: Jacobian, survival: float) -> Tensor:
    """Return an unbiased estimate of log det(I + J), ``(*batch)``, in the value and in its gradient."""
    more = int(torch.empty((), dtype=torch.float64).exponential_(-math.log(survival)))  # geometric, one for all events
    like = ring.slopes[-1]
    shape = *like.shape[:-1], ring.weights[0].shape[-1]
    v = probe = torch.randint(0, 2, shape, dtype=like.dtype, device=like.device) * 2 - 1
    total = torch.zeros_like(like[..., 0])
    for k in range(1, TERMS + more + 1):
        v = -ring.push(v)
        total = total - (v * probe).sum(-1) / (k * survival ** max(k - TERMS, 0))
    return total
