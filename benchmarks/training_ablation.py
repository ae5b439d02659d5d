"""Variants of the part *ablation* of ``training.py``: two guides, and each of them with one change.

One is the default guide.  The other is the earlier guide, before its networks were centred and had a pace.  It has
torch's weights and a full matrix for the learned affine map.  Changes to the first guide show what it needs.  Changes
to the second show which of the suspected causes made it explode.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import recipe
from programs import Program
from torch import nn

import pyro_flows as pf
from pyro_flows.bijectors import Affine
from pyro_flows.conditioners import MLP
from pyro_flows.conditioners.base import Linear, networks_of, set_pace
from pyro_flows.distributions import StandardNormal
from pyro_flows.flows import Flow
from pyro_flows.transforms import Coupling, LULinear

MODELS = "conjugate", "eight_schools", "eight_schools_centered"
LRS = 0.003, 0.01, 0.03
Change = Callable[[Any], None]


class Variant(NamedTuple):
    """Variant of a guide: its arguments, changes after its setup, and the number of particles."""

    guide: dict[str, Any] = {}
    changes: tuple[Change, ...] = ()
    particles: int = 1


def no_pace(guide: Any) -> None:
    """Use torch's weights, without a pace."""
    for layers in networks_of(guide.flow):
        set_pace(layers, None)


def no_share(guide: Any) -> None:
    """Let each network move its layer by a whole step, so that together n layers move by n steps."""
    for layers in networks_of(guide.flow):
        set_pace(layers, 1.0)


def no_pace_of(kind: str, guide: Any) -> None:
    """Remove the pace of hidden layers, or of output layers."""
    for layer in (part for part in guide.flow.modules() if isinstance(part, Linear)):
        if layer.zero is (kind == "output"):
            layer.set_unit(1.0)


def fast_hidden(guide: Any) -> None:
    """Let hidden layers move four times as far, by a whole step."""
    for layer in (part for part in guide.flow.modules() if isinstance(part, Linear)):
        if not layer.zero:
            layer.set_unit(4 * layer.unit)


def not_centered(guide: Any) -> None:
    """Let the last layers read hidden units that are not centred."""
    for network in (part for part in guide.flow.modules() if isinstance(part, MLP)):
        network.centered = False


def steep(guide: Any) -> None:
    """Give log-scales the slope 1 where they are zero."""
    for layer in guide.flow.transforms:
        if isinstance(layer, Coupling):
            layer.bijector = Affine(layer.bijector.max_log_scale, slope=1.0)


def learned(kind: type[LULinear] | None, guide: Any) -> None:
    """Change the class of the learned affine map; None for no such map."""
    *layers, _, fixed = guide.flow.transforms
    loc, scale = guide.start
    if kind is None:
        fixed.set(loc, loc.new_full(loc.shape, scale))
    else:
        layers.append(kind(len(loc)).to(loc))
        layers[-1].set_scale(scale)
    guide.flow = Flow([*layers, fixed], guide.flow.base)


def changed(**options: Any) -> dict[str, Any]:
    """Return the arguments of a guide whose couplings have other options."""
    return recipe.recipe(recipe.default, **options)


full = functools.partial(learned, LULinear)
CHANGES = {
    "half the depth": Variant(changed(num_transforms=4)),
    "twice the depth": Variant(changed(num_transforms=16)),
    "half the width": Variant(changed(hidden_dims=(32, 32))),
    "twice the width": Variant(changed(hidden_dims=(128, 128))),
    "tanh for ELU": Variant(changed(activation=nn.Tanh)),
    "log-scales up to .5": Variant(changed(max_log_scale=0.5)),
    "log-scales of slope 1": Variant(changes=(steep,)),
    "normal base": Variant({"base": StandardNormal}),
    "no learned affine map": Variant(changes=(functools.partial(learned, None),)),
    "init_scale 1": Variant({"init_scale": 1.0}),
    "init_scale .01": Variant({"init_scale": 0.01}),
    "16 particles": Variant(particles=16),
}
OLD = not_centered, no_pace, full
DEFAULT, BEFORE = "default", "before"  # the first word of the label of a variant
VARIANTS = {
    DEFAULT: Variant(),
    f"{DEFAULT}: no pace": Variant(changes=(no_pace,)),
    f"{DEFAULT}: no pace of hidden layers": Variant(changes=(functools.partial(no_pace_of, "hidden"),)),
    f"{DEFAULT}: no pace of output layers": Variant(changes=(functools.partial(no_pace_of, "output"),)),
    f"{DEFAULT}: no share for each network": Variant(changes=(no_share,)),
    f"{DEFAULT}: hidden layers by whole steps": Variant(changes=(fast_hidden,)),
    f"{DEFAULT}: networks not centred": Variant(changes=(not_centered,)),
    f"{DEFAULT}: LULinear as the learned map": Variant(changes=(full,)),
    **{f"{DEFAULT}: {name}": variant for name, variant in CHANGES.items()},
    BEFORE: Variant(changes=OLD),
    **{f"{BEFORE}: {name}": variant._replace(changes=(*OLD, *variant.changes)) for name, variant in CHANGES.items()},
}


def build(label: str) -> Callable[[Program], Any]:
    """Return the function that builds the guide of a variant."""
    variant = VARIANTS[label]

    def built(program: Program) -> Any:
        guide = pf.AutoFlow(program.guided, **variant.guide).setup(*program.args, **program.kwargs)
        for change in variant.changes:
            change(guide)
        return guide

    return built
