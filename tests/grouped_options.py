"""Flat settings of tests, put into the groups that the fits take."""

from dataclasses import fields
from typing import Any

from pyro_flows.training import Gradients, Training


def grouped(settings: dict[str, Any], *groups: type) -> dict[str, Any]:
    """Return settings in which the options of gradients, and those of training on rows, stand in their groups.

    Args:
        settings: The settings, one by one.
        groups: The groups, the inner one first; by default both.
    """
    settings = dict(settings)
    for group in groups or (Gradients, Training):
        known = {option.name for option in fields(group)}
        if options := {name: settings.pop(name) for name in [*settings] if name in known}:
            settings[group.__name__.lower()] = group(**options)
    return settings
