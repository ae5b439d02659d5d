"""Convolutional networks: over images, for couplings of channels, and along sequences, for Markov processes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import activation_of, as_flags, as_image, as_shape, check_integers, require
from .base import Conditioner, Linear, zero_


class ConvNet(Conditioner):
    """A convolutional network from images to the parameters of each number of an image of the same size::

        h = a(W_0 * x + U c),    h ← h + u σ(g) with (u, g) = V a(W a(h)) block by block,    θ = W_L * a(h)

    It takes ``(*batch, input_dim, H, W)`` to ``(*batch, output_dim, H, W, num_params)`` and conditions couplings of
    channels.

    The gated blocks are those of Flow++ (Ho, Chen, Srinivas, Duan, Abbeel 2019, arXiv:1902.00275).  Without blocks, one
    1 × 1 convolution replaces them, as in Glow (Kingma, Dhariwal 2018, arXiv:1807.03039).

    Args:
        input_dim: The number of channels that go in.
        output_dim: The number of channels that receive parameters.
        num_params: The number of parameters of each of their numbers (``bijector.num_params``).
        size: Height and width.
        hidden_dim: The number of channels between the convolutions.
        num_blocks: The number of gated residual blocks; with 0 a 1 × 1 convolution replaces them.
        context_dim: The number of context features, which condition every pixel; optional with ``context_shape``.
        context_shape: The shape ``(K, H, W)`` of contexts that are flattened images.  Each pixel depends on the context
            at the same place.  Height and width are those of ``size`` or multiples of them.
        activation: The class of the elementwise nonlinearity.

    Raises:
        ValueError: If a size is out of its range, ``size`` does not hold two, or ``context_shape`` does not fit it or
            ``context_dim``.  In use, if the network takes contexts and none is given.

    Example::

        >>> import torch
        >>> net = ConvNet(2, 3, num_params=5, size=(8, 8), hidden_dim=16, context_dim=4)
        >>> net(torch.randn(7, 2, 8, 8), torch.randn(4)).shape
        torch.Size([7, 3, 8, 8, 5])
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        num_params: int,
        size: Sequence[int],
        hidden_dim: int = 32,
        num_blocks: int = 2,
        context_dim: int = 0,
        *,
        context_shape: Sequence[int] | None = None,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        height, width = as_shape("ConvNet", "size", size, length=2, words="height and width")
        check_integers("ConvNet", hidden_dim=hidden_dim)
        check_integers("ConvNet", 0, num_blocks=num_blocks)
        image = None if context_shape is None else as_image("ConvNet", "context_shape", context_shape)
        super().__init__(input_dim, output_dim, num_params, (hidden_dim,), 0 if image else context_dim)
        self.size, self.hidden_dim, self.num_blocks = (height, width), hidden_dim, num_blocks
        self.context_shape, self.activation = image, activation
        self.first = nn.Conv2d(input_dim, hidden_dim, 3, padding=1)
        self.blocks = nn.ModuleList(_Gated(hidden_dim, activation) for _ in range(num_blocks))
        self.middle = None if num_blocks else nn.Conv2d(hidden_dim, hidden_dim, 1)
        self.output = zero_(nn.Conv2d(hidden_dim, num_params * output_dim, 3, padding=1))
        self.act = activation_of("ConvNet", activation)
        if image is not None:
            self.context_dim = math.prod(image)
            self.factor = image[1] // height
            fits = image[1:] == (height * self.factor, width * self.factor)
            if not fits or context_dim not in (0, self.context_dim):
                fault = f"context_shape must be images of a multiple of size={self.size}, got {image}"
                raise ValueError(f"ConvNet: {fault} with context_dim={context_dim}.")
            self.from_context = nn.Conv2d(image[0] * self.factor**2, hidden_dim, 3, padding=1, bias=False)

    def add_context(self, h: Tensor, context: Tensor | None) -> Tensor:
        if self.context_shape is None or context is None:
            context = None if context is None else context[..., None, None, :]  # the same at each pixel
            return super().add_context(h.movedim(-3, -1), context).movedim(-1, -3)
        assert self.from_context is not None
        images = F.pixel_unshuffle(context.unflatten(-1, self.context_shape), self.factor)
        share = self.from_context(images.reshape(math.prod(images.shape[:-3]), *images.shape[-3:]))
        return h + share.reshape(*context.shape[:-1], *share.shape[1:])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.first(_images(x)).reshape(*x.shape[:-3], self.hidden_dim, *self.size)
        h = self.add_context(h, context)
        batch, h = h.shape[:-3], _images(h)
        for block in self.blocks:
            h = block(h)
        h = self.act(h)
        if self.middle is not None:
            h = self.act(self.middle(h))
        params = self.output(h).reshape(*batch, self.num_params, self.output_dim, *self.size)
        return params.movedim(-4, -1)


