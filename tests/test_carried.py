"""The single pass outside of autograd is used if derivatives are known, and never after a part was changed."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from pyro_flows import AutoFlow, Flow, fit_svi
from pyro_flows.bijectors import Affine, SoftplusAffine
from pyro_flows.conditioners import MLP
from pyro_flows.fitting.elbo_loss import ELBOLoss
from pyro_flows.guides.guide_flow import affine_couplings
from pyro_flows.objectives import PathELBO
from pyro_flows.programs.model_and_guide import Task
from pyro_flows.transforms import Coupling, Elementwise, ScaledLinear
from pyro_flows.transforms.carried import InSingle, can_be_carried

DIM, DRAWS = 3, 5


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Halved(MLP):
    def forward(self, x, context=None):
        return 0.5 * super().forward(x, context)


class Stretched(Affine):
    def forward_and_log_det(self, x, params):
        y, log_det = super().forward_and_log_det(x, params)
        return 2 * y, log_det + torch.tensor(2.0).log()

    def inverse_and_log_det(self, y, params):
        x, log_det = super().inverse_and_log_det(y / 2, params)
        return x, log_det - torch.tensor(2.0).log()


class Shifted(Coupling):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y.sinh(), log_det + y.cosh().log().sum(-1)

    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y.asinh(), context)
        return x, log_det - (1 + y * y).log().sum(-1) / 2


def networks(flow):
    return [part for part in flow.modules() if isinstance(part, MLP)]


def linears(flow):
    return [part for part in flow.modules() if isinstance(part, nn.Linear)]


def replace(flow):
    for net in networks(flow):
        net.hidden[0] = nn.Linear(net.hidden[0].in_features, net.hidden[0].out_features)


CHANGES = {
    "none": lambda flow: None,
    "a network of one's own": lambda flow: [setattr(net, "__class__", Halved) for net in networks(flow)],
    "a bijector of one's own": lambda flow: [setattr(t, "bijector", Stretched()) for t in flow.transforms],
    "a coupling of one's own": lambda flow: [setattr(t, "__class__", Shifted) for t in flow.transforms],
    "hooks": lambda flow: [p.register_forward_hook(lambda m, i, o: 0.5 * o) for p in linears(flow)],
    "hooks before": lambda flow: [p.register_forward_pre_hook(lambda m, i: (2 * i[0],)) for p in linears(flow)],
    "weights that are normed": lambda flow: [parametrizations.weight_norm(part) for part in linears(flow)],
    "weights that are pruned": lambda flow: [prune.random_unstructured(p, "weight", 0.3) for p in linears(flow)],
    "layers that are replaced": replace,
}


def stirred(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def changed(name, num_transforms=2):
    """Return a flow with random parameters after a change."""
    torch.manual_seed(0)
    made = stirred(affine_couplings(DIM, num_transforms=num_transforms, hidden_dims=(4, 4)))
    CHANGES[name](made)
    return made


@pytest.fixture(params=CHANGES)
def flow(request):
    return changed(request.param, num_transforms=3)


def after_changes(ask):
    """Return whether the layers of a flow may use the single pass, after each of the changes."""
    return [ask(changed(name).transforms) for name in CHANGES]


def gradients(flow):
    """Return draws, their log-densities, and the path gradients of an ELBO."""
    torch.manual_seed(1)
    z, log_q = flow().with_path_gradient().rsample_and_log_prob((DRAWS,))
    flow.zero_grad()
    (log_q + (z - 1).square().sum(-1)).mean().backward()
    found = {name: parameter.grad for name, parameter in flow.named_parameters()}
    return z.detach(), log_q.detach(), found


def test_draws_densities_and_gradients_are_those_of_autograd(flow, monkeypatch):
    z, log_q, found = gradients(flow)
    torch.testing.assert_close(flow().log_prob(z), log_q)
    monkeypatch.setattr("pyro_flows.flows.distribution.can_be_carried", lambda layers: False)
    monkeypatch.setattr(Coupling, "forward_and_score", Coupling.__mro__[1].forward_and_score)
    again, log_q_again, wanted = gradients(flow)
    torch.testing.assert_close((z, log_q), (again, log_q_again))
    torch.testing.assert_close(found, wanted)
    assert any(bool(gradient.any()) for gradient in found.values())


def in_single(flow):
    layers = [*flow.transforms, stirred(Elementwise(SoftplusAffine(), DIM)), stirred(ScaledLinear(DIM))]
    return layers, Flow([InSingle(layers)])


@pytest.mark.parametrize("change", ["none", "layers that are replaced"])
def test_single_precision_carries_the_same_up_to_its_rounding(change):
    layers, single = in_single(changed(change, num_transforms=3))
    double, rounded = gradients(Flow(layers)), gradients(single)
    for one, other in zip(double[:2], rounded[:2], strict=True):
        assert other.dtype == torch.float64
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    wanted, found = (list(part[2].values()) for part in (double, rounded))
    torch.testing.assert_close(wanted, found, rtol=1e-4, atol=1e-5)


def test_single_precision_follows_numbers_that_change():
    layers, single = in_single(changed("none"))
    for _ in range(2):
        stirred(single)
        torch.testing.assert_close(gradients(single)[0], gradients(Flow(layers))[0], rtol=1e-5, atol=1e-5)


def test_single_precision_takes_gradients_beyond_its_range():
    layers, single = in_single(changed("none"))
    found = []
    for flow in (single, Flow(layers)):
        torch.manual_seed(1)
        z, _ = flow().with_path_gradient().rsample_and_log_prob((DRAWS,))
        found.append(torch.autograd.grad(1e100 * z.square().sum(), [*single.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e94)


def test_a_step_beyond_single_precision_is_taken_in_double():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1e60).to_event(1))

    guide = AutoFlow(model).setup()
    next(layer.shift for layer in guide.flow.unscaled if hasattr(layer, "shift")).data.fill_(1e60)
    loss = ELBOLoss(Task(model, guide, (), {}), PathELBO(8), None)
    loss.parameters()
    assert all(math.isfinite(loss.joint().detach()) for _ in range(4))
    assert not loss._steps[8]().isfinite()


def test_single_precision_leaves_the_verbs_exact():
    layers, single = in_single(changed("none"))
    assert [*single.parameters()] == [p for layer in layers for p in layer.parameters()]
    x = torch.randn(DRAWS, DIM)
    assert torch.equal(single.log_prob(x), Flow(layers).log_prob(x))
    hook = single.transforms[0].transforms[0].conditioner.output.register_forward_hook(lambda m, i, o: 0.5 * o)
    torch.testing.assert_close(gradients(single)[:2], gradients(Flow(layers))[:2])
    hook.remove()


def test_single_precision_is_for_plain_affine_couplings_in_double():
    assert after_changes(InSingle.suits) == [True, False, False, False, False, False, False, False, True]
    assert not InSingle.suits(affine_couplings(DIM, num_transforms=2).float().transforms)
    assert not InSingle.suits([])


@pytest.mark.parametrize("dim", [2, 20, 40, 70])
def test_the_default_guide_is_trained_in_single_precision(dim):
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    *layers, fixed = AutoFlow(model).setup().flow.transforms
    assert InSingle.suits(layers)
    assert not InSingle.suits([fixed])


def test_the_log_density_is_one_of_the_draw(flow):
    """The gradient of the log-density at the draw is the score, so users can combine both."""
    torch.manual_seed(1)
    z, log_q = flow().with_path_gradient().rsample_and_log_prob((DRAWS,))
    (score,) = torch.autograd.grad(log_q.sum(), z, retain_graph=True)
    leaf = z.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(flow().log_prob(leaf).sum(), leaf)
    torch.testing.assert_close(score, wanted)
    z.retain_grad()
    (log_q + z.square().sum(-1) / 2).sum().backward()
    torch.testing.assert_close(z.grad, wanted + z)


def test_a_frozen_flow_has_that_gradient_too(flow):
    z, log_q = flow.requires_grad_(False)().with_path_gradient().rsample_and_log_prob((DRAWS,))
    assert torch.autograd.grad(log_q.sum(), z)[0].any()


def test_only_plain_flows_are_carried():
    assert after_changes(can_be_carried) == [True, True, True, True, False, False, False, False, True]


def test_parameters_that_change_before_the_way_back_are_refused():
    made = changed("none")
    _, log_q = made().with_path_gradient().rsample_and_log_prob((DRAWS,))
    with torch.no_grad():
        made.transforms[0].conditioner.output.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_q.sum().backward()


def curved():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.3))


@pytest.mark.slow
def test_a_fit_trains_all_of_a_flow_whose_weights_are_normed():
    guide = AutoFlow(curved).setup()
    for part in linears(guide.flow):
        if part.weight.any():  # a zero vector has no direction
            parametrizations.weight_norm(part)
    before = {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}
    fit_svi(curved, guide, steps=20, progress=False)
    still = [name for name, parameter in guide.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


CHANGED = {
    "pruned": lambda flow: [prune.random_unstructured(part, "weight", 0.3) for part in linears(flow)],
    "normed": lambda flow: [nn.utils.spectral_norm(part) for part in linears(flow) if part.weight.any()],
    "a hook": lambda flow: flow.register_forward_hook(lambda module, inputs, output: None),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_flows_that_were_changed_are_trained_in_double(change, monkeypatch):
    taken = []
    monkeypatch.setattr(InSingle, "carry", lambda self, x, score: taken.append(x))
    guide = AutoFlow(curved).setup()
    change(guide.flow)
    fit_svi(curved, guide, steps=3, progress=False)
    recipe = AutoFlow(curved, affine_couplings)
    fit_svi(curved, recipe, steps=3, progress=False)
    assert not taken


@pytest.mark.slow
def test_a_guide_that_says_what_its_posterior_is_is_asked_for_it():
    class Counted(AutoFlow):
        calls = 0

        def get_posterior(self, *args, **kwargs):
            Counted.calls += 1
            return super().get_posterior(*args, **kwargs)

    guide = Counted(curved).setup()
    assert AutoFlow(curved).setup().draws_from_flow
    assert not guide.draws_from_flow
    before = Counted.calls
    fit_svi(curved, guide, steps=20, progress=False)
    assert Counted.calls >= before + 20
