"""Names of guides in Pyro's parameter store, which all guides of a process share.

Two guides of one name would train one set of tensors and use another; so each guide gets a name of its own.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Collection
from typing import Any

import pyro
import torch
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

from ..arguments import check_kind

_used: set[str] = set()
_live: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def claim_name(guide: Any, name: str | None) -> str:
    """Reserve a name for a guide: the one that was asked for, or the first of its class that was never used."""
    kind = type(guide).__name__
    check_kind(kind, (str, type(None)), "a word or None", name=name)
    if name is None:
        names = (kind if i == 1 else f"{kind}_{i}" for i in itertools.count(1))
        name = next(n for n in names if n not in _used)
    elif not is_free(name):
        fault = f"Another live {kind} is named {name!r}; the two would share parameters in Pyro's store"
        warnings.warn(f"{fault}. Give each guide a name of its own.", stacklevel=3)
    _used.add(name)
    _live[name] = guide
    return name


def is_free(name: str) -> bool:
    """Whether no live guide bears the name."""
    return name not in _live


def holders(parameters: Collection[Tensor]) -> list[nn.Module]:
    """Return the live guides that hold some of these parameters."""
    wanted = {id(parameter) for parameter in parameters}
    return [guide for guide in _live.values() if any(id(parameter) in wanted for parameter in guide.parameters())]


def adopt_stored_parameters(name: str, module: nn.Module) -> None:
    """Take over what the parameter store holds under a module's name, as after ``get_param_store().load``.

    The store then lets go of its own tensors, so that it and the module agree on one set.
    """
    store = pyro.get_param_store()
    for inner, parameter in module.named_parameters():
        full = param_with_module_name(name, inner)
        if (kept := store._params.get(full)) is None or kept is parameter:  # as nearly always: each step asks
            continue
        if (stored := store[full].detach()).data_ptr() != parameter.data_ptr():
            if stored.shape != parameter.shape:
                shapes = f"of shape {tuple(stored.shape)}, but the guide needs {tuple(parameter.shape)}"
                way = "give the guide another name= or clear the store"
                raise ValueError(f"The parameter store holds {full!r} {shapes}; {way}.")
            with torch.no_grad():
                parameter.copy_(stored)
            del store[full]
