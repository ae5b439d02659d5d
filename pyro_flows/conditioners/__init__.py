"""Networks that compute the parameters of bijectors and other transforms, in pure torch."""

from .base import Conditioner as Conditioner
from .conv import ConvNet as ConvNet
from .field import MLPField as MLPField
from .field import VectorField as VectorField
from .given import Given as Given
from .lipschitz import LipschitzMLP as LipschitzMLP
from .made import MADE as MADE
from .mlp import MLP as MLP
from .periodic import Periodic as Periodic
from .stream import stream as stream
from .stream import stream_vjp as stream_vjp
from .transformer import CausalTransformer as CausalTransformer
from .transformer import Tokens as Tokens
