"""Multilayer perceptrons, the conditioners of coupling layers, also of angles; and parameters that are given."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..arguments import CONDITIONER, as_flags, check_flags, check_integers, check_kind, check_numbers, require
from .base import Conditioner, Linear, activation_of

POINTS = 16  # an even number: the mirror image of each point is a point


class MLP(Conditioner):
    """A fully connected network from ``(*batch, input_dim)`` to parameters ``(*batch, output_dim, num_params)``::

        h_1 = a(W_1 x + b_1 + U c),    h_l = a(W_l h_{l-1} + b_l),    θ = W h_L + b

    It conditions couplings and, with contexts in place of x, conditional elementwise maps.

    Args:
        input_dim: The number of inputs; with 0 the parameters depend on the context alone.
        output_dim: The number of features that receive parameters.
        num_params: The number of parameters of each feature (``bijector.num_params``).
        hidden_dims: The widths of the hidden layers, at least one.
        context_dim: The number of context features.
        activation: The class of the elementwise nonlinearity.
        residual: Add its input to each hidden layer that keeps the width (He et al. 2015, arXiv:1512.03385).
        skip: Add a linear map of the inputs, and of as many products of two as the first layer is wide; it starts at
            zero too.  Functions that are nearly linear, or bilinear, are then learned to a precision that few units
            reach.
        centered: Subtract from h_L its mean over 16 normal points.  Then b sets the mean of the parameters, and W their
            dependence on x.  A gradient that is the same for all x mostly changes b.  Not with a context or ``skip``.

    Raises:
        ValueError: If a size is out of its range, or ``centered`` is combined with a context or ``skip``.  In use, if
            the network takes contexts and none is given.

    Example::

        >>> import torch
        >>> net = MLP(2, 3, num_params=5, hidden_dims=(16, 16), context_dim=4)
        >>> net(torch.randn(7, 2), torch.randn(4)).shape
        torch.Size([7, 3, 5])
        >>> net(torch.randn(7, 2))
        Traceback (most recent call last):
        ValueError: MLP: context is missing; this network takes contexts of width 4.
    """

    points: Tensor

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        num_params: int,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        *,
        activation: type[nn.Module] = nn.ReLU,
        residual: bool = False,
        skip: bool = False,
        centered: bool = False,
    ) -> None:
        super().__init__(input_dim, output_dim, num_params, hidden_dims, context_dim)
        check_flags("MLP", residual=residual, skip=skip, centered=centered)
        fits = not centered or (input_dim and not skip and not context_dim)
        require(fits, "MLP", "centered", "be False with a context, with skip, or without inputs", centered)
        self.activation, self.residual, self.skip, self.centered = activation, residual, skip, centered
        widths = (input_dim, *self.hidden_dims)
        self.hidden = nn.ModuleList(Linear(n, m) for n, m in pairwise(widths))
        self.output = Linear(widths[-1], num_params * output_dim, zero=True)
        self.act = activation_of("MLP", activation)
        if centered:  # the same in any default dtype and on any device, and part of the state
            generator = torch.Generator().manual_seed(0)
            half = torch.randn(POINTS // 2, input_dim, generator=generator, dtype=torch.float32, device="cpu")
            self.register_buffer("points", torch.cat((half, -half)).to(self.output.weight))
        if skip:
            self.factors = Linear(input_dim, 2 * widths[1])
            self.direct = Linear(input_dim + widths[1], num_params * output_dim, bias=False, zero=True)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self._units(x, context)
        if self.centered:
            h = h - self._units(self.points, None).mean(0)
        params = self.output(h)
        if self.skip:
            a, b = self.factors(x).chunk(2, -1)
            params = params + self.direct(torch.cat((x, a * b), -1))
        return self.arranged(params)

    def _units(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return the last hidden layer."""
        first, *others = self.hidden
        h = self.act(self.add_context(first(x), context))
        for layer in others:
            update = self.act(layer(h))
            h = h + update if self.residual and update.shape == h.shape else update
        return h


