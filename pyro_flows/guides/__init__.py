"""Guides for Pyro models, built from flows."""

from .auto import AutoFlow as AutoFlow
from .auto import ensemble as ensemble
from .auto import posterior_graph as posterior_graph
from .block_guide import AutoStructuredFlow as AutoStructuredFlow
from .guide_flow import default_flow as default_flow
from .plate import AutoPlateFlow as AutoPlateFlow
from .start_location import init_to_center as init_to_center
