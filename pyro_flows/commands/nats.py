"""What a density is worth: mean log-densities of rows, beside those of the Gaussian with their mean and covariance.

The mean of N numbers has the standard error sd / √N; that of a gain is the error of the differences row by row, which
are far less noisy than the log-densities themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..data.columns import tied_columns
from ..data.table import listed_names
from . import Refused

PARTS = "train", "validation", "test"


def gaussian_of(x: Tensor, names: Sequence[str]) -> MultivariateNormal:
    """The Gaussian of maximal likelihood, in float64.

    Args:
        x: Rows, ``(N, D)``.
        names: Those of the columns.

    Raises:
        Refused: If a column is constant, or determined by others: then there is no density.
    """
    x = x.double()
    scale, loc = torch.std_mean(x, 0, correction=0)
    if same := [name for name, sd in zip(names, scale, strict=True) if not sd > 0]:
        raise Refused(f"the rows to train on are constant in {listed_names(same)}; choose other columns by --columns")
    if tied := tied_columns(x):
        words = f"the columns {listed_names(names[place] for place in tied)} determine one another"
        raise Refused(f"{words} (by a linear relation), so they have no joint density; leave one out by --columns")
    z = (x - loc) / scale
    return MultivariateNormal(loc, scale_tril=scale[:, None] * torch.linalg.cholesky(z.T @ z / len(z)))


def report(flow: Sequence[Tensor], gaussian: Sequence[Tensor], name: str, *, seconds: float, note: str) -> str:
    """Mean log-densities as a table, and the gain over the Gaussian, as a person reads them.

    Args:
        flow: The flow's log-densities of the rows for training, for validation and for the test, ``(N_i,)`` each.
        gaussian: Those of the Gaussian.
        name: What the flow is called.
        seconds: The time that the run took.
        note: What else to say of it.
    """
    rows = [
        (label, *(f"{part.mean():.3f}" for part in parts[:2]), with_error(parts[2]))
        for label, parts in (("Gaussian", gaussian), (name, flow))
    ]
    table = [("", *PARTS), *rows]
    first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = [f"{row[0]:<{first + 2}}{'  '.join(map(str.rjust, row[1:], widths))}" for row in table]
    gain = f"gain  {with_error(flow[2] - gaussian[2])} nats a row over the Gaussian, on the test rows one by one"
    return "\n".join(["", *lines, "", gain, f"time  {seconds:.1f} s{note}"])


def with_error(x: Tensor) -> str:
    """A mean and two of its standard errors."""
    return f"{x.mean():.3f} ± {two_errors(x):.3f}"


def two_errors(x: Tensor) -> float:
    """Two standard errors of a mean."""
    return 2 * float(x.std()) / len(x) ** 0.5
