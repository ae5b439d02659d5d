"""Incremental evaluation of a masked autoregressive network, and of its vector–Jacobian product.

The inverse of an autoregressive layer needs the parameters of each rank as soon as the features of lower rank are
known.  A :class:`Chain` keeps the rows that are known and computes only those that one more step unlocks.
:func:`stream` runs the network from the first rank to the last.  :func:`stream_vjp` runs its vector–Jacobian product
from the last rank to the first, which solves the triangular system in the gradient of an inverse.  Each takes about the
work of one pass, in memory of O(width) per sample, and stores nothing on the network.  Rows are written in place, so
run chains without autograd: inside an autograd function, or under ``torch.no_grad``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .made import MADE

Finish = Callable[[Tensor, int], object]  # (sums of a step, its number): changes the sums to units, in place


class Chain:
    """Layers whose rows become known step by step, each from the known rows of the layer below.

    Steps come in blocks of about 2 sqrt(D).  At the start of a block, one large product sums the contributions of all
    rows from before it.  A step then only adds the products inside its block, in place.  Rows that are not yet
    unlocked hold partial sums.  The zeros of the weights keep these from rows that must not depend on them.

    Args:
        sizes: ``sizes[l][t]``: the number of rows of layer l that step t unlocks.  The caller passes those of layer 0.
        weights: For each layer above layer 0, ``(rows, rows of the layer below)``, zero between unconnected rows.
        biases: For each of these layers, ``(rows, 1)`` or ``(rows, N)``.
        finish: For each of these layers but the last, the function that is applied in place to the rows of a step.
        like: A tensor with N columns, of the dtype and on the device of the rows.
    """

    def __init__(
        self, sizes: list[list[int]], weights: list[Tensor], biases: list[Tensor], finish: list[Finish], like: Tensor
    ) -> None:
        self._sizes, self._layers = sizes, list(zip(weights, biases, [*finish, None], strict=True))
        self._starts = [[0, *accumulate(of_layer)] for of_layer in sizes]
        # The rows of the last layer are returned to the caller, and stored for one block only.
        self._known = [like.new_zeros(starts[-1], like.shape[-1]) for starts in self._starts[:-1]]
        self._given = self._known[0].split(sizes[0])
        self._step, self._steps = 0, len(sizes[0])
        self._length = 2 * math.isqrt(self._steps - 1) + 1
        # For each layer in a block: by step, the sums over the rows from before the block, and the weights of the rows
        # within the block; these rows; and the function that finishes the sums.
        self._block: list[tuple[Sequence[Tensor], Sequence[Tensor], Tensor, Finish | None]] = []

    def step(self, rows: Tensor | None = None) -> Tensor | None:
        """Take the rows of layer 0 of one step, ``(n, N)`` or ``(N,)``, and return those of the last layer.

        Either is None for a step that unlocks no such rows.
        """
        t, place = self._step, self._step % self._length
        if place == 0:
            self._open_block()
        if rows is not None:
            self._given[t].copy_(rows)
        for sums, weights, below, finish in self._block:
            own = sums[place]
            if len(own):
                own.addmm_(weights[place], below)
                if finish:
                    finish(own, t)
        self._step = t + 1
        return own if len(own) else None

    def _open_block(self) -> None:
        """Sum over all earlier rows for the steps of a block."""
        start, stop = self._step, min(self._step + self._length, self._steps)
        self._block = []
        for layer, (weight, bias, finish) in enumerate(self._layers, 1):
            below, own = self._starts[layer - 1], self._starts[layer]
            rows, old, new = slice(own[start], own[stop]), slice(0, below[start]), slice(below[start], below[stop])
            known, weight, sizes = self._known[layer - 1], weight[rows], self._sizes[layer][start:stop]
            sums = torch.addmm(bias[rows], weight[:, old], known[old], out=self._known[layer][rows] if finish else None)
            self._block.append((sums.split(sizes), weight[:, new].split(sizes), known[new], finish))


def stream(net: MADE, context: Tensor | None, like: Tensor) -> Chain:
    """Return a chain that takes the features rank by rank and returns the parameters of the next rank.

    All steps together cost about one pass of the network.  Rows are written in place, so run it without autograd, for
    example under ``torch.no_grad``.

    Args:
        net: The network.
        context: Its contexts, ``(N, context_dim)``, or None if ``net.context_dim`` is 0.
        like: A tensor with N columns, of the dtype and on the device of the features.

    Returns:
        A chain whose ``step`` takes the feature of the rank that has become known, ``(N,)``, or None at first.  It
        returns the parameters of the next rank, ``(P, N)``.

    Raises:
        ValueError: If the network takes contexts and none is given.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import MADE
        >>> net, x = MADE(3, num_params=2, hidden_dims=(8,)), torch.randn(5, 3)
        >>> _ = torch.nn.init.normal_(net.output.weight)
        >>> with torch.no_grad():
        ...     chain = stream(net, None, like=x.T)
        ...     params = [chain.step(known) for known in (None, x[:, 0], x[:, 1])]
        >>> torch.allclose(torch.stack(params).permute(2, 0, 1), net(x), atol=1e-4)
        True
    """
    biases = [layer.shift() for layer in (*net.hidden, net.output)]
    biases[0] = net.add_context(biases[0].T, context).T
    biases[-1] = _by_rank(biases[-1], net)
    sizes = [[0] + [1] * (net.input_dim - 1), *net.unlocked, [net.num_params] * net.input_dim]
    activate: Callable[[Tensor], Tensor] = net.act.forward

    def finish(rows: Tensor, t: int) -> None:
        if (active := activate(rows)) is not rows:
            rows.copy_(active)

    return Chain(sizes, _weights(net), biases, [finish] * len(net.hidden), like)


def stream_vjp(net: MADE, slopes: list[Tensor]) -> Chain:
    """Return a chain for the vector–Jacobian product of a network, from the last rank to the first.

    All steps together cost about one pass of the network.

    Args:
        net: The network.
        slopes: For each hidden layer, the derivative of the activation at its units, ``(H, N)``.

    Returns:
        A chain whose ``step`` takes the gradient of the parameters of one rank, ``(P, N)``.  It returns the gradient of
        the feature one rank below, ``(1, N)``, or None below the first rank.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import MADE
        >>> net, x = MADE(2, num_params=1, hidden_dims=(8,)), torch.randn(5, 2)
        >>> _ = torch.nn.init.normal_(net.output.weight)
        >>> params, slopes = net.params_and_slopes(x, None)
        >>> with torch.no_grad():
        ...     gradient = stream_vjp(net, slopes).step(torch.ones(1, 5))  # of feature 0, by the parameter of the last
        >>> (by_autograd,) = torch.autograd.grad(net(x.requires_grad_())[:, 1].sum(), x)
        >>> torch.allclose(gradient[0], by_autograd[:, 0], atol=1e-4)
        True
    """
    # The layers in reverse, transposed; their rows are reversed too, since the last units are unlocked first.
    units = [unlocked[::-1] for unlocked in reversed(net.unlocked)]
    sizes = [[net.num_params] * net.input_dim, *units, [1] * (net.input_dim - 1) + [0]]
    first, *others, last = _weights(net)
    last = last.unflatten(0, (net.input_dim, -1)).flip(0).flatten(0, 1)  # the parameters of a rank keep their order
    weights = [last.T.flip(0), *(weight.T.flip(0, 1) for weight in reversed(others)), first.T.flip(0, 1)]
    biases = [weight.new_zeros(len(weight), 1) for weight in weights]
    finish = [_scaling(slope.flip(0), of_layer) for slope, of_layer in zip(reversed(slopes), units, strict=True)]
    return Chain(sizes, weights, biases, finish, slopes[0])


def _scaling(slopes: Tensor, sizes: list[int]) -> Finish:
    """Return a function that multiplies the rows of a step by their slopes."""
    of_steps = slopes.split(sizes)
    return lambda rows, t: rows.mul_(of_steps[t])


def _weights(net: MADE) -> list[Tensor]:
    """Return the weights of all layers, with features by rank; the feature of the last rank is not an input."""
    first, *others, last = (layer.matrix() for layer in (*net.hidden, net.output))
    return [first[:, list(net.features[:-1])], *others, _by_rank(last, net)]


def _by_rank(rows: Tensor, net: MADE) -> Tensor:
    """Reorder the rows of the output layer: P rows for each rank, from the first rank to the last."""
    return rows.unflatten(0, (net.num_params, net.input_dim)).transpose(0, 1)[list(net.features)].flatten(0, 1)
