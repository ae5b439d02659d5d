"""Guides for Pyro models, built from flows."""

from .auto import AutoFlow as AutoFlow
from .graph import posterior_graph as posterior_graph
from .plate import AutoPlateFlow as AutoPlateFlow
from .recipe import default_flow as default_flow
from .start import init_to_center as init_to_center
