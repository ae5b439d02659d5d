"""Objectives of variational inference; each is a Pyro ELBO, so it serves ``fit_svi`` and ``SVI`` alike."""

from .forward import ForwardKL as ForwardKL
from .path import PathELBO as PathELBO
from .path import PathEnumELBO as PathEnumELBO
from .renyi import ImportanceWeightedELBO as ImportanceWeightedELBO
from .renyi import RenyiELBO as RenyiELBO
from .tempered import TemperedELBO as TemperedELBO
