"""Normalizing flows as first-class citizens of Pyro."""

from types import ModuleType as _ModuleType

from . import encoders as encoders
from . import flows as flows
from . import plots as plots
from .answers import Posterior as Posterior
from .answers import posterior as posterior
from .data import Spike as Spike
from .data import dequantize as dequantize
from .data import find_spikes as find_spikes
from .diagnostics import Check as Check
from .diagnostics import Psis as Psis
from .diagnostics import bits_per_dim as bits_per_dim
from .diagnostics import calibrate as calibrate
from .diagnostics import check as check
from .diagnostics import importance_log_likelihood as importance_log_likelihood
from .diagnostics import local_c2st as local_c2st
from .diagnostics import misspecification as misspecification
from .diagnostics import neutra as neutra
from .diagnostics import ode_report as ode_report
from .diagnostics import psis as psis
from .diagnostics import refine as refine
from .diagnostics import resample as resample
from .diagnostics import round_off as round_off
from .diagnostics import save_images as save_images
from .diagnostics import to_arviz as to_arviz
from .fitting import anneal as anneal
from .fitting import fit_amortized as fit_amortized
from .fitting import fit_density as fit_density
from .fitting import fit_likelihood as fit_likelihood
from .fitting import fit_svi as fit_svi
from .fitting import sample as sample
from .flows import Flow as Flow
from .guides import AutoFlow as AutoFlow
from .guides import AutoPlateFlow as AutoPlateFlow
from .guides import AutoStructuredFlow as AutoStructuredFlow
from .guides import ensemble as ensemble
from .guides import posterior_graph as posterior_graph
from .persistence import load as load
from .persistence import save as save
from .programs import Program as Program
from .programs import Simulations as Simulations
from .programs import simulate as simulate
from .training import Fit as Fit

__version__ = "0.1.0"

# Packages are public, the modules beside them are not.
__all__ = [
    name
    for name, value in globals().items()
    if not name.startswith("_") and (not isinstance(value, _ModuleType) or hasattr(value, "__path__"))
]


def __dir__() -> list[str]:
    """Return the public names, which notebooks offer as completions."""
    return [*__all__, "__version__"]
