"""Measure a saved tokenizer or pipeline on held-out pictures and on fresh samples.

smalti evaluate --model runs/demo/pipeline --data emoji --output_dir runs/demo/evaluation
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from smalti.cli import parse_config, run_command
from smalti.config import check_at_least, config_to_dict
from smalti.data.dataset import DataOptions
from smalti.errors import SmaltiError
from smalti.evaluation.evaluator import PipelineEvaluation, TokenizerEvaluation
from smalti.evaluation.protocol import Metric, write_summary
from smalti.files import first_difference, write_json
from smalti.hub import resolve_folder
from smalti.pipelines.conditions import check_options
from smalti.pipelines.pipeline import INDEX
from smalti.scripts.options import Sampling

SETTINGS = "evaluation.json"
PRODUCTS = ("samples.png", "reconstructions.png", "neighbours.png", "summary.json")

OF_SAMPLES = {field.name for field in fields(Sampling)} | {  # settings that need a pipeline
    "other_data",
    "num_samples",
    "num_references",
    "features",
    "feature_weights",
    "classifier_epochs",
}


@dataclass(frozen=True)
class EvaluateConfig(DataOptions, Sampling):
    """Measure a saved tokenizer or pipeline on held-out pictures, and a pipeline's samples."""

    model: str = "runs/demo/pipeline"  # folder of a pipeline or of a tokenizer, or on the Hub
    output_dir: Path = Path("runs/evaluation")
    # Accept pictures that the pipeline was not trained on; then none are held out from it.
    other_data: bool = False
    num_samples: int = 1024  # classes in the proportions of the training pictures
    num_references: int = 20_000  # training pictures at most, evenly spread
    seed: int = 0
    batch_size: int = 128
    # Networks behind Frechet distance and KID; efflite0 needs smalti[eval] or --feature_weights.
    features: tuple[Literal["alexnet", "efflite0"], ...] = ("alexnet",)
    feature_weights: Path | None = None  # EfficientNet-Lite0; found by itself if installed
    classifier_epochs: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(16, self, "num_samples", "num_references")
        check_at_least(1, self, "batch_size", "classifier_epochs")


def evaluate(config: EvaluateConfig) -> dict[str, Metric]:
    """Measure; write reconstructions.png and summary.json, and for a pipeline samples.png and
    neighbours.png.

    Returns:
        The metrics by name.
    """
    folder = resolve_folder(config.model)
    if (folder / INDEX).is_file():
        return evaluate_pipeline(config, folder)
    _refuse_sampling(config)
    evaluation = TokenizerEvaluation.load(config, folder)
    claim(config, evaluation.tokenizer.fingerprint)
    metrics = evaluation.reconstruction(config.output_dir / "reconstructions.png")
    tokenizer = evaluation.tokenizer.fingerprint
    write_summary(config.output_dir / "summary.json", metrics, tokenizer=tokenizer)
    return metrics


def _refuse_sampling(config: EvaluateConfig) -> None:
    """A tokenizer alone draws nothing."""
    for field in fields(config):
        if field.name in OF_SAMPLES and getattr(config, field.name) != field.default:
            raise SmaltiError(
                f"{config.model} is a tokenizer and draws nothing: leave out --{field.name}"
            )


def evaluate_pipeline(config: EvaluateConfig, folder: Path) -> dict[str, Metric]:
    """Reconstruction, samples, and how near they are to training pictures."""
    evaluation = PipelineEvaluation.load(config, folder)
    extractors = evaluation.extractors()
    check_options(evaluation.pipeline.prior, config.options)
    claim(config, evaluation.tokenizer.fingerprint, evaluation.pipeline.prior.fingerprint)
    out = config.output_dir
    evaluation.show(out / "samples.png")
    metrics = evaluation.reconstruction(out / "reconstructions.png")
    metrics |= evaluation.likelihood()
    sets = evaluation.sample()
    metrics |= evaluation.neighbours(sets, out / "neighbours.png")
    for extractor in extractors:
        metrics |= evaluation.distances(sets, extractor)
    metrics |= evaluation.classification(sets)
    write_summary(
        out / "summary.json",
        metrics,
        tokenizer=evaluation.tokenizer.fingerprint,
        prior=evaluation.pipeline.prior.fingerprint,
    )
    return metrics


def claim(config: EvaluateConfig, *fingerprints: str) -> None:
    """Mark the output folder as this evaluation's.

    Raises:
        SmaltiError: it holds another evaluation, or files of these names from elsewhere.
    """
    path = config.output_dir / SETTINGS
    settings = {**config_to_dict(config), "models": list(fingerprints)}
    del settings["output_dir"]
    if path.is_file():
        different = first_difference(path, settings)
        if different:
            raise SmaltiError(
                f"{config.output_dir} holds another evaluation (its {different[0]} differs): "
                "choose another --output_dir"
            )
        return
    strange = [name for name in PRODUCTS if (config.output_dir / name).exists()]
    if strange:
        raise SmaltiError(
            f"{config.output_dir} already holds a {strange[0]} that no evaluation with these "
            "settings made: choose another --output_dir"
        )
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def table(metrics: dict[str, Metric]) -> str:
    """The metrics, one per line."""
    width = max(map(len, metrics))
    return "\n".join(f"{name:{width}}  {metric.value:10.4f}" for name, metric in metrics.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti evaluate`."""
    config = parse_config(EvaluateConfig, argv, prog="smalti evaluate")
    print(table(evaluate(config)))
    print(f"summary: {config.output_dir / 'summary.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
