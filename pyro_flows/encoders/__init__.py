"""Networks from data to context vectors, in pure torch."""

from .base import Encoder, Standardize
from .combined import Arguments, Joined, Scalars
from .rows import ClassEmbedding, ConvEncoder, Flatten, Identity, MLPEncoder
from .series import GRUEncoder, TransformerEncoder
from .sets import SetEncoder

__all__ = ["Arguments", "ClassEmbedding", "ConvEncoder", "Encoder", "Flatten", "GRUEncoder", "Identity", "Joined"]
__all__ += ["MLPEncoder", "Scalars", "SetEncoder", "Standardize", "TransformerEncoder"]
