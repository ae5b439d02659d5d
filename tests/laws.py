"""Laws of all maps (shared property tests), and the registries of the maps that must obey them.

Bijectors and transforms have the same two verbs, ``forward_and_log_det(value, theta)`` and
``inverse_and_log_det(value, theta)``, with parameters or a context as theta.  So a law is one function of a map ``f``,
a value and a theta.  A new bijector, transform or recipe adds one line to a registry and is tested by every law.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pyro_flows import AutoFlow, distributions, flows
from pyro_flows.bijectors import (
    Affine,
    Bernstein,
    Bijector,
    CircularSpline,
    Integral,
    LinearRationalSpline,
    LogisticMixture,
    RationalQuadraticSpline,
    Shift,
    Sigmoidal,
    SoftplusAffine,
    SumOfSquares,
)
from pyro_flows.conditioners import (
    MADE,
    MLP,
    CausalTransformer,
    Conditioner,
    ConvNet,
    Given,
    LipschitzMLP,
    MLPField,
    Periodic,
    StepNet,
)
from pyro_flows.conditioners.base import networks_of, set_pace
from pyro_flows.flows import Flow
from pyro_flows.transforms import (
    ActNorm,
    Autoregressive,
    BlockAutoregressive,
    Compose,
    Conditioned,
    Continuous,
    Coupling,
    Elementwise,
    FixedAffine,
    FlowTransform,
    Householder,
    Inverse,
    LULinear,
    NonCentred,
    Orthogonal,
    Patched,
    Permute,
    PerPixel,
    Planar,
    QuantileMap,
    Radial,
    Recomputed,
    Recurrence,
    Reshaped,
    Residual,
    ScaledLinear,
    Solver,
    Split,
    Squeezed,
    Sylvester,
    TriangularAffine,
)
from pyro_flows.transforms.carried import carry

CONTEXT_DIM = 3
WIDTHS = (24, 24)

# ------------------------------------------------------------ bijectors

BIJECTORS: dict[str, Bijector] = {
    "affine": Affine(),
    "affine_2": Affine(2.0),
    "affine_steep": Affine(slope=1.0),
    "softplus_affine": SoftplusAffine(),
    "shift": Shift(),
    "spline": RationalQuadraticSpline(),
    "spline_2_bins": RationalQuadraticSpline(bins=2),
    "spline_16_bins": RationalQuadraticSpline(bins=16, bound=3.0),
    "linear_rational": LinearRationalSpline(),
    "circular": CircularSpline(),
    "sigmoidal": Sigmoidal(),
    "sigmoidal_2_layers": Sigmoidal(components=4, layers=2),
    "mixture": LogisticMixture(components=4),
    "integral": Integral(hidden=4, panels=6),
    "squares": SumOfSquares(degree=4),
    "bernstein": Bernstein(degree=8),
}

# ------------------------------------------------------------ transforms

Builder = Callable[[int, int], FlowTransform]  # (D, context_dim) -> transform


class Kind(NamedTuple):
    """Line of the registry of transforms; a feature of an image transform is a channel of four pixels."""

    build: Builder
    takes_context: bool = False
    size: int = 1  # numbers per feature
    least_dim: int = 1
    start: str = "identity"  # or "permutation" or "rotation"
    learns: bool = True
    maps: bool = True  # True if it runs under vmap
    most_dim: int = 33  # the largest size at which the laws are tested


def shuffled(dim: int) -> list[int]:
    """Return a permutation of 0 … dim - 1 that is neither ascending nor descending for dim > 3."""
    return torch.randperm(dim, generator=torch.Generator().manual_seed(dim)).tolist()


def _coupling(bijector: Bijector) -> Builder:
    def build(dim: int, context_dim: int) -> FlowTransform:
        mask = [place % 2 == 0 for place in range(dim)]
        net = MLP(sum(mask), dim - sum(mask), bijector.num_params, WIDTHS, context_dim)
        return Coupling(bijector, net, mask)

    return build


def _periodic(dim: int, context_dim: int) -> FlowTransform:
    mask = [place % 2 == 0 for place in range(dim)]
    seen = [place % 2 == 0 for place in range(sum(mask))]
    bijector = CircularSpline(bins=4)
    net = MLP(sum(mask) + sum(seen), dim - sum(mask), bijector.num_params, WIDTHS, context_dim)
    return Coupling(bijector, Periodic(net, seen), mask)


def _autoregressive(bijector: Bijector, order: Callable[[int], list[int]] | None = None) -> Builder:
    def build(dim: int, context_dim: int) -> FlowTransform:
        net = MADE(dim, bijector.num_params, WIDTHS, context_dim, order=order(dim) if order else None)
        return Autoregressive(bijector, net)

    return build


def _paced(build: Builder) -> Builder:
    def paced(dim: int, context_dim: int) -> FlowTransform:
        layer = build(dim, context_dim)
        set_pace(networks_of(layer)[0], 0.5)
        return layer

    return paced


def _paced_linear(dim: int) -> FlowTransform:
    set_pace([layer := ScaledLinear(dim)], 0.5)
    return layer


def _fixed_point(dim: int, context_dim: int) -> FlowTransform:
    return Autoregressive(Affine(), MADE(dim, 2, WIDTHS, context_dim), fixed_point=True)


def _graph(dim: int, context_dim: int) -> FlowTransform:
    """Build a layer in which each feature depends on the features of rank lower by one or three."""
    rank = torch.tensor(shuffled(dim))
    above = rank[:, None] - rank
    net = MADE(dim, 2, (48, 48), context_dim, adjacency=(above == 1) | (above == 3))
    return Autoregressive(Affine(), net)


def _elementwise(bijector: Bijector) -> Builder:
    return lambda dim, context_dim: Elementwise(bijector, dim, _of_context(context_dim, dim, bijector.num_params))


def _skip(dim: int, context_dim: int) -> FlowTransform:
    net = MLP(context_dim, dim, Affine().num_params, WIDTHS, skip=True) if context_dim else None
    return Elementwise(Affine(), dim, net)


def _of_context(context_dim: int, output_dim: int, num_params: int) -> MLP | None:
    return MLP(context_dim, output_dim, num_params, WIDTHS) if context_dim else None


def _conditioned(dim: int, context_dim: int) -> FlowTransform:
    return Conditioned(_autoregressive(Affine(), shuffled)(dim, CONTEXT_DIM), torch.zeros(CONTEXT_DIM))


def _compose(dim: int, context_dim: int) -> FlowTransform:
    first = _coupling(Affine(1.0)) if dim > 1 else _elementwise(Affine(1.0))
    second = _autoregressive(RationalQuadraticSpline(), shuffled)
    # The steep linear layers come first, because after a bounded map they would amplify its round-off.
    return Compose(
        [ActNorm(dim), LULinear(dim), Permute(shuffled(dim)), first(dim, context_dim), second(dim, context_dim)]
    )


def _sylvester(sizes: Callable[[int], tuple[int | None, int | None]]) -> Builder:
    def build(dim: int, context_dim: int) -> FlowTransform:
        count = Sylvester.count_params(dim, *sizes(dim))
        return Sylvester(dim, *sizes(dim), _of_context(context_dim, 1, count))

    return build


def _recurrence(width: int) -> Builder:
    def build(dim: int, context_dim: int) -> FlowTransform:
        net = StepNet([False] * dim, dim // width, 2 + width, (4,), context_dim) if context_dim else None
        return Recurrence(dim // width, width, net)

    return build


def _coupling_of_steps(dim: int, context_dim: int) -> FlowTransform:
    mask = [place % 2 == 0 for place in range(dim)]
    return Coupling(Affine(1.0), StepNet(mask, dim, 2, (4, 4), context_dim), mask)


def _effects(dim: int) -> tuple[list[list[int]], list[int]]:
    """Return effects of one number in the second third of the features, and of up to three in the last; and parents."""
    second, last = math.ceil(dim / 3), math.ceil(2 * dim / 3)
    effects = [[i] for i in range(second, last)] + [[*range(i, min(i + 3, dim))] for i in range(last, dim, 3)]
    return effects, [*range(last)]


def _residual(dim: int, context_dim: int) -> FlowTransform:
    return Residual(LipschitzMLP(dim, WIDTHS, context_dim), exact=True)


def _continuous(dim: int, context_dim: int) -> FlowTransform:
    """Build a flow whose solver is as exact as its dtype, so that the laws do not depend on a tolerance."""
    field = MLPField(dim, context_dim, WIDTHS, activation=nn.Tanh)
    return Continuous(field, exact=True, solver=Solver("dopri8", rtol=1e-11, atol=1e-11))


def _between_scales(rotation: Callable[[int], FlowTransform]) -> Builder:
    """Put a rotation between two scales: alone it keeps |x| and the volume, so that no test would see it learn."""
    return lambda dim, _: Compose([ActNorm(dim), rotation(dim), ActNorm(dim)])


PIXELS = 4


def _of_images(build: Callable[[int, int], FlowTransform]) -> Builder:
    """Build a transform of images of two by two pixels, which it takes as vectors."""
    return lambda dim, context_dim: Reshaped(build(dim // PIXELS, context_dim), (dim,))


def _conv(bijector: Bijector, num_blocks: int, size: tuple[int, int] = (2, 2)) -> Builder:
    def build(channels: int, context_dim: int) -> FlowTransform:
        mask = [place < channels // 2 for place in range(channels)]
        kept = channels // 2
        net = ConvNet(kept, channels - kept, bijector.num_params, size, 8, num_blocks, context_dim)
        return Coupling(bijector, net, mask)

    return build


def _multiscale(channels: int, context_dim: int) -> FlowTransform:
    """Build one scale: couplings of half of the channels, of the other half given the first, and of a checkerboard."""
    coupling = _conv(Affine(1.0), 0, (1, 1))
    board = [place % 4 in (0, 3) for place in range(4 * channels)]
    net = ConvNet(2 * channels, 2 * channels, 2, (1, 1), 8, 1, context_dim)
    first = Split(coupling(2 * channels, context_dim))
    return Squeezed(Compose([first, coupling(4 * channels, context_dim), Coupling(Affine(1.0), net, board)]))


def _tokens(channels: int, context_dim: int) -> FlowTransform:
    net = CausalTransformer(PIXELS, channels, 2, 8, 1, 2, context_dim, order=[2, 0, 3, 1])
    return Patched(Autoregressive(Affine(1.0), net), (channels, 2, 2))


# One bijector of each kind: its other settings do not change the transform.
OTHER_SETTINGS = ("affine_2", "affine_steep", "spline_16_bins", "sigmoidal_2_layers")
CONDITIONED = {name: b for name, b in BIJECTORS.items() if name not in OTHER_SETTINGS}
# Unbounded scales of already scaled features exceed the range of floats.
BOUNDED = {name: b for name, b in CONDITIONED.items() if name != "softplus_affine"}

TRANSFORMS: dict[str, Kind] = {
    **{f"coupling_{name}": Kind(_coupling(b), True, least_dim=2) for name, b in CONDITIONED.items()},
    **{f"autoregressive_{name}": Kind(_autoregressive(BIJECTORS[name]), True) for name in ("affine", "spline_2_bins")},
    **{f"shuffled_{name}": Kind(_autoregressive(b, shuffled), True) for name, b in BOUNDED.items()},
    "coupling_paced": Kind(_paced(_coupling(Affine())), True, least_dim=2),
    "autoregressive_paced": Kind(_paced(_autoregressive(Affine(), shuffled)), True),
    "periodic_paced": Kind(_paced(_periodic), True, least_dim=2),
    "fixed_point": Kind(_fixed_point, True),
    "graph": Kind(_graph, True),
    "elementwise_affine": Kind(_elementwise(Affine()), True),
    "elementwise_softplus": Kind(_elementwise(SoftplusAffine()), True),
    "elementwise_spline": Kind(_elementwise(RationalQuadraticSpline()), True),
    "elementwise_skip": Kind(_skip, True),
    "conditioned": Kind(_conditioned),
    "periodic_circular": Kind(_periodic, True, least_dim=2),
    "permute": Kind(lambda dim, _: Permute(shuffled(dim)), start="permutation", learns=False),
    "lu_linear": Kind(lambda dim, _: LULinear(dim)),
    "lu_linear_rotated": Kind(lambda dim, _: LULinear(dim, rotation_seed=1), start="rotation"),
    "scaled_linear": Kind(lambda dim, _: ScaledLinear(dim)),
    "scaled_linear_paced": Kind(lambda dim, _: _paced_linear(dim)),
    "fixed_affine": Kind(lambda dim, _: FixedAffine(dim), learns=False),
    "fixed_affine_diagonal": Kind(lambda dim, _: FixedAffine(dim, dense=False), learns=False),
    "fixed_affine_low_rank": Kind(lambda dim, _: FixedAffine(dim, dense=False, rank=min(dim, 3)), learns=False),
    "noncentred": Kind(lambda dim, _: NonCentred(dim, *_effects(dim), levels=2, chained=True), learns=False),
    "quantile_map": Kind(lambda dim, _: QuantileMap(dim), learns=False),
    "block": Kind(lambda dim, of: BlockAutoregressive(dim, (4, 3), _of_context(of, dim, 9)), True),
    "planar": Kind(lambda dim, of: Planar(dim, _of_context(of, 1, 2 * dim + 1)), True),
    "radial": Kind(lambda dim, of: Radial(dim, _of_context(of, 1, dim + 2)), True),
    "sylvester": Kind(_sylvester(lambda dim: (None, None)), True),
    "sylvester_householder": Kind(_sylvester(lambda dim: (dim, 3)), True),
    "sylvester_triangular": Kind(_sylvester(lambda dim: (dim, 0)), True),
    "triangular_affine": Kind(
        lambda dim, of: TriangularAffine(dim, _of_context(of, 1, TriangularAffine.count_params(dim))), True
    ),
    "recurrence": Kind(_recurrence(1), True),
    "recurrence_wide": Kind(_recurrence(2), True, size=2),
    "coupling_of_steps": Kind(_coupling_of_steps, True, least_dim=2),
    "residual": Kind(_residual, True),
    "continuous": Kind(_continuous, True, maps=False, most_dim=2),
    "householder": Kind(lambda dim, _: Householder(dim), learns=False),
    "householder_between_scales": Kind(_between_scales(Householder)),
    "orthogonal": Kind(lambda dim, _: Orthogonal(dim), learns=False),
    "orthogonal_between_scales": Kind(_between_scales(Orthogonal)),
    "actnorm": Kind(lambda dim, _: ActNorm(dim)),
    "compose": Kind(_compose, True, start="permutation"),
    "pixel_lu_linear": Kind(_of_images(lambda channels, _: PerPixel(LULinear(channels), (2, 2))), size=PIXELS),
    "pixel_coupling": Kind(
        _of_images(lambda *of: PerPixel(_coupling(Affine())(*of), (2, 2))), True, size=PIXELS, least_dim=2
    ),
    "conv_affine": Kind(_of_images(_conv(Affine(), 0)), True, size=PIXELS, least_dim=2),
    "conv_mixture": Kind(_of_images(_conv(BIJECTORS["mixture"], 1)), True, size=PIXELS, least_dim=2),
    "multiscale": Kind(_of_images(_multiscale), True, size=PIXELS),
    "tokens": Kind(_of_images(_tokens), True, size=PIXELS),
    "recomputed": Kind(lambda *of: Recomputed(_coupling(RationalQuadraticSpline())(*of)), True, least_dim=2),
    "inverse": Kind(lambda dim, context_dim: _autoregressive(Affine(), shuffled)(dim, context_dim).inv, True),
}

# ------------------------------------------------------------ recipes


def circular_coupling(input_dim: int, context_dim: int = 0, **options: Any) -> Flow:
    """Build a flow of alternating angles and real numbers."""
    circular = [place % 2 == 0 for place in range(int(input_dim))]
    return flows.circular_coupling(input_dim, context_dim, circular=circular, **options)


def cnf(input_dim: int, context_dim: int = 0, *, num_transforms: int = 1, **options: Any) -> Flow:
    """Build a flow of one field, solved in float64 far beyond the default tolerances."""
    options = {"solver": Solver("dopri8", rtol=1e-11, atol=1e-11), **options}
    return flows.cnf(input_dim, context_dim, num_transforms=min(num_transforms, 1), **options)


RECIPES: dict[str, Callable[..., Flow]] = {
    "nice": flows.nice,
    "realnvp": flows.realnvp,
    "nsf": flows.nsf,
    "maf": flows.maf,
    "iaf": flows.iaf,
    "nsf_ar": flows.nsf_ar,
    "bnaf": flows.bnaf,
    "planar_flow": flows.planar_flow,
    "radial_flow": flows.radial_flow,
    "sylvester_flow": flows.sylvester_flow,
    "residual_flow": flows.residual_flow,
    "naf": flows.naf,
    "umnn": partial(flows.umnn, hidden=3),  # its weights are parameters, so at equal sizes it is steeper than others
    "sospf": flows.sospf,
    "bpf": partial(flows.bpf, degree=8),
    "flowpp": flows.flowpp,
    "gaussianization": flows.gaussianization,
    "circular_coupling": circular_coupling,
    "cnf": cnf,
}

# ------------------------------------------------------------ bases


def with_modes(base: distributions.ModesBase) -> distributions.ModesBase:
    """Move the components apart."""
    number, dim = base.num_components, base.input_dim
    places = torch.arange(1.0, number * dim + 1).reshape(number, dim).sin()
    factors = (0.7 + 0.2 * places.abs()).diag_embed() + 0.3 * torch.ones(dim, dim).tril(-1)
    base.set(places, factors, torch.arange(1.0, number + 1))
    return base


BASES: dict[str, Callable[[int], nn.Module]] = {
    "standard_normal": lambda dim: distributions.StandardNormal((dim,)),
    "normal": lambda dim: distributions.NormalBase((dim,)),
    "contaminated_normal": lambda dim: distributions.ContaminatedNormalBase(dim, share=0.2, scale=2.0),
    "student_t": lambda dim: distributions.StudentTBase((dim,), df=3.0),
    "mixture": lambda dim: distributions.MixtureBase(dim, 4),
    "modes": lambda dim: with_modes(distributions.ModesBase(dim, 3)),
    "circular": lambda dim: distributions.CircularBase([place % 2 == 0 for place in range(dim)], bound=2.0),
}

# ------------------------------------------------------------ helpers


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Return standard normal draws times ``scale``, the same in every dtype."""
    return (torch.randn(shape, generator=generator(seed), dtype=torch.float64) * scale).to(dtype)


