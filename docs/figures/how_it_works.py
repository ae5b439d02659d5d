"""Figures of docs/how_it_works.md:  ``python docs/figures/how_it_works.py``  (or some of them, by name)."""

import sys
from pathlib import Path

import matplotlib
import pyro
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import BoundaryNorm
from torch.utils.flop_counter import FlopCounterMode

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows.bijectors import Affine
from pyro_flows.commands.eight_schools import EFFECTS, STANDARD_ERRORS, eight_schools
from pyro_flows.conditioners import MADE
from pyro_flows.training import Training
from pyro_flows.transforms import Autoregressive

matplotlib.use("Agg")
HERE = Path(__file__).resolve().parent
IN_PLACE = {  # torch counts other products by itself
    torch.ops.aten.addmm_: lambda sums, left, right, **_: 2 * left[0] * left[1] * right[1]
}
GREY, BLUE, ORANGE, GREEN = "0.25", "#1f77b4", "#ff7f0e", "#2ca02c"


def save(figure, name):
    figure.savefig(HERE / f"how_it_works_{name}.png", dpi=130)


def factors():
    """Draw the parts of a transform, and the way from transforms to a distribution."""
    figure, axis = plt.subplots(figsize=(8.6, 3.9), layout="constrained")
    axis.set(xlim=(0, 100), ylim=(1, 48))
    axis.axis("off")

    def box(x, y, width, title, text, colour):
        axis.add_patch(plt.Rectangle((x, y), width, 13, facecolor=colour, alpha=0.16, edgecolor=colour, lw=1.2))
        axis.text(x + width / 2, y + 10, title, ha="center", va="center", fontsize=10.5, weight="bold", color=GREY)
        axis.text(x + width / 2, y + 4.6, text, ha="center", va="center", fontsize=8.5, color=GREY)

    def arrow(x0, y0, x1, y1):
        axis.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.2})

    box(1, 33, 29, "bijector", "one number, P parameters\nAffine, splines, mixtures …", BLUE)
    box(35.5, 33, 29, "conditioner", "network → parameters\nMLP, MADE, ConvNet …", ORANGE)
    box(70, 33, 29, "scheme", "which features condition which\nCoupling, Autoregressive", GREEN)
    for x in (32.75, 67.25):
        axis.text(x, 39.5, "×", ha="center", va="center", fontsize=16, color=GREY)
    box(1, 2, 29, "transform", "an event, a context\na module", "0.5")
    box(35.5, 2, 29, "flow", "transforms over a base\na module", "0.5")
    box(70, 2, 29, "flow(context)", "a Pyro distribution\nmade at each call", "0.5")
    for x in (15.5, 50, 84.5):
        axis.plot([x, x], [33, 29], color=GREY, lw=1.2)
    axis.plot([15.5, 84.5], [29, 29], color=GREY, lw=1.2)
    arrow(15.5, 29, 15.5, 15.3)
    arrow(30.5, 8.5, 35.2, 8.5)
    arrow(65, 8.5, 69.7, 8.5)
    pair = (
        "forward_and_log_det(x, θ) → (y, log |dy/dx|)",
        "inverse_and_log_det(y, θ) → (x, log |dx/dy|)",
        "θ: the parameters of a bijector, the context of a transform",
    )
    for line, y in zip(pair, (25.2, 22.2, 18.6), strict=True):
        axis.text(57, y, line, ha="center", va="center", fontsize=8.6, family="monospace", color=GREY)
    save(figure, "factors")


