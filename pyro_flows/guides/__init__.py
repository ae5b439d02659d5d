"""Guides for Pyro models, built from flows."""

from .auto import AutoFlow as AutoFlow
from .auto import default_flow as default_flow
from .init import init_to_center as init_to_center
