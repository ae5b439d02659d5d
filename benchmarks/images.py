"""How well do our flows and normflows' Glow model images?

    python benchmarks/images.py                              # all parts, about two hours on 2 cores
    python benchmarks/images.py --only digits                # parts: mnist, logit, digits or costs
    python benchmarks/images.py --models Glow TarFlow        # only some models
    python benchmarks/images.py --minutes 0.2 --out DIR      # a smoke run

Each fit has one core, and its time is CPU time of that core.  One fit per core runs in parallel.  The number of steps
that fill the time is estimated before the fit, so the time is met within about 15 %.  The table has the actual seconds.

*mnist*: MNIST as integers 0 … 255, with about the same time for each model.  All models are trained by
``pf.fit_density``, with the same images, batches, optimiser, step sizes and weight averages.  normflows' Glow is
wrapped as one of our transforms, with the same base and the same logits.  Reported are bits per dimension of the 10,000
test images: an upper bound, ± 2 standard errors over images.  A tighter bound, with 16 draws of the noise, is reported
for the first 1,000 images.

*digits*: scikit-learn's 8 × 8 digits, 0 … 16; a fifth of them is the test set.  One flow has the class as context, and
one is the decoder of an autoencoder with 16 latents.

*logit*: MNIST in the logit space of the MAF paper (arXiv:1705.07057), in nats.

*costs*: the time of a training step and of a batch of samples, and the memory of Glows of three depths.

An interrupted run resumes after its last complete fit.  Writes ``images.md``, ``images.csv`` and grids of samples into
``docs/benchmarks``.
"""

import argparse
import copy
import functools
import math
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import normflows as nf
import pyro
import pyro.distributions as dist
import torch
from images_table import FIELDS, file_name, save
from mnist import mnist
from posteriors import read
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows.encoders import ConvEncoder
from pyro_flows.flows import Dequantized, Flow
from pyro_flows.training import Gradients, Training
from pyro_flows.transforms import FlowTransform

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
MINUTES = {"mnist": 24.0, "digits": 1.5, "logit": 12.0}  # of one core, per fit
PORTIONS = 12  # evaluations on held-out images per fit
SHARE = 0.87  # of a fit's time for its steps; evaluations, start and weight averages take the rest
BATCH, LR = 64, 8e-3
SCALES, STEPS, HIDDEN = 2, 8, 64  # of both Glows
DRAWS, FEW = 16, 1000
LARGE = 1024  # images in the batch whose memory is measured
ALPHA = 1e-6  # of the logit space of the MAF paper

VAE = "digits", "VAE with a Glow for decoder", "uniform"

Row = dict[str, str]
Label = tuple[str, str, str]
Shape = tuple[int, int, int]


# ------------------------------------------------------------ data


class Images(NamedTuple):
    """Integer images ``(N, C, H, W)`` and their classes: training set, held-out set and test set."""

    train: tuple[Tensor, Tensor]
    judge: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    levels: int

    @property
    def shape(self) -> Shape:
        return tuple(self.train[0].shape[1:])  # type: ignore[return-value]


@functools.cache
def data(name: str) -> Images:
    if name == "digits":
        found = load_digits()
        x, y = torch.from_numpy(found.images).to(torch.uint8).unsqueeze(1), torch.from_numpy(found.target)
        fold = torch.arange(len(x)) % 10
        parts = (fold < 7, fold == 7, fold > 7)
        return Images(*((x[rows], y[rows]) for rows in parts), levels=17)
    x, y = mnist("train")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    kept, out = order[2000:], order[:2000]
    return Images((x[kept], y[kept]), (x[out], y[out]), mnist("t10k"), levels=256)


class Portion:
    """Epoch of a given number of batches, sampled again in each pass."""

    def __init__(self, batches: int, draw: Callable[[Tensor], tuple[Tensor, ...]], number: int) -> None:
        self.batches, self.draw, self.number = batches, draw, number

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (self.draw(torch.randint(0, self.number, (BATCH,))) for _ in range(self.batches))


# ------------------------------------------------------------ models


