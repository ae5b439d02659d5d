"""The setting ``pyro_flows_compile`` of ``pyro.settings``: what replaces functions that are called again and again.

* ``"auto"``: their graphs, and compiled code once another process has made it.
* ``"graph"``: their graphs alone; no process is started.
* ``"off"``: nothing; each call runs the model through Pyro's handlers.

The environment variable ``PYRO_FLOWS_COMPILE`` sets the first value.
"""

import os

import pyro

COMPILE = os.environ.get("PYRO_FLOWS_COMPILE", "auto")
CHOICES = "auto", "graph", "off"


@pyro.settings.register("pyro_flows_compile", __name__, "COMPILE")  # type: ignore[untyped-decorator]
def _check(value: object) -> None:
    if value not in CHOICES:
        raise ValueError(f"pyro.settings: pyro_flows_compile must be one of {', '.join(CHOICES)}, got {value!r}.")


_check(COMPILE)
