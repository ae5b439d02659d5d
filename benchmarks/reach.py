"""Test of the guides on the programs of Pyro's examples and tutorials.

    python benchmarks/reach.py                   # all programs, 2 at a time
    python benchmarks/reach.py --only gmm lda    # some programs, again
    python benchmarks/reach.py --trace gmm       # one program in this process, with the whole error
    python benchmarks/reach.py --list            # names of the programs

Each program of ``reach_programs.py`` is a model of Pyro's repository, unchanged, with small simulated data.  It runs
the calls of a user: ``guide = pf.AutoFlow(model)``, or ``pf.AutoPlateFlow`` if latents are local to the rows of a
plate; ``pf.fit_svi`` with few steps; ``pf.check``; ``pf.to_arviz``; Pyro's ``Predictive``.  The verdict of ``check`` is
ignored, because the fit is short.

The outcomes:

* *works*: The four calls end without an error, and draws are finite.  The log-densities of ``to_arviz`` are those of
  the plain model at the same draws, with its discrete latents summed out by Pyro.
* *refused*: an error that this package raises.
* *crash*: any other error, or the time limit.
* *wrong*: no error, but values that fail the test above.
* *left out*: the program has no continuous latent, or the model does not run by itself.

If the fit fails, the other calls are not tried.  Each program runs in its own process.  Results are saved after each
program, and an interrupted benchmark continues.  Remove ``reach.csv`` after a change of the guides.  Needs
``PYRO_FLOWS_PYRO``, a checkout of Pyro's repository.  Writes ``docs/benchmarks/reach.md`` and ``reach.csv``.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import pyro
import torch
from programs import source
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer import Predictive, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.enum import iter_discrete_traces
from pyro.poutine.util import site_is_subsample
from reach_programs import PROGRAMS, Case
from torch.distributions import biject_to

import pyro_flows as pf

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
PACKAGE = Path(pf.__file__).resolve().parent
CALLS = "fit", "check", "arviz", "predictive"
COLUMNS = "program", "where", "latents", "discrete", *CALLS, "outcome", "reason", "seconds"
OUTCOMES = "works", "refused", "crash", "wrong", "left out"
STEPS, DRAWS, CHAINS, PREDICTIONS, COMPARED = 50, 100, 16, 20, 3
NESTING = 6  # largest number of nested plates
IDLE = 5  # largest ratio of wall time to processor time, on a busy machine
MOST = 1000  # largest number of discrete values to sum one by one
ELSEWHERE = {  # files without a program
    "examples/contrib/oed/gp_bayes_opt.py": "the Gaussian process of ab_test.py, without priors: no latent",
    "examples/contrib/timeseries/gp_models.py": "a torch module with a log-density, no Pyro model",
    "examples/einsum.py": "no Pyro model",
    "examples/mixed_hmm/experiment.py": "runs the model of mixed_hmm/model.py",
    "examples/cvae/baseline.py": "a torch network, no Pyro model",
    "examples/rsa/generics.py": "discrete sites only, run by a search over executions",
    "examples/rsa/hyperbole.py": "discrete sites only, run by a search over executions",
    "examples/rsa/schelling.py": "discrete sites only, run by a search over executions",
    "examples/rsa/schelling_false.py": "discrete sites only, run by a search over executions",
    "examples/rsa/semantic_parsing.py": "discrete sites only, run by a search over executions",
    "tutorial/source/RSA-hyperbole.ipynb": "discrete sites only, run by a search over executions",
    "tutorial/source/RSA-implicature.ipynb": "discrete sites only, run by a search over executions",
    "tutorial/source/contrib_funsor_intro_i.ipynb": "no Pyro model",
    "tutorial/source/custom_objectives.ipynb": "no code that runs",
    "tutorial/source/cvae.ipynb": "the text of examples/cvae",
    "tutorial/source/dmm.ipynb": "the text of examples/dmm.py",
    "tutorial/source/normalizing_flows_intro.ipynb": "distributions alone, no Pyro model",
    "tutorial/source/ss-vae.ipynb": "two methods of the class of examples/vae/ss_vae_M2.py",
    "tutorial/source/svi_part_ii.ipynb": "no code that runs",
    "tutorial/source/svi_part_iv.ipynb": "no code that runs",
}
Row = dict[str, str]


def latents_of(case: Case) -> tuple[dict[str, int], list[str]]:
    """Return the number of unconstrained coordinates of each continuous latent, and the names of the discrete ones."""
    numbers: dict[str, int] = {}
    discrete = []
    for name, site in run_of(case).nodes.items():
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            continue
        fn = site["fn"]
        while isinstance(fn, (pyro.distributions.Independent, MaskedDistribution)):
            fn = fn.base_dist
        if isinstance(fn, pyro.distributions.Delta):
            continue
        if not has_support(fn):
            numbers[name] = site["value"].numel()
        elif fn.support.is_discrete:
            discrete.append(name)
        else:
            numbers[name] = biject_to(site["fn"].support).inv(site["value"]).numel()
    return numbers, discrete


def has_support(fn: Any) -> bool:
    """True if a distribution has a support; a flow of zuko lacks one."""
    try:
        return fn.support is not None
    except NotImplementedError:
        return False


def centre(site: dict[str, Any]) -> torch.Tensor:
    """Return a value in the support of a latent, for priors that do not sample."""
    to_support = biject_to(site["fn"].support)
    return to_support(torch.zeros(to_support.inverse_shape(site["fn"].shape())))


def run_of(case: Case) -> poutine.Trace:
    """Return a trace of the model without a guide.

    If it fails, it runs again from a start in the support (improper priors), and then with enumerated discrete latents.
    """
    enumerated = [poutine.enum(case.model, first_available_dim=-1 - nesting) for nesting in range(NESTING)]
    try:
        return poutine.trace(case.model).get_trace(*case.args, **case.kwargs)
    except Exception as error:
        for model in (InitMessenger(centre)(case.model), *enumerated):
            with contextlib.suppress(Exception):
                return poutine.trace(model).get_trace(*case.args, **case.kwargs)
        raise error


def differing(case: Case, container: Any, latents: Iterable[str]) -> str:
    """Return the fault of a container of ``to_arviz``, or an empty text.

    The stored log-density must be that of the plain model at the same draws.
    """
    posterior, stored = container["posterior"], container["sample_stats"]["log_p"].values[0]
    values = {name: torch.as_tensor(posterior[name].values[0]) for name in latents}
    for name, draws in values.items():
        if not draws.isfinite().all():
            return f"to_arviz: draws of {name!r} are not finite"
    for draw in range(COMPARED):
        model = poutine.condition(case.model, {name: draws[draw] for name, draws in values.items()})
        wanted, again = (log_density(case._replace(model=model)) for _ in range(2))
        if wanted is None or again != wanted:  # the model draws random numbers itself
            return ""
        if abs(wanted - stored[draw]) > 1e-2 + 1e-3 * abs(wanted):
            return f"to_arviz: log_p is {stored[draw]:.6g}, but the model gives {wanted:.6g} at the same draw"
    return ""


def log_density(case: Case) -> float | None:
    """Return log p(latents, data) of a model with given continuous latents; discrete ones are summed out.

    Pyro takes the sum, in parallel, or else with one run of the model per value.  None if there are too many values, or
    if the model subsamples rows, so that the density is not a single number.
    """
    trace = run_of(case)
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    if any(site_is_subsample(site) and len(site["value"]) < site["fn"].size for site in sites):
        return None
    if all(site["is_observed"] or site_is_subsample(site) for site in sites):
        return float(trace.log_prob_sum())
    with contextlib.suppress(Exception):
        model = config_enumerate(case.model)
        elbo = TraceEnum_ELBO(max_plate_nesting=NESTING, strict_enumeration_warning=False)
        return -elbo.loss(model, lambda *args, **kwargs: None, *case.args, **case.kwargs)
    with contextlib.suppress(Exception):
        model = config_enumerate(case.model, "sequential")
        traces = iter_discrete_traces("flat", model, *case.args, **case.kwargs)
        terms = [run.log_prob_sum() for run in itertools.islice(traces, MOST + 1)]
        return float(torch.stack(terms).logsumexp(0)) if len(terms) <= MOST else None
    return None


def walk(name: str, tell: Callable[[Row], None], strict: bool = False) -> None:
    """Run all calls on a program, and report the row after each call."""
    row: Row = {"program": name, "where": PROGRAMS[name].where} | dict.fromkeys(CALLS, "–")
    try:
        latents, discrete = latents_of(PROGRAMS[name].build())
    except (Exception, SystemExit) as error:
        if strict:
            raise
        tell(row | {"outcome": "left out", "reason": f"does not run by itself: {named(error)}"})
        return
    row |= {"latents": str(sum(latents.values())), "discrete": str(len(discrete))}
    if not latents:
        tell(row | {"outcome": "left out", "reason": "no continuous latent"})
        return
    pyro.clear_param_store()
    case = PROGRAMS[name].build()
    state: dict[str, Any] = {}
    judged = case.args if case.judged is None else case.judged

    def fit() -> str:
        if case.plate:
            state["guide"] = pf.AutoPlateFlow(case.model, case.plate, encoder=case.encoder)
        else:
            state["guide"] = pf.AutoFlow(case.model, init_loc_fn=case.start)
        pf.fit_svi(case.model, state["guide"], *case.args, steps=STEPS, progress=False, **case.kwargs)
        if case.network is not None:
            case.network.eval()
        return ""

    def check() -> str:
        pf.check(case.model, state["guide"], *judged, num_samples=DRAWS, num_chains=CHAINS, **case.kwargs)
        return ""

    def arviz() -> str:
        container = pf.to_arviz(case.model, state["guide"], *judged, num_samples=DRAWS, **case.kwargs)
        return differing(case._replace(args=judged), container, latents)

    def predictive() -> str:
        draws = predictions(case, state["guide"])
        broken = [key for key, value in draws.items() if len(value) != PREDICTIONS or value.isnan().any()]
        return f"Predictive: draws of {broken[0]!r} are not finite, or not as many as asked for" if broken else ""

    for call, act in zip(CALLS, (fit, check, arviz, predictive), strict=True):
        tell(row | {call: "timeout", "outcome": "crash", "reason": f"{call}: no end within the time limit"})
        pyro.set_rng_seed(0)
        try:
            reason = act()
            row[call] = "wrong" if reason else "yes"
        except Exception as error:
            if strict:
                raise
            row[call], reason = ("refused" if ours(error) else "crash"), named(error)
            if call == "predictive" and fails_without_us(case):
                row[call], reason = "not by Pyro", f"Predictive, without this package too: {reason}"
        if reason:
            row.setdefault("reason", reason)
        if row["fit"] != "yes":
            break
    found = [outcome for outcome in ("crash", "wrong", "refused") if outcome in row.values()]
    tell(row | {"outcome": found[0] if found else "works"})


def predictions(case: Case, guide: Any) -> dict[str, torch.Tensor]:
    """Return the draws of Pyro's ``Predictive``."""
    args = case.args if case.predict is None else case.predict
    return Predictive(case.model, guide=guide, num_samples=PREDICTIONS)(*args, **case.kwargs)


