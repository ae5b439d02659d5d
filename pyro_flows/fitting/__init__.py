"""Fit guides and flows: to models, to data, to simulations."""

from .amortized import fit_amortized as fit_amortized
from .density import fit_density as fit_density
from .svi import fit_svi as fit_svi
