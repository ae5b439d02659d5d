"""Programs of ``reach.py``: the models of Pyro's examples and tutorials, each with small simulated data.

Their code is not copied: ``taken`` of ``programs.py`` runs their definitions, unchanged, from the checkout of Pyro's
repository that ``PYRO_FLOWS_PYRO`` names.  A builder adds what the file downloads, simulates or reads from its command
line.  Sizes are small, because a program shows only that it runs, not how well it fits.
"""

import ast
import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from programs import drawn, seeded, source, taken
from pyro import poutine
from pyro.contrib import gp
from pyro.contrib.forecast.util import time_reparam_dct
from pyro.infer import config_enumerate
from pyro.infer.reparam import DiscreteCosineReparam, LocScaleReparam, StableReparam
from torch import Tensor, nn, tensor

from pyro_flows.encoders import MLPEncoder


class Case(NamedTuple):
    """Model with the arguments of a user.

    Attributes:
        model: The model.
        args: Its arguments.
        kwargs: Its named arguments.
        predict: The arguments of predictions, without the observed data if the model allows it.
        judged: The arguments of ``check`` and ``to_arviz``, with all data, for a model trained on minibatches.
        start: The start of the guide, for a program whose own inference has one.
        plate: The plate of an ``AutoPlateFlow``, if latents are local to rows.
        encoder: The encoder of that guide.
        network: A module to set to evaluation mode after the fit, as the example does.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    predict: tuple[Any, ...] | None = None
    judged: tuple[Any, ...] | None = None
    start: Callable[..., Any] | None = None
    plate: str | None = None
    encoder: nn.Module | None = None
    network: nn.Module | None = None


class Entry(NamedTuple):
    """Program: the file that defines it, and its builder."""

    where: str
    build: Callable[[], Case]


PROGRAMS: dict[str, Entry] = {}


def program(where: str, *choices: Any) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Register a builder under its name, or one program per choice under the name and the choice."""
    folder = "" if where.startswith("examples/") else "tutorial/source/"

    def register(build: Callable[..., Case]) -> Callable[..., Case]:
        if not choices:
            PROGRAMS[build.__name__] = Entry(folder + where, seeded(build))
        for choice in choices:
            built = functools.partial(build, choice)
            PROGRAMS[f"{build.__name__}_{choice}"] = Entry(folder + where, seeded(built))
        return build

    return register