def fails_without_us(case: Case) -> bool:
    """True if ``Predictive`` also fails with Pyro's own guide, or without a guide if that guide cannot be built."""
    guide: Any = AutoNormal(case.model)
    try:
        guide(*case.args, **case.kwargs)
    except Exception:
        guide = None
    try:
        predictions(case, guide)
    except Exception:
        return True
    return False


def ours(error: BaseException) -> bool:
    """True if the package itself raises the error, with its own message."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    inside = PACKAGE in Path(last.filename).resolve().parents
    return inside and str(last.line).lstrip().startswith("raise ")


def named(error: BaseException) -> str:
    """Return the type and the first line of an error, without paths of this machine."""
    text = str(error).partition("Trace Shapes:")[0]  # Pyro's table follows
    lines = [line for line in text.splitlines() if line.strip()]
    return re.sub(r"(/[\w.+-]+){2,}/", "…/", f"{type(error).__name__}: {lines[0] if lines else ''}").strip()


def worker(name: str, limit: float) -> None:
    """Run one program in this process; each line of the output is the row so far.

    The limit is on processor time, because other work on the machine must not count.
    """
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 5))
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        walk(name, lambda row: print(json.dumps(row | {"seconds": f"{time.process_time():.0f}"}), file=output))


def run(name: str, limit: float) -> Row:
    """Run one program in a new process and return its row."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--limit", str(limit)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
    try:
        output, errors = process.communicate(timeout=IDLE * limit)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
    lines = [line for line in output.splitlines() if line.startswith("{")]
    row: Row = {"program": name, "where": PROGRAMS[name].where, "outcome": "crash", "reason": "no output"}
    row |= {"reason": ""} | json.loads(lines[-1]) if lines else {}
    if process.returncode > 0:
        row |= {"outcome": "crash", "reason": errors.strip().splitlines()[-1] if errors.strip() else "no message"}
    elif process.returncode < 0:
        row |= {"seconds": f"{limit:.0f}"}
    return row


