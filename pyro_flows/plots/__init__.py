"""Pictures of fits, draws, weights, calibrations, images and flows, as matplotlib figures that notebooks show."""

from .calibration import calibration as calibration
from .check import check as check
from .deformation import deformation as deformation
from .history import history as history
from .images import images as images
from .marginals import marginals as marginals
from .pairs import pairs as pairs
from .weights import weights as weights
