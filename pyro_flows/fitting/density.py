"""Maximum likelihood: train a flow as the density of a table, p(x) or p(x | context).

Minimises -E log p(x | context) in nats of the data as they are given: the map that standardises them is part of the
flow, its Jacobian part of the density.  Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou,
Murray 2017, arXiv:1705.07057).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diagnostics.draws import check_integers
from ..encoders import Standardize
from ..flows import Flow
from ..tables.table import places_of
from ..transforms import FixedAffine
from .batches import Batch, Rows, Source
from .inspect import fingerprint
from .loop import Fit, check_settings, descend
from .sources import Reader, sources
from .start import culprit, start
from .state import HeldOut
from .survey import Survey, check_room, check_rows, warn

CALLER = "fit_density"


def fit_density(
    flow: Flow,
    x: Any,
    context: Any = None,
    *,
    validation: Any = None,
    max_epochs: int = 100,
    batch_size: int | None = None,
    lr: float = 8e-3,
    clip_norm: float = 5.0,
    held_out: float = 0.1,
    patience: int = 20,
    standardize: bool = True,
    heavy_tails: bool | None = None,
    discrete: Sequence[int | str] = (),
    on_nonfinite: str = "skip",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Fit:
    """Train a flow as the exact density of a table, or of the rows of a loader.

    A new flow, one that does no more than permute, is standardised first: a fixed affine map is put at its end, from
    the mean and standard deviation of the training rows, so that ``flow.log_prob(x)`` is the density of x as given, and
    contexts pass through ``flow.encoder``, a ``Standardize`` where there is none.  Layers such as ``ActNorm`` start
    from the data.  Where these have outliers, a standard normal base gives way to a ``StudentTBase``.  A flow that was
    trained before goes on from where it is.

    Args:
        flow: A flow over vectors, trained in its own dtype and on its own device.
        x: A table ``(N, D)``, or ``(N,)`` for one feature: a tensor, an array or a data frame; or a ``DataLoader``, or
            another collection of batches that can be gone through again and again, each ``x`` or ``(x, context)``.
        context: For a conditional flow and a table x, a table ``(N, context_dim)``, or what the flow's encoder takes.
        validation: Rows that judge the states: a table ``x``, a tuple ``(x, context)``, or a loader.  By default a
            share of the rows of x, the same each time, for which x must be a table, or a ``DataLoader`` of a data set
            with places and without a sampler of its own.
        max_epochs: How often to go through the rows; the step size falls to zero by then.
        batch_size: How many rows of a table to take in each step; by default 256, and fewer where there are few.
        lr: The largest step size.
        clip_norm: The largest norm of a gradient.
        held_out: The share of the rows that are not trained on and judge the states, without ``validation``.
        patience: After how many epochs without an improvement on these to stop.
        standardize: Whether to standardise x and the contexts of a new flow; angles of circular flows never are.
        heavy_tails: Whether to replace the base of a new flow, where it is the standard normal, by a Student's t with
            trainable tails, under which no row costs many nats; by default where numbers lie more than 8 standard
            deviations from the mean of their column.
        discrete: The columns that hold integers, by place or name.  Fresh noise from [0, 1) is added to them in each
            step, and the same each time to the rows held out.  The density is then one of integer + noise: to score
            rows, spread them by :func:`~pyro_flows.dequantize`; the losses bound the mean -log-mass of the integers
            from above.
        on_nonfinite: As for :func:`fit_svi`.
        checkpoint: A file for the state of the run, as for :func:`fit_svi`.  A run on a loader goes on to the same
            result too if what it yields depends on random numbers alone, not on workers that persist; another loader is
            told by its size only.
        progress: Whether to show a progress bar.

    Returns:
        The record of the fit, with the flow as its ``guide``; losses, on batches and on held-out rows, are
        -log p(x | context), in nats.  The flow is left, in evaluation mode, at its best averaged state.

    Raises:
        TypeError: If ``flow`` is no flow, or x neither a table nor batches.
        ValueError: If an argument is out of its range, data do not fit the flow, are not finite or constant in a
            column, or the checkpoint is of another run.
        FloatingPointError: If the loss or gradients stay non-finite; the error names the layer at fault.

    Warns:
        UserWarning: If columns hold integers or other values that repeat (see :func:`~pyro_flows.find_spikes`) or
            determine one another, so that densities grow without bound, or are too far from zero for the flow's dtype.

    Example::

        >>> import torch
        >>> from pyro_flows import flows
        >>> x = 100 + torch.randn(1000, 2) @ torch.tensor([[10.0, 5.0], [0.0, 1.0]])
        >>> flow = flows.nsf(2, num_transforms=2, hidden_dims=(16,))
        >>> fit = fit_density(flow, x, max_epochs=3, progress=False)
        >>> len(fit.held_out), flow.log_prob(x).shape, flow().sample((5,)).shape
        (3, torch.Size([1000]), torch.Size([5, 2]))
    """
    check_integers(
        CALLER,
        max_epochs=(max_epochs, 1),
        batch_size=(1 if batch_size is None else batch_size, 1),
        patience=(patience, 1),
    )
    check_settings(CALLER, lr=lr, clip_norm=clip_norm, on_nonfinite=on_nonfinite)
    file = None if checkpoint is None else Path(checkpoint)
    if file and not file.parent.is_dir():
        raise ValueError(f"{CALLER}: checkpoint={str(file)!r} lies in a folder that does not exist.")
    reader = Reader(CALLER, flow)
    train, judge = sources(reader, x, context, validation, batch_size, held_out)
    seen, judged = (Survey(source, reader.width) for source in (train, judge))
    places = places_of(CALLER, "discrete", discrete, reader.names, reader.width)
    check_rows(CALLER, reader.names, seen, judged, places, apart=validation is not None)
    check_room(CALLER, reader.names, seen, places, reader.like.dtype)
    plain = [place for place in range(reader.width) if place not in places]
    warn(CALLER, reader.names, seen, plain, reader.like.dtype, again=train.again)
    spread = Spread(places, reader.like.device)

    def loss_of(batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        return -flow.log_prob(*spread(batch, generator)).mean()

    @torch.no_grad()
    def loss_held_out() -> float:
        generator = torch.Generator().manual_seed(0)
        flow.eval()
        total = sum(float(loss_of(batch, generator)) * len(batch[0]) for batch in judge)
        flow.train()
        return total / judged.rows

    sample = spread(seen.sample, torch.Generator().manual_seed(0))
    heavy = seen.has_outliers if heavy_tails is None else heavy_tails
    start(flow, *spread.moments(seen), *sample, standardize=standardize, heavy_tails=heavy)
    parameters: list[Tensor] = [parameter for parameter in flow.parameters() if parameter.requires_grad]
    still = {id(p) for part in flow.modules() if isinstance(part, FixedAffine | Standardize) for p in part.parameters()}
    moved = [parameter for parameter in parameters if id(parameter) not in still]
    flow.train()
    try:
        return descend(
            lambda: loss_of(train.next()),
            parameters,
            [torch.optim.Adam(moved, lr=lr, foreach=True)],
            trained=flow,
            steps=max_epochs * train.steps,
            lr=lr,
            clip_norm=clip_norm,
            on_nonfinite=on_nonfinite,
            progress=progress,
            diagnose=lambda: culprit(flow, *sample),
            checkpoint=file,
            settings={
                "data": [mark for pair in ((train, seen), (judge, judged)) for mark in _marks(*pair)],
                "batch_size": train.epochs.size if isinstance(train, Rows) else None,
                "discrete": places,
            },
            companion=train,
            held_out=HeldOut(loss_held_out, train.steps, patience),
            caller=CALLER,
        )
    finally:
        flow.eval()


class Spread:
    """Puts batches on a flow's device and spreads the integers in discrete columns over their cells."""

    def __init__(self, places: list[int], device: torch.device) -> None:
        self.places, self.device = torch.tensor(places, dtype=torch.long), device

    def __call__(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        x, context = (None if part is None else part.to(self.device) for part in batch)
        assert x is not None
        if len(self.places):
            noise = torch.rand(len(x), len(self.places), generator=generator, dtype=x.dtype)
            x = x.index_add(1, self.places.to(x.device), noise.to(x.device))
        return x, context

    def moments(self, survey: Survey) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each column with its noise, ``(D,)``."""
        discrete = torch.zeros_like(survey.loc).index_fill(0, self.places, 1.0)
        return survey.loc + discrete / 2, (survey.scale.square() + discrete / 12).sqrt()


def _marks(source: Source, survey: Survey) -> list[str]:
    """What tells data from others: rows in memory by their contents, those of a loader by their number."""
    if isinstance(source, Rows):
        return fingerprint((source.x, source.context))
    return [f"{survey.rows} rows in {source.steps} batches"]
