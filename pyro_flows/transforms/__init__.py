"""Learnable bijections of events, as Pyro transform modules."""

from .actnorm import ActNorm as ActNorm
from .autoregressive import Autoregressive as Autoregressive
from .base import FlowTransform as FlowTransform
from .base import Inverse as Inverse
from .base import View as View
from .block import BlockAutoregressive as BlockAutoregressive
from .compose import Compose as Compose
from .condition import Conditioned as Conditioned
from .coupling import Coupling as Coupling
from .elementwise import Elementwise as Elementwise
from .fixed import FixedAffine as FixedAffine
from .linear import LULinear as LULinear
from .orthogonal import Householder as Householder
from .orthogonal import Orthogonal as Orthogonal
from .permute import Permute as Permute
from .pixel import PerPixel as PerPixel
from .planar import Planar as Planar
from .radial import Radial as Radial
from .recompute import Recomputed as Recomputed
from .reshape import Patched as Patched
from .reshape import Reshaped as Reshaped
from .reshape import Squeezed as Squeezed
from .residual import Residual as Residual
from .sigmoid import Sigmoid as Sigmoid
from .split import Split as Split
from .sylvester import Sylvester as Sylvester
