"""Normalizing flows as first-class citizens of Pyro."""

from . import flows as flows
from .diagnostics import Check as Check
from .diagnostics import Psis as Psis
from .diagnostics import check as check
from .diagnostics import neutra as neutra
from .diagnostics import psis as psis
from .diagnostics import refine as refine
from .diagnostics import resample as resample
from .diagnostics import to_arviz as to_arviz
from .fitting import Fit as Fit
from .fitting import fit_svi as fit_svi
from .flows import Flow as Flow
from .guides import AutoFlow as AutoFlow

__version__ = "0.1.0"
