"""Sampling of posteriors: Markov chains, their convergence, and annealed populations."""

from .converged_chains import Samples as Samples
