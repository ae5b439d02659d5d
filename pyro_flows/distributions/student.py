"""Student's t with trainable tails: a base for targets with tails heavier than a Gaussian's.

A flow of Lipschitz maps, such as couplings and splines with linear tails, cannot make the tails of its base heavier, so
the base must bring them (Jaini, Kobyzev, Yu, Brubaker 2020, Tails of Lipschitz Triangular Flows, arXiv:1907.04481), one
index for each feature (Laszkiewicz, Lederer, Fischer 2022, Marginal Tail-Adaptive Normalizing Flows, arXiv:2206.10311).
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..checks import as_shape, check_numbers


class StudentTBase(nn.Module):
    """Builds independent standard Student's t, each feature with trainable degrees of freedom::

        df = l (u / l)^σ(a)

    with a real parameter a, between the bounds l and u: geometric steps, which an optimiser can take at one pace all
    the way from Cauchy to normal.  It is the base for targets with heavy tails: no flow of Lipschitz maps, such as
    couplings and splines with linear tails, can make those of its base heavier.  Draws have first derivatives only.

    Tails of Lipschitz Triangular Flows (Jaini, Kobyzev, Yu, Brubaker 2020, arXiv:1907.04481); Marginal Tail-Adaptive
    Normalizing Flows (Laszkiewicz, Lederer, Fischer 2022, arXiv:2206.10311).

    Args:
        event_shape: The shape of an event; a number D stands for ``(D,)``.
        df: The degrees of freedom at the start.
        min_df: Their lower bound l; 1 is the Cauchy distribution, and means exist above 1, variances above 2.
        max_df: Their upper bound u; at 200 the distribution is normal to some 4e-5 nats.

    Raises:
        ValueError: Unless ``0 < min_df < df < max_df < inf``.

    Example::

        >>> base = StudentTBase((3,), df=5.0)
        >>> base().event_shape, round(base.degrees_of_freedom[0].item(), 3)
        (torch.Size([3]), 5.0)
    """

    def __init__(
        self,
        event_shape: int | tuple[int, ...] | torch.Size,
        df: float = 10.0,
        min_df: float = 1.0,
        max_df: float = 200.0,
    ) -> None:
        super().__init__()
        check_numbers("StudentTBase", above=0, df=df, min_df=min_df, max_df=max_df)
        if not min_df < df < max_df:
            raise ValueError(f"StudentTBase: df must lie between min_df = {min_df} and max_df = {max_df}, got {df}.")
        self.event_shape = as_shape("StudentTBase", "event_shape", event_shape)
        self.df, self.min_df, self.max_df = df, min_df, max_df
        start = math.log(math.log(df / min_df) / math.log(max_df / df))
        self.free_df = nn.Parameter(torch.full(self.event_shape, start))

    @property
    def degrees_of_freedom(self) -> Tensor:
        """The degrees of freedom of each feature as they are now, ``event_shape``."""
        return self.min_df * torch.exp(math.log(self.max_df / self.min_df) * torch.sigmoid(self.free_df))

    def forward(self) -> dist.TorchDistribution:
        """Build the distribution as its parameters are now, of batch shape ``()`` and event shape ``event_shape``."""
        df = self.degrees_of_freedom
        zeros, ones = torch.zeros_like(df), torch.ones_like(df)
        return dist.StudentT(df, zeros, ones, validate_args=False).to_event(df.dim())
