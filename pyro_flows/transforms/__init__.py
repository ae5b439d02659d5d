"""Learnable bijections of events, as Pyro transform modules."""

from .actnorm import ActNorm as ActNorm
from .autoregressive import Autoregressive as Autoregressive
from .base import FlowTransform as FlowTransform
from .base import Inverse as Inverse
from .base import View as View
from .compose import Compose as Compose
from .condition import Conditioned as Conditioned
from .coupling import Coupling as Coupling
from .elementwise import Elementwise as Elementwise
from .fixed import FixedAffine as FixedAffine
from .linear import LULinear as LULinear
from .permute import Permute as Permute
from .planar import Planar as Planar
