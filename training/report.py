"""A run as one page: `report.html`, plain HTML and SVG, no script, nothing from the network.

It shows the files in the folder of the run: curves of metrics.jsonl and timing.jsonl, the images,
the config. It can be written again at any time, from any machine that can read the folder.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from smalti.files import read_lines, write_text
from smalti.training.folder import METRICS, RECIPE, REPORT, TIMING

IMAGE_FOLDERS = ("samples", "reconstructions")
MAX_IMAGES = 8  # of each folder, at equal distances over the run
MAX_POINTS = 400  # of a curve
WIDTH, HEIGHT = 360, 160  # of a chart, in pixels
LEFT, BOTTOM, TOP = 84, 24, 10  # room for the axes; the longest label is -1.234e-05
COLOURS = ("#2563eb", "#d97706")  # of training, of validation

# The order of the charts: the loss, with that of validation in the same plot; then what was
# measured on held-out data; then the rest; last, what is looked at only if something is wrong.
LAST = ("gradient_norm", "discriminator_gradient_norm", "learning_rate", "skipped_steps")
VALIDATION = "val_"

Curve = list[tuple[int, float]]  # (step, value)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1160px; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff; }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top; }
figcaption { font-weight: 600; }
svg text { font-size: 11px; fill: #666; }
img { max-width: 100%; image-rendering: pixelated; }
table { border-collapse: collapse; } td { padding: 0 1.5em 0 0; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; }
""".strip()


def write_report(folder: Path) -> Path:
    """Write the page about the run in a folder, and return its path."""
    recipe = folder / RECIPE
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(folder.name)}</title>',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{escape(folder.name)}</h1>",
        *charts(folder),
        *(_gallery(folder, name) for name in IMAGE_FOLDERS),
        "<h2>Config</h2>",
        f"<pre>{escape(recipe.read_text(encoding='utf-8') if recipe.is_file() else '')}</pre>",
        "</body></html>",
    ]
    write_text(folder / REPORT, "\n".join(part for part in parts if part) + "\n")
    return folder / REPORT


def charts(folder: Path) -> list[str]:
    """The last values of a run as an HTML table, then its curves as SVG."""
    metrics, timing = (_lines(folder / name) for name in (METRICS, TIMING))
    drawn = _charts(curves(metrics), curves(timing))
    return [_summary(metrics, timing), "<h2>Curves</h2>", *drawn]


def curves(lines: list[dict[str, Any]]) -> dict[str, Curve]:
    """Name of each logged value -> its finite points (step, value)."""
    found: dict[str, Curve] = {}
    for line in lines:
        for name, value in line.items():
            finite = isinstance(value, int | float) and math.isfinite(value)
            if name != "step" and finite:
                found.setdefault(name, []).append((line["step"], float(value)))
    return found


def thinned(points: Curve) -> Curve:
    """At most `MAX_POINTS` points: means over equal intervals, and the last point unchanged."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS - 1))
    groups = [points[start : start + size] for start in range(0, len(points) - 1, size)]
    means = [(g[len(g) // 2][0], sum(value for _, value in g) / len(g)) for g in groups]
    return [*means, points[-1]]


def _charts(metrics: dict[str, Curve], timing: dict[str, Curve]) -> list[str]:
    """The charts of a run, the important ones first."""

    def place(name: str) -> int:
        first = (name == "loss", name.startswith(VALIDATION), name not in LAST)
        return next((number for number, holds in enumerate(first) if holds), len(first))

    pairs = {name for name in metrics if VALIDATION + name in metrics}
    names = [n for n in sorted(metrics, key=place) if n.removeprefix(VALIDATION) not in pairs - {n}]
    shown = [chart(n, metrics[n], metrics[VALIDATION + n] if n in pairs else ()) for n in names]
    return [*shown, *(chart(name, curve) for name, curve in timing.items())]


def chart(name: str, points: Curve, validation: Sequence[tuple[int, float]] = ()) -> str:
    """A curve as SVG, with the limits of its axes and its last value.

    Args:
        validation: the same value on held-out data, as a second curve.
    """
    lines = [thinned(points), *([thinned(list(validation))] if validation else [])]
    steps = [step for line in lines for step, _ in line]
    values = [value for line in lines for _, value in line]
    first, last, low, high = min(steps), max(steps), min(values), max(values)

    def place(step: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - 8) * (step - first) / max(1, last - first)
        height = (value - low) / (high - low) if high > low else 0.5
        return f"{x:.1f},{HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * height:.1f}"

    drawn = ""
    for line, colour in zip(lines, COLOURS, strict=False):
        x, y = place(*line[-1]).split(",")
        path = " ".join(place(*point) for point in line)
        drawn += (
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>'
        )
    caption = f"{escape(name)}: {points[-1][1]:.4g}"
    if validation:
        note = f"validation: {validation[-1][1]:.4g}"
        caption += f' <span style="color: {COLOURS[1]}">{note}</span>'
    bottom, right = HEIGHT - BOTTOM, WIDTH - 8
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(name)}">'
        f'<path d="M{LEFT},{TOP}V{bottom}H{right}" fill="none" stroke="#ccc"/>'
        f"{drawn}"
        f'<text x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{high:.4g}</text>'
        f'<text x="{LEFT - 6}" y="{bottom}" text-anchor="end">{low:.4g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">step {first}</text>'
        f'<text x="{right}" y="{HEIGHT - 6}" text-anchor="end">{last}</text></svg></figure>'
    )


def _summary(metrics: list[dict[str, Any]], timing: list[dict[str, Any]]) -> str:
    rows = [("steps", str(max((line["step"] for line in metrics), default=0)))]
    last = timing[-1] if timing else {}
    if "images_per_second" in last:
        rows.append(("images per second", f"{last['images_per_second']:,.1f}"))
    if "model_flops_per_second" in last:
        rows.append(("model TFLOP per second", f"{last['model_flops_per_second'] / 1e12:,.3f}"))
    if "model_flops_utilisation" in last:
        rows.append(("model FLOPs utilisation", f"{last['model_flops_utilisation']:.1%}"))
    cells = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _gallery(folder: Path, name: str) -> str:
    """The images in a folder of the run, linked by relative paths, the newest first."""
    files = sorted((folder / name).glob("*.png"), reverse=True)
    if not files:
        return ""
    stride = math.ceil(len(files) / MAX_IMAGES)
    figures = [
        f"<figure><figcaption>{escape(file.stem)}</figcaption>"
        f'<img src="{quote(name)}/{quote(file.name)}" alt="{escape(file.stem)}"></figure>'
        for file in files[::stride]
    ]
    return f"<h2>{name.capitalize()}</h2>\n" + "\n".join(figures)


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_lines(path) if path.is_file() else []
