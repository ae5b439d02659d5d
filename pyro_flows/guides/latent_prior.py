"""The prior of a guide's latents: a model run until all of them are drawn, without the simulator behind them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from pyro import poutine
from torch import Tensor

from ..programs.engines import Values, View
from ..programs.simulator import Simulator
from .guide_call import Found, Reached


class LatentPrior:
    """The prior of the latents that a guide shows.

    Args:
        simulator: The model.
        names: The latent sites of the guide.
    """

    def __init__(self, simulator: Simulator, names: list[str]) -> None:
        self.simulator, self.names = simulator, names

    @property
    def is_complete(self) -> bool:
        """True if the model draws nothing else before the guide's latents, so that their prior has a known density."""
        before = [name for name, _ in self.simulator.model.single.iter_stochastic_nodes()]
        return set(before[: len(self.names)]) == set(self.names)

    def run(self, size: int, values: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Return draws of the guide's latents from the prior, or given ones, and their log-density, ``(size,)``.

        The latents before them are included.
        """
        data = self.simulator.sites.values()
        latents = [name for name, _ in self.simulator.model.single.iter_stochastic_nodes() if name not in data]

        def read(view: View) -> Values:
            drawn = {name: view.read(name) for name in latents if name in view.trace.nodes}
            return {**drawn, "log_p": view.log_prob(self.names.__contains__)}

        found = self.simulator.model.sample(read, values or {}, size, place=self._before_data)
        return found, found.pop("log_p")

    def _before_data(self, model: Callable[..., Any], data: Values) -> Callable[..., Any]:
        """Return a program that ends when all latents of the guide are drawn or held."""
        held = poutine.condition(model, data=data)

        def run(*args: Any, **kwargs: Any) -> None:
            with contextlib.suppress(Reached), Found("", (), self.names, {}):
                held(*args, **kwargs)

        return run
