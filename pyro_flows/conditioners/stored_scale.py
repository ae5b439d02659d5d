"""Modules that store tensors in a unit, which sets how far a step of an optimiser moves them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Paced(nn.Module):
    """A module that stores some of its tensors divided by a unit.

    A step of an optimiser moves the stored tensor, and so moves the tensor in use by the unit times as much.  A state
    contains the unit, so that it can be loaded into a module of another pace.
    """

    @property
    def unit(self) -> float:
        """The factor between the stored tensors and those in use."""
        raise NotImplementedError

    def _paced_names(self) -> Iterable[str]:
        """Return the names, in a state, of the tensors that are stored in the unit."""
        raise NotImplementedError

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


def power_of_2(number: float) -> float:
    """Return the power of 2 closest to a positive number.  Products with it are exact."""
    return 2.0 ** round(math.log2(number))
