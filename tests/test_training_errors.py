"""A step of Pyro's SVI with a draw that is not finite ends with one line: the site, the cause, the way out."""

import copy
import functools
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_flows import AutoFlow, AutoPlateFlow, distributions, fit_svi, flows, psis

small = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(8,))
Y = torch.tensor([0.5, -1.0, 2.0, 0.0])
WAY_OUT = "smaller step size, pyro.optim.ClippedAdam, more particles, or fit_svi, which skips such steps."


def breaking(after: int = 8, log_density=lambda mu: (0 * mu).sqrt()):
    """Sample a hierarchy whose site "wall" fails after some runs: by default its gradient, at a finite density."""
    runs = []

    def model(y):
        runs.append(0)
        zero, one = y.new_zeros(()), y.new_ones(())
        mu = pyro.sample("mu", dist.Normal(zero, one))
        tau = pyro.sample("tau", dist.HalfNormal(one))
        with pyro.plate("row", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, one))
            pyro.sample("y", dist.Normal(theta, 1 + tau), obs=y)
        pyro.factor("wall", log_density(mu) if len(runs) > after else 0 * mu)

    return model


sound = breaking(after=math.inf)


def auto(model):
    return AutoFlow(model, small)


def plate(model):
    return AutoPlateFlow(model, "row", local_flow=small, global_flow=small)


def train(model, guide, *args, elbo=None, steps=20):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo or Trace_ELBO())
    return [svi.step(*args) for _ in range(steps)]


def message_of(call, *args, **kwargs) -> str:
    with pytest.raises(FloatingPointError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert len(message) < 450
    assert "\n" not in message
    assert message.endswith(WAY_OUT)
    return message


def spoil(guide, value: float = math.nan) -> None:
    for parameter in guide.parameters():
        parameter.data.fill_(value)


def reaches(guide, place: float, scale: float = 0.1) -> None:
    """Let an AutoFlow draw its latents around a place, by its last, fixed affine map."""
    last = guide.flow.transforms[-1]
    last.set(torch.full_like(last.loc, place), torch.full_like(last.loc, scale))


both_guides = pytest.mark.parametrize("build", [auto, plate], ids=["AutoFlow", "AutoPlateFlow"])
ELBOS = {
    "Trace": Trace_ELBO(),
    "MeanField": TraceMeanField_ELBO(),
    "Renyi": RenyiELBO(num_particles=2),
    "vectorised": Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
}


@pytest.mark.parametrize("local", [False, True], ids=["store", "module_local_params"])
@pytest.mark.parametrize("validate", [True, False], ids=["validation", "no validation"])
@both_guides
@pytest.mark.parametrize("elbo", ELBOS)
def test_a_broken_gradient_names_the_latent_and_the_site_of_the_model(elbo, build, validate, local):
    with pyro.settings.context(module_local_params=local), pyro.validation_enabled(validate):
        model = breaking()
        message = message_of(train, model, build(model), Y, elbo=ELBOS[elbo])
    owner, more = {auto: ("AutoFlow", 2), plate: ("AutoPlateFlow", 1)}[build]
    assert message.startswith(f"{owner}: the draw of latent site 'mu' and of {more} more must be finite, got nan: ")
    assert "parameters are lost, since the gradient of the last step was not: " in message
    assert "there the log-density of the model's site 'wall' had a gradient that is not finite" in message


@both_guides
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("worst", [math.nan, -math.inf])
def test_a_broken_density_is_named_with_its_value(worst, dtype, build):
    with pyro.validation_enabled(False):  # otherwise Pyro would refuse the factor itself
        model = breaking(log_density=lambda mu: mu * 0 + worst * mu.exp())
        message = message_of(train, model, build(model), Y.to(dtype))
    assert f"there the log-density of the model's site 'wall' was {worst}. " in message


@pytest.mark.parametrize("validate", [True, False])
def test_the_message_does_not_grow_with_the_model(validate):
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(100), 1.0).to_event(1))
        pyro.factor("wall", (0 * x.sum()).sqrt())

    with pyro.validation_enabled(validate):
        message = message_of(train, model, AutoFlow(model))  # of 16 layers
    assert message.startswith("AutoFlow: the draw of latent site 'x' must be finite, got nan: ")
    assert "'wall'" in message


