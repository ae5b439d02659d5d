"""The two files of a run, and their names after Ctrl-C."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..atomic_files import try_path, write_atomically
from ..training.interrupts import hold_interrupts
from . import Refused

NOTICE = "\nInterrupted: finishing what is at hand, to keep what was trained; Ctrl-C again ends at once.\n"


class Interrupted(KeyboardInterrupt):
    """Error for a run that Ctrl-C has ended; its text is a line about the files that were written."""


class Outputs:
    """A file and a picture beside it, in the folder in which the command was started.

    An interrupted run gets names that are free, so that the files of earlier runs stay.

    Args:
        file: The file; None for the default.
        default: The default name, with the suffix that every name must have.

    Raises:
        Refused: If the file has another suffix, or a file cannot be written.
    """

    def __init__(self, file: Path | None, default: str) -> None:
        file, suffix = file or Path(default), Path(default).suffix
        if file.suffix != suffix:
            raise Refused(f"argument --out: {str(file)!r} must end with {suffix}")
        self._start = Path.cwd()  # a model may change the working directory
        self.file, self.picture = file, file.with_suffix(".png")
        self._written: list[str] = []
        self._is_cut = False
        where = file.parent
        try:
            (self._start / where).mkdir(parents=True, exist_ok=True)
            for where in (self.file, self.picture, *self._free()):
                try_path(self._start / where)
        except OSError as error:
            raise Refused(f"argument --out: cannot write {str(where)!r}: {error.strerror or error}") from error

    def __str__(self) -> str:
        return f"{self.file} and {self.picture}"

    def keep_old(self) -> None:
        """Choose free names, after Ctrl-C in the training."""
        (self.file, self.picture), self._is_cut = self._free(), True

    def _free(self) -> tuple[Path, Path]:
        for number in itertools.count(1):
            mark = f".interrupted-{number}" if number > 1 else ".interrupted"
            file, picture = (p.with_name(f"{p.stem}{mark}{p.suffix}") for p in (self.file, self.picture))
            if not any(os.path.lexists(self._start / path) for path in (file, picture)):
                break
        return file, picture

    @contextlib.contextmanager
    def hold_ctrl_c(self) -> Iterator[None]:
        """Delay the first Ctrl-C until all is written.

        Raises:
            Interrupted: After it, or at a second Ctrl-C if the file is written already.
        """
        with hold_interrupts(notice=NOTICE) as asked:
            try:
                yield
            except (KeyboardInterrupt, ImportError) as error:
                # Ctrl-C while a compiled module is imported, as by a first plot, becomes an ImportError.
                if isinstance(error, ImportError) and not isinstance(error.__cause__, KeyboardInterrupt):
                    raise
                raise self._interruption() if self._written else KeyboardInterrupt from error
            if asked() or self._is_cut:
                raise self._interruption()

    def _interruption(self) -> Interrupted:
        return Interrupted(f"interrupted; wrote {' and '.join(self._written)}")

    def write(self, write: Callable[[str], object]) -> None:
        """Write the file, whole or not at all, by a function of its name."""
        write_atomically(self._start / self.file, write)
        self._written.append(str(self.file))

    def draw(self, figure: Callable[[], Any]) -> None:
        """Write the picture, a figure of matplotlib that a function returns."""
        write_atomically(self._start / self.picture, lambda path: figure().savefig(path, dpi=150))
        self._written.append(str(self.picture))
