"""Networks that know their Jacobian: contractions of residual layers, and vector fields of continuous ones.

The Jacobian of a multilayer perceptron is kept in factors, never multiplied out: J = W_L S_{L-1} W_{L-1} … S_1 W_1.

S_l is the diagonal matrix of the slopes of layer l at an input.  Determinant and inverse of I + J cost as much as in
the narrowest layer, also if it is an inner one.  Let J = A B, where B ends at the narrowest layer.  Then

    det(I + A B) = det(I + B A) (Sylvester 1851),   (I + A B)⁻¹ = I - A (I + B A)⁻¹ B (Woodbury 1950).

In B A, W_1 and W_L form one product that does not depend on the input.

The same holds for the trace.  With two hidden layers it is a bilinear form of their slopes s_1 and s_2,

    tr J = s_2ᵀ (W_2 ∘ (W_1 W_3)ᵀ) s_1,

whose matrix is the same for all inputs.  So it costs one pass of a layer, and not D passes of the network.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import check_integers, check_numbers, check_sizes
from .base import Linear, Network, share_of, zero_


class Jacobian(NamedTuple):
    """The Jacobian J = W_L S_{L-1} … S_1 W_1 at each of a batch of inputs."""

    weights: Sequence[Tensor]  # (n_l, n_{l-1}), shared by the batch
    slopes: Sequence[Tensor]  # (*batch, n_l)

    def push(self, v: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Map vectors, ``(*batch, n_start)``, from one layer up to another; by default to J v."""
        for weight, slope in self._layers(start, stop):
            v = v @ weight.mT
            v = v if slope is None else v * slope
        return v

    def pull(self, v: Tensor) -> Tensor:
        """Map covectors, ``(*batch, D)``, to Jᵀ v."""
        return Jacobian([weight.mT for weight in reversed(self.weights)], self.slopes[::-1]).push(v)

    def ring(self) -> Jacobian:
        """Return B A, where B ends at the narrowest layer: det(I + B A) and the traces of its powers are those of J."""
        w, s, k = self.weights, self.slopes, self._waist()
        return self if k == 0 else Jacobian([*w[k:-1], w[0] @ w[-1], *w[1:k]], [*s[k:], *s[:k]])

    def log_det(self) -> Tensor:
        """Return log det(I + J), ``(*batch)``."""
        return torch.linalg.slogdet(self._core()).logabsdet

    def trace(self) -> Tensor:
        """Return tr J, ``(*batch)``; with at most two hidden layers it costs one pass, for any number of inputs."""
        first, *others, last = self.weights
        if not others:
            return self.slopes[0] @ (first * last.mT).sum(-1)
        if len(others) == 1:
            return ((self.slopes[1] @ (others[0] * (first @ last).mT)) * self.slopes[0]).sum(-1)
        return (_transposed_product(self._layers()[:-1]) * last).sum((-2, -1))

    def solve(self, v: Tensor) -> Tensor:
        """Return (I + J)⁻¹ v for vectors v, ``(*batch, D)``."""
        k = self._waist()
        z = torch.linalg.solve(self._core().mT, self.push(v, 0, k).unsqueeze(-1)).squeeze(-1)
        return v - self.push(z, k) if k else z

    def _core(self) -> Tensor:
        """Return (I + B A)ᵀ, ``(*batch, n, n)`` for a narrowest layer of width n."""
        rows = _transposed_product(self.ring()._layers())
        return rows + torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)

    def _waist(self) -> int:
        """Return the number of the narrowest layer; the input is layer 0."""
        widths = [weight.shape[-1] for weight in self.weights]
        return widths.index(min(widths))

    def _layers(self, start: int = 0, stop: int | None = None) -> list[tuple[Tensor, Tensor | None]]:
        slopes = [*self.slopes, None][: len(self.weights)]
        return list(zip(self.weights, slopes, strict=True))[start:stop]


