"""Flows and their recipes, one short function a paper."""

from .autoregressive import bnaf, bpf, iaf, maf, naf, nsf_ar, sospf, umnn
from .continuous import cnf, ffjord
from .coupling import circular_coupling, flowpp, gaussianization, nice, nsf, realnvp
from .discrete import Dequantized, Mixed
from .flow import Flow
from .image import flowpp_image, glow, realnvp_image, tarflow
from .residual import planar_flow, radial_flow, residual_flow, sylvester_flow

__all__ = ["Dequantized", "Flow", "Mixed"]
__all__ += ["bnaf", "bpf", "iaf", "maf", "naf", "nsf_ar", "sospf", "umnn"]
__all__ += ["circular_coupling", "flowpp", "gaussianization", "nice", "nsf", "realnvp"]
__all__ += ["cnf", "ffjord", "planar_flow", "radial_flow", "residual_flow", "sylvester_flow"]
__all__ += ["flowpp_image", "glow", "realnvp_image", "tarflow"]