def saved(path: Path) -> dict[str, Row]:
    """Return the rows of a file by program."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["program"]: row for row in csv.DictReader(file) if row["program"] in PROGRAMS}


def write(file: TextIO, rows: dict[str, Row]) -> None:
    """Write the rows, in the order of the programs."""
    table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows[name] for name in PROGRAMS if name in rows)


def save(path: Path, rows: dict[str, Row]) -> None:
    """Write the rows into a file, after creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        write(file, rows)


def cell(text: str, width: int = 240) -> str:
    """Return text for a cell of a Markdown table."""
    text = text if len(text) <= width else text[: width - 1].rstrip() + "…"
    for old, new in (("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("_", "\\_"), ("`", "\\`"), ("[", "\\[")):
        text = text.replace(old, new)
    return text


def kind_of(reason: str) -> str:
    """Return an error without its names and numbers, so that similar errors are equal."""
    reason = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", reason)
    reason = re.sub(r"sites? '…'(, '…')*( and '…')? (is|are)", "site '…' is", reason)
    reason = re.sub(r"does not run vectorised over draws: .*", "does not run vectorised over draws: …", reason)
    reason = re.sub(r"^(.*?[.;] ).*", r"\1…", reason)
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "0", reason)[:160]


def table(header: str, rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [header, "|" + "---|" * (header.count("|") - 1), *(f"| {' | '.join(row)} |" for row in rows), ""]


def page(rows: dict[str, Row]) -> str:
    """Return the page of the results."""
    run_ = [rows[name] for name in PROGRAMS if name in rows]
    entered = [row for row in run_ if row["outcome"] != "left out"]
    counts = collections.Counter(row["outcome"] for row in entered)
    failed = [row for row in entered if row["outcome"] != "works"]
    reasons = collections.defaultdict(list)
    for row in failed:
        reasons[kind_of(row["reason"])].append(row["program"])
    files = len({row["where"] for row in entered})
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyro-ppl"))
    lines = [
        "# Reach",
        "",
        "This page is for users who ask whether their kind of model runs. All models of Pyro's examples and tutorials",
        "with a continuous latent are tested, unchanged, with small simulated data. Each runs the calls of a first",
        "session: a guide, `fit_svi`, `check`, `to_arviz` and Pyro's `Predictive`. "
        f"Of {len(entered)} programs from {files} files, "
        + ", ".join(f"{counts[outcome]} {label}" for outcome, label in SUMMARY.items() if counts[outcome])
        + ".",
        "",
        "Reproduce with `python benchmarks/reach.py`, where `PYRO_FLOWS_PYRO` names a checkout of Pyro. "
        + f"{versions}, Python {platform.python_version()}. The limit is 180 s of processor time per program.",
        "",
        "## Programs",
        "",
        "Find a model like yours in the table. Its row says which calls work, and quotes the error.",
        "",
        "* *latents*: the number of unconstrained coordinates. *discrete*: the number of discrete sites.",
        "* `–`: the call was not tried.",
        "* *not by Pyro*: `Predictive` also fails with Pyro's `AutoNormal`, or without a guide. This does not count as "
        "an error.",
        "",
    ]
    lines += table(
        "| program | from | latents | discrete | fit | check | arviz | predictive | outcome | error |",
        (
            [row["program"], short(row["where"]), row["latents"], row["discrete"]]
            + [*(row[call] for call in CALLS), f"**{row['outcome']}**" if row in failed else "works"]
            + [cell(row["reason"])]
            for row in entered
        ),
    )
    if failed:
        lines += ["## Errors", "", "The errors by kind, without names and numbers.", ""]
        groups = sorted(reasons.items(), key=lambda group: -len(group[1]))
        lines += table(
            "| programs | error | for example |", ([str(len(n)), cell(kind), ", ".join(n[:3])] for kind, n in groups)
        )
    lines += ["## Left out", "", "Programs without a continuous latent, and those that do not run by themselves.", ""]
    lines += table(
        "| program | from | why |",
        ([row["program"], short(row["where"]), cell(row["reason"])] for row in run_ if row["outcome"] == "left out"),
    )
    lines += ["Files without a program:", ""]
    lines += table("| file | why |", ([short(where), why] for where, why in ELSEWHERE.items()))
    return "\n".join([*lines, *LIMITS])


SUMMARY = {"works": "work", "refused": "are refused", "crash": "crash", "wrong": "give wrong values"}
LIMITS = (
    "## Limits",
    "",
    f"* A fit has {STEPS} steps, so *works* says that a program runs. It does not say that the posterior is good.",
    "* The data are small. Memory and time of the full examples are not measured here.",
    "* Stored log-densities are compared with the plain model, with two exceptions. One is a model that subsamples",
    "  rows or draws random numbers itself. The other is a model with too many discrete values to sum out.",
    "* In Pyro's `VariationalGP` and `VariationalSparseGP` the likelihood depends on the parameters of Pyro's guide,",
    "  not on the latents. Another guide runs, but finds the prior.",
    "* Networks have the architecture of the examples, with smaller layers.",
    "",
)


def short(where: str) -> str:
    """Return the path of a file as the page shows it."""
    return where.removeprefix("tutorial/source/")


def check_complete() -> None:
    """Exit with an error unless every example with a model, and every tutorial, is a program or has a reason."""
    folder = source("examples/hmm.py")[0].parents[1]
    known = {entry.where for entry in PROGRAMS.values()} | {*ELSEWHERE}
    files = [*(folder / "examples").rglob("*.py"), *(folder / "tutorial" / "source").glob("*.ipynb")]
    for path in sorted(files):
        name = path.relative_to(folder).as_posix()
        text = path.read_text(encoding="utf-8")
        has_model = path.suffix == ".ipynb" or re.search(r"pyro\.sample\(|\.sample_\(|PyroSample", text)
        if has_model and name not in known:
            sys.exit(f"reach: {name} must be in PROGRAMS or ELSEWHERE, but is in neither. Add it.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, metavar="NAME", help="programs to run again")
    parser.add_argument("--list", action="store_true", help="list the programs")
    parser.add_argument("--trace", choices=PROGRAMS, metavar="NAME", help="run one program here, with the whole error")
    parser.add_argument("--jobs", type=int, default=2, help="parallel programs")
    parser.add_argument("--limit", type=float, default=180, help="seconds of processor time per program")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    parser.add_argument("--worker", choices=PROGRAMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker:
        return worker(options.worker, options.limit)
    if options.trace:
        return walk(options.trace, print, strict=True)
    if options.list:
        for name, entry in PROGRAMS.items():
            print(f"{name:40} {entry.where}")
        return None
    check_complete()
    path = options.out / "reach.csv"
    rows = saved(path)
    wanted = options.only or [name for name in PROGRAMS if name not in rows]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for done in concurrent.futures.as_completed([pool.submit(run, name, options.limit) for name in wanted]):
            row = done.result()
            rows[row["program"]] = row
            save(path, rows)
            print(f"{row['program']:36} {row['outcome']:9} {row['seconds']:>4} s  {row['reason'][:100]}", flush=True)
    (options.out / "reach.md").write_text(page(saved(path)), encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
