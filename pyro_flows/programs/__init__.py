"""Run Pyro programs: draws, densities and simulations of models and guides, vectorised over draws."""

from .program import Program as Program
from .simulator import Simulations as Simulations
from .simulator import simulate as simulate