class Normflows(FlowTransform):
    """normflows' Glow with its trainable Gaussians, as one of our transforms from base to data."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        channels, height, width = shape
        self.shapes, bases, levels, merges = [], [], [], []
        for scale in range(SCALES):
            deep = SCALES - scale
            blocks = [
                nf.flows.GlowBlock(channels * 2 ** (deep + 1), HIDDEN, split_mode="channel", scale=True)
                for _ in range(STEPS)
            ]
            levels.append([*blocks, nf.flows.Squeeze()])
            merges += [nf.flows.Merge()] if scale else []
            wide = channels * 2 ** (SCALES + 1) if scale == 0 else channels * 2**deep
            self.shapes.append((wide, height // 2**deep, width // 2**deep))
            bases.append(nf.distributions.DiagGaussian(self.shapes[-1]))
        self.flow = nf.MultiscaleFlow(bases, levels, merges)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found, log_det = self.flow.inverse_and_log_det(y.reshape(-1, *self.event_shape))
        parts = []
        for z, base in zip(found, self.flow.q0, strict=True):
            parts.append(((z - base.loc) * torch.exp(-base.log_scale)).flatten(1))
            log_det = log_det - base.log_scale.sum()
        return torch.cat(parts, 1).reshape(y.shape), log_det.reshape(y.shape[:-3])

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = x.reshape(-1, self.event_shape.numel()).split([math.prod(shape) for shape in self.shapes], 1)
        z, total = [], x.new_zeros(())
        for part, base, shape in zip(parts, self.flow.q0, self.shapes, strict=True):
            z.append(part.reshape(-1, *shape) * base.log_scale.exp() + base.loc)
            total = total + base.log_scale.sum()
        y, log_det = self.flow.forward_and_log_det(z)
        return y.reshape(x.shape), (log_det + total).reshape(x.shape[:-3])


def normflows(shape: Shape) -> Flow:
    return Flow([Normflows(shape)])


def glow(shape: Shape, **options: object) -> Flow:
    return flows.glow(shape, num_scales=SCALES, num_steps=STEPS, hidden_dim=HIDDEN, **options)


def noise(shape: Shape) -> Flow:
    return flows.realnvp_image(shape, shape, num_scales=1, num_steps=1, num_blocks=1)


class Run(NamedTuple):
    """Model of a part of the benchmark, with its flow, its dequantisation and its context."""

    part: str
    name: str
    flow: Callable[..., Flow]
    variational: bool = False
    by_class: bool = False

    @property
    def label(self) -> Label:
        """Part, model and dequantisation, as in the table."""
        return (
            self.part,
            f"{self.name}, by class" if self.by_class else self.name,
            "variational" if self.variational else "uniform",
        )


RUNS = [
    Run("mnist", "Glow", glow),
    Run("mnist", "Glow of normflows", normflows),
    Run("mnist", "Flow++", flows.flowpp_image),
    Run("mnist", "RealNVP", flows.realnvp_image),
    Run("mnist", "TarFlow", flows.tarflow),
    Run("mnist", "Glow", glow, variational=True),
    Run("mnist", "Flow++", flows.flowpp_image, variational=True),
    Run("digits", "RealNVP", flows.realnvp_image),
    Run("digits", "Glow", flows.glow),
    Run("digits", "Flow++", flows.flowpp_image),
    Run("digits", "TarFlow", flows.tarflow),
    Run("digits", "Flow++", flows.flowpp_image, by_class=True),
]


# ------------------------------------------------------------ fits


def paced(model: nn.Module, loss: Callable[[], Tensor], minutes: float) -> int:
    """Return the number of training steps of a model that fit into a time, by timing some gradients."""
    optimiser = torch.optim.Adam(model.parameters(), lr=0.0)
    times = []
    for _ in range(12):
        began = time.process_time()
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        times.append(time.process_time() - began)
    return max(PORTIONS, round(SHARE * 60 * minutes / statistics.median(times[4:])))


def fitted(run: Run, minutes: float, out: Path) -> Row:
    """Train and score one model of integers."""
    torch.manual_seed(0)
    images = data("digits" if run.part == "digits" else "mnist")
    flow = run.flow(images.shape, num_classes=10) if run.by_class else run.flow(images.shape)
    model = Dequantized(flow, levels=images.levels, noise=noise(images.shape) if run.variational else None)
    (x, labels), parts = images.train, 2 if run.by_class else 1

    def draw(rows: Tensor) -> tuple[Tensor, ...]:
        return (x[rows], labels[rows])[:parts]

    model.log_prob(*draw(torch.arange(256)))  # initialises normflows' layers that depend on data
    probe = copy.deepcopy(model)
    probe.initialize(*draw(torch.arange(256)))
    steps = paced(probe, lambda: -probe.log_prob(*draw(torch.arange(BATCH))).mean(), minutes)
    batches, began = steps // PORTIONS, time.process_time()
    fit = pf.fit_density(
        model,
        Portion(batches, draw, len(x)),
        training=Training(validation=images.judge[0] if parts == 1 else images.judge),
        max_epochs=PORTIONS,
        lr=LR,
    )
    seconds = time.process_time() - began
    with torch.no_grad():
        test, tight = (
            torch.cat([model.log_prob(*rows, num_samples=number) for rows in batched(images.test[:parts], size, most)])
            for number, size, most in ((1, 500, 10_000), (DRAWS, 50, FEW))
        )
        columns = 10 if run.by_class else 8
        began = time.process_time()
        draws = model(torch.arange(10).repeat(8)).sample() if run.by_class else model().sample((64,))
        sampling = (time.process_time() - began) * 64 / len(draws)
    pf.save_images(draws, out / file_name(*run.label), columns=columns, levels=images.levels)
    bits, tighter = (pf.bits_per_dim(found.double(), images.shape) for found in (test, tight))
    return {
        "score": f"{bits.mean():.4f}",
        "error": f"{2 * bits.std() / len(bits) ** 0.5:.4f}",
        "tight": f"{tighter.mean():.4f}",
        "parameters": str(sum(p.numel() for p in model.parameters())),
        "steps": str(fit.steps),
        "seconds": f"{seconds:.0f}",
        "sampling": f"{sampling:.2f}",
    }


def batched(parts: tuple[Tensor, ...], size: int, most: int) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(part[:most].split(size) for part in parts), strict=True)


def logits(rows: Tensor) -> Tensor:
    """Return MNIST's images in the logit space of the MAF paper, with fresh noise, ``(N, 784)``."""
    share = (rows.flatten(1) + torch.rand(len(rows), 784)) / 256
    return torch.logit(ALPHA + (1 - 2 * ALPHA) * share)


