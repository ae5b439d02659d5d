"""Objectives of variational inference; each is a Pyro ELBO, so it serves ``fit_svi`` and ``SVI`` alike."""

from .path import PathELBO as PathELBO
from .path import PathEnumELBO as PathEnumELBO
