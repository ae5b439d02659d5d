"""The tutorials run, where what they show is installed."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[1] / "tutorials"


def test_lightning_trains_a_density():
    pytest.importorskip("lightning")
    tutorial = runpy.run_path(str(TUTORIALS / "lightning_density.py"))
    assert tutorial["ENTROPY"] < tutorial["main"](epochs=2) < tutorial["ENTROPY"] + 0.3
