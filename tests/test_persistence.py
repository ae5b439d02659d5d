"""A file of ``pf.save`` restores the same function without the code that built it, and contains nothing else.

The loaded object has the same parts, tensors, dtypes and bits.  Guides are loaded without model and data.  Objects that
are not from pyro_flows are refused by name before anything is written.  A damaged, foreign or changed file is refused
with a message, and its code does not run.
"""

import copy
import dataclasses
import functools
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import laws
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Y, nested, normals, sampling, silent, stirred
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import load_file, save_file
from saved_files import Edit, edited, parts_of, small
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows import AutoFlow, AutoPlateFlow, Flow, encoders, fit_amortized, flows
from pyro_flows.answers import Step
from pyro_flows.bijectors import Affine
from pyro_flows.conditioners import MADE, MLP
from pyro_flows.distributions import FixedBase, ModesBase, StandardNormal
from pyro_flows.persistence.classes import BY_NAME
from pyro_flows.persistence.packing import describe, pack
from pyro_flows.training.checkpoint import Checkpoint
from pyro_flows.transforms import ActNorm, Autoregressive, Compose, Conditioned, Elementwise, FixedAffine, Permute

DIM = 4
small_local = functools.partial(flows.nsf, num_transforms=2, hidden_dims=(8,))
ENCODERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "mlp": (encoders.MLPEncoder(3, 2, (8,), activation=nn.Tanh), (3,)),
    "set": (encoders.SetEncoder(3, 2, (8,), num_queries=2, num_moments=3), (5, 3)),
    "image": (encoders.ConvEncoder((1, 8, 8), 2, (4,), 8), (1, 8, 8)),
    "identity": (encoders.Identity((2,)), (2,)),
    "gru": (encoders.GRUEncoder(3, 2, 8, num_layers=2), (5, 3)),
    "transformer": (encoders.TransformerEncoder(3, 2, 8, num_layers=1, num_heads=2), (5, 3)),
}


def there_and_back(thing: Any, folder: Path) -> Any:
    pf.save(thing, folder / "saved.pt")
    return pf.load(folder / "saved.pt")


def bits(ours: Any, theirs: Any) -> bool:
    """True if tensors are the same bit by bit, including NaN."""
    return ours.dtype == theirs.dtype and torch.equal(ours.nan_to_num(nan=-7.25), theirs.nan_to_num(nan=-7.25))


def same_module(ours: nn.Module, theirs: nn.Module) -> None:
    """Assert that two modules have the same parts and tensors, including those that no ``state_dict`` holds."""
    parts, others = ([(n, type(part).__qualname__) for n, part in m.named_modules()] for m in (ours, theirs))
    assert parts == others
    for kind in ("named_parameters", "named_buffers"):
        mine, other = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (ours, theirs))
        assert list(mine) == list(other)
        for name, tensor in mine.items():
            assert bits(tensor, other[name]), name
            assert tensor.requires_grad == other[name].requires_grad
            assert type(tensor) is type(other[name])
    assert list(ours.state_dict()) == list(theirs.state_dict())


def same_flow(ours: Flow, theirs: Flow, context: Tensor | None = None) -> None:
    assert type(theirs) is Flow
    same_module(ours, theirs)
    assert pack(theirs)[0] == pack(ours)[0]
    dtype = next(tensor.dtype for tensor in (*ours.parameters(), *ours.buffers()) if tensor.is_floating_point())
    x = laws.normal(6, *ours.event_shape, seed=3, dtype=dtype)
    answers = []
    for flow in (ours, theirs):
        torch.manual_seed(4)  # some log-determinants are estimates
        answers.append([flow(context).log_prob(x), *flow.rsample_and_log_prob((5,), context)])
    assert all(map(bits, *answers))


# ------------------------------------------------------------ all public classes


@pytest.mark.parametrize(("context_dim", "dtype"), [(0, torch.float32), (laws.CONTEXT_DIM, torch.float64)], ids=str)
@pytest.mark.parametrize("name", laws.RECIPES)
def test_every_recipe_comes_back(name: str, context_dim: int, dtype: torch.dtype, tmp_path: Path) -> None:
    flow = laws.RECIPES[name](DIM, context_dim, num_transforms=2, hidden_dims=(8, 8)).to(dtype)
    laws.randomise(flow, scale=1.0)
    context = laws.normal(6, context_dim, seed=2, dtype=dtype) if context_dim else None
    same_flow(flow, there_and_back(flow, tmp_path), context)
    same_flow(flow.inv, there_and_back(flow.inv, tmp_path), context)


@pytest.mark.slow
@pytest.mark.parametrize("context_dim", [0, laws.CONTEXT_DIM])
@pytest.mark.parametrize("name", laws.TRANSFORMS)
def test_every_transform_comes_back(name: str, context_dim: int, tmp_path: Path) -> None:
    kind = laws.TRANSFORMS[name]
    if context_dim and not kind.takes_context:
        pytest.skip("it takes no context")
    flow = Flow([laws.randomise(kind.build(DIM * kind.size, context_dim))]).double()
    context = laws.normal(6, context_dim, seed=2) if context_dim else None
    same_flow(flow, there_and_back(flow, tmp_path), context)


