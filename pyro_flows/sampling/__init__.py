"""Draws of a posterior, many at once: Markov chains, populations that are annealed, and how far they have come."""

from .samples import Samples as Samples
