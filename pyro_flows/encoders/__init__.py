"""Networks from data to context vectors, in pure torch."""

from .base import Encoder as Encoder
from .image import ConvEncoder as ConvEncoder
from .image import Flatten as Flatten
from .labels import ClassEmbedding as ClassEmbedding
from .mlp import MLPEncoder as MLPEncoder
from .set import SetEncoder as SetEncoder
from .standardize import Standardize as Standardize