PARTS = {
    **{f"base {name}": lambda build=build: Flow([ActNorm(DIM)], build(DIM)) for name, build in laws.BASES.items()},
    **{f"bijector {name}": lambda b=b: Flow([Elementwise(b, DIM)]) for name, b in laws.BIJECTORS.items()},
}


@pytest.mark.parametrize("name", PARTS)
def test_every_base_and_every_bijector_comes_back(name: str, tmp_path: Path) -> None:
    flow = stirred(laws.randomise(PARTS[name]()).double())
    same_flow(flow, there_and_back(flow, tmp_path))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_comes_back(name: str, tmp_path: Path) -> None:
    encoder, row = copy.deepcopy(ENCODERS[name])
    encoder.initialize(5.0 + torch.randn(9, *row))
    flow = Flow(small_local(2, 2).transforms, encoder=encoder)
    context = torch.randn(6, *row)
    same_flow(flow, there_and_back(flow, tmp_path), context)


def test_no_public_class_is_left_out() -> None:
    """Every public class has a line in a registry, because a class without one would be saved untested."""
    found: set[str] = {"distributions.FixedBase", "conditioners.Given", "encoders.Standardize"}  # tested further below
    found |= {"encoders.Arguments", "encoders.Joined", "encoders.Scalars"}  # tested with guides
    found |= {"transforms.Sigmoid", "encoders.ClassEmbedding", "encoders.Flatten"}  # tested with models of images
    transforms = (kind.build(DIM * kind.size, laws.CONTEXT_DIM) for kind in laws.TRANSFORMS.values())
    flows = (build() for build in PARTS.values())
    for part in (*transforms, *flows, *(encoder for encoder, _ in ENCODERS.values())):
        found |= set(names_in(describe(part)[0]))
    assert {
        name for name in BY_NAME if not name.startswith(("constraints", "pyro", "guides", "flows", "answers"))
    } <= found


def names_in(spec: Any) -> list[str]:
    """Return the names of the classes in a spec."""
    if isinstance(spec, dict):
        return [spec[key] for key in spec if key == "class"] + names_in(list(spec.values()))
    return [name for part in spec for name in names_in(part)] if isinstance(spec, list | tuple) else []


IN_A_NEW_PROCESS = """
import sys, torch
import pyro_flows as pf
flow, guide = pf.load(sys.argv[1]), pf.load(sys.argv[2])
x, context, values = torch.load(sys.argv[3])
torch.save((flow(context).log_prob(x), guide.log_prob(values), guide._pyro_name), sys.argv[4])
"""


@pytest.mark.slow
def test_a_new_process_has_the_same_bits(tmp_path: Path) -> None:
    flow = laws.randomise(flows.nsf_ar(DIM, 2, hidden_dims=(16,)).double(), scale=1.0)
    guide = stirred(AutoFlow(nested, small, name="kept").setup(Y))
    x, context, values = laws.normal(9, DIM), laws.normal(9, 2, seed=1), guide.sample(9)
    pf.save(flow, tmp_path / "flow")
    pf.save(guide, tmp_path / "guide")
    torch.save((x, context, values), tmp_path / "data")
    names = ["flow", "guide", "data", "answer"]
    subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, *names], check=True, cwd=tmp_path)
    of_flow, of_guide, name = torch.load(tmp_path / "answer")
    assert bits(of_flow, flow(context).log_prob(x))
    assert bits(of_guide, guide.log_prob(values))
    assert name == "kept"


# ------------------------------------------------------------ other state of a flow


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    """The tensors are those of the ``state_dict``, each once; a flow that was built in code can load them."""
    flow = laws.randomise(flows.nsf(DIM, 2, hidden_dims=(8,)))
    flow.transforms[0].conditioner.output.half()
    pf.save(flow, tmp_path / "flow")
    again = flows.nsf(DIM, 2, hidden_dims=(8,))
    again.transforms[0].conditioner.output.half()
    again.load_state_dict(load_file(tmp_path / "flow"))
    same_module(flow, again)
    assert [path.name for path in tmp_path.iterdir()] == ["flow"]
    content, tensors = parts_of(tmp_path / "flow")
    assert (content["format"], content["class"]) == (2, "flows.Flow")
    assert tensors.keys() == flow.state_dict().keys()


def test_what_was_shared_is_shared_again(tmp_path: Path) -> None:
    layer, context = Autoregressive(Affine(), MADE(2, 2, (8,))), nn.Parameter(torch.ones(3))
    held = Autoregressive(Affine(), MADE(2, 2, (8,), 3))
    twice = [Conditioned(held, context) for _ in range(2)]
    flow = Flow([layer, Compose([ActNorm(2), layer.inv]), layer, *twice])
    again = there_and_back(flow, tmp_path)
    first, chain, third, fourth, fifth = again.transforms
    assert first is third is chain.transforms[1].transform
    assert fourth.inner is fifth.inner
    assert fourth.context is fifth.context
    same_flow(flow, again)


