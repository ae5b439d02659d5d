"""The base class of conditioners, networks (x, context) -> the parameters of a bijector, and the pace of their layers.

The *pace* of a network is how far its results move in a step of an optimiser.

Adam moves each number by about its step size, whatever the size of the gradient.  So the results of a layer move by
about the step size times the number of its inputs, and deep or wide flows explode at the step sizes of plain SVI.  The
optimiser belongs to the user, and no factor of a gradient changes its steps.  So a layer stores its weights divided by
a *unit*, and a step moves the weights in use by the unit times as much: the maximal update parametrisation (Yang, Hu
2020, arXiv:2011.14522; Yang et al. 2022, arXiv:2203.03466).
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import arguments
from ..arguments import check_integers, check_sizes
from ..compiler_state import is_mapped

# Step sizes that suit the location and scale of a guide are large for its networks: at 1 the regression of
# tests/test_pace.py ends 2 to 16 nats lower.
HIDDEN_PACE = 1 / 4


class Paced(nn.Module):
    """A module that stores some of its tensors divided by a unit.  A state contains the unit.

    Attributes:
        unit: The factor between stored tensors and those in use, a power of 2, so that products with it are exact.
        stored: The names, in a state, of the tensors that are stored in the unit.
    """

    unit = 1.0
    stored: tuple[str, ...] = ()

    def unit_at(self, pace: float) -> float:
        """Return the unit at which steps of Adam of size lr move the results of the module by about ``pace * lr``."""
        return pace

    @torch.no_grad()
    def set_unit(self, unit: float) -> None:
        """Change the unit and keep what the module computes, exactly in floating point if units are powers of 2."""
        if self.stored and unit != self.unit:
            for name, parameter in self.named_parameters():
                # Pruning and norms of torch keep a weight as weight_orig, or below parametrizations.weight.
                if name.removeprefix("parametrizations.").startswith(self.stored):
                    self._rescale(parameter, self.unit / unit)
            self.unit = unit

    def paced(self, stored: Tensor) -> Tensor:
        """Return a stored tensor, or a linear function of stored tensors, times the unit."""
        return stored if self.unit == 1.0 else self.unit * stored

    def _rescale(self, stored: Tensor, ratio: float) -> None:
        stored.mul_(ratio)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.unit != 1.0:
            destination[f"{prefix}unit"] = torch.tensor(self.unit)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        unit = float(state_dict.pop(f"{prefix}unit", 1.0))
        if any(prefix + name in state_dict for name in self.stored):
            self.set_unit(unit)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Linear(Paced, nn.Linear):
    """y = p (W x + b), where the unit p sets how far y moves when an optimiser moves W and b.

    Args:
        in_features: The number of inputs.
        out_features: The number of outputs.
        bias: True for a bias b.
        zero: True if W and b start at zero, as in a last layer; otherwise they start as in ``torch.nn.Linear``.

    Example::

        >>> import torch
        >>> layer, x = Linear(64, 2), torch.ones(64)
        >>> y = layer(x)
        >>> set_pace([layer], 1.0)
        >>> torch.equal(layer(x), y), layer.unit
        (True, 0.00390625)
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, zero: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.zero = zero
        self.stored = ("weight", "bias") if bias else ("weight",)
        if zero:
            zero_(self)

    def unit_at(self, pace: float) -> float:
        """Return the unit of a last layer at a pace; hidden units move by a quarter of a step at any pace."""
        return (pace if self.zero else HIDDEN_PACE) / max(self.in_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        # A number of rows that is a symbol cannot decide; few results take less time than the matrix.
        if is_mapped() or math.prod(x.shape[:-1]) <= self.in_features:
            return self.paced(F.linear(x, self.weight, self.bias))
        return F.linear(x, self.paced(self.weight), None if self.bias is None else self.paced(self.bias))

    def matrix(self) -> Tensor:
        """Return the matrix of the map, p W."""
        return self.paced(self.weight)

    def shift(self) -> Tensor:
        """Return the shift of the map as a column, p b."""
        return self.paced(self.bias).unsqueeze(-1)


class Network(nn.Module):
    """A module whose :class:`Linear` layers share a pace; networks inside of it have paces of their own."""


def networks_of(module: nn.Module) -> list[list[Linear]]:
    """Return the linear layers of each network in a module that has such layers."""
    layers = [[*_layers(part)] for part in module.modules() if isinstance(part, Network)]
    return [found for found in layers if found]


def _layers(module: nn.Module) -> Iterator[Linear]:
    for child in module.children():
        if isinstance(child, Linear):
            yield child
        elif not isinstance(child, Network):
            yield from _layers(child)


def set_pace(parts: Iterable[Paced], pace: float | None) -> None:
    """Choose how far parts move in a step of an optimiser, without changing what they compute.

    Args:
        parts: The parts, such as the layers of a network.
        pace: For steps of Adam of size lr, the results of a last layer, or of a table, move by about ``pace * lr``, and
            hidden units by a quarter of lr, whatever the widths.  None stores all tensors as they are used: results
            then move in proportion to the widths of the layers.
    """
    for part in parts:
        part.set_unit(1.0 if pace is None else 2.0 ** round(math.log2(part.unit_at(pace))))


def zero_(layer: nn.Module) -> nn.Module:
    """Set all parameters of a layer to zero, and return it."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Conditioner(Network):
    """A network θ(x, c) that computes ``num_params`` parameters for each of ``output_dim`` features.

    It is the abstract base class of the networks behind couplings, autoregressive layers and conditional maps.
    A feature is a number and ``size`` is ``()``, or it is a channel of an image, of size ``(H, W)``, or a token of a
    sequence, of size ``(token_dim,)``.  Each number of a feature receives its own parameters.

    A subclass calls ``super().__init__`` and defines :meth:`forward`.  It keeps these rules:

    - its last layer starts at zero, and the others at random: then every bijector starts at the identity, and after
      three steps of an optimiser every parameter has moved;
    - its layers are ``Linear`` of ``conditioners.base``, so that a guide can choose how far a step moves them;
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


class Rectifier(nn.ReLU):
    """max(0, x) in place, for inputs that nothing else reads, such as the results of linear layers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=torch._C._get_tracing_state() is None)  # torch.jit must record a copy


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
