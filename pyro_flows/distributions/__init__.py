"""Base distributions of flows."""

from .mixture import MixtureBase as MixtureBase
from .mixture import ModesBase as ModesBase
from .normal import CircularBase as CircularBase
from .normal import ContaminatedNormalBase as ContaminatedNormalBase
from .normal import FixedBase as FixedBase
from .normal import NormalBase as NormalBase
from .normal import StandardNormal as StandardNormal
from .normal import StudentTBase as StudentTBase
