"""Guides stay stable in Pyro's own SVI: the pace of their networks, their start, and steps of usual size."""

import contextlib
import gc
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_guides import conjugate
from laws import randomise
from models import normals, sampling
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import init_to_median

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows.bijectors import LogisticMixture
from pyro_flows.conditioners import MADE, MLP, Conditioner, MLPField, Periodic
from pyro_flows.conditioners.base import Linear, Paced, networks_of, set_pace
from pyro_flows.encoders import MLPEncoder
from pyro_flows.fitting.elbo_loss import in_training
from pyro_flows.guides.guide_flow import share_step
from pyro_flows.training import Gradients
from pyro_flows.transforms import BlockAutoregressive, Continuous, Elementwise, ScaledLinear

NETWORKS = {
    "mlp": lambda width=48: MLP(4, 3, 2, (width, width)),
    "mlp_skip": lambda width=48: MLP(4, 3, 2, (width, width), skip=True),
    "mlp_centered": lambda width=48: MLP(4, 3, 2, (width, width), centered=True),
    "mlp_context": lambda width=48: MLP(4, 3, 2, (width, width), 5),
    "made": lambda width=48: MADE(4, 2, (width, width)),
    "made_context": lambda width=48: MADE(4, 2, (width, width), 5),
    "periodic": lambda width=48: Periodic(MLP(6, 3, 2, (width, width)), [True, False, True, False]),
}


LAYERS = {  # layers with networks or tables
    "block": lambda: BlockAutoregressive(4, (3, 3), MLP(5, 4, 8)),
    "continuous": lambda: Continuous(MLPField(4, context_dim=5, hidden_dims=(8, 8))),
    "table": lambda: Elementwise(LogisticMixture(3), 4),
    "linear": lambda: ScaledLinear(4),
}


def gaussian():
    """Sample four standard normal latents, each observed once with unit noise."""
    z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.tensor([1.0, -1.0, 2.0, -2.0]))


def centred():
    """Sample the centred eight schools, a funnel."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    mean, sd = pyro.sample("mean", dist.Normal(0.0, 5.0)), pyro.sample("sd", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mean, sd))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def wide():
    """Sample a hundred latents, too many for a full matrix."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(99), scale).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.linspace(-2, 2, 99))


def rows(y):
    """Sample the groups of a plate in minibatches."""
    mean, sd = pyro.sample("mean", dist.Normal(0.0, 5.0)), pyro.sample("sd", dist.HalfNormal(5.0))
    with pyro.plate("group", len(y), subsample_size=20) as seen:
        level = pyro.sample("level", dist.Normal(mean, sd))
        width = pyro.sample("width", dist.LogNormal(0.1 * level, 1.0))
        noise = dist.Normal(level.unsqueeze(-1) + torch.zeros(4), width.unsqueeze(-1))
        pyro.sample("y", noise.to_event(1), obs=y[seen])