def test_dtypes_are_kept_one_by_one(tmp_path: Path) -> None:
    flow = small(3)
    flow.transforms[1].double()
    flow.base.double()
    again = there_and_back(flow, tmp_path)
    same_module(flow, again)
    assert again.transforms[0].conditioner.output.weight.dtype == torch.float32
    assert again.base.zeros.dtype == again.transforms[1].conditioner.output.weight.dtype == torch.float64
    torch.set_default_dtype(torch.float64)  # the defaults of the loading process do not matter
    try:
        same_module(flow, pf.load(tmp_path / "saved.pt"))
    finally:
        torch.set_default_dtype(torch.float32)


def test_modes_of_training_are_kept(tmp_path: Path) -> None:
    flow = small(3).eval()
    flow.transforms[0].train().requires_grad_(False)
    modes = {name: part.training for name, part in flow.named_modules()}
    again = there_and_back(flow, tmp_path)
    assert {name: part.training for name, part in again.named_modules()} == modes
    same_module(flow, again)  # frozen parameters are frozen again
    guide = AutoFlow(nested, small).setup(Y).eval()
    assert not any(part.training for part in there_and_back(guide, tmp_path).modules())


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    flow = flows.nsf(3, hidden_dims=tuple(np.array([8, 8])), bound=np.float64(4.0), num_transforms=2)
    again = there_and_back(flow, tmp_path)
    assert type(again.transforms[0].bijector.bound) is float
    same_module(flow, again)


def test_no_random_numbers_are_drawn_and_no_names_used_up(tmp_path: Path) -> None:
    guide = AutoFlow(nested, small).setup(Y)
    state = torch.get_rng_state()
    there_and_back(guide.flow, tmp_path)
    pf.save(guide, tmp_path / "guide")
    number = int(guide._pyro_name.partition("_")[2] or 1)
    assert AutoFlow(nested)._pyro_name == f"AutoFlow_{number + 1}"
    pf.load(tmp_path / "guide")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_small_view_does_not_save_all_that_it_views(tmp_path: Path) -> None:
    flow = Flow([FixedAffine(2, dense=False)])
    flow.transforms[0].loc.data = torch.zeros(1_000_000)[:2]
    pf.save(flow, tmp_path / "flow")
    assert (tmp_path / "flow").stat().st_size < 20_000


def test_a_loaded_flow_trains_and_is_independent(tmp_path: Path) -> None:
    flow = small(3)
    again, kept = there_and_back(flow, tmp_path), copy.deepcopy(flow)
    again().log_prob(torch.randn(10, 3)).mean().backward()
    torch.optim.SGD(again.parameters(), lr=0.1).step()
    same_module(flow, kept)
    assert not all(map(torch.equal, again.parameters(), kept.parameters()))


FIXED = {
    "Cauchy": dist.Cauchy(torch.zeros(3), 2.0).to_event(1),
    "Gumbel": dist.Gumbel(torch.zeros(3), 2.0).to_event(1),
    "Laplace": torch.distributions.Independent(torch.distributions.Laplace(torch.zeros(3), torch.ones(3)), 1),
    "MultivariateNormal": dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.5),
    "Normal": dist.Normal(0.5, 2.0).expand([3]).to_event(1),
    "StudentT": dist.StudentT(3.0, torch.zeros(3), 1.0).to_event(1),
    "Uniform": dist.Uniform(torch.zeros(3), 9.0, validate_args=False).to_event(1),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_bases_come_back(name: str, tmp_path: Path) -> None:
    flow = Flow([ActNorm(3)], FIXED[name])
    again = there_and_back(flow, tmp_path)
    x = torch.rand(6, 3)
    assert bits(again().log_prob(x), flow().log_prob(x))
    assert type(again.base) is FixedBase
    if name == "Uniform":  # outside, where validation is off, the call works
        assert again().log_prob(-x).tolist() == [-math.inf] * 6


# ------------------------------------------------------------ refused at save, by name


class OwnTransform(Permute):
    """Subclass of one of our transforms, which is not ours."""


@dataclass(frozen=True)
class OwnBijector(Affine):
    """Bijector with the same map under another name."""


class OwnFlow(Flow):
    """Flow of a user."""


class OwnBase(StandardNormal):
    """Base of a user."""


class OwnConditioner(MLP):
    """Conditioner of a user."""


class OwnActivation(nn.ReLU):
    """Activation of a user."""


def own_encoder(x: Tensor) -> Tensor:
    return x[:2]