def params_of(bijector: Bijector, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Tensor:
    """Return random parameters of a bijector, large unless ``scale`` is small."""
    return normal(*shape, bijector.num_params, seed=1, dtype=dtype, scale=scale)


def orthonormal(dim: int) -> Tensor:
    """Return four orthonormal vectors in ``dim`` dimensions, or as many as there are, exact in every dtype."""
    if dim < 4:
        return torch.eye(dim)
    signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    return torch.cat((torch.zeros(dim - 4, 4), signs / 2))


TABLES = Elementwise | Recurrence | Planar | Radial | Sylvester | Orthogonal | Householder | Conditioned


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0, scale: float = 3.0) -> nn.Module:
    """Set large random parameters: ``scale`` times standard normal in every last layer and table."""
    source = generator(seed)

    def draw(parameter: Tensor, size: float | Tensor) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=source, dtype=torch.float64) * size)

    for part in module.modules():
        if isinstance(part, Conditioner) and not isinstance(part, Periodic | Given):
            draw(part.output.weight, scale)
            draw(part.output.bias, scale)
            if isinstance(part, StepNet):
                draw(part.table, scale)
            if isinstance(part, MLP) and part.skip:
                draw(part.direct.weight, scale / 10)
        elif isinstance(part, TABLES):
            for parameter in part.parameters(recurse=False):
                draw(parameter, scale)
        elif isinstance(part, BlockAutoregressive):
            for own in (part.cross, part.mixtures, part.steepness, part.gates):
                for parameter in own.parameters():
                    draw(parameter, scale)
        elif isinstance(part, LipschitzMLP):
            for parameter in part.parameters():
                draw(parameter, scale)
        elif isinstance(part, MLPField):
            draw(part.output.weight, scale / part.hidden_dims[-1] ** 0.5)  # |slope| bounds the growth of distances
            draw(part.output.bias, scale)
        elif isinstance(part, ActNorm):
            draw(part.loc, scale)
            draw(part.log_scale, scale / 3)
        elif isinstance(part, QuantileMap):
            draws = torch.randn(1000, part.input_dim, generator=source, dtype=torch.float64)
            part.set(scale * torch.where(draws > 0, draws.exp(), draws))
        elif isinstance(part, FixedAffine):
            draw(part.loc, scale)
            off = scale / part.input_dim**0.5
            draw(part.scale, off)
            diagonal = part.scale.diagonal() if part.dense else part.scale
            diagonal.copy_(torch.where(diagonal < 0, -1, 1) + diagonal / off)
            if part.rank:
                part.directions.copy_(orthonormal(part.input_dim)[:, : part.rank])
                draw(part.stretch, scale / 3)
                part.stretch.exp_()
        elif isinstance(part, NonCentred):
            draw(part.loc, scale / part.input_dim)
            part.loc.copy_(part.loc.tril(-1) + torch.eye(part.input_dim))
            last = len(part.parents)
            for group in part.groups:
                draw(group.field, scale / 4)
                draw(group.precision, scale / 8)
                group.precision.copy_(group.precision @ group.precision.mT)
                draw(group.prior, scale / 4 / part.input_dim)  # exponents of the second level are exponentials
                of_first = group.columns[0] < last
                group.prior[:, of_first, math.ceil(part.input_dim / 3) : last] = 0
        elif isinstance(part, LULinear | ScaledLinear):
            # Off-diagonals shrink with the size, because otherwise the matrix would be numerically singular.
            off = scale / part.input_dim**0.5
            draw(part.factors, off + (1 - off) * torch.eye(part.input_dim, dtype=torch.float64))
            draw(part.shift, scale)
    return module


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the Jacobian of each row: ``(N, D) -> (N, D, D)``."""
    x = x.detach().requires_grad_()
    y = function(x)
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(y.shape[-1])]
    return torch.stack(rows, 1)


def square_jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the Jacobian in one pass over D copies of the batch, for a map that keeps the width of its rows."""
    copies = x.detach().expand(x.shape[-1], *x.shape).clone().requires_grad_()
    y = function(copies)
    wanted = torch.eye(x.shape[-1]).to(y).unsqueeze(1).expand_as(y)
    return torch.autograd.grad(y, copies, wanted)[0].movedim(0, 1)


