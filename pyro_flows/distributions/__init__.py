"""Base distributions of flows."""

from .base import FixedBase as FixedBase
from .base import StandardNormal as StandardNormal
