"""The command ``fit``: the posterior of the user's own model, with a verdict on its draws."""

import contextlib
import inspect
import sys
import textwrap
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger

from ..answers import Posterior, posterior
from ..diagnostics.arviz import draws_alone
from ..guides import init_to_center
from ..programs import Program
from ..programs.checks import check_observed
from ..programs.sites import is_observation
from . import Refused
from .model import blames_types, in_one_line, line_of, load_model, read_data, readings
from .outputs import Outputs

MOST_OBSERVED = 5000  # numbers, whose log-likelihoods are kept draw by draw
VERDICTS = {"trust": "Trust these draws.", "do not trust": "Do not trust these draws."}


def run(wish: Namespace) -> bool:
    """Find the posterior of the model, print it, and write the draws and a picture.

    Args:
        wish: The options of the command line.

    Returns:
        True if the draws can be trusted.

    Raises:
        Refused: Before any training, if the wish cannot be granted; and if training fails.
        Interrupted: After Ctrl-C; the best answer so far is written.
    """
    outputs = Outputs(wish.out, "posterior.nc")
    file = Path(wish.model.rpartition(":")[0]).absolute()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64 if wish.double else torch.float32)
        pyro.set_rng_seed(wish.seed)
        data = read_data(wish.data)  # first, since the model's file may change the working directory
        model = load_model(wish.model)
        arguments, observed = _first_that_runs(model, data, file)
        if not observed:
            print("Nothing is observed, so the posterior is the prior: is an obs= missing?", file=sys.stderr)
        try:
            return answer(wish, outputs, Program(model, (), arguments), log_likelihood=observed <= MOST_OBSERVED)
        except (Exception, SystemExit) as error:
            if isinstance(error, ValueError | TypeError | FloatingPointError | SystemExit) or line_of(error, file):
                raise Refused(in_one_line(error, file)) from error
            raise


def _first_that_runs(model: Callable[..., Any], data: dict[str, list[Any]], file: Path) -> tuple[dict[str, Any], int]:
    """Return the first reading of the data with which a model runs, and how many numbers it observes.

    Raises:
        Refused: If it runs with none; the error is of the reading that reached the most sites.
    """
    faults: dict[tuple[int, bool], BaseException] = {}
    for arguments in readings(data):
        tracer = poutine.trace(InitMessenger(init_to_center)(model))
        try:
            trace = tracer.get_trace(**arguments)
            check_observed("", trace, arguments)
            trace.compute_log_prob()
            sites = [trace.nodes[name] for name in trace.observation_nodes]
            return arguments, sum(site["value"].numel() for site in sites if is_observation(site))
        except (Exception, SystemExit) as error:
            faults.setdefault((len(tracer.trace), not blames_types(error)), error)
        finally:
            pyro.clear_param_store()
    fault, takes = faults[max(faults)], ""  # there is at least one reading
    if isinstance(fault, TypeError) and not line_of(fault, file):  # as if an argument has another name
        with contextlib.suppress(TypeError, ValueError):
            takes = f"; the model takes {inspect.signature(getattr(model, 'forward', model))!s:.200}"
    raise Refused(in_one_line(fault, file) + takes) from fault


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
            evidence = f"{found.log_evidence:.3f} ± {found.log_evidence_se:.2g} nats"
            stages = ", ".join(f"{step.name} {step.seconds:.1f} s" for step in found.steps)
            print("", found.summary(**labels), "", sep="\n")
            print("log evidence ", "not known" if found.log_evidence != found.log_evidence else evidence)
            print(f"time          {found.seconds:.1f} s ({stages})\n")
            print(textwrap.fill(f"{VERDICTS[found.verdict]} {found.reason}", 110))
        try:
            data = found.to_arviz(log_likelihood=log_likelihood)
        except (ValueError, TypeError, RuntimeError) as error:  # the model cannot be read at the draws
            data = draws_alone(found.draws)
            words = " ".join(str(error).split())
            print(f"The file holds no log-likelihood, only draws: {words:.300}", file=sys.stderr)
        outputs.write(data.to_netcdf)
        outputs.draw(lambda: figure(found))
        print(f"Wrote {outputs}.")
    return found.trusted
