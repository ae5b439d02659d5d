"""The training loop: steps, state, checkpoints, and several processes that train together."""

from .loop import Fit as Fit
from .options import Gradients as Gradients
from .options import Training as Training
