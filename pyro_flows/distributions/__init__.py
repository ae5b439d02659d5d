"""Base distributions of flows."""

from .base import CircularBase as CircularBase
from .base import FixedBase as FixedBase
from .base import NormalBase as NormalBase
from .base import StandardNormal as StandardNormal
from .mixture import MixtureBase as MixtureBase
from .mixture import ModesBase as ModesBase
from .tails import ContaminatedNormalBase as ContaminatedNormalBase
from .tails import StudentTBase as StudentTBase
