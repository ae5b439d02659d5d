"""The losses of a fit, step by step."""

from typing import Any

import numpy as np

from .panels import Picture, panels

WINDOW = 50  # steps of the running mean


def history(fit: Any) -> Picture:
    """Plot the loss of each step of a fit, its running mean, held-out losses, and the state that was kept.

    The axis ends at the 97 % quantile of the losses, so that the high losses of the first steps are cut off.

    Args:
        fit: A :class:`~pyro_flows.Fit`, the result of ``fit_svi``, ``fit_density`` or ``fit_amortized``.

    Returns:
        A matplotlib figure; the loss is in nats, or in the unit of the objective.

    Raises:
        ValueError: If no loss is finite.

    Example::

        >>> import torch
        >>> from pyro_flows import fit_density, flows
        >>> fit = fit_density(flows.nsf(2), torch.randn(100, 2), max_epochs=2, progress=False)
        >>> picture = history(fit)  # notebooks show it; picture.savefig("fit.png") writes it
        >>> picture.axes[0].get_xlabel()
        'step'
    """
    losses = fit.losses.cpu().double().numpy()
    steps = np.arange(1, len(losses) + 1)
    sound = np.isfinite(losses)
    if not sound.any():
        raise ValueError("history: no step of this fit has a finite loss.")
    picture, (axis,) = panels(7.5, 3.6, 1, 1)
    axis.plot(steps, np.where(sound, losses, np.nan), color="C0", lw=0.7, alpha=0.35, label="each step")
    width = min(WINDOW, max(1, sound.sum() // 5))
    smooth = np.convolve(losses[sound], np.full(width, 1 / width), mode="valid")
    axis.plot(steps[sound][width - 1 :], smooth, color="C0", lw=1.6, label=f"mean of {width} steps")
    shown = [losses[sound], smooth]
    if fit.held_out is not None and len(fit.held_out):
        held_out = fit.held_out.cpu().double().numpy()
        places = np.linspace(0, len(losses), len(held_out) + 1)[1:]
        axis.plot(places, held_out, color="C1", lw=1.6, label="held out, after each epoch")
        shown.append(held_out[np.isfinite(held_out)])
    together = np.concatenate(shown)
    low, high = together.min(), np.quantile(together, 0.97)
    if np.isfinite(fit.best_loss):  # NaN if the fit was interrupted before the first validation
        axis.plot(fit.best_step, fit.best_loss, "o", color="C3", ms=6, zorder=3, label=f"kept: {fit.best_loss:.3f}")
        high = max(high, fit.best_loss)
    margin = 0.06 * (high - low) or 0.5
    axis.set(xlim=(0, len(losses) + 1), xlabel="step", ylim=(low - margin, high + margin), ylabel="loss")
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.locator_params(axis="x", integer=True)
    skipped = f", {fit.skipped} skipped" if fit.skipped else ""
    ended = "" if fit.stopped == "steps" else f", {fit.stopped}"
    axis.set_title(f"{fit.steps} steps in {fit.seconds:.1f} s{skipped}{ended}", fontsize=11)
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    axis.grid(axis="y", alpha=0.3)
    return picture