def train(model, guide, *args, lr=0.03, steps=60, seed=0, elbo=None):
    """Return the losses of plain SVI; a failing step ends them with NaN."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    guide.setup(*args)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo or Trace_ELBO())
    return [svi.step(*args) for _ in range(steps)]


# ------------------------------------------------------------ the pace


def paced(module, pace):
    """Return a module whose networks, tables and linear maps have a pace."""
    others = [part for part in module.modules() if isinstance(part, Paced) and not isinstance(part, Linear)]
    for parts in (*networks_of(module), others):
        set_pace(parts, pace)
    return module


def units(module):
    return [part.unit for part in module.modules() if isinstance(part, Paced)]


@pytest.mark.parametrize("rows", [7, 700])  # with many rows the unit multiplies the matrix in place of the results
@pytest.mark.parametrize("name", [*NETWORKS, *LAYERS])
def test_a_pace_keeps_what_a_module_computes_bit_for_bit_and_comes_with_its_state(name, rows):
    make = {**NETWORKS, **LAYERS}[name]
    module, again = randomise(make()), make()
    x, context = torch.randn(rows, 4), torch.randn(rows, 5) if module.context_dim else None
    run = type(module).forward if name in NETWORKS else type(module).forward_and_log_det
    before, state = run(module, x, context), {k: v.clone() for k, v in module.state_dict().items()}
    for pace in (1.0, 0.125, None):
        paced(module, pace)
        assert all(map(torch.equal, run(module, x, context), before))
        again.load_state_dict(module.state_dict())
        assert units(again) == units(module)
        assert all(map(torch.equal, run(again, x, context), before))
        moved = any(not torch.equal(value, state.get(key, value)) for key, value in module.state_dict().items())
        assert moved == (pace is not None and units(module) != [1.0] * len(units(module)))


def test_a_conditioner_has_a_pace_of_its_own():
    layer = Elementwise(LogisticMixture(3), 4, MLP(2, 4, LogisticMixture(3).num_params))
    set_pace([layer], 0.5)
    assert layer.unit == 1.0
    block = BlockAutoregressive(4, (3, 3), MLP(5, 4, 8))
    own, of_conditioner = networks_of(block)
    set_pace(of_conditioner, 2.0)
    before = units(block.conditioner)
    share_step(flows.Flow([block]))
    assert units(block.conditioner) == before
    assert all(layer.unit != 1.0 for layer in own)


@pytest.mark.parametrize("recipe", [None, "nsf", "bnaf", "cnf", "gaussianization"])
def test_a_guide_with_paces_comes_back_from_a_file(recipe, tmp_path):
    model = sampling(z=normals(3 if recipe else 1))
    guide = pf.AutoFlow(model, recipe and getattr(flows, recipe))
    train(model, guide, steps=2)
    pf.save(guide, tmp_path / "guide.pt")
    again, draws = pf.load(tmp_path / "guide.pt"), guide.sample(5)
    assert torch.equal(again.log_prob(draws), guide.log_prob(draws))
    assert units(again) == units(guide)


def largest_move(net: Conditioner, lr: float) -> float:
    """Return the largest change of a bijector's parameter in the second of two Adam steps, which move all layers."""
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for _ in range(2):
        optimizer.zero_grad()
        before = net(x)
        before.square().add(before).sum().backward()
        optimizer.step()
    return (net(x) - before).abs().max().item()


@pytest.mark.parametrize("name", ["mlp", "made", "periodic"])
def test_a_step_of_adam_moves_paced_networks_of_all_widths_alike(name):
    moves = {(w, p): largest_move(paced(NETWORKS[name](w), p), 0.01) for w in (16, 512) for p in (1.0, None)}
    assert moves[512, 1.0] < 0.03
    assert moves[512, 1.0] < 2 * moves[16, 1.0]
    assert moves[512, None] > 20 * moves[512, 1.0]  # a control: networks without a pace fail


@pytest.mark.parametrize(("model", "make"), [(gaussian, pf.AutoFlow), (rows, lambda m: pf.AutoPlateFlow(m, "group"))])
def test_fit_svi_trains_without_the_paces_and_leaves_them(model, make):
    args = () if model is gaussian else (2 * torch.randn(60, 1) + torch.randn(60, 4),)
    guide = make(model).setup(*args)
    own = units(guide)
    assert any(unit < 1 for unit in own)
    for error in (None, KeyboardInterrupt, RuntimeError):
        before = {key: value.clone() for key, value in guide.state_dict().items()}
        with contextlib.suppress(KeyboardInterrupt, RuntimeError), in_training(guide, [*guide.parameters()], None):
            assert guide.training
            assert all(unit >= 1 for unit in units(guide))
            if error:
                raise error
        assert units(guide) == own
        assert not guide.training
        assert all(torch.equal(before[key], value) for key, value in guide.state_dict().items())
    pf.fit_svi(model, guide, *args, steps=3, progress=False)
    assert units(guide) == own


def test_a_part_of_an_encoder_stays_in_evaluation_mode_if_the_encoder_keeps_it_there():
    class Frozen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
            self.train()

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, y):
            return self.linear(self.norm(y))

    encoder = Frozen()
    pf.fit_svi(rows, pf.AutoPlateFlow(rows, "group", encoder=encoder), torch.randn(60, 4), steps=3, progress=False)
    assert not encoder.norm.running_mean.any()  # statistics of batches


