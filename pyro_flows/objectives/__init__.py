"""Losses, each a module.

Those of variational inference are Pyro ELBOs, which serve ``fit_svi`` and ``SVI`` alike; ``Likelihood`` and
``FlowMatching`` train flows on rows, in ``fit_density`` and ``fit_amortized``.  Any module will do there that makes a
scalar of ``(flow, x, context)``; ``in_nats = True`` says that it is a mean of -log p, and ``trains_base = False`` that
it leaves the base as it is.
"""

from .forward import ForwardKL as ForwardKL
from .likelihood import Likelihood as Likelihood
from .matching import FlowMatching as FlowMatching
from .path import PathELBO as PathELBO
from .path import PathEnumELBO as PathEnumELBO
from .renyi import ImportanceWeightedELBO as ImportanceWeightedELBO
from .renyi import RenyiELBO as RenyiELBO
from .tempered import TemperedELBO as TemperedELBO
