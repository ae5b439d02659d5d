"""Tables of data as they come: read, checked, and made fit for a density."""

from .columns import Spike as Spike
from .columns import dequantize as dequantize
from .columns import find_spikes as find_spikes
