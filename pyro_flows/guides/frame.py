"""The distribution from which a block of latents starts: Gaussian along the steps of each row, given its parents.

For the latents z of row i, given the latents p of the block's parents, among them the latents g outside of all rows::

    z_i = μ_i + M_i(g) (p - p_i) + e_i,    e_it = A_it(g) e_i,t-1 + L_it(g) w_it,
    M_i(g) = M_i + Σ_k C_ik (g - g_i)_k,    A_it(g) = A_it + Σ_k B_itk (g - g_i)_k,
    L_it(g) = L_it diag exp(s_it (g - g_i))

with w from the block's flow, and p_i the place of the parents at which the row has mean μ_i.  So the flow is trained in
coordinates in which the posterior is nearly standard normal, and funnels have straight walls.  The gain of a row in the
latents of an outer row depends on scales, which are among g: the C.  Thousands of rows with a constant gain would each
cost few nats away from the middle of g, and all together make g too narrow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..transforms.recurrence import Process

LEANS = 16  # the largest number of shared latents on which gains depend
Parts = tuple[Tensor | None, ...]  # the tensors of a frame, in the order of Frame.set


class Frame(nn.Module):
    """The distribution of a block: one for each row, set and not trained, at first the same for all rows.

    All tensors are parameters, so that parameter stores and checkpoints hold them, but no gradient reaches them.

    Args:
        start: The first means, ``(rows, T, d)``.
        scale: The first standard deviation.
        num_given: The number of the parents' latents.
        num_shared: The number of these, the first ones, that lie outside of all rows.
    """

    def __init__(self, start: Tensor, scale: float, num_given: int, num_shared: int) -> None:
        super().__init__()
        rows, self.steps, self.width = start.shape
        self.num_shared, several = num_shared, self.steps > 1  # the first step has none before it
        eye = (scale * torch.eye(self.width).to(start)).expand(rows, self.steps, -1, -1)
        self.origin = nn.Parameter(start.new_zeros(rows, num_given))
        self.loc = nn.Parameter(start.clone())
        self.gain = nn.Parameter(start.new_zeros(*start.shape, num_given))
        self.scale = nn.Parameter(eye.clone())
        self.stretch = nn.Parameter(start.new_zeros(*start.shape, num_shared))
        self.matrix = nn.Parameter(torch.zeros_like(eye)) if several else None
        self.turn = nn.Parameter(start.new_zeros(*eye.shape, num_shared)) if several else None
        inner = num_given - num_shared
        leans = inner > 0 and 0 < num_shared <= LEANS
        self.lean = nn.Parameter(start.new_zeros(*start.shape, inner, num_shared)) if leans else None

    @property
    def is_set(self) -> bool:
        """True if each row starts near its posterior, as its mean differs from that of other rows."""
        return bool((self.loc != self.loc[:1]).any())

    def parts(self) -> Parts:
        """Return the tensors that a file holds, for :meth:`of`."""
        return self.origin, self.loc, self.gain, self.scale, self.stretch, self.matrix, self.turn, self.lean

    @classmethod
    def of(cls, parts: Any) -> Frame | None:
        """Return a frame from its parts, or None."""
        if parts is None:
            return None
        origin, loc, _, _, stretch, *_ = parts
        frame = cls(loc, 1.0, origin.shape[-1], stretch.shape[-1])
        frame.set(*parts)
        return frame

    @torch.no_grad()
    def set(self, *parts: Any) -> None:
        """Set all tensors, in the order of :meth:`parts`; those that this frame lacks may be given."""
        for own, new in zip(self.parts(), parts, strict=True):
            if own is not None:
                own.copy_(new)

    def at(self, places: Tensor, given: Tensor | None) -> Process:
        """Return the map from noise to the latents of some rows.

        Args:
            places: The places of the rows, aligned, ``(*batch)``.
            given: The parents' latents, ``(*batch, num_given)``, or None.
        """
        loc, scale = self.loc.detach()[places], self.scale.detach()[places].tril()
        matrix = None if self.matrix is None else self.matrix.detach()[places]
        if given is None:
            return Process(loc, matrix, scale)
        away = given - self.origin.detach()[places]
        along, shared = away[..., None, :, None], away[..., None, : self.num_shared, None]
        loc = loc + (self.gain.detach()[places] @ along).squeeze(-1)
        if self.lean is not None:
            products = away[..., self.num_shared :, None] * away[..., None, : self.num_shared]
            loc = loc + (self.lean.detach()[places].flatten(-2) @ products.flatten(-2)[..., None, :, None]).squeeze(-1)
        scale = scale * (self.stretch.detach()[places] @ shared).exp().mT
        if matrix is not None and self.turn is not None:
            matrix = matrix + (self.turn.detach()[places] @ shared.unsqueeze(-3)).squeeze(-1)
        return Process(loc, matrix, scale)