def descend(
    parameters: Iterable[Tensor], loss: Callable[[], Tensor], steps: int = 3, lr: float = 1e-2, cosine: int = 0
) -> list[float]:
    """Take steps of Adam, and return the loss before each; its rates may follow a cosine, given the steps to zero."""
    optimiser, losses = torch.optim.Adam(parameters, lr), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, cosine) if cosine else None
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        losses.append(value.item())
        if schedule:
            schedule.step()
    return losses


def seeded(*functions: Callable[[], Any], seed: int = 1) -> list[Any]:
    """Return the results of functions that draw random numbers, all from the same seed."""
    found = []
    for function in functions:
        torch.manual_seed(seed)
        found.append(function())
    return found


@contextlib.contextmanager
def bytes_kept() -> Iterator[dict[int, int]]:
    """Collect the storages that graphs keep for their gradients, with their bytes."""
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield held


class Call(nn.Module):
    """Module whose call is a function of another module, as ``functional_call`` requires."""

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *args: Tensor) -> Any:
        return self.function(self.module, *args)


def passes(
    check: Callable[..., bool], function: Callable[..., Any], module: nn.Module, *inputs: Tensor, **options: Any
):
    """Return whether autograd's check passes for a function of a module, in the inputs and all parameters."""
    holder = Call(function, module)
    names = [name for name, _ in holder.named_parameters()]

    def call(*values: Tensor) -> Any:
        parameters = dict(zip(names, values[len(inputs) :], strict=True))
        return torch.func.functional_call(holder, parameters, values[: len(inputs)])

    leaves = [value.detach().clone().requires_grad_() for value in (*inputs, *module.parameters())]
    return check(call, leaves, **options)


