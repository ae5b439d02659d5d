"""Diagnostics: verdicts, importance weights, calibration, checks of one observation, and draws as ArviZ data."""

from .arviz import to_arviz as to_arviz
from .calibration import Calibration as Calibration
from .calibration import calibrate as calibrate
from .findings import Finding as Finding
from .flow_reports import OdeReport as OdeReport
from .flow_reports import bits_per_dim as bits_per_dim
from .flow_reports import ode_report as ode_report
from .flow_reports import round_off as round_off
from .flow_reports import save_images as save_images
from .importance import Psis as Psis
from .importance import psis as psis
from .importance import resample as resample
from .local_c2st import LocalC2ST as LocalC2ST
from .local_c2st import local_c2st as local_c2st
from .misspecification import Misspecification as Misspecification
from .misspecification import misspecification as misspecification
from .neutra import Neutra as Neutra
from .neutra import neutra as neutra
from .refinement import Refined as Refined
from .refinement import refine as refine
from .row_weights import importance_log_likelihood as importance_log_likelihood
from .verdict import Check as Check
from .verdict import check as check
