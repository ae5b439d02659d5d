"""Importing the package is cheap: what is large and not always needed is imported where it is used."""

import subprocess
import sys

import pytest

LARGE = "arviz arviz_stats h5py matplotlib pandas scipy sympy torch._dynamo torch._inductor torchdiffeq xarray"
HELP = """
import runpy
sys.argv = ["pyro_flows", *{words}, "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    runpy.run_module("pyro_flows", run_name="__main__")
"""


def loaded_by(code: str) -> set[str]:
    """Which large modules some code loads in a fresh interpreter, beyond those that Pyro loads."""
    before = f"import contextlib, io, sys, pyro; known = set(sys.modules); large = {LARGE.split()}"
    after = "print(*(name for name in large if name in sys.modules and name not in known))"
    run = subprocess.run([sys.executable, "-c", f"{before}\n{code}\n{after}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_importing_the_package_loads_nothing_large():
    assert loaded_by("import pyro_flows") == set()


@pytest.mark.parametrize("words", [[], ["fit"], ["density"]])
def test_the_command_line_starts_without_anything_large(words):
    assert loaded_by(HELP.format(words=words)) == set()


def test_the_reader_of_modules_sees_them():
    """Were the reader blind, the laws above would hold of anything."""
    assert "scipy" in loaded_by("import scipy.stats")


FIT = """
import pyro.distributions as dist, pyro_flows as pf
def model():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0))
guide = pf.AutoFlow(model)
pf.fit_svi(model, guide, steps=5, progress=False)
pf.check(model, guide)
"""


def test_a_first_fit_and_check_load_nothing_that_takes_long():
    """ArviZ takes 1.7 s, torch's compiler .8 s and sympy .4 s."""
    assert loaded_by(FIT) <= {"scipy"}