def bits_equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def gap(got: Tensor, wanted: Tensor, event_dim: int) -> Tensor:
    """Return |got - wanted| / (1 + |wanted|) for each event; |·| is the largest entry of the event."""
    error, size = (got - wanted).abs(), wanted.abs()
    if event_dim:
        error, size = error.flatten(-event_dim).amax(-1), size.flatten(-event_dim).amax(-1)
    return error / (1 + size)


def event_dim_of(f: Bijector | FlowTransform) -> int:
    return len(f.event_shape) if isinstance(f, FlowTransform) else 0


def refusals(*cases: tuple[Any, ...]) -> Callable[..., None]:
    """Return a test of calls, each with words of its error, and with the type of the error if it is no ValueError."""

    @pytest.mark.parametrize(("call", "words", "error"), [(*case, ValueError)[:3] for case in cases])
    def refuses(call: Callable[[], Any], words: str, error: type[Exception]) -> None:
        with pytest.raises(error, match=words):
            call()

    return refuses


# ------------------------------------------------------------ laws

Map = Bijector | FlowTransform
TINY = {torch.float32: 1e-6, torch.float64: 1e-12}


def starts_at_identity(f: Map, x: Tensor, theta: Tensor | None) -> None:
    """Zero parameters are the identity, in both directions, up to rounding."""
    tiny = TINY[x.dtype] * (10 if isinstance(f, Continuous) else 1)  # torchdiffeq interpolates at the end of a solve
    for verb in (f.forward_and_log_det, f.inverse_and_log_det):
        y, log_det = verb(x, theta)
        assert y.dtype == log_det.dtype == x.dtype
        assert gap(y, x, 0).max() <= tiny
        assert log_det.abs().max() <= TINY[x.dtype] * max(
            f.event_shape.numel() if isinstance(f, FlowTransform) else 1, 1
        )


