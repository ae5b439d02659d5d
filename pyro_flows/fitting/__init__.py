"""One training loop and its faces."""

from .amortized import fit_amortized as fit_amortized
from .density import fit_density as fit_density
from .loop import Fit as Fit
from .svi import fit_svi as fit_svi
