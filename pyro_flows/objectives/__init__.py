"""Objectives of variational inference, each a Pyro ELBO: for ``fit_svi``, for ``SVI``, or ``objective(model, guide)``."""

from .path import PathELBO as PathELBO
from .path import PathEnumELBO as PathEnumELBO