def incremental():
    """Draw the masks of a MADE by the step that computes them, and the cost of the inverse."""
    size, units = 6, 12
    net = MADE(size, 1, (units, units))
    figure, axes = plt.subplots(1, 4, figsize=(9.6, 3.5), layout="constrained", width_ratios=(0.62, 1, 1, 1.55))
    colours = plt.get_cmap("viridis", size)
    ranks = torch.arange(size)
    masks = [layer.mask for layer in net.hidden] + [net.output.mask]
    degrees = [torch.repeat_interleave(ranks, torch.tensor(counts)) for counts in net.unlocked] + [ranks]
    below = ["features known", "first hidden layer", "second hidden layer"]
    names = ["first hidden layer", "second hidden layer", "parameters of each feature"]
    for axis, mask, degree, x, y in zip(axes, masks, degrees, below, names, strict=False):
        picture = torch.where(mask > 0, degree[:, None].float() + 1, torch.nan)
        shown = axis.imshow(picture, cmap=colours, norm=BoundaryNorm(torch.arange(size + 1) + 0.5, size), aspect="auto")
        axis.set_xlabel(x, fontsize=8.5)
        axis.set_ylabel(y, fontsize=8.5)
        axis.set_xticks(range(mask.shape[1]), range(1, size + 1) if mask.shape[1] == size else [""] * mask.shape[1])
        axis.set_yticks(range(mask.shape[0]), range(1, size + 1) if mask.shape[0] == size else [""] * mask.shape[0])
        axis.tick_params(labelsize=7.5, length=2)
    bar = figure.colorbar(shown, ax=list(axes[:3]), location="top", shrink=0.6, ticks=range(1, size + 1), aspect=35)
    bar.set_label("computed in step", fontsize=9)
    bar.ax.tick_params(labelsize=8)

    sizes = [8, 16, 32, 64, 128]
    forward, inverse = [], []
    for dim in sizes:
        layer, x = Autoregressive(Affine(), MADE(dim, 2, (256, 256))), torch.randn(100, dim)
        for verb, found in ((layer.forward_and_log_det, forward), (layer.inverse_and_log_det, inverse)):
            with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter, torch.no_grad():
                verb(x)
            found.append(counter.get_total_flops() / 100 / 1e6)
    axis = axes[3]
    passes = [dim * cost for dim, cost in zip(sizes, forward, strict=True)]
    axis.loglog(sizes, passes, "o--", color="0.6", label="inverse by D passes", ms=4)
    axis.loglog(sizes, inverse, "o-", color=ORANGE, label="incremental inverse", ms=4)
    axis.loglog(sizes, forward, "o-", color=BLUE, label="forward", ms=4)
    axis.set_xticks(sizes, sizes)
    axis.minorticks_off()
    axis.set_xlabel("features D", fontsize=9)
    axis.set_ylabel("million operations per row", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8.5)
    print("inverse / forward:", [round(b / a, 2) for a, b in zip(forward, inverse, strict=True)])
    save(figure, "incremental")


def layers():
    """Draw the images of a grid of the base under the layers of a flow, fitted to a ring."""
    pyro.set_rng_seed(0)
    radius, angle = 2 + 0.15 * torch.randn(4000), 6.2832 * torch.rand(4000)
    ring = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    flow = flows.realnvp(2, num_transforms=6)
    pf.fit_density(flow, ring, max_epochs=40, training=Training(patience=40), progress=False)
    picture = pf.plots.deformation(flow, most=4)
    picture.savefig(HERE / "how_it_works_layers.png", dpi=130)


@torch.no_grad()
def stages_of(guide, number):
    """Return draws of a guide at four stages: of its base, after the couplings, the two affine maps, and the units."""
    value = guide.flow.base().sample((number,))
    found = [value]
    for place, transform in enumerate(guide.flow.transforms):
        value, _ = transform.forward_and_log_det(value)
        if place - len(guide.flow.transforms) in (-4, -2, -1):
            found.append(value)
    return found


def pipeline():
    """Draw the stages of the guide of the eight schools."""
    pyro.set_rng_seed(0)
    guide = pf.AutoFlow(eight_schools)
    pf.fit_svi(eight_schools, guide, EFFECTS, STANDARD_ERRORS, progress=False)
    base, bent, placed, free = (draws[:, [2, 1]] for draws in stages_of(guide, 4000))  # theta[A] and tau
    final = torch.stack((free[:, 0], free[:, 1].exp()), -1)
    colour = base[:, 1].argsort().argsort() / len(base)
    figure, axes = plt.subplots(1, 5, figsize=(11.5, 2.75), layout="constrained")
    titles = "base", "after the couplings", "after the affine maps", "after the units", "constrained"
    for axis, draws, title in zip(axes, (base, bent, placed, free, final), titles, strict=True):
        axis.scatter(*draws.T, c=colour, s=2.5, cmap="viridis", lw=0, rasterized=True)
        low, high = draws.quantile(0.003, 0), draws.quantile(0.997, 0)
        margin = 0.08 * (high - low)
        axis.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
        axis.set_title(title, fontsize=9.5)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(xlabel="coordinate 3", ylabel="coordinate 2")
    axes[1].set(xlabel="coordinate 3", ylabel="coordinate 2")
    axes[2].set(xlabel="coordinate 3", ylabel="log tau")
    axes[3].set(xlabel="theta[A]", ylabel="log tau")
    axes[4].set(xlabel="theta[A]", ylabel="tau")
    save(figure, "pipeline")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ("factors", "incremental", "layers", "pipeline"):
        globals()[name]()