FOREIGN: dict[str, tuple[Callable[[], Any], str]] = {
    "transform": (lambda: Flow([ActNorm(2), OwnTransform([1, 0])]), r"transforms\[1\] is of .*OwnTransform"),
    "bijector": (lambda: Flow([Elementwise(OwnBijector(), 2)]), r"transforms\[0\]\.bijector .*OwnBijector"),
    "conditioner": (
        lambda: Flow([Elementwise(Affine(), 2, OwnConditioner(3, 2, 2))]),
        r"conditioner .*\.OwnConditioner",
    ),
    "activation": (lambda: flows.maf(2, activation=OwnActivation), "activation is the class .*OwnActivation"),
    "a function": (lambda: flows.maf(2, activation=functools.partial(nn.LeakyReLU, 0.1)), "activation .*partial"),
    "base": (lambda: Flow([ActNorm(2)], OwnBase((2,))), "base is of .*OwnBase"),
    "distribution": (
        lambda: Flow([ActNorm(2)], dist.Gamma(torch.ones(2), 1.0).to_event(1)),
        "base_distribution .*Gamma",
    ),
    "flow": (lambda: OwnFlow([ActNorm(2)]), "value is of .*OwnFlow, but must be a Flow"),
    "encoder": (
        lambda: Flow(small_local(2, 2).transforms, encoder=nn.Sequential(nn.Linear(3, 2))),
        "encoder is of .*Sequential",
    ),
    "function as encoder": (
        lambda: AutoFlow(amortised, small_local, encoder=own_encoder).setup(torch.zeros(3)),
        r"encoder is the function test_persistence\.own_encoder",
    ),
    "part of a guide": (
        lambda: AutoFlow(nested, lambda dim: Flow([OwnTransform(range(dim))])).setup(Y),
        r"flow\.couplings\[0\] is of .*OwnTransform",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_classes_are_refused_by_name(name: str, tmp_path: Path) -> None:
    make, words = FOREIGN[name]
    (tmp_path / "old").write_text("what was there before")
    with pytest.raises(ValueError, match=rf"^save: .*{words}.*state_dict"):
        pf.save(make(), tmp_path / "old")
    assert (tmp_path / "old").read_text() == "what was there before"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_parts_of_a_flow_are_no_flow(tmp_path: Path) -> None:
    for thing in (ActNorm(2), encoders.MLPEncoder(3, 2), nn.Linear(2, 2), None, [small(3)], torch.ones(3)):
        with pytest.raises(ValueError, match=rf"value is of .*{type(thing).__name__}, but must be a Flow"):
            pf.save(thing, tmp_path / "part")


def test_a_guide_that_was_never_set_up_is_refused(tmp_path: Path) -> None:
    for guide in (AutoFlow(nested), AutoPlateFlow(hierarchy, "group")):
        with pytest.raises(ValueError, match=r"never set up.*guide\.setup"):
            pf.save(guide, tmp_path / "guide")


def net(flow: Flow, number: int = 0) -> MLP:
    return flow.transforms[number].conditioner


STRANGE: dict[str, tuple[Callable[[Flow], Any], str]] = {
    "attribute": (lambda f: setattr(net(f), "slope", 0.9), r"slope is 0\.9"),
    "hook": (lambda f: f.transforms[0].register_forward_hook(lambda *_: None), "forward is with hooks"),
    "activation": (lambda f: setattr(net(f), "act", nn.Tanh()), r"conditioner\.act is a .*Tanh and not a .*Rectifier"),
    "norm": (lambda f: nn.utils.parametrizations.weight_norm(net(f).output), "parametrizations"),
    "width": (lambda f: setattr(net(f), "output", nn.Linear(9, 4)), "size mismatch for .*output"),
    "tied weights": (lambda f: setattr(net(f).output, "bias", net(f, 1).output.bias), r"\.1\..* is tied to .*\.0\."),
    "buffer": (lambda f: f.base.zeros.add_(1), r"base\.zeros is of torch\.float32, with sum"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_its_constructor_does_not_tell_is_refused(name: str, tmp_path: Path) -> None:
    flow, (change, words) = small(4), STRANGE[name]
    change(flow)
    with pytest.raises(ValueError, match=rf"^save: the flow is not as its constructor builds it.*{words}"):
        pf.save(flow, tmp_path / "flow")
    assert not list(tmp_path.iterdir())


def test_nothing_half_written_takes_the_place_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pf.save(small(3), tmp_path / "flow")
    before = (tmp_path / "flow").read_bytes()

    def full(path: Path, data: bytes) -> None:
        path.write_text("a little")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        pf.save(small(3), tmp_path / "flow")
    assert (tmp_path / "flow").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["flow"]


# ------------------------------------------------------------ refused at load, with a message


def first(content: dict[str, Any]) -> dict[str, Any]:
    """Return the spec of the first transform."""
    return content["arguments"]["transforms"][0]


def part(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the arguments of a part of the first transform."""
    return first(content)["arguments"][name]["arguments"]


WEIGHT, LACKING = "transforms.0.conditioner.output.weight", r"base\.ones|attribute `ones`"
COLUMNS = {"class": "flows.Columns", "arguments": {"names": None, "integers": [[3, 0.0, 1.0]]}}
CHANGES: dict[str, tuple[Edit, str]] = {
    "newer": (lambda c, t: c.update(format=3), "has the format 3, and this pyro_flows reads format 2"),
    "root": (lambda c, t: c.update({"class": "transforms.ActNorm"}), "'transforms.ActNorm', which is no flow"),
    "unknown class": (lambda c, t: first(c).update({"class": "transforms.Warp"}), r"Warp', which .* does not have"),
    "class elsewhere": (lambda c, t: first(c).update({"class": "os.system"}), r"of a class 'os\.system', which"),
    "class that is none": (lambda c, t: first(c).update({"class": ["x"]}), "which describes nothing"),
    "abstract class": (
        lambda c, t: first(c).update({"class": "transforms.FlowTransform"}),
        r"a class 'transforms\.Flow",
    ),
    "activation elsewhere": (
        lambda c, t: part(c, "conditioner").update(activation={"torch.nn": "functional"}),
        "activation holds .*functional'}, which",
    ),
    "argument": (
        lambda c, t: part(c, "bijector").update(max_log_scale=-1.0),
        "Affine refuses its arguments: Affine: max_log_scale must be positive and finite, got -1.0",
    ),
    "argument too many": (lambda c, t: part(c, "bijector").update(other=1), "Affine refuses its arguments: .*other"),
    "bijector in place of a transform": (
        lambda c, t: c["arguments"]["transforms"].__setitem__(0, first(c)["arguments"]["bijector"]),
        r"Flow refuses its arguments: .*transforms\[0\] must be a pyro_flows transform",
    ),
    "same as nothing": (
        lambda c, t: c["arguments"]["transforms"].__setitem__(1, {"same": "transforms[5]"}),
        r"transforms\[1\] holds \{'same'.*which describes nothing",
    ),
    "no spec of anything": (
        lambda c, t: first(c)["arguments"].update(bijector={"code": "1"}),
        "bijector holds {'code'",
    ),
    "parts of a spec": (lambda c, t: c.pop("dtypes"), "KeyError: 'dtypes'"),
    "missing": (lambda c, t: t.pop(WEIGHT), rf"Missing key.*{WEIGHT}"),
    "unexpected": (lambda c, t: t.update(more=torch.ones(1)), "Unexpected key.*more"),
    "shape": (lambda c, t: t.update({WEIGHT: torch.ones(1, 2)}), rf"size mismatch for {WEIGHT}"),
    "kind of number": (lambda c, t: t.update({WEIGHT: t[WEIGHT].long()}), rf"{WEIGHT} is of torch.int64"),
    "dtype": (lambda c, t: c["dtypes"].update({"base.zeros": "load"}), "TypeError"),
    "buffer": (lambda c, t: c["dtypes"].update({"base.ones": "float32"}), LACKING),
    "frozen": (lambda c, t: c["frozen"].append("base.ones"), LACKING),
    "training": (lambda c, t: c["training"].update({"base.ones": True}), LACKING),
    "columns": (
        lambda c, t: c["arguments"].update(columns=COLUMNS),
        r"columns must be those of events of shape \(3,\)",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_files_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "flow.pt"
    pf.save(small(3), file)
    edit, words = CHANGES[name]
    edited(file, edit)
    with pytest.raises(ValueError, match=rf"^load: '{file}' .*{words}"):
        pf.load(file)


def test_an_order_that_is_no_permutation_is_refused(tmp_path: Path) -> None:
    """The masks would follow such an order, and the map would not be invertible."""
    file, order = tmp_path / "flow.pt", "transforms.0.transform.conditioner.order"
    pf.save(flows.maf(3, num_transforms=1, hidden_dims=(8,)), file)
    edited(file, lambda content, tensors: tensors.update({order: torch.ones(3, dtype=torch.long)}))
    with pytest.raises(ValueError, match=rf"^load: '{file}' .*order must hold each of 0 … 2 once"):
        pf.load(file)


@pytest.mark.parametrize("name", ["flow.pt", "."])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"load: there is no file '{tmp_path / name}'"):
        pf.load(tmp_path / name)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a flow")
    (tmp_path / "empty").touch()
    np.savez(tmp_path / "numbers.npz", a=np.ones(3))
    torch.save({"a": torch.ones(3)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    Checkpoint("fit_svi", tmp_path / "run", {"steps": 3}).save({})
    save_file({"a": torch.ones(3)}, tmp_path / "tensors")
    found = {"text": "cut off", "empty": "cut off", "tensors": "only tensors"}
    for name, words in {**dict.fromkeys(("numbers.npz", "old", "run"), "nothing of it was run"), **found}.items():
        with pytest.raises(ValueError, match=rf"^load: '{tmp_path / name}' is not a file of pyro_flows\.save.*{words}"):
            pf.load(tmp_path / name)


def test_files_that_were_cut_off_are_refused(tmp_path: Path) -> None:
    pf.save(small(3), tmp_path / "flow")
    whole = (tmp_path / "flow").read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "flow").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"is not a file of pyro_flows\.save, or was cut off"):
            pf.load(tmp_path / "flow")


@pytest.mark.parametrize("part", ["tensors", "spec"])
def test_a_flipped_bit_is_found(part: str, tmp_path: Path) -> None:
    """safetensors would read such a bit as another number."""
    flow = small(3)
    pf.save(flow, tmp_path / "flow")
    raw = bytearray((tmp_path / "flow").read_bytes())
    weight = flow.transforms[0].conditioner.hidden[0].weight.detach().numpy().tobytes()
    raw[raw.index(weight if part == "tensors" else b"bijectors")] ^= 1
    (tmp_path / "flow").write_bytes(raw)
    with pytest.raises(ValueError, match=r"is damaged, or was changed"):
        pf.load(tmp_path / "flow")


@dataclass
class Bomb:
    """Object whose pickle runs code when it is read."""

    mark: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("write", [lambda bomb, file: file.write_bytes(pickle.dumps(bomb)), torch.save])
def test_code_in_a_file_is_not_run(write: Callable[[Bomb, Path], Any], tmp_path: Path) -> None:
    file, mark = tmp_path / "flow.pt", tmp_path / "it ran"
    write(Bomb(mark), file)
    with pytest.raises(ValueError, match=r"is not a file of pyro_flows\.save.*nothing of it was run"):
        pf.load(file)
    assert not mark.exists()


# ------------------------------------------------------------ guides


def zoo() -> None:
    """Sample latents on all supports that have a bijection."""
    pyro.sample("real", dist.Normal(0.0, 1.0))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("corr", dist.LKJCholesky(3, 1.0))
    pyro.sample("interval", dist.Uniform(-1.0, torch.tensor(3.0, requires_grad=True)))
    pyro.sample("unit", dist.Beta(2.0, 2.0))
    pyro.sample("positive", dist.HalfNormal(1.0))
    pyro.sample("angle", dist.VonMises(0.0, 1.0))
    pyro.sample("hour", dist.Uniform(0.0, 24.0), infer={"periodic": True})
    pyro.sample("angles", dist.VonMises(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("mixture", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Gamma(torch.ones(2), 1.0)))
    pyro.sample("matrix", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
    pyro.sample("pareto", dist.Pareto(2.0, 3.0))
    ordered = [dist.transforms.OrderedTransform()]
    pyro.sample("ordered", dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), ordered))
    pyro.sample("soft", dist.ImproperUniform(constraints.softplus_positive, (), ()))


def amortised(x: Tensor | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("x", dist.Normal(mean, log_scale.exp()), obs=x)


def series(n: int, x: Tensor, size: int | None = None, mask: Tensor | None = None, *, times: Tensor) -> None:
    mean, log_scale = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("mean", "log_scale"))
    noise = dist.Normal(mean, log_scale.exp()).expand([n, 1]).mask(mask[:, None])
    pyro.sample("x", noise.to_event(2), obs=x)


def hierarchy(y: Tensor, size: int | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("group", len(y), subsample_size=size, dim=-2) as rows:
        level = pyro.sample("level", dist.Normal(mean, 1.0))
        pyro.sample("share", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("kinds", 2, dim=-1):
            pyro.sample("rate", dist.Gamma(1.0, 1.0))
        pyro.sample("y", dist.Normal(level[..., None], torch.ones(3)).to_event(1), obs=y[rows][:, None])


def only_rows(y: Tensor) -> None:
    with pyro.plate("group", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1, keepdim=True), torch.ones(3)).to_event(1), obs=y)


def only_globals(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("group", len(y)):
        pyro.sample("y", dist.Normal(mean[..., None], torch.ones(3)).to_event(1), obs=y)


def draws(guide: Any, *args: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return guide.sample(6, *args)


def guide_again(guide: Any, folder: Path, args: tuple[Any, ...] = (), bare: tuple[Any, ...] = ()) -> Any:
    """Return the guide that comes back, after a check that it is the same."""
    again = there_and_back(guide, folder)
    same_guide(guide, again, args, bare)
    return again


def same_guide(ours: Any, theirs: Any, args: tuple[Any, ...] = (), bare: tuple[Any, ...] = ()) -> None:
    """Assert that two guides agree, given the model's arguments, or those that a guide without a model needs."""
    assert type(theirs) is type(ours)
    assert theirs.model is None
    same_module(ours, theirs)
    alone = copy.deepcopy(ours)
    alone.__dict__["_model"] = (None,)  # the model draws random numbers itself
    values = draws(alone, *bare)
    assert bits(theirs.log_prob(values, *bare), ours.log_prob(values, *args))
    alone.num_summary_draws = theirs.num_summary_draws = 200
    for ask in (draws, lambda g, *given: g.median(*given), lambda g, *given: g.quantiles([0.1, 0.9], *given)):
        wanted, found = laws.seeded(*(functools.partial(ask, guide, *bare) for guide in (alone, theirs)))
        assert list(found) == list(wanted)
        assert all(bits(found[name], value) for name, value in wanted.items())


def same_as_a_guide(model: Any, ours: Any, theirs: Any, *args: Any) -> None:
    """Assert that Pyro and all functions that take a model and a guide give the same results."""
    weigh = functools.partial(pf.psis, num_samples=30)
    found = laws.seeded(*(functools.partial(weigh, model, guide, *args) for guide in (ours, theirs)))
    assert bits(*(weights.log_weights for weights in found))


def test_a_guide_with_plates_comes_back(tmp_path: Path) -> None:
    guide = stirred(AutoFlow(nested, small).setup(Y))
    again = guide_again(guide, tmp_path, (Y,))
    for name, site in again.prototype_trace.iter_stochastic_nodes():
        before = guide.prototype_trace.nodes[name]
        assert site["value"].shape == before["value"].shape
        assert site["cond_indep_stack"] == before["cond_indep_stack"]
    same_as_a_guide(nested, guide, again, Y)


def test_a_guide_in_float64_comes_back(tmp_path: Path) -> None:
    model = sampling(x=normals(2, torch.ones(2, dtype=torch.float64)))
    again = guide_again(stirred(AutoFlow(model, small).setup()), tmp_path)
    assert again.sample(1)["x"].dtype == torch.float64


def test_a_guide_over_modes_comes_back(tmp_path: Path) -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        pyro.factor("data", -(x.square() - 4).square().sum(-1))

    guide = AutoFlow(model, small, base=functools.partial(ModesBase, num_components=4)).setup()
    places = 2 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    guide.flow.base.set(places, 0.3 * torch.eye(2).expand(4, 2, 2), torch.tensor([0.1, 0.2, 0.3, 0.4]))
    again = guide_again(stirred(guide), tmp_path)
    torch.testing.assert_close(again.flow.base.loc, places)
    same_as_a_guide(model, guide, again)


def test_all_supports_come_back(tmp_path: Path) -> None:
    guide = stirred(AutoFlow(zoo).setup())
    again = guide_again(guide, tmp_path)
    assert again.circular == guide.circular
    assert any(again.circular)
    assert (again.sample(50)["pareto"] > 2).all()


def test_a_support_of_ones_own_is_refused(tmp_path: Path) -> None:
    class Odd(constraints.Constraint):
        def check(self, value: Tensor) -> Tensor:
            return value == value

    torch.distributions.biject_to.register(Odd, lambda _: torch.distributions.transforms.identity_transform)

    def model() -> None:
        pyro.sample("x", dist.ImproperUniform(Odd(), (), ()))
        pyro.factor("target", -torch.ones(()))

    with pytest.raises(ValueError, match=r"sites\[0\]\.support is of the class test_persistence\..*Odd"):
        pf.save(AutoFlow(model, small).setup(), tmp_path / "guide")


def test_an_amortised_guide_comes_back(tmp_path: Path) -> None:
    x = torch.tensor([0.5, 1.0, 4.0])
    guide = AutoFlow(amortised, small_local, encoder=encoders.MLPEncoder(3, 2, (8,))).setup(x)
    guide.encoder.initialize(5 + torch.randn(9, 3))
    again = guide_again(stirred(guide), tmp_path, (x,), (x,))
    assert again.context(torch.randn(5, 3)).shape == (5, 2)
    assert not bits(again.log_prob(again.sample(3, x), x), again.log_prob(again.sample(3, x), x + 1))
    bound = guide.bind(x)  # layers that share one parameter
    guide_again(bound, tmp_path)
    same_guide(bound, again.bind(x))
    same_as_a_guide(amortised, bound, again.bind(x), x)


def test_a_choice_of_arguments_comes_back(tmp_path: Path) -> None:
    x, times, mask = torch.randn(5, 1), torch.rand(5).cumsum(0), torch.arange(5) < 4
    encoder = encoders.Arguments(encoders.GRUEncoder(1, 2, 8), 1, 3, times="times")
    guide = AutoFlow(series, small_local, encoder=encoder).setup(5, x, mask=mask, times=times)
    encoder.network.initialize(5 + torch.randn(9, 5, 1))
    again = there_and_back(stirred(guide), tmp_path)
    assert (again.encoder.positions, again.encoder.named) == ((1, 3), {"times": "times"})
    wanted = guide.context(5, x, mask=mask, times=times)
    assert bits(again.context(5, x, None, mask, times=times), wanted)
    assert not bits(again.context(5, x, times=times), wanted)
    for other in (again, pickle.loads(pickle.dumps(guide)), there_and_back(again, tmp_path)):
        assert bits(other.context(5, x, mask=mask, times=times), wanted)  # names of arguments are known without a model
        assert bits(other.context(x=x, n=5, mask=mask, times=times), wanted)


def test_an_encoder_of_numbers_comes_back_with_what_it_has_seen(tmp_path: Path) -> None:
    def counted(x: Tensor | None = None) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mean[..., None], 1.0).expand([*mean.shape, 6]).to_event(1), obs=x)

    encoder = encoders.Arguments(encoders.Scalars(encoders.SetEncoder(1, 2, (8,))), 0)
    guide = AutoFlow(counted, small_local, encoder=encoder)
    fit_amortized(counted, guide, simulations=20, max_epochs=1, progress=False)
    again, x = there_and_back(guide, tmp_path), torch.randn(6)
    assert bits(again.context(x), guide.context(x))
    for found in (guide, again):
        with pytest.warns(UserWarning, match="SetEncoder: the data have 60 elements, but training had 6"):
            found.context(torch.randn(60))


@pytest.mark.parametrize("by_encoder", [False, True])
@pytest.mark.parametrize(
    ("model", "size"), [(hierarchy, None), (hierarchy, 2), (only_rows, None), (only_globals, None)]
)
def test_a_guide_of_a_plate_comes_back(model: Any, size: int | None, by_encoder: bool, tmp_path: Path) -> None:
    y = torch.randn(6, 3)
    encoder = encoders.MLPEncoder(3, 2, (8,)) if by_encoder else None
    recipes = {"local_flow": small_local, "global_flow": small, "embedding_dim": 2}
    seen = functools.partial(model, size=size) if size else model
    guide = stirred(AutoPlateFlow(seen, "group", encoder=encoder, **recipes).setup(y))
    again = guide_again(guide, tmp_path, (y,), (y,) if by_encoder else ())
    assert again.size_of_rows == 6
    assert again.is_fresh == guide.is_fresh
    if by_encoder and model is hierarchy:  # the encoder knows new rows
        assert again.sample(4, torch.randn(9, 3))["rate"].shape == (4, 9, 2)
    if not size:
        same_as_a_guide(model, guide, again, y)


def test_a_loaded_guide_has_tensors_of_its_own(tmp_path: Path) -> None:
    """The loaded guide does not use the tensors of the saved guide, nor those in the parameter store."""
    guide = stirred(AutoFlow(nested, small, name="mine").setup(Y))
    wanted = draws(guide)
    with silent():
        again = there_and_back(guide, tmp_path)
    assert again._pyro_name != guide._pyro_name
    Trace_ELBO().loss(nested, stirred(guide), Y)
    assert any(name.startswith("mine.") for name in pyro.get_param_store())
    del guide
    for loaded in (again, pf.load(tmp_path / "saved.pt")):
        loaded(Y)
        assert all(bits(value, wanted[name]) for name, value in draws(loaded).items())
        assert loaded._pyro_name != "mine"


def test_a_guide_whose_parts_do_not_fit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "guide"
    pf.save(AutoFlow(nested, small).setup(Y), file)
    edited(file, lambda content, _: content["arguments"]["sites"].pop(0))
    with pytest.raises(ValueError, match=r"guides\.AutoFlow refuses its arguments: the flow is over \d+ numbers"):
        pf.load(file)


# ------------------------------------------------------------ posteriors


@pytest.mark.parametrize("own", [True, False])
def test_a_posterior_comes_back(own: bool, tmp_path: Path) -> None:
    """Draws, facts and a guide of pyro_flows come back, and model and data do not."""
    guide = stirred(AutoFlow(nested, small).setup(Y)) if own else AutoNormal(nested)
    drawn = {"x": torch.randn(7, 2), "k": torch.arange(7), "on": torch.ones(7, dtype=torch.bool)}
    steps = (Step("fit", 1.5, "", "loss 3"), Step("check", 0.1, "trust", "good"))
    found = pf.Posterior(drawn, "trust", "good", -2.5, math.nan, steps, 1.6, guide, None, None)
    again = there_and_back(found, tmp_path)
    assert all(bits(value, again.draws[name]) for name, value in drawn.items())
    assert (again.verdict, again.reason, again.log_evidence, again.steps) == ("trust", "good", -2.5, steps)
    assert math.isnan(again.log_evidence_se)
    assert again.summary() == found.summary()
    assert again.question is None
    assert load_file(tmp_path / "saved.pt")["arguments/draws['x']"].shape == (7, 2)
    if own:
        same_guide(guide, again.guide, (Y,))
    else:
        assert again.guide is None
    with pytest.raises(ValueError, match="model"):
        again.predictive()


ANSWER = pf.Posterior({"x": torch.ones(7, 2)}, "trust", "good", -2.5, 0.1, (Step("fit", 1.5, "", "loss 3"),), 1.6)


@pytest.mark.parametrize("value", [torch.ones(3, dtype=torch.complex128), torch.eye(3).to_sparse()])
def test_draws_that_files_do_not_hold_are_refused_by_name(value: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save: draws\['x'\] is a tensor \(.*, which files do not hold"):
        dataclasses.replace(ANSWER, draws={"x": value}).save(tmp_path / "answer")
    assert not (tmp_path / "answer").exists()


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"draws": wrong}
            for wrong in (None, {"dict": [["x", 1]]}, {"dict": [[5, {"tensor": "arguments/draws['x']"}]]})
        ),
        *({"steps": wrong} for wrong in ([], [["fit", "long", "", ""]], [5])),
        *({name: 5} for name in ("verdict", "guide", "chains")),
        *({name: "a"} for name in ("log_evidence", "log_evidence_se")),
        *({name: None} for name in ("reason", "seconds")),
    ],
)
def test_a_forged_answer_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    ANSWER.save(tmp_path / "answer")
    edited(tmp_path / "answer", lambda content, _: content["arguments"].update(change))
    with pytest.raises(ValueError, match=r"cannot be restored: answers\.Posterior refuses its arguments"):
        pf.load(tmp_path / "answer")
