"""The base class of conditioners, networks (x, context) -> the parameters of a bijector, and their linear layers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import arguments
from ..arguments import check_integers, check_numbers, check_sizes
from ..vjp import vjp

# Step sizes that suit the location and scale of a guide are large for its networks: at 1 the regression of
# tests/test_pace.py ends 2 to 16 nats lower.
HIDDEN_PACE = 1 / 4


class Network(nn.Module):
    """A module with ``Linear`` layers, whose pace a guide can choose.

    Attributes:
        pace: How far these layers move in a step of an optimiser: see ``set_pace``.
    """

    pace: float | None = None

    def set_pace(self, pace: float | None) -> None:
        """Choose how far the layers move in a step of an optimiser, without changing the function of the network.

        Args:
            pace: For steps of Adam of size lr, the results of the last layer move by about ``pace * lr``, and hidden
                units by a quarter of lr, whatever the widths.  None keeps the weights of torch: results and hidden
                units then move in proportion to the widths of the layers.

        Raises:
            ValueError: If the pace is not positive and finite.
        """
        check_numbers(type(self).__name__, above=0, optional=True, pace=pace)
        parts = list(self.own_parts())
        if not any(isinstance(part, Linear) for part in parts):
            return  # convolutions and transformers have no pace
        for part in parts:
            if isinstance(part, Network):
                part.pace = pace
            elif isinstance(part, Linear):
                wished = 1.0 if pace is None else (pace if part.zero else HIDDEN_PACE) / max(part.in_features, 1)
                part.set_pace(power_of_2(wished))

    def own_parts(self) -> Iterable[nn.Module]:
        """Return the modules that share the pace, this one included."""
        return self.modules()


Gradients = list[tuple[Tensor, Tensor]]  # of some parameters: each with its gradient
Pull = Callable[[Tensor, bool], tuple[Tensor, Gradients]]


class Conditioner(Network):
    """A network θ(x, c) that computes ``num_params`` parameters for each of ``output_dim`` features.

    It is the abstract base class of the networks behind couplings, autoregressive layers and conditional maps.
    A feature is a number and ``size`` is ``()``, or it is a channel of an image, of size ``(H, W)``, or a token of a
    sequence, of size ``(token_dim,)``.  Each number of a feature receives its own parameters.

    A subclass calls ``super().__init__`` and defines :meth:`forward`.  It keeps these rules:

    - its last layer starts at zero, and the others at random: then every bijector starts at the identity, and after
      three steps of an optimiser every parameter has moved;
    - its layers are ``Linear`` of ``conditioners.base``, whose pace a guide can choose (``set_pace``);
    - the context enters the first hidden layer by :meth:`add_context`, so that it is processed once and broadcast over
      samples;
    - rows are independent of one another, unlike with batch norm, and calls are deterministic.

    Output ``p * output_dim + i`` of the last layer should be parameter p of feature i, as :meth:`arranged` assumes.
    Each parameter of all features is then contiguous in memory, as the elementwise maps read them.

    Args:
        input_dim: The number of features that go in; 0 if the parameters depend on the context only.
        output_dim: The number of features that receive parameters.
        num_params: The number of parameters of each number of a feature (``bijector.num_params``).
        hidden_dims: The widths of the hidden layers, at least one.
        context_dim: The number of context features, 0 without.

    Attributes:
        size: The shape of one feature, ``()`` unless a subclass sets another.
        from_context: The linear map of contexts ``(*batch, context_dim)`` to the first hidden layer, or None.

    Raises:
        ValueError: If a size is out of its range.

    Example::

        >>> import torch
        >>> from pyro_flows.bijectors import Affine
        >>> from pyro_flows.transforms import Coupling
        >>> class OneLayer(Conditioner):
        ...     def __init__(self, input_dim, output_dim, num_params, width=16, context_dim=0):
        ...         super().__init__(input_dim, output_dim, num_params, (width,), context_dim)
        ...         self.first = Linear(input_dim, width)
        ...         self.last = Linear(width, num_params * output_dim, zero=True)
        ...     def forward(self, x, context=None):
        ...         h = torch.tanh(self.add_context(self.first(x), context))
        ...         return self.arranged(self.last(h))
        >>> layer = Coupling(Affine(), OneLayer(2, 1, num_params=2), mask=[True, True, False])
        >>> y, log_det = layer.forward_and_log_det(torch.ones(3))
        >>> y.tolist(), log_det.item()  # the identity at the start
        ([1.0, 1.0, 1.0], 0.0)
    """

    size: tuple[int, ...] = ()
    from_context: nn.Module | None

    def __init__(
        self, input_dim: int, output_dim: int, num_params: int, hidden_dims: Sequence[int], context_dim: int
    ) -> None:
        super().__init__()
        caller = type(self).__name__
        check_integers(caller, 0, input_dim=input_dim, context_dim=context_dim)
        check_integers(caller, output_dim=output_dim, num_params=num_params)
        check_sizes(caller, hidden_dims=hidden_dims)
        self.input_dim, self.output_dim = input_dim, output_dim
        self.num_params, self.context_dim = num_params, context_dim
        self.hidden_dims = tuple(hidden_dims)
        self.from_context = Linear(context_dim, self.hidden_dims[0], bias=False) if context_dim else None

    def add_context(self, h: Tensor, context: Tensor | None) -> Tensor:
        """Add the term of the context to the first hidden layer.

        Args:
            h: The term of the inputs, ``(*batch, hidden_dims[0])``.
            context: Contexts of shape ``(*batch, context_dim)``, broadcast with ``h``; ignored if ``context_dim`` is 0.

        Returns:
            Of shape ``(*batch, hidden_dims[0])``.

        Raises:
            ValueError: If the network takes contexts and none is given.
        """
        share = share_of(self, context)
        return h if share is None else h + share

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Compute parameters.

        Args:
            x: Inputs of shape ``(*batch, input_dim, *size)``.
            context: Contexts of shape ``(*batch, context_dim)``, broadcast with ``x``, or None if ``context_dim`` is 0.

        Returns:
            Parameters of shape ``(*batch, output_dim, *size, num_params)``.

        Raises:
            ValueError: If the network takes contexts and none is given.
        """

    def arranged(self, outputs: Tensor) -> Tensor:
        """Return ``(*batch, num_params * output_dim)`` outputs of a layer as ``(*batch, output_dim, num_params)``."""
        return outputs.unflatten(-1, (self.num_params, self.output_dim)).mT

    def forward_and_pull(self, x: Tensor) -> tuple[Tensor, Pull]:
        """Compute parameters without a context, and return the vector–Jacobian product of the network.

        By default autograd finds it.  A network with known slopes overrides this method.

        Args:
            x: Inputs of shape ``(*batch, input_dim, *size)``.

        Returns:
            The parameters, without a gradient, and a function ``(g, own) -> (of x, of parameters)``.  Given the
            gradient g of the parameters of the bijector, it returns the gradient of x.  If ``own``, it also returns the
            gradient of each parameter of the network.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            params = self(x)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]

        def pull(g: Tensor, own: bool) -> tuple[Tensor, Gradients]:
            sources = [x, *trained] if own else [x]
            of_x, *rest = vjp((params,), sources, (g,))
            return of_x, list(zip(trained, rest, strict=True)) if own else []

        return params.detach(), pull


class Paced(nn.Module):
    """A module that stores some of its tensors divided by a unit.

    A step of an optimiser moves the stored tensor, and so moves the tensor in use by the unit times as much.  A state
    contains the unit, so that it can be loaded into a module of another pace.
    """

    pace: float | None

    @property
    def unit(self) -> float:
        """The factor between the stored tensors and those in use, by default the pace."""
        return 1.0 if self.pace is None else self.pace

    @torch.no_grad()
    def set_pace(self, pace: float | None) -> None:
        """Change the pace and keep what the module computes, exactly in floating point if units are powers of 2.

        Args:
            pace: How far the tensors in use move in a step of an optimiser, as the class defines it.  None stores them
                without a factor.

        Raises:
            ValueError: If the pace is not positive and finite.
        """
        check_numbers(type(self).__name__, above=0, optional=True, pace=pace)
        before, self.pace = self.unit, pace
        parameters = dict(self.named_parameters())
        for name in self._paced_names():
            parameters[name].copy_(self._rescaled(parameters[name], before / self.unit))

    def paced(self, stored: Tensor) -> Tensor:
        """Return a stored tensor, or a linear function of stored tensors, times the unit."""
        return stored if self.unit == 1.0 else self.unit * stored

    def _paced_names(self) -> Iterable[str]:
        """Return the names, in a state, of the tensors that are stored in the unit; by default all parameters."""
        return [name for name, _ in self.named_parameters()]

    def _rescaled(self, stored: Tensor, ratio: float) -> Tensor:
        """Return a stored tensor for a unit that is divided by a ratio."""
        return ratio * stored

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.unit != 1.0:
            destination[f"{prefix}pace"] = torch.tensor(self.unit)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        ratio = float(state_dict.pop(f"{prefix}pace", 1.0)) / self.unit
        for name in self._paced_names():
            if ratio != 1.0 and (key := prefix + name) in state_dict:
                state_dict[key] = self._rescaled(state_dict[key], ratio)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Linear(Paced, nn.Linear):
    """y = p (W x + b), where the pace p sets how far y moves when an optimiser moves W and b.

    Adam moves each weight by about its step size, whatever the size of the gradient.  So y moves by about the step size
    times the number of inputs.  A pace of 1 over this number cancels it: the maximal update parametrisation (Yang, Hu
    2020, arXiv:2011.14522; Yang et al. 2022, arXiv:2203.03466).

    Args:
        in_features: The number of inputs.
        out_features: The number of outputs.
        bias: True for a bias b.
        zero: True if W and b start at zero, as in a last layer; otherwise they start as in ``torch.nn.Linear``.

    Example::

        >>> import torch
        >>> layer, x = Linear(64, 2), torch.ones(64)
        >>> y = layer(x)
        >>> layer.set_pace(1 / 64)
        >>> torch.equal(layer(x), y)
        True
    """

    pace: float = 1.0

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, zero: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.zero = zero
        if zero:
            zero_(self)

    def connections(self) -> Tensor:
        """Return W."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.paced(F.linear(x, self.connections(), self.bias))

    def matrix(self) -> Tensor:
        """Return the matrix of the map, p W."""
        return self.paced(self.connections())

    def pull(self, g: Tensor, x: Tensor, gradients: Gradients | None) -> Tensor:
        """Return the gradient of the inputs.

        Args:
            g: The gradient of the results, ``(N, out_features)``.
            x: The inputs, ``(N, in_features)``.
            gradients: A list to which the gradients of W and b are appended, or None.
        """
        g = self.paced(g)
        if gradients is not None:
            gradients.append((self.weight, g.mT @ x))
            if self.bias is not None:
                gradients.append((self.bias, g.sum(0)))
        return g @ self.weight