LOGIT: dict[str, Callable[[], Flow]] = {
    "MAF (5)": lambda: flows.maf(784, num_transforms=5, hidden_dims=(512, 512)),
    "RealNVP (5)": lambda: flows.realnvp(784, num_transforms=5, hidden_dims=(512, 512)),
}


def fitted_logits(name: str, minutes: float) -> Row:
    """Train one flow over vectors of logits, and score it in nats."""
    torch.manual_seed(0)
    images, flow = data("mnist"), LOGIT[name]()
    x = images.train[0]
    probe = copy.deepcopy(flow)
    steps = paced(probe, lambda: -probe.log_prob(logits(x[:BATCH])).mean(), minutes)
    began = time.process_time()
    fit = pf.fit_density(
        flow,
        Portion(steps // PORTIONS, lambda rows: (logits(x[rows]),), len(x)),
        training=Training(validation=logits(images.judge[0]), heavy_tails=False, gradients=Gradients(clip_norm=50.0)),
        max_epochs=PORTIONS,
        lr=1e-3,
    )
    seconds = time.process_time() - began
    with torch.no_grad():
        nats = torch.cat([flow.log_prob(logits(rows)) for rows in images.test[0].split(500)]).double()
        began = time.process_time()
        flow().sample((64,))
        sampling = time.process_time() - began
    return {
        "score": f"{nats.mean():.1f}",
        "error": f"{2 * nats.std() / len(nats) ** 0.5:.1f}",
        "parameters": str(sum(p.numel() for p in flow.parameters())),
        "steps": str(fit.steps),
        "seconds": f"{seconds:.0f}",
        "sampling": f"{sampling:.2f}",
    }


def autoencoded(minutes: float, out: Path) -> Row:
    """Train and score a variational autoencoder of the digits with 16 latents, whose decoder is a Glow."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    images, latents = data("digits"), 16
    x, test = images.train[0], images.test[0]
    decoder = Dequantized(flows.glow(images.shape, latents, num_steps=4, hidden_dim=32), levels=images.levels)
    decoder.initialize(x, torch.zeros(len(x), latents))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("image", len(x), subsample_size=min(len(x), BATCH)) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
            pyro.sample("x", decoder(z), obs=x[rows])

    guide = pf.AutoPlateFlow(model, "image", encoder=ConvEncoder(images.shape, 64))
    guide.setup(x)
    began = time.process_time()
    pf.fit_svi(model, guide, x, steps=50, num_particles=1, progress=False)
    steps = round(60 * minutes * 50 / (time.process_time() - began))
    began = time.process_time()
    fit = pf.fit_svi(model, guide, x, steps=steps, num_particles=1)
    seconds = time.process_time() - began
    with torch.no_grad():
        found = [pf.importance_log_likelihood(model, guide, rows, num_samples=DRAWS) for rows in test.split(BATCH)]
        bits = pf.bits_per_dim(torch.cat(found).double(), images.shape)
        pf.save_images(decoder(torch.randn(64, latents)).sample(), out / file_name(*VAE), levels=images.levels)
    parts = [*decoder.parameters(), *guide.parameters()]
    return {
        "tight": f"{bits.mean():.4f}",
        "error": f"{2 * bits.std() / len(bits) ** 0.5:.4f}",
        "parameters": str(sum(p.numel() for p in parts)),
        "steps": str(fit.steps),
        "seconds": f"{seconds:.0f}",
    }


# ------------------------------------------------------------ costs


def in_turns(tasks: dict[str, Callable[[], object]], repetitions: int = 15) -> dict[str, float]:
    """Return the median seconds of each task.  Tasks alternate, so a drift of the machine's speed affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repetitions + 3):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[3:]) for name, found in times.items()}


def peak(queue: multiprocessing.Queue, steps: int, recompute: bool) -> None:
    """Put the peak memory of a training step of a Glow into the queue, in MiB, without model and images."""
    torch.set_num_threads(1)
    flow, x = (
        flows.glow((1, 28, 28), num_steps=steps, hidden_dim=HIDDEN, recompute=recompute),
        torch.randn(8, 1, 28, 28),
    )
    flow.log_prob(x).mean().backward()  # loads libraries and allocates gradients
    x = torch.randn(LARGE, 1, 28, 28)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    flow.log_prob(x).mean().backward()  # the large batch, so that the peak is higher than all earlier peaks
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before)