def _transposed_product(layers: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Return the transposed matrix of layers, ``(*batch, n_start, n_stop)``; row i is the image of unit vector i."""
    rows = layers[0][0].mT.contiguous()  # products with a transposed view are slow
    for place, (weight, slope) in enumerate(layers):
        rows = rows @ weight.mT if place else rows
        rows = rows if slope is None else rows * slope.unsqueeze(-2)
    return rows


def _silu_slope(a: Tensor, h: Tensor) -> Tensor:
    gate = torch.sigmoid(a)
    return gate + h * (1 - gate)


# The slopes of activations h(a), as functions of a and h.
SMOOTH: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.ELU: lambda a, h: h.clamp_max(0) + 1,
    nn.SiLU: _silu_slope,
    nn.Softplus: lambda a, h: torch.sigmoid(a),
    nn.Tanh: lambda a, h: 1 - h * h,
}
SLOPES = {**SMOOTH, nn.ReLU: lambda a, h: h.sign()}


GRAMS = 6  # T: at rank 64 the bound exceeds the spectral norm by 3 per cent at most
STEEPEST = 1.1  # the slope of a sigmoid(β a) is at most 1.09984, whatever β


class LipschitzMLP(nn.Module):
    """A network g from ``(*batch, D)`` to ``(*batch, D)`` whose slopes are bounded, zero at the start.

    It is the network of :class:`~pyro_flows.transforms.Residual`.  At any parameters and at each context, in the
    Euclidean norm ::

        |g(x) - g(x')| ≤ lipschitz |x - x'|,    lipschitz < 1

    A differentiable upper bound on the spectral norm of each of its L matrices is compared with ``lipschitz^(1/L)``,
    and the matrix is divided by the excess.  The functions between the matrices have slopes of at most one.  The
    context is added to the first hidden layer, without a bound.

    Residual Flows for Invertible Generative Modeling (Chen, Behrmann, Duvenaud, Jacobsen 2019, arXiv:1906.02735);
    Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram Iteration (Delattre, Barthélemy, Araujo,
    Allauzen 2023, arXiv:2305.16173).

    Args:
        input_dim: The number D of inputs and of outputs, at least 1.
        hidden_dims: The widths of the hidden layers, at least one.
        context_dim: The number of context features.
        lipschitz: The bound, between 0 and 1.

    Raises:
        ValueError: If an argument is out of its range.  In use, if the network takes contexts and none is given.

    Example::

        >>> import torch
        >>> net = LipschitzMLP(2, (16, 16))
        >>> _ = torch.nn.init.normal_(net.output.weight, std=1000.0)  # however steep the parameters are
        >>> x, other = torch.randn(2, 100, 2)
        >>> bool(((net(x) - net(other)).norm(dim=-1) <= 0.9001 * (x - other).norm(dim=-1)).all())
        True
    """

    def __init__(
        self, input_dim: int, hidden_dims: Sequence[int] = (64, 64), context_dim: int = 0, *, lipschitz: float = 0.9
    ) -> None:
        super().__init__()
        check_integers("LipschitzMLP", input_dim=input_dim)
        check_integers("LipschitzMLP", 0, context_dim=context_dim)
        check_sizes("LipschitzMLP", hidden_dims=hidden_dims)
        check_numbers("LipschitzMLP", above=0, below=1, lipschitz=lipschitz)
        self.input_dim, self.context_dim, self.lipschitz = input_dim, context_dim, lipschitz
        self.hidden_dims = tuple(hidden_dims)
        self.hidden = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise((input_dim, *self.hidden_dims)))
        self.output = zero_(nn.Linear(self.hidden_dims[-1], input_dim))
        self.from_context = nn.Linear(context_dim, self.hidden_dims[0], bias=False) if context_dim else None
        self.steepness = nn.Parameter(torch.full((len(self.hidden_dims),), 0.5))  # β = softplus, as in the paper

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return g(x).

        Args:
            x: Inputs of shape ``(*batch, D)``.
            context: Contexts of shape ``(*batch, context_dim)``, broadcast with ``x``, or None if ``context_dim`` is 0.

        Returns:
            Of shape ``(*batch, D)``.

        Raises:
            ValueError: If the network takes contexts and none is given.
        """
        return self.at(context).linearise(x)[0]

    def at(self, context: Tensor | None = None) -> Layers:
        """Return the network at a context, with its matrices within their bounds, for many evaluations.

        Args:
            context: As for :meth:`forward`.

        Returns:
            Layers with the method ``linearise(x)``, which returns g(x) and the Jacobian there, in factors.

        Raises:
            ValueError: If the network takes contexts and none is given.
        """
        layers = [*self.hidden, self.output]
        limit = self.lipschitz ** (1 / len(layers))
        weights = [layer.weight / (spectral_bound(layer.weight) / limit).clamp_min(1) for layer in layers]
        biases = [layer.bias for layer in layers]
        share = share_of(self, context)
        if share is not None:
            biases[0] = biases[0] + share
        return Layers(weights, biases, F.softplus(self.steepness).unbind())


class Layers(NamedTuple):
    """A network at a context: matrices within their bounds, biases, and a steepness β for each hidden layer."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    steepness: Sequence[Tensor]

    def linearise(self, x: Tensor) -> tuple[Tensor, Jacobian]:
        """Return the value g(x) and the Jacobian there."""
        slopes = []
        for weight, bias, beta in zip(self.weights[:-1], self.biases[:-1], self.steepness, strict=True):
            a = x @ weight.mT + bias  # (*batch, h)
            gate = torch.sigmoid(beta * a)
            x = a * gate / STEEPEST
            slopes.append(gate / STEEPEST + beta * x * (1 - gate))
        return x @ self.weights[-1].mT + self.biases[-1], Jacobian(self.weights, slopes)


def spectral_bound(matrix: Tensor) -> Tensor:
    """Return a differentiable upper bound on the largest singular value of a matrix, tight to some per cent."""
    gram = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    tiny = torch.finfo(matrix.dtype).tiny
    log_bound, share = matrix.new_zeros(()), 1.0
    for _ in range(GRAMS):
        # The scale, a constant to autograd, cancels from the result; without it the powers would overflow.
        scale = gram.detach().abs().amax().clamp_min(tiny)
        gram = gram / scale
        log_bound = log_bound + share * scale.log()
        gram, share = gram @ gram.mT, share / 2
    square = gram.square().sum().clamp_min(tiny)  # at zero, where a norm has no gradient, the clamp gives none
    return (log_bound + share / 2 * square.log()).exp()


class Differentiated(NamedTuple):
    """A Jacobian by autograd: all products in one batch."""

    x: Tensor
    v: Tensor
    lasting: bool  # True if the results can be differentiated again

    def trace(self) -> Tensor:
        """Return tr J, ``(*batch)``."""
        size = self.x.shape[-1]
        units = torch.eye(size, dtype=self.x.dtype, device=self.x.device)
        rows = self.pull(units.reshape(size, *[1] * (self.x.dim() - 1), size).expand(size, *self.x.shape))
        return torch.einsum("i...i->...", rows)

    def pull(self, v: Tensor) -> Tensor:
        """Return Jᵀ v for covectors v, ``(K, *batch, D)``."""
        if not self.v.requires_grad:  # a field of time alone, without parameters
            return torch.zeros_like(v)
        with torch.inference_mode(False):
            settings = {"retain_graph": True, "create_graph": self.lasting, "is_grads_batched": True}
            seeds = _recordable(v.expand(-1, *self.v.shape))
            (found,) = torch.autograd.grad(self.v, self.x, seeds, allow_unused=True, **settings)
        return torch.zeros_like(v) if found is None else found


Rates = Callable[[Tensor, Tensor], tuple[Tensor, Jacobian | Differentiated]]  # (t, x) -> v, J


class VectorField(nn.Module):
    """A field v(t, x, c) of D numbers that depends on time, on the point, and optionally on a context.

    It is the abstract base class of the fields that :class:`~pyro_flows.transforms.Continuous` integrates, dx/dt =
    v(t, x, c).  To make a field of any network, define ``forward`` and call ``super().__init__(input_dim,
    context_dim)``.  Rows must be independent of one another and calls deterministic, unlike with batch norm and
    dropout.  Slopes should be continuous, since adaptive solvers take small steps at each kink.  The last layer should
    start at zero, so that the transform starts at the identity.  By default autograd finds the Jacobian.  A field that
    knows its own overrides :meth:`at`.

    Neural Ordinary Differential Equations (Chen, Rubanova, Bettencourt, Duvenaud 2018, arXiv:1806.07366).

    Args:
        input_dim: The number D of features, at least 1.
        context_dim: The number of context features, at least 0.

    Attributes:
        cheap_trace: True if the divergence costs about as much as the field itself, whatever D is; by default False.

    Raises:
        ValueError: If a size is out of its range.  In use, if the velocities that ``forward`` returns do not have the
            shape and the dtype of the points.

    Example::

        >>> import torch
        >>> class Rotation(VectorField):
        ...     def forward(self, t, x, context=None):
        ...         return torch.stack((-x[..., 1], x[..., 0]), -1)
        >>> v, jacobian = Rotation(2).at()(torch.tensor(0.5), torch.randn(5, 2))
        >>> v.shape, jacobian.trace().tolist()
        (torch.Size([5, 2]), [0.0, 0.0, 0.0, 0.0, 0.0])
    """

    cheap_trace = False

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__()
        check_integers(type(self).__name__, input_dim=input_dim)
        check_integers(type(self).__name__, 0, context_dim=context_dim)
        self.input_dim, self.context_dim = input_dim, context_dim

    @abstractmethod
    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the velocity of each point, ``(*batch, D)``.

        Args:
            t: The time, ``()``, or one for each point, ``(*batch)``; between 0 and 1.
            x: The points, ``(*batch, D)``.
            context: Contexts, ``(*batch, context_dim)``, that broadcast with x, or None if ``context_dim`` is 0.

        Returns:
            Of the shape and the dtype of x.  Solvers pass points x of the batch shape of all three arguments.

        Raises:
            ValueError: If the field takes contexts and none is given.
        """

    def at(self, context: Tensor | None = None) -> Rates:
        """Return the field at a context, with its Jacobian J = ∂v/∂x.

        Args:
            context: Contexts, ``(*batch, context_dim)``, that broadcast with the points, or None.

        Returns:
            A function ``(t, x) -> (v, J)`` of time and points, with velocities v, ``(*batch, D)``.  J has two methods.
            ``J.trace()`` returns the divergence ``(*batch)``.  ``J.pull(w)`` returns Jᵀ w for covectors w,
            ``(K, *batch, D)``.

        Raises:
            ValueError: If the field takes contexts and none is given.  The returned function raises it if velocities do
                not have the shape and the dtype of the points.
        """

        def rates(t: Tensor, x: Tensor) -> tuple[Tensor, Jacobian | Differentiated]:
            lasting = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.enable_grad():
                place = x if lasting and x.requires_grad else _recordable(x).detach().requires_grad_()
                v = self(_recordable(t), place, None if context is None else _recordable(context))
                if v.shape != x.shape or v.dtype != x.dtype:
                    fault = f"the velocity of {tuple(x.shape)} points in {x.dtype} must have their shape and dtype"
                    raise ValueError(f"{type(self).__name__}: {fault}, got {tuple(v.shape)} in {v.dtype}.")
            return (v if lasting else v.detach()), Differentiated(place, v, lasting)

        return rates


def _recordable(value: Tensor) -> Tensor:
    """Return a tensor that autograd can record, also if it was made in inference mode."""
    return value.clone() if value.is_inference() else value


class MLPField(Network, VectorField):
    """A multilayer perceptron as a vector field, zero at the start::

        v(t, x, c) = W_L h_{L-1} + b_L,    h_l = a(W_l h_{l-1} + b_l),    h_1 = a(W_1 x + b_1 + U τ(t) + V c)

    Time enters by its first Fourier modes τ, cos kπt and sin kπt.  Time and context are added to the first hidden
    layer.  The field knows its Jacobian: with one or two hidden layers the exact divergence costs at most as much as
    the field.

    FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl, Chen, Bettencourt,
    Sutskever, Duvenaud 2018, arXiv:1810.01367).

    Args:
        input_dim: The number D of features, at least 1.
        context_dim: The number of context features.
        hidden_dims: The widths of the hidden layers, at least one.
        frequencies: The number of Fourier modes of time, at least 1.
        activation: The class of the nonlinearity, with continuous slopes: ``torch.nn``'s ``ELU``, ``SiLU``,
            ``Softplus`` or ``Tanh``.

    Raises:
        ValueError: If a size is out of its range, or ``activation`` is not one of the four.  In use, if the
            field takes contexts and none is given.

    Example::

        >>> import torch
        >>> field = MLPField(2, context_dim=4)
        >>> t, x = torch.rand(7), torch.randn(7, 2)
        >>> v, jacobian = field.at(torch.randn(4))(t, x)
        >>> v.shape, jacobian.trace().shape
        (torch.Size([7, 2]), torch.Size([7]))
    """

    hidden: Sequence[Linear]

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        frequencies: int = 3,
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(input_dim, context_dim)
        check_sizes("MLPField", hidden_dims=hidden_dims)
        check_integers("MLPField", frequencies=frequencies)
        if not isinstance(activation, type) or activation not in SMOOTH:
            names = ", ".join(known.__name__ for known in SMOOTH)
            fault = f"activation must be one of {names}, of torch.nn, with continuous slopes, got {activation!r}"
            raise ValueError(f"MLPField: {fault}. For others, write a subclass of VectorField.")
        self.hidden_dims, self.frequencies, self.activation = tuple(hidden_dims), frequencies, activation
        self.cheap_trace = len(self.hidden_dims) <= 2
        layers = nn.ModuleList(Linear(n, m) for n, m in pairwise((input_dim, *self.hidden_dims)))
        self.hidden = layers  # type: ignore[assignment]
        self.output = Linear(self.hidden_dims[-1], input_dim, zero=True)
        self.act = activation()
        self.from_time = Linear(2 * frequencies, self.hidden_dims[0], bias=False)
        self.from_context = Linear(context_dim, self.hidden_dims[0], bias=False) if context_dim else None

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        first, *others = self.hidden
        h = self.act(first(x) + self._shift(t, share_of(self, context)))
        for layer in others:
            h = self.act(layer(h))
        return self.output(h)

    def at(self, context: Tensor | None = None) -> Rates:
        weights = [layer.matrix() for layer in (*self.hidden, self.output)]
        share = share_of(self, context)
        slope_of = SMOOTH[self.activation]

        def rates(t: Tensor, x: Tensor) -> tuple[Tensor, Jacobian | Differentiated]:
            h, slopes = x, []
            for number, layer in enumerate(self.hidden):
                a = layer(h) if number else layer(h) + self._shift(t, share)
                h = self.act(a)
                slopes.append(slope_of(a, h))
            return self.output(h), Jacobian(weights, slopes)

        return rates

    def _shift(self, t: Tensor, share: Tensor | None) -> Tensor:
        """Return the terms of the time and of the context in the first hidden layer."""
        modes = math.pi * torch.arange(1, self.frequencies + 1, dtype=t.dtype, device=t.device)
        phases = modes * t.unsqueeze(-1)
        of_time = self.from_time(torch.cat((phases.cos(), phases.sin()), -1))
        return of_time if share is None else of_time + share