class MaskedLinear(Linear):
    """y = p ((W ∘ M) x + b), where the 0/1 matrix M removes connections."""

    mask: Tensor

    def __init__(self, in_features: int, out_features: int, *, zero: bool = False) -> None:
        super().__init__(in_features, out_features, zero=zero)
        self.register_buffer("mask", torch.ones(out_features, in_features), persistent=False)

    def connections(self) -> Tensor:
        """Return W ∘ M."""
        return self.weight * self.mask


class Rectifier(nn.ReLU):
    """max(0, x) in place, for inputs that nothing else reads, such as the results of linear layers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=torch._C._get_tracing_state() is None)  # torch.jit must record a copy


def power_of_2(number: float) -> float:
    """Return the power of 2 closest to a positive number.  Products with it are exact."""
    return 2.0 ** round(math.log2(number))


def activation_of(caller: str, kind: type[nn.Module]) -> nn.Module:
    """Return an activation for the results of linear layers; errors as in ``arguments.activation_of``."""
    return Rectifier() if kind is nn.ReLU else arguments.activation_of(caller, kind)


def share_of(net: Any, context: Tensor | None) -> Tensor | None:
    """Return the term of a context in the first hidden layer of a network, or None if the network takes no contexts.

    Raises:
        ValueError: If the network takes contexts and none is given.
    """
    if net.from_context is None:
        return None
    if context is None:
        name, width = type(net).__name__, net.context_dim
        raise ValueError(f"{name}: context is missing; this network takes contexts of width {width}.")
    return net.from_context(context)


def zero_(layer: nn.Module) -> nn.Module:
    """Set all parameters of a layer to zero, and return it."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
