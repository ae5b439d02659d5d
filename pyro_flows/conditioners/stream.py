"""Incremental evaluation of a masked autoregressive network, and of its transposed Jacobian.

To invert an autoregressive layer, the parameters of rank r are needed as soon as the features of lower rank are known.
A :class:`Chain` keeps the rows that are known and computes only those that one more step unlocks: :func:`stream` runs
the network from the first rank to the last, :func:`costream` its transposed Jacobian from the last rank to the first,
which solves the triangular system that the gradient of an inverse asks for.  Each takes about the work of one pass, in
memory of O(width) per sample.  Both are local to one call; nothing is kept on the module.  Rows are written in place,
so chains run where autograd does not watch: inside an autograd function, or under ``torch.no_grad``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .made import MADE

Finish = Callable[[Tensor, int], object]  # (sums of a step, its number) -> units, in place


class Chain:
    """Layers whose rows become known step by step, each from the rows of the layer below that are known by then.

    Within a block of about 2 sqrt(D) steps, what the rows from before the block contribute is one large product; a step
    then only adds the products inside its block, in place.  Rows that wait hold what has been summed up for them, which
    the zeros of the weights keep from rows that must not see them.

    Args:
        sizes: ``sizes[l][t]``: how many rows of layer l step t unlocks; layer 0 is what the steps are given.
        weights: For each layer above layer 0, ``(rows, rows of the layer below)``, zero where a row must not see.
        biases: For each of these layers, ``(rows, 1)`` or ``(rows, N)``.
        finish: For each layer between the first and the last, what is done in place to the rows of step t.
        like: A tensor with N columns, of the dtype and on the device of the rows.
        backwards: Whether the steps unlock the rows from the last to the first.
    """

    def __init__(
        self,
        sizes: list[list[int]],
        weights: list[Tensor],
        biases: list[Tensor],
        finish: list[Finish],
        like: Tensor,
        *,
        backwards: bool = False,
    ) -> None:
        self._sizes, self._weights, self._biases, self._finish = sizes, weights, biases, finish
        self._backwards = backwards
        self._starts = [[0, *accumulate(of_layer)] for of_layer in sizes]
        # Those of the last layer are handed out, and last for a block.
        self._known = [like.new_zeros(starts[-1], like.shape[-1]) for starts in self._starts[:-1]]
        self._given = split_steps(self._known[0], sizes[0], backwards)
        self._step, self._steps = 0, len(sizes[0])
        self._length = 2 * math.isqrt(self._steps - 1) + 1
        # For each step of a block and each layer: sums over the rows from before the block, to which products of the
        # weights and the rows within the block are added, and what makes units of the sums.
        self._plan: list[list[tuple[Tensor, Tensor, Tensor, Finish | None]]] = []

    def step(self, rows: Tensor | None = None) -> Tensor | None:
        """Take the next rows of layer 0, ``(n, N)`` or ``(N,)``, None if there are none; return those of the last."""
        t, first = self._step, self._step % self._length
        if first == 0:
            self._open_block()
        if rows is not None:
            self._given[t].copy_(rows)
        for sums, weight, below, finish in self._plan[first]:
            sums.addmm_(weight, below)
            if finish:
                finish(sums, t)
        self._step = t + 1
        return sums if self._sizes[-1][t] else None

    def _open_block(self) -> None:
        """Sum up over all earlier rows for the steps of a block, and say what is left to do in each of them."""
        start, stop = self._step, min(self._step + self._length, self._steps)
        self._plan = [[] for _ in range(start, stop)]
        for layer, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True), 1):
            rows = self._span(layer, start, stop)
            old, new = self._span(layer - 1, 0, start), self._span(layer - 1, start, stop)
            known, weight, sizes = self._known[layer - 1], weight[rows], self._sizes[layer][start:stop]
            last = layer == len(self._weights)
            sums = torch.addmm(bias[rows], weight[:, old], known[old], out=None if last else self._known[layer][rows])
            of_steps = (split_steps(part, sizes, self._backwards) for part in (sums, weight[:, new]))
            for tasks, size, own, weights in zip(self._plan, sizes, *of_steps, strict=True):
                if size:
                    tasks.append((own, weights, known[new], None if last else self._finish[layer - 1]))

    def _span(self, layer: int, start: int, stop: int) -> slice:
        """Where the rows lie that the steps from ``start`` until ``stop`` unlock."""
        starts = self._starts[layer]
        if self._backwards:
            return slice(starts[-1] - starts[stop], starts[-1] - starts[start])
        return slice(starts[start], starts[stop])


def split_steps(rows: Tensor, sizes: list[int], backwards: bool) -> Sequence[Tensor]:
    """The rows of each step."""
    return rows.split(sizes[::-1])[::-1] if backwards else rows.split(sizes)


def stream(net: MADE, context: Tensor | None, like: Tensor) -> Chain:
    """A chain that is given features rank by rank, nothing at its first step, and returns the next one's parameters.

    All steps together cost about one pass of the network.  Rows are written in place, so it runs where autograd does
    not watch, as under ``torch.no_grad``.

    Args:
        net: The network.
        context: Its contexts, ``(N, context_dim)``, or None if ``net.context_dim`` is 0.
        like: A tensor with N columns, of the dtype and on the device of the features.

    Returns:
        A chain whose ``step`` takes the feature of the rank that has become known, ``(N,)``, or None at first, and
        returns the parameters of the next rank's, ``(P, N)``.

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
    weights, biases = _weights(net), [layer.paced(layer.bias).unsqueeze(-1) for layer in net.hidden]
    biases[0] = net.add_context(biases[0].T, context).T
    biases.append(_by_rank(net.output.paced(net.output.bias).unsqueeze(-1), net))
    sizes = [[0] + [1] * (net.input_dim - 1), *net.unlocked, [net.num_params] * net.input_dim]
    activate: Callable[[Tensor], Tensor] = net.act.forward

    def finish(rows: Tensor, t: int) -> None:
        if (active := activate(rows)) is not rows:
            rows.copy_(active)

    return Chain(sizes, weights, biases, [finish] * len(net.hidden), like)


