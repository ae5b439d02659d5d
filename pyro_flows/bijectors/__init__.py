"""Elementwise maps of the real line, pure torch."""

from .affine import Affine as Affine
from .base import Bijector as Bijector
from .bernstein import Bernstein as Bernstein
from .circular import CircularSpline as CircularSpline
from .continued import Continued as Continued
from .integral import Integral as Integral
from .linear_rational import LinearRationalSpline as LinearRationalSpline
from .mixture import LogisticMixture as LogisticMixture
from .polynomial import SumOfSquares as SumOfSquares
from .shift import Shift as Shift
from .sigmoidal import Sigmoidal as Sigmoidal
from .softplus import SoftplusAffine as SoftplusAffine
from .spline import RationalQuadraticSpline as RationalQuadraticSpline
