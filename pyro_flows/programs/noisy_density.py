"""Log-densities that are estimates, new at each run, as those of dequantised images: weights see their noise."""

from __future__ import annotations

import sys
import warnings
from typing import NamedTuple

NOISY, USELESS = 0.1, 3.0  # nats: where weights show noise, and where they show little else
INNER = {__name__.partition(".")[0], "torch", "contextlib", "functools"}


class Noise(NamedTuple):
    """The noise of a log-density at one and the same draw.

    Attributes:
        deviation: Its standard deviation in nats: 0 unless the density is an estimate.
        site: The site where it is largest, or an empty string.
    """

    deviation: float = 0.0
    site: str = ""


def check_noise(noise: Noise, *, is_weighed: bool) -> None:
    """Tell of a model whose log-density is an estimate, or refuse to weigh draws by it where they would be noise.

    Raises:
        ValueError: If draws are weighed, and the noise is above ``USELESS`` nats.
    """
    deviation, site = noise
    where = f", most at site {site!r}" if site else ""
    if is_weighed and not deviation <= USELESS:
        raise ValueError(
            f"the model's log-density changes from run to run, with a standard deviation of {deviation:.2g} nats at "
            f"one and the same draw{where}: draws cannot be weighed by it. Put networks with dropout into eval mode; "
            "draw noise once, outside of the model, or at a pyro.sample site; give more draws to an estimate, as "
            "Dequantized(flow, num_samples=...) does."
        )
    if deviation > NOISY:
        warn_user(
            f"the model's log-density is an estimate, with a standard deviation of {deviation:.2g} nats at one and the "
            f"same draw{where}: weights, k-hat and verdicts see that noise too. Give more draws to the estimate, as "
            "Dequantized(flow, num_samples=...) does, or fit flow, not Dequantized(flow), to x + noise drawn once.",
        )


def warn_user(message: str) -> None:
    """Warn at the line of the user's that called this package."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INNER:
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, stacklevel=level)
