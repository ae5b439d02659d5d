"""Networks from data to context vectors, in pure torch."""

from .base import Encoder as Encoder
from .combined import Arguments as Arguments
from .combined import Joined as Joined
from .combined import Scalars as Scalars
from .identity import Flatten as Flatten
from .identity import Identity as Identity
from .image import ConvEncoder as ConvEncoder
from .labels import ClassEmbedding as ClassEmbedding
from .mlp import MLPEncoder as MLPEncoder
from .recurrent import GRUEncoder as GRUEncoder
from .sets import SetEncoder as SetEncoder
from .standardize import Standardize as Standardize
from .transformer import TransformerEncoder as TransformerEncoder
