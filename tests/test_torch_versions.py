"""Everything works from torch 2.4 on: features of newer versions are looked up by name and are optional."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyro_flows

ROOT = Path(__file__).resolve().parents[1]
OLDEST = "2.4"
# The parts of torch that pyro_flows uses and torch 2.4 lacks; the tests remove them from the installed torch.
LACKING = """
import functools, tempfile
import pyro, pyro.distributions as dist, pytest, torch
from torch.distributions import constraints
for owner, name in (
    (torch.optim, "Muon"),
    (torch.serialization, "set_crc32_options"),
    (constraints, "MixtureSameFamilyConstraint"),
):
    if hasattr(owner, name):
        delattr(owner, name)
newer = torch.compile
def compile(model=None, *, fullgraph=False, dynamic=None, backend="inductor", mode=None, options=None, disable=False):
    return newer(model, fullgraph=fullgraph, dynamic=dynamic, backend=backend, mode=mode, options=options)
torch.compile = compile

import pyro_flows as pf
from pyro_flows import flows
"""
USES = {  # one after the other
    "a guide over many latents, which Muon trains": """
def model():
    pyro.sample("x", dist.Normal(torch.zeros(40), 1.0).to_event(1))
guide = pf.AutoFlow(model, functools.partial(flows.realnvp, num_transforms=1, hidden_dims=(8,)))
assert pf.fit_svi(model, guide, steps=3, progress=False).steps == 3
""",
    "a file": """
with tempfile.TemporaryDirectory() as folder:
    pf.save(flows.nice(3), folder + "/flow")
    assert pf.load(folder + "/flow").event_shape == (3,)
""",
    "a compiled flow": """
import warnings
warnings.simplefilter("error", UserWarning)
flow = flows.nice(3)
x = torch.zeros(5, 3)
expected = flow.log_prob(x)
flow.compile(backend="eager")
assert torch.equal(flow.log_prob(x), expected)
with pytest.raises(ValueError, match="recompile_limit cannot be set"):
    flow.compile(recompile_limit=3)
with pytest.warns(UserWarning, match="torch.compile needs torch 2.13"):
    flow = flows.sylvester_flow(3, num_transforms=1)
    flow.compile(backend="eager")
    flow.log_prob(x)
""",
}


@pytest.mark.slow
def test_what_torch_adds_later_is_not_needed():
    code = LACKING + "".join(f"{code}print({use!r})\n" for use, code in USES.items())
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == list(USES)


def test_the_declared_bound_is_the_oldest_that_was_tried():
    """It is the same in the sources, the installed package and the docs, and not newer than the installed torch."""
    (bound,) = re.findall(r'^    "torch>=([\d.]+)",$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert bound == OLDEST
    assert f"torch {OLDEST}" in (ROOT / "docs" / "start.md").read_text()
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= tuple(map(int, bound.split(".")))
    assert pyro_flows.__version__