def undoes_itself(f: Map, x: Tensor, theta: Tensor | None, tolerance: float | Tensor = 1e-9) -> None:
    """f⁻¹(f(x)) = x: the forward error, which the map itself may amplify."""
    y, _ = f.forward_and_log_det(x, theta)
    again, _ = f.inverse_and_log_det(y, theta)
    assert (gap(again, x, event_dim_of(f)) <= tolerance).all()


def inverts(f: Map, x: Tensor, theta: Tensor | None, tolerance: float) -> None:
    """f(f⁻¹(y)) = y for y = f(x): the backward error, which the map cannot amplify."""
    y, _ = f.forward_and_log_det(x, theta)
    x, _ = f.inverse_and_log_det(y, theta)
    again, _ = f.forward_and_log_det(x, theta)
    assert gap(again, y, event_dim_of(f)).max() <= tolerance


def log_dets_are_opposite(f: Map, x: Tensor, theta: Tensor | None, tolerance: float) -> None:
    """log|dx/dy| = -log|dy/dx| at the x that the inverse returns."""
    y, _ = f.forward_and_log_det(x, theta)
    x, backward = f.inverse_and_log_det(y, theta)
    _, forward = f.forward_and_log_det(x, theta)
    assert gap(-backward, forward, 0).max() <= tolerance