def test_fit_svi_trains_a_guide_that_a_function_calls_alike():
    found = []
    for wrapped in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        guide = pf.AutoFlow(centred).setup()
        program = (lambda guide=guide: guide()) if wrapped else guide
        options = {"lr": 0.01, "num_particles": 8, "warm_start": False, "gradients": Gradients(clip_norm=1.0)}
        found.append(pf.fit_svi(centred, program, steps=5, progress=False, **options).losses)
        assert units(guide.flow.transforms[0])[0] < 1
    assert torch.equal(*found)


@pytest.mark.slow
def test_a_compiled_objective_forgets_the_paces():
    """The compiled objective stores paces as constants, so that it must be recompiled for new ones."""
    torch.manual_seed(0)
    guide = pf.AutoFlow(gaussian).setup()
    elbo = JitTrace_ELBO(64, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(gaussian, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(2):
        before = svi.step()
        fit = pf.fit_svi(gaussian, guide, steps=50, objective=elbo, progress=False)
        assert fit.losses[0] < 2 * before
        with torch.no_grad():
            loss = Trace_ELBO(500, vectorize_particles=True, max_plate_nesting=0).loss(gaussian, guide)
        assert abs(loss - fit.losses[-10:].mean()) < 2
        assert svi.step() < 2 * before


def test_a_state_of_rows_means_the_same_at_any_pace():
    guide = pf.AutoPlateFlow(rows, "group").setup(y := torch.randn(30, 4))
    with in_training(guide, list(guide.parameters()), Trace_ELBO()):
        state = {key: value.clone() for key, value in guide.state_dict().items()}
    values = guide.sample(3, y)
    before = guide.log_prob(values, y)
    guide.load_state_dict(state)
    assert torch.equal(guide.log_prob(values, y), before)


def output_paces(flow):
    """Return the paces of the last layers, rounded to powers of 2, times the widths below them."""
    return [layer.unit * layer.in_features for layers in networks_of(flow) for layer in layers if layer.zero]


def test_a_pace_that_a_recipe_chose_is_kept():
    guide = pf.AutoFlow(gaussian, lambda dim: paced(flows.maf(dim), 2.0)).setup()
    assert output_paces(guide.flow) == [2.0] * 5


@pytest.mark.parametrize(
    ("dim", "recipe", "paces"),
    [(32, None, [1 / 8] * 8), (64, None, [1 / 4] * 16), (65, None, [1 / 16] * 16), (9, flows.maf, [1 / 4] * 5)],
)
def test_networks_share_a_step_but_move_by_a_quarter_each_for_33_to_64_latents(dim, recipe, paces):
    assert output_paces(pf.AutoFlow(sampling(z=normals(dim)), recipe).setup().flow) == paces


def test_a_trained_guide_is_let_go():
    guide = pf.AutoFlow(gaussian)
    train(gaussian, guide, steps=1)
    pyro.clear_param_store()
    gone = weakref.ref(guide)
    gc.disable()
    try:
        del guide
        assert gone() is None
    finally:
        gc.enable()


def test_amortised_guides_and_recipes_keep_torchs_weights():
    guide = pf.AutoFlow(conjugate, encoder=MLPEncoder(2, 4)).setup(torch.zeros(2))
    for flow in (guide.flow, flows.realnvp(3), flows.maf(3)):
        assert all(layer.unit == 1.0 for layers in networks_of(flow) for layer in layers)


# ------------------------------------------------------------ usual step sizes

RECIPES = "iaf", "maf", "nsf", "nsf_ar", "nice", "realnvp", "planar_flow", "radial_flow", "sylvester_flow", "flowpp"


@pytest.mark.slow
@pytest.mark.parametrize("lr", [0.01, 0.03, 0.05])
@pytest.mark.parametrize(("model", "start"), [(gaussian, 200), (centred, 400), (wide, 1500)])
def test_plain_svi_does_not_explode(model, start, lr):
    """Losses start below ``start``; without paces they rose to at least 4e3, or ended in NaN."""
    local = (lr == 0.03) == (model is centred)  # each model with each step size, in both modes
    with pyro.settings.context(module_local_params=local):
        losses = train(model, pf.AutoFlow(model), lr=lr)
    assert max(losses[20:]) < start
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_plain_svi_does_not_explode_with_any_recipe(recipe):
    """Losses start at 12 to 18.  Without paces flowpp rises to 1e19, realnvp to 1e4, maf and iaf to at least 100."""
    assert max(train(gaussian, pf.AutoFlow(gaussian, getattr(flows, recipe)))[20:]) < 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "steps"), [("bnaf", 15), ("cnf", 20), ("ffjord", 40), ("gaussianization", 40), ("residual_flow", 40)]
)
def test_plain_svi_does_not_explode_with_layers_of_other_kinds(recipe, steps):
    """Losses start at 60 to 70.  Without a pace the first three layers rose to at least 1e3."""
    assert max(train(centred, pf.AutoFlow(centred, getattr(flows, recipe)), steps=steps)[5:]) < 100


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO(), Trace_ELBO(16, vectorize_particles=True)])
def test_plain_svi_does_not_explode_with_other_elbos(elbo):
    assert max(train(centred, pf.AutoFlow(centred), elbo=elbo)[20:]) < 400


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "encoder"), [(0.01, None), (0.03, None), (0.03, lambda: MLPEncoder(4, 8))])
def test_plain_svi_does_not_explode_with_plates(lr, encoder):
    torch.manual_seed(0)
    y = 2 * torch.randn(100, 1) + torch.randn(100, 4)
    guide = pf.AutoPlateFlow(rows, "group", encoder=encoder and encoder())
    losses = train(rows, guide, y, lr=lr)
    assert max(losses[20:]) < 3 * max(losses[:20])


