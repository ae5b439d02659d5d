"""Simulations: a model run forward, its latents and data drawn together, many at once.

The model takes its data by arguments, and draws the data whose argument is None: ``def model(x=None)`` with
``pyro.sample("x", ..., obs=x)``.  Runs of the model show which site observes an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..arguments import check_integers, check_program, check_tensors, quoted
from ..threads import allowed, using
from ..user_code import warn_user
from .engines import in_batches
from .program import Args, Function, Kwargs, nesting_of, runs_programs, signature_of, trace_at, vectorize_of, writable
from .runner import Choice, Runner, choose, why_alone
from .sites import Values, innermost, is_observation, subsampled_plate


@dataclass(frozen=True)
class Simulations:
    """N joint draws of latents and data, from :func:`~pyro_flows.simulate` or from any other simulator.

    Attributes:
        latents: For each latent site the values, ``(N, *site_shape)``.
        data: For each argument that holds data the values, ``(N, *site_shape)``.

    Raises:
        TypeError: If a value is no tensor.
        ValueError: If there are no data, or not as many rows of all.

    Example::

        >>> import torch
        >>> theta = torch.randn(100)
        >>> found = Simulations({"theta": theta}, {"x": theta + 0.5 * torch.randn(100)})
        >>> len(found), len(found.take(slice(10))), found.row(0)["x"].shape, len(found.join(found))
        (100, 10, torch.Size([]), 200)
    """

    latents: dict[str, Tensor]
    data: dict[str, Tensor]

    def __post_init__(self) -> None:
        check_tensors("Simulations", "latents", self.latents)
        check_tensors("Simulations", "data", self.data)
        sizes = {name: len(value) for group in (self.latents, self.data) for name, value in group.items()}
        if not self.data or len(set(sizes.values())) > 1:
            raise ValueError(f"Simulations: latents and data must have as many rows, and some data, got {sizes}.")

    def __repr__(self) -> str:
        latents, data = ({name: tuple(v.shape[1:]) for name, v in g.items()} for g in (self.latents, self.data))
        return f"Simulations({len(self)} draws, latents={latents}, data={data})"

    def row(self, number: int) -> dict[str, Tensor]:
        """Return one dataset: for each argument that holds data its value, ``site_shape``."""
        return {name: value[number] for name, value in self.data.items()}

    def take(self, index: Tensor | slice) -> Simulations:
        """Return the draws at an index ``(n,)`` or in a slice."""
        return Simulations(*({name: value[index] for name, value in g.items()} for g in (self.latents, self.data)))

    @property
    def has_finite_data(self) -> Tensor:
        """True for each draw whose data are finite, ``(N,)``."""
        return torch.stack([x.reshape(len(x), -1).isfinite().all(-1) for x in self.data.values()]).all(0)

    def join(self, other: Simulations) -> Simulations:
        """Return these draws followed by those of another object."""
        groups = (self.latents, other.latents), (self.data, other.data)
        return Simulations(*({name: torch.cat((a[name], b[name])) for name in a} for a, b in groups))

    @property
    def numbers(self) -> int:
        """The number of numbers in a dataset."""
        return sum(value[:1].numel() for value in self.data.values())

    def __len__(self) -> int:
        return len(next(iter(self.data.values())))


@runs_programs
def simulate(
    model: Callable[..., Any],
    *args: Any,
    num_simulations: int = 10_000,
    batch_size: int = 10_000,
    **kwargs: Any,
) -> Simulations:
    """Run a model forward: draw its latents, and its data by the arguments that take them.

    Args:
        model: A Pyro model that takes its data by arguments, as for :func:`~pyro_flows.fit_amortized`, or a
            :class:`~pyro_flows.Program` of it.
        *args: The model's arguments without the data.
        num_simulations: The number N of draws.
        batch_size: The number of draws to run at once.
        **kwargs: The model's keyword arguments.

    Returns:
        The :class:`~pyro_flows.Simulations`.

    Raises:
        ValueError: If a number is out of its range.  If the model takes no data, needs an argument, observes what no
            argument holds, or has a factor statement or a subsampled plate.  If it fails or means something else
            vectorised over simulations.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(x=None):
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     return pyro.sample("x", dist.Normal(theta, 0.5), obs=x)
        >>> found = simulate(model, num_simulations=100)
        >>> found.latents["theta"].shape, found.data["x"].shape
        (torch.Size([100]), torch.Size([100]))
    """
    check_integers("simulate", num_simulations=num_simulations, batch_size=batch_size)
    simulator = Simulator("simulate", model, args, kwargs)
    with using(allowed()):  # thousands of simulations at once are work for several threads
        return simulator.draw(num_simulations, batch_size=batch_size)


class Simulator:
    """A model that can be run forward.

    Args:
        caller: The name of the public function, for errors.
        model: A Pyro model.
        args: Its arguments without the data.
        kwargs: Its keyword arguments.

    Attributes:
        model: The model as a :class:`~.runner.Runner`.
        vectorize: The engine that the program asks for, or ``"auto"``.
        given: The arguments that are given, by their names.
        sites: For each argument that holds data, the site that observes it.

    Raises:
        ValueError: If the model needs an argument, observes what no argument holds, has a factor statement or a
            subsampled plate, or takes no data.
    """

    def __init__(self, caller: str, model: Function, args: Args, kwargs: Kwargs) -> None:
        self.caller = caller
        check_program(model=model)
        self._signature, self.vectorize = signature_of(model), vectorize_of(model)
        try:
            self.given = self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            must = "An argument that holds data must be optional, `def model(x=None)`, and is not given here"
            self._refuse(f"{error}. {must}. Give all others, as in {caller}(model, ..., n=10)", error)
        args, kwargs = self.arguments({})
        try:
            model, single = writable(model, lambda program: trace_at(program, {}, args, kwargs))
        except (TypeError, AttributeError, NotImplementedError) as error:
            must = "draw what is None from proper distributions, and take sizes from other arguments"
            self._refuse(f"it fails without its data ({error}). It must {must}, which are given here", error)
        self.model = Runner(model, args, kwargs, single, nesting_of(single), choose=self._choose)
        if plate := subsampled_plate(single):
            self._refuse(f"{plate}. Let it run over all rows of a simulated dataset")
        self.sites = self._find_data()
        self._check_sites()

    def _refuse(self, fault: str, cause: Exception | None = None) -> NoReturn:
        raise ValueError(f"{self.caller}: the model cannot be simulated: {fault}.") from cause

    @property
    def _open(self) -> list[str]:
        """The arguments that are None unless data are given."""
        parameters = self._signature.parameters.items()
        return [name for name, p in parameters if self.given.get(name, p.default) is None]

    def arguments(self, data: dict[str, Tensor]) -> tuple[Args, Kwargs]:
        """Return the model's arguments, with data."""
        bound = self._signature.bind_partial()
        bound.arguments.update({**self.given, **data})
        return bound.args, bound.kwargs

    def check_data(self, argument: str, data: dict[str, Tensor]) -> None:
        """Raise an error unless an argument of the caller holds one finite dataset of the model."""
        check_tensors(self.caller, argument, data)
        if data.keys() != self.sites.keys():
            way = f"{argument}={{{', '.join(f'{name!r}: ...' for name in self.sites)}}}"
            raise ValueError(f"{self.caller}: {argument} must hold one dataset, {way}, got {quoted(data)}.")
        for name, value in data.items():
            shape = self.model.single.nodes[self.sites[name]]["value"].shape
            if value.shape != shape:
                must = f"{argument}[{name!r}] must have shape {tuple(shape)}"
                raise ValueError(f"{self.caller}: {must}, got {tuple(value.shape)}.")
            if not value.isfinite().all():
                must = f"{argument}[{name!r}] must be finite, got NaN or inf"
                raise ValueError(f"{self.caller}: {must}. Correct the data.")

    def _find_data(self) -> dict[str, str]:
        """Return the site that observes each argument that was left open."""
        drawn = dict(self.model.single.iter_stochastic_nodes())
        found: dict[str, str] = {}
        for name in self._open:
            sites = sorted(drawn.keys() - found.values(), key=lambda site: (site != name, site))
            site = next((site for site in sites if self._holds(name, site, drawn[site]["value"])), None)
            if site is not None:
                found[name] = site
            elif name in drawn:
                way = "Transform it in the site's distribution, as a TransformedDistribution does, not before obs="
                self._refuse(f"site {name!r} must observe argument {name!r} unchanged, obs={name}. {way}")
        return found

    def _check_sites(self) -> None:
        """Raise ValueError unless the model takes data, and all its observed sites take them by arguments."""
        for name, site in self.model.single.nodes.items():
            if is_observation(site) and type(site["fn"]).__name__ == "Unit":
                self._refuse(f"{name!r} is a factor statement, which has no draws. Write it as a pyro.sample statement")
            if is_observation(site):
                way = f"by `def model({name}=None)` with `pyro.sample({name!r}, ..., obs={name})`, and do not give it"
                self._refuse(f"site {name!r} is observed though no argument was left open for it. Take its data {way}")
        if not self.sites:
            given = ", ".join(self._signature.parameters) or "none"
            unused = f", and {self._open} reach no observed site" if self._open else ""
            way = "Give it an argument that is None by default and observed unchanged, `def model(x=None)` with "
            way += f'`pyro.sample("x", ..., obs=x)`; its arguments are {given}{unused}'
            self._refuse(f"it takes no data. {way}")

    def _holds(self, name: str, site: str, value: Tensor) -> bool:
        """True if a site observes a value given by an argument."""
        args, kwargs = self.arguments({name: value})
        try:
            with pyro.validation_enabled(False):
                node = trace_at(self.model.call, {}, args, kwargs).nodes.get(site)
        except Exception:  # if it is not the data of that site, anything may happen
            return False
        return bool(node and node["is_observed"] and node["value"] is value)

    @torch.no_grad()
    def draw(self, number: int, latents: Values | None = None, *, batch_size: int = 10_000) -> Simulations:
        """Draw latents and data.

        Args:
            number: The number of draws.
            latents: Values of some latents, ``(number, *site_shape)``, in place of the prior's draws.
            batch_size: The number of draws to run at once.

        Raises:
            ValueError: If the model means something else vectorised as the program asks.
        """
        values = in_batches(self._run, latents or {}, number, batch_size)
        data = {name: values.pop(site) for name, site in self.sites.items()}
        return Simulations(values, data)

    def _run(self, latents: Values, size: int, model: Runner | None = None) -> Values:
        names = [name for name, _ in self.model.single.iter_stochastic_nodes()]
        return (model or self.model).sample(lambda view: {name: view.read(name) for name in names}, latents, size)

    def _choose(self, model: Runner) -> Choice:
        """Choose the engine for many simulations."""
        choice = choose(model, self._run({}, 1, model.by("loop")), self.vectorize, "model", self._fault)
        if choice.engine == "loop" and self.vectorize == "auto":
            warn_user(f"{self.caller}: {why_alone('model', choice)}")
        return choice

    def _fault(self, model: Runner) -> str:
        """Return a fault of data without a density that could show it, in words, or an empty string.

        Such data are compared with single runs at the same latents.  If they are noisy, the noise must differ.
        """
        latents = {name: value for name, value in self._run({}, 2, model).items() if name not in self.sites.values()}
        twice = {name: value[:1].expand(2, *value.shape[1:]) for name, value in latents.items()}
        nodes, alone = self.model.single.nodes, model.by("loop")
        for name in self.sites.values():
            if not isinstance(innermost(nodes[name]["fn"]), dist.Delta):
                continue
            many, one, again = (self._run(latents, 2, way)[name] for way in (model, alone, alone))
            is_noisy = not torch.equal(one, again)
            if not is_noisy and not torch.allclose(many, one, rtol=1e-4, atol=1e-6):
                fault = f" makes site {name!r} another function of the latents when it runs vectorised over simulations"
                return f"{fault}: one of them sees the others"
            if is_noisy and torch.equal(*self._run(twice, 2, model)[name]):
                return f" draws noise for site {name!r} outside of sample statements, the same for all draws of one run"
        return ""


def check_draws(caller: str, what: str, name: str, value: Tensor) -> None:
    """Raise ValueError for draws ``(N, *shape)`` that are not finite, or all the same."""
    if not value.isfinite().all():
        rows = value.reshape(len(value), -1).isfinite().all(1)
        fault = f"{what} {name!r} holds NaN or inf in {int((~rows).sum())} of {len(value)} draws"
        raise ValueError(f"{caller}: {fault}. Simulate first, and give those that are finite, simulations=....")
    if len(value) > 1 and value.numel() and (value == value[:1]).all():
        raise ValueError(f"{caller}: {what} {name!r} is constant: {value[0].flatten()[0].item():.6g} in every draw.")