def of(name: str, *wanted: str, nth: int | None = None, **given: Any) -> Any:
    """Return the values of one or several global names of a file; its folder is put on the import path."""
    path = name if name.startswith("examples/") else f"tutorial/source/{name}"
    folder = str(source(path)[0].parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    found = taken(path, *wanted, nth=nth, **given)
    return found[0] if len(found) == 1 else found


def inside(name: str, outer: str, inner: str, **given: Any) -> Any:
    """Return a function that is defined inside another one."""
    path, text = source(name)
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    body: list[ast.stmt] = [n for n in functions[outer].body if isinstance(n, ast.FunctionDef) and n.name == inner]
    exec(compile(ast.Module(body, []), str(path), "exec"), given)
    return given[inner]


class OfFirst(nn.Module):
    """Encoder of the rows of the model's first argument."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = MLPEncoder(width, 16, (32,))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.network(x.reshape(len(x), -1).to(torch.get_default_dtype()))


def bits(*shape: int) -> Tensor:
    """Return random zeros and ones."""
    return (drawn(*shape) > 0).to(torch.get_default_dtype())


def given(model: Callable[..., Any], **data: Tensor) -> Callable[..., Any]:
    """Return the model conditioned on data, as in the tutorial."""
    return poutine.condition(model, data)


# Introductions


def rows(count: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Return the columns of the rugged table: Africa, ruggedness, log GDP."""
    africa = (torch.arange(count) % 10 < 3).to(torch.get_default_dtype())
    rugged = drawn(count).abs() * 1.3
    gdp = 9.2 - 1.9 * africa - 0.2 * rugged + 0.4 * africa * rugged + 0.9 * drawn(count)
    return africa, rugged, gdp


@program("intro_long.ipynb", "simple_model", "model")
def intro_long(name: str) -> Case:
    africa, rugged, gdp = rows()
    return Case(of("intro_long.ipynb", name), (africa, rugged, gdp), predict=(africa, rugged))


@program("intro_part_i.ipynb", "weather", "ice_cream_sales", "geometric", "make_normal_normal")
def intro_part_i(name: str) -> Case:
    model = of("intro_part_i.ipynb", name)
    if name == "ice_cream_sales":
        model = given(model, ice_cream=tensor(180.0))
    if name == "make_normal_normal":
        return Case(lambda scale: model()(scale), (1.0,))
    return Case(model, (0.5,) if name == "geometric" else ())


@program("intro_part_ii.ipynb", "scale", "deferred_conditioned_scale", "scale_obs")
def intro_part_ii(name: str) -> Case:
    model = of("intro_part_ii.ipynb", name)
    if name == "scale":
        return Case(given(model, measurement=tensor(9.5)), (8.5,))
    return Case(model, (tensor(9.5), 8.5) if name.startswith("deferred") else (8.5,))


@program("model_rendering.ipynb", 1, 2, 3, 4)
def model_rendering(number: int) -> Case:
    model = of("model_rendering.ipynb", "model", nth=number)
    x = tensor([0.3, -0.4])
    return Case(model, ((torch.ones(10),), (torch.ones(10),), (), (x, None))[number - 1])


@program("model_rendering.ipynb")
def mace() -> Case:
    model, positions = of("model_rendering.ipynb", "mace", "positions")
    annotations = torch.randint(0, 4, (12, len(positions)))
    return Case(model, (positions - 1, annotations))


@program("model_rendering.ipynb")
def model_deterministic() -> Case:
    return Case(of("model_rendering.ipynb", "model_deterministic"), (torch.ones(5),))


@program("tensor_shapes.ipynb", 1, 2, 3, 4)
def tensor_shapes(number: int) -> Case:
    nth = 1 if number == 4 else None
    return Case(of("tensor_shapes.ipynb", f"model{number}", nth=nth, enumerated=False, data=drawn(100)))


@program("modules.ipynb", "GlobalModel", "LocalModel")
def modules(name: str) -> Case:
    return Case(of("modules.ipynb", name)(), (drawn(10),))


@program("modules.ipynb")
def modules_linear() -> Case:
    x = drawn(20, 5)
    return Case(of("modules.ipynb", "Model", nth=1)(5, 2), (x, x[:, :2] + 1 + 0.3 * drawn(20, 2)), predict=(x,))


@program("modules.ipynb")
def modules_prior() -> Case:
    return Case(of("modules.ipynb", "Model", nth=2)())


@program("effect_handlers.ipynb", "scale", "biased_scale")
def effect_handlers(name: str) -> Case:
    return Case(given(of("effect_handlers.ipynb", name), measurement=tensor(9.5)), (8.5,))


@program("svi_part_i.ipynb")
def svi_part_i() -> Case:
    return Case(of("svi_part_i.ipynb", "model"), ([tensor(1.0)] * 6 + [tensor(0.0)] * 4,))


@program("svi_part_iii.ipynb")
def svi_part_iii() -> Case:
    return Case(of("svi_part_iii.ipynb", "BernoulliBetaExample")(10).model, (True,))


@program("mle_map.ipynb", "original_model", "masked_model", "original_model_uniform_prior")
def mle_map(name: str) -> Case:
    return Case(of("mle_map.ipynb", name), (tensor([1.0] * 6 + [0.0] * 4),))


@program("jit.ipynb")
def jit_normal() -> Case:
    return Case(of("jit.ipynb", "model", nth=1), (0.5 + 2 * drawn(20),))


@program("jit.ipynb")
def jit_hmm() -> Case:
    model = of("jit.ipynb", "model", nth=2)
    return Case(model, (drawn(6),), {"num_sequences": 3, "length": 6, "state_dim": 4})


@program("examples/minipyro.py")
def minipyro() -> Case:
    model = inside("examples/minipyro.py", "main", "model", pyro=pyro, dist=dist)
    return Case(model, (drawn(20) + 3,))


# Regressions and hierarchies


@program("bayesian_regression.ipynb")
def bayesian_regression() -> Case:
    africa, rugged, gdp = rows()
    x = torch.stack((africa, rugged, africa * rugged), -1)
    return Case(of("bayesian_regression.ipynb", "BayesianRegression")(3, 1), (x, gdp), predict=(x,))


@program("bayesian_regression_ii.ipynb")
def bayesian_regression_ii() -> Case:
    africa, rugged, gdp = rows()
    return Case(of("bayesian_regression_ii.ipynb", "model"), (africa, rugged, gdp), predict=(africa, rugged, None))


@program("boosting_bbvi.ipynb")
def boosting_bbvi() -> Case:
    return Case(of("boosting_bbvi.ipynb", "model"), (4 + 0.1 * drawn(20),))


@program("predictive_deterministic.ipynb")
def predictive_deterministic() -> Case:
    x = drawn(20, 1)
    counts = torch.poisson((3 + x[:, 0]).exp().clamp(max=50))
    return Case(of("predictive_deterministic.ipynb", "model"), (x, counts), predict=(x, None))


@program("prior_predictive.ipynb", "model", "model2", "last_model")
def prior_predictive(name: str) -> Case:
    nth = 1 if name == "model" else None
    model = of("prior_predictive.ipynb", name.removeprefix("last_"), nth=nth)
    return Case(model, (8, drawn(8).cumsum(0)), predict=(8,))


@program("prior_predictive.ipynb")
def partial_model() -> Case:
    return Case(of("prior_predictive.ipynb", "make_partial_model")(0, 1, 0, 1, 0, 1))


@program("csis.ipynb")
def csis() -> Case:
    data = {"x1": tensor(8.0), "x2": tensor(9.0)}
    model = of("csis.ipynb", "model")
    return Case(model, (tensor(1.0), data), predict=(tensor(1.0), {"x1": None, "x2": None}))


@program("elections.ipynb")
def elections() -> Case:
    covariance = 0.1 * torch.eye(6) + 0.05
    votes = tensor([3.0, 10.0, 20.0, 4.0, 7.0, 11.0])
    model = of(
        "elections.ipynb", "model", prior_mean=0.1 * drawn(6), prior_covariance=covariance, ec_votes_tensor=votes
    )
    polls = tensor([10.0, 10.0, 20.0, 5.0, 5.0, 10.0])
    return Case(given(model, y=tensor([6.0, 4.0, 11.0, 2.0, 3.0, 5.0])), (polls,))


@program("working_memory.ipynb", "first", "adapted", "timed")
def working_memory(name: str) -> Case:
    facts: dict[str, Any] = {
        "prior_mean": tensor(7.0),
        "prior_sd": tensor(2.0),
        "time_intercept": 0.5,
        "time_scale": 0.5,
    }
    if name == "timed":
        model = of("working_memory.ipynb", "model", **facts)
        return Case(given(model, correct=tensor(1.0), time=tensor(1.5)), (tensor(5.0),))
    if name == "first":
        model = of("working_memory.ipynb", "model", nth=1, **facts)
    else:
        model = of("working_memory.ipynb", "make_model")(tensor(7.0), tensor(2.0))
    return Case(given(model, y=tensor([1.0, 1.0, 0.0, 1.0, 0.0])), (tensor([5.0, 6.0, 7.0, 8.0, 9.0]),))


@program("examples/contrib/oed/ab_test.py")
def ab_test() -> Case:
    model, groups = of("examples/contrib/oed/ab_test.py", "model", "group_assignment_matrix")
    return Case(given(model, y=drawn(10) + 2), (groups(tensor([3, 7])),))


@program("logistic-growth.ipynb", "basic_model", "regional_model", "regional_model2")
def logistic_growth(name: str) -> Case:
    model = of("logistic-growth.ipynb", name, dataset={"time_step_days": 14})
    shape = (4, 3) if name == "basic_model" else (4, 2, 3)
    return Case(model, (torch.poisson(20 * torch.ones(shape)),))


def strains() -> dict[str, Any]:
    """Return counts of three strains at two places, with mutations, like the table of Nextstrain."""
    counts = torch.poisson(3 * torch.ones(5, 2, 3))
    index = counts.nonzero().T
    sparse = {"index": index, "total": counts.sum(-1), "value": counts[tuple(index)]}
    return {"features": bits(3, 4), "counts": counts, "sparse_counts": sparse, "time_step_days": 14}


@program("workflow.ipynb", "dense", "sparse", "reparam")
def workflow(name: str) -> Case:
    model = of("workflow.ipynb", "model", nth=1 if name == "dense" else None)
    if name == "reparam":
        model = poutine.reparam(model, {"rate": LocScaleReparam(), "init": LocScaleReparam()})
    return Case(model, (strains(),))


@program("svi_flow_guide.ipynb")
def svi_flow_guide() -> Case:
    return Case(of("svi_flow_guide.ipynb", "model"), (drawn(5, 8, 2),))


@program("examples/baseball.py", "fully_pooled", "not_pooled", "partially_pooled", "partially_pooled_with_logit")
def baseball(name: str) -> Case:
    at_bats = torch.full((5,), 45.0)
    return Case(
        of("examples/baseball.py", name),
        (at_bats, tensor([18.0, 15.0, 12.0, 11.0, 7.0])),
        predict=(at_bats, None),
    )


@program("examples/eight_schools/mcmc.py")
def eight_schools_mcmc() -> Case:
    model, data = of("examples/eight_schools/mcmc.py", "model", "data")
    return Case(given(model, obs=data.y), (data.sigma,), predict=(data.sigma,))


@program("examples/eight_schools/svi.py")
def eight_schools_svi() -> Case:
    model, data = of("examples/eight_schools/svi.py", "model", "data")
    return Case(model, (data,))


@program("examples/inclined_plane.py")
def inclined_plane() -> Case:
    return Case(of("examples/inclined_plane.py", "model"), (1.6 + 0.02 * drawn(3),))


@program("examples/lkj.py")
def lkj() -> Case:
    return Case(of("examples/lkj.py", "model"), (drawn(20, 3),))


@program("examples/neutra.py")
def neutra() -> Case:
    return Case(of("examples/neutra.py", "model"), (1.15, 1.0))


@program("examples/sparse_regression.py")
def sparse_regression() -> Case:
    hypers = {"expected_sparsity": tensor(1.0), "alpha3": tensor(1.0), "c": tensor(1.0)}
    hypers |= {"alpha1": tensor(3.0), "beta1": tensor(1.0), "alpha2": tensor(3.0), "beta2": tensor(1.0)}
    x = drawn(12, 4)
    return Case(of("examples/sparse_regression.py", "model"), (x, x[:, 0] + 0.1 * drawn(12), hypers))


@program("examples/sparse_gamma_def.py")
def sparse_gamma_def() -> Case:
    family = of("examples/sparse_gamma_def.py", "SparseGammaDEF")()
    family.top_width, family.mid_width, family.bottom_width, family.image_size = 4, 3, 2, 6
    return Case(family.model, (torch.poisson(2 * torch.ones(5, 6)),))


@program("examples/svi_torch.py")
def svi_torch() -> Case:
    return Case(of("examples/svi_torch.py", "Model")(20), (drawn(20), drawn(20)))


@program("examples/svi_lightning.py")
def svi_lightning() -> Case:
    return Case(of("examples/svi_lightning.py", "Model")(20), (drawn(20), drawn(20)))


@program("examples/svi_horovod.py")
def svi_horovod() -> Case:
    """Return the model on a minibatch of ten of the twenty rows, which one of its workers has."""
    x, y = drawn(20), drawn(20)
    return Case(of("examples/svi_horovod.py", "Model")(20), (x[:10], y[:10]), predict=(x,), judged=(x, y))


@program("examples/contrib/autoname/tree_data.py")
def autoname_tree() -> Case:
    one = tensor(1.0)
    words = {"noun": {"concrete": 4 * one, "abstract": 6 * one}, "verb": 2 * one}
    data = {"foo": one, "bar": [0 * one, 1 * one, 2 * one], "baz": words}
    return Case(of("examples/contrib/autoname/tree_data.py", "model"), (data,))


# Discrete latents


@program("gmm.ipynb")
def gmm() -> Case:
    return Case(of("gmm.ipynb", "model"), (tensor([0.0, 1.0, 10.0, 11.0, 12.0]),))


@program("dirichlet_process_mixture.ipynb", 1, 2)
def dirichlet_process_mixture(number: int) -> Case:
    names = {name: value for name, value in vars(dist).items() if name[0].isupper()}  # its star import
    data = torch.poisson(5 * torch.ones(12)) if number == 2 else drawn(12, 2) + 8 * bits(12, 1) - 4
    return Case(
        of("dirichlet_process_mixture.ipynb", "model", nth=number, T=4, N=12, alpha=0.1, **names),
        (data,),
    )


@program("enumeration.ipynb", 1, 2, 3, 4, 5)
def enumeration(number: int) -> Case:
    return Case(of("enumeration.ipynb", "model", nth=number), (drawn(10),) if number == 5 else ())


@program("enumeration.ipynb", 1, 2)
def enumeration_hmm(number: int) -> Case:
    data = torch.randint(0, 3, (5,))
    return Case(of("enumeration.ipynb", "hmm_model", nth=number), (data,), {"data_dim": 3, "hidden_dim": 3})


@program("tracking_1d.ipynb")
def tracking_1d() -> Case:
    model, data = of("tracking_1d.ipynb", "model", "generate_data")
    args = SimpleNamespace(
        num_frames=5, max_num_objects=3, expected_num_objects=2.0, expected_num_spurious=1.0, emission_prob=0.8
    )
    args.emission_noise_scale = 0.1
    return Case(config_enumerate(model), (args, data(args)[2]))  # the notebook's guide enumerates


@program("contrib_funsor_intro_ii.ipynb")
def contrib_funsor_intro_ii() -> Case:
    return Case(of("contrib_funsor_intro_ii.ipynb", "model"), ([tensor(1.0)] * 5, False))


@program("examples/contrib/autoname/mixture.py")
def autoname_mixture() -> Case:
    data = tensor([0.0, 1.0, 2.0, 20.0, 30.0, 40.0])
    return Case(of("examples/contrib/autoname/mixture.py", "model"), (data,), {"k": 2})


@program("examples/contrib/autoname/scoping_mixture.py")
def autoname_scoping_mixture() -> Case:
    data = tensor([0.0, 1.0, 2.0, 20.0, 30.0, 40.0])
    return Case(of("examples/contrib/autoname/scoping_mixture.py", "model"), (2, data))


@program("examples/capture_recapture/cjs.py", 1, 2, 3, 4, 5)
def capture_recapture(number: int) -> Case:
    history = bits(6, 4)
    history[:, 0] = 1
    return Case(of("examples/capture_recapture/cjs.py", f"model_{number}"), (history, bits(6)))


def tones() -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Return three short sequences of four tones, with the options of the hidden Markov models."""
    options = SimpleNamespace(hidden_dim=4, nn_dim=4, nn_channels=2, jit=False, raftery_parameterization=False)
    return (bits(3, 4, 4), tensor([4, 3, 2])), {"args": options}


@program("examples/hmm.py", *range(8))
def hmm(number: int) -> Case:
    return Case(of("examples/hmm.py", f"model_{number}"), *tones())


@program("examples/contrib/funsor/hmm.py")
def funsor_hmm_7() -> Case:
    """Return the only model of the file that examples/hmm.py does not have."""
    model = of("examples/contrib/funsor/hmm.py", "model_7", pyro=pyro, dist=dist, handlers=poutine)
    return Case(model, *tones())


@program("examples/lda.py")
def lda() -> Case:
    model = of("examples/lda.py", "model")
    sizes = SimpleNamespace(num_topics=3, num_words=8, num_docs=6, num_words_per_doc=10)
    return Case(model, (model(args=sizes)[-1],), {"args": sizes}, predict=(None,))


@program("examples/mixed_hmm/model.py", "group", "individual", "both", "discrete")
def mixed_hmm(random: str) -> Case:
    """Return the model of steps, angles and dives of three seals in two groups; the name says which effects it has."""
    kind = dict.fromkeys(("group", "individual"), "continuous" if random == "both" else "discrete")
    kind |= {random: "continuous"} if random in kind else {}
    data = {"step": drawn(3, 2, 4).abs(), "angle": drawn(3, 2, 4).clamp(-3, 3), "omega": torch.rand(3, 2, 4)}
    config = {
        "MISSING": 1e-6,
        "sizes": {"state": 2, "random": 2, "group": 2, "individual": 3, "timesteps": 4},
        "group": {"random": kind["group"], "fixed": None},
        "individual": {"random": kind["individual"], "fixed": None, "mask": torch.ones(3, 2).bool()},
        "timestep": {"random": None, "fixed": None, "mask": torch.ones(3, 2, 4).bool()},
        "observations": data,
    }
    return Case(of("examples/mixed_hmm/model.py", "model_generic"), (config,))


@program("examples/toy_mixture_model_discrete_enumeration.py")
def toy_mixture_model() -> Case:
    model, simulated = of("examples/toy_mixture_model_discrete_enumeration.py", "model", "generate_data")
    prior, _, data = simulated(20)
    return Case(model, (prior, data, 20))


# Time series


@program("forecasting_i.ipynb", 1, 2, 3)
def forecasting_i(number: int) -> Case:
    kind = of("forecasting_i.ipynb", f"Model{number}")
    model = kind() if number == 1 else poutine.reparam(kind(), time_reparam_dct)
    return Case(model, (14 + 0.1 * drawn(8, 1).cumsum(0), drawn(8, 2)))


@program("forecasting_ii.ipynb", 1, 2, 3)
def forecasting_ii(number: int) -> Case:
    kind = of("forecasting_ii.ipynb", f"Model{number}", means=2 + drawn(168))
    return Case(kind(), (2 + drawn(8, 1), torch.zeros(8, 0)))


@program("forecasting_iii.ipynb", 1, 2)
def forecasting_iii(number: int) -> Case:
    data = 2 + drawn(8, 2) if number == 1 else 2 + drawn(2, 2, 8, 1)
    return Case(of("forecasting_iii.ipynb", f"Model{number}")(), (data, torch.zeros(8, 0)))


@program("forecasting_dlm.ipynb", "DLM", "DLM2")
def forecasting_dlm(name: str) -> Case:
    kind = of("forecasting_dlm.ipynb", name, time_points=[2, 3, 5], priors=drawn(3, 2))
    covariates = torch.cat((torch.ones(8, 1), 0.1 * drawn(8, 2)), -1)
    return Case(kind(), (drawn(8, 1), covariates))


@program("examples/contrib/forecast/bart.py")
def bart() -> Case:
    return Case(of("examples/contrib/forecast/bart.py", "Model")(), (2 + drawn(8, 2), torch.zeros(8, 0)))


@program("stable.ipynb", "returns", "volatility", "reparam_model")
def stable(name: str) -> Case:
    returns = 0.01 * drawn(10)
    if name == "returns":
        return Case(of("stable.ipynb", "model", nth=1, r=returns))
    model = of("stable.ipynb", "model", nth=2)
    if name == "reparam_model":
        model = poutine.reparam(model, {"v": DiscreteCosineReparam(), "r": StableReparam()})
    return Case(model, (returns,))


@program("ekf.ipynb")
def ekf() -> Case:
    truth = drawn(10, 4).mul(0.01).cumsum(0)
    return Case(of("ekf.ipynb", "model", i=0, xs_truth=truth), (truth[:, :2] + 0.003 * drawn(10, 2),))


@program("easyguide.ipynb")
def easyguide() -> Case:
    data, all_rows = bits(4, 6), torch.arange(6)
    model = of("easyguide.ipynb", "model")
    return Case(model, (data, all_rows, 6), predict=([None] * 4, all_rows, 6), plate="data")


@program("examples/smcfilter.py")
def smcfilter() -> Case:
    harmonic = of("examples/smcfilter.py", "SimpleHarmonicModel")(1.0, 1.0)

    def model(ys: Tensor) -> None:
        state: dict[str, Tensor] = {}
        harmonic.init(state, tensor([1.0, 0.0]))
        for y in ys:
            harmonic.step(state, y)

    return Case(model, (3 * drawn(5),))


# Epidemics


@program(
    "examples/sir_hmc.py",
    *("discrete_model", "reparameterized_discrete_model", "continuous_model", "vectorized_model"),
)
def sir_hmc(name: str) -> Case:
    torch.set_default_dtype(torch.float64)
    # The population is small, because discrete counts are summed out together.
    size, data = (2, [0.0, 1.0, 0.0]) if name == "discrete_model" else (5, [0.0, 1.0, 1.0, 0.0])
    args = SimpleNamespace(population=size, recovery_time=5.0)
    return Case(of("examples/sir_hmc.py", name, args=args), (args, tensor(data)))


def compartments(model: Any, kind: str) -> Case:
    """Return a form of a compartmental model: the one for its ``fit_svi``, the one for NUTS, or the prior."""
    model.num_quant_bins = 2
    start = model._heuristic(False, num_particles=64) if kind == "quantized" else None  # as NUTS starts
    return Case(getattr(model, f"_{kind}_model"), start=start)


@program("epi_intro.ipynb", "relaxed", "quantized", "generative")
def epi_intro(kind: str) -> Case:
    torch.set_default_dtype(torch.float64)
    model = of("epi_intro.ipynb", "SimpleSIRModel")
    size, data = (2, [0.0, 1.0, 0.0]) if kind == "generative" else (100, [0.0, 1.0, 1.0, 2.0, 3.0])
    return compartments(model(size, 5.0, tensor(data)), kind)


@program("epi_intro.ipynb", "relaxed", "quantized")
def epi_intro_regional(kind: str) -> Case:
    torch.set_default_dtype(torch.float64)
    coupling = torch.eye(2).clamp(min=0.1)
    data = tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    return compartments(of("epi_intro.ipynb", "RegionalSIRModel")(tensor([100.0, 100.0]), coupling, 5.0, data), kind)


@program(
    "examples/contrib/epidemiology/sir.py",
    *("SIR", "SEIR", "OverdispersedSIR", "OverdispersedSEIR", "SuperspreadingSIR", "SuperspreadingSEIR"),
    "HeterogeneousSIR",
)
def epidemiology(name: str) -> Case:
    torch.set_default_dtype(torch.float64)
    args = SimpleNamespace(
        population=100,
        recovery_time=5.0,
        incubation_time=4.0 if "SEIR" in name else 0.0,
        heterogeneous="Heterogeneous" in name,
        concentration=1.0 if "Super" in name else float("inf"),
        overdispersion=0.5 if "Over" in name else 0.0,
    )
    model = of("examples/contrib/epidemiology/sir.py", "Model")(args, tensor([0.0, 1.0, 1.0, 2.0, 3.0]))
    return compartments(model, "relaxed")


@program("examples/contrib/epidemiology/regional.py")
def epidemiology_regional() -> Case:
    torch.set_default_dtype(torch.float64)
    args = SimpleNamespace(population=100, num_regions=2, coupling=0.1, recovery_time=5.0)
    data = tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    return compartments(of("examples/contrib/epidemiology/regional.py", "Model")(args, data), "relaxed")


# Gaussian processes


@program("bo.ipynb")
def bo() -> Case:
    x = tensor([0.0, 0.33, 0.66, 1.0])
    y = of("bo.ipynb", "f")(x)
    return Case(gp.models.GPRegression(x, y, gp.kernels.Matern52(1), noise=tensor(0.1), jitter=1e-4).model)


@program("gp.ipynb", "priors", "sparse", "variational_sparse", "multi_class")
def gaussian_process(kind: str) -> Case:
    """Return a model of gp.ipynb; the notebook builds them at its top level."""
    torch.set_default_dtype(torch.float64)
    x, kernel = 5 * torch.rand(12), gp.kernels.RBF(1)
    y = 0.5 * torch.sin(3 * x) + 0.2 * drawn(12)
    if kind == "priors":
        model = gp.models.GPRegression(x, y, kernel, noise=tensor(1.0))
        model.kernel.lengthscale = pyro.nn.PyroSample(dist.LogNormal(0.0, 1.0))
        model.kernel.variance = pyro.nn.PyroSample(dist.LogNormal(0.0, 1.0))
        return Case(model.model)
    if kind == "sparse":
        return Case(gp.models.SparseGPRegression(x, y, kernel, Xu=torch.arange(4.0), jitter=1e-5).model)
    if kind == "variational_sparse":
        likelihood = gp.likelihoods.Gaussian()
        model = gp.models.VariationalSparseGP(x, y, kernel, torch.arange(4.0), likelihood, whiten=True)
        return Case(model.model)
    classes = torch.arange(12) % 3
    likelihood, shape = gp.likelihoods.MultiClass(num_classes=3), torch.Size([3])
    x2 = torch.stack((x, classes + 0.3 * drawn(12)), -1)
    kernel = gp.kernels.RBF(input_dim=2)
    model = gp.models.VariationalGP(x2, classes, kernel, likelihood, whiten=True, jitter=1e-3, latent_shape=shape)
    return Case(model.model)


@program("gplvm.ipynb")
def gplvm() -> Case:
    mean = torch.stack((torch.linspace(0, 1, 8), torch.zeros(8)), -1)
    kernel = gp.kernels.RBF(input_dim=2, lengthscale=torch.ones(2))
    model = gp.models.SparseGPRegression(mean.clone(), drawn(3, 8), kernel, mean[::2], noise=tensor(0.01), jitter=1e-5)
    model.X = pyro.nn.PyroSample(dist.Normal(mean, 0.1).to_event())
    return Case(model.model)


@program("examples/contrib/gp/sv-dkl.py", "binary", "multi_class")
def sv_dkl(kind: str) -> Case:
    network, images = of("examples/contrib/gp/sv-dkl.py", "CNN")(), torch.rand(6, 1, 28, 28)
    kernel = gp.kernels.Warping(gp.kernels.RBF(input_dim=10, lengthscale=torch.ones(10)), iwarping_fn=network)
    binary = kind == "binary"
    model = gp.models.VariationalSparseGP(
        X=images,
        y=bits(6) if binary else torch.arange(6),
        kernel=kernel,
        Xu=images[:3].clone(),
        likelihood=gp.likelihoods.Binary() if binary else gp.likelihoods.MultiClass(num_classes=10),
        latent_shape=torch.Size([] if binary else [10]),
        num_data=60,
        whiten=True,
        jitter=2e-6,
    )
    return Case(model.model)


# Networks


@program("examples/vae/vae.py")
def vae() -> Case:
    model = of("examples/vae/vae.py", "VAE")(z_dim=3, hidden_dim=8)
    return Case(model.model, (bits(6, 784),), plate="data", encoder=OfFirst(784))


@program("vae.ipynb")
def vae_tutorial() -> Case:
    model = of("vae.ipynb", "VAE", pyro=pyro)(z_dim=3, hidden_dim=8)
    return Case(model.model, (bits(6, 784),), plate="data", encoder=OfFirst(784))


@program("vae.ipynb")
def vae_as_flow() -> Case:
    """Return the same autoencoder, for a guide over all rows together."""
    return Case(of("vae.ipynb", "VAE", pyro=pyro)(z_dim=3, hidden_dim=8).model, (bits(6, 784),))


@program("examples/vae/vae_comparison.py")
def vae_comparison() -> Case:
    kind = of("examples/vae/vae_comparison.py", "PyroVAEImpl", save_image=None, OUTPUT_DIR="")
    model = kind(SimpleNamespace(jit=False, batch_size=6), None, None)
    return Case(model.model, (bits(6, 784),), plate="data", encoder=OfFirst(784))


@program("vae_flow_prior.ipynb")
def vae_flow_prior() -> Case:
    model = of("vae_flow_prior.ipynb", "VAE")(20, 3)
    return Case(model.model, (bits(6, 20),), plate="batch", encoder=OfFirst(20))


@program("examples/vae/ss_vae_M2.py", "labelled", "unlabelled")
def ss_vae(kind: str) -> Case:
    model = of("examples/vae/ss_vae_M2.py", "SSVAE")(3, 20, 2, [8], config_enum="parallel")
    labels = torch.eye(3)[torch.arange(6) % 3]
    args = (bits(6, 20), labels) if kind == "labelled" else (bits(6, 20),)
    return Case(model.model, args, plate="data", encoder=OfFirst(20))


@program("examples/cvae/cvae.py")
def cvae() -> Case:
    class Baseline(nn.Module):
        """Substitute for the pre-trained network."""

        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(min=0.0)

    model = of("examples/cvae/cvae.py", "CVAE")(2, 8, 8, Baseline())
    whole = bits(4, 28, 28)
    part = whole.clone()
    part[:, :14] = -1
    return Case(model.model, (part, whole), predict=(part, None), plate="data", encoder=OfFirst(784))


@program("examples/dmm.py")
def dmm() -> Case:
    model = of("examples/dmm.py", "DMM", pyro=pyro, poly=None)(
        input_dim=5, z_dim=2, emission_dim=4, transition_dim=4, rnn_dim=4, num_layers=1
    )
    data, lengths = bits(4, 3, 5), tensor([3, 3, 2, 1])
    mask = (torch.arange(3) < lengths[:, None]).float()
    return Case(model.model, (data, data.flip(1), mask, lengths), plate="z_minibatch", encoder=OfFirst(15))


@program("examples/air/air.py", "masked", "unmasked")
def air(kind: str) -> Case:
    model = of("examples/air/air.py", "AIR")(2, 12, 6, 4, 8, [8], [8], [8], None, [8], use_masking=kind == "masked")
    return Case(model.model, (torch.rand(3, 12, 12), 3), plate="data", encoder=OfFirst(144))


@program("air.ipynb")
def air_tutorial() -> Case:
    return Case(of("air.ipynb", "model"), (torch.rand(3, 2500),), plate="data", encoder=OfFirst(2500))


@program("examples/scanvi/scanvi.py", "labelled", "unlabelled")
def scanvi(kind: str) -> Case:
    model = of("examples/scanvi/scanvi.py", "SCANVI")(5, 3, 2.0, 0.5, latent_dim=2, scale_factor=1.0)
    x, labels = torch.poisson(5 * torch.ones(6, 5)), torch.eye(3)[torch.arange(6) % 3]
    args = (x, labels) if kind == "labelled" else (x,)
    return Case(model.model, args, plate="batch", encoder=OfFirst(5), network=model)


@program("scanvi.ipynb")
def scanvi_tutorial() -> Case:
    model = of("scanvi.ipynb", "SCANVI")(5, 3, 2.0, 0.5, latent_dim=2, scale_factor=1.0 / 30)
    x, labels = torch.poisson(5 * torch.ones(6, 5)), torch.eye(3)[torch.arange(6) % 3]
    return Case(model.model, (x, labels), plate="batch", encoder=OfFirst(5), network=model)


@program("prodlda.ipynb", "counts", "words")
def dirichlet(kind: str) -> Case:
    """Return one of the two models that introduce ProdLDA, a die rolled many times."""
    model = of("prodlda.ipynb", "model", nth=1 if kind == "counts" else 2)
    data = tensor([5, 4, 2, 5, 6, 5]) if kind == "counts" else torch.randint(0, 6, (20,))
    return Case(model, (data,))


@program("prodlda.ipynb")
def prodlda() -> Case:
    model = of("prodlda.ipynb", "ProdLDA")(vocab_size=12, num_topics=3, hidden=8, dropout=0.2)
    docs = torch.poisson(2 * torch.ones(6, 12))
    return Case(model.model, (docs,), plate="documents", encoder=OfFirst(12), network=model)


@program("examples/contrib/cevae/synthetic.py", "rows", "minibatch")
def cevae(kind: str) -> Case:
    simulated, kind_of = of("examples/contrib/cevae/synthetic.py", "generate_data", "CEVAE")
    x, t, y, _ = simulated(SimpleNamespace(num_data=8 if kind == "rows" else 16, feature_dim=3))
    model = kind_of(feature_dim=3, latent_dim=2, hidden_dim=4, num_layers=2, num_samples=2).model
    if kind == "rows":
        return Case(model, (x, t, y), predict=(x,), plate="data", encoder=OfFirst(3))
    part = (x[:8], t[:8], y[:8])
    return Case(model, part, {"size": 16}, predict=(x,), judged=(x, t, y), plate="data", encoder=OfFirst(3))


def sequences() -> Tensor:
    """Return the sequences of the examples' smoke tests, in the precision of those tests."""
    torch.set_default_dtype(torch.float64)
    dataset = of("examples/contrib/mue/ProfileHMM.py", "BiosequenceDataset")
    return dataset(["BABBA", "BAAB", "BABBB"], "list", "AB").seq_data


@program("examples/contrib/mue/ProfileHMM.py")
def profile_hmm() -> Case:
    data = sequences()
    model = of("examples/contrib/mue/ProfileHMM.py", "ProfileHMM")(4, 2)
    return Case(model.model, (data, tensor(1.0)))


@program("examples/contrib/mue/FactorMuE.py", "Normal", "Laplace")
def factor_mue(prior: str) -> Case:
    data = sequences()
    model = of("examples/contrib/mue/FactorMuE.py", "FactorMuE")(5, 2, 2, z_prior_distribution=prior, ARD_prior=True)
    return Case(model.model, (data, tensor(1.0), tensor(1.0)))
