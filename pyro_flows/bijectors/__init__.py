"""Elementwise maps of the real line, pure torch."""

from .affine import Affine as Affine
from .base import Bijector as Bijector
from .circular import CircularSpline as CircularSpline
from .shift import Shift as Shift
from .spline import RationalQuadraticSpline as RationalQuadraticSpline