def peak_of(steps: int, recompute: bool) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak, args=(queue, steps, recompute))
    process.start()
    found = queue.get(timeout=600)
    process.join()
    return found


def costs(shape: Shape = (1, 28, 28)) -> list[Row]:
    """Return the times of both Glows and of TarFlow, and memory, as rows of the table of costs."""
    torch.manual_seed(0)
    rows: list[Row] = []
    x = torch.randn(BATCH, *shape)
    ours, theirs, tar = glow(shape), normflows(shape), flows.tarflow(shape)

    def step(flow: Flow) -> None:
        flow.zero_grad()
        (-flow.log_prob(x).mean()).backward()

    @torch.no_grad()
    def draw(flow: Flow, number: int = BATCH) -> Tensor:
        return flow().sample((number,))

    @torch.no_grad()
    def score(flow: Flow, x: Tensor) -> Tensor:
        return flow.log_prob(x)

    ours.initialize(x)
    step(theirs)
    for what, task in (("training step", step), ("samples", draw)):
        found = in_turns({"ours": lambda task=task: task(ours), "theirs": lambda task=task: task(theirs)})
        rows.append({"what": f"Glow, {what}", **{name: f"{1e3 * value:.1f}" for name, value in found.items()}})
    for number in (BATCH, 4 * BATCH):
        more = x.repeat(number // BATCH, 1, 1, 1)
        tasks = {
            "samples": lambda number=number: draw(tar, number),
            "one pass of all layers": lambda more=more: score(tar, more),
        }
        found = in_turns(tasks)
        rows += [{"what": f"TarFlow, {n}, {number} images", "ours": f"{1e3 * value:.1f}"} for n, value in found.items()]
    for steps in (4, 8, 16):
        kept, again = peak_of(steps, False), peak_of(steps, True)
        rows.append({"what": f"memory, {steps} steps per scale", "kept": f"{kept:.0f}", "again": f"{again:.0f}"})
    return rows


def label_of(row: Row) -> Label:
    return row["part"], row["model"], row["dequantisation"]


def alone() -> None:
    """Limit the process of a fit to one core."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["mnist", "digits", "logit", "costs"]
    models = sorted({run.label[1] for run in RUNS} | {VAE[1], *LOGIT})
    parser.add_argument("--only", nargs="+", default=parts, choices=parts)
    parser.add_argument("--models", nargs="+", choices=models, metavar="MODEL", help=f"some of {models}; skips costs")
    parser.add_argument("--minutes", type=float, help="minutes per fit; needs --out")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="parallel fits; default: one per core")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the files")
    options = parser.parse_args()
    if options.minutes and options.out == OUT:
        parser.error("--minutes needs --out, so that its figures do not replace the results")
    options.out.mkdir(parents=True, exist_ok=True)
    minutes = {part: options.minutes or number for part, number in MINUTES.items()}
    rows = read(options.out / "images.csv")
    jobs: dict[Label, Callable[[], Row]] = {
        run.label: functools.partial(fitted, run, minutes[run.part], options.out) for run in RUNS
    }
    jobs[VAE] = functools.partial(autoencoded, minutes["digits"], options.out)
    jobs |= {("logit", name, "uniform"): functools.partial(fitted_logits, name, minutes["logit"]) for name in LOGIT}
    places = {label: place for place, label in enumerate(jobs)}
    done = set(map(label_of, rows))
    todo = {
        label: job
        for label, job in jobs.items()
        if label not in done and label[0] in options.only and label[1] in (options.models or models)
    }
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), alone) as pool:
        fits = {pool.submit(job): label for label, job in todo.items()}
        for fit in as_completed(fits):
            try:
                rows.append(dict.fromkeys(FIELDS, "") | dict(zip(FIELDS, fits[fit], strict=False)) | fit.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            rows.sort(key=lambda row: places.get(label_of(row), len(places)))
            save(rows, MINUTES, options.out)
    if "costs" in options.only and not options.models:
        pyro.enable_validation(False)
        rows = [row for row in rows if row["part"] != "costs"]
        rows += [dict.fromkeys(FIELDS, "") | {"part": "costs"} | row for row in costs()]
        save(rows, MINUTES, options.out)


if __name__ == "__main__":
    main()
