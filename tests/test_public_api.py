"""The public names, pinned: a change here is a decision, not an accident."""

import pyro_flows
from pyro_flows import (
    bijectors,
    conditioners,
    diagnostics,
    distributions,
    fitting,
    flows,
    guides,
    objectives,
    transforms,
)

NAMES = {
    pyro_flows: "AutoFlow Check Fit Flow Psis check fit_svi flows neutra psis refine resample to_arviz",
    bijectors: "Affine Bijector CircularSpline RationalQuadraticSpline Shift",
    conditioners: "Conditioner MADE MLP Periodic costream stream",
    transforms: "ActNorm Autoregressive Compose Coupling Elementwise FixedAffine FlowTransform Inverse LULinear "
    "Permute View",
    distributions: "CircularBase ContaminatedNormalBase FixedBase MixtureBase StandardNormal StudentTBase",
    flows: "Flow circular_coupling iaf maf nice nsf nsf_ar realnvp",
    objectives: "ForwardKL ImportanceWeightedELBO PathELBO PathEnumELBO RenyiELBO TemperedELBO",
    guides: "AutoFlow default_flow init_to_center",
    diagnostics: "Check Neutra Psis Refined check neutra psis refine resample to_arviz",
    fitting: "Fit fit_svi",
}
MODULE = type(pyro_flows)


def test_public_names_are_pinned():
    for module, names in NAMES.items():
        submodules = {n for n, v in vars(module).items() if isinstance(v, MODULE) and n not in names.split()}
        public = {n for n in vars(module) if not n.startswith("_")} - submodules
        assert public == set(names.split()), module.__name__


def test_every_public_name_is_documented():
    for module, names in NAMES.items():
        assert module.__doc__, module.__name__
        for name in names.split():
            assert getattr(module, name).__doc__, f"{module.__name__}.{name}"


def test_the_package_is_typed():
    from pathlib import Path

    assert (Path(pyro_flows.__file__).parent / "py.typed").exists()
