"""Tensors that are stored in a unit: how a module has a pace, and what its states say of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Paced(nn.Module):
    """A module that stores some tensors divided by a unit, so that a step of an optimiser moves what they stand for by
    that unit times as much.

    States hold the unit, and mean the same to a module of another pace.
    """

    @property
    def unit(self) -> float:
        """The factor of the stored tensors in use."""
        raise NotImplementedError

    def _paced_names(self) -> Iterable[str]:
        """Return the names of the tensors in a state."""
        raise NotImplementedError

    def _rescaled(self, stored: Tensor, ratio: float) -> Tensor:
        """Return a tensor as it is stored once the unit is divided by a ratio."""
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


def power_of_2(number: float) -> float:
    """Return the power of 2 that is closest to a positive number: products with it are exact."""
    return 2.0 ** round(math.log2(number))
