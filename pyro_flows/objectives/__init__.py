"""Losses, each a module.

The losses of variational inference are Pyro ELBOs: ``fit_svi`` and Pyro's ``SVI`` accept them.  ``Likelihood`` and
``FlowMatching`` train flows on rows, in ``fit_density`` and ``fit_amortized``.  Any other module that maps
``(flow, x, context)`` to a scalar serves there too.  Its attribute ``in_nats = True`` declares a mean of -log p, and
``trains_base = False`` a loss that does not train the base.
"""

from .forward import ForwardKL as ForwardKL
from .likelihood import Likelihood as Likelihood
from .matching import FlowMatching as FlowMatching
from .path import PathELBO as PathELBO
from .path import PathEnumELBO as PathEnumELBO
from .renyi import ImportanceWeightedELBO as ImportanceWeightedELBO
from .renyi import RenyiELBO as RenyiELBO
from .tempered import TemperedELBO as TemperedELBO
