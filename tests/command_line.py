"""Runs of the commands in tests: the one line of an error, and Ctrl-C during training."""

import signal

import pytest

from pyro_flows.__main__ import main
from pyro_flows.training import loop


def refused(command: str, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line of an error."""
    with pytest.raises(SystemExit) as exit_:
        main([command, *words])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    start = f"python -m pyro_flows {command}: error: "
    assert captured.err.startswith(start)
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err.removeprefix(start)


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C when training has taken some steps."""

    class Interrupting(loop.tqdm):
        def update(self, n: int = 1) -> None:
            if self.n >= steps:
                signal.raise_signal(signal.SIGINT)
            self.n += n

    monkeypatch.setattr(loop, "tqdm", Interrupting)
