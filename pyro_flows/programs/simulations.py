"""Draws of latents and data, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_tensors


@dataclass(frozen=True)
class Simulations:
    """N joint draws of latents and data, from :func:`~pyro_flows.simulate` or from any other simulator.

    Attributes:
        latents: For each latent site the values, ``(N, *site_shape)``.
        data: For each argument that holds data the values, ``(N, *site_shape)``.

    Raises:
        TypeError: If a value is no tensor.
        ValueError: If there are no data, or not as many rows of all.

    Example::

        >>> import torch
        >>> theta = torch.randn(100)
        >>> found = Simulations({"theta": theta}, {"x": theta + 0.5 * torch.randn(100)})
        >>> len(found), len(found.take(slice(10))), found.row(0)["x"].shape, len(found.join(found))
        (100, 10, torch.Size([]), 200)
    """

    latents: dict[str, Tensor]
    data: dict[str, Tensor]

    def __post_init__(self) -> None:
        check_tensors("Simulations", "latents", self.latents)
        check_tensors("Simulations", "data", self.data)
        sizes = {name: len(value) for group in (self.latents, self.data) for name, value in group.items()}
        if not self.data or len(set(sizes.values())) > 1:
            raise ValueError(f"Simulations: latents and data must have as many rows, and some data, got {sizes}.")

    def __repr__(self) -> str:
        groups = ("latents", self.latents), ("data", self.data)
        parts = [
            f"{kind} {', '.join(f'{n} {tuple(v.shape[1:])}' for n, v in g.items()) or 'none'}" for kind, g in groups
        ]
        return f"Simulations({len(self)} draws; {'; '.join(parts)})"

    def row(self, number: int) -> dict[str, Tensor]:
        """Return one dataset: for each argument that holds data its value, ``site_shape``."""
        return {name: value[number] for name, value in self.data.items()}

    def take(self, index: Tensor | slice) -> Simulations:
        """Return the draws at an index ``(n,)`` or in a slice."""
        return Simulations(*({name: value[index] for name, value in g.items()} for g in (self.latents, self.data)))

    @property
    def has_finite_data(self) -> Tensor:
        """True for each draw whose data are finite, ``(N,)``."""
        return torch.stack([x.reshape(len(x), -1).isfinite().all(-1) for x in self.data.values()]).all(0)

    def join(self, other: Simulations) -> Simulations:
        """Return these draws followed by those of another object."""
        groups = (self.latents, other.latents), (self.data, other.data)
        return Simulations(*({name: torch.cat((a[name], b[name])) for name in a} for a, b in groups))

    @property
    def numbers(self) -> int:
        """The number of numbers in a dataset."""
        return sum(value[:1].numel() for value in self.data.values())

    def __len__(self) -> int:
        return len(next(iter(self.data.values())))


def check_draws(caller: str, what: str, name: str, value: Tensor) -> None:
    """Raise ValueError for draws ``(N, *shape)`` that are not finite, or all the same."""
    if not value.isfinite().all():
        rows = value.reshape(len(value), -1).isfinite().all(1)
        fault = f"{what} {name!r} holds NaN or inf in {int((~rows).sum())} of {len(value)} draws"
        raise ValueError(f"{caller}: {fault}. Simulate first, and give those that are finite, simulations=....")
    if len(value) > 1 and value.numel() and (value == value[:1]).all():
        raise ValueError(f"{caller}: {what} {name!r} is constant: {value[0].flatten()[0].item():.6g} in every draw.")
