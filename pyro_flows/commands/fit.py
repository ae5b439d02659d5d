"""The command ``fit``: a posterior of the user's own model, with a verdict on its draws."""

from __future__ import annotations

import contextlib
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..atomic_files import write_atomically
from ..diagnostics import check
from ..fitting import fit_svi
from ..flows import Flow
from ..guides import AutoFlow
from ..programs import Program
from ..programs.masks import is_observation
from ..programs.model_and_guide import Task
from . import RECIPES, Refused
from .model import check_arguments, in_one_line, line_of, load_model
from .model_arguments import Data, read_data
from .outputs import Outputs
from .report import container_of, draws_of, report

DRAWS = 4000
ADVICE = "Try more --steps or another --flow."
MOST_OBSERVED = 5000  # numbers, whose log-likelihoods are kept draw by draw


def run(wish: Namespace) -> bool:
    """Fit the model, print its posterior, and write the draws and a picture.

    Args:
        wish: The options of the command line.

    Returns:
        True if the answer can be used.

    Raises:
        Refused: Before any training, if the wish cannot be granted; and if training fails.
        Interrupted: After Ctrl-C; what was fitted is written.
    """
    outputs = Outputs(wish.out, ".nc", picture="_check.png")
    start = time.perf_counter()
    file = Path(wish.model.rpartition(":")[0]).absolute()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64 if wish.double else torch.float32)
        pyro.set_rng_seed(wish.seed)
        data = read_data(wish.data)  # first, since the model's file may change the working directory
        model = load_model(wish.model)
        check_arguments(model, list(data.values))
        model, guide, observed = _set_up(model, RECIPES.get(wish.flow), data, file)
        if not observed:
            print("Nothing is observed, so the posterior is the prior: is an obs= missing?", file=sys.stderr)
        outputs.check_writable()
        asked = stack.enter_context(outputs.hold_ctrl_c())
        try:
            fit = fit_svi(model, guide, steps=wish.steps, progress=not wish.quiet)
            outputs.settle(fit)
            checked = check(model, guide)
            container = container_of(
                model,
                guide,
                num_samples=DRAWS,
                importance=checked.verdict == "reweight",
                log_likelihood=sum(value.numel() for value in observed) <= MOST_OBSERVED,
            )
        except (Exception, SystemExit) as error:
            if isinstance(error, ValueError | TypeError | FloatingPointError | SystemExit) or line_of(error, file):
                raise Refused(in_one_line(error, file)) from error
            raise
        outputs.write(lambda path: write_atomically(path, container.to_netcdf))
        said = report(draws_of(container), checked, fit, time.perf_counter() - start, ADVICE)
        outputs.finish(checked.plot, said, f"Wrote {outputs}.", quiet=wish.quiet, interrupted=asked)
    return checked.verdict != "do not trust"


def _set_up(
    model: Callable[..., Any], recipe: Callable[[int], Flow] | None, data: Data, file: Path
) -> tuple[Program, AutoFlow, list[Tensor]]:
    """Return the model with the first reading of the data with which it runs, a guide for it, and the observations."""
    first: BaseException | None = None
    for arguments in data.readings():
        pyro.clear_param_store()
        program = Program(model, kwargs=arguments)
        guide = AutoFlow(program, recipe)
        try:
            guide.setup()
            return program, guide, _observed(Task(program, guide, (), {}).check(whole=False).traces[0])
        except (Exception, SystemExit) as error:
            # AutoFlow's words on missing arguments are for its callers.
            bare = error.__cause__ if isinstance(error, TypeError) and not arguments else None
            first = first or (bare if isinstance(bare, TypeError) else error)
    assert first is not None  # there is at least one reading
    if "the model has no latents" in str(first):
        raise Refused("the model has no continuous latent sites; there is no posterior to fit") from first
    raise Refused(in_one_line(first, file)) from first


def _observed(trace: Trace) -> list[Tensor]:
    """Return the values that a model observes."""
    sites = [trace.nodes[name] for name in trace.observation_nodes]
    return [site["value"] for site in sites if is_observation(site)]
