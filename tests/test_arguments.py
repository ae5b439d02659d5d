"""Errors of invalid arguments name the function, the argument, its requirement and its value, in one line."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows import bijectors, conditioners, distributions, encoders, flows, objectives, transforms
from pyro_flows.training import Gradients, Training

NO_INTEGERS = [None, "x", True, 2.5, math.nan, math.inf, -1, [], object(), torch.tensor([1.0, 2.0])]
NO_NUMBERS = [None, "x", True, math.nan, math.inf, -math.inf, [], object(), torch.tensor([1.0, 2.0])]
NO_SIZES = [None, "x", b"x", "", 2.5, [], (0,), (2.5,), ["a"], object(), {}]
NO_OBJECTS = [None, "x", 3, object(), int]
x3 = torch.zeros(5, 3)

INTEGERS = {
    "Bernstein: degree": lambda v: bijectors.Bernstein(degree=v),
    "Integral: panels": lambda v: bijectors.Integral(panels=v),
    "RationalQuadraticSpline: bins": lambda v: bijectors.RationalQuadraticSpline(bins=v),
    "MLP: input_dim": lambda v: conditioners.MLP(v, 1, 2),
    "MADE: num_params": lambda v: conditioners.MADE(3, v),
    "ConvNet: hidden_dim": lambda v: conditioners.ConvNet(1, 1, 2, (4, 4), v),
    "MLPField: frequencies": lambda v: conditioners.MLPField(3, frequencies=v),
    "CausalTransformer: num_heads": lambda v: conditioners.CausalTransformer(4, 3, 2, num_heads=v),
    "ClassEmbedding: num_classes": lambda v: encoders.ClassEmbedding(v, 2),
    "SetEncoder: num_moments": lambda v: encoders.SetEncoder(2, 2, num_moments=v),
    "GRUEncoder: hidden_dim": lambda v: encoders.GRUEncoder(2, 2, v),
    "TransformerEncoder: num_layers": lambda v: encoders.TransformerEncoder(2, 2, num_layers=v),
    "MixtureBase: num_components": lambda v: distributions.MixtureBase(2, v),
    "ActNorm: input_dim": lambda v: transforms.ActNorm(v),
    "Squeezed: factor": lambda v: transforms.Squeezed(transforms.PerPixel(transforms.LULinear(4), (2, 2)), v),
    "nsf: num_transforms": lambda v: flows.nsf(3, num_transforms=v),
    "glow: num_steps": lambda v: flows.glow((1, 4, 4), num_steps=v),
    "tarflow: num_layers": lambda v: flows.tarflow((1, 4, 4), num_layers=v),
    "Dequantized: levels": lambda v: flows.Dequantized(flows.nice(3), levels=v),
    "TemperedELBO: num_steps": lambda v: objectives.TemperedELBO(v),
    "ForwardKL: num_particles": lambda v: objectives.ForwardKL(v),
    "fit_density: max_epochs": lambda v: pf.fit_density(flows.nice(3), torch.randn(60, 3), max_epochs=v),
}
NUMBERS = {
    "Affine: slope": lambda v: bijectors.Affine(slope=v),
    "SoftplusAffine.raw: scale": bijectors.SoftplusAffine.raw,
    "SumOfSquares: max_mean_slope": lambda v: bijectors.SumOfSquares(max_mean_slope=v),
    "CircularSpline: bound": lambda v: bijectors.CircularSpline(bound=v),
    "LipschitzMLP: lipschitz": lambda v: conditioners.LipschitzMLP(3, lipschitz=v),
    "StudentTBase: df": lambda v: distributions.StudentTBase(3, v),
    "ContaminatedNormalBase: scale": lambda v: distributions.ContaminatedNormalBase(3, scale=v),
    "Sigmoid: alpha": lambda v: transforms.Sigmoid((3,), alpha=v),
    "LULinear: max_log_scale": lambda v: transforms.LULinear(3, max_log_scale=v),
    "Solver: rtol": lambda v: transforms.Solver(rtol=v),
    "RenyiELBO: alpha": lambda v: objectives.RenyiELBO(v),
    "Likelihood: kinetic": lambda v: objectives.Likelihood(kinetic=v),
    "dequantize: step": lambda v: pf.dequantize(x3, step=v),
    "find_spikes: share": lambda v: pf.find_spikes(x3, share=v),
    "AutoFlow: init_scale": lambda v: pf.AutoFlow(flows.nice, init_scale=v),
    "fit_density: lr": lambda v: pf.fit_density(flows.nice(3), torch.randn(60, 3), lr=v),
    "Training: ema_decay": lambda v: Training(ema_decay=v),
}
SIZES = {
    "nsf: hidden_dims": lambda v: flows.nsf(3, hidden_dims=v),
    "MLP: hidden_dims": lambda v: conditioners.MLP(3, 1, 2, v),
    "MLPEncoder: hidden_dims": lambda v: encoders.MLPEncoder(3, 2, v),
    "ConvEncoder: channels": lambda v: encoders.ConvEncoder((1, 8, 8), 2, v),
    "ConvEncoder: image_shape": lambda v: encoders.ConvEncoder(v, 2),
    "BlockAutoregressive: hidden_dims": lambda v: transforms.BlockAutoregressive(3, v),
    "Coupling: mask": lambda v: transforms.Coupling(bijectors.Affine(), conditioners.MLP(2, 1, 2), v),
    "Patched: image_shape": lambda v: transforms.Patched(transforms.LULinear(4), v),
    "glow: image_shape": flows.glow,
}
OBJECTS = {
    "Coupling: bijector": lambda v: transforms.Coupling(v, conditioners.MLP(2, 1, 2), [True, True, False]),
    "Elementwise: conditioner": lambda v: transforms.Elementwise(bijectors.Affine(), 3, v or ()),
    "Recomputed: inner": transforms.Recomputed,
    "Inverse: transform": transforms.Inverse,
    "FixedBase: distribution": distributions.FixedBase,
    "Flow: transforms": flows.Flow,
    "Flow: base": lambda v: flows.Flow([transforms.LULinear(3)], v or ()),
    "MLP: activation": lambda v: conditioners.MLP(2, 1, 2, activation=v),
    "MLPEncoder: activation": lambda v: encoders.MLPEncoder(2, 1, activation=v),
    "log_prob: value": lambda v: flows.nice(3).log_prob(v),
    "Flow: sample_shape": lambda v: flows.nice(3)().rsample(v),
    "dequantize: x": pf.dequantize,
    "load: path": lambda v: pf.load(v if v != "x" else ""),
    "AutoFlow: name": lambda v: pf.AutoFlow(flows.nice, name=v if isinstance(v, int) else ()),
}
CASES = [
    pytest.param(name, use, value, id=f"{name}-{value!s:.12}")
    for table, values in ((INTEGERS, NO_INTEGERS), (NUMBERS, NO_NUMBERS), (SIZES, NO_SIZES), (OBJECTS, NO_OBJECTS))
    for name, use in table.items()
    for value in values
]


@pytest.mark.parametrize(("name", "use", "value"), CASES)
def test_what_makes_no_sense_is_refused_by_name(name, use, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must .*got ") as caught:
        use(value)
    assert "\n" not in str(caught.value)


def test_values_that_make_sense_are_taken_in_all_their_forms():
    """Without this test, a function that refuses all values would pass the law above."""
    forms = {"num_transforms": np.int32(1), "hidden_dims": [np.int64(8)], "bound": np.float32(5)}
    assert flows.nsf(np.int64(3), **forms).event_shape == (3,)
    assert transforms.Permute(np.array([1, 0])).event_shape == (2,)
    assert transforms.Coupling(bijectors.Affine(), conditioners.MLP(2, 1, 2), np.array([1, 1, 0])).event_shape == (3,)
    assert distributions.StandardNormal(3).event_shape == distributions.StandardNormal((3,)).event_shape == (3,)
    assert conditioners.MLP(2, 1, 2, activation=lambda: torch.nn.LeakyReLU(0.1))(torch.zeros(5, 2)).shape == (5, 1, 2)


def test_none_is_a_default_where_the_signature_says_so():
    x = torch.randn(60, 3)
    for training in (Training(gradients=Gradients(clip_norm=None)), Training(heavy_tails=None)):
        settings = {"discrete": None, "batch_size": None, "training": training, "max_epochs": 1, "progress": False}
        assert pf.fit_density(flows.nice(3, num_transforms=1), x, **settings).steps
    with pytest.raises(ValueError, match="discrete columns must hold integers only, unlike column 0"):
        pf.fit_density(flows.nice(3), x, discrete=0)  # index 0 is a column, not a missing argument


@pytest.mark.parametrize("fit", [pf.fit_svi, pf.psis, pf.resample, pf.refine])
def test_programs_and_their_arguments_are_refused_by_name(fit):
    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    y = torch.tensor(1.0)
    guide = pf.AutoFlow(model).setup(y)
    with pytest.raises(TypeError, match=r"^.*model must be a Pyro program, which can be called, got None\."):
        fit(None, model, y)
    for name in ("vectorize", "max_plate_nesting"):
        with pytest.raises(TypeError, match=rf"{name} must be given with the model, .*pf.Program\(model, {name}="):
            fit(model, guide, y, **{name: "vmap"})
    with pytest.raises(TypeError, match=r"Give pf.Program\(model, kwargs=\.\.\.\) in place of the model"):
        fit(model, guide, y, model_kwargs={"x": 1.0})


FLOW, CONDITIONAL = (flows.realnvp(3, context, num_transforms=2, hidden_dims=(8,)) for context in (0, 2))
VALUES = {
    "float64": (torch.Tensor.double, r"dtype, torch.float32, got torch.float64; use {}\.to\(.*, or flow\.double"),
    "float16": (torch.Tensor.half, r"flow's dtype, torch.float32, got torch.float16; use {}\.to\(torch.float32\)"),
    "complex": (lambda x: x.to(torch.complex64), r"hold real numbers, got torch.complex64; use torch.view_as_real\({}"),
    "sparse": (torch.Tensor.to_sparse, r"be a dense tensor, got a sparse one, torch.sparse_coo; use {}\.to_dense"),
    "quantised": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        r"a quantised one, .*{}\.dequantize",
    ),
    "nested": (lambda x: torch.nested.nested_tensor([x, x]), r"got a nested one; .* one by one, {}\.unbind"),
    "meta": (lambda x: x.to("meta"), r"lie on the flow's device, cpu, got one on meta; use {}\.to\('cpu'\)"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.parametrize("kind", VALUES)
def test_values_and_contexts_that_a_flow_cannot_score_are_refused_in_its_own_words(kind):
    change, message = VALUES[kind]
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    of_value, of_context = (f"{argument} must .*{message.format(argument)}" for argument in ("value", "context"))
    for use in (FLOW.log_prob, FLOW().log_prob, lambda value: CONDITIONAL.log_prob(value, context)):
        with pytest.raises(ValueError, match=f"^log_prob: {of_value}"):
            use(change(x))
    for use in (CONDITIONAL, lambda value: CONDITIONAL.log_prob(x, value), lambda value: CONDITIONAL.sample((), value)):
        with pytest.raises(ValueError, match=f"^Flow: {of_context}"):
            use(change(context))
    if kind not in ("float64", "float16", "meta"):
        with pytest.raises(ValueError, match=f"^fit_density: x must .*{message.format('x')}"):
            pf.fit_density(FLOW, change(torch.randn(60, 3)))


def test_a_flow_without_numbers_says_so():
    flow = flows.realnvp(3, num_transforms=1, hidden_dims=(8,)).to("meta")
    with pytest.raises(ValueError, match=r"log_prob: value must lie on the flow's device, meta, .*cpu; .*to_empty"):
        flow.log_prob(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="fit_density: the flow must hold numbers, but lies on the meta device"):
        pf.fit_density(flow, torch.randn(60, 3))
    assert flow.log_prob(torch.zeros(5, 3, device="meta")).shape == (5,)  # the shapes alone are valid
    assert flow().log_prob(torch.zeros(5, 3, device="meta")).shape == (5,)
    with pytest.raises(ValueError, match="fit_density: x must hold numbers, but lies on the meta device"):
        pf.fit_density(FLOW, torch.zeros(60, 3, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_flows_in_half_precision_are_refused_with_the_way_out(dtype):
    flow = flows.realnvp(3, num_transforms=1, hidden_dims=(8,)).to(dtype)
    message = rf"the flow must be float32 or float64, got {dtype}, .*Use flow\.float\(\); .*mixed_precision=True"

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    guide = pf.AutoFlow(model).setup().to(dtype)
    for caller, call in (
        ("Flow", lambda: flow.log_prob(torch.zeros(5, 3, dtype=dtype))),
        ("Flow", flow),
        ("Flow", lambda: flow.sample((2,))),
        ("Flow", lambda: flow.rsample_and_log_prob((2,))),
        ("Flow", lambda: pf.fit_svi(model, guide, steps=2, progress=False)),
        ("fit_density", lambda: pf.fit_density(flow, torch.randn(60, 3))),
    ):
        with pytest.raises(ValueError, match=f"^{caller}: {message}"):
            call()
    training = Training(mixed_precision=True)  # the way out
    assert pf.fit_density(FLOW, torch.randn(60, 3), max_epochs=1, training=training, progress=False).steps


@pytest.mark.slow
def test_autocast_may_mix_dtypes_and_graphs_see_no_checks():
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    expected = CONDITIONAL.log_prob(x, context).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert CONDITIONAL.log_prob(x, context.bfloat16()).isfinite().all()
    torch._dynamo.reset()
    whole = torch.compile(CONDITIONAL.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x, context).detach(), expected)
    torch.testing.assert_close(torch.func.vmap(CONDITIONAL.log_prob)(x, context).detach(), expected)


@pytest.mark.parametrize("loader", [False, True])
def test_numbers_that_float32_collapses_have_two_ways_out(loader):
    def fit(x: torch.Tensor, flow: flows.Flow) -> pf.Fit:
        rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=30) if loader else x
        return pf.fit_density(flow, rows, max_epochs=1, progress=False)

    def new() -> flows.Flow:
        return flows.nice(2, num_transforms=1, hidden_dims=(8,))

    x = torch.randn(90, 2, dtype=torch.float64)
    stamps = x + torch.tensor([0.0, 1e9])
    words = r"x is constant in column 1 \(1e\+09\), .* if its numbers differ by less than torch.float32 can tell, "
    with pytest.raises(ValueError, match=f"^fit_density: {words}subtract a constant .*or use flow.double"):
        fit(stamps, new())
    assert fit(stamps, new().double()).steps  # both remedies
    assert fit(stamps - stamps.mean(0), new()).steps
    with pytest.raises(ValueError, match=r"x is constant in column 1 \(3\), which has no density"):
        fit(torch.stack((x[:, 0], torch.full((90,), 3.0)), 1), new())
    found = r"^fit_density: (x|a batch) holds numbers of up to .*e\+\d+, which overflow in .*torch.float32; .*double"
    with pytest.raises(ValueError, match=found):
        fit(x * 1e200, new())
    with pytest.raises(ValueError, match=r"hold NaN or inf in column 1 \(1 of"):
        fit(torch.where(torch.arange(180).reshape(90, 2) == 7, torch.inf, x), new())


def test_errors_quote_values_on_one_line_and_not_at_length():
    with pytest.raises(ValueError, match=re.escape("got ndarray float64 (40, 40).")) as caught:
        flows.nsf(np.zeros((40, 40)))
    assert len(str(caught.value)) < 160
    assert "\n" not in str(caught.value)
