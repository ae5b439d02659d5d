"""How far to trust a guide, and its draws as ArviZ data."""

from .arviz import to_arviz as to_arviz
from .importance import Psis as Psis
from .importance import psis as psis
