"""One training loop and its faces."""

from .amortized import fit_amortized as fit_amortized
from .loop import Fit as Fit
from .svi import fit_svi as fit_svi
