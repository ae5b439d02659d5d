"""What ``python -m pyro_flows`` can do, a file for each command, and what the commands share."""

from __future__ import annotations

from .. import flows

RECIPES = {name: getattr(flows, name) for name in ("iaf", "maf", "nice", "nsf", "nsf_ar", "realnvp")}


class Refused(ValueError):
    """A wish that cannot be granted; its text is one line for the person who typed the command."""
