"""Quality and speed of every precision of trained pipelines, in one table.

    python benchmarks/precision.py --models runs/demo/pipeline --data emoji

Each precision draws the same pictures, by class and seed: a set for each of the seeds. Columns are
the Frechet distance to the training pictures, in features of the packaged AlexNet, and the share of
samples that a classifier trained on real pictures recognises, both as in `smalti evaluate`, with
their mean and standard deviation over the seeds; the least time per picture, over that of fp32; and
two comparisons with the pictures of fp32, one by one: the PSNR, and the share of pictures above
30 dB. A code that rounding changes leads sampling another way, to another picture, not a worse one.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import torch

from smalti.errors import ConfigurationError
from smalti.evaluation.pictures import StoredImages
from smalti.pipelines.pipeline import Pipeline
from smalti.scripts.evaluate import requests, sample, sample_evaluator
from smalti.scripts.options import Precision
from smalti.scripts.pages import markdown
from smalti.scripts.sweep import Objective, SweepConfig

EQUAL = 30.0  # dB; a picture with other codes has less


@dataclass
class Found:
    """What was measured of one precision, for each seed."""

    distances: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # per picture
    samples: list[StoredImages] = field(default_factory=list)

    def psnr(self, exact: "Found") -> torch.Tensor:
        """PSNR of each picture (N,) to the one of the same seed in fp32; infinite if equal."""
        pairs = zip(self.samples, exact.samples, strict=True)
        errors = [(a[:] - b[:]).square().flatten(1).mean(1) / 4 for a, b in pairs]
        return -10 * torch.log10(torch.cat(errors))


def precisions_of(model: str, wanted: Sequence[Precision]) -> dict[Precision, Pipeline]:
    """The pipeline in every precision that its models can have."""
    device, found = "cuda" if torch.cuda.is_available() else "cpu", {}
    for name in dict.fromkeys(("float32", *wanted)):
        try:
            found[name] = Pipeline.from_pretrained(model, device=device, dtype=name)
        except ConfigurationError as error:
            print(error)
    return found


def measured(config: SweepConfig) -> dict[Precision, Found]:
    """Samples of every precision and seed, in turns, and what they are worth."""
    pipelines = precisions_of(config.model, config.dtype)
    exact = pipelines["float32"]
    evaluation = config.evaluation
    evaluator = sample_evaluator(evaluation, exact)
    asked = requests(evaluation, exact, evaluator)
    distance = Objective(replace(config, metric="fd_alexnet"), evaluator, exact)
    accuracy = None
    if len(exact.classes) > 1:
        accuracy = Objective(replace(config, metric="classifier_accuracy"), evaluator, exact)
    found = {name: Found() for name in pipelines}
    for seed in range(config.seeds):
        for name, pipeline in pipelines.items():
            started = time.perf_counter()
            samples = sample(replace(evaluation, seed=seed), pipeline, asked)
            found[name].seconds.append((time.perf_counter() - started) / len(samples))
            found[name].samples.append(samples)
            found[name].distances.append(distance.measure(samples, asked.labels))
            if accuracy is not None:
                found[name].accuracies.append(accuracy.measure(samples, asked.labels))
    return found


def rows_of(config: SweepConfig) -> list[dict[str, str]]:
    """A row of the table for each precision of a pipeline."""
    found = measured(config)
    exact, rows = found["float32"], []
    for name, one in found.items():
        accuracies = [100 * share for share in one.accuracies]
        psnr, alike = one.psnr(exact), 100 * (one.psnr(exact) > EQUAL).float().mean().item()
        error = (10 ** (-psnr / 10)).mean()
        rows.append(
            {
                "precision": name,
                "Frechet distance": mean_and_deviation(one.distances, 1),
                "classifier accuracy": mean_and_deviation(accuracies, 1, " %"),
                "time": f"{min(one.seconds) / min(exact.seconds):.2f}",
                "PSNR to float32": f"{-10 * torch.log10(error).item():.1f} dB"
                if error
                else "equal",
                f"above {EQUAL:.0f} dB": f"{alike:.0f} %",
            }
        )
    return rows


def mean_and_deviation(values: Sequence[float], digits: int, unit: str = "") -> str:
    """Mean and standard deviation, in words."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}{unit}"


def main() -> None:
    """Print a Markdown table for each pipeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", required=True, help="folders of pipelines")
    parser.add_argument("--data", default="emoji", help="what they were trained on")
    precisions = get_args(Precision)
    parser.add_argument("--dtype", nargs="+", choices=precisions, default=precisions)
    parser.add_argument("--num_samples", type=int, default=192, help="of each precision and seed")
    parser.add_argument("--seeds", type=int, default=3, help="of each precision, at least 2")
    parser.add_argument("--classifier_epochs", type=int, default=2, help="of the classifier")
    args = parser.parse_args()
    options = {n: v for n, v in vars(args).items() if n != "models"} | {"dtype": tuple(args.dtype)}
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            config = SweepConfig(model=model, output_dir=Path(folder), other_data=True, **options)
            print(f"{model}\n\n{markdown(rows_of(config))}\n", flush=True)


if __name__ == "__main__":
    main()
