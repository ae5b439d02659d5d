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


def main_parser() -> argparse.ArgumentParser:
    """Return the parser of the main job."""
    made = argparse.ArgumentParser(
        prog="python -m pyro_flows",
        description="Fit a flow guide to the eight-schools data (centred model), print the posterior and how far to "
        "trust it, and write eight_schools.nc (ArviZ) and eight_schools.png.",
        epilog=f"{STATUS} `python -m pyro_flows fit --help` tells how to fit a model of your own, and `python -m "
        "pyro_flows density --help` how to fit the density of a table.",
    )
    _add_flow(made, RECIPES)
    made.add_argument("--steps", type=_positive, default=400, help="optimisation steps (default: 400)")
    made.add_argument("--out", type=Path, default=Path(), help="folder of the two files (default: the current one)")
    _add_seed_and_quiet(made)
    return made


def fit_parser() -> argparse.ArgumentParser:
    """Return the parser of ``fit``."""
    made = argparse.ArgumentParser(
        prog="python -m pyro_flows fit",
        description="Fit a flow guide to your own Pyro model, print the posterior and how far to trust it, and write "
        "draws for ArviZ and a picture of the check beside them. Where the guide's draws must be reweighted, those "
        "that are shown and written are resampled by their weights.",
        epilog=STATUS,
    )
    made.add_argument("model", metavar="FILE.py:NAME", help="a model (a function or another callable) in a Python file")
    made.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="the model's arguments by name, as a JSON object or a NumPy .npz file. Numbers, booleans and strings stay "
        "what they are; lists and arrays of numbers become tensors of torch's default dtype, of booleans boolean ones. "
        "A JSON list of integers becomes real numbers too; an .npz array of integers stays one. Where the model runs "
        "only so, a list of integers becomes integers, as an index must be, and a number a tensor, as an observation "
        "must be",
    )
    _add_out(made, "posterior.nc", f"the file of {fit.DRAWS} draws, or of all draws of Markov chains")
    made.add_argument("--escalate", action="store_true", help="go on to costlier fits until one can be trusted")
    _add_flow(made, RECIPES)
    made.add_argument("--steps", type=_positive, help="optimisation steps (default: what suits the model)")
    made.add_argument("--double", action="store_true", help="calculate in float64: slower, for delicate posteriors")
    _add_seed_and_quiet(made)
    return made


def density_parser() -> argparse.ArgumentParser:
    """Return the parser of ``density``."""
    made = argparse.ArgumentParser(
        prog="python -m pyro_flows density",
        description="Train a flow as the density of the rows of a table, print its mean log-density of rows to train "
        "on, to validate and to test (80, 10 and 10 of 100) beside that of a Gaussian with full covariance, and write "
        "the model and a picture of the data beside its samples.",
        epilog="The exit status is 3 if the flow's log-density of the test rows is below the Gaussian's by more than "
        "two standard errors, 2 if nothing was fitted, 130 after Ctrl-C, and 0 otherwise. Interrupted, it writes what "
        "was trained so far to names of their own, such as model.interrupted.pt.",
    )
    made.add_argument(
        "table",
        type=Path,
        metavar="TABLE",
        help="numbers as text (parted by commas, semicolons, tabs or spaces, with names in the first line or without) "
        "or as a NumPy file: .npz with a matrix x (and the names in an array columns) or with vectors, or .npy. "
        "Columns of text, empty and constant ones are left out, and so are rows with missing values; integers get "
        "uniform noise. What was done is reported by the columns' names",
    )
    names = 'the columns to use (default: all that can be); "A, B" in double quotes is one name'
    made.add_argument("--columns", metavar="A,B,...", help=names)
    _add_out(made, "model.pt", "the file of the model, for pyro_flows.load")
    _add_flow(made, DENSITIES, default="nsf")
    epochs = "how often to go through the rows, at most (default: %(default)s)"
    made.add_argument("--epochs", type=_positive, default=100, help=epochs)
    made.add_argument("--double", action="store_true", help="calculate in float64: slower, for values far from zero")
    _add_seed_and_quiet(made, ", and of the division of the rows")
    return made


def _add_flow(made: argparse.ArgumentParser, recipes: Iterable[str], default: str | None = None) -> None:
    names = sorted(recipes)
    own = default or "AutoFlow's own"
    words = f"the recipe of the flow (default: {own}): {', '.join(names)}"
    made.add_argument("--flow", choices=names, default=default, metavar="FLOW", help=words)


def _add_out(made: argparse.ArgumentParser, default: str, words: str) -> None:
    words += " (default: %(default)s); the picture's name ends with .png instead"
    made.add_argument("--out", type=Path, default=Path(default), metavar=f"FILE{Path(default).suffix}", help=words)


def _add_seed_and_quiet(made: argparse.ArgumentParser, words: str = "") -> None:
    words = f"seed of the random numbers{words} (default: %(default)s)"
    made.add_argument("--seed", type=_seed, default=0, help=words)
    made.add_argument("--quiet", action="store_true", help="no progress bar and no table")


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


COMMANDS: dict[str, tuple[Callable[[], argparse.ArgumentParser], Callable[..., bool]]] = {
    "fit": (fit_parser, fit.run),
    "density": (density_parser, density.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, or exit after one line that says what is wrong: with 2, or with 130
    after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    named = bool(words) and words[0] in COMMANDS
    parser, run = COMMANDS[words.pop(0)] if named else (main_parser, eight_schools.run)
    command = parser()
    wish = command.parse_args(words)
    try:
        return TRUSTED if run(wish) else NOT_TRUSTED
    except Refused as error:
        command.exit(2, f"{command.prog}: error: {error}\n")
    except KeyboardInterrupt as error:
        command.exit(INTERRUPTED, f"{command.prog}: {str(error) or 'interrupted'}\n")


def _run() -> int:
    """Run the command line; of several processes that torchrun has started, the first alone speaks."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if first else nowhere):
            return main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the exit status is known by now


if __name__ == "__main__":
    sys.exit(_run())
