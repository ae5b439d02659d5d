"""Maximum likelihood: train a flow as the density of a table or of images, p(x) or p(x | context).

The loss is -E log p(x | context), in nats of the given data.  The standardisation is part of the flow, and its Jacobian
part of the density.  Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray 2017,
arXiv:1705.07057).

A new flow starts with standardised data and contexts, a base with similar tails, and layers initialised from data.
Efficient BackProp (LeCun, Bottou, Orr, Müller 1998, section 4.3).  Outliers are left to the base, since the output of a
network is arbitrary far from its training data.  A standard normal base then costs z²/2 nats, a Student's t about
log z.  Marginal Tail-Adaptive Normalizing Flows (Laszkiewicz, Lederer, Fischer 2022, arXiv:2206.10311).
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..arguments import suggests_keywords
from ..data.batches import Batch, Rows, Source
from ..data.reading import CellNoise, Reader, Survey, check_rows, sources
from ..diagnostics import bits_per_dim, save_images
from ..diagnostics.flow_reports import warn_of_round_off
from ..distributions import CircularBase, StandardNormal, StudentTBase
from ..encoders import ClassEmbedding, Standardize
from ..encoders.base import at_rest, learning
from ..encoders.training_record import recorded
from ..flows import Dequantized, Flow
from ..flows.distribution import Columns
from ..guides.guide_flow import permutes
from ..training import Fit, Training, distributed
from ..training.checkpoint import Attempts, check_path, design, fingerprint
from ..transforms import FixedAffine, PerPixel
from .row_training import RowTraining, check_single

CALLER = "fit_density"
NUMBER = 64  # images in a picture


@distributed.collective(CALLER)
@suggests_keywords
@recorded()
def fit_density(
    flow: Flow | Dequantized,
    x: Any,
    context: Any = None,
    *,
    discrete: Sequence[int | str] | None = None,
    max_epochs: int = 100,
    batch_size: int | None = None,
    lr: float = 8e-3,
    training: Training | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Fit:
    """Train a flow as the density of a table, of images, or of the rows of a loader, by maximum likelihood.

    The loss is a mean over rows, ``-E log p(x | context)``, in nats of x as given, standardised or not.

    A new flow, with untrained layers, is standardised first.  A fixed affine map with the mean and standard
    deviation of the training rows (of each channel, for images) is appended.  So ``flow.log_prob(x)`` is the density of
    x as given.  Contexts pass through ``flow.encoder``; a flow without one gets a ``Standardize``.  Layers such as
    ``ActNorm`` start from the data.  If a table has outliers, a ``StudentTBase`` replaces a standard normal base.  A
    flow that was trained before resumes from its present state.

    Args:
        flow: A flow over vectors or images, or a :class:`~pyro_flows.flows.Dequantized` one, trained in its own dtype.
        x: A table ``(N, D)``, or ``(N,)`` for one feature, or images ``(N, C, H, W)``: a tensor, an array or a data
            frame.  Or a ``DataLoader``, or another collection of batches that can be iterated again and again, each
            ``x`` or ``(x, context)``.  A dequantised flow takes integers.
        context: For a conditional flow and x in memory, ``(N, context_dim)``, or the data of the flow's encoder.
        discrete: The columns of a table that hold integers, by index or name; or None.  Uniform noise from [0, 1) is
            added to them, fresh in each step and the same each time for the rows held out.  The density is then one of
            integer + noise: to score rows, spread them by :func:`~pyro_flows.dequantize`; ``log_prob`` of integers
            warns.  ``sample`` draws integers.  The losses bound the mean -log-mass of the integers from above.
        max_epochs: The largest number of passes through the rows; the step size falls to zero by then.
        batch_size: The number of rows in memory per step; by default 256, or 64 images, and fewer if there are few
            rows.  Several processes share them (*Several processes and GPUs* in the docs).
        lr: The largest step size.
        training: Further options, such as ``Training(patience=5)``: see :class:`~pyro_flows.training.Training`.
            Continuous flows also take the penalties of ``objectives.Likelihood``, or ``objectives.FlowMatching()``.
            Without rows for ``validation`` a tenth of x is held out; x must then be in memory, or a ``DataLoader`` of
            an indexable dataset without a custom sampler.  Gradients are clipped at the norm 5, or 50 for images.
        checkpoint: A file for the state of the run, from which the same call resumes, as for :func:`fit_svi`.  A run on
            a loader resumes to the same result if its batches depend on random numbers alone, not on persistent
            workers.  Another loader is recognised by its size only.
        progress: Whether to show a progress bar, in nats, or bits per dimension for images.

    Returns:
        The :class:`~pyro_flows.Fit`, with the flow as its ``guide``.  Losses, on batches and on held-out rows, are
        -log p(x | context) in nats, or values of the objective.  The flow is left in evaluation mode, at its best
        averaged state.

    Raises:
        TypeError: If ``flow`` is not a flow, x neither rows nor batches, or ``training`` of another class.
        ValueError: If an argument is out of its range; if data do not fit the flow, are too few, not finite or constant
            in a column; if a file cannot be written, a device is not available, or the checkpoint is of another run.
        FloatingPointError: If the loss or gradients stay non-finite; the error names the layer at fault.

    Warns:
        UserWarning: If columns hold integers or other values that repeat (see :func:`~pyro_flows.find_spikes`) or
            determine one another, so that densities grow without bound, or are too far from zero for the flow's dtype;
            if images hold integers and the flow is not dequantised, or has far more ``levels`` than they; if a
            checkpoint or a picture could not be written; if round-off changes the trained flow's log-densities
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
    run = RowTraining(CALLER, training, max_epochs, batch_size, lr, checkpoint, progress)
    training, loss, reader = run.training, run.objective, Reader(flow)
    grid, shape = check_path(CALLER, "samples", training.samples), tuple(reader.event_shape)
    if grid and grid.suffix != ".png":
        raise ValueError(f"{CALLER}: samples must name a .png file, got {str(grid)!r}.")
    if grid and not (len(shape) == 3 and reader.width in (1, 3)):
        raise ValueError(f"{CALLER}: samples are drawn of images of 1 or 3 channels, not {shape}.")
    if training.mixed_precision:
        check_single(CALLER, flow)  # before the flow is standardised
    train, judge = sources(reader, x, context, training, batch_size)
    seen, judged = (Survey(source, reader.width) for source in (train, judge))
    places = check_rows(reader, seen, judged, discrete)
    spread, pictures = CellNoise(places, reader.like.device), Attempts(CALLER, "samples", grid)
    data = [*_marks(train, seen), *_marks(judge, judged), f"discrete {places}"]
    some, is_image = _start(reader, seen, spread, run), len(shape) == 3
    try:
        fit = run.fit(
            flow,
            (train, judge),
            lambda batch: loss(flow, *spread(batch)),
            lambda: culprit(flow, reader.flow, *some),
            {"model": design(flow), "data": data},
            show=(lambda nats: f"{bits_per_dim(torch.tensor(-nats), shape):.4f} bits/dim") if is_image else None,
            clip_norm=50.0 if is_image else 5.0,
            end_epoch=lambda epoch: pictures.attempt(lambda path: _draw(reader, judged.sample[1], path, epoch)),
        )
    finally:
        pictures.conclude()
    if not is_image:
        reader.flow.columns = _columns(reader, places, seen, judged)
        warn_of_round_off(CALLER, reader.flow, *some)
    return fit


