"""Flat settings of tests, put into the groups that the fits take."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pyro_flows.training import Gradients, Training


def grouped(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which the options of training on rows are a ``Training``, and those of gradients within."""

    def taken(group: type) -> dict[str, Any]:
        return {option.name: settings.pop(option.name) for option in fields(group) if option.name in settings}

    settings = dict(settings)
    if gradients := taken(Gradients):
        settings["gradients"] = Gradients(**gradients)
    if options := taken(Training):
        settings["training"] = Training(**options)
    return settings
