"""Networks that compute the parameters of bijectors and other transforms, in pure torch."""

from .base import Conditioner as Conditioner
from .conv import ConvNet as ConvNet
from .incremental import stream as stream
from .incremental import stream_vjp as stream_vjp
from .lipschitz import LipschitzMLP as LipschitzMLP
from .made import MADE as MADE
from .mlp import MLP as MLP
from .pass_through import Given as Given
from .periodic import Periodic as Periodic
from .steps import StepNet as StepNet
from .transformer import CausalTransformer as CausalTransformer
from .transformer import Tokens as Tokens
from .vector_field import MLPField as MLPField
from .vector_field import VectorField as VectorField
