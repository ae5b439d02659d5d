"""Log-densities that are estimates, new at each call, as those of dequantised images: weights see their noise."""

from __future__ import annotations

import sys
import warnings

NOISY = 0.1  # nats
INNER = {__name__.partition(".")[0], "torch", "contextlib", "functools"}


def warn_of_noise(deviation: float) -> None:
    """Tell of a model whose log-density, at one and the same draw, has a standard deviation that weights will show."""
    if deviation > NOISY:
        warn_user(
            f"the model's log-density is an estimate, with a standard deviation of {deviation:.2g} nats at one and the "
            "same draw: weights, k-hat and verdicts see that noise too. Give more draws to the estimate, as "
            "Dequantized(flow, num_samples=...) does, or fit flow, not Dequantized(flow), to x + noise drawn once.",
        )


def warn_user(message: str) -> None:
    """Warn at the line of the user's that called this package."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INNER:
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, stacklevel=level)