class _Gated(nn.Module):
    """A gated residual block, h + u σ(g), which starts as a small change of h."""

    def __init__(self, hidden_dim: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.act = activation_of("ConvNet", activation)
        self.inner = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1)
        self.outer = nn.Conv2d(hidden_dim, 2 * hidden_dim, 1)

    def forward(self, h: Tensor) -> Tensor:
        return h + F.glu(self.outer(self.act(self.inner(self.act(h)))), 1)


def _images(x: Tensor) -> Tensor:
    """Return images with one batch dimension, and with channels last in memory, where convolutions are fastest."""
    images = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return images  # these choose the memory order themselves
    return images.contiguous(memory_format=torch.channels_last)


class StepNet(Conditioner):
    """A convolutional network along the T steps of a sequence of vectors ``(d,)``::

        h_t = a(W_0 [x_{t-1}, x_t, x_{t+1}] + v_t + U c),    h_t ← h_t + a(W_l [h_{t-1}, h_t, h_{t+1}]) layer by layer
        θ_t = W h_t + w_t

    All steps share the weights W; the vectors v and w are learned for each step.  It takes the features of a vector
    ``(T d,)``, one step after the other, that condition a coupling, and returns the parameters of the others.  Time and
    memory are proportional to T.

    Args:
        mask: For each of the T d features, True if it is an input, False if it receives parameters.
        steps: The number T of steps.
        num_params: The number of parameters of each feature (``bijector.num_params``).
        hidden_dims: The widths of the hidden layers, at least one; all are alike.
        context_dim: The number of context features, which are the same for all steps.
        activation: The class of the elementwise nonlinearity.

    Raises:
        ValueError: If a size is out of its range, the mask does not divide into the steps or has no False, or the
            widths differ.  In use, if the network takes contexts and none is given.

    Example::

        >>> import torch
        >>> net = StepNet([True, False] * 50, steps=100, num_params=2, hidden_dims=(8, 8), context_dim=3)
        >>> net(torch.randn(7, 50), torch.randn(3)).shape
        torch.Size([7, 50, 2])
    """

    mask: Tensor
    source: Tensor
    taken: Tensor

    def __init__(
        self,
        mask: Sequence[bool] | Tensor,
        steps: int,
        num_params: int,
        hidden_dims: Sequence[int] = (16,),
        context_dim: int = 0,
        *,
        activation: type[nn.Module] = nn.ELU,
    ) -> None:
        mask = as_flags("StepNet", "mask", mask)
        check_integers("StepNet", steps=steps)
        fits = len(mask) % steps == 0 and not mask.all()
        require(fits, "StepNet", "mask", f"hold {steps} steps and a False", mask.tolist())
        kept = int(mask.sum())
        super().__init__(kept, len(mask) - kept, num_params, hidden_dims, context_dim)
        width, *others = self.hidden_dims
        require({width, *others} == {width}, "StepNet", "hidden_dims", "be alike", self.hidden_dims)
        self.steps, self.activation = steps, activation
        self.register_buffer("mask", mask)
        self._set_places()
        self.register_load_state_dict_post_hook(StepNet._set_places)
        features = len(mask) // steps
        self.first = Linear(3 * features, width, bias=False) if kept else None
        self.inner = nn.ModuleList(Linear(3 * width, width) for _ in others)
        self.output = Linear(width, num_params * features, zero=True)
        self.vectors = nn.Parameter(torch.randn(steps, width) / 2)
        self.table = nn.Parameter(torch.zeros(self.output_dim, num_params))
        self.act = activation_of("StepNet", activation)

    def _set_places(self, _keys: object = None) -> None:
        """Find the places of features from the mask, also when a state is loaded."""
        self.register_buffer("taken", (~self.mask).nonzero().flatten(), persistent=False)
        source = torch.where(self.mask, self.mask.cumsum(0) - 1, self.mask.sum())  # the last place holds a zero
        self.register_buffer("source", source, persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h: Tensor = self.vectors
        if self.first is not None:
            grid = F.pad(x, (0, 1))[..., self.source]
            h = h + self.first(_windows(grid.unflatten(-1, (self.steps, -1))))
        h = self.act(self.add_context(h, None if context is None else context.unsqueeze(-2)))
        for layer in self.inner:
            h = h + self.act(layer(_windows(h)))
        params = self.output(h).unflatten(-1, (-1, self.num_params)).flatten(-3, -2)
        return params[..., self.taken, :] + self.table


def _windows(h: Tensor) -> Tensor:
    """Return each step with its neighbours, ``(*batch, T, d) -> (*batch, T, 3 d)``; zeros lie beyond the ends."""
    padded = F.pad(h, (0, 0, 1, 1))
    return torch.cat((padded[..., :-2, :], h, padded[..., 2:, :]), -1)
