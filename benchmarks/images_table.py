"""The results of ``benchmarks/images.py`` as a table."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from posteriors import write, write_csv

FIELDS = (
    *("part", "model", "dequantisation", "score", "error", "tight", "parameters", "steps", "seconds", "sampling"),
    *("what", "ours", "theirs", "kept", "again"),
)
PARTS = {
    "mnist": (
        "MNIST, 256 levels",
        "Bits per dimension of the 10,000 test images, from above, with one draw of the noise, and with 16 of the "
        "first 1,000. Both Glows: 2 scales, 8 steps each, networks of width 64. Published, with far larger models and "
        "longer training: RealNVP 1.06, Glow 1.05, FFJORD .99 (arXiv:1810.01367).",
    ),
    "digits": (
        "Digits of 8 × 8 pixels, 17 levels",
        "Some 1,260 images to train on, 360 to test. The autoencoder's figure is that of 16 draws of its latents.",
    ),
    "logit": (
        "MNIST in logit space",
        "Mean log-density of the 10,000 test images in nats, after training with fresh noise in each batch. Published, "
        "with fixed noise (arXiv:1705.07057): Gaussian -1366.9, RealNVP (5) -1323.2, MAF (5) -1300.5.",
    ),
}

Row = dict[str, str]


def file_name(part: str, model: str, dequantisation: str) -> str:
    """That of a grid of samples."""
    words = [part, model, *(["variational"] if dequantisation == "variational" else [])]
    return f"images_{'_'.join(words)}.png".replace(",", "").replace(" ", "-").replace("+", "p")


def save(rows: list[Row], minutes: dict[str, float], out: Path) -> None:
    """Write the rows as CSV and as Markdown."""
    write_csv(rows, FIELDS, out / "images.csv")
    write(table(rows, minutes), out / "images.md")


def table(rows: list[Row], minutes: dict[str, float]) -> str:
    """The results as Markdown."""
    lines = [
        "# Images",
        "",
        f"All models of a part are trained for about the same time of one core of a CPU ({platform.machine()}, torch "
        f"{torch.__version__}), as far as it is known beforehand, by `fit_density`: Adam in batches of 64, a step "
        "size that falls as a cosine, averaged weights. Errors are 2 standard errors over test images. Seconds are "
        "those of the core that a fit took; sampling: those for 64 images. Reproduce with "
        "`python benchmarks/images.py`.",
        "",
    ]
    for part, (title, words) in PARTS.items():
        if own := [row for row in rows if row["part"] == part]:
            lines += [f"## {title}, some {minutes[part]:g} min of a core each", "", words, "", *scores(own), ""]
            if part != "logit":
                lines += [line for row in own for line in picture(row)]
    if own := [row for row in rows if row["part"] == "costs"]:
        lines += costs(own)
    return "\n".join(lines)


def scores(rows: list[Row]) -> list[str]:
    in_nats = rows[0]["part"] == "logit"
    columns = ["nats"] if in_nats else ["dequantisation", "bits/dim", "16 draws"]
    columns = ["model", *columns, "parameters", "steps", "seconds", "sampling"]
    lines = [
        "| " + " | ".join(columns) + " |",
        "|---" * (1 if in_nats else 2) + "|---:" * (len(columns) - 1 - (not in_nats)) + "|",
    ]
    for r in rows:
        score = f"{r['score']} ± {r['error']}" if r["score"] else ""
        tight = r["tight"] if r["score"] else f"{r['tight']} ± {r['error']}"
        own = [score] if in_nats else [r["dequantisation"], score, tight]
        cells = [r["model"], *own, f"{int(r['parameters']):,}", r["steps"], r["seconds"], r["sampling"]]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def picture(row: Row) -> list[str]:
    name = file_name(row["part"], row["model"], row["dequantisation"])
    return [f"{row['model']}, {row['dequantisation']} dequantisation:", "", f"![Samples]({name})", ""]


def costs(rows: list[Row]) -> list[str]:
    lines = [
        "## Costs",
        "",
        f"Milliseconds for a batch of 64 images of 28 × 28 pixels on {os.cpu_count()} cores, if no other number is "
        "named, taking turns; both Glows with 2 scales, 8 steps each and networks of width 64.",
        "",
        "| | pyro_flows | normflows | ratio |",
        "|---|---:|---:|---:|",
    ]
    for r in (r for r in rows if r["ours"]):
        ratio = f"{float(r['ours']) / float(r['theirs']):.2f}" if r["theirs"] else ""
        lines.append(f"| {r['what']} | {r['ours']} | {r['theirs']} | {ratio} |")
    return [
        *lines,
        "",
        "MiB that a training step of a Glow with 1,024 images takes at its peak, with activations kept for the "
        "gradient and with `recompute=True`.",
        "",
        "| | kept | computed again |",
        "|---|---:|---:|",
        *(f"| {r['what']} | {r['kept']} | {r['again']} |" for r in rows if r["kept"]),
        "",
    ]
