"""Base distributions of flows."""

from .base import StandardNormal as StandardNormal
