"""The public names, pinned: a change here is a decision, not an accident."""

import pyro_flows
from pyro_flows import (
    bijectors,
    conditioners,
    diagnostics,
    distributions,
    encoders,
    fitting,
    flows,
    guides,
    objectives,
    persistence,
    plots,
    tables,
    transforms,
)

NAMES = {
    pyro_flows: "AutoFlow AutoPlateFlow Calibration Check Fit Flow OdeReport Psis Simulations Spike bits_per_dim "
    "calibrate check dequantize encoders find_spikes fit_amortized fit_density fit_svi flows importance_log_likelihood "
    "load neutra ode_report plots posterior_graph psis refine resample save save_images simulate to_arviz",
    bijectors: "Affine Bernstein Bijector CircularSpline Continued Integral LinearRationalSpline LogisticMixture "
    "RationalQuadraticSpline Shift Sigmoidal SumOfSquares",
    conditioners: "CausalTransformer Conditioner ConvNet Given LipschitzMLP MADE MLP MLPField Periodic Tokens "
    "VectorField costream stream",
    encoders: "ClassEmbedding ConvEncoder Encoder Flatten MLPEncoder SetEncoder Standardize",
    transforms: "ActNorm Autoregressive BlockAutoregressive Compose Conditioned Continuous Coupling Elementwise "
    "FixedAffine FlowTransform Householder Inverse LULinear Orthogonal Patched PerPixel Permute Planar Radial "
    "Recomputed Reshaped Residual Sigmoid Solution Split Squeezed Sylvester View",
    distributions: "CircularBase ContaminatedNormalBase FixedBase MixtureBase NormalBase StandardNormal StudentTBase",
    flows: "Dequantized Flow bnaf bpf circular_coupling cnf ffjord flowpp flowpp_image gaussianization glow iaf maf "
    "naf nice nsf nsf_ar planar_flow radial_flow realnvp realnvp_image residual_flow sospf sylvester_flow tarflow umnn",
    objectives: "FlowMatching ForwardKL ImportanceWeightedELBO Likelihood PathELBO PathEnumELBO RenyiELBO TemperedELBO",
    guides: "AutoFlow AutoPlateFlow default_flow init_to_center posterior_graph",
    diagnostics: "Calibration Check Neutra OdeReport Psis Refined Simulations bits_per_dim calibrate check "
    "importance_log_likelihood neutra ode_report plots psis refine resample save_images simulate to_arviz",
    plots: "calibration check deformation history images marginals pairs weights",
    fitting: "Fit fit_amortized fit_density fit_svi",
    persistence: "load save",
    tables: "Spike dequantize find_spikes",
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
