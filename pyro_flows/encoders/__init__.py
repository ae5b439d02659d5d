"""Networks from data to context vectors, in pure torch."""

from .arguments import Arguments as Arguments
from .base import Encoder as Encoder
from .identity import Identity as Identity
from .image import ConvEncoder as ConvEncoder
from .image import Flatten as Flatten
from .joined import Joined as Joined
from .labels import ClassEmbedding as ClassEmbedding
from .mlp import MLPEncoder as MLPEncoder
from .recurrent import GRUEncoder as GRUEncoder
from .scalars import Scalars as Scalars
from .set import SetEncoder as SetEncoder
from .standardize import Standardize as Standardize
from .transformer import TransformerEncoder as TransformerEncoder

# Without the modules: one is called ``set``, and a star import must not hide the built-in.
__all__ = [
    "Arguments",
    "ClassEmbedding",
    "ConvEncoder",
    "Encoder",
    "Flatten",
    "GRUEncoder",
    "Identity",
    "Joined",
    "MLPEncoder",
    "Scalars",
    "SetEncoder",
    "Standardize",
    "TransformerEncoder",
]
