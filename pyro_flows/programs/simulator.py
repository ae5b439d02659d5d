"""Simulations: a model run forward, its latents and data drawn together, many at once.

The model takes its data by arguments that are None where they are to be drawn: ``def model(x=None)`` with
``pyro.sample("x", ..., obs=x)``.  Which site an argument holds the data of is found out by running the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from .alongside import room_of, rows_of, side_by_side
from .draws import check_integers, check_side_by_side, single_trace, subsampled_plate
from .held import group_of
from .nesting import takes_nesting
from .quantities import innermost
from .simulations import Simulations

PROBES = 7  # draws at once: as few dimensions of models are of that size, which might pass for theirs


@takes_nesting
def simulate(
    model: Callable[..., Any],
    *args: Any,
    num_simulations: int = 10_000,
    batch_size: int = 10_000,
    vectorize: bool = True,
    max_plate_nesting: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Simulations:
    """Run a model forward: draws of its latents, and of its data by the arguments that take them.

    Args:
        model: A Pyro model that takes its data by arguments, as for :func:`~pyro_flows.fit_amortized`.
        *args: The model's arguments without the data.
        num_simulations: The number N of draws.
        batch_size: How many run at once.
        vectorize: Whether the model runs vectorised over them, for which it must broadcast to the left of its plates.
        max_plate_nesting: How many dimensions the model's plates take; by default what one run shows.
        model_kwargs: Keyword arguments of the model whose names clash with those above.
        **kwargs: The model's other keyword arguments.

    Returns:
        The :class:`~pyro_flows.Simulations`.

    Raises:
        ValueError: If a number is out of its range; if the model cannot be simulated, since it takes no data, needs an
            argument, observes what no argument holds, has a factor statement or a subsampled plate; or if it fails or
            means something else vectorised over simulations.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(x=None):
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     return pyro.sample("x", dist.Normal(theta, 0.5), obs=x)
        >>> found = simulate(model, num_simulations=100)
        >>> found.latents["theta"].shape, found.data["x"].shape
        (torch.Size([100]), torch.Size([100]))
    """
    check_integers("simulate", num_simulations=(num_simulations, 1), batch_size=(batch_size, 1))
    simulator = Simulator("simulate", model, args, {**kwargs, **(model_kwargs or {})})
    return simulator.draw(num_simulations, batch_size=batch_size, vectorize=vectorize)


class Simulator:
    """A model that can be run forward.

    Args:
        caller: The public function that asks, for errors.
        model: A Pyro model.
        args: Its arguments without the data.
        kwargs: Its keyword arguments.

    Attributes:
        sites: For each argument that holds data, the site that it is observed at.

    Raises:
        ValueError: If the model needs an argument, observes what no argument holds, has a factor statement or a
            subsampled plate, or takes no data.
    """

    def __init__(self, caller: str, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.caller, self.model = caller, model
        program = poutine.unwrap(model)
        self._signature = inspect.signature(program.forward if isinstance(program, nn.Module) else program)
        try:
            self._given = self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise ValueError(
                f"{caller}: the model cannot be simulated: {error}. Data arguments must be optional, "
                "`def model(x=None)`; give the others here."
            ) from error
        self.args, self.kwargs = self.arguments({})
        try:
            single, _, self.nesting = single_trace(model, lambda *_, **__: None, self.args, self.kwargs)
        except (TypeError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"{caller}: the model cannot be simulated: it fails without its data ({error}). It must draw what is "
                "None from proper laws, and take sizes from other arguments, which are given here."
            ) from error
        self.single = prune_subsample_sites(single)
        if plate := subsampled_plate(single):
            raise ValueError(f"{caller}: {plate}. Let it run over all rows of a simulated data set.")
        self.sites = self._find_data()
        self._check_sites()

    def arguments(self, data: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments, with data."""
        bound = self._signature.bind_partial()
        bound.arguments.update({**self._given, **data})
        return bound.args, bound.kwargs

    def _find_data(self) -> dict[str, str]:
        drawn = dict(self.single.iter_stochastic_nodes())
        found: dict[str, str] = {}
        for name, parameter in self._signature.parameters.items():
            if self._given.get(name, parameter.default) is not None:
                continue
            for site in sorted(drawn.keys() - found.values(), key=lambda site: (site != name, site)):
                if self._holds(name, site, drawn[site]["value"]):
                    found[name] = site
                    break
            else:
                if name in drawn:
                    raise ValueError(
                        f"{self.caller}: argument {name!r} must be what site {name!r} observes as it is, obs={name}; "
                        "change it in the site's distribution, as by a TransformedDistribution, and not before obs=."
                    )
        return found

    def _holds(self, name: str, site: str, value: Tensor) -> bool:
        """Whether a value given by an argument is observed at a site."""
        args, kwargs = self.arguments({name: value})
        try:
            with poutine.block(), torch.no_grad(), pyro.validation_enabled(False):
                node = poutine.trace(self.model).get_trace(*args, **kwargs).nodes.get(site)
        except Exception:  # it is not the data of that site, and anything may happen
            return False
        return bool(node and node["is_observed"] and node["value"] is value)

    def _check_sites(self) -> None:
        for name, site in self.single.nodes.items():
            if site["type"] != "sample" or not site["is_observed"] or group_of(site) == "posterior":
                continue
            if type(site["fn"]).__name__ == "Unit":
                raise ValueError(
                    f"{self.caller}: the model cannot be simulated: {name!r} is a factor statement, which has no "
                    "draws. Write it as a pyro.sample statement."
                )
            raise ValueError(
                f"{self.caller}: site {name!r} is observed though no argument was left open for it: take its data by "
                f"an argument, `def model({name}=None)` with `pyro.sample({name!r}, ..., obs={name})`, and do not give "
                "it."
            )
        if not self.sites:
            free = [n for n, p in self._signature.parameters.items() if self._given.get(n, p.default) is None]
            raise ValueError(
                f"{self.caller}: the model takes no data: it needs an argument that is None by default and is "
                'observed as it is, `def model(x=None)` with `pyro.sample("x", ..., obs=x)`; '
                f"its arguments are {', '.join(self._signature.parameters) or 'none'}"
                f"{f', and {free} reach no observed site' if free else ''}."
            )

    @torch.no_grad()
    def draw(
        self,
        number: int,
        latents: dict[str, Tensor] | None = None,
        *,
        batch_size: int = 10_000,
        vectorize: bool = True,
    ) -> Simulations:
        """Draw latents and data: vectorised under an outer plate, or one after the other.

        Args:
            number: How many.
            latents: Values of some latents, ``(number, *site_shape)``, in place of the prior's draws.
            batch_size: How many run at once.
            vectorize: Whether many do.

        Raises:
            ValueError: If the model means something else vectorised over simulations.
        """
        if vectorize:
            self.check()
        step, held = batch_size if vectorize else 1, latents or {}
        parts = [
            self._run(min(step, number - start), vectorize, {n: v[start : start + step] for n, v in held.items()})
            for start in range(0, number, step)
        ]
        values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        data = {name: values.pop(site) for name, site in self.sites.items()}
        return Simulations(values, data)

    def placed(self, latents: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values ``(N, *site_shape)`` with room for plates that their sites do not lie in, to be held at once."""
        nodes, nesting = self.single.nodes, self.nesting
        return {
            name: value.reshape(len(value), *room_of(nodes[name], nesting), *value.shape[1:])
            for name, value in latents.items()
        }

    def _run(self, size: int, vectorize: bool, latents: dict[str, Tensor]) -> dict[str, Tensor]:
        held = self.placed(latents) if vectorize else {name: value[0] for name, value in latents.items()}
        program = poutine.condition(self.model, data=held)
        with poutine.block(), pyro.validation_enabled(False):
            beside = side_by_side(program, size, self.nesting) if vectorize else program
            trace = poutine.trace(beside).get_trace(*self.args, **self.kwargs)
        sites = self.single.iter_stochastic_nodes()
        return {name: rows_of(name, trace.nodes[name]["value"], site["value"].shape, size) for name, site in sites}

    def check(self) -> None:
        """Refuse a model that means something else vectorised over simulations."""
        check_side_by_side(self.model, self.model, self.args, self.kwargs, PROBES)
        found = self._run(PROBES, True, {})
        latents = {name: value for name, value in found.items() if name not in self.sites.values()}
        for name in self.sites.values():
            if isinstance(innermost(self.single.nodes[name]["fn"]), dist.Delta):  # its value says what no density can
                self._check_values(name, latents)

    def _check_values(self, name: str, latents: dict[str, Tensor]) -> None:
        """Compare what follows from latents vectorised and one by one, or, where there is noise, its independence."""
        alone = [torch.cat([self._run(1, False, _row(latents, row))[name] for row in (0, 1)]) for _ in range(2)]
        if torch.equal(alone[0], alone[1]):
            if not torch.allclose(self._run(PROBES, True, latents)[name][:2], alone[0], rtol=1e-4, atol=1e-6):
                raise ValueError(
                    f"{self.caller}: site {name!r} is another function of the latents when the model runs vectorised "
                    "over simulations: one of them sees the others. Let the model broadcast to the left of its plates, "
                    "with x.mean(-1, keepdim=True) in place of x.mean(), or use vectorize=False."
                )
            return
        twice = {key: value.expand(PROBES, *value.shape[1:]) for key, value in _row(latents, 0).items()}
        pair = self._run(PROBES, True, twice)[name]
        if torch.equal(pair[0], pair[1]):
            raise ValueError(
                f"{self.caller}: site {name!r} has noise from outside of sample statements, which would be the same "
                "for all simulations that run at once. Draw it by pyro.sample, or use vectorize=False."
            )


def _row(latents: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in latents.items()}