class Given(Conditioner):
    """A conditioner whose parameters are given by its input, or are linear in the last numbers of its input::

        θ_ip = x_ip + Σ_k x_ipk g_k

    An input holds ``num_params * output_dim`` numbers x_ip, as many for each k, and at its end the numbers g.  It takes
    ``(*batch, input_dim)`` to ``(*batch, output_dim, num_params)``, and no context.  Its maps are the identity where
    the coefficients are zero.  As for other conditioners, they should be zero at the start.

    Args:
        input_dim: The number of inputs; those between the coefficients and g are ignored.
        output_dim: The number of features that receive parameters.
        num_params: The number of parameters of each feature (``bijector.num_params``).
        num_factors: The number of factors g; by default the parameters are the numbers x_ip.

    Raises:
        ValueError: If a size is out of its range, or there are too few inputs.

    Example::

        >>> import torch
        >>> Given(5, 2, num_params=2)(torch.arange(5.0)).tolist()
        [[0.0, 2.0], [1.0, 3.0]]
        >>> Given(6, 1, num_params=2, num_factors=1)(torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 10.0])).tolist()
        [[31.0, 42.0]]
    """

    def __init__(self, input_dim: int, output_dim: int, num_params: int, num_factors: int = 0) -> None:
        super().__init__(input_dim, output_dim, num_params, (1,), 0)
        check_integers("Given", 0, num_factors=num_factors)
        self.num_factors = num_factors
        least = self.num_coefficients(output_dim, num_params, num_factors) + num_factors
        require(input_dim >= least, "Given", "input_dim", f"be at least {least} for these sizes", input_dim)

    @staticmethod
    def num_coefficients(output_dim: int, num_params: int, num_factors: int) -> int:
        """Return the number of coefficients at the start of an input."""
        return num_params * output_dim * (1 + num_factors)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        number, size = self.num_factors, self.num_params * self.output_dim
        params = x[..., :size]
        if number:
            linear = x[..., size : size * (1 + number)].unflatten(-1, (number, size))
            params = params + (x[..., None, -number:] @ linear).squeeze(-2)
        return self.arranged(params)


class Periodic(Conditioner):
    """Another conditioner, made periodic in some of its inputs: it takes cos(π x / B) and sin(π x / B) in place of x.

    It takes ``(*batch, D)`` to ``(*batch, output_dim, num_params)`` and serves coupling layers of angles.  It reorders
    the features, so do not wrap a network whose features are ordered, such as a :class:`MADE`.

    Normalizing Flows on Tori and Spheres (Rezende et al. 2020, arXiv:2002.02428).

    Args:
        net: The network.  Its inputs are the cosines of the P periodic features, then their sines, then the D - P other
            features.  So ``net.input_dim`` is D + P.
        periodic: For each of the D features, True if it is periodic.
        bound: Half the period, B; by default the periodic features are angles in radians.

    Raises:
        ValueError: If ``periodic`` does not fit the network's inputs, or ``bound`` is not positive and finite.  In use,
            if the network takes contexts and none is given.

    Example::

        >>> import math, torch
        >>> from pyro_flows.conditioners import MLP
        >>> inner = MLP(3, 2, num_params=5)
        >>> _ = torch.nn.init.normal_(inner.output.weight)
        >>> net = Periodic(inner, [True, False])
        >>> x = torch.randn(7, 2)
        >>> torch.allclose(net(x), net(x + torch.tensor([2 * math.pi, 0.0])), atol=1e-4)
        True
    """

    periodic: Tensor
    order: Tensor

    def __init__(self, net: Conditioner, periodic: Sequence[bool] | Tensor, bound: float = math.pi) -> None:
        check_kind("Periodic", Conditioner, CONDITIONER, net=net)
        periodic = as_flags("Periodic", "periodic", periodic)
        check_numbers("Periodic", above=0, bound=bound)
        wanted = len(periodic) + int(periodic.sum())
        must = f"take {wanted} inputs, two for each periodic feature, for periodic = {periodic.tolist()}"
        require(net.input_dim == wanted, "Periodic", "net", must, net.input_dim)
        super().__init__(len(periodic), net.output_dim, net.num_params, net.hidden_dims, context_dim=0)
        self.context_dim = net.context_dim  # the context enters inside the network
        self.net = net
        self.bound = bound
        self.register_buffer("periodic", periodic)
        self.register_buffer("order", torch.argsort(~periodic, stable=True))  # the periodic features first

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x.index_select(-1, self.order)
        count = self.net.input_dim - self.input_dim
        angle = x[..., :count] * (math.pi / self.bound)
        return self.net(torch.cat((angle.cos(), angle.sin(), x[..., count:]), -1), context)
