"""Printed reports: the table of a posterior with its diagnostics and verdict, and the table of a density's nats."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from math import floor, log10
from typing import Any

import numpy as np
from torch import Tensor

from ..diagnostics import Check, to_arviz
from ..sampling.samples import Samples
from ..training import Fit

MANY = 40  # rows, beyond which long sites are cut short
HEADINGS = "mean", "sd", "5 %", "95 %"
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


def exact_draws(fit: Fit) -> Samples | None:
    """Return the exact draws of a fit, if there are some and their chains have converged."""
    return fit.samples if fit.samples is not None and fit.samples.converged else None


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
    psis, exact = check.psis, exact_draws(fit)
    doubt = "" if psis.reliable else "  (not reliable)"
    verdict = f"{VERDICTS[check.verdict]} {check.reason}" + (f" {advice}" if check.verdict == "do not trust" else "")
    if exact:
        verdict = f"{VERDICTS['trust']} They are exact: their chains have converged. Of the guide: {check.reason}"
    return "\n".join(
        [
            "",
            *_table(draws, labels),
            "",
            *([f"chains        {exact.worst}"] if exact else []),
            f"k-hat         {psis.khat:.2f}  (weights are reliable below {psis.threshold:.2f})",
            f"ESS           {psis.ess:.0f} of {len(psis.log_weights)} draws",
            f"log evidence  {psis.log_evidence:.3f} ± {psis.log_evidence_se:.3f} nats{doubt}",
            f"time          {seconds:.1f} s" + (f", {fit.skipped} steps skipped" if fit.skipped else ""),
            "",
            *textwrap.wrap(verdict, 110),
        ]
    )


def _table(draws: dict[str, np.ndarray], labels: dict[str, list[str]]) -> Iterator[str]:
    """Yield a line for each number of each site; long sites among many rows show only their first and last numbers."""
    columns = {name: values.reshape(len(values), -1).astype(float) for name, values in draws.items()}
    total = sum(values.shape[1] for values in columns.values())
    room = total if total <= MANY else max(5, MANY // len(columns))
    rows: list[tuple[str, ...]] = [("", *HEADINGS)]
    for name, values in columns.items():
        own = labels.get(name) or [", ".join(map(str, place)) for place in np.ndindex(*draws[name].shape[1:])]
        numbers = zip(own, _summary(values), strict=True)
        lines: list[tuple[str, ...]] = [(f"{name}[{place}]" if place else name, *cells) for place, cells in numbers]
        if len(lines) > room:
            lines[room - 2 : -1] = [(f"({len(lines) - room + 1} more of {name})",)]
        rows += lines
    first = max(8, *(len(row[0]) for row in rows)) + 2
    width = max(6, *(len(cell) for row in rows for cell in row[1:])) + 2
    for label, *cells in rows:
        yield f"{label:<{first}}{''.join(f'{cell:>{width}}' for cell in cells)}".rstrip()


def _summary(values: np.ndarray) -> list[list[str]]:
    """Return mean, sd and two quantiles of each column, ``(N, K)``, with three digits of the smallest sd."""
    sds = values.std(0, ddof=1)
    numbers = np.stack((values.mean(0), sds, *np.quantile(values, [0.05, 0.95], axis=0)), -1)  # (K, 4)
    least = sds.min(initial=np.inf)
    style = f".{max(0, 2 - floor(log10(least)))}f" if 1e-4 < least < 1e7 else ".4g"
    return [[f"{number:{style}}" for number in row] for row in numbers]


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