def test_rows_of_a_minibatch_are_those_of_the_broken_step():
    y = torch.arange(6.0)

    def model(y):
        with pyro.plate("row", len(y), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
            slope = torch.where(y[rows] == 4, 0 * z, 1 + z**2)  # only row 4 fails
            pyro.sample("y", dist.Normal(z + slope.sqrt(), 1.0), obs=y[rows])

    message = message_of(train, model, AutoPlateFlow(model, "row", local_flow=small), y, steps=200)
    assert message.startswith("AutoPlateFlow: the draw of latent site 'z' must be finite, got nan: ")
    assert "the model's site 'y' had a gradient that is not finite" in message


def test_a_model_that_is_sound_at_the_last_draw_is_not_blamed():
    guide = auto(sound)
    train(sound, guide, Y, steps=3)
    spoil(guide)
    message = message_of(train, sound, guide, Y)
    assert "since the gradient of the last step was not. Build the guide anew" in message
    assert "model" not in message


@both_guides
def test_a_guide_that_was_lost_before_says_so(build):
    guide = copy.deepcopy(build(sound).setup(Y))
    spoil(guide)
    message = message_of(train, sound, guide, Y)
    assert "since the gradient of an earlier step was not. " in message


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("recipe", [flows.cnf, flows.nsf, functools.partial(flows.iaf)], ids=["cnf", "nsf", "iaf"])
def test_other_recipes_end_in_the_same_words(recipe, validate):
    """With lost parameters, a solver would fail first, or the base distribution with validation."""
    with pyro.validation_enabled(validate):
        guide = AutoFlow(sound, recipe, base=distributions.StudentTBase).setup(Y)
        spoil(guide)
        message = message_of(train, sound, guide, Y)
    assert message.startswith("AutoFlow: the draw of latent site 'mu' and of 2 more must be finite, got nan: ")
    assert "parameters are lost" in message


# Draws that overflow although all parameters are finite.


@pytest.mark.parametrize("validate", [True, False])
def test_an_infinite_draw_of_finite_parameters_is_an_overflow(validate):
    guide = auto(sound).setup(Y)
    reaches(guide, 3.4e38, 3.4e38)
    with pyro.validation_enabled(validate):
        message = message_of(train, sound, guide, Y)
    assert re.match(r"AutoFlow: the draw of latent site '\w+'( and of \d more)? must be finite, got -?inf: ", message)
    assert "the guide's parameters are finite, but so large that the draw overflows float32. " in message


@pytest.mark.parametrize("vectorised", [False, True])
@pytest.mark.parametrize(("dtype", "place"), [(torch.float32, 95.0), (torch.float64, 800.0)])
def test_a_value_that_overflows_is_named_where_the_draw_is_finite(dtype, place, vectorised):
    guide = auto(sound).setup(Y.to(dtype))
    reaches(guide, place)
    elbo = Trace_ELBO(num_particles=1 + vectorised, vectorize_particles=vectorised, max_plate_nesting=1)
    message = message_of(train, sound, guide, Y.to(dtype), elbo=elbo)
    assert message.startswith("AutoFlow: the draw of latent site 'tau' must be finite, got inf: an unconstrained draw ")
    assert f" overflows {str(dtype).removeprefix('torch.')} where it is constrained. " in message


@both_guides
def test_large_real_latents_and_small_scales_are_welcome(build):
    """Values beyond the range of the exponential pass at real sites, and so do scales whose exponential is zero."""

    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("row", len(y)):
            income = pyro.sample("income", dist.Normal(5e4, 100.0))
            pyro.sample("y", dist.Normal(income, 1.0 + scale), obs=5e4 + y)

    start = pyro.infer.autoguide.init_to_value(values={"scale": torch.tensor(1e-44)})  # near exp(-101)
    guide = {auto: AutoFlow(model, small), plate: plate(model)}[build]
    assert all(map(math.isfinite, train(model, guide, Y, steps=3)))
    guide = AutoFlow(model, small, init_loc_fn=start)
    assert all(map(math.isfinite, train(model, guide, Y, steps=3)))


def test_data_that_are_not_finite_reach_the_draw_through_the_encoder():
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, y: Tensor) -> Tensor:
            return y.mean(-1, keepdim=True) * self.scale

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(mu.sum(), 1.0).expand(y.shape).to_event(1), obs=y)

    guide = AutoFlow(model, functools.partial(flows.nsf, num_transforms=2), encoder=Mean()).setup(Y)
    train(model, guide, Y, steps=2)
    message = message_of(train, model, guide, torch.tensor([math.nan, 0.0, 0.0, 0.0]))
    assert "the encoder returned NaN or infinite numbers" in message


# Cases without an error.


def test_no_error_comes_from_draws_without_gradients():
    """Such draws get weights; a guide with lost parameters fails only under validation."""
    guide = auto(sound).setup(Y)
    spoil(guide)
    with torch.no_grad(), pyro.validation_enabled(False):
        assert guide(Y)["mu"].isnan()
    assert guide.sample(3, Y)["mu"].isnan().all()
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="NaN"):
        psis(sound, guide, Y, num_samples=50)
    with pytest.raises(FloatingPointError, match=r"AutoFlow: the draw of latent site 'mu' .* parameters are lost"):
        psis(sound, guide, Y, num_samples=50)
    with torch.no_grad(), pyro.validation_enabled(True):
        message = message_of(Predictive(sound, guide=guide, num_samples=2), Y)
    assert message.startswith("AutoFlow: the draw of latent site 'mu'")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_guide_is_left_alone(recwarn):
    """A recorded program cannot raise, so losses are NaN from then on."""
    guide = auto(sound)
    svi = SVI(sound, guide, pyro.optim.Adam({"lr": 1e-3}), JitTrace_ELBO(max_plate_nesting=1))
    assert math.isfinite(svi.step(Y))
    spoil(guide)
    assert math.isnan(svi.step(Y))
    assert not [warning for warning in recwarn if "faults" in warning.filename]


@pytest.mark.slow
@pytest.mark.parametrize("objective", [None, Trace_ELBO()], ids=["path", "Trace_ELBO"])
def test_fit_svi_skips_such_draws_as_losses_that_are_not_finite(objective):
    """It counts them with its usual patience for losses that are not finite, and raises its usual error."""
    guide = auto(sound).setup(Y)
    reaches(guide, 95.0)
    settings = {"objective": objective, "warm_start": False, "progress": False}
    with pytest.warns(UserWarning, match="50 of 50 steps were skipped"):
        fit = fit_svi(sound, guide, Y, steps=50, **settings)
    assert fit.skipped == fit.steps == 50
    assert fit.losses.isnan().all()
    with pytest.raises(FloatingPointError, match="not finite at step 100 and at the 99 before") as caught:
        fit_svi(sound, guide, Y, steps=150, **settings)
    assert "AutoFlow: the draw" not in str(caught.value)
