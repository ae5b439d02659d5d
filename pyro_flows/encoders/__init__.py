"""Networks from data to context vectors, pure torch."""

from .base import Encoder as Encoder
from .classes import ClassEmbedding as ClassEmbedding
from .flatten import Flatten as Flatten
from .image import ConvEncoder as ConvEncoder
from .mlp import MLPEncoder as MLPEncoder
from .set import SetEncoder as SetEncoder
from .standardize import Standardize as Standardize
