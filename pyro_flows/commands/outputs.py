"""The two files of a run, and their names after Ctrl-C."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..atomic_files import try_path, write_atomically
from ..training import Fit, distributed
from ..training.interrupts import hold_interrupts
from ..training.loop import AGAIN
from . import Refused

NOTICE = "\nInterrupted: finishing what is at hand, to keep what was trained; Ctrl-C again ends at once.\n"


class Interrupted(KeyboardInterrupt):
    """Error for a run that Ctrl-C has ended; its text is a line about the files that were kept."""


class Outputs:
    """A file and a picture beside it, in the folder in which the command was started.

    An interrupted run gets names that are free, so that the files of earlier runs stay.

    Args:
        file: The file.
        suffix: The suffix that it must have.
        picture: The end of the picture's name, in place of the suffix.

    Attributes:
        paths: The two files that this run writes, as the user names them.

    Raises:
        Refused: If the file has another suffix.
    """

    def __init__(self, file: Path, suffix: str, *, picture: str = ".png") -> None:
        if file.suffix != suffix:
            raise Refused(f"argument --out: {str(file)!r} must end with {suffix}")
        self._start = Path.cwd()  # a model may change the working directory
        self._whole = self.paths = file, file.with_name(file.stem + picture)
        self._endings = suffix, picture
        self._has_file = False  # of this run

    def check_writable(self) -> None:
        """Make the folder, and raise Refused unless all files can be written, those of an interrupted run included."""
        folder = self._whole[0].parent
        task = f"write into {str(folder)!r}"
        try:
            (self._start / folder).mkdir(parents=True, exist_ok=True)
            for paths, words in ((self._whole, ""), (self._free(), ", as an interrupted run does")):
                for path in paths:
                    task = f"write {str(path)!r}{words}"
                    try_path(self._start / path)
        except OSError as error:
            raise Refused(f"argument --out: cannot {task}: {error.strerror or error}") from error

    @contextlib.contextmanager
    def hold_ctrl_c(self) -> Iterator[Callable[[], bool]]:
        """Delay the first Ctrl-C until all is written; the function that is yielded returns True if there was one.

        Raises:
            Interrupted: At a second Ctrl-C, if the file is written already.
        """
        with hold_interrupts(AGAIN if "RANK" in os.environ else 0.0, NOTICE) as asked:
            try:
                yield asked
            except Interrupted:
                raise
            except (KeyboardInterrupt, ImportError) as error:
                # Ctrl-C while a compiled module is imported, as by a first plot, becomes an ImportError.
                if isinstance(error, ImportError) and not isinstance(error.__cause__, KeyboardInterrupt):
                    raise
                if not self._has_file:
                    raise KeyboardInterrupt from error
                raise self._interruption(str(self.paths[0])) from error

    def settle(self, fit: Fit) -> None:
        """Choose free names if the fit was interrupted.

        Raises:
            Interrupted: If Ctrl-C came before there was anything to write.
        """
        if fit.stopped == "interrupted":
            if not fit.best_step:
                raise Interrupted("interrupted before there was anything to keep; nothing was written")
            self.paths = self._free()

    def _free(self) -> tuple[Path, Path]:
        def numbered(number: int) -> tuple[Path, Path]:
            mark = f".interrupted-{number}" if number > 1 else ".interrupted"
            whole = self._whole[0]
            file, picture = (whole.with_name(f"{whole.stem}{mark}{ending}") for ending in self._endings)
            return file, picture

        def is_free(pair: tuple[Path, Path]) -> bool:
            return not any(os.path.lexists(self._start / path) for path in pair)

        pairs = map(numbered, itertools.count(1))
        return distributed.broadcast(lambda: next(filter(is_free, pairs)))

    def __str__(self) -> str:
        return f"{self.paths[0]} and {self.paths[1]}"

    def write(self, write: Callable[[Path], object]) -> None:
        """Write the file."""
        write(self._start / self.paths[0])
        self._has_file = True

    def finish(
        self, draw: Callable[[], Any], said: str, wrote: str, *, quiet: bool, interrupted: Callable[[], bool]
    ) -> None:
        """Print a report, write the picture, and print what was written.

        Args:
            draw: Returns a figure of matplotlib.
            said: The report.
            wrote: The lines to print after the picture is written.
            quiet: True if nothing is printed.
            interrupted: Returns True if Ctrl-C came after the training.

        Raises:
            Interrupted: After Ctrl-C.
        """
        if not quiet:  # first, so that a picture that cannot be written does not cost the report
            print(said)
        write_atomically(self._start / self.paths[1], lambda path: draw().savefig(path, dpi=150))
        if not quiet:
            print(wrote)
        if interrupted() or self.paths != self._whole:
            raise self._interruption(str(self))

    def _interruption(self, written: str) -> Interrupted:
        if self.paths == self._whole:
            return Interrupted(f"interrupted after the training; wrote {written}")
        old = [str(path) for path in self._whole if (self._start / path).exists()]
        left = f", and left {' and '.join(old)} as {'they were' if old[1:] else 'it was'}" if old else ""
        return Interrupted(f"interrupted; wrote {written}{left}")