def _columns(reader: Reader, places: list[int], seen: Survey, judged: Survey) -> Columns | None:
    """Return what a flow keeps of a table's columns; the names are those of an earlier fit if there are no others."""
    before = reader.flow.columns
    names = tuple(reader.names) if reader.names else before.names if before else None
    low, high = torch.minimum(seen.low, judged.low).tolist(), torch.maximum(seen.high, judged.high).tolist()
    integers = tuple((place, low[place], high[place]) for place in places)
    return Columns(names, integers) if names or integers else None


def _start(reader: Reader, seen: Survey, spread: CellNoise, run: RowTraining) -> Batch:
    """Start a new flow from rows, and return some of them, with their contexts, in the flow's coordinates."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows, contexts = spread(seen.sample)
        moments = spread.moments(seen)
        if isinstance(reader.model, Dequantized):
            rows = reader.model.unbounded(rows)
            scale, loc = torch.std_mean(rows.transpose(0, 1).flatten(1), 1)
            moments = loc, scale
    heavy_tails = run.training.heavy_tails
    if heavy_tails is None:
        trains_base = getattr(run.objective, "trains_base", True)
        heavy_tails = seen.has_outliers and reader.is_table and trains_base
    start_flow(reader.flow, rows, contexts, moments if run.training.standardize else None, heavy_tails=heavy_tails)
    return rows, contexts


def _marks(source: Source, survey: Survey) -> list[str]:
    """Return words that identify rows: by their values in memory, by their number in a loader."""
    if isinstance(source, Rows):
        return fingerprint((source.x, source.context))
    return [f"{survey.rows} rows in {source.steps} batches"]


@torch.no_grad()
def _draw(reader: Reader, contexts: Tensor | None, path: Path, epoch: int) -> None:
    """Write a grid of samples: one column for each class, or one image for each context.

    Args:
        reader: The reader of the flow's rows.
        contexts: Contexts ``(N, ...)`` of data, or None.
        path: The file; ``{epoch}`` in its name is replaced.
        epoch: The number of the epoch.
    """
    flow, model, columns = reader.flow, reader.model, 8
    if isinstance(flow.encoder, ClassEmbedding):
        classes = columns = min(flow.encoder.num_classes, 16)
        contexts = torch.arange(classes).repeat(NUMBER // classes)
    if contexts is None:
        images = model().sample((NUMBER,))
    else:
        images = model(contexts[:NUMBER].to(next(flow.parameters()).device)).sample()
    name = path.name.replace("{epoch}", f"{epoch:04d}")
    save_images(images, path.with_name(name), columns=columns, levels=reader.levels)


INITIAL = 5000  # rows from which layers such as ActNorm start
FEW = 512  # images from which they start, since each is many rows
Moments = tuple[Tensor, Tensor]


@torch.no_grad()
def start_flow(flow: Flow, x: Tensor, context: Tensor | None, moments: Moments | None, *, heavy_tails: bool) -> None:
    """Prepare a new flow, which at most permutes or rotates; leave any other flow unchanged.

    To standardise, a fixed affine map is appended, or set if the last layer is one.  A flow that takes contexts without
    an encoder gets a ``Standardize``.  Layers that start from data are initialised, also those of an encoder.

    Args:
        flow: The flow.
        x: Some of the rows, on the flow's device, ``(N, *event_shape)``.
        context: Their contexts, ``(N, ...)``.
        moments: The mean and the standard deviation of each column, ``(D,)``, or of each channel; None to leave x and
            contexts unscaled.
        heavy_tails: True to replace a standard normal base by a Student's t.
    """
    if not permutes(flow.transforms, x.new_zeros(flow.event_shape)):
        return
    if heavy_tails and type(flow.base) is StandardNormal:
        flow.base = StudentTBase(flow.event_shape).to(x)
    if moments:
        loc, scale = moments
        if isinstance(flow.base, CircularBase):  # angles keep their scale
            angles = flow.base.circular.to(loc.device)
            loc, scale = loc.masked_fill(angles, 0.0), scale.masked_fill(angles, 1.0)
        last = flow.transforms[-1]
        fixed = last.inner if isinstance(last, PerPixel) else last  # acts on columns, or on the channels of each pixel
        if not isinstance(fixed, FixedAffine):
            columns, *size = flow.event_shape
            fixed = FixedAffine(columns, dense=False).to(x)
            cast(nn.ModuleList, flow.transforms).append(PerPixel(fixed, size) if size else fixed)
        fixed.set(loc, scale)
        if flow.context_dim and flow.encoder is None:
            flow.encoder = Standardize((flow.context_dim,)).to(x)
    with at_rest(flow):
        if flow.encoder is not None:
            parts = [part for part in flow.encoder.modules() if isinstance(part, Standardize) and part.is_fresh]
            if fresh := [part for part in parts if part.scale.requires_grad]:
                with learning(fresh):
                    flow.encoder(context)
        number = INITIAL if len(flow.event_shape) == 1 else FEW
        with contextlib.suppress(NotImplementedError):  # the inverse of such a layer cannot start from data
            flow.initialize(x[:number], None if context is None else context[:number])


@torch.no_grad()
def culprit(model: nn.Module, flow: Flow, x: Tensor, context: Tensor | None) -> str:
    """Return words for the first part of a flow, from the data to the base, that is not finite or makes a row so.

    Args:
        model: The trained module: the flow, or the module that holds it.
        flow: The flow over real numbers.
        x: Some of the rows, in the coordinates of the flow.
        context: Their contexts.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the flow's parameter {name} is not finite"
    density = flow(context)
    for place, view in reversed(list(enumerate(density.transforms))):
        x, log_det = view.transform.inverse_and_log_det(x, view.context)
        if not (x.isfinite().all() and log_det.isfinite().all()):
            return f"transforms[{place}] of the flow, {type(view.transform).__name__}, maps data to NaN or inf"
    if not density.base_dist.log_prob(x).isfinite().all():
        return f"the base {type(flow.base).__name__} has a log-density that is not finite"
    return f"all layers are finite on {len(x)} rows, so the gradient is at fault"
