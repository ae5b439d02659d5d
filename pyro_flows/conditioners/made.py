"""Masked autoencoders: the parameters of a feature depend only on the features of lower rank, or on its parents.

Each hidden unit depends on a set of features, and feeds those units and outputs that may depend on all of them.
Without a graph the sets are {rank < m}, and m is the unit's degree.  Units are sorted by degree, so the units that one
more feature unlocks are contiguous.

The inverse of an autoregressive layer needs the parameters of each rank as soon as the features of lower rank are
known.  A :class:`Chain` keeps the rows that are known and computes only those that one more step unlocks.
:func:`stream` runs the network from the first rank to the last.  :func:`stream_vjp` runs its vector–Jacobian product
from the last rank to the first, which solves the triangular system in the gradient of an inverse.  Each takes about the
work of one pass, in memory of O(width) per sample, and stores nothing on the network.  Rows are written in place, so
run chains without autograd: inside an autograd function, or under ``torch.no_grad``.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import as_order, check_integers, quoted, require
from .base import Conditioner, Linear, activation_of


class MaskedLinear(Linear):
    """y = p ((W ∘ M) x + b), where the 0/1 matrix M removes connections."""

    mask: Tensor

    def __init__(self, in_features: int, out_features: int, *, zero: bool = False) -> None:
        super().__init__(in_features, out_features, zero=zero)
        self.register_buffer("mask", torch.ones(out_features, in_features), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.paced(F.linear(x, self.weight * self.mask, self.bias))

    def matrix(self) -> Tensor:
        """Return the matrix of the map, p (W ∘ M)."""
        return self.paced(self.weight * self.mask)


class MADE(Conditioner):
    """A masked network: the parameters θ_i of feature i depend only on the features of lower rank, or on its parents.

    It takes ``(*batch, D)`` to ``(*batch, D, num_params)``, and conditions
    :class:`~pyro_flows.transforms.Autoregressive` layers.  Their inverse evaluates it feature by feature, in about the
    work of one pass.

    MADE: Masked Autoencoder for Distribution Estimation (Germain, Gregor, Murray, Larochelle 2015, arXiv:1502.03509);
    with a graph, Graphical Normalizing Flows (Wehenkel, Louppe 2021, arXiv:2006.02548).

    Args:
        input_dim: The number D of features, at least 1.
        num_params: The number of parameters of each feature (``bijector.num_params``).
        hidden_dims: The widths of the hidden layers, at least one; they may be narrower than the input.
        context_dim: The number of context features; every unit may depend on them.
        order: ``order[i]`` is the rank of feature i, a permutation of 0 … D - 1; by default the features' own order, or
            one in which parents come first.
        adjacency: ``adjacency[i, j]`` is True if the parameters of feature i may depend on feature j, ``(D, D)``.  The
            directed graph has no cycles, and its diagonal is ignored.  By default all features of lower rank are
            parents.
        activation: The class of the elementwise nonlinearity.

    Raises:
        ValueError: If a size is out of its range, or the order is not a permutation or puts a child before a parent.
            If ``adjacency`` has another shape or a cycle, or a hidden layer has fewer units than there are different
            sets of parents.  In use, if the network takes contexts and none is given.

    Example::

        >>> import torch
        >>> net = MADE(3, num_params=2, hidden_dims=(16,), order=(2, 1, 0))
        >>> net(torch.randn(7, 3)).shape
        torch.Size([7, 3, 2])
        >>> _ = torch.nn.init.normal_(net.output.weight)  # as if trained
        >>> slopes = torch.autograd.functional.jacobian(lambda x: net(x).sum(-1), torch.randn(3))
        >>> (slopes != 0).int().tolist()  # row i: the features that the parameters of feature i depend on
        [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    """

    order: Tensor
    adjacency: Tensor | None
    hidden: Sequence[MaskedLinear]

    def __init__(
        self,
        input_dim: int,
        num_params: int,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        *,
        order: Sequence[int] | None = None,
        adjacency: Sequence[Sequence[bool]] | Tensor | None = None,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        check_integers("MADE", input_dim=input_dim)
        super().__init__(input_dim, input_dim, num_params, hidden_dims, context_dim)
        graph = None if adjacency is None else checked_graph(adjacency, input_dim)
        if order is None:
            order = range(input_dim) if graph is None else topological_order(graph)
        self.register_buffer("order", torch.tensor(as_order("MADE", "order", order, input_dim)))
        self.register_buffer("adjacency", graph)
        self.activation = activation
        self.act = activation_of("MADE", activation)
        widths = (input_dim, *self.hidden_dims)
        self.hidden = nn.ModuleList(MaskedLinear(n, m) for n, m in pairwise(widths))  # type: ignore[assignment]
        self.output = MaskedLinear(widths[-1], num_params * input_dim, zero=True)
        if graph is not None:
            first = not (graph & (self.order[:, None] < self.order)).any()
            require(first, "MADE", "order", "put parents first", self.order.tolist())
            sets = len(self._parent_sets())
            must = f"be at least {sets}, a unit for each set of parents"
            require(min(self.hidden_dims) >= sets, "MADE", "hidden_dims", must, self.hidden_dims)
        self._set_masks()
        self.register_load_state_dict_post_hook(MADE._set_masks)

    def _parent_sets(self) -> Tensor:
        """Return the sets of features that hidden units may depend on, without repetition, by degree, ``(T, D)``."""
        sets = self._parents().unique(dim=0)
        sets = sets[torch.argsort(_degrees(sets, self.order), stable=True)]
        # A unit of the empty set is useful only if it has a context, or if no unit depends on any feature.
        return sets if self.context_dim or len(sets) == 1 else sets[sets.any(-1)]

    def _parents(self) -> Tensor:
        """Return the features that the parameters of each feature may depend on, ``(D, D)``."""
        return self.order[:, None] > self.order if self.adjacency is None else self.adjacency

    def _set_masks(self, _keys: object = None) -> None:
        """Derive masks, units and the sequence of features from the state: ``order`` and ``adjacency``."""
        as_order("MADE", "the state's order", self.order, self.input_dim)
        self.features: tuple[int, ...] = tuple(torch.argsort(self.order).tolist())  # the feature of each rank
        sets = self._parent_sets()
        # unlocked[l][r]: the number of units of hidden layer l that have degree r, and so wait for r features
        self.unlocked: list[list[int]] = []
        seen = torch.eye(self.input_dim, dtype=torch.bool, device=sets.device)
        for layer in self.hidden:
            units = sets[_spread(layer.out_features, len(sets))]  # (H, D)
            layer.mask = _within(seen, units).to(layer.weight)
            self.unlocked.append(torch.bincount(_degrees(units, self.order), minlength=self.input_dim).tolist())
            seen = units
        self.output.mask = _within(seen, self._parents()).repeat(self.num_params, 1).to(self.output.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        first, *others = self.hidden
        h = self.act(self.add_context(first(x), context))
        for layer in others:
            h = self.act(layer(h))
        return self.arranged(self.output(h))

    def params_and_slopes(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Return the parameters, and the slopes that :func:`stream_vjp` needs, from one pass.

        Args:
            x: Inputs of shape ``(N, D)``.
            context: Contexts of shape ``(N, context_dim)``, or None if ``context_dim`` is 0.

        Returns:
            The parameters ``(N, D, P)``, with their graph, and for each hidden layer the derivatives of the activation
            at its units, ``(H, N)``.
        """
        slopes = []
        with torch.enable_grad():
            h = x.detach().requires_grad_()
            for number, layer in enumerate(self.hidden):
                a = layer(h) if number else self.add_context(layer(h), context)
                h = self.act(a.clone())
                slopes.append(torch.autograd.grad(h, a, torch.ones_like(h), retain_graph=True)[0].T.contiguous())
            return self.arranged(self.output(h)), slopes


def checked_graph(adjacency: Sequence[Sequence[bool]] | Tensor, input_dim: int) -> Tensor:
    """Return a graph over features as a boolean matrix with an empty diagonal, ``(D, D)``."""
    try:
        graph = torch.as_tensor(adjacency)
    except (TypeError, ValueError, RuntimeError) as error:
        fault = f"adjacency must be a matrix of bools such as [[0, 0], [1, 0]], got {quoted(adjacency)}"
        raise ValueError(f"MADE: {fault}.") from error
    shape = (input_dim, input_dim)
    require(graph.shape == shape, "MADE", "adjacency", f"have shape {shape}", tuple(graph.shape))
    return (graph != 0) & ~torch.eye(input_dim, dtype=torch.bool, device=graph.device)


def ancestors(graph: Tensor) -> Tensor:
    """Return the transitive closure of a graph, in which each feature has its ancestors as parents, ``(D, D)``.

    Example::

        >>> ancestors(torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0]]) > 0).int().tolist()
        [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    """
    for _ in range(len(graph).bit_length()):  # each round doubles the number of generations
        graph = graph | ((graph.float() @ graph.float()) > 0)
    return graph


def topological_order(graph: Tensor) -> list[int]:
    """Return the rank of each feature in the first order in which parents come before their children.

    Example::

        >>> topological_order(torch.tensor([[False, True], [False, False]]))
        [1, 0]
    """
    left, order = set(range(len(graph))), [0] * len(graph)
    parents = [set(row.nonzero().flatten().tolist()) for row in graph]
    for rank in range(len(graph)):
        free = [feature for feature in sorted(left) if not parents[feature] & left]
        require(free, "MADE", "adjacency", "have no cycle among its features", sorted(left))
        order[free[0]] = rank
        left.remove(free[0])
    return order


def _degrees(sets: Tensor, order: Tensor) -> Tensor:
    """Return one plus the highest rank in each set, 0 for the empty set, ``(T, D) -> (T)``."""
    return torch.where(sets, order + 1, 0).amax(-1)


def _within(inner: Tensor, outer: Tensor) -> Tensor:
    """Return True where an inner set, of ``(I, D)``, is a subset of an outer set, of ``(O, D)``: ``(O, I)``."""
    return (~outer).float() @ inner.float().T == 0  # no element of the inner set is missing


def _spread(width: int, count: int) -> list[int]:
    """Return ``width`` of the numbers 0 … count - 1, ascending and evenly spread, both ends included if width > 1."""
    if width >= count:
        return [place * count // width for place in range(width)]
    return [round(place * (count - 1) / max(width - 1, 1)) for place in range(width)]


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
