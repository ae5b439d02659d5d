"""Results of ``images.py``: the CSV file and the page."""

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
        "*bits/dim*: upper bounds on the bits per dimension of the 10,000 test images, with one draw of the noise. "
        "*16 draws*: the same for the first 1,000 images with 16 draws. Both Glows have 2 scales of 8 steps, and "
        "networks of width 64. Published values for far larger models and longer training are: RealNVP 1.06, Glow "
        "1.05, FFJORD 0.99 (arXiv:1810.01367).",
    ),
    "digits": (
        "Digits of 8 × 8 pixels, 17 levels",
        "About 1,260 training images and 360 test images. The autoencoder's score uses 16 draws of its latents.",
    ),
    "logit": (
        "MNIST in logit space",
        "*nats*: the mean log-density of the 10,000 test images. Training uses fresh noise in each batch. Published "
        "values with fixed noise are: Gaussian -1366.9, RealNVP (5) -1323.2, MAF (5) -1300.5 (arXiv:1705.07057).",
    ),
}

Row = dict[str, str]


def file_name(part: str, model: str, dequantisation: str) -> str:
    """Return the name of the file with a grid of samples."""
    words = [part, model, *(["variational"] if dequantisation == "variational" else [])]
    return f"images_{'_'.join(words)}.png".replace(",", "").replace(" ", "-").replace("+", "p")


def save(rows: list[Row], minutes: dict[str, float], out: Path) -> None:
    """Write the rows as CSV and as Markdown."""
    write_csv(rows, FIELDS, out / "images.csv")
    write(table(rows, minutes), out / "images.md")


def table(rows: list[Row], minutes: dict[str, float]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Images",
        "",
        "This page is for users who model images. It compares our image flows and normflows' Glow after equal training "
        f"times. {summary(rows)} Reproduce with `python benchmarks/images.py`.",
        "",
        f"All models of a part train for about the same time on one CPU core ({platform.machine()}, torch "
        f"{torch.__version__}), by `fit_density`: Adam in batches of 64, a cosine schedule of step sizes, and averaged "
        "weights. Errors are 2 standard errors over test images. *seconds*: CPU time of the fit. *sampling*: seconds "
        "for 64 images.",
        "",
    ]
    for part, (title, words) in PARTS.items():
        if own := [row for row in rows if row["part"] == part]:
            lines += [f"## {title}, about {minutes[part]:g} minutes per fit", "", words, "", *scores(own), ""]
            if part != "logit":
                lines += ["Samples of each model follow. Look for complete strokes and legible digits.", ""]
                lines += [line for row in own for line in picture(row)]
    if own := [row for row in rows if row["part"] == "costs"]:
        lines += costs(own)
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Return the main results for MNIST."""
    found = {(r["model"], r["dequantisation"]): float(r["score"]) for r in rows if r["part"] == "mnist"}
    if not found:
        return "MNIST has not been run."
    best = min(found, key=lambda label: found[label])
    text = f"The best score on MNIST is {found[best]:.2f} bits per dimension ({best[0]}, {best[1]} dequantisation)."
    glows = [found.get((model, "uniform")) for model in ("Glow", "Glow of normflows")]
    return (
        text
        if None in glows
        else (
            f"{text} With uniform dequantisation, our Glow has {glows[0]:.2f}, and normflows' Glow has {glows[1]:.2f}."
        )
    )


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
        f"Milliseconds on {os.cpu_count()} cores for a batch of 64 images of 28 × 28 pixels, unless the row has "
        "another number. Tasks alternate. Both Glows have 2 scales of 8 steps, and networks of width 64.",
        "",
        "| task | pyro_flows, ms | normflows, ms | ratio |",
        "|---|---:|---:|---:|",
    ]
    for r in (r for r in rows if r["ours"]):
        ratio = f"{float(r['ours']) / float(r['theirs']):.2f}" if r["theirs"] else ""
        lines.append(f"| {r['what']} | {r['ours']} | {r['theirs']} | {ratio} |")
    return [
        *lines,
        "",
        "Peak memory of a training step of a Glow with 1,024 images. Activations are kept for the gradient, or "
        "computed again with `recompute=True`.",
        "",
        "| task | kept, MiB | computed again, MiB |",
        "|---|---:|---:|",
        *(f"| {r['what']} | {r['kept']} | {r['again']} |" for r in rows if r["kept"]),
        "",
    ]
