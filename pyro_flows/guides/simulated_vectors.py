"""Simulated latents as the vectors that the flows of an amortised guide score, with the contexts of their data."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..flows import Flow

Packed = list[tuple[Tensor, Tensor]]  # vectors of each flow, and log|det| of their packing in nats
EACH = 8  # rows of each dataset that are scored, enough to train the flow of rows


class SimulatedVectors(NamedTuple):
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
