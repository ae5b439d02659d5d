"""Networks that compute the parameters of bijectors and other transforms, in pure torch."""

from .base import Conditioner as Conditioner
from .conv import ConvNet as ConvNet
from .conv import StepNet as StepNet
from .jacobian import LipschitzMLP as LipschitzMLP
from .jacobian import MLPField as MLPField
from .jacobian import VectorField as VectorField
from .made import MADE as MADE
from .made import stream as stream
from .made import stream_vjp as stream_vjp
from .mlp import MLP as MLP
from .mlp import Given as Given
from .mlp import Periodic as Periodic
from .transformer import CausalTransformer as CausalTransformer
from .transformer import Tokens as Tokens
