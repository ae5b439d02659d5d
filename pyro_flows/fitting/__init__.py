"""One training loop and its faces."""

from .loop import Fit as Fit
from .svi import fit_svi as fit_svi
