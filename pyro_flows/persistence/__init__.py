"""Flows and guides in files: what they are built of, and their tensors; never code."""

from .file import load as load
from .file import save as save
