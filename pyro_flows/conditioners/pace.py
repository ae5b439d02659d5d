"""The pace of networks: how far their results move in a step of an optimiser.

Adam moves each number by about its step size, whatever the size of the gradient.  So the results of a layer move by
about the step size times the number of its inputs, and deep or wide flows explode at the step sizes of plain SVI.  The
optimiser belongs to the user, and no factor of a gradient changes its steps.  So a layer stores its weights divided by
a *unit*, and a step moves the weights in use by the unit times as much: the maximal update parametrisation (Yang, Hu
2020, arXiv:2011.14522; Yang et al. 2022, arXiv:2203.03466).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        return self.paced(F.linear(x, self.weight, self.bias))

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
        part.set_unit(1.0 if pace is None else power_of_2(part.unit_at(pace)))


def power_of_2(number: float) -> float:
    """Return the power of 2 closest to a positive number."""
    return 2.0 ** round(math.log2(number))


def zero_(layer: nn.Module) -> nn.Module:
    """Set all parameters of a layer to zero, and return it."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
