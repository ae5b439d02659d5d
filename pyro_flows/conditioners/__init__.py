"""Networks that give bijectors their parameters, pure torch."""

from .base import Conditioner as Conditioner
from .conv import ConvNet as ConvNet
from .field import VectorField as VectorField
from .given import Given as Given
from .lipschitz import LipschitzMLP as LipschitzMLP
from .made import MADE as MADE
from .mlp import MLP as MLP
from .mlp_field import MLPField as MLPField
from .periodic import Periodic as Periodic
from .stream import costream as costream
from .stream import stream as stream
from .transformer import CausalTransformer as CausalTransformer
from .transformer import Tokens as Tokens
