"""Printed reports: the table of a posterior with its diagnostics and verdict, and the table of a density's nats."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..answers.table import table_of
from ..diagnostics import Check, to_arviz
from ..training import Fit

PARTS = "train", "validation", "test"
VERDICTS = {
    "trust": "Trust these draws.",
    "reweight": "Use these draws as they are here: resampled by their weights.",
    "do not trust": "Do not trust these draws.",
}


def container_of(model: Callable[..., Any], guide: Any, *args: Any, **settings: Any) -> Any:
    """Return draws in ArviZ's container, as ``to_arviz`` does; its warning of k-hat is left to the verdict."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "to_arviz: k-hat")
        return to_arviz(model, guide, *args, **settings)


def draws_of(data: Any) -> dict[str, np.ndarray]:
    """Return the draws in ArviZ's container, all chains joined: site name -> ``(N, *site_shape)``."""
    variables = data["posterior"].data_vars.items()
    return {str(name): variable.values.reshape(-1, *variable.shape[2:]) for name, variable in variables}


def report(
    draws: dict[str, np.ndarray], check: Check, fit: Fit, seconds: float, advice: str, **labels: list[str]
) -> str:
    """Return the table, the diagnostics and the verdict as text.

    Args:
        draws: For each site, values of shape ``(N, *site_shape)``.
        check: The check of the guide.
        fit: The fit of the guide.
        seconds: The time of the run.
        advice: What to try if the answer cannot be trusted.
        **labels: Names for the numbers of a site, in place of their indices.
    """
    psis = check.psis
    doubt = "" if psis.reliable else "  (not reliable)"
    verdict = f"{VERDICTS[check.verdict]} {check.reason}" + (f" {advice}" if check.verdict == "do not trust" else "")
    return "\n".join(
        [
            "",
            *table_of(draws, labels),
            "",
            f"k-hat         {psis.khat:.2f}  (weights are reliable below {psis.threshold:.2f})",
            f"ESS           {psis.ess:.0f} of {len(psis.log_weights)} draws",
            f"log evidence  {psis.log_evidence:.3f} ± {psis.log_evidence_se:.3f} nats{doubt}",
            f"time          {seconds:.1f} s" + (f", {fit.skipped} steps skipped" if fit.skipped else ""),
            "",
            *textwrap.wrap(verdict, 110),
        ]
    )


def report_density(flow: Sequence[Tensor], gaussian: Sequence[Tensor], name: str, *, seconds: float, note: str) -> str:
    """Return a table of mean log-densities, and the gain over the Gaussian, as text.

    The standard error of the gain is that of the differences by row, which vary far less than the log-densities.

    Args:
        flow: The flow's log-densities of the rows for training, for validation and for the test, ``(N_i,)`` each.
        gaussian: The Gaussian's log-densities of the same rows.
        name: The name of the flow.
        seconds: The time of the run.
        note: Further words on the run.
    """
    table = [("", *PARTS)]
    for label, (train, validation, test) in (("Gaussian", gaussian), (name, flow)):
        table.append((label, f"{train.mean():.3f}", f"{validation.mean():.3f}", _with_error(test)))
    first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = [f"{row[0]:<{first + 2}}{'  '.join(map(str.rjust, row[1:], widths))}" for row in table]
    gain = f"gain  {_with_error(flow[2] - gaussian[2])} nats per row over the Gaussian, on the test rows one by one"
    return "\n".join(["", *lines, "", gain, f"time  {seconds:.1f} s{note}"])


def _with_error(x: Tensor) -> str:
    return f"{x.mean():.3f} ± {two_errors(x):.3f}"


def two_errors(x: Tensor) -> float:
    """Return two standard errors of a mean, 2 sd / √N."""
    return 2 * float(x.std()) / len(x) ** 0.5