def log_det_is_slope(f: Bijector, x: Tensor, theta: Tensor, tolerance: float) -> None:
    """The log-determinant of a scalar map is the logarithm of autograd's derivative, in both directions."""
    for verb in (f.forward_and_log_det, f.inverse_and_log_det):
        value = x.detach().requires_grad_()
        y, log_det = verb(value, theta)
        (slope,) = torch.autograd.grad(y.sum(), value)
        assert (slope > 0).all()
        assert gap(log_det, slope.log(), 0).max() <= tolerance


def log_det_is_slogdet(f: FlowTransform, x: Tensor, context: Tensor | None) -> None:
    """The log-determinant is that of autograd's Jacobian."""
    y, log_det = f.forward_and_log_det(x, context)
    matrix = square_jacobian(lambda value: f.forward_and_log_det(value, context)[0], x)
    order = order_of(f)
    if order is None:
        # The elimination in slogdet is only as exact as the condition number of the matrix allows.
        wanted, tolerance = torch.linalg.slogdet(matrix).logabsdet, 1e-9 + 1e-15 * torch.linalg.cond(matrix)
    else:
        wanted, tolerance = matrix.diagonal(dim1=-2, dim2=-1).log().sum(-1), torch.tensor(1e-9)
    assert y.shape == x.shape
    assert log_det.shape == x.shape[:-1]
    assert (gap(log_det, wanted, 0) <= tolerance).all()


