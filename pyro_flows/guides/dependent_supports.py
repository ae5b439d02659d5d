"""Supports that depend on other latents, as that of Uniform(0, theta): constrained one by one while the model runs.

Each latent's support is known once those before it have values, so the map from the unconstrained space is triangular:
its log-determinant is the sum of those of the sites.  The Stan Math Library (Carpenter et al. 2015, arXiv:1509.07164)
constrains parameters in the order of their declarations likewise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.utils import _sum_rightmost

from ..programs.engines import Site, Values, View, value_of
from ..programs.nesting import nesting_of
from ..programs.program import Program
from .guide_call import Call


class Moving:
    """The map from unconstrained latents to a model's, for some arguments.

    Args:
        call: The call of a guide.
        engine: The way to run many draws, ``"vmap"`` or ``"loop"``; by default the former if it does to two draws what
            single runs do.
    """

    def __init__(self, call: Call, engine: str | None = None) -> None:
        model = call.model
        while isinstance(model, functools.partial) and isinstance(model.args[0], InitMessenger):
            model = model.args[1]  # latents have values, so that none needs a start
        self._program = Program(model, call.args, call.kwargs, call.prototype, nesting_of(call.prototype))
        self._names = [*call.latents]
        self.engine = self._program.engine = engine or self._fastest(call)

    def unpack(self, free: Values, size: int) -> tuple[Values, Values]:
        """Constrain N draws: the sites' values, ``(N, *site_shape)``, and the log-determinants, ``(N, *batch_shape)``.

        Args:
            free: The unconstrained values of all latents, ``(N, *shape)``.
            size: The number N of draws.
        """
        found = self._program.run(self._read(value_of), free, size, place=_constrained)
        return {n: found[n] for n in self._names}, {n: found[f"log det {n}"] for n in self._names}

    def packed(self, values: Values) -> tuple[Tensor, Tensor]:
        """The way back: packed vectors ``(*batch, D)``, and the log-determinant of it, ``batch`` in nats.

        It is -inf outside of the support, where the vectors mean nothing.

        Args:
            values: The values of all latents, ``(*batch, *site_shape)``.
        """
        shapes = {name: self._program.single.nodes[name]["value"].shape for name in self._names}
        first = values[self._names[0]]
        batch = first.shape[: first.dim() - len(shapes[self._names[0]])]
        held = {name: values[name].reshape(-1, *shape) for name, shape in shapes.items()}
        found = self._program.run(self._read(_free), held, batch.numel())
        total = sum(found[f"log det {name}"].reshape(batch.numel(), -1).sum(-1) for name in self._names)
        log_det = torch.as_tensor(total).neg()
        vectors = torch.cat([found[name].reshape(*batch, -1) for name in self._names], -1)
        return vectors.nan_to_num(0.0, 0.0, 0.0), log_det.where(log_det.isfinite(), -torch.inf).reshape(batch)

    def _read(self, value: Callable[[Site], Tensor]) -> Callable[[View], Values]:
        def read(view: View) -> Values:
            values = {name: view.read(name, value) for name in self._names}
            return {**values, **{f"log det {name}": view.read(name, _log_det) for name in self._names}}

        return read

    @torch.no_grad()
    def _fastest(self, call: Call) -> str:
        transforms = call.transforms
        start = {name: transforms[name].inv(value) for name, value in call.start.items()}
        free = {name: torch.stack((value, value + 0.5)) for name, value in start.items()}
        alone = self._program.run(self._read(value_of), free, 2, place=_constrained)
        self._program.engine = "vmap"  # a guide may run in a plate of draws itself, and two of these would collide
        try:
            found = self._program.run(self._read(value_of), free, 2, place=_constrained)
        except Exception:  # a user's program may raise anything
            return "loop"
        agree = all(torch.allclose(found[name], alone[name], rtol=1e-4, atol=1e-5) for name in alone)
        return "vmap" if agree else "loop"


def _free(site: Site) -> Tensor:
    return biject_to(site["fn"].support).inv(site["value"])


def _log_det(site: Site) -> Tensor:
    """The log-determinant of constraining a site, of its batch shape; NaN outside of the support."""
    support, value = site["fn"].support, site["value"]
    transform = biject_to(support)
    found = transform.log_abs_det_jacobian(transform.inv(value), value)
    batch = value.dim() - site["fn"].event_dim
    inside = support.check(value)
    inside = inside.reshape(*inside.shape[:batch], -1).all(-1)
    return _sum_rightmost(found, found.dim() - batch).where(inside, torch.nan)


class _Constrained(Messenger):
    """Puts unconstrained values into the sites of a model, constrained to the supports that are met."""

    def __init__(self, free: Values) -> None:
        super().__init__()
        self._free = free

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._free and not msg["is_observed"]:
            msg["value"] = biject_to(msg["fn"].support)(self._free[msg["name"]])


def _constrained(model: Callable[..., Any], data: Values) -> Callable[..., Any]:
    # Outside of the model's own handlers, which may change its distributions.
    return _Constrained(data)(model)
