"""Quality and speed of every precision of trained pipelines, in one table.

    python benchmarks/precision.py --models runs/priors/gpt-nano/pipeline --data emoji

The Frechet distance to the training pictures in features of AlexNet, with its mean over the seeds
and their standard deviation, and the time per picture are those of `smalti sweep --dtype`. The last
columns compare samples of the same seeds with those of fp32: the PSNR of the pictures, and the
share of pictures whose codes are all equal. A code that rounding changes leads sampling another
way, to another picture, not a worse one.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch

from smalti.errors import ConfigurationError
from smalti.pipelines.conditions import arguments_for
from smalti.pipelines.generation import picture_generator
from smalti.pipelines.output import PipelineOutput
from smalti.pipelines.pipeline import Pipeline
from smalti.scripts.options import Precision
from smalti.scripts.pages import markdown
from smalti.scripts.sweep import SweepConfig, sweep

COMPARED = 32  # pictures that are compared one by one


def precisions_of(model: str) -> list[Precision]:
    """What the models of a pipeline can have; float16 is very slow on a CPU."""
    found = []
    for name in get_args(Precision):
        try:
            Pipeline.from_pretrained(model, dtype=name)
        except ConfigurationError:
            continue
        if name != "float16" or torch.cuda.is_available():
            found.append(name)
    return found


def sampled(pipeline: Pipeline) -> PipelineOutput:
    """The same pictures in every precision."""
    labels = torch.arange(COMPARED) % max(1, len(pipeline.classes))
    generator = [picture_generator(0, i) for i in range(COMPARED)]
    given = arguments_for(pipeline.classes, labels, ())
    return pipeline(**given, generator=generator, output_type="pt")


def rows_of(model: str, args: argparse.Namespace) -> list[dict[str, str]]:
    """A row of the table for each precision of a pipeline."""
    names = precisions_of(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        config = SweepConfig(
            model=model,
            data=args.data,
            dtype=tuple(names),
            seeds=args.seeds,
            num_samples=args.num_samples,
            save_best=False,
            other_data=True,
            output_dir=Path(folder),
        )
        results = sweep(config)
    exact = sampled(Pipeline.from_pretrained(model, device=device))
    rows, base = [], seconds_of(results, "float32")
    for name in names:
        values = [r["value"] for r in results if r["options"]["dtype"] == name]
        spread = statistics.stdev(values)
        output = sampled(Pipeline.from_pretrained(model, device=device, dtype=name))
        error = (output.images - exact.images).square().mean().item()
        psnr = -10 * torch.log10(torch.tensor(error)).item() if error else float("inf")
        equal = (output.latents == exact.latents).flatten(1).all(1).float().mean().item()
        rows.append(
            {
                "pipeline": Path(model).parent.name,
                "precision": name,
                "Frechet distance": f"{statistics.mean(values):.1f} ± {spread:.1f}",
                "time": f"{seconds_of(results, name) / base:.2f}",
                "PSNR to float32": f"{psnr:.1f} dB",
                "equal latents": f"{100 * equal:.0f} %",
            }
        )
    return rows


def seconds_of(results: list[dict[str, Any]], name: str) -> float:
    """Least seconds per picture of a precision over its seeds."""
    return min(r["seconds_per_picture"] for r in results if r["options"]["dtype"] == name)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", required=True, help="folders of pipelines")
    parser.add_argument("--data", default="emoji", help="what they were trained on")
    parser.add_argument("--num_samples", type=int, default=256, help="of each precision and seed")
    parser.add_argument("--seeds", type=int, default=2, help="of each precision")
    args = parser.parse_args()
    print(markdown([row for model in args.models for row in rows_of(model, args)]))


if __name__ == "__main__":
    main()
