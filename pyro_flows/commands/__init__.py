"""What ``python -m pyro_flows`` can do, a file for each command, and what the commands share."""

from __future__ import annotations

import inspect

from .. import flows

RECIPES = {name: getattr(flows, name) for name in ("iaf", "maf", "nice", "nsf", "nsf_ar", "realnvp")}
# A density may be slower to draw from than a guide: every recipe that needs the number of features alone.
DENSITIES = {
    name: recipe
    for name, recipe in inspect.getmembers(flows, inspect.isfunction)
    if [p.name for p in inspect.signature(recipe).parameters.values() if p.default is p.empty] == ["input_dim"]
}


class Refused(ValueError):
    """A wish that cannot be granted; its text is one line for the person who typed the command."""