@pytest.mark.slow
def test_an_autoencoder_holds_in_plain_svi():
    """With torch's weights for the map from encoder to location, losses rise to 4 to 30 times the first one."""
    torch.manual_seed(1)
    x = (torch.randn(64, 5) @ torch.randn(5, 100) > 0).float()
    decoder = torch.nn.Sequential(torch.nn.Linear(20, 200), torch.nn.Softplus(), torch.nn.Linear(200, 100))

    def autoencoder(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    guide = pf.AutoPlateFlow(autoencoder, "data", encoder=MLPEncoder(100, 50, (200,)))
    losses = train(autoencoder, guide, x, steps=100, seed=1)
    assert max(losses[5:]) < 3 * losses[0]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_rows_of_one_latent_hold_in_plain_svi():
    """With torch's weights for the splines of a row, losses rise to two to eight times the first one."""
    torch.manual_seed(0)
    x = torch.randn(30, 1) @ torch.randn(1, 8) + 0.3 * torch.randn(30, 8)
    weights = torch.randn(8)

    def factor(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * weights, 0.5).to_event(1), obs=x)

    for seed in range(3):
        losses = train(factor, pf.AutoPlateFlow(factor, "data", encoder=MLPEncoder(8, 4)), x, steps=100, seed=seed)
        assert max(losses[5:]) < 1.2 * losses[0]


@pytest.mark.slow
def test_scales_of_many_latents_grow_by_a_summand_where_all_is_flat():
    guide = pf.AutoFlow(flat := sampling(z=normals(100, 1e6)))
    train(flat, guide, lr=0.05, steps=150)
    assert 2.5 < guide.flow().sample(torch.Size([100])).std() < 10  # a factor per layer would give about 1e3


@pytest.mark.slow
def test_plain_svi_reaches_the_evidence():
    """log Z of the conjugate model is that of N(0, 2 I) at the data; the flow starts at the Gaussian posterior."""
    guide = pf.AutoFlow(gaussian)
    train(gaussian, guide, lr=0.02, steps=300, elbo=Trace_ELBO(32, vectorize_particles=True))
    with torch.no_grad():
        loss = Trace_ELBO(2000, vectorize_particles=True, max_plate_nesting=0).loss(gaussian, guide)
    log_z = dist.Normal(torch.zeros(4), math.sqrt(2)).log_prob(torch.tensor([1.0, -1.0, 2.0, -2.0])).sum().item()
    assert 0 < loss + log_z + 0.05 < 0.15


