"""Pyro programs with their arguments: the models that ``training.py`` trains guides on.

Most come from Pyro's own tutorials and examples.  Their code is not copied: ``taken`` runs their definitions,
unchanged, from the checkout of Pyro's repository that ``PYRO_FLOWS_PYRO`` names.  Tables that the tutorials download
are simulated, so that results are the same with and without a network.  Four more are posteriors of ``targets.py``.

Every build is deterministic, restores the random state, and makes new modules.  Training changes modules, so build a
program for each run.
"""

import ast
import dis
import functools
import itertools
import json
import linecache
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import pyro
import pyro.distributions as dist
import targets
import torch
from mnist import mnist
from pyro import poutine
from pyro.contrib.forecast.util import time_reparam_dct
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.ops.tensor_utils import periodic_features
from torch import Tensor, nn

from pyro_flows.encoders import MLPEncoder

Built = TypeVar("Built")


class Program(NamedTuple):
    """Pyro model with its arguments, and the options of its training loop.

    Attributes:
        model: The model.
        args: Its arguments.
        kwargs: Its named arguments.
        plate: The plate of an ``AutoPlateFlow``, if latents are local and rows come in minibatches.
        encoder: Builder of the encoder of that guide.
        scalable: False if a covariance matrix of all latents is too large.
        batched: False if the model does not broadcast over ``vectorize_particles=True``.
        elbo: Builder of Pyro's ELBO for the model, with the arguments of ``Trace_ELBO``.
        dtype: The default dtype to set before the program is built.
        batches: Builder of an endless iterator of the arguments of each step, if rows come in minibatches.
        own_guide: The guide that the example trains, if it is not an autoguide.
        hide: Discrete sites that the ELBO sums out.
        flat: True if a prior is flat, so that Pyro's guides need a start.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    plate: str | None = None
    encoder: Callable[[], nn.Module] | None = None
    scalable: bool = True
    batched: bool = True
    elbo: Callable[..., Any] = Trace_ELBO
    dtype: torch.dtype = torch.float32
    batches: Callable[[], Iterator[tuple[Any, ...]]] | None = None
    own_guide: Callable[..., Any] | None = None
    hide: tuple[str, ...] = ()
    flat: bool = False

    @property
    def guided(self) -> Callable[..., Any]:
        """The model to build a guide from: without the sites that the ELBO sums out."""
        return poutine.block(self.model, hide=[*self.hide]) if self.hide else self.model


def source(name: str) -> tuple[Path, str]:
    """Return the path and the Python code of a file or notebook in the checkout of Pyro's repository."""
    folder = os.environ.get("PYRO_FLOWS_PYRO")
    path = Path(folder or ".") / name
    if not folder or not path.is_file():
        found = f"{path} is missing" if folder else "PYRO_FLOWS_PYRO is not set"
        sys.exit(
            f"source: {name} must be in a checkout of Pyro's repository, but {found}. Run `git clone "
            "https://github.com/pyro-ppl/pyro` and set PYRO_FLOWS_PYRO to the folder that it makes."
        )
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = (cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
        text = "\n".join("".join(lines) for lines in cells)
        text = re.sub(r"(?m)^(?:%|( *)!).*", r"\1pass", text)  # IPython's commands
    return path, text


def bound_by(statement: ast.stmt) -> set[str]:
    """Return the names that a definition, an import or an assignment binds; empty for other statements."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign):
        nodes = (node for target in statement.targets for node in ast.walk(target))
        return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return set()


def read_by(code: CodeType) -> set[str]:
    """Return the global names that code and the functions in it read."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(read_by(part) for part in code.co_consts if isinstance(part, CodeType)))


def taken(name: str, *wanted: str, nth: int | None = None, **given: Any) -> list[Any]:
    """Return the values of global names in a file of Pyro's repository.

    For each name the last statement that binds it runs.  The statements that bind what it reads run before it, except
    for names that are given.  The rest of the file does not run: downloads, plots and training.  With ``nth`` the file
    is read only up to the nth statement, from 1, that binds the first name.
    """
    path, text = source(name)
    body = ast.parse(text).body
    if nth is not None:
        body = body[: [i for i, node in enumerate(body) if wanted[0] in bound_by(node)][nth - 1] + 1]
    binding = {key: node for node in body for key in bound_by(node) if key not in given}
    needed, pending = set[ast.stmt](), [*wanted]
    while pending:
        node = binding.get(pending.pop())
        if node is not None and node not in needed:
            needed.add(node)
            pending += read_by(compile(ast.Module([node], []), str(path), "exec"))
    scope = {"__name__": path.stem, **given}
    body = sorted(needed, key=lambda node: node.lineno)
    linecache.cache[str(path)] = len(text), None, text.splitlines(keepends=True), str(path)  # errors quote this text
    exec(compile(ast.Module(body, []), str(path), "exec"), scope)
    if missing := [key for key in wanted if key not in scope]:
        sys.exit(f"taken: {name} must define {missing[0]}. Use a checkout of Pyro 1.9.1 or later.")
    return [scope[key] for key in wanted]


def seeded(build: Callable[[], Built]) -> Callable[[], Built]:
    """Return the build with a fixed seed; it restores the random state."""

    def built() -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build()

    return built


def drawn(*shape: int) -> Tensor:
    """Return standard normal draws, the same numbers for every default dtype."""
    return torch.randn(shape, dtype=torch.float64).to(torch.get_default_dtype())


def conjugate() -> Program:
    """Return four standard normal latents, each observed once with unit noise."""
    y = torch.tensor([1.0, -1.0, 2.0, -2.0])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    return Program(model)


def bayesian_regression() -> Program:
    """Return the regression of bayesian_regression.ipynb on 170 simulated rows.

    The columns are Africa, ruggedness, their product and log GDP.
    """
    (kind,) = taken("tutorial/source/bayesian_regression.ipynb", "BayesianRegression")
    africa = (torch.arange(170) % 10 < 3).to(torch.get_default_dtype())
    rugged = drawn(170).abs() * 1.3
    x = torch.stack((africa, rugged, africa * rugged), -1)
    y = 9.2 - 1.9 * africa - 0.2 * rugged + 0.4 * africa * rugged + 0.9 * drawn(170)
    return Program(kind(3, 1), (x, y), batched=False)


def neutra() -> Program:
    """Return the banana of examples/neutra.py, at the example's defaults."""
    (model,) = taken("examples/neutra.py", "model")
    return Program(model, (1.15, 1.0))


def target(name: str) -> Program:
    """Return a posterior of ``targets.py``."""
    return Program(targets.load(name).model, dtype=torch.float64, flat=name == "kidiq")


def bnn() -> Program:
    """Return a Bayesian network of two hidden layers, 2,042 latents, on 300 simulated rows of 8 features."""
    x = drawn(300, 8)
    y = torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.1 * drawn(300)
    widths = 8, 40, 40, 1

    def model(x: Tensor, y: Tensor) -> None:
        h = x
        for i, (n, m) in enumerate(itertools.pairwise(widths)):
            weight = pyro.sample(f"weight{i}", dist.Normal(x.new_zeros(n, m), n**-0.5).to_event(2))
            bias = pyro.sample(f"bias{i}", dist.Normal(x.new_zeros(1, m), 1.0).to_event(2))
            h = (h.tanh() if i else h) @ weight + bias
        sigma = pyro.sample("sigma", dist.HalfNormal(x.new_ones(())))
        pyro.sample("y", dist.Normal(h.squeeze(-1), sigma.unsqueeze(-1)).to_event(1), obs=y)

    return Program(model, (x, y), scalable=False)


def stable() -> Program:
    """Return the reparametrised stochastic volatility of stable.ipynb, on 200 simulated returns: 1,005 latents."""
    (model,) = taken("tutorial/source/stable.ipynb", "reparam_model")
    volatility = 0.01 * (0.015 * drawn(200).cumsum(0)).exp()
    returns = dist.Stable(1.9, 0.0, volatility, 0.03 * volatility).sample()
    return Program(model, (returns,), scalable=False)


def lda() -> Program:
    """Return the topic model of examples/lda.py with 564 latents; word topics are summed out, as there.

    The number of words is limited by float32.  With 96 words, draws from near the prior, Dirichlet(1 / words), have
    probabilities that float32 rounds to 0.  Their log-density is infinite, and even AutoNormal ends in NaN, at step
    size .03 after 816 steps.
    """
    (model,) = taken("examples/lda.py", "model")
    sizes = SimpleNamespace(num_topics=8, num_words=32, num_docs=44, num_words_per_doc=64)
    data = model(args=sizes)[-1]
    elbo = functools.partial(TraceEnum_ELBO, max_plate_nesting=2)
    return Program(model, (data,), {"args": sizes}, scalable=False, batched=False, elbo=elbo, hide=("word_topics",))


def forecasting_i(number: int) -> Program:
    """Return a model of forecasting_i.ipynb as its Forecaster trains it, on simulated log ridership of 469 weeks."""
    week = torch.arange(469, dtype=torch.get_default_dtype())
    level = 14.3 + 0.0004 * week - 0.1 * (2 * torch.pi * week / 52.18).cos() + 0.005 * drawn(469).cumsum(0)
    data = (level + 0.02 * drawn(469) - 0.1 * (drawn(469) > 2)).unsqueeze(-1)  # holidays make the noise skewed
    kind, end = taken("tutorial/source/forecasting_i.ipynb", f"Model{number}", "T1", data=data)
    covariates = periodic_features(469, 365.25 / 7).to(data)
    if number == 1:
        covariates = torch.cat(((week / 365).unsqueeze(-1), covariates), -1)
    model = kind() if number == 1 else poutine.reparam(kind(), time_reparam_dct)
    return Program(model, (data[:end], covariates[:end]), scalable=number == 1, elbo=FORECASTER_ELBO)


def forecasting_ii(number: int) -> Program:
    """Return a model of forecasting_ii.ipynb as its Forecaster trains it, on simulated hourly log ridership."""
    hour = torch.arange(HOURS[number], dtype=torch.get_default_dtype())
    cycle = 8 - 2 * (2 * torch.pi * hour / 24).cos() - 0.5 * (2 * torch.pi * hour / 168).cos()
    walk = torch.zeros(())
    walks = [walk := 0.96 * walk + 0.05 * noise for noise in drawn(len(hour))]
    data = (cycle + torch.stack(walks) + 0.1 * drawn(len(hour))).unsqueeze(-1)
    kind, end = taken("tutorial/source/forecasting_ii.ipynb", f"Model{number}", "T1", data=data)
    args = data[:end], data.new_zeros(end, 0)
    return Program(kind(), args, scalable=number < 3, elbo=FORECASTER_ELBO)


def vae() -> Program:
    """Return the autoencoder of examples/vae/vae.py on MNIST's grey values, in the example's minibatches of 256."""
    (kind,) = taken("examples/vae/vae.py", "VAE")
    grey = (mnist("train")[0].flatten(1) / 255).to(torch.get_default_dtype())
    own = kind()

    def batches() -> Iterator[tuple[Tensor]]:
        order = torch.Generator().manual_seed(0)
        while True:
            for rows in torch.randperm(len(grey), generator=order).split(256)[:-1]:  # the last one is smaller
                yield (grey[rows],)

    def encoder() -> MLPEncoder:
        return MLPEncoder(784, 100, (400,))

    return Program(own.model, next(batches()), plate="data", encoder=encoder, batches=batches, own_guide=own.guide)


FORECASTER_ELBO = functools.partial(Trace_ELBO, max_plate_nesting=1)  # Forecaster makes room for its time plate
HOURS = {1: 2016, 2: 2016, 3: 672}  # of each model of forecasting_ii.ipynb, the last two weeks held out
TARGETS = "eight_schools", "eight_schools_centered", "kidiq", "german_credit_sparse"
FORECASTS = forecasting_i, forecasting_ii
BUILDS = conjugate, bayesian_regression, neutra, bnn, stable, lda, vae
PROGRAMS: dict[str, Callable[[], Program]] = {
    **{build.__name__: seeded(build) for build in BUILDS},
    **{f"{build.__name__}_{i}": seeded(functools.partial(build, i)) for build in FORECASTS for i in (1, 2, 3)},
    **{name: functools.partial(target, name) for name in TARGETS},
}
