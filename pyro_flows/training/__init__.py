"""The training loop: steps, state, checkpoints, and several processes that train as one."""

from .loop import Fit as Fit
