"""Flows and their recipes, one short function a paper."""

from .autoregressive import iaf as iaf
from .autoregressive import maf as maf
from .autoregressive import nsf_ar as nsf_ar
from .continuous import cnf as cnf
from .continuous import ffjord as ffjord
from .coupling import circular_coupling as circular_coupling
from .coupling import flowpp as flowpp
from .coupling import nice as nice
from .coupling import nsf as nsf
from .coupling import realnvp as realnvp
from .dequantized import Dequantized as Dequantized
from .flow import Flow as Flow
from .gaussianization import gaussianization as gaussianization
from .image import flowpp_image as flowpp_image
from .image import glow as glow
from .image import realnvp_image as realnvp_image
from .monotone import bnaf as bnaf
from .monotone import bpf as bpf
from .monotone import naf as naf
from .monotone import sospf as sospf
from .monotone import umnn as umnn
from .residual import planar_flow as planar_flow
from .residual import radial_flow as radial_flow
from .residual import residual_flow as residual_flow
from .residual import sylvester_flow as sylvester_flow
from .tarflow import tarflow as tarflow
