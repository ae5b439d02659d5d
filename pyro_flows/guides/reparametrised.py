"""Sites that ``poutine.reparam`` replaced, which the model derives from its latents: ``x`` from ``x_decentered``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from ..programs.engine_choice import choose
from ..programs.engines import Values, in_batches
from ..programs.program import signature_of
from .discrete import summed
from .guide_call import Call

BATCH = 1000  # draws per run of the model


def with_reparametrised(call: Call, names: Sequence[str], latents: Values) -> Values:
    """Add the sites that the user wrote and ``poutine.reparam`` replaced, at N draws of a guide's latents.

    They are left out where the model cannot tell them: in a guide from a file, without the model's arguments, and if a
    plate is subsampled.

    Args:
        call: The call of the guide; its model has the guide's handlers.
        names: These sites.
        latents: The guide's latents, ``(N, *site_shape)`` each.
    """
    if not names or not _can_run(call):
        return latents
    program = summed(call)
    if program.subsamples or not all(map(len, latents.values())):
        return latents
    first = {name: value[:1] for name, value in latents.items()}
    program = program.with_(choice=choose(program, first, "auto", "model"))

    def step(held: Values, size: int) -> Values:
        drawn = {**held, **program.discrete(held, size)} if program.enumerated else held
        return runs.sample(lambda view: {name: view.read(name) for name in names}, drawn, size)

    # At values of its discrete latents a program that is summed out may not broadcast.
    runs = program.by("vmap") if program.enumerated and program.engine != "loop" else program
    return {**latents, **in_batches(step, latents, len(next(iter(latents.values()))), BATCH)}


def _can_run(call: Call) -> bool:
    """True if a guide has its model, and is given the model's arguments."""
    if call.model is None:
        return False
    with suppress(TypeError, ValueError):
        signature_of(call.model).bind(*call.args, **call.kwargs)
        return True
    return False
