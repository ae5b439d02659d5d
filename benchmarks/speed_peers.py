"""Peers of ``speed.py``: the same flows in Pyro, zuko, nflows and flowjax, built in the way of each library.

Two things differ, because a library has no other way.  Between couplings Pyro reverses the features and flowjax
permutes them, while the masks of all others alternate.  Our ``nsf`` and ``nsf_ar`` end with an elementwise spline.  No
peer has it, and it is part of our times.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from speed_contenders import (
    AUTOREGRESSIVE,
    BINS,
    BOUND,
    COMPILED,
    FLOOR,
    FLOWJAX,
    HIDDEN,
    LAYERS,
    OURS,
    Case,
    Contender,
    compiled,
    contender,
    floor,
    ours,
)
from torch import Tensor


def pyro_own(case: Case) -> Contender | None:
    """Return the tasks of Pyro's flow, or None if Pyro cannot build it."""
    import pyro.distributions as dist
    import pyro.distributions.transforms as T
    from pyro.nn import AutoRegressiveNN, DenseNN

    name, dim, device = case.flow, case.dim, case.x.device
    if name in AUTOREGRESSIVE and dim > min(HIDDEN):
        return None  # Pyro's networks must be at least as wide as the input
    half = dim // 2
    backwards = torch.arange(dim - 1, -1, -1, device=device)
    spline = [BINS, BINS, BINS - 1]
    layers, parts = [], []
    for _ in range(LAYERS):
        if name in ("maf", "iaf"):
            layer = T.AffineAutoregressive(AutoRegressiveNN(dim, HIDDEN))
            parts.append(layer.inv if name == "maf" else layer)
        elif name == "nsf_ar":
            net = AutoRegressiveNN(dim, HIDDEN, param_dims=spline)
            layer = T.SplineAutoregressive(dim, net, count_bins=BINS, bound=BOUND, order="quadratic")
            parts.append(layer.inv)
        elif name == "nsf":
            net = DenseNN(half, HIDDEN, [n * (dim - half) for n in spline])
            layer = T.SplineCoupling(dim, half, net, count_bins=BINS, bound=BOUND, order="quadratic")
            parts += [layer, T.Permute(backwards)]
        else:
            layer = T.AffineCoupling(half, DenseNN(half, HIDDEN, [dim - half, dim - half]))
            parts += [layer, T.Permute(backwards)]
        layers.append(layer.to(device))
    base = dist.Normal(torch.zeros(dim, device=device), torch.ones(dim, device=device)).to_event(1)
    flow = dist.TransformedDistribution(base, parts)

    def sample_and_log_prob() -> Tensor:
        return flow.log_prob(flow.rsample((case.batch,)))

    def clean(task: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            flow.clear_cache()
            task()

        return run

    tasks = contender(
        case,
        flow.log_prob,
        lambda: flow.sample((case.batch,)),
        sample_and_log_prob,
        [p for layer in layers for p in layer.parameters()],
    )
    return {task: clean(function) for task, function in tasks.items()}


def zuko(case: Case) -> Contender:
    """Return the tasks of zuko's flow."""
    import zuko

    features, net, spline = case.dim, {"hidden_features": HIDDEN}, [(BINS,), (BINS,), (BINS - 1,)]
    if case.flow == "realnvp":
        flow = zuko.flows.RealNVP(features, transforms=LAYERS, **net)
    elif case.flow == "nsf":  # zuko has no such recipe, but it has couplings and splines
        splines = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": spline}
        masks = [torch.arange(features) % 2 == layer % 2 for layer in range(LAYERS)]
        parts = [zuko.flows.GeneralCouplingTransform(features, mask=mask, **splines, **net) for mask in masks]
        flow = zuko.flows.Flow(parts, zuko.flows.MAF(features, transforms=1).base)
    elif case.flow == "nsf_ar":
        flow = zuko.flows.NSF(features, transforms=LAYERS, bins=BINS, **net)
    else:
        flow = zuko.flows.MAF(features, transforms=LAYERS, **net)
        flow = flow if case.flow == "maf" else zuko.flows.Flow(flow.transform.inv, flow.base)
    flow.to(case.x.device)
    return contender(
        case,
        lambda value: flow().log_prob(value),
        lambda: flow().sample((case.batch,)),
        lambda: flow().rsample_and_log_prob((case.batch,))[1],
        list(flow.parameters()),
    )


def nflows(case: Case) -> Contender:
    """Return the tasks of nflows' flow."""
    from nflows import distributions, flows, transforms
    from nflows.nn.nets import MLP

    name, dim = case.flow, case.dim

    class Net(torch.nn.Module):
        def __init__(self, n: int, m: int) -> None:
            super().__init__()
            self.net = MLP([n], [m], HIDDEN)

        def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
            return self.net(inputs)

    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    made = {"features": dim, "hidden_features": HIDDEN[0], "num_blocks": 1, "use_residual_blocks": False}
    parts = []
    for layer in range(LAYERS):
        mask = (torch.arange(dim) < dim // 2).int() * 2 - 1
        mask = mask if layer % 2 else -mask
        if name in ("maf", "iaf"):
            part = transforms.MaskedAffineAutoregressiveTransform(**made)
            parts.append(part if name == "maf" else transforms.InverseTransform(part))
        elif name == "nsf_ar":
            parts.append(transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(**made, **spline))
        elif name == "nsf":
            parts.append(transforms.PiecewiseRationalQuadraticCouplingTransform(mask, Net, **spline))
        else:
            parts.append(transforms.AffineCouplingTransform(mask, Net))
    flow = flows.Flow(transforms.CompositeTransform(parts), distributions.StandardNormal([dim]))
    flow.to(case.x.device)
    return contender(
        case,
        flow.log_prob,
        lambda: flow.sample(case.batch),
        lambda: flow.sample_and_log_prob(case.batch)[1],
        list(flow.parameters()),
    )


def flowjax(case: Case) -> Contender | None:
    """Return the tasks of flowjax's flow, or None if jax does not run on the device."""
    import jax

    if case.x.device.type != jax.default_backend().replace("gpu", "cuda"):
        return None
    jax.config.update("jax_enable_x64", case.x.dtype == torch.float64)
    import equinox as eqx
    import flowjax.flows
    import jax.numpy as jnp
    from flowjax.bijections import Affine, RationalQuadraticSpline
    from flowjax.distributions import Normal

    key = jax.random.key(0)
    bijector = RationalQuadraticSpline(knots=BINS, interval=BOUND) if case.splines else Affine()
    build = flowjax.flows.coupling_flow if case.flow in ("nsf", "realnvp") else flowjax.flows.masked_autoregressive_flow
    flow = build(
        key,
        base_dist=Normal(jnp.zeros(case.dim)),
        transformer=bijector,
        flow_layers=LAYERS,
        nn_width=HIDDEN[0],
        nn_depth=len(HIDDEN),
        invert=case.scores_fast,
    )
    data = jnp.asarray(case.x.cpu().numpy())
    # Data and keys are arguments, because draws from a constant key could be computed while compiling.
    score = eqx.filter_jit(lambda f, data, key: f.log_prob(data))
    draw = eqx.filter_jit(lambda f, data, key: f.sample(key, (case.batch,)))
    score_step = eqx.filter_jit(eqx.filter_grad(lambda f, data, key: -f.log_prob(data).mean()))
    draw_step = eqx.filter_jit(
        eqx.filter_grad(lambda f, data, key: f.sample_and_log_prob(key, (case.batch,))[1].mean())
    )
    fast, slow = (score_step, draw_step) if case.scores_fast else (draw_step, score_step)
    functions = {"log-prob": score, "step": fast, "sample": draw, "slow step": slow}
    return {task: (lambda f=f: jax.block_until_ready(f(flow, data, key))) for task, f in functions.items()}


class Library(NamedTuple):
    """Library: its builder, its module and its package."""

    build: Callable[[Case], Contender | None]  # None: the library lacks the flow
    module: str
    package: str


LIBRARIES = {
    OURS: Library(ours, "pyro_flows", "pyro-flows"),
    COMPILED: Library(compiled, "pyro_flows", "pyro-flows"),
    "Pyro": Library(pyro_own, "pyro", "pyro-ppl"),
    "zuko": Library(zuko, "zuko", "zuko"),
    "nflows": Library(nflows, "nflows", "nflows"),
    FLOWJAX: Library(flowjax, "flowjax", "flowjax"),
    FLOOR: Library(floor, "torch", "torch"),
}
