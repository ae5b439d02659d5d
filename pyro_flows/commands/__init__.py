"""The commands of ``python -m pyro_flows``, one module each, and the modules that they share."""

from __future__ import annotations

import inspect

from .. import flows

RECIPES = {name: getattr(flows, name) for name in ("iaf", "maf", "nice", "nsf", "nsf_ar", "realnvp")}
# Densities may be slow to sample from, so that every recipe is here that requires only the number of features.
DENSITIES = {
    name: recipe
    for name, recipe in inspect.getmembers(flows, inspect.isfunction)
    if [p.name for p in inspect.signature(recipe).parameters.values() if p.default is p.empty] == ["input_dim"]
}


class Refused(Exception):
    """Error for a wish that cannot be granted; its text is one line for the user of the command."""
