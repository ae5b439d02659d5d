"""Options of fits that few users change, in two groups: the gradients of any fit, and the training on rows."""

import os
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from ..arguments import check_choice, check_flags, check_integers, check_kind, check_numbers


@dataclass(frozen=True)
class Gradients:
    """Treatment of the gradients of each step.

    Args:
        clip_norm: The largest norm of a gradient; None for the norm that suits the fit.
        on_nonfinite: ``"skip"`` skips steps whose loss or gradient is not finite, counts them, and raises an error
            after 100 consecutive ones; ``"raise"`` raises it at the first.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> Gradients(clip_norm=1.0)
        Gradients(clip_norm=1.0, on_nonfinite='skip')
    """

    clip_norm: float | None = None
    on_nonfinite: str = "skip"

    def __post_init__(self) -> None:
        check_numbers("Gradients", above=0, optional=True, clip_norm=self.clip_norm)
        check_choice("Gradients", ("skip", "raise"), on_nonfinite=self.on_nonfinite)


@dataclass(frozen=True)
class Training:
    """Options for training on rows, in ``fit_density``, ``fit_likelihood`` and ``fit_amortized``.

    Args:
        objective: The loss of a batch, ``objective(flow, x, context)``; by default ``objectives.Likelihood()``.
        validation: Rows that judge the states, ``x``, a tuple ``(x, context)`` or a loader; or the share of the given
            rows that is held out to judge them, the same rows each time.  Rows are for ``fit_density``.
        patience: The number of epochs without an improvement on these after which to stop.
        ema_decay: The decay per step of the moving average of the parameters; the average is judged and kept.
        gradients: The treatment of gradients.
        mixed_precision: Whether networks compute in bfloat16, and the rest in the flow's dtype: faster on GPUs.
        standardize: Whether ``fit_density`` standardises x and the contexts of a new flow; angles of circular flows
            never are.
        heavy_tails: Whether ``fit_density`` replaces the standard normal base of a new flow by a Student's t with
            trainable tails, under which no row costs many nats.  By default this is done if values of a table lie more
            than 8 standard deviations from the mean of their column, and the objective trains the base.
        samples: A PNG file for a grid of samples of images, which ``fit_density`` writes anew after each epoch.  With
            ``{epoch}`` in its name all are kept.

    Raises:
        TypeError: If the objective is not a module.
        ValueError: If an argument is out of its range.

    Example::

        >>> from pyro_flows import fit_density, flows
        >>> import torch
        >>> training = Training(patience=5, gradients=Gradients(clip_norm=1.0))
        >>> fit = fit_density(flows.nsf(2), torch.randn(100, 2), max_epochs=1, training=training, progress=False)
    """

    objective: nn.Module | None = None
    validation: Any = 0.1
    patience: int = 20
    ema_decay: float = 0.99
    gradients: Gradients = field(default_factory=Gradients)
    mixed_precision: bool = False
    standardize: bool = True
    heavy_tails: bool | None = None
    samples: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        words = "a module objective(flow, x, context) -> loss such as objectives.Likelihood(), not an ELBO"
        if self.objective is not None:
            check_kind("Training", nn.Module, words, objective=self.objective)
        check_kind("Training", Gradients, "Gradients(...)", gradients=self.gradients)
        check_integers("Training", patience=self.patience)
        check_numbers("Training", least=0, below=1, ema_decay=self.ema_decay)
        if self.share is not None:
            check_numbers("Training", above=0, below=1, validation=self.validation)
        check_flags("Training", mixed_precision=self.mixed_precision, standardize=self.standardize)
        check_flags("Training", optional=True, heavy_tails=self.heavy_tails)

    @property
    def share(self) -> float | None:
        """The share of the rows that is held out; None if other rows judge the states."""
        return self.validation if isinstance(self.validation, int | float) else None

    def check_for(self, caller: str) -> None:
        """Raise ValueError for options that only ``fit_density`` takes."""
        for option in fields(self):
            value = getattr(self, option.name)
            only = option.name in ("standardize", "heavy_tails", "samples") and value != option.default
            if only or (option.name == "validation" and self.share is None):
                raise ValueError(f"{caller}: {option.name} of training is for fit_density. Leave it out.")
