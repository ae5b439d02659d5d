"""Flows and their recipes, one short function a paper."""

from .autoregressive import bnaf as bnaf
from .autoregressive import bpf as bpf
from .autoregressive import iaf as iaf
from .autoregressive import maf as maf
from .autoregressive import naf as naf
from .autoregressive import nsf_ar as nsf_ar
from .autoregressive import sospf as sospf
from .autoregressive import umnn as umnn
from .continuous import cnf as cnf
from .continuous import ffjord as ffjord
from .coupling import circular_coupling as circular_coupling
from .coupling import flowpp as flowpp
from .coupling import gaussianization as gaussianization
from .coupling import nice as nice
from .coupling import nsf as nsf
from .coupling import realnvp as realnvp
from .dequantized import Dequantized as Dequantized
from .flow import Flow as Flow
from .image import flowpp_image as flowpp_image
from .image import glow as glow
from .image import realnvp_image as realnvp_image
from .image import tarflow as tarflow
from .residual import planar_flow as planar_flow
from .residual import radial_flow as radial_flow
from .residual import residual_flow as residual_flow
from .residual import sylvester_flow as sylvester_flow
