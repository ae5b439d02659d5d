"""Increasing maps of the real line, applied to one number at a time, in pure torch."""

from .affine import Affine as Affine
from .affine import Shift as Shift
from .affine import SoftplusAffine as SoftplusAffine
from .base import Bijector as Bijector
from .continued import Bernstein as Bernstein
from .continued import Continued as Continued
from .continued import LogisticMixture as LogisticMixture
from .continued import Sigmoidal as Sigmoidal
from .continued import SumOfSquares as SumOfSquares
from .spline import CircularSpline as CircularSpline
from .spline import Integral as Integral
from .spline import LinearRationalSpline as LinearRationalSpline
from .spline import RationalQuadraticSpline as RationalQuadraticSpline