def costream(net: MADE, slopes: list[Tensor]) -> Chain:
    """A chain that is given cotangents of the parameters, from the last rank to the first, and returns the features'.

    It is the transposed Jacobian of the network, one rank at a time, in about the work of one pass.

    Args:
        net: The network.
        slopes: For each hidden layer, the derivative of the activation at its units, ``(H, N)``.

    Returns:
        A chain whose ``step`` takes the cotangent ``(P, N)`` of one rank's parameters and returns what flows back to
        the feature one rank below, ``(1, N)``, or None below the first.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import MADE
        >>> net, x = MADE(2, num_params=1, hidden_dims=(8,)), torch.randn(5, 2)
        >>> _ = torch.nn.init.normal_(net.output.weight)
        >>> params, slopes = net.params_and_slopes(x, None)
        >>> with torch.no_grad():
        ...     back = costream(net, slopes).step(torch.ones(1, 5))  # of the last rank's parameter, to feature 0
        >>> (by_autograd,) = torch.autograd.grad(net(x.requires_grad_())[:, 1].sum(), x)
        >>> torch.allclose(back[0], by_autograd[:, 0], atol=1e-4)
        True
    """
    units = [unlocked[::-1] for unlocked in reversed(net.unlocked)]
    sizes = [[net.num_params] * net.input_dim, *units, [1] * (net.input_dim - 1) + [0]]
    weights = [weight.T for weight in reversed(_weights(net))]
    biases = [weight.new_zeros(len(weight), 1) for weight in weights]
    finish: list[Finish] = []
    for slope, of_layer in zip(reversed(slopes), units, strict=True):
        rows = split_steps(slope, of_layer, True)
        finish.append(lambda summed, t, rows=rows: summed.mul_(rows[t]))  # type: ignore[misc]
    return Chain(sizes, weights, biases, finish, slopes[0], backwards=True)


def _weights(net: MADE) -> list[Tensor]:
    """The weights of all layers, with features by rank; the feature of the last rank feeds nothing."""
    weights = [layer.matrix() for layer in (*net.hidden, net.output)]
    return [weights[0][:, list(net.features[:-1])], *weights[1:-1], _by_rank(weights[-1], net)]


def _by_rank(rows: Tensor, net: MADE) -> Tensor:
    """Reorder the rows of the output layer: P rows for each rank, from the first rank to the last."""
    return rows.unflatten(0, (net.num_params, net.input_dim)).transpose(0, 1)[list(net.features)].flatten(0, 1)
