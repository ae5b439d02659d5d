"""The training loop: steps, state, checkpoints, and several processes that train together."""

from .loop import Fit as Fit
