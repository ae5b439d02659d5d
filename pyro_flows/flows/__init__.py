"""Flows and their recipes, one short function a paper."""

from .autoregressive import iaf as iaf
from .autoregressive import maf as maf
from .autoregressive import nsf_ar as nsf_ar
from .circular import circular_coupling as circular_coupling
from .coupling import nice as nice
from .coupling import nsf as nsf
from .coupling import realnvp as realnvp
from .flow import Flow as Flow
from .planar import planar as planar
