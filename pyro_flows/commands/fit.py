"""The command ``fit``: a posterior of the user's own model, with a verdict on its draws."""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger

from ..guides import init_to_center
from ..programs import Program
from ..programs.error_text import check_observed
from ..programs.masks import is_observation
from . import Refused
from .answer import answer
from .model import Data, blames_types, check_arguments, in_one_line, line_of, load_model, read_data
from .outputs import Outputs

MOST_OBSERVED = 5000  # numbers, whose log-likelihoods are kept draw by draw


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
        check_arguments(model, list(data.values))
        arguments, observed = _first_that_runs(model, data, file)
        if not observed:
            print("Nothing is observed, so the posterior is the prior: is an obs= missing?", file=sys.stderr)
        try:
            return answer(wish, outputs, Program(model, (), arguments), log_likelihood=observed <= MOST_OBSERVED)
        except (Exception, SystemExit) as error:
            if isinstance(error, ValueError | TypeError | FloatingPointError | SystemExit) or line_of(error, file):
                raise Refused(in_one_line(error, file)) from error
            raise


def _first_that_runs(model: Callable[..., Any], data: Data, file: Path) -> tuple[dict[str, Any], int]:
    """Return the first reading of the data with which a model runs, and how many numbers it observes.

    Raises:
        Refused: If it runs with none; the error is of the reading that reached the most sites.
    """
    faults: dict[tuple[int, bool], BaseException] = {}
    for arguments in data.readings():
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
    fault = faults[max(faults)]  # there is at least one reading
    raise Refused(in_one_line(fault, file)) from fault
