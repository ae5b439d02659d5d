"""Sampling of posteriors: Markov chains, their convergence, and annealed populations."""

from .samples import Samples as Samples