@pytest.mark.slow
def test_a_long_way_to_the_posterior_leaves_no_distortions():
    """With networks that are not centred, or hidden layers at four times the pace, fits end 8 to 20 nats lower."""
    torch.manual_seed(0)
    x = torch.randn(100, 2)
    y = x @ torch.tensor([9.0, -9.0]) + torch.randn(100)

    def regression():
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        pyro.sample("y", dist.Normal(slopes @ x.T, 1.0).to_event(1), obs=y)

    guide = pf.AutoFlow(regression)
    train(regression, guide, lr=0.05, steps=400)
    covariance = 100 * x.double() @ x.double().T + torch.eye(100).double()
    evidence = dist.MultivariateNormal(torch.zeros(100).double(), covariance).log_prob(y.double())
    assert evidence + Trace_ELBO(1000, vectorize_particles=True).loss(regression, guide) < 4


# ------------------------------------------------------------ the start


def absurd():
    """Sample data that are impossible at the prior's centre: their noise is e⁻²⁰."""
    level = pyro.sample("level", dist.Normal(0.0, 10.0))
    noise = pyro.sample("noise", dist.LogNormal(-20.0, 5.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(level, noise), obs=torch.tensor([13.0, 14.0, 15.0]))


def test_a_guide_starts_at_the_origin_where_the_centre_is_absurd():
    state = torch.get_rng_state()
    assert pf.AutoFlow(absurd).setup().start[0].tolist() == [0.0, 0.0]
    at_centre = pf.AutoFlow(absurd, init_loc_fn=pf.guides.init_to_center).setup().start[0]
    torch.testing.assert_close(at_centre, torch.tensor([0.0, -20.0]))

    def model():
        level = pyro.sample("level", dist.Normal(14.0, 10.0))
        pyro.sample("y", dist.Normal(level, 1.0), obs=torch.tensor(13.0))

    assert pf.AutoFlow(model).setup().start[0].tolist() == [14.0]

    def hidden():  # the density at the centre is that of a draw
        spread = pyro.sample("spread", dist.LogNormal(-20.0, 5.0))
        pyro.sample("y", dist.Normal(pyro.sample("hidden", dist.Normal(0.0, 1.0)), spread), obs=torch.tensor(1.0))

    kept = pf.AutoFlow(poutine.block(hidden, hide=["hidden"])).setup().start[0]
    torch.testing.assert_close(kept, torch.tensor([-20.0]))
    assert pf.AutoFlow(model, init_loc_fn=init_to_median(num_samples=3)).setup().start[0].item() != 14.0
    torch.set_rng_state(state)
    pf.AutoFlow(absurd, flow=lambda dim: flows.Flow([ScaledLinear(dim)])).setup()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plate_guide_starts_at_the_likelier_one_too():
    def model(y):
        noise = pyro.sample("noise", dist.LogNormal(-20.0, 5.0))
        with pyro.plate("row", len(y), subsample_size=2) as seen:
            level = pyro.sample("level", dist.Normal(0.0, 10.0))
            pyro.sample("y", dist.Normal(level, noise), obs=y[seen])

    y = torch.tensor([13.0, 14.0, 15.0])
    assert pf.AutoPlateFlow(model, "row").setup(y).packings["latent"].start.tolist() == [0.0]


def test_a_linear_map_moves_each_feature_by_its_own_scale():
    """A matrix in front of the scales would move the second feature by 100 times."""
    layer = ScaledLinear(2)
    layer.factors.data.copy_(torch.diag(torch.tensor([5.0, -5.0])))
    before, _ = layer.forward_and_log_det(torch.ones(2))
    layer.factors.data[1, 0] = 0.01  # one step of Adam
    after, _ = layer.forward_and_log_det(torch.ones(2))
    torch.testing.assert_close(after / before, torch.tensor([1.0, 1.01]))
