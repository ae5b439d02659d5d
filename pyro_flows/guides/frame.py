"""The Gaussian from which a block of latents starts: a process along the steps of each row, linear in its parents.

For the latents z of row i given the latents g of the block's parents::

    z_i = μ_i + M_i (g - g_i) + e_i,    e_it = A_it e_i,t-1 + L_it w_it

with w from the block's flow, and g_i the place of the parents at which the row has the mean μ_i.  So the flow is
trained in coordinates in which the posterior is nearly standard normal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..transforms import Process

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # the tensors of a frame, in the order of Frame.set


class Frame(nn.Module):
    """The Gaussian of a block: one for each row, set and not trained, at first the same for all rows.

    All tensors are parameters, so that parameter stores and checkpoints hold them, but no gradient reaches them.

    Args:
        start: The first means, ``(rows, T, d)``.
        scale: The first standard deviation.
        num_given: The number G of the parents' latents.
    """

    def __init__(self, start: Tensor, scale: float, num_given: int) -> None:
        super().__init__()
        rows, self.steps, self.width = start.shape
        eye = scale * torch.eye(self.width).to(start)
        self.origin = nn.Parameter(start.new_zeros(rows, num_given))
        self.loc = nn.Parameter(start.clone())
        self.gain = nn.Parameter(start.new_zeros(rows, self.steps, self.width, num_given))
        self.scale = nn.Parameter(eye.expand(rows, self.steps, -1, -1).clone())
        # The first step has none before it.
        self.matrix = nn.Parameter(torch.zeros_like(self.scale)) if self.steps > 1 else None

    def parts(self) -> Parts:
        """Return the tensors that a file holds, for :meth:`of`."""
        return self.origin, self.loc, self.gain, self.scale, self.matrix

    @classmethod
    def of(cls, parts: Parts | None, num_given: int) -> Frame | None:
        """Return a frame from its parts, or None."""
        if parts is None:
            return None
        frame = cls(parts[1], 1.0, num_given)
        frame.set(*parts)
        return frame

    @torch.no_grad()
    def set(self, origin: Tensor, loc: Tensor, gain: Tensor, scale: Tensor, matrix: Tensor | None) -> None:
        """Set all tensors."""
        self.origin.copy_(origin)
        self.loc.copy_(loc)
        self.gain.copy_(gain)
        self.scale.copy_(scale)
        if self.matrix is not None and matrix is not None:
            self.matrix.copy_(matrix)

    def at(self, places: Tensor, given: Tensor | None) -> Process:
        """Return the map from noise to the latents of some rows.

        Args:
            places: The places of the rows, aligned, ``(*batch)``.
            given: The parents' latents, ``(*batch, G)``, or None.
        """
        loc, scale = self.loc.detach()[places], self.scale.detach()[places].tril()
        if given is not None:
            shift = self.gain.detach()[places] @ (given - self.origin.detach()[places])[..., None, :, None]
            loc = loc + shift.squeeze(-1)
        return Process(loc, None if self.matrix is None else self.matrix.detach()[places], scale)
