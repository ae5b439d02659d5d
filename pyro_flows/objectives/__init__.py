"""Losses, each a module.

The losses of variational inference are Pyro ELBOs: ``fit_svi`` and Pyro's ``SVI`` accept them.  ``Likelihood`` and
``FlowMatching`` train flows on rows, in ``fit_density`` and ``fit_amortized``.  Any other module that maps
``(flow, x, context)`` to a scalar serves there too.  Its attribute ``in_nats = True`` declares a mean of -log p, and
``trains_base = False`` a loss that does not train the base.
"""

from .flow_matching import FlowMatching as FlowMatching
from .forward_kl import ForwardKL as ForwardKL
from .likelihood import Likelihood as Likelihood
from .path_gradient import ImportanceWeightedELBO as ImportanceWeightedELBO
from .path_gradient import PathELBO as PathELBO
from .path_gradient import PathEnumELBO as PathEnumELBO
from .path_gradient import RenyiELBO as RenyiELBO
from .path_gradient import TemperedELBO as TemperedELBO
