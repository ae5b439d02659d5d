"""Fits of guides and flows to models, data and simulations, and samples from them."""

from .amortized import Observed as Observed
from .amortized import fit_amortized as fit_amortized
from .annealing import Annealed as Annealed
from .annealing import Mode as Mode
from .annealing import anneal as anneal
from .density import fit_density as fit_density
from .exact_draws import sample as sample
from .likelihood import fit_likelihood as fit_likelihood
from .svi import fit_svi as fit_svi
