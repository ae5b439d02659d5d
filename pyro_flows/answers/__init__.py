"""Answers: a posterior from a model and its data alone, by stages that go on until its draws can be trusted."""

from .posterior import posterior as posterior
from .record import Posterior as Posterior
from .record import Step as Step
