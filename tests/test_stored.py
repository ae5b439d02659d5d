"""After a parameter store is loaded, all results of a guide follow the store immediately."""

import copy
import functools
import gc
import pickle
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_flows as pf
from pyro_flows import AutoFlow, AutoPlateFlow, flows
from pyro_flows.encoders import MLPEncoder, SetEncoder

Y = torch.tensor([[0.5], [-1.0], [2.0]])


def model(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 3):
        level = pyro.sample("level", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(level, 1.0), obs=y[:, 0])


def small(dim: int, context_dim: int = 0) -> flows.Flow:
    return flows.realnvp(dim, context_dim, num_transforms=2, hidden_dims=(4,))


GUIDES = {
    "auto": lambda: AutoFlow(model, small),
    "amortised": lambda: AutoFlow(model, small, encoder=SetEncoder(1, context_dim=2)),
    "plate": lambda: AutoPlateFlow(model, "row", local_flow=small, global_flow=small),
    "encoded plate": lambda: AutoPlateFlow(
        model, "row", encoder=MLPEncoder(1, context_dim=2), local_flow=small, global_flow=small
    ),
}
VALUES = {"mean": torch.tensor(0.3), "level": Y[:, 0] / 2}


def seeded(draw: Any) -> Any:
    pyro.set_rng_seed(3)
    return draw()


def joint(guide: Any, _: Any = None) -> dict[str, Tensor]:
    return seeded(lambda: {"log_weights": pf.psis(model, guide, Y, num_samples=30).log_weights})


def checked(guide: Any, _: Any = None) -> dict[str, Tensor]:
    found = seeded(lambda: pf.check(model, guide, Y, num_samples=200, num_chains=16))
    return {"log_evidence": torch.tensor(found.log_evidence)}


def through_file(guide: Any, folder: Any) -> dict[str, Tensor]:
    pf.save(guide, folder / "guide.pt")
    return seeded(lambda: pf.load(folder / "guide.pt").sample(3, Y))


ANSWERS = {
    "sample": lambda g, _: seeded(lambda: g.sample(3, Y)),
    "median": lambda g, _: seeded(lambda: g.median(Y)),
    "quantiles": lambda g, _: seeded(lambda: g.quantiles([0.1, 0.9], Y)),
    "log_prob": lambda g, _: {"log_prob": g.log_prob(VALUES, Y).detach()},
    "forward": lambda g, _: seeded(lambda: g(Y)),
    "psis": joint,
    "check": checked,
    "save": through_file,
    "deepcopy": lambda g, _: seeded(lambda: copy.deepcopy(g).sample(3, Y)),
    "pickle": lambda g, _: seeded(lambda: pickle.loads(pickle.dumps(g)).sample(3, Y)),
    "state_dict": lambda g, _: {name: value.clone() for name, value in g.state_dict().items()},
}
OF_AUTO = {
    "get_posterior": lambda g, _: {"z": seeded(lambda: g.get_posterior(Y).rsample().detach())},
    "get_transform": lambda g, _: {"z": g.get_transform(Y)(torch.ones(4)).detach()},
}
CASES = [
    *((kind, name, ask) for kind in GUIDES for name, ask in ANSWERS.items()),
    *((kind, name, ask) for kind in ("auto", "amortised") for name, ask in OF_AUTO.items()),
    ("amortised", "bind", lambda g, _: seeded(lambda: g.bind(Y).sample(3))),
]


TRIED = ("auto", "check", "load"), ("auto", "psis", "load"), ("plate", "psis", "load")  # one of the slower ones
CASES_BY = [
    (*case, by)
    for case in CASES
    for by in ("load", "set_state")
    if case[1] not in ("check", "psis") or (*case[:2], by) in TRIED
]


@pytest.mark.parametrize(("kind", "name", "ask", "by"), CASES_BY, ids=["-".join((k, n, b)) for k, n, _, b in CASES_BY])
def test_every_answer_is_that_of_the_loaded_store(kind: str, name: str, ask: Any, by: str, tmp_path: Any) -> None:
    guide, store, file = GUIDES[kind](), pyro.get_param_store(), str(tmp_path / "params")
    guide(Y)
    stir(guide)
    wanted = {k: v.detach().clone() for k, v in ask(guide, tmp_path).items()}
    guide(Y)
    store.save(file)
    state = copy.deepcopy(store.get_state())
    stir(guide)
    other = ask(guide, tmp_path)
    assert any(not torch.equal(other[key], value) for key, value in wanted.items())  # they differ
    store.load(file) if by == "load" else store.set_state(state)
    for key, value in ask(guide, tmp_path).items():
        torch.testing.assert_close(value.detach(), wanted[key])


def stir(guide: Any) -> None:
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("kind", GUIDES)
def test_a_step_trains_what_was_loaded(kind: str) -> None:
    """After a load, store and guide share one set of tensors, in any order of use."""
    guide = GUIDES[kind]()
    guide(Y)
    store = pyro.get_param_store()
    state = copy.deepcopy(store.get_state())
    stir(guide)
    store.set_state(state)
    trace = poutine.trace(guide).get_trace(Y)
    own = {id(parameter) for parameter in guide.parameters()}
    trained = [site["value"] for site in trace.nodes.values() if site["type"] == "param"]
    assert trained
    assert all(id(value.unconstrained()) in own for value in trained)


@pytest.mark.parametrize("how", ["clear", "scope", "local"])
def test_parameters_of_guides_are_freed_as_the_page_on_scale_says(how: str) -> None:
    """The page names the three ways, and a guide stays trained by each of them."""
    page = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
    assert all(way in page for way in ("clear_param_store()", "get_param_store().scope()", "module_local_params=True"))
    store, kept = pyro.get_param_store(), pyro.param("kept", torch.tensor(1.0))
    with pyro.settings.context(module_local_params=how == "local"), store.scope() if how == "scope" else nullcontext():
        guide = AutoFlow(model, small)
        pf.fit_svi(model, guide, Y, steps=5, progress=False)
        trained = seeded(functools.partial(guide.sample, 3, Y))
    if how == "clear":
        pyro.clear_param_store()
    else:
        assert list(store) == ["kept"]
        assert store["kept"].equal(kept)
    torch.testing.assert_close(seeded(functools.partial(guide.sample, 3, Y)), trained)
    parameter = weakref.ref(next(guide.parameters()))
    del guide
    gc.collect()
    assert parameter() is None


@pytest.mark.parametrize("kind", GUIDES)
def test_a_trained_guide_is_trained_when_the_store_is_loaded_after_setup(kind: str) -> None:
    guide, store = GUIDES[kind](), pyro.get_param_store()
    guide(Y)
    stir(guide)
    trained = {name: value.clone() for name, value in guide.state_dict().items()}
    guide(Y)
    state, name = copy.deepcopy(store.get_state()), guide._pyro_name
    del guide
    for read in (lambda g: g.is_fresh, repr, lambda g: getattr(g, "flow", None) or g.posterior, joint):
        pyro.clear_param_store()
        new = GUIDES[kind]()
        new._pyro_name = name
        assert "untrained" in repr(new.setup(Y))
        store.set_state(copy.deepcopy(state))
        read(new)
        for key, value in new.named_parameters():
            torch.testing.assert_close(value.detach(), trained[key])
        assert "untrained" not in repr(new)
