"""Maximum likelihood: train a flow as the density of a table or of images, p(x) or p(x | context).

Minimises -E log p(x | context) in nats of the data as they are given: the map that standardises them is part of the
flow, its Jacobian part of the density.  Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou,
Murray 2017, arXiv:1705.07057).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_flags, check_integers, check_numbers
from ..data.batches import Batch, Rows, Source, sum_of
from ..data.sources import Reader, sources
from ..data.survey import CellNoise, Survey, check_images, check_rows, warn
from ..data.table import places_of
from ..diagnostics import bits_per_dim, save_images
from ..diagnostics.rounding import warn_of_round_off
from ..encoders import ClassEmbedding, Standardize
from ..flows import Dequantized, Flow
from ..objectives import Likelihood
from ..training import distributed
from ..training.loop import Fit, check_settings
from ..training.losses import checked, shown
from ..training.output_files import Attempts, check_path, why_not
from ..transforms import FixedAffine
from .initialization import culprit, start
from .precision import networks_in_bfloat16
from .program_checks import design, fingerprint
from .row_training import train_on_rows

CALLER = "fit_density"
NUMBER = 64  # images in a picture


@distributed.collective
def fit_density(
    flow: Flow | Dequantized,
    x: Any,
    context: Any = None,
    *,
    validation: Any = None,
    objective: nn.Module | None = None,
    max_epochs: int = 100,
    batch_size: int | None = None,
    lr: float = 8e-3,
    clip_norm: float | None = None,
    held_out: float = 0.1,
    patience: int = 20,
    standardize: bool = True,
    heavy_tails: bool | None = None,
    discrete: Sequence[int | str] | None = None,
    ema_decay: float = 0.99,
    device: str | torch.device | None = None,
    mixed_precision: bool = False,
    samples: str | os.PathLike[str] | None = None,
    on_nonfinite: str = "skip",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Fit:
    """Train a flow as the density of a table, of images, or of the rows of a loader, by maximum likelihood.

    The loss is a mean over rows, ``-E log p(x | context)``, in nats of x as it is given, standardised or not.

    A new flow, whose layers are as they were made, is standardised first: a fixed affine map is put at its end, from
    the mean and standard deviation of the training rows (of each channel, where these are images), so that
    ``flow.log_prob(x)`` is the density of x as given, and contexts pass through ``flow.encoder``, a ``Standardize``
    where there is none.  Layers such as ``ActNorm`` start from the data.  Where those of a table have outliers, a
    standard normal base gives way to a ``StudentTBase``.  A flow that was trained before goes on from where it is.

    Args:
        flow: A flow over vectors or images, or a :class:`~pyro_flows.flows.Dequantized` one, trained in its own dtype.
        x: A table ``(N, D)``, or ``(N,)`` for one feature, or images ``(N, C, H, W)``: a tensor, an array or a data
            frame; or a ``DataLoader``, or another collection of batches that can be gone through again and again, each
            ``x`` or ``(x, context)``.  Integers, where the flow is dequantised.
        context: For a conditional flow and x in memory, ``(N, context_dim)``, or what the flow's encoder takes.
        validation: Rows that judge the states: ``x``, a tuple ``(x, context)``, or a loader.  By default a
            share of the rows of x, the same each time, for which x must be in memory, or a ``DataLoader`` of a data set
            with places and without a sampler of its own.
        objective: The loss of a batch, ``objective(flow, x, context)``, by default ``objectives.Likelihood()``; for
            continuous flows with its penalties, or ``objectives.FlowMatching()``.
        max_epochs: How often to go through the rows; the step size falls to zero by then.
        batch_size: How many rows in memory to take in each step; by default 256, or 64 images, and fewer where there
            are few.  Several processes share them (*Several processes and GPUs* in the docs).
        lr: The largest step size.
        clip_norm: The largest norm of a gradient; by default 5, or 50 for images.
        held_out: The share of the rows that are not trained on and judge the states, without ``validation``.
        patience: After how many epochs without an improvement on these to stop.
        standardize: Whether to standardise x and the contexts of a new flow; angles of circular flows never are.
        heavy_tails: Whether to replace the base of a new flow, where it is the standard normal, by a Student's t with
            trainable tails, under which no row costs many nats; by default where numbers of a table lie more than 8
            standard deviations from the mean of their column, and the objective trains the base.
        discrete: The columns of a table that hold integers, by place or name; or None.  Fresh noise from [0, 1) is
            added to them in each step, and the same each time to the rows held out.  The density is then one of
            integer + noise: to score rows, spread them by :func:`~pyro_flows.dequantize`; the losses bound the mean
            -log-mass of the integers from above.
        ema_decay: What share of the average of the parameters, which is what is judged and kept, stays at each step.
        device: Where to train, such as ``"cuda"``; by default where the flow is.  It stays there.
        mixed_precision: Whether networks calculate in bfloat16, and the rest in the flow's dtype: faster on GPUs.
        samples: A PNG file for a grid of samples of images, written anew after each epoch; with ``{epoch}`` in its name
            all are kept.
        on_nonfinite: ``"skip"`` passes over steps whose loss or gradient is not finite, and ends with an error when
            there are 100 in a row; ``"raise"`` ends at the first.
        checkpoint: A file for the state of the run, from which the same call goes on, as for :func:`fit_svi`.  A run on
            a loader goes on to the same result too if what it yields depends on random numbers alone, not on workers
            that persist; another loader is told by its size only.
        progress: Whether to show a progress bar, in nats, or bits per dimension for images.

    Returns:
        The :class:`~pyro_flows.Fit`, with the flow as its ``guide``; losses, on batches and on held-out rows, are
        -log p(x | context), in nats, or what the objective says.  The flow is left, in evaluation mode, at its best
        averaged state.

    Raises:
        TypeError: If ``flow`` is no flow, x neither rows nor batches, or ``objective`` no module of rows.
        ValueError: If an argument is out of its range, data do not fit the flow, are too few, not finite or constant in
            a column, a file cannot be written or a device is not there, or the checkpoint is of another run.
        FloatingPointError: If the loss or gradients stay non-finite; the error names the layer at fault.

    Warns:
        UserWarning: If columns hold integers or other values that repeat (see :func:`~pyro_flows.find_spikes`) or
            determine one another, so that densities grow without bound, or are too far from zero for the flow's dtype;
            if images hold integers and the flow is not dequantised, or has far more ``levels`` than they; if a
            checkpoint or a picture could not be written; if round-off moves the trained flow's log-densities
            (:func:`~pyro_flows.round_off`).

    Example::

        >>> import torch
        >>> from pyro_flows import flows
        >>> x = 100 + torch.randn(1000, 2) @ torch.tensor([[10.0, 5.0], [0.0, 1.0]])
        >>> flow = flows.nsf(2, num_transforms=2, hidden_dims=(16,))
        >>> fit = fit_density(flow, x, max_epochs=3, progress=False)
        >>> len(fit.held_out), flow.log_prob(x).shape, flow().sample((5,)).shape
        (3, torch.Size([1000]), torch.Size([5, 2]))
    """
    check_integers(CALLER, max_epochs=max_epochs, patience=patience)
    check_integers(CALLER, optional=True, batch_size=batch_size)
    check_flags(CALLER, standardize=standardize, mixed_precision=mixed_precision, progress=progress)
    check_flags(CALLER, optional=True, heavy_tails=heavy_tails)
    check_numbers(CALLER, above=0, lr=lr)
    check_numbers(CALLER, least=0, below=1, ema_decay=ema_decay)
    check_numbers(CALLER, above=0, below=1, held_out=held_out)
    check_settings(CALLER, on_nonfinite=on_nonfinite, clip_norm=clip_norm)
    file, grid = check_path(CALLER, "checkpoint", checkpoint), check_path(CALLER, "samples", samples)
    if device is not None and isinstance(flow, nn.Module):
        try:
            flow.to(device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(
                f"{CALLER}: device={device!r} is not there ({str(error).splitlines()[0]:.200})."
            ) from error
    loss = checked(CALLER, objective, Likelihood)
    reader = Reader(CALLER, flow)
    pictures = len(reader.event_shape) == 3
    if grid and (grid.suffix != ".png" or grid.is_dir()):
        raise ValueError(f"{CALLER}: samples must name a .png file, got {str(grid)!r}.")
    if grid and not (pictures and reader.width in (1, 3)):
        raise ValueError(f"{CALLER}: samples are drawn of images of 1 or 3 channels, not {tuple(reader.event_shape)}.")
    if mixed_precision and reader.like.dtype != torch.float32:
        raise ValueError(f"{CALLER}: mixed_precision is for flows in float32, got one in {reader.like.dtype}.")
    train, judge = sources(reader, x, context, validation, batch_size, held_out)
    seen, judged = (Survey(source, reader.width) for source in (train, judge))
    if pictures or reader.levels:
        places: list[int] = []
        if discrete:
            raise ValueError(f"{CALLER}: discrete is for tables, got {list(discrete)}; use flows.Dequantized(flow).")
        check_images(CALLER, seen, judged, reader.levels)
    else:
        places = places_of(CALLER, "discrete", () if discrete is None else discrete, reader.names, reader.width)
        check_rows(CALLER, reader.names, seen, judged, places, apart=validation is not None, span=reader.span)
        real = [place for place in range(reader.width) if place not in places]
        warn(CALLER, reader.names, seen, real, reader.like.dtype, again=train.again)
    spread, grids = CellNoise(places, reader.like.device), Attempts(CALLER, "samples", grid or Path())

    def loss_of(batch: Batch) -> Tensor:
        return loss(flow, *spread(batch))

    def loss_held_out(epoch: int) -> float:
        total = sum_of(loss_of, judge)
        if grid and distributed.rank() == 0:
            grids.note(why_not(lambda: _draw(flow, judged.sample[1], grid, epoch)))
        return total / judged.rows

    def in_bits(nats: float) -> str:
        return f"{bits_per_dim(torch.tensor(-nats), flow.event_shape):.4f} bits/dim"

    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows, contexts = spread(seen.sample)
        moments = spread.moments(seen)
        if isinstance(flow, Dequantized):
            rows = flow.unbounded(rows)
            scale, loc = torch.std_mean(rows.transpose(0, 1).flatten(1), 1)
            moments = loc, scale
    plain_rows = not (pictures or reader.levels) and getattr(loss, "trains_base", True)
    heavy = (seen.has_outliers and plain_rows) if heavy_tails is None else heavy_tails
    start(reader.flow, rows, contexts, moments if standardize else None, heavy_tails=heavy)
    still = {p for part in flow.modules() if isinstance(part, FixedAffine | Standardize) for p in part.parameters()}
    moved: list[Tensor] = [p for p in flow.parameters() if p.requires_grad and p not in still]
    try:
        with networks_in_bfloat16(flow) if mixed_precision else contextlib.nullcontext():
            fit = train_on_rows(
                flow,
                moved,
                train,
                loss_of,
                loss_held_out,
                max_epochs=max_epochs,
                patience=patience,
                lr=lr,
                decay=ema_decay,
                clip_norm=clip_norm or (50.0 if pictures else 5.0),
                on_nonfinite=on_nonfinite,
                progress=progress,
                diagnose=lambda: culprit(flow, reader.flow, rows, contexts),
                checkpoint=file,
                settings={
                    "data": [*_marks(train, seen), *_marks(judge, judged)],
                    "batch_size": train.size if isinstance(train, Rows) else None,
                    "discrete": places,
                    "model": design(flow),
                    "objective": repr(loss),
                    "ema_decay": ema_decay,
                    "mixed_precision": mixed_precision,
                },
                show=in_bits if pictures else shown(loss),
                caller=CALLER,
            )
    finally:
        grids.conclude()
    warn_of_round_off(CALLER, reader.flow, rows, contexts)
    return fit


def _marks(source: Source, survey: Survey) -> list[str]:
    """What tells data from others: rows in memory by their contents, those of a loader by their number."""
    if isinstance(source, Rows):
        return fingerprint((source.x, source.context))
    return [f"{survey.rows} rows in {source.steps} batches"]


@torch.no_grad()
def _draw(model: Flow | Dequantized, contexts: Tensor | None, path: Path, epoch: int) -> None:
    """Write a grid of samples: of each class a column, or of contexts as they come.

    Args:
        model: The flow.
        contexts: Contexts ``(N, ...)`` of data, or None.
        path: The file; ``{epoch}`` in its name is replaced.
        epoch: The number of the epoch that ended.
    """
    flow, levels = (model.flow, model.levels) if isinstance(model, Dequantized) else (model, None)
    columns = 8
    if isinstance(flow.encoder, ClassEmbedding):
        classes = columns = min(flow.encoder.num_classes, 16)
        contexts = torch.arange(classes).repeat(NUMBER // classes)
    if contexts is None:
        images = model().sample((NUMBER,))
    else:
        images = model(contexts[:NUMBER].to(next(flow.parameters()).device)).sample()
    name = path.name.replace("{epoch}", f"{epoch:04d}")
    save_images(images, path.with_name(name), columns=columns, levels=levels)
