"""Which flows of each library score and sample, and how robust are they to updates, copies and restores?

    python benchmarks/comparison.py                      # about ten minutes of one core
    python benchmarks/comparison.py --libraries zuko     # some libraries; the page is printed, not written

Small flows of pyro_flows, Pyro, zuko, nflows, normflows and FlowJAX pass the same tests.  Each flow is built as in its
library's manual, and none is trained.

*Flows*: two dimensions, with all parameters moved away from their initial values.  A flow passes if it meets two
conditions.  The density of values that it did not draw integrates to one over a grid, within 3 %.  The moments of 4,000
draws equal those of the density, within 5 standard errors.

*Behaviour*: the effects of updates, copies, contexts and precisions.  Work is counted as multiplications in matrix
products, which are equal in every run.

Libraries that are not installed are skipped.  Writes ``docs/benchmarks/comparison.md``.
"""

import argparse
import platform
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from comparison_peers import KINDS, LIBRARIES, Library, Made
from torch import Tensor

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
DIM, CONTEXT, CONTEXTS, DRAWS = 4, 3, 5, 7
EXTENT, POINTS, CHECKED = 12.0, 121, 4_000
USED = "affine coupling", "affine autoregressive"


def succeeds(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except Exception:  # any error of a library counts as a failure
        return False


# ------------------------------------------------------------ flows


def density_on_grid(made: Made, draws: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the centres and the masses of the cells of a square; cells are small where draws are dense."""
    lines = [torch.linspace(-EXTENT, EXTENT, POINTS)] * 2
    if draws is not None:
        levels = torch.linspace(0, 1, 2 * POINTS)
        lines = [torch.cat((lines[0], draws[:, i].quantile(levels))).unique() for i in range(2)]
    widths = torch.cartesian_prod(*(line.diff() for line in lines)).double().prod(-1)
    x = torch.cartesian_prod(*((line[1:] + line[:-1]) / 2 for line in lines))
    with torch.no_grad():
        log_prob = torch.cat([made.log_prob(part.clone()) for part in x.split(20_000)])
    return x, log_prob.double().exp() * widths


def moments(x: Tensor) -> Tensor:
    return torch.stack((x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1]), -1).double()


def verdict(library: Library, kind: str) -> str:
    """Return which directions of a kind of flow work in a library, in words."""
    torch.manual_seed(0)
    made = library.build(kind, 2)
    if made is None:
        return "–"
    made.perturb(0.1)
    with torch.no_grad():
        draws = succeeds(lambda: bool(torch.isfinite(made.sample(3)).all()))
    scores = succeeds(lambda: bool(torch.isfinite(made.log_prob(torch.randn(3, 2))).all()))
    if not (draws and scores):
        return "draws only" if draws else "scores only"
    with torch.no_grad():
        draws = made.sample(CHECKED)
    x, mass = density_on_grid(made, None)
    if abs(mass.sum() - 1) > 0.03:  # the first grid may be too coarse for narrow peaks
        x, mass = density_on_grid(made, draws)
    if abs(mass.sum() - 1) > 0.03:
        return "draws and density differ"
    found = moments(draws)
    error = found.mean(0) - (moments(x) * mass[:, None]).sum(0)
    if (error.abs() > 5 * found.std(0) / CHECKED**0.5 + 0.005).any():
        return "draws and density differ"
    return "both"


# ------------------------------------------------------------ behaviour


def scores_after_update(library: Library, kind: str) -> bool:
    """True if the same object scores the same tensor correctly after an update of the parameters."""
    made = library.build(kind, DIM)
    x, score = torch.randn(5, DIM), made.log_prob
    if made.hold is not None:
        score = made.hold().log_prob
    before = score(x)
    made.perturb(0.3)
    again = made.log_prob(x) if made.hold is None else score(x)
    return torch.allclose(again, made.log_prob(x.clone())) and not torch.allclose(before, again)


def trains_on_a_tensor(library: Library, kind: str) -> bool:
    made, x = library.build(kind, DIM), torch.randn(5, DIM)
    for _ in range(2):
        made.log_prob(x).mean().backward()
        made.perturb(0.01)
    return True


def scores_its_draws(library: Library, kind: str) -> bool:
    """True if the gradient of the density is correct at draws that were made without gradients."""
    made = library.build(kind, DIM)
    made.perturb(0.1)
    with torch.no_grad():
        x = made.sample(5)
    parameters = list(made.module.parameters())
    first, second = (
        torch.autograd.grad(made.log_prob(value).sum(), parameters, allow_unused=True) for value in (x, x.clone())
    )
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.allclose(a, b, atol=1e-5))
        for a, b in zip(first, second, strict=True)
    )


def copies(library: Library, kind: str, how: str) -> bool:
    made = library.build(kind, DIM)
    made.log_prob(torch.randn(5, DIM))
    made.both(5)
    made.clone(how)
    return True


def restores(library: Library) -> bool:
    """True if a second flow with its own random permutation restores the state of the first."""
    first, second = library.build("permuted", 6), library.build("permuted", 6)
    first.perturb(0.1)
    x = torch.randn(5, 6)
    second.restore(first)
    return torch.allclose(second.log_prob(x.clone()), first.log_prob(x), atol=1e-5)


def keeps_batches(library: Library, kind: str) -> bool:
    made, context = library.build(kind, DIM, CONTEXT), torch.randn(CONTEXTS, CONTEXT)
    x = made.sample(DRAWS, context)
    log_prob = made.log_prob(x.detach().clone(), context)
    return tuple(x.shape) == (DRAWS, CONTEXTS, DIM) and tuple(log_prob.shape) == (DRAWS, CONTEXTS)


def doubles(library: Library) -> bool:
    made = library.build("affine coupling", DIM)
    made.module.double()
    return made.log_prob(made.sample(5)).dtype == torch.float64


def draw_and_score(library: Library) -> str:
    """Return the work of sampling with scores, relative to sampling."""
    made = library.build("affine coupling", 32)
    return f"{made.work_of_both() / made.work_of_draws():.1f}"


def slow_direction(library: Library) -> str:
    """Return the work of the slow direction of an autoregressive layer, in passes of its network."""
    found = []
    for dim in (8, 32):
        made = library.build("affine autoregressive", dim)
        work = made.work_of_draws(), made.work_of_scores(dim)
        ratio = work[0] / work[1] if library.scores_fast else work[1] / work[0]
        found.append(f"{ratio:.1f}" if ratio < 2 else f"{ratio:.0f}")
    return ", ".join(found)


ASKED: dict[str, Callable[[Library], bool | str]] = {
    "density after an update in place": lambda it: all(scores_after_update(it, kind) for kind in USED),
    "two steps of training on the same tensor": lambda it: all(trains_on_a_tensor(it, kind) for kind in USED),
    "gradient of the density of its own draws": lambda it: all(scores_its_draws(it, kind) for kind in USED),
    "deep copy after use": lambda it: all(copies(it, kind, "copy") for kind in USED),
    "pickle after use": lambda it: all(copies(it, kind, "pickle") for kind in USED),
    "its state, permutations too, into a new flow": restores,
    "7 draws for each of 5 contexts, and their scores": lambda it: keeps_batches(it, "affine autoregressive"),
    "float64 by `.double()`, draws too": doubles,
    "density as one compiled graph, affine": lambda it: it.build("affine coupling", DIM).compiles(),
    "density as one compiled graph, spline": lambda it: it.build("spline coupling", DIM).compiles(),
    "draw and score, in draws": draw_and_score,
    "slow direction in network passes, D = 8, 32": slow_direction,
}
# these rows do not apply to libraries whose arrays never change
FUNCTIONAL = set(list(ASKED)[1:3]) | {"float64 by `.double()`, draws too"}


def behaviour(library: Library, question: str) -> str:
    torch.manual_seed(0)
    if library.functional and question in FUNCTIONAL:
        return "–"
    try:
        found = ASKED[question](library)
    except Exception:
        return "no"
    return found if isinstance(found, str) else ("yes" if found else "no")


# ------------------------------------------------------------ the page


def table(head: str, rows: dict[str, list[str]], names: list[str]) -> str:
    lines = [f"| {head} | {' | '.join(names)} |", "|---|" + ":---:|" * len(names)]
    return "\n".join(lines + [f"| {row} | {' | '.join(cells)} |" for row, cells in rows.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--out", type=Path, help="folder of the page")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    libraries = {name: LIBRARIES[name] for name in options.libraries if LIBRARIES[name].installed()}
    kinds: dict[str, list[str]] = {label: [] for label in KINDS.values()}
    answers: dict[str, list[str]] = {question: [] for question in ASKED}
    for name, library in libraries.items():
        for kind, label in KINDS.items():
            kinds[label].append(verdict(library, kind))
            print(f"{name}: {label}: {kinds[label][-1]}", flush=True)
        for question, cells in answers.items():
            cells.append(behaviour(library, question))
            print(f"{name}: {question}: {cells[-1]}", flush=True)
    names = [f"{name} {version(library.package)}" for name, library in libraries.items()]
    counts = [sum(cell == "both" for cell in cells) for cells in zip(*kinds.values(), strict=True)]
    working = ", ".join(f"{name} {count}" for name, count in zip(libraries, counts, strict=True))
    text = f"""# What each library does

This page is for users who choose a library. It puts small, untrained flows of each library through the same tests. Each
flow is built as in its library's manual. Both directions work for this many kinds of flows: {working}.
[Comparison](../comparison.md) draws the conclusions. Reproduce with `python benchmarks/comparison.py`, about ten
minutes of one core.

Versions: torch {torch.__version__.split("+")[0]}, Python {platform.python_version()}, and those in the tables.

## Flows

All parameters are moved away from their initial values.

* *both*: the flow scores values that it did not draw. Their density integrates to one (± 3 %), and draws have its
  moments.
* *draws and density differ*: one of these conditions fails.
* *draws only*, *scores only*: the other direction raises an error.
* –: the library has no such flow.

{table("flow", kinds, names)}

## Behaviour

Rows without a named flow test an affine coupling flow and an affine autoregressive flow. *no* is a wrong answer or an
error. –: the question does not apply to arrays that never change. Work is counted in multiplications of matrix
products. The slow direction runs feature by feature: scoring for Pyro and normflows, sampling for the others.

{table("", answers, names)}
"""
    if set(libraries) == set(LIBRARIES) or options.out:
        folder = options.out or OUT
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
