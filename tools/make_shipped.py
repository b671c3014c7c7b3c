"""Make a pipeline that ships with smalti from nothing: train both stages, find the sampling
options, measure the result, pack it.

    python tools/make_shipped.py fashion-next-token

trains by scripts/configs/fashion_next_token_tokenizer.yaml and fashion_next_token_prior.yaml in
runs/shipped/fashion-next-token/, and writes the pipeline in half precision, with a model card of
this run, into pipelines/shipped/fashion-next-token/. After an interruption, the same command
continues. `--stages pack` writes the card again, as after a change of `look` below.
"""

import argparse
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from smalti.cli import main as smalti
from smalti.files import read_hashed_json, read_lines
from smalti.pipelines.card import image_words
from smalti.pipelines.pipeline import Pipeline
from smalti.repository import OWNER, SHIPPED

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "scripts" / "configs"
SHIPPED_FOLDER = ROOT / "pipelines" / SHIPPED
SUMMARY = "summary.json"  # every metric with its protocol
CURVES = "curves.png"
STAGES = ("tokenizer", "latents", "prior", "sweep", "measure", "pack")

# What a card says that no file of a run does.
PICTURES = {
    "fashion": "The first 10,000 training pictures of Fashion-MNIST (28 px, grey, enlarged to 32); "
    "the first 2,000 test pictures are held out. © 2017 Zalando SE, MIT licence",
    "emoji": "5,083 of the 5,664 pictures of the embedded set (Noto Emoji, Apache-2.0; Twemoji, "
    "CC-BY-4.0, © Twitter, Inc. and other contributors; Fluent Emoji, MIT); 581 are held out",
}
WEIGHTS_LICENCE = "The weights are Apache-2.0, as smalti's code."
# The bar of a pipeline that ships: name of the metric, what it is divided by, limit, in words.
BAR = (
    ("classifier_accuracy_samples", "classifier_accuracy_heldout", ">=", 0.9,
     "classifier on samples / on held-out pictures"),
    ("fd_alexnet", "fd_alexnet_heldout", "<=", 2.5,
     "Frechet distance (AlexNet), samples / held-out pictures"),
    ("share_of_near_copies", None, "<=", 0.005, "near copies of training pictures"),
)  # fmt: skip


@dataclass(frozen=True)
class Shipped:
    """What is not in the recipes of a pipeline."""

    data: str
    views: str  # of smalti encode
    sweep: tuple[object, ...]  # sampling options among which smalti sweep finds the best
    look: str  # what a person saw in samples.png


FASHION = ("--guidance_scale", 1.25, 1.75, 2.5, "--temperature", 0.95)
CODES = ("--guidance_scale", 1.5, 2, 2.5, "--temperature", 0.9, 1)
FLOW = ("--guidance_scale", 1, 1.5, 2, "--num_inference_steps", 12)
PIPELINES = {
    "fashion-next-token": Shipped(
        "fashion",
        "identity",
        FASHION,
        "trousers, sneakers and ankle boots look right in nearly every sample. Sandals do not: "
        "their straps dissolve in most samples. Some dresses, bags and patterned shirts and "
        "pullovers have torn edges or blotches.",
    ),
    "fashion-next-scale": Shipped(
        "fashion",
        "identity",
        FASHION,
        "trousers, sneakers, ankle boots, and most shirts, coats and bags look right. Sandals do "
        "not: their straps dissolve. Some dresses and dark or patterned T-shirts have torn edges "
        "or blotches.",
    ),
    "emoji-next-token": Shipped(
        "emoji",
        "flip",
        ("--guidance_scale", 1.75, 2.5, "--temperature", 0.95),  # below, a bar is missed
        "faces, symbols and flags look like emoji in most samples, people in about half. Animals, "
        "food, travel, activities and objects have plausible colours and outlines, but few can be "
        "named: their details are smeared.",
    ),
    "emoji-next-scale": Shipped("emoji", "flip", CODES, ""),
    "emoji-flow": Shipped("emoji", "flip", FLOW, ""),
}


def recipe(name: str, stage: str) -> Path:
    """The recipe of a stage."""
    return RECIPES / f"{name.replace('-', '_')}_{stage}.yaml"


def run(command: str, *options: object) -> None:
    """A command of smalti; an error ends this program."""
    print(f"smalti {command} {' '.join(map(str, options))}", flush=True)
    status = smalti([command, *map(str, options)])
    if status:
        raise SystemExit(status)


def train(name: str, folder: Path, stages: list[str]) -> None:
    """The stages before the last, each continued where it stopped."""
    shipped, resumed = PIPELINES[name], ("--resume_from_checkpoint", "latest")
    tokenizer, latents = folder / "tokenizer" / "tokenizer", folder / "latents"
    if "tokenizer" in stages:
        where = ("--output_dir", folder / "tokenizer")
        run("train-tokenizer", "--config", recipe(name, "tokenizer"), *where, *resumed)
    if "latents" in stages:
        where = ("--tokenizer", tokenizer, "--output_dir", latents)
        run("encode", *where, "--data", shipped.data, "--views", shipped.views)
    if "prior" in stages:
        where = ("--output_dir", folder / "prior", "--latents", latents, "--tokenizer", tokenizer)
        run("train-prior", "--config", recipe(name, "prior"), *where, *resumed)
    if "sweep" in stages:  # saves the best options with the pipeline
        where = ("--model", folder / "prior" / "pipeline", "--output_dir", folder / "sweep")
        run("sweep", *where, "--data", shipped.data, *shipped.sweep)


# -------------------------------------------------------------------------------------------------
# Half precision, the measurements and the card


