"""The examples of the README run, and its commands are those of the gate."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(EXAMPLES[number], scope)
    out = capsys.readouterr().out
    assert out.strip()
    if "flow" in scope:  # the ring: far better than the Gaussian with the same moments, whose entropy is 3.5 nats
        assert scope["flow"]().log_prob(scope["ring"]).mean() > -2.7
    elif "y" not in scope:  # amortised: except for the bounds, the exact posterior at x = (1, 3) has mean (1.0, 2.0)
        draws = scope["guide"].sample(1000, torch.tensor([1.0, 3.0]))["rate"]
        assert (draws.mean(0) - torch.tensor([1.0, 2.0])).abs().max() < 0.3
        assert draws.min() > 0
        assert draws.max() < 4
    else:  # the least-squares solution lies in the 99 % intervals, which are narrower than those of the prior
        low, high = scope["found"].draws["w"].quantile(torch.tensor([0.005, 0.995]), 0)
        found = torch.linalg.lstsq(scope["x"], scope["y"].unsqueeze(-1)).solution.squeeze(-1)
        assert (low < found).all()
        assert (found < high).all()
        assert (high - low < 2 * 1.645).all()
        assert "trust" in out


def test_the_examples_are_of_the_promised_length():
    guide, _, density = (sum(bool(line.strip()) for line in text.splitlines()) for text in EXAMPLES)
    assert guide <= 16
    assert density <= 12
    assert len(README.splitlines()) <= 150


def test_the_gate_runs_the_test_command_of_the_readme():
    command = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"
    assert f"```\n{command}\n```" in README
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


def test_the_main_job_shown_is_what_the_main_job_prints():
    shown = re.search(r"<!-- main job -->\n```\n(.*?)```", README, flags=re.DOTALL).group(1)
    for line in ("mean      sd     5 %    95 %", "mu ", "tau ", "theta[H]", "log evidence", "time"):
        assert line in shown
