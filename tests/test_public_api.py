"""The public names are pinned, here or by the registries of tests, and each of them is documented."""

import builtins
import inspect
import re
from pathlib import Path

import pytest
from laws import BIJECTORS, RECIPES
from test_images import IMAGES
from test_objectives import OBJECTIVES

import pyro_flows as pf

TRIED = {type(build()).__name__ for build in OBJECTIVES.values()}
NAMES = {
    pf: "AutoFlow AutoPlateFlow AutoStructuredFlow Check Fit Flow Posterior Program Psis Simulations Spike "
    "anneal bits_per_dim calibrate check dequantize encoders ensemble find_spikes fit_amortized fit_density "
    "fit_likelihood fit_svi flows importance_log_likelihood load local_c2st misspecification neutra ode_report "
    "plots posterior posterior_graph psis refine resample round_off sample save save_images simulate to_arviz",
    pf.answers: "Posterior Step posterior",
    pf.bijectors: " ".join(sorted({"Bijector", "Continued", *(type(one).__name__ for one in BIJECTORS.values())})),
    pf.conditioners: "CausalTransformer Conditioner ConvNet Given LipschitzMLP MADE MLP MLPField Periodic "
    "StepNet Tokens VectorField stream stream_vjp",
    pf.encoders: "Arguments ClassEmbedding ConvEncoder Encoder Flatten GRUEncoder Identity Joined MLPEncoder Scalars "
    "SetEncoder Standardize TransformerEncoder",
    pf.transforms: "ActNorm Autoregressive BlockAutoregressive Compose Conditioned Continuous Coupling Elementwise "
    "FixedAffine FlowTransform Householder Inverse LULinear NonCentred Orthogonal Patched PerPixel Permute Planar "
    "QuantileMap Radial Recomputed Recurrence Reshaped Residual ScaledLinear Sigmoid Solution Solver Split Squeezed "
    "Sylvester TriangularAffine View",
    pf.distributions: "CircularBase ContaminatedNormalBase FixedBase MixtureBase ModesBase NormalBase StandardNormal "
    "StudentTBase",
    pf.flows: " ".join(sorted({"Dequantized", "Flow", "Mixed", "ffjord", *RECIPES, *IMAGES})),
    pf.objectives: " ".join(sorted({"FlowMatching", "Likelihood", "PathEnumELBO", *TRIED})),
    pf.guides: "AutoFlow AutoPlateFlow AutoStructuredFlow default_flow ensemble init_to_center posterior_graph",
    pf.data: "Spike dequantize find_spikes",
    pf.diagnostics: "Calibration Check Finding LocalC2ST Misspecification Neutra OdeReport Psis Refined bits_per_dim "
    "calibrate check importance_log_likelihood local_c2st misspecification neutra ode_report psis refine resample "
    "round_off save_images to_arviz",
    pf.plots: "calibration check deformation history images local_c2st marginals misspecification pairs weights",
    pf.training: "Fit Gradients Training",
    pf.fitting: "Annealed Mode Observed anneal fit_amortized fit_density fit_likelihood fit_svi sample",
    pf.graphs: "Traced",
    pf.sampling: "Samples",
    pf.persistence: "load save",
    pf.programs: "Program Simulations simulate",
}
MODULE = type(pf)


def test_public_names_are_pinned():
    for module, names in NAMES.items():
        submodules = {n for n, v in vars(module).items() if isinstance(v, MODULE) and n not in names.split()}
        public = {n for n in vars(module) if not n.startswith("_")} - submodules
        assert public == set(names.split()), module.__name__


def test_completions_and_star_imports_offer_public_names_alone():
    packages = {module.__name__.rpartition(".")[2] for module in NAMES} - {"pyro_flows"}
    public = {*NAMES[pf].split(), *packages}
    assert set(dir(pf)) == {*public, "__version__"}
    assert set(pf.__all__) == public
    for module in NAMES:
        scope = {}
        exec(f"from {module.__name__} import *", scope)
        assert not (scope.keys() - {"__builtins__"}) & set(dir(builtins)), module.__name__


OBJECTS = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in NAMES.items()
    for name in names.split()
    if not isinstance(getattr(module, name), MODULE)
}
every_name = pytest.mark.parametrize("name", OBJECTS)


def test_every_module_is_documented():
    assert all(module.__doc__ for module in NAMES)


@every_name
def test_docstrings_say_what_it_is_and_show_it(name):
    """Each object has a docstring, not an inherited one, with a sentence and an example that the tests run."""
    text = vars(OBJECTS[name]).get("__doc__") if isinstance(OBJECTS[name], type) else OBJECTS[name].__doc__
    assert re.match(r"\w.*?[.:](\s|$)", inspect.cleandoc(text), flags=re.DOTALL)
    assert "Example" in text
    assert ">>> " in text


@every_name
def test_docstrings_tell_arguments_and_errors(name):
    text = inspect.getdoc(OBJECTS[name])
    for parameter in inspect.signature(OBJECTS[name]).parameters.values():
        if parameter.name not in ("args", "kwargs") and parameter.kind is not parameter.VAR_KEYWORD:
            told = re.search(rf"\b{parameter.name}`*( \(.*\))?:|``\**{parameter.name}``", text)
            assert told or "rguments" in text, parameter.name
    if "raise " in inspect.getsource(OBJECTS[name]):  # documented there, or in the method that does it
        methods = vars(OBJECTS[name]).values() if isinstance(OBJECTS[name], type) else []
        assert any("Raises:" in told or "rrors" in told for told in (text, *(inspect.getdoc(m) or "" for m in methods)))


@every_name
def test_methods_are_documented(name):
    if isinstance(OBJECTS[name], type):
        for attribute, value in vars(OBJECTS[name]).items():
            if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert inspect.getdoc(getattr(OBJECTS[name], attribute)), attribute


def test_the_package_is_typed():
    assert (Path(pf.__file__).parent / "py.typed").exists()


def test_the_page_of_all_names_has_each_once():
    page = (Path(__file__).resolve().parents[1] / "docs" / "at_a_glance.md").read_text()
    cells = re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE)
    told = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(told) == sorted(NAMES[pf].split())
    assert len([name for name in told if not isinstance(getattr(pf, name), MODULE)]) <= 40
