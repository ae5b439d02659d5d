"""Training on simulations: standardise latents and data, hold some out, and minimise the loss of the latents given the
data, by default their density's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Epochs, suited_size
from ..guides import AutoFlow
from ..guides.call import Call
from ..guides.encoding import initialize
from ..guides.packing import check_same
from ..programs.simulations import Simulations, check_draws
from ..programs.simulator import Simulator
from ..training import processes
from ..training.loop import Fit, descend
from ..training.losses import shown
from ..training.state import HeldOut
from .inspect import fingerprint


def train(
    simulator: Simulator,
    guide: AutoFlow,
    simulations: Simulations,
    objective: nn.Module,
    *,
    max_epochs: int | None,
    batch_size: int | None,
    share: float,
    patience: int,
    **settings: Any,
) -> Fit:
    """Train on simulations, a share of which is held out."""
    # Those of others may come in an order; the same one each time, so that a run goes on with the same held out.
    order = torch.randperm(len(simulations), generator=torch.Generator().manual_seed(0))
    simulations = simulations.take(order)
    z, log_det = _standardise(simulator, guide, simulations)
    number = max(1, len(z) - math.ceil(share * len(z)))
    in_nats = getattr(objective, "in_nats", False)
    rows = Epochs(number, suited_size(number, batch_size))
    max_epochs = max_epochs or max(10, round(200 * min(1.0, math.sqrt(10_000 / len(z)))))

    def loss_of(index: Tensor | slice) -> Tensor:
        args, kwargs = simulator.arguments(simulations.take(index).data)
        context = guide.context(*args, **kwargs)
        if context is None or context.shape[:-1] != z[index].shape[:-1]:
            shape = None if context is None else tuple(context.shape)
            raise ValueError(
                f"{simulator.caller}: for {len(z[index])} data sets side by side the encoder must return as many "
                f"vectors ({len(z[index])}, context_dim), got shape {shape}."
            )
        loss = objective(guide.flow, z[index], context)
        return loss - log_det[index].mean() if in_nats else loss

    @torch.no_grad()
    def loss_held_out(_: int) -> float:
        guide.eval()
        parts = torch.arange(number, len(z)).split(10_000)
        own = [part[where] for part in parts for where, share in [processes.share(len(part))] if share]
        with torch.random.fork_rng():
            torch.manual_seed(processes.rank())
            sums = processes.each(lambda: sum(float(loss_of(part)) * len(part) for part in own))
        guide.train()
        return sum(sums) / (len(z) - number)

    parameters = [parameter for parameter in guide.parameters() if parameter.requires_grad]
    guide.train()
    try:
        return descend(
            lambda: loss_of(rows.next()),
            parameters,
            [torch.optim.Adam(parameters, lr=settings["lr"], foreach=True)],
            trained=guide,
            steps=max_epochs * rows.steps,
            share=lambda: rows.share,
            diagnose=lambda: "the guide's density of simulated latents",
            settings={
                "data": fingerprint((z, *simulations.data.values())),
                "batch_size": rows.size,
                "objective": repr(objective),
            },
            companion=rows,
            held_out=HeldOut(loss_held_out, rows.steps, patience),
            show=shown(objective),
            caller=simulator.caller,
            **settings,
        )
    finally:
        guide.eval()


def _standardise(simulator: Simulator, guide: AutoFlow, simulations: Simulations) -> tuple[Tensor, Tensor]:
    """Set the guide up and standardise; the packed latents ``(N, latent_dim)`` and log|det| of the packing."""
    caller = simulator.caller
    for name, value in simulations.data.items():
        check_draws(caller, "data argument", name, value)
    args, kwargs = simulator.arguments(simulations.row(0))
    guide.setup(*args, **kwargs)
    for name, _ in guide.prototype_trace.iter_stochastic_nodes():
        if name not in simulations.latents:
            raise ValueError(f"{caller}: latent site {name!r} of the guide is not drawn by the model without data.")
        check_draws(caller, "latent site", name, simulations.latents[name])
    args, kwargs = simulator.arguments(simulations.row(1))
    check_same(Call(caller, simulator.model.call, args, kwargs, guide.prototype_trace))
    with torch.no_grad():
        z, log_det = guide.pack(simulations.latents)
        for name, column in zip(guide.coordinates, z.T, strict=True):
            if bad := int((~column.isfinite()).sum()):
                raise ValueError(
                    f"{caller}: latent site {name!r} has {bad} of {len(z)} draws at an end of its support."
                )
            if (column == column[0]).all():
                raise ValueError(f"{caller}: latent site {name!r} has a number that is constant in all {len(z)} draws.")
        if guide.is_fresh:
            if not guide.has_circles:
                guide.start_at(z.median(0).values, torch.diag(_spread(z)))
            args, kwargs = simulator.arguments(simulations.data)
            initialize(Call(caller, simulator.model.call, args, kwargs), guide.encoder)
    return z, log_det


def _spread(z: Tensor) -> Tensor:
    """The standard deviation of each column, from its quartiles, which heavy tails leave alone, where they differ."""
    quarter = max(1, len(z) // 4)
    width = z.kthvalue(len(z) - quarter, 0).values - z.kthvalue(quarter, 0).values
    return torch.where(width > 0, width / 1.349, z.std(0))
