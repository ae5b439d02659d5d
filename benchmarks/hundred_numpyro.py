"""Models of ``hundred.py`` for NumPyro, from the files of Pyro models.

    python benchmarks/hundred_numpyro.py              # compare every log-density with Pyro's at random points
    python benchmarks/hundred_numpyro.py rats seeds   # compare some

The files of models are imported a second time.  Then ``torch``, ``pyro`` and ``pyro.distributions`` are modules of the
same functions over JAX and NumPyro.  So one source gives both models, and a NUTS of NumPyro samples the same posterior.
"""

import argparse
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import hundred_reference
import jax
import jax.numpy as jnp
import jax.scipy.special as jss
import numpy as np
import numpyro
import numpyro.distributions
import targets
from hundred_reference import FILES

JAX = {name: it for name, it in vars(jnp).items() if not name.startswith("_")}
POINTS, TOLERANCE = 6, 1e-6
WORDS = {"dim": "axis", "dims": "axis", "keepdim": "keepdims"}
Found = tuple[Callable[..., None], tuple[Any, ...]]


def worded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of JAX that takes torch's keywords."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{WORDS.get(key, key): value for key, value in kwargs.items()})

    return call


def sized(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a shape that also takes the sizes one by one."""
    return lambda *size, **kwargs: function(size if len(size) != 1 or isinstance(size[0], int) else size[0], **kwargs)


def solve_triangular(a: Any, b: Any, *, upper: bool) -> Any:
    """Solve a batch of triangular systems."""
    batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (jnp.broadcast_to(x, batch + x.shape[-2:]) for x in (a, b))
    return jax.lax.linalg.triangular_solve(a, b, left_side=True, lower=not upper)


def module(name: str, **members: Any) -> ModuleType:
    """Return a module with members."""
    made = ModuleType(name)
    vars(made).update(members)
    return made


def torch_of_jax() -> dict[str, ModuleType]:
    """Return the modules that stand for ``torch``."""
    alike = {name: worded(it) if inspect.isroutine(it) or hasattr(it, "lower") else it for name, it in JAX.items()}
    own = {
        "Tensor": jax.Array,
        "long": jnp.int64,
        "bool": jnp.bool_,
        "tensor": jnp.asarray,
        "as_tensor": jnp.asarray,
        "zeros": sized(jnp.zeros),
        "ones": sized(jnp.ones),
        "cat": worded(jnp.concatenate),
        "flip": worded(lambda x, axis: jnp.flip(x, axis if isinstance(axis, int) else tuple(axis))),
        "clamp": lambda x, min=None, max=None: jnp.clip(x, min, max),
        "transpose": jnp.swapaxes,
        "unsqueeze": worded(jnp.expand_dims),
        "softmax": worded(jax.nn.softmax),
        "log_softmax": worded(jax.nn.log_softmax),
        "logsumexp": worded(jss.logsumexp),
        "sigmoid": jax.nn.sigmoid,
        "lgamma": jss.gammaln,
        "digamma": jss.digamma,
        "erf": jss.erf,
        "erfc": jss.erfc,
    }
    functional = module(
        "torch.nn.functional",
        **{name: getattr(jax.nn, name) for name in ("softplus", "relu", "one_hot")},
        **{name: worded(getattr(jax.nn, name)) for name in ("softmax", "log_softmax")},
        logsigmoid=jax.nn.log_sigmoid,
    )
    nn = module("torch.nn", functional=functional)
    names = "cholesky", "solve", "inv", "slogdet", "det", "norm"
    linalg = module("torch.linalg", **{name: getattr(jnp.linalg, name) for name in names})
    vars(linalg).update(solve_triangular=solve_triangular, matrix_exp=jax.scipy.linalg.expm)
    special = module(
        "torch.special", expit=jax.nn.sigmoid, gammaln=jss.gammaln, ndtr=jss.ndtr, log_ndtr=jss.log_ndtr, erf=jss.erf
    )
    torch = module("torch", **(alike | own | {"nn": nn, "linalg": linalg, "special": special}))
    return {one.__name__: one for one in (torch, nn, functional, linalg, special)}


def pyro_of_numpyro() -> dict[str, ModuleType]:
    """Return the modules that stand for ``pyro``."""

    def lkj(dim: int, concentration: Any = 1.0) -> Any:
        return numpyro.distributions.LKJCholesky(dim, concentration)

    dist = module("pyro.distributions", **(vars(numpyro.distributions) | {"LKJCholesky": lkj}))
    names = "sample", "plate", "factor", "deterministic"
    pyro = module("pyro", **{name: getattr(numpyro, name) for name in names}, distributions=dist)
    vars(dist)["__name__"] = "pyro.distributions"
    return {"pyro": pyro, "pyro.distributions": dist, "pyro.distributions.constraints": dist.constraints}


@functools.cache
def entries() -> dict[str, Any]:
    """Import the files of models over JAX and NumPyro, and return their registry."""
    jax.config.update("jax_enable_x64", True)
    swapped = torch_of_jax() | pyro_of_numpyro()
    fresh = "hundred_registry", *FILES
    kept = {name: sys.modules.pop(name, None) for name in (*swapped, *fresh)}
    sys.modules.update(swapped)
    try:
        registry = importlib.import_module(fresh[0])
        for name in FILES:
            importlib.import_module(name)
    finally:
        for name, known in kept.items():
            sys.modules.pop(name, None)
            if known is not None:
                sys.modules[name] = known
    return dict(registry.ENTRIES)


def load(name: str) -> Found:
    """Return a NumPyro model by name, and its arguments, in double precision."""
    if name in targets.NAMES:
        import numpyro_models

        return numpyro_models.load(name), ()
    model, args = entries()[name].build()
    return model, tuple(jnp.asarray(value) if isinstance(value, np.ndarray) else value for value in args)


def differences(name: str) -> tuple[float, int]:
    """Return the largest difference of NumPyro's log-density and deterministic sites from Pyro's, and the points.

    Differences are relative, and compared at random points with a finite log-density.
    """
    import torch
    from numpyro.infer.util import log_density
    from pyro import poutine
    from pyro.infer.autoguide.initialization import InitMessenger
    from pyro.poutine.util import prune_subsample_sites

    def anywhere(site: dict[str, Any]) -> torch.Tensor:
        transform = torch.distributions.biject_to(site["fn"].support)
        return transform(torch.randn(transform.inverse_shape(site["fn"].shape())))

    (ours, ours_args), (theirs, theirs_args), worst, points = hundred_reference.load(name), load(name), 0.0, 0
    for _ in range(POINTS):
        trace = prune_subsample_sites(poutine.trace(InitMessenger(anywhere)(ours)).get_trace(*ours_args))
        values = {key: jnp.asarray(node["value"].numpy()) for key, node in trace.iter_stochastic_nodes()}
        density, other = log_density(theirs, theirs_args, {}, values)
        pairs: list[tuple[Any, Any]] = [(float(trace.log_prob_sum()), float(density))]
        if not np.isfinite(pairs[0]).any():
            continue
        fixed = {key: node for key, node in other.items() if node["type"] == "deterministic"}
        pairs += [(trace.nodes[key]["value"].numpy(), np.asarray(node["value"])) for key, node in fixed.items()]
        gaps = [np.max(np.abs(a - b) / np.maximum(1, np.abs(a))) for a, b in pairs]
        worst, points = max(worst, *(np.inf if np.isnan(gap) else float(gap) for gap in gaps)), points + 1
    return worst, points


def main() -> None:
    import pyro
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="posteriors; by default all")
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    pyro.enable_validation(False)
    names, wrong = parser.parse_args().names or [*hundred_reference.entries()], []
    for name in names:
        try:
            gap, points = differences(name)
            words = f"{gap:.1e} at {points} points"
        except Exception as error:
            gap, points, words = np.inf, 0, f"{type(error).__name__}: {error}".splitlines()[0][:160]
        if gap > TOLERANCE or points < POINTS // 2:
            wrong.append(name)
            print(f"{name:32} {words}", flush=True)
    print(f"{len(names) - len(wrong)} of {len(names)} log-densities are equal within {TOLERANCE:g}.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