def measure(name: str, folder: Path) -> None:
    """Round the pipeline to half precision, and measure what is left."""
    pipeline = Pipeline.from_pretrained(folder / "prior" / "pipeline", dtype=torch.float16)
    half = pipeline.save_pretrained(folder / "half")
    options = ("--num_samples", 2000, "--data", PIPELINES[name].data)
    run("evaluate", "--model", half, "--output_dir", folder / "evaluation", *options)


def pack(name: str, folder: Path, out: Path) -> None:
    """Save what was measured, with its card."""
    pipeline = Pipeline.from_pretrained(folder / "half", dtype="auto")
    samples = Image.open(folder / "evaluation" / "samples.png").quantize(256)  # a third of the size
    pipeline.save_pretrained(out, samples=samples, notes=notes(name, folder))
    card = out / "README.md"
    card.write_text(card.read_text().replace("PATH OR HUB ID", f"{OWNER}/{name}"))
    draw_curves(folder, out / CURVES)
    shutil.copyfile(folder / "evaluation" / "summary.json", out / SUMMARY)
    pictures = folder / "tokenizer" / "tokenizer" / "pictures.json"
    shutil.copyfile(pictures, out / "tokenizer" / pictures.name)
    print(f"{out}; its row of docs/pretrained.md:\n{row(name, out)}")


def megabytes(folder: Path) -> float:
    """The size of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def row(name: str, folder: Path) -> str:
    """The row about a packed pipeline in the table of docs/pretrained.md."""
    pipeline = Pipeline.from_pretrained(folder)
    parts = (pipeline.tokenizer, pipeline.prior)
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
    summary = read_hashed_json(folder / SUMMARY)
    accuracy, distance, copies = (value for _, value, _, _ in measured(summary))
    cells = (
        f"`{OWNER}/{name}`",
        f"{PIPELINES[name].data}, {image_words(pipeline.tokenizer, 'px')}",
        pipeline.tokenizer.spec.in_words,
        f"{sizes[0]:.1f} + {sizes[1]:.1f} M",
        f"{accuracy:.2f}",
        f"{distance:.2f}",
        f"{copies:.2%}",
        f"{megabytes(folder):.1f}",
    )
    return f"| {' | '.join(cells)} |"


def seconds_of(run: Path) -> float:
    """The seconds that the steps of a run took."""
    lines = [line for line in read_lines(run / "timing.jsonl") if "seconds_per_step" in line]
    steps = [0, *(line["step"] for line in lines)]
    return sum(
        line["seconds_per_step"] * max(0, line["step"] - before)
        for line, before in zip(lines, steps, strict=False)
    )


def hardware() -> str:
    """The processor of this machine, and the threads that torch uses."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{(names or [model])[0]}, {threads} thread{'s' if threads > 1 else ''}"


def draw_curves(folder: Path, path: Path) -> None:
    """PSNR of held-out pictures over the tokenizer's steps, and the losses of the prior."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, run, names in (
        (left, "tokenizer", ("val_psnr",)),
        (right, "prior", ("loss", "val_loss")),
    ):
        lines = read_lines(folder / run / "metrics.jsonl")
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True), marker="." if "val" in name else "", label=name)
        axes.set_xlabel(f"step of the {run}")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=90)


def measured(summary: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """The bar: what is measured, in words, its value, the limit, and whether it is met."""
    metrics = {name: metric["value"] for name, metric in summary["metrics"].items()}
    found = []
    for name, reference, sign, limit, words in BAR:
        value = metrics[name] / (metrics[reference] if reference else 1)
        found.append((words, value, limit, value >= limit if sign == ">=" else value <= limit))
    return found


def notes(name: str, folder: Path) -> str:
    """The part of the card about this run."""
    summary = read_hashed_json(folder / "evaluation" / "summary.json")
    shipped = PIPELINES[name]
    recipes = [recipe(name, stage).relative_to(ROOT) for stage in ("tokenizer", "prior")]
    minutes = [seconds_of(folder / stage) / 60 for stage in ("tokenizer", "prior")]
    bar = [
        f"| {words} | {value:.3f} | {limit} | {'yes' if met else '**no**'} |"
        for words, value, limit, met in measured(summary)
    ]
    rows = [f"| `{key}` | {metric['value']:.4f} |" for key, metric in summary["metrics"].items()]
    steps = f"{minutes[0]:.0f} minutes of the tokenizer and {minutes[1]:.0f} of the prior"
    found = " ".join(map(str, shipped.sweep))
    return "\n".join(
        [
            "## Training",
            "",
            f"Pictures: {PICTURES[shipped.data]} (`data/assets/README.md`). {WEIGHTS_LICENCE}",
            "",
            f"Recipes: `{recipes[0]}` and `{recipes[1]}`. Trained on {hardware()}, in {steps}. "
            f"Sampling defaults: the best of `smalti sweep {found}` by the Frechet distance. "
            "From nothing, in a clone of the repository:",
            "",
            f"```bash\npython tools/make_shipped.py {name}\n```",
            "",
            f"![curves]({CURVES})",
            "",
            "## Measurements",
            "",
            "| the bar of pipelines that ship | measured | limit | met |",
            "| --- | --- | --- | --- |",
            *bar,
            "",
            f"By eye: {shipped.look}" if shipped.look else "",
            "",
            "A near copy is a sample within 2 grey levels of the reconstruction of a training "
            f"picture or of its mirror image. Every metric ([`{SUMMARY}`]({SUMMARY}) has the "
            "protocol of each):",
            "",
            "| metric | value |",
            "| --- | --- |",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PIPELINES)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/shipped"), help="of the runs")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    options = parser.parse_args()
    folder = options.output_dir / options.name
    train(options.name, folder, options.stages)
    if "measure" in options.stages:
        measure(options.name, folder)
    if "pack" in options.stages:
        pack(options.name, folder, SHIPPED_FOLDER / options.name)


if __name__ == "__main__":
    main()
