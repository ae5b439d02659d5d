"""A Gaussian for a flow guide to start from.

Adam moves each parameter at its own pace and so crawls on ill-conditioned posteriors; batch and match does not.  It
starts at the guide's start and, for posteriors far away, some steps of L-BFGS uphill from there; the better of the two
in ELBO is kept, so a mode without mass leads nobody astray.
"""

from __future__ import annotations

from pyro import validation_enabled

from ..diagnostics.gaussian import Gaussian, fit_gaussian
from ..guides import AutoFlow
from ..programs.log_density import or_nan
from ..programs.space import Space
from ..programs.task import Task


def start_from_gaussian(guide: AutoFlow, task: Task, power: float = 1.0) -> Gaussian | None:
    """Let a guide start from the best Gaussian found, which is where it is already if none is better.

    The Gaussian is one of the posterior, or of a power of it.  Latents on circles have none, and more than 512 latents
    are too many for a dense one.
    """
    if not guide.starts_from_gaussian:
        return None
    with validation_enabled(False):  # a place without density is for the scores to show
        density = or_nan(Space(task).log_p)
        found = fit_gaussian(lambda latent: power * density(latent), *guide.start)
    guide.start_at(found.loc, found.scale_tril.norm(dim=-1).diag() if found.is_poor else found.scale_tril)
    return found
