"""Recipes of coupling flows, whose densities and samples cost the same, and of Gaussianization."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..arguments import Activation, Widths, as_flags, check_flags, suggests_keywords
from ..bijectors import Affine, Bijector, CircularSpline, LogisticMixture, RationalQuadraticSpline, Shift
from ..conditioners import MLP, Periodic
from ..distributions import CircularBase
from ..transforms import ActNorm, Coupling, Elementwise, FlowTransform, LULinear, Orthogonal
from .arguments import Sizes, checked_sizes
from .flow import Flow


@suggests_keywords
def nice(input_dim: int, context_dim: int = 0, *, num_transforms: int = 6, hidden_dims: Widths = (64, 64)) -> Flow:
    """NICE: additive couplings and one scale per feature (Dinh, Krueger, Bengio 2014, arXiv:1410.8516).

    Each coupling splits the features into two parts A and B, which differ from layer to layer, and has a network::

        y_A = x_A,    y_B = x_B + t,    t = net(x_A, context)

    The last map before the data is y = loc + exp(s) x, per feature.  Density and samples cost the same, one pass of
    each network.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of coupling layers.
        hidden_dims: The widths of the hidden layers of each network.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size is out of its range.

    Example::

        >>> import torch
        >>> flow = nice(4)
        >>> x = flow.sample((3,))
        >>> x.shape, torch.allclose(flow.log_prob(x), flow.base().log_prob(x), atol=1e-5)  # before training
        (torch.Size([3, 4]), True)
    """
    sizes = checked_sizes("nice", input_dim, context_dim, num_transforms, hidden_dims)
    return Flow([*coupling_layers(Shift(), sizes), ActNorm(input_dim)])


@suggests_keywords
def realnvp(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 8,
    hidden_dims: Widths = (64, 64),
    max_log_scale: float = 3.0,
    activation: Activation = nn.ReLU,
) -> Flow:
    """Real NVP: affine couplings (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803).

    Each coupling splits the features into two parts A and B, which differ from layer to layer.  As in the paper it maps
    y, on the data's side, to x, on the base's side, with a network net::

        x_A = y_A,    x_B = y_B exp(s) + t,    (s, t) = net(y_A, context)

    Density and samples cost the same, one pass of each network.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of coupling layers.
        hidden_dims: The widths of the hidden layers of each network.
        max_log_scale: The bound on the log-scale s of one layer, in nats.
        activation: The class of the nonlinearity, such as ``torch.nn.ELU``.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size or ``max_log_scale`` is out of its range.

    Example::

        >>> import torch
        >>> flow = realnvp(4, context_dim=2, num_transforms=2)
        >>> flow(torch.zeros(5, 2)).sample((7,)).shape
        torch.Size([7, 5, 4])
    """
    # With y_B = x_B exp(s) + t errors of the shift t, in units of the base, would grow by exp(-s) where data are
    # narrow, and the log-density would not converge at a constant step size.
    sizes = checked_sizes("realnvp", input_dim, context_dim, num_transforms, hidden_dims)
    layers = coupling_layers(Affine(max_log_scale, slope=1.0), sizes, activation)
    return Flow([layer.inv for layer in layers])


@suggests_keywords
def nsf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 5,
    hidden_dims: Widths = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    activation: Activation = nn.ReLU,
    linear: bool = False,
) -> Flow:
    """Neural spline flow, coupling form (Durkan, Bekasov, Murray, Papamakarios 2019, arXiv:1906.04032).

    Each coupling splits the features into two parts A and B, which differ from layer to layer, and has a network::

        y_A = x_A,    y_B = spline(x_B; θ),    θ = net(x_A, context)

    A spline is a quotient of two quadratics in each bin of [-bound, bound], and the identity outside.  The last map
    before the data is one spline per feature, which depends on no other feature.  A flow of one feature lacks
    this map.  Density and samples cost the same, one pass of each network.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of coupling layers.
        hidden_dims: The widths of the hidden layers of each network.
        bins: The number of bins of each spline, from 2 to 99.
        bound: The half-width of the interval that the splines bend, in the base's standard deviations.
        activation: The class of the nonlinearity, such as ``torch.nn.ELU``.
        linear: True to put a trainable dense linear map after each coupling, as in the paper's fits of tables.  It
            gains a tenth of a nat on some tables, for D² parameters each.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size, ``bins`` or ``bound`` is out of its range.

    Example::

        >>> import torch
        >>> round(nsf(4)().log_prob(torch.zeros(4)).item(), 3)  # at the start it is the standard normal
        -3.676
    """
    sizes = checked_sizes("nsf", input_dim, context_dim, num_transforms, hidden_dims)
    bijector = RationalQuadraticSpline(bins, bound)
    layers = coupling_layers(bijector, sizes, activation)
    check_flags("nsf", linear=linear)
    if linear:
        layers = [part for layer in layers for part in (layer, LULinear(input_dim))]
    last = [Elementwise(bijector, input_dim)] if input_dim > 1 else []  # other layers map a single feature alone
    return Flow([*layers, *last])


@suggests_keywords
def flowpp(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 6,
    hidden_dims: Widths = (64, 64),
    components: int = 8,
) -> Flow:
    """Flow++ for vectors: couplings by distribution functions of logistic mixtures (Ho et al. 2019, arXiv:1902.00275).

    Each coupling maps y, on the data's side, to x, on the base's side, for two parts A and B of the features::

        x_A = y_A,    x_B = e^a logit Σ_k π_k σ((y_B - μ_k) e^{-s_k}) + b,    all parameters by net(y_A, context)

    A scale and a location of each feature follow each coupling.  The maps have no closed inverse: samples are found
    numerically, or densities in the flow ``.inv``.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        num_transforms: The number of coupling layers.
        hidden_dims: The widths of the hidden layers of each network.
        components: The number of logistic components of each map, at least 2.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size or ``components`` is out of its range.

    Example::

        >>> import torch
        >>> flow = flowpp(4, components=4)
        >>> x = flow.sample((3,))
        >>> x.shape, flow.log_prob(x).isfinite().all()
        (torch.Size([3, 4]), tensor(True))
    """
    sizes = checked_sizes("flowpp", input_dim, context_dim, num_transforms, hidden_dims)
    layers = coupling_layers(LogisticMixture(components), sizes, residual=True)
    return Flow(part for layer in layers for part in (layer.inv, ActNorm(input_dim)))


@suggests_keywords
def circular_coupling(
    input_dim: int,
    context_dim: int = 0,
    *,
    circular: Sequence[bool],
    num_transforms: int = 8,
    hidden_dims: Widths = (64, 64),
    bins: int = 8,
    activation: Activation = nn.ReLU,
) -> Flow:
    """Couplings by circular splines for angles and affine maps for others (Rezende et al. 2020, arXiv:2002.02428).

    Each layer maps the features of one kind in a part B, given all other features, A.  The network sees angles by
    their cosines and sines::

        y_A = x_A,    y_B = g(x_B) + t for angles,  x_B exp(s) + t for others,    (g, s, t) by net(x_A, context)

    Here g is a spline of the circle.  The density has the period 2π in each angle, and integrates to one over one
    period.  Angles, of samples too, may lie in any period:
    ``torch.remainder(x + math.pi, 2 * math.pi) - math.pi`` lies in [-π, π).

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for a flow without a context.
        circular: One bool for each of the D features, True for an angle in radians.
        num_transforms: The number of coupling masks; two layers share a mask if both angles and other features are to
            be mapped.
        hidden_dims: The widths of the hidden layers of each network.
        bins: The number of bins of each circular spline, from 2 to 99.
        activation: The class of the nonlinearity, such as ``torch.nn.ELU``.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``; at the start angles are uniform, and other features
        standard normal.

    Raises:
        ValueError: If a size or ``bins`` is out of its range, or ``circular`` does not hold one bool
            for each feature.

    Example::

        >>> import math, torch
        >>> flow = circular_coupling(2, circular=[True, False])
        >>> round(flow().log_prob(torch.tensor([1.0, 0.0])).item(), 3)  # -log 2π - log(2π) / 2
        -2.757
    """
    sizes = checked_sizes("circular_coupling", input_dim, context_dim, num_transforms, hidden_dims)
    angles = as_flags("circular_coupling", "circular", circular, input_dim)
    kinds: list[tuple[Bijector, Tensor]] = [(Affine(), ~angles), (CircularSpline(bins), angles)]
    layers: list[FlowTransform] = []
    for mask in coupling_masks(input_dim, num_transforms):
        for bijector, kind in kinds:
            mapped = kind & ~mask if input_dim > 1 else kind
            count, seen = int(mapped.sum()), angles[~mapped]
            if count and len(seen):
                shape = len(seen) + int(seen.sum()), count, bijector.num_params, hidden_dims, context_dim
                net = Periodic(MLP(*shape, activation=activation), seen)
                layers.append(Coupling(bijector, net, ~mapped))
            elif count:  # there is no other feature to depend on
                layers.append(elementwise(bijector, count, sizes, activation))
    return Flow(layers, CircularBase(angles))


@suggests_keywords
def gaussianization(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_transforms: int = 6,
    hidden_dims: Widths = (64, 64),
    components: int = 8,
) -> Flow:
    """Gaussianization flow: maps of single features by mixtures, alternating with rotations (Meng, Song, Song, Ermon
    2020, arXiv:2003.01941).

    From data y to base x, with trainable rotations Q and maps f of each feature alone, by logistic mixtures::

        x = f_1(Q_1 … f_{n-1}(Q_{n-1} f_n(y)))

    The map of a feature depends on no other feature; only rotations mix them.  The maps have no closed inverse: samples
    are found numerically.

    Args:
        input_dim: The number D of features.
        context_dim: The number of context features, 0 for none; with a context each layer has a network, and without it
            its parameters are trained directly.
        num_transforms: The number n of layers.
        hidden_dims: The widths of the hidden layers of each network.
        components: The number of logistic components of each map, at least 2.

    Returns:
        A :class:`~pyro_flows.flows.Flow` over vectors ``(D,)``, the standard normal at the start.

    Raises:
        ValueError: If a size or ``components`` is out of its range.

    Example::

        >>> import torch
        >>> gaussianization(4, components=4)().log_prob(torch.zeros(3, 4)).shape
        torch.Size([3])
    """
    sizes = checked_sizes("gaussianization", input_dim, context_dim, num_transforms, hidden_dims)
    bijector = LogisticMixture(components)
    layers: list[FlowTransform] = []
    for layer in range(num_transforms):
        mixture = elementwise(bijector, input_dim, sizes).inv
        layers += [Orthogonal(input_dim), mixture] if layer and input_dim > 1 else [mixture]
    return Flow(layers)


def elementwise(
    bijector: Bijector, count: int, sizes: Sizes, activation: Activation = nn.ReLU, residual: bool = False
) -> Elementwise:
    """Build a map of each of ``count`` features alone; its parameters depend on the context, if there is one."""
    return Elementwise(bijector, count, context_network(sizes, count, bijector.num_params, activation, residual))


def context_network(
    sizes: Sizes, output_dim: int, num_params: int, activation: Activation = nn.ReLU, residual: bool = False
) -> MLP | None:
    """Build a network from contexts to parameters, or None without a context: parameters are trained directly."""
    shape = sizes.context_dim, output_dim, num_params, sizes.hidden_dims
    return MLP(*shape, activation=activation, residual=residual) if sizes.context_dim else None


def coupling_layers(
    bijector: Bijector,
    sizes: Sizes,
    activation: Activation = nn.ReLU,
    *,
    residual: bool = False,
    centered: bool = False,
) -> list[FlowTransform]:
    """Build coupling layers; a single feature has no other to depend on, and is mapped alone."""
    layers: list[FlowTransform] = []
    for mask in coupling_masks(sizes.input_dim, sizes.num_transforms):
        if sizes.input_dim > 1:
            kept, mapped = int(mask.sum()), int((~mask).sum())
            shape = kept, mapped, bijector.num_params, sizes.hidden_dims, sizes.context_dim
            net = MLP(*shape, activation=activation, residual=residual, centered=centered)
            layers.append(Coupling(bijector, net, mask))
        else:
            layers.append(elementwise(bijector, 1, sizes, activation, residual))
    return layers


def coupling_masks(input_dim: int, count: int) -> list[Tensor]:
    """Return masks for consecutive couplings, in complementary pairs.

    Pair j splits the features by the j-th binary digit of their index: into halves, into alternating quarters, eighths
    … and again from the halves.  So each pair transforms each feature, and one of the first ⌈log2 D⌉ pairs separates
    any two features.

    Example::

        >>> [mask.int().tolist() for mask in coupling_masks(4, 4)]
        [[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """
    digits = max(int(input_dim - 1).bit_length(), 1)
    place = torch.arange(input_dim)
    shifts = [layer // 2 % digits + 1 for layer in range(count)]
    return [(place << shift) // input_dim % 2 == layer % 2 for layer, shift in enumerate(shifts)]
