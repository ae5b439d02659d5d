"""Increasing maps of the real line, applied to one number at a time, in pure torch."""

from .affine import Affine as Affine
from .affine import Shift as Shift
from .affine import SoftplusAffine as SoftplusAffine
from .base import Bijector as Bijector
from .network_integral import Integral as Integral
from .numerical_inverse import Continued as Continued
from .polynomial import Bernstein as Bernstein
from .polynomial import SumOfSquares as SumOfSquares
from .sigmoidal import LogisticMixture as LogisticMixture
from .sigmoidal import Sigmoidal as Sigmoidal
from .spline import CircularSpline as CircularSpline
from .spline import LinearRationalSpline as LinearRationalSpline
from .spline import RationalQuadraticSpline as RationalQuadraticSpline