def carries_the_score(f: FlowTransform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """The score that comes with y is the gradient at y of the log-density of y, for standard normal x."""
    y, log_det, score = f.forward_and_score(x.detach().requires_grad_(), -x, context)
    plain, plain_log_det = f.forward_and_log_det(x, context)
    assert gap(y, plain, 1).max() <= TINY[x.dtype]
    assert gap(log_det, plain_log_det, 0).max() <= TINY[x.dtype]
    leaf = y.detach().requires_grad_()
    back, back_log_det = f.inverse_and_log_det(leaf, context)
    log_density = -0.5 * back.square().sum(-1) + back_log_det
    (wanted,) = torch.autograd.grad(log_density.sum(), leaf)
    assert not score.requires_grad
    matrix = square_jacobian(lambda value: f.forward_and_log_det(value, context)[0], x)
    # The way back through y is only as exact as the condition number allows: some 50 operations amplify round-off.
    assert (gap(score, wanted, 1) <= tolerance + 1e-14 * torch.linalg.cond(matrix)).all()


def carries_the_gradient(f: FlowTransform, x: Tensor, tolerance: float) -> None:
    """Without autograd a transform returns the same score, and pulls gradients back as autograd does."""
    leaf, g = x.detach().requires_grad_(), torch.linspace(-1, 2, x.numel()).to(x).reshape(x.shape)
    y, log_det, score = f.forward_and_score(leaf, -x)
    trained = [parameter for parameter in f.parameters() if parameter.requires_grad]
    of_x, *of_parameters = torch.autograd.grad(y, (leaf, *trained), g, materialize_grads=True)
    with torch.no_grad():
        carried = carry(f, x, -x)
        through, gradients = carried.pull(g)
        again, _ = carried.pull(g)
    for found, wanted in ((carried.y, y), (carried.log_det, log_det), (carried.score, score), (through, of_x)):
        assert gap(found, wanted, found.dim() - 1).max() <= tolerance
    assert torch.equal(through, again)
    added = {id(parameter): torch.zeros_like(parameter) for parameter in trained}
    for parameter, gradient in gradients:
        added[id(parameter)] += gradient
    for parameter, wanted in zip(trained, of_parameters, strict=True):
        assert (added[id(parameter)] - wanted).norm() <= tolerance * (1 + wanted.norm())


def order_of(f: FlowTransform) -> Tensor | None:
    """Return the ranks of the features of an autoregressive layer, forward or inverted; None for other transforms."""
    f = f.transform if isinstance(f, Inverse) else f
    if isinstance(f, BlockAutoregressive):
        return torch.arange(f.input_dim)
    return f.conditioner.order if isinstance(f, Autoregressive) else None


def is_triangular(f: FlowTransform, x: Tensor, context: Tensor | None) -> None:
    """Feature i of y does not depend on features of higher rank, and it increases in feature i of x."""
    order = order_of(f)
    assert order is not None
    for verb in (f.forward_and_log_det, f.inverse_and_log_det):
        matrix = square_jacobian(lambda value, verb=verb: verb(value, context)[0], x)
        assert (matrix[:, order[:, None] < order] == 0).all()
        assert (matrix.diagonal(dim1=-2, dim2=-1) > 0).all()


def compiles(f: Map, x: Tensor, theta: Tensor | None, inverse: str = "aot_eager") -> None:
    """Both verbs compile to one graph, forward and backward; ``aot_eager``, because some machines lack a compiler."""
    for verb, backend in ((f.forward_and_log_det, "aot_eager"), (f.inverse_and_log_det, inverse)):
        torch._dynamo.reset()
        plain = _value_and_grad(verb, x, theta)
        compiled = _value_and_grad(torch.compile(verb, fullgraph=True, backend=backend), x, theta)
        torch.testing.assert_close(compiled, plain, atol=1e-9, rtol=1e-9)


def _value_and_grad(verb: Callable, x: Tensor, theta: Tensor | None) -> list[Tensor]:
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, theta)]
    y, log_det = verb(*leaves)
    found = torch.autograd.grad(y.square().sum() + log_det.sum(), [t for t in leaves if t is not None])
    return [y.detach(), log_det.detach(), *found]


def maps(f: Map, x: Tensor, theta: Tensor | None, in_dims: tuple[int, int | None]) -> None:
    """``torch.func.vmap`` over a leading dimension gives the result of one call on the whole batch."""
    for verb in (f.forward_and_log_det, f.inverse_and_log_det):
        torch.testing.assert_close(torch.func.vmap(verb, in_dims)(x, theta), verb(x, theta), atol=1e-9, rtol=1e-9)


def learned(guide: AutoFlow) -> list[nn.Parameter]:
    """Return the trained parameters of a guide: all but those of the fixed last transform."""
    return [parameter for transform in guide.flow.transforms[:-1] for parameter in transform.parameters()]


def stir(guide: AutoFlow, scale: float = 0.1) -> AutoFlow:
    """Move a guide away from its start, so that its flow is no longer the identity."""
    with torch.no_grad():
        for parameter in learned(guide):
            parameter.add_(scale * torch.randn_like(parameter))
    return guide
