"""Rows of a plate in simulated datasets: a random part of them is a dataset of the same model, with fewer rows.

Rows of a plate are independent given the latents outside, so rows that nobody sees change nothing.  One set of
simulations thus serves to train a guide for any number of rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..arguments import quoted
from ..guides import AutoPlateFlow
from ..guides.amortised import Packed
from ..guides.guide_call import frame_of
from ..programs.simulator import Simulator


class PlateRows:
    """The rows of the guide's plate in simulated datasets; each step of training sees some of them.

    Args:
        caller: The name of the public function, for errors.
        simulator: The model.
        guide: The guide, set up.
        numbers: The smallest and the largest number of rows in a step; by default any.

    Raises:
        ValueError: If there are more rows than in the simulations, or data outside of the plate have as many entries as
            the plate has rows.
    """

    def __init__(
        self, caller: str, simulator: Simulator, guide: AutoPlateFlow, numbers: tuple[int, int] | None
    ) -> None:
        self.simulator, self.axis = simulator, guide.posterior.blocks[-1].packing.dims[0]
        nodes = simulator.model.single.nodes
        rows = next(iter(guide.posterior.blocks[-1].packing.parts))
        self.full: int = frame_of(nodes[rows], guide.plate).size
        self.axes: dict[str, int] = {}
        for argument, site in simulator.sites.items():
            if frame := frame_of(nodes[site], guide.plate):
                self.axes[argument] = frame.dim - nodes[site]["fn"].event_dim
            elif self.full in nodes[site]["value"].shape:
                fault = f"data argument {argument!r} has {self.full} entries, as many as plate {guide.plate!r} has rows"
                way = "Draw it inside of the plate if it belongs to the rows, or simulate another number of rows"
                raise ValueError(f"{caller}: {fault}, but is drawn outside of the plate. {way}.")
        self.least: int
        self.most: int
        self.least, self.most = numbers or (1, self.full)
        if self.most > self.full:
            wanted = f"(least, most), from 1 to the {self.full} rows of plate {guide.plate!r} in the simulations"
            raise ValueError(f"{caller}: datasets must be {wanted}, got {quoted(numbers)}. Simulate more rows.")

    def some(self, data: dict[str, Tensor], packed: Packed) -> tuple[tuple[Any, ...], dict[str, Any], Packed]:
        """Return the arguments and the latents of datasets with a random number of their rows, the same rows in all.

        Small numbers are as frequent as large ones on the scale of their logarithm.

        Args:
            data: The data of N datasets, by the names of the model's arguments.
            packed: Their latents.
        """
        low, high = math.log(self.least), math.log(self.most + 1)
        number = min(self.most, int(math.exp(low + (high - low) * float(torch.rand(())))))
        rows = torch.randperm(self.full)[:number]

        def take(value: Tensor, axis: int) -> Tensor:
            return value.index_select(axis, rows.to(value.device))

        data = {name: take(value, self.axes[name]) if name in self.axes else value for name, value in data.items()}
        shared, (z, log_det) = packed
        args, kwargs = self.simulator.arguments({**self._fixed(rows), **data})
        return args, kwargs, [shared, (take(z, self.axis - 1), take(log_det, self.axis))]

    def _fixed(self, rows: Tensor) -> dict[str, Tensor]:
        """Return those arguments without simulated data that have one entry for each row of the plate, cut to rows."""
        given = self.simulator.given.items()
        tensors = {name: value for name, value in given if isinstance(value, Tensor) and value.dim()}
        return {name: value[rows.to(value.device)] for name, value in tensors.items() if len(value) == self.full}
