"""Libraries of ``comparison.py``: small flows with default settings, behind one interface."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

HIDDEN = (32, 32)
LAYERS = 2
ROWS = 64  # rows for which work is counted
KINDS = {
    "affine coupling": "affine coupling (RealNVP)",
    "spline coupling": "spline coupling (NSF)",
    "mixture coupling": "mixture coupling (Flow++)",
    "affine autoregressive": "affine autoregressive (MAF, IAF)",
    "spline autoregressive": "spline autoregressive",
    "naf": "neural autoregressive (NAF)",
    "umnn": "unconstrained monotonic (UMNN)",
    "squares": "sum of squares (SOS)",
    "bernstein": "Bernstein polynomials",
    "bnaf": "block autoregressive (BNAF)",
    "gaussianization": "Gaussianization",
    "residual": "residual",
    "sylvester": "Sylvester",
    "planar": "planar",
    "radial": "radial",
    "continuous": "continuous (CNF)",
}


@dataclass
class Made:
    """Flow of some library; its context, if any, is the last argument."""

    module: nn.Module
    log_prob: Callable[..., Tensor]  # (x, context=None)
    sample: Callable[..., Tensor]  # (n, context=None)
    both: Callable[..., tuple[Tensor, Tensor]]  # (n, context=None): draws and their log-densities, as its manual has it
    hold: Callable[[], Any] | None = None  # builds the distribution that a user would keep, if the library has one

    def perturb(self, scale: float) -> None:
        """Change all parameters in place, as an optimiser does."""
        with torch.no_grad():
            for p in self.module.parameters():
                p.add_(scale * torch.randn_like(p))

    def clone(self, how: str) -> Any:
        return copy.deepcopy(self.module) if how == "copy" else pickle.loads(pickle.dumps(self.module))

    def restore(self, other: Made) -> None:
        """Load the state of another flow of the same kind, strictly, through a file."""
        file = io.BytesIO()
        torch.save(other.module.state_dict(), file)
        file.seek(0)
        self.module.load_state_dict(torch.load(file, weights_only=True))

    def work(self, run: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        return counter.get_total_flops()

    def work_of_draws(self) -> int:
        return self.work(lambda: self.sample(ROWS))

    def work_of_both(self) -> int:
        return self.work(lambda: self.both(ROWS))

    def work_of_scores(self, dim: int) -> int:
        return self.work(lambda: self.log_prob(torch.randn(ROWS, dim)))

    def compiles(self) -> bool:
        torch._dynamo.reset()
        score = torch.compile(lambda x: self.log_prob(x), fullgraph=True, backend="aot_eager")
        x = torch.randn(7, self.sample(2).shape[-1])
        return torch.allclose(score(x), self.log_prob(x), atol=1e-4)


def of_distribution(module: nn.Module, build: Callable[..., Any]) -> Made:
    """Return the flow of a library whose flows return distributions: pyro_flows, Pyro and zuko."""

    def both(n: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        flow = build(context)
        if hasattr(flow, "rsample_and_log_prob"):
            return flow.rsample_and_log_prob((n,))
        x = flow.rsample((n,))
        return x, flow.log_prob(x)

    return Made(
        module,
        lambda x, context=None: build(context).log_prob(x),
        lambda n, context=None: build(context).rsample((n,)),
        both,
        lambda: build(None),
    )


class Library:
    module, package = "", ""
    scores_fast = True  # True if its autoregressive flows score in one pass
    functional = False  # True if arrays never change in place

    def installed(self) -> bool:
        try:
            importlib.import_module(self.module)
        except ImportError:
            return False
        return True

    def build(self, kind: str, dim: int, context: int = 0) -> Made | None:
        """Return a flow, or None if the library has no such flow."""
        raise NotImplementedError


class Ours(Library):
    module, package = "pyro_flows", "pyro-flows"

    def build(self, kind: str, dim: int, context: int = 0) -> Made | None:
        from pyro_flows import flows

        net = {"context_dim": context, "num_transforms": LAYERS, "hidden_dims": HIDDEN}
        names = {
            "affine coupling": "realnvp",
            "spline coupling": "nsf",
            "mixture coupling": "flowpp",
            "affine autoregressive": "maf",
            "spline autoregressive": "nsf_ar",
            "naf": "naf",
            "umnn": "umnn",
            "squares": "sospf",
            "bernstein": "bpf",
            "bnaf": "bnaf",
            "gaussianization": "gaussianization",
            "residual": "residual_flow",
            "sylvester": "sylvester_flow",
            "planar": "planar_flow",
            "radial": "radial_flow",
            "continuous": "cnf",
            "permuted": "nsf",
        }
        if kind in ("bnaf", "sylvester", "planar", "radial", "gaussianization"):
            net.pop("hidden_dims")
        if kind == "permuted":
            net["linear"] = True
        flow = getattr(flows, names[kind])(dim, **net)
        made = of_distribution(flow, flow)
        made.both = lambda n, context=None: flow.rsample_and_log_prob((n,), context)
        return made


class Pyro(Library):
    module, package = "pyro", "pyro-ppl"
    scores_fast = False

    def build(self, kind: str, dim: int, context: int = 0) -> Made | None:
        import pyro.distributions as dist
        import pyro.distributions.transforms as T

        hidden = {"hidden_dims": list(HIDDEN)}
        makers = {
            "affine coupling": ("affine_coupling", hidden),
            "permuted": ("affine_coupling", hidden),
            "spline coupling": ("spline_coupling", hidden),
            "affine autoregressive": ("affine_autoregressive", hidden),
            "spline autoregressive": ("spline_autoregressive", hidden),
            "naf": ("neural_autoregressive", hidden),
            "squares": ("polynomial", hidden),
            "bnaf": ("block_autoregressive", {}),
            **{name: (name, {}) for name in ("sylvester", "planar", "radial")},
        }
        if kind not in makers:
            return None
        name, settings = makers[kind]
        if context:
            layers = [getattr(T, f"conditional_{name}")(dim, context, **settings) for _ in range(LAYERS)]
        else:
            layers = [getattr(T, name)(dim, **settings) for _ in range(LAYERS)]
        parts = layers
        if kind == "permuted":
            parts = [layers[0], T.permute(dim), layers[1]]
        module = T.ComposeTransformModule(parts) if not context else nn.ModuleList(layers)
        base = dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)
        flow = (dist.ConditionalTransformedDistribution if context else dist.TransformedDistribution)(base, parts)

        def build(c: Tensor | None) -> Any:
            return flow if c is None else flow.condition(c)

        return of_distribution(module, build)


class Zuko(Library):
    module, package = "zuko", "zuko"

    def build(self, kind: str, dim: int, context: int = 0) -> Made | None:
        import zuko

        net = {"transforms": LAYERS, "hidden_features": HIDDEN}
        names = {
            "affine coupling": "RealNVP",
            "affine autoregressive": "MAF",
            "spline autoregressive": "NSF",
            "naf": "NAF",
            "umnn": "UNAF",
            "squares": "SOSPF",
            "bernstein": "BPF",
            "gaussianization": "GF",
            "continuous": "CNF",
            "permuted": "MAF",
        }
        if kind == "spline coupling":
            spline = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(8,), (8,), (7,)]}
            masks = [torch.arange(dim) % 2 == layer % 2 for layer in range(LAYERS)]
            parts = [
                zuko.flows.GeneralCouplingTransform(dim, context, mask=mask, hidden_features=HIDDEN, **spline)
                for mask in masks
            ]
            flow = zuko.flows.Flow(parts, zuko.flows.MAF(dim, transforms=1).base)
        elif kind in names:
            if kind == "continuous":
                net.pop("transforms")
            if kind == "permuted":
                net["randperm"] = True
            flow = getattr(zuko.flows, names[kind])(dim, context, **net)
        else:
            return None
        return of_distribution(flow, flow)


class Nflows(Library):
    module, package = "nflows", "nflows"

    def build(self, kind: str, dim: int, context: int = 0) -> Made | None:
        from nflows import distributions, flows, transforms
        from nflows.nn.nets import ResidualNet

        def net(n: int, m: int) -> nn.Module:
            return ResidualNet(n, m, HIDDEN[0], context_features=context or None, num_blocks=1)

        made = {"features": dim, "hidden_features": HIDDEN[0], "context_features": context or None, "num_blocks": 1}
        spline = {"num_bins": 8, "tails": "linear", "tail_bound": 3.0}
        parts = []
        for layer in range(LAYERS):
            mask = (torch.arange(dim) % 2 == layer % 2).int() * 2 - 1
            if kind == "affine coupling":
                parts.append(transforms.AffineCouplingTransform(mask, net))
            elif kind == "spline coupling":
                parts.append(transforms.PiecewiseRationalQuadraticCouplingTransform(mask, net, **spline))
            elif kind in ("affine autoregressive", "permuted"):
                parts.append(transforms.MaskedAffineAutoregressiveTransform(**made))
                if kind == "permuted":
                    parts.append(transforms.RandomPermutation(dim))
            elif kind == "spline autoregressive":
                parts.append(transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(**made, **spline))
            else:
                return None
        flow = flows.Flow(transforms.CompositeTransform(parts), distributions.StandardNormal([dim]))
        return Made(flow, flow.log_prob, flow.sample, flow.sample_and_log_prob)


class Normflows(Library):
    module, package = "normflows", "normflows"
    scores_fast = False

    def build(self, kind: str, dim: int, context: int = 0) -> Made | None:
        import normflows as nf

        wide = HIDDEN[0]
        more = {"num_context_channels": context or None}
        parts: list[nn.Module] = []
        for layer in range(LAYERS):
            if kind in ("affine coupling", "permuted"):
                if context:
                    return None
                half = dim // 2
                parts.append(nf.flows.AffineCouplingBlock(nf.nets.MLP([dim - half, *HIDDEN, 2 * half])))
                parts.append(nf.flows.Permute(dim, mode="shuffle" if kind == "permuted" else "swap"))
            elif kind == "spline coupling":
                odd = bool(layer % 2)
                parts.append(nf.flows.CoupledRationalQuadraticSpline(dim, 1, wide, reverse_mask=odd, **more))
            elif kind == "affine autoregressive":
                parts.append(nf.flows.MaskedAffineAutoregressive(dim, wide, context or None, num_blocks=1))
            elif kind == "spline autoregressive":
                parts.append(nf.flows.AutoregressiveRationalQuadraticSpline(dim, 1, wide, **more))
            elif kind == "residual":
                net = nf.nets.LipschitzMLP([dim, *HIDDEN, dim], init_zeros=False, lipschitz_const=0.9)
                parts.append(nf.flows.Residual(net))
            elif kind in ("planar", "radial"):
                parts.append((nf.flows.Planar if kind == "planar" else nf.flows.Radial)((dim,)))
            else:
                return None
        base = nf.distributions.DiagGaussian(dim, trainable=False)
        if context:

            class Base(nn.Module):  # conditional flows pass a context to their base, but normflows' bases accept none
                def __init__(self) -> None:
                    super().__init__()
                    self.base = base

                def forward(self, n: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
                    return base(n)

                def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
                    return base.log_prob(z)

            flow = nf.ConditionalNormalizingFlow(Base(), parts)
        else:
            flow = nf.NormalizingFlow(base, parts)
        if kind == "residual":
            flow.eval()
        extra = (lambda c: (c,)) if context else (lambda c: ())
        return Made(
            flow,
            lambda x, c=None: flow.log_prob(x, *extra(c)),
            lambda n, c=None: flow.sample(n, *extra(c))[0],
            lambda n, c=None: flow.sample(n, *extra(c)),
        )


class Flowjax(Library):
    module, package = "flowjax", "flowjax"
    functional = True

    def build(self, kind: str, dim: int, context: int = 0) -> Made | None:
        import flowjax.flows as fj
        import jax
        import jax.numpy as jnp
        from flowjax.bijections import RationalQuadraticSpline
        from flowjax.distributions import Normal

        key = jax.random.key(int(torch.randint(1 << 30, ())))
        net = {"nn_width": HIDDEN[0], "nn_depth": len(HIDDEN)}
        spline = {"transformer": RationalQuadraticSpline(knots=8, interval=3)}
        makers = {
            "affine coupling": (fj.coupling_flow, net),
            "permuted": (fj.coupling_flow, net),
            "spline coupling": (fj.coupling_flow, {**net, **spline}),
            "affine autoregressive": (fj.masked_autoregressive_flow, net),
            "spline autoregressive": (fj.masked_autoregressive_flow, {**net, **spline}),
            "bnaf": (fj.block_neural_autoregressive_flow, {}),
            "planar": (fj.planar_flow, {}),
        }
        if kind not in makers:
            return None
        maker, settings = makers[kind]
        flow = maker(key, base_dist=Normal(jnp.zeros(dim)), flow_layers=LAYERS, cond_dim=context or None, **settings)
        return MadeOfJax(flow)


@functools.cache
def _jitted() -> tuple[Callable[..., Any], ...]:
    import equinox as eqx

    return (
        eqx.filter_jit(lambda flow, x, context: flow.log_prob(x, context)),
        eqx.filter_jit(lambda flow, key, shape, context: flow.sample(key, shape, context)),
        eqx.filter_jit(lambda flow, key, shape, context: flow.sample_and_log_prob(key, shape, context)),
    )


class MadeOfJax(Made):
    """Flow of FlowJAX: a tree of arrays that never change in place."""

    def __init__(self, flow: Any) -> None:
        self.module = flow

    def _key(self) -> Any:
        import jax

        return jax.random.key(int(torch.randint(1 << 30, ())))

    @staticmethod
    def _in(x: Tensor | None) -> Any:
        import jax.numpy as jnp

        return None if x is None else jnp.asarray(x.numpy())

    @staticmethod
    def _out(x: Any) -> Tensor:
        import numpy as np

        return torch.as_tensor(np.array(x))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._out(_jitted()[0](self.module, self._in(x), self._in(context)))

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        return self._out(_jitted()[1](self.module, self._key(), (n,), self._in(context)))

    def both(self, n: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, found = _jitted()[2](self.module, self._key(), (n,), self._in(context))
        return self._out(x), self._out(found)

    hold = None

    def perturb(self, scale: float) -> None:
        import equinox as eqx
        import jax
        import paramax

        def free(leaf: Any) -> bool:
            return isinstance(leaf, paramax.NonTrainable)

        params, rest = eqx.partition(self.module, eqx.is_inexact_array, is_leaf=free)
        params = jax.tree.map(lambda p: p + scale * self._in(torch.randn(p.shape)), params)
        self.module = eqx.combine(params, rest)

    def clone(self, how: str) -> Any:
        return copy.deepcopy(self.module) if how == "copy" else pickle.loads(pickle.dumps(self.module))

    def restore(self, other: Made) -> None:
        import equinox as eqx

        file = io.BytesIO()
        eqx.tree_serialise_leaves(file, other.module)
        file.seek(0)
        self.module = eqx.tree_deserialise_leaves(file, self.module)

    def work(self, run: Callable[[], object]) -> int:
        """Return the multiplications in matrix products; products in a loop count once per iteration."""
        import jax

        def count(jaxpr: Any) -> int:
            total = 0
            for step in jaxpr.eqns:
                if step.primitive.name == "dot_general":
                    (contracted, _), _ = step.params["dimension_numbers"]
                    shape = step.invars[0].aval.shape
                    total += 2 * math.prod(shape[axis] for axis in contracted) * step.outvars[0].aval.size
                times = step.params["length"] if step.primitive.name == "scan" else 1
                inner = [v for v in step.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
                total += times * sum(count(getattr(v, "jaxpr", v)) for v in inner)
            return total

        return count(jax.make_jaxpr(run)().jaxpr)

    def work_of_draws(self) -> int:
        return self.work(lambda: self.module.sample(self._key(), (ROWS,)))

    def work_of_both(self) -> int:
        return self.work(lambda: self.module.sample_and_log_prob(self._key(), (ROWS,)))

    def work_of_scores(self, dim: int) -> int:
        x = self._in(torch.randn(ROWS, dim))
        return self.work(lambda: self.module.log_prob(x))

    def compiles(self) -> bool:
        x = torch.randn(7, self.module.shape[0])
        return torch.allclose(self._out(self.module.log_prob(self._in(x))), self.log_prob(x), atol=1e-4)


LIBRARIES: dict[str, Library] = {
    "pyro_flows": Ours(),
    "Pyro": Pyro(),
    "zuko": Zuko(),
    "nflows": Nflows(),
    "normflows": Normflows(),
    "FlowJAX": Flowjax(),
}
