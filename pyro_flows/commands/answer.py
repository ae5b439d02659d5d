"""The answer of ``pf.posterior`` to a command: printed, and written to two files."""

from __future__ import annotations

import sys
import textwrap
import warnings
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from ..answers import Posterior, posterior
from ..diagnostics.arviz import draws_alone
from .outputs import Outputs

VERDICTS = {"trust": "Trust these draws.", "do not trust": "Do not trust these draws."}


def answer(
    wish: Namespace,
    outputs: Outputs,
    model: Callable[..., Any],
    *args: Any,
    figure: Callable[[Posterior], Any] = Posterior.plot,
    log_likelihood: bool = True,
    **labels: list[str],
) -> bool:
    """Find the posterior of a model, print it, and write its draws and a picture.

    Args:
        wish: The options of the command line.
        outputs: The two files.
        model: The model.
        *args: Its arguments.
        figure: Draws the picture.
        log_likelihood: Whether the file holds the log-likelihood of each observation and draw.
        **labels: Names for the numbers of a site, in place of their indices.

    Returns:
        True if the draws can be trusted.

    Raises:
        Interrupted: After Ctrl-C; the best answer so far is written.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "posterior: ")  # the verdict says it
        found = posterior(model, *args, seconds=wish.seconds, progress=not wish.quiet)
    if found.interrupted:
        outputs.keep_old()
    with outputs.hold_ctrl_c():
        if wish.quiet:  # first, so that a file that cannot be written does not cost the report
            print(VERDICTS[found.verdict], *([] if found.trusted else [found.reason]), end=" ")
        else:
            print(*_report(found, labels), sep="\n")
        outputs.write(_as_data(found, log_likelihood).to_netcdf)
        outputs.draw(lambda: figure(found))
        print(f"Wrote {outputs}.")
    return found.trusted


def _as_data(found: Posterior, log_likelihood: bool) -> Any:
    """Return the draws for ArviZ; alone if the model cannot be read at them, which is told."""
    try:
        return found.to_arviz(log_likelihood=log_likelihood)
    except (ValueError, TypeError, RuntimeError) as error:
        data = draws_alone(found.draws)
        print(f"The file holds no log-likelihood, only draws: {' '.join(str(error).split()):.300}", file=sys.stderr)
        return data


def _report(found: Posterior, labels: dict[str, list[str]]) -> list[str]:
    evidence = f"{found.log_evidence:.3f} ± {found.log_evidence_se:.3f} nats"
    stages = ", ".join(f"{step.name} {step.seconds:.1f} s" for step in found.steps)
    return [
        "",
        found.summary(**labels),
        "",
        f"log evidence  {'not known' if found.log_evidence != found.log_evidence else evidence}",
        f"time          {found.seconds:.1f} s ({stages})",
        "",
        *textwrap.wrap(f"{VERDICTS[found.verdict]} {found.reason}", 110),
    ]
