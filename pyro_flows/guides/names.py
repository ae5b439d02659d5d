"""Names of guides in Pyro's parameter store, which all guides of a process share.

Two guides of one name would train one set of tensors and use another; so each guide gets a name of its own.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from typing import Any

_used: set[str] = set()
_live: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def claim_name(guide: Any, name: str | None) -> str:
    """Reserve a name for a guide: the one that was asked for, or the first of its class that was never used."""
    kind = type(guide).__name__
    if name is None:
        names = (kind if i == 1 else f"{kind}_{i}" for i in itertools.count(1))
        name = next(n for n in names if n not in _used)
    elif not is_free(name):
        warnings.warn(
            f"Another live {kind} is named {name!r}; the two would share parameters in Pyro's store. "
            "Give each guide a name of its own.",
            stacklevel=3,
        )
    _used.add(name)
    _live[name] = guide
    return name


def is_free(name: str) -> bool:
    """Whether no live guide bears the name."""
    return name not in _live
