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
