"""Flows and guides in files: what they are built of, and their tensors; never code."""

from .save_load import load as load
from .save_load import save as save
