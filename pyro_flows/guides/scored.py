"""Simulated latents as the vectors that the flows of an amortised guide score, with the contexts of their data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..flows import Flow

Packed = list[tuple[Tensor, Tensor]]  # vectors of each flow, and log|det| of their packing in nats
EACH = 8  # rows of each dataset that are scored, enough to train the flow of rows


class Scored(NamedTuple):
    """Vectors that a flow scores.

    Attributes:
        flow: The flow.
        z: The vectors, ``(M, D)``.
        context: Their contexts, ``(M, context_dim)``.
        log_det: The log-determinant of their packing in nats, ``(M,)``.
    """

    flow: Flow
    z: Tensor
    context: Tensor
    log_det: Tensor


@dataclass(frozen=True)
class OfDatasets:
    """The posterior of M datasets by an amortised guide, of all latents or of those outside of a plate and in one row.

    Attributes:
        labels: The names of the numbers in the latents.
        pick: Returns from simulated latents those of the posterior, ``(M, *site_shape)``.
        sample: Returns so many draws, each ``(S, M, *site_shape)``.
        log_prob: Returns the log-density of values in nats, ``(..., M)``.
        vectors: Returns the packed, unconstrained vectors of values, ``(..., M, D)``.
    """

    labels: list[str]
    pick: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    sample: Callable[[int], dict[str, Tensor]]
    log_prob: Callable[[dict[str, Tensor]], Tensor]
    vectors: Callable[[dict[str, Tensor]], Tensor]
