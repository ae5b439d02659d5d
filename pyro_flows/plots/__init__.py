"""Figures of fits, draws, weights, calibrations, checks, images and flows, by matplotlib, which notebooks show."""

from .deformation import deformation as deformation
from .diagnostics import calibration as calibration
from .diagnostics import check as check
from .diagnostics import local_c2st as local_c2st
from .diagnostics import misspecification as misspecification
from .diagnostics import weights as weights
from .draws import marginals as marginals
from .draws import pairs as pairs
from .history import history as history
from .images import images as images
