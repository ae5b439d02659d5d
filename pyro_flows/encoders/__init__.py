"""Networks from data to context vectors, in pure torch."""

from .base import Encoder as Encoder
from .base import Standardize as Standardize
from .combined import Arguments as Arguments
from .combined import Joined as Joined
from .combined import Scalars as Scalars
from .rows import ClassEmbedding as ClassEmbedding
from .rows import ConvEncoder as ConvEncoder
from .rows import Flatten as Flatten
from .rows import Identity as Identity
from .rows import MLPEncoder as MLPEncoder
from .series import GRUEncoder as GRUEncoder
from .series import TransformerEncoder as TransformerEncoder
from .sets import SetEncoder as SetEncoder
