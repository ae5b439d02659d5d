"""Imports of the package are cheap: large modules are imported at their first use."""

import functools
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


FIT = """
import torch, pyro.distributions as dist, pyro_flows as pf
def model():
    x = pyro.sample("x", dist.Uniform(0.0, 2.0))
    pyro.sample("y", dist.Normal(x, 1.0))
    flat = pyro.sample("flat", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("z", dist.Normal(flat, 1.0), obs=torch.tensor(0.5))
guide = pf.AutoFlow(model)
pf.fit_svi(model, guide, steps=5, progress=False)
pf.check(model, guide)
"""
CODE = {  # in sequence, because loaded modules stay
    "package": "import pyro_flows",
    "main": HELP.format(words=[]),
    "fit": HELP.format(words=["fit"]),
    "density": HELP.format(words=["density"]),
    "a_first_fit": FIT,
    "plots": "import matplotlib",
}


@functools.cache
def loaded() -> dict[str, set[str]]:
    """Return the large modules that each piece of code loads in a fresh interpreter, without those of Pyro."""
    lines = [f"import contextlib, io, sys, pyro; known = set(sys.modules); large = {LARGE.split()}"]
    for name, code in CODE.items():
        lines += [code, f"print({name!r}, *(name for name in large if name in sys.modules and name not in known))"]
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {name: set(found) for name, *found in map(str.split, run.stdout.splitlines())}


@pytest.mark.slow
def test_importing_the_package_loads_nothing_large():
    assert loaded()["package"] == set()


@pytest.mark.parametrize("command", ["main", "fit", "density"])
def test_the_command_line_starts_without_anything_large(command):
    assert loaded()[command] == set()


def test_the_reader_of_modules_sees_them():
    """Without this test, a reader that sees no modules would pass the laws above."""
    assert "matplotlib" in loaded()["plots"]


def test_a_first_fit_and_check_load_nothing_that_takes_long():
    """ArviZ takes 1.7 s, torch's compiler .8 s and sympy .4 s.  A flat prior is annealed from a wide Gaussian."""
    assert loaded()["a_first_fit"] <= {"scipy"}
