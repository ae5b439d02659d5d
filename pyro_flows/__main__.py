"""The command line: ``python -m pyro_flows`` runs the main job, ``fit`` fits your own model, ``density`` your table."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .commands import DENSITIES, RECIPES, Refused, density, eight_schools, fit

TRUSTED, NOT_TRUSTED, INTERRUPTED = 0, 3, 130  # argparse ends with 2
STATUS = (
    "The exit status is 0 if the answer can be used, 2 if nothing was fitted, 3 if it cannot be trusted, and 130 after "
    "Ctrl-C, when what was fitted so far is written beside the files that a whole run writes."
)
FIT = (
    "Fit a flow guide to your own Pyro model, print the posterior and how far to trust it, and write draws for ArviZ "
    "and a picture of the check. If the guide's draws must be reweighted, the draws that are shown and written are "
    "resampled by their weights."
)
DATA = (
    "the model's arguments by name, as a JSON object or a NumPy .npz file. Numbers, booleans and strings keep their "
    "type; lists and arrays of numbers become tensors of torch's default dtype, of booleans boolean ones. A JSON list "
    "of integers becomes real numbers too; an .npz array of integers keeps its type. If the model does not run so, a "
    "list of integers becomes integers, as an index must be, and a number a tensor, as an observation must be"
)
DENSITY = (
    "Train a flow as the density of the rows of a table, print its mean log-density of rows to train on, to validate "
    "and to test (80, 10 and 10 of 100) beside that of a Gaussian with full covariance, and write the model and a "
    "picture of the data and its samples."
)
DENSITY_STATUS = (
    "The exit status is 3 if the flow's log-density of the test rows is below the Gaussian's by more than two standard "
    "errors, 2 if nothing was fitted, 130 after Ctrl-C, and 0 otherwise. Interrupted, it writes what was trained so "
    "far to other names, such as model.interrupted.pt."
)
TABLE = (
    "numbers as text (separated by commas, semicolons, tabs or spaces, with names in the first line or without) or as "
    "a NumPy file: .npz with a matrix x (and the names in an array columns) or with vectors, or .npy. Columns of text, "
    "empty and constant ones are left out, and so are rows with missing values; integers get uniform noise. A report "
    "names the columns concerned"
)


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the main job, with ``fit`` and ``density`` as commands."""
    main_job = argparse.ArgumentParser(
        prog="python -m pyro_flows",
        description="Fit a flow guide to the eight-schools data (centred model), print the posterior and how far to "
        "trust it, and write eight_schools.nc (ArviZ) and eight_schools.png.",
        epilog=f"{STATUS} See `python -m pyro_flows fit --help` for a model of your own, and `python -m pyro_flows "
        "density --help` for the density of a table.",
    )
    main_job.add_argument("--steps", type=_positive, default=400, help="optimisation steps (default: 400)")
    main_job.add_argument("--out", type=Path, default=Path(), help="folder of the two files (default: the current one)")
    _add_common(main_job, eight_schools.run, RECIPES)
    commands = main_job.add_subparsers(title="commands", metavar="[COMMAND]", dest="command")

    model = commands.add_parser("fit", description=FIT, epilog=STATUS, help="fit a model of your own")
    model.add_argument(
        "model", metavar="FILE.py:NAME", help="a model (a function or another callable) in a Python file"
    )
    model.add_argument("--data", type=Path, metavar="FILE", help=DATA)
    words = f"the file of {fit.DRAWS} draws, or of all draws of Markov chains"
    _add_out(model, "posterior.nc", words, picture="_check.png")
    model.add_argument("--steps", type=_positive, help="optimisation steps (default: depends on the model)")
    model.add_argument("--double", action="store_true", help="calculate in float64: slower, for delicate posteriors")
    _add_common(model, fit.run, RECIPES)

    table = commands.add_parser("density", description=DENSITY, epilog=DENSITY_STATUS, help="fit a table's density")
    table.add_argument("table", type=Path, metavar="TABLE", help=TABLE)
    names = 'the columns to use (default: all that can be); "A, B" in double quotes is one name'
    table.add_argument("--columns", metavar="A,B,...", help=names)
    _add_out(table, "model.pt", "the file of the model, for pyro_flows.load")
    epochs = "the largest number of passes through the rows (default: %(default)s)"
    table.add_argument("--epochs", type=_positive, default=100, help=epochs)
    table.add_argument("--double", action="store_true", help="calculate in float64: slower, for values far from zero")
    _add_common(table, density.run, DENSITIES, default="nsf")
    return main_job


def _add_out(parser: argparse.ArgumentParser, default: str, words: str, *, picture: str = ".png") -> None:
    words += f" (default: %(default)s); the picture's name ends with {picture} instead"
    parser.add_argument("--out", type=Path, default=Path(default), metavar=f"FILE{Path(default).suffix}", help=words)


def _add_common(
    parser: argparse.ArgumentParser, run: Callable[..., bool], recipes: Iterable[str], default: str | None = None
) -> None:
    flow = f"the recipe of the flow (default: {default or 'chosen by AutoFlow'}): {', '.join(sorted(recipes))}"
    parser.add_argument("--flow", choices=sorted(recipes), default=default, metavar="FLOW", help=flow)
    parser.add_argument("--seed", type=_seed, default=0, help="seed of all random numbers (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    parser.set_defaults(run=run, parser=parser)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"must be between 0 and 2**32 - 1, got {number}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status.

    Raises:
        SystemExit: After one line about what is wrong: with status 2, or with 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    wish, unknown = command_line().parse_known_args(words)
    if wish.command and words[0] != wish.command:
        unknown = words[: words.index(wish.command)]
    command: argparse.ArgumentParser = wish.parser
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return TRUSTED if wish.run(wish) else NOT_TRUSTED
    except Refused as error:
        command.exit(2, f"{command.prog}: error: {error}\n")
    except KeyboardInterrupt as error:
        command.exit(INTERRUPTED, f"{command.prog}: {str(error) or 'interrupted'}\n")


def _run() -> int:
    """Run the command line; of several processes that torchrun has started, only the first prints."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if first else nowhere):
            return main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the exit status is already known


if __name__ == "__main__":
    sys.exit(_run())
