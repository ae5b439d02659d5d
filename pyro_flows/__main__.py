"""The command line: ``python -m pyro_flows`` runs the main job, ``fit`` fits your own model, ``density`` your table."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from .commands import Refused, density, eight_schools, fit

TRUSTED, REFUSED, NOT_TRUSTED, INTERRUPTED = 0, 2, 3, 130  # argparse ends with 2 as well
NOTHING = "interrupted before there was anything to keep; nothing was written"
STATUS = (
    "The exit status is 0 if the answer can be used, 2 if nothing was fitted, 3 if it cannot be trusted, and 130 after "
    "Ctrl-C, when the best so far is written beside the files of a whole run, such as posterior.interrupted.nc."
)
MAIN = (
    "Find the posterior of the eight schools (centred model), print it and how far to trust it, and write "
    "eight_schools.nc (ArviZ) and eight_schools.png. The commands do this for a model of your own, or fit a density."
)
FIT = "Find the posterior of your own Pyro model, print it and how far to trust it, and write draws and a picture."
DATA = (
    "the model's arguments by name, as a JSON object or a NumPy .npz file. Numbers, booleans and strings keep their "
    "type; lists and arrays of numbers become tensors of torch's default dtype, of booleans boolean ones. A JSON list "
    "of integers becomes real numbers too; an .npz array of integers keeps its type. If the model does not run so, a "
    "list of integers becomes integers, as an index must be, and a number a tensor, as an observation must be"
)
DENSITY = (
    "Train a flow as the density of the rows of a table, print its mean log-density of rows to train on, to validate "
    "and to test (80, 10 and 10 of 100) beside that of a Gaussian with full covariance, and write the model and a "
    "picture of the data and its samples. The flow cannot be trusted if the Gaussian is better by more than two "
    "standard errors."
)
TABLE = (
    "numbers as text (separated by commas, semicolons, tabs or spaces, with names in the first line or without) or as "
    "a NumPy file: .npz with a matrix x (and the names in an array columns) or with vectors, or .npy. Columns of text, "
    "empty and constant ones are left out, and so are rows with missing values; integers get uniform noise. A report "
    "names the columns concerned"
)


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the main job, with ``fit`` and ``density`` as commands."""
    main_job = argparse.ArgumentParser("python -m pyro_flows", description=MAIN, epilog=STATUS)
    commands = main_job.add_subparsers(title="commands", metavar="[COMMAND]", dest="command")
    model = commands.add_parser("fit", description=FIT, epilog=STATUS, help="fit a model of your own")
    table = commands.add_parser("density", description=DENSITY, epilog=STATUS, help="fit a table's density")

    words = "a model (a function or another callable) in a Python file"
    model.add_argument("model", metavar="FILE.py:NAME", help=words)
    model.add_argument("--data", type=Path, metavar="FILE", help=DATA)
    table.add_argument("table", type=Path, metavar="TABLE", help=TABLE)
    words = 'the columns to use (default: all that can be); "A, B" in double quotes is one name'
    table.add_argument("--columns", metavar="A,B,...", help=words)
    recipes = sorted(density.DENSITIES)
    words = f"the recipe of the flow (default: %(default)s): {', '.join(recipes)}"
    table.add_argument("--flow", choices=recipes, default="nsf", metavar="FLOW", help=words)
    words = "the largest number of passes through the rows (default: %(default)s)"
    table.add_argument("--epochs", type=int, default=100, help=words)
    for parser in (model, table):
        parser.add_argument("--double", action="store_true", help="calculate in float64: slower and more exact")

    jobs = ((main_job, eight_schools, "eight_schools.nc"), (model, fit, "posterior.nc"), (table, density, "model.pt"))
    for parser, job, file in jobs:
        # Without defaults, so that a command keeps what stands before its name.
        common = parser.add_argument_group("common options", argument_default=argparse.SUPPRESS)
        words = f"the file to write (default: {file}); the picture beside it ends with .png"
        common.add_argument("--out", type=Path, metavar=f"FILE{Path(file).suffix}", help=words)
        common.add_argument("--seed", type=_seed, help="seed of all random numbers (default: 0)")
        words = "print one line: the verdict and the names of the files"
        common.add_argument("--quiet", action="store_true", help=words)
        if job is not density:
            words = "the time after which the best answer so far is given (default: no limit)"
            common.add_argument("--seconds", type=float, help=words)
        parser.set_defaults(run=job.run, parser=parser)
    return main_job


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
    wish = command_line().parse_args(argv, argparse.Namespace(out=None, seed=0, quiet=False, seconds=None))
    command: argparse.ArgumentParser = wish.parser
    if wish.command == "density" and wish.seconds is not None:
        command.error("unrecognized arguments: --seconds; use --epochs")
    try:
        return TRUSTED if wish.run(wish) else NOT_TRUSTED
    except Refused as error:
        command.exit(REFUSED, f"{command.prog}: error: {error}\n")
    except KeyboardInterrupt as error:
        command.exit(INTERRUPTED, f"{command.prog}: {str(error) or NOTHING}\n")


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the exit status is already known
