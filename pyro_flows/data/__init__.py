"""Data to train on: tables, images and loaders, read, checked and cut into batches."""

from .columns import Spike as Spike
from .columns import dequantize as dequantize
from .columns import find_spikes as find_spikes
