"""Supports that depend on other latents, such as that of Uniform(0, theta), are known once these have values.

Latents are constrained one by one in a run of the model.  That map is triangular, and its log-determinant is the sum
over the sites.  The Stan Math Library (Carpenter et al. 2015, arXiv:1509.07164) constrains parameters in the order of
their declarations likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.utils import _sum_rightmost

from ..programs.engines import Run, Site, Values, View, value_of
from ..programs.plate_nesting import nesting_of
from ..programs.runner import Runner
from .guide_call import Call
from .packing import Packing, Unpacked, alike, stretched


class Moving:
    """The map between packed latents and a model's latents, for some arguments.

    Args:
        call: The call of a guide.
        packing: The layout of the latents.
        engine: The way to run many draws, ``"vmap"`` or ``"loop"``; by default ``"vmap"`` if it gives two draws the
            same values as single runs do.
    """

    def __init__(self, call: Call, packing: Packing, engine: str | None = None) -> None:
        _, model = call.model.args  # without the handler that initialises latents, since all are given values
        alone = Runner(model, call.args, call.kwargs, call.prototype, nesting_of(call.prototype))
        self._packing = packing
        self.engine = engine or self._fastest(alone)
        self._program = alone.by(self.engine)

    def unpack(self, latent: Tensor) -> Unpacked:
        """Yield the sites in vectors ``(*sample, *1s, D)`` inside of plates, as :meth:`Packing.unpack` does."""
        found = self._constrained(self._program.run, latent.reshape(-1, self._packing.size))
        for name, part in self._packing.parts.items():
            sample = latent.shape[: max(0, latent.dim() - 1 - len(part.batch))]
            value, log_det = (found[key].reshape((*sample, *found[key].shape[1:])) for key in (name, f"log det {name}"))
            yield name, part, value, part.counted(log_det)

    def values(self, latent: Tensor) -> Values:
        """Map vectors ``(N, D)`` to values of the sites, ``(N, *site_shape)``."""
        found = self._constrained(self._program.run, latent)
        return {name: found[name] for name in self._packing.parts}

    def pack(self, values: Values) -> tuple[Tensor, Tensor]:
        """Pack values ``(*batch, *site_shape)`` into ``(*batch, D)``, and return log|det| of that map too, in nats.

        The log-determinant is -inf outside of the support, and the vectors are arbitrary there.
        """
        name, part = next(iter(self._packing.parts.items()))
        batch = values[name].shape[: values[name].dim() - part.start.dim()]
        held = {name: values[name].reshape(-1, *part.start.shape) for name, part in self._packing.parts.items()}
        found = self._program.run(self._read(_free), held, batch.numel())
        parts = self._packing.parts
        changes = (parts[name].counted(found[f"log det {name}"]).reshape(batch.numel(), -1).sum(-1) for name in held)
        log_det = torch.as_tensor(sum(changes)).neg()
        vectors = torch.cat([parts[name].gather(found[name]) for name in held], -1).reshape(*batch, -1)
        return vectors.nan_to_num(0.0, 0.0, 0.0), log_det.where(log_det.isfinite(), -torch.inf).reshape(batch)

    def _constrained(self, run: Run, latent: Tensor) -> Values:
        # The handler lies outside of the model's own, which may change its distributions.
        free, read = self._packing.free(latent), self._read(value_of)
        return run(read, free, len(latent), place=lambda model, data: _Constrained(data)(model))

    def _read(self, value: Callable[[Site], Tensor]) -> Callable[[View], Values]:
        def read(view: View) -> Values:
            values = {name: view.read(name, value) for name in self._packing.parts}
            return {**values, **{f"log det {name}": view.read(name, _log_det) for name in self._packing.parts}}

        return read

    @torch.no_grad()
    def _fastest(self, program: Runner) -> str:
        start = self._packing.start
        two = torch.stack((start, start + 0.5))
        alone = self._constrained(program.run, two)
        try:  # not a plate, since a guide may itself run in the plate of draws
            found = self._constrained(program.by("vmap").attempt, two)
        except Exception:  # a user's program may raise anything
            return "loop"
        agree = all(torch.allclose(found[name], alone[name], rtol=1e-4, atol=1e-5) for name in alone)
        return "vmap" if agree else "loop"


def moving_supports(call: Call, scale: float) -> list[str]:
    """Return the latents whose supports change if all latents move by ``scale`` in the unconstrained space."""
    packing = Packing(call.owner, call.latents.values())
    sites, free = call.trace_at(packing.values(packing.start + scale)).nodes, packing.free(packing.start)
    here = packing.values(packing.start)
    return [n for n in free if n in sites and not alike(biject_to(sites[n]["fn"].support)(free[n]), here[n])]


def check_supports(call: Call, moving: list[str]) -> None:
    """Refuse latents whose supports depend on another latent."""
    if moving:
        name, support = moving[0], call.latents[moving[0]]["fn"].support
        fault = f"the support of latent site {name!r}, {support}, depends on another latent"
        raise ValueError(f"{call.owner}: {fault}. {stretched(name)}")


def _free(site: Site) -> Tensor:
    return biject_to(site["fn"].support).inv(site["value"])


def _log_det(site: Site) -> Tensor:
    """Return the log-determinant of constraining a site, of its batch shape; NaN outside of the support."""
    support, value = site["fn"].support, site["value"]
    transform = biject_to(support)
    found = transform.log_abs_det_jacobian(transform.inv(value), value)
    batch = value.dim() - site["fn"].event_dim
    inside = support.check(value)
    inside = inside.reshape(*inside.shape[:batch], -1).all(-1)
    return _sum_rightmost(found, found.dim() - batch).where(inside, torch.nan)


class _Constrained(Messenger):
    """Handler that gives sites unconstrained values, constrained to the supports in the run."""

    def __init__(self, free: Values) -> None:
        super().__init__()
        self._free = free

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._free and not msg["is_observed"]:
            msg["value"] = biject_to(msg["fn"].support)(self._free[msg["name"]])
