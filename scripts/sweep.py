"""The best sampling options of a pipeline: a grid of them, measured, and the best saved with it.

    smalti sweep --model runs/demo/pipeline --data emoji --metric fd_alexnet \
        --guidance_scale 1 1.5 2 3 --temperature 0.9 1

Every combination is sampled with the same classes or prompts and seeds. The folder holds sweep.md
(the table, the best first), sweep.html (the table and a plot), sweep.json (every value) and
samples.png of the best (not of a pipeline that is given pictures). After an interruption, the same
command continues; with more values it measures those that are new.

    smalti sweep --model runs/demo/pipeline --data emoji --dtype bfloat16 int8 int4

measures precisions beside fp32, each with several seeds, and saves the fastest one without loss:
dtype="auto" chooses it on this type of device.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from html import escape
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch

from smalti.checkpoints import Weights
from smalti.cli import parse_config, run_command
from smalti.config import check_at_least, saved_fields
from smalti.data.dataset import DataOptions
from smalti.data.image_io import save_png
from smalti.errors import ConfigurationError
from smalti.evaluation.distances import frechet_distance, kernel_distance
from smalti.evaluation.evaluator import SampleEvaluator
from smalti.evaluation.features import FeatureExtractor, extract, feature_extractors
from smalti.evaluation.metrics import CHUNK, KID_SUBSET_SIZE, KID_SUBSETS
from smalti.evaluation.pictures import StoredImages
from smalti.files import first_difference, read_hashed_json, write_hashed_json, write_text
from smalti.pipelines.card import SAMPLES
from smalti.pipelines.conditions import check_options
from smalti.pipelines.generation import sample_grid
from smalti.pipelines.model_flag import place_of
from smalti.pipelines.model_index import INDEX, save_auto_dtype, save_sampling
from smalti.pipelines.pipeline import DEMO, Pipeline, check_model
from smalti.pipelines.precision import check_precision
from smalti.pipelines.sampling import checked_sampling, sampling_words
from smalti.scripts.evaluate import EvaluateConfig, Requests, requests, sample, sample_evaluator
from smalti.scripts.options import Precision, SamplingGrid, ShortPrecision
from smalti.scripts.pages import html_table, markdown, page
from smalti.training.processes import fills_folder, say
from smalti.weights import SHORT_NAMES

RESULTS = "sweep.json"
BEST = f'<h2>The best</h2>\n<img src="{SAMPLES}" alt="samples of the best combination">\n'
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2")
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 320, 70, 40  # of the plot, and room for its axes, in pixels

Combination = dict[str, Any]  # sampling options


@dataclass(frozen=True)
class SweepConfig(DataOptions, SamplingGrid):
    """Measure combinations of sampling options of a pipeline, and save the best with it.

    Give several values for an option to vary it, or one to fix it.
    """

    TRAINED: ClassVar[str] = "model"

    model: Annotated[str, place_of("A pipeline")] = DEMO
    weights: Weights = "ema"  # of a checkpoint: averaged over its run (ema), or raw
    output_dir: Path = Path("runs/sweep")  # continues a sweep in it
    # fd_FEATURES or kid_FEATURES, such as fd_alexnet: distance of the samples to the training
    # pictures; or classifier_accuracy: of a classifier trained on real pictures, on the samples
    metric: str = "fd_alexnet"
    # Write the best combination into the pipeline, as its sampling defaults.
    save_best: bool = True
    # Allow data that the pipeline was not trained on; then all of its images are held out.
    other_data: bool = False
    num_samples: int = 1024  # of each combination, with the class proportions of the training set
    num_references: int = 20_000  # at most this many training images, evenly spaced
    # Precisions to compare with fp32, instead of sampling options. For "auto" it saves the fastest
    # of those whose mean metric is at most a standard deviation of fp32's seeds worse than fp32's.
    dtype: tuple[Precision | ShortPrecision, ...] = ()
    seeds: int = 3  # of each precision: seed, seed + 1, ...
    seed: int = 0  # of the samples and the classifier
    batch_size: int = 128  # images sampled at once
    feature_weights: Path | None = None  # as of smalti evaluate
    classifier_epochs: int = 12  # of the classifier

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(16, self, "num_samples", "num_references")
        check_at_least(1, self, "batch_size", "classifier_epochs")
        check_at_least(2, self, "seeds")
        names = tuple(SHORT_NAMES.get(name, name) for name in self.dtype)
        object.__setattr__(self, "dtype", names)

    @property
    def evaluation(self) -> EvaluateConfig:
        """The same pictures and samples as of `smalti evaluate`, with the defaults of sampling."""
        options = {part.name for part in fields(SamplingGrid)} | {"dtype"}
        ours = {part.name for part in fields(self)} - options
        shared = {part.name for part in fields(EvaluateConfig)} & ours
        return EvaluateConfig(**{name: getattr(self, name) for name in shared})


# -------------------------------------------------------------------------------------------------
# The metric


class Objective:
    """What is measured of the samples of a combination.

    Raises:
        ConfigurationError: there is no such metric, or it is not defined for this pipeline.
    """

    def __init__(self, config: SweepConfig, evaluator: SampleEvaluator, pipeline: Pipeline) -> None:
        self.config, self.evaluator = config, evaluator
        kind, _, features = config.metric.partition("_")
        self.lower_is_better = kind in ("fd", "kid")
        self.measure: Callable[[StoredImages, torch.Tensor], float]
        if config.metric == "classifier_accuracy":
            if len(pipeline.classes) < 2:
                raise ConfigurationError(
                    f"metric is classifier_accuracy, and the pipeline has {len(pipeline.classes)} "
                    "classes: use fd_alexnet"
                )
            self.measure = self._accuracy
        elif self.lower_is_better and features:
            self.extractor: FeatureExtractor = feature_extractors(
                [features], evaluator.tokenizer.lpips, config.feature_weights
            )[0]
            self.measure = self._frechet if kind == "fd" else self._kernel
        else:
            raise ConfigurationError(
                f"metric is {config.metric}; use fd_ or kid_ with a network, as in fd_alexnet, or "
                "classifier_accuracy"
            )

    @cached_property
    def references(self) -> torch.Tensor:
        """Features (N, d) of the training pictures."""
        return extract(self.extractor, self.evaluator.train.split(CHUNK))

    @cached_property
    def classifier(self) -> Any:
        """Trained on the real training pictures alone."""
        return self.evaluator.trained_classifier(self.config.classifier_epochs, torch.float32)

    def _features(self, samples: StoredImages) -> torch.Tensor:
        return extract(self.extractor, samples.split(CHUNK))

    def _frechet(self, samples: StoredImages, labels: torch.Tensor) -> float:
        del labels
        return frechet_distance(self.references, self._features(samples))

    def _kernel(self, samples: StoredImages, labels: torch.Tensor) -> float:
        del labels
        features = self._features(samples)
        size = min(KID_SUBSET_SIZE, len(features), len(self.references))
        generator = self.evaluator.generator("kid")
        return kernel_distance(
            self.references, features, subsets=KID_SUBSETS, subset_size=size, generator=generator
        ).mean

    def _accuracy(self, samples: StoredImages, labels: torch.Tensor) -> float:
        return self.classifier.accuracy(samples, labels)

    def best(self, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The best result; the first of equal ones."""
        return (min if self.lower_is_better else max)(results, key=lambda result: result["value"])


# -------------------------------------------------------------------------------------------------
# The sweep


@fills_folder()
def sweep(config: SweepConfig) -> list[dict[str, Any]]:
    """Measure every combination, and write the results.

    Returns:
        {"options", "value", "seconds_per_picture", "sampling"} of each combination, in their order;
        "sampling" are its options with the pipeline's own defaults.

    Raises:
        SmaltiError: an option that the prior does not have; no such metric; the folder has another
            sweep.
    """
    check_model(config.model)
    if config.dtype:
        return sweep_precisions(config)
    if not config.combinations:
        raise ConfigurationError(
            "no option has several values: give some, as in --guidance_scale 1 2 3"
        )
    config.note_stored()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = Pipeline.from_pretrained(config.model, device=device, weights=config.weights)
    evaluation = config.evaluation
    samplings = [checked(pipeline, evaluation, options) for options in config.combinations]
    evaluator = sample_evaluator(evaluation, pipeline)
    objective = Objective(config, evaluator, pipeline)
    asked = requests(evaluation, pipeline, evaluator)
    known = claimed(config, pipeline)
    results = []
    for number, (options, sampling) in enumerate(samplings, 1):
        done = next((result for result in known if result["sampling"] == sampling), None)
        if done is None:
            done = measured(options, evaluation, pipeline, asked, objective)
            done["sampling"] = sampling
            known.append(done)
            write_results(config, pipeline, known)
        results.append(done)
        say(f"{number} of {len(samplings)}: {sampling_words(options)}: {done['value']:.4g}")
    best = objective.best(results)
    pipeline.sampling = best["sampling"]
    if asked.given is None:
        grid = sample_grid(pipeline, prompts=asked.shown, seed=config.seed)
        save_png(config.output_dir / SAMPLES, grid)
    write_pages(config, results, best)
    if config.save_best:
        save_into(config.model, best["sampling"])
    return results


def sweep_precisions(config: SweepConfig) -> list[dict[str, Any]]:
    """Measure every precision with every seed, write the results, and save the fastest precision
    without loss.

    Returns:
        As of `sweep`, with the options "dtype" and "seed".

    Raises:
        SmaltiError: a sampling option has several values; the prior cannot have a precision; the
            folder has another sweep.
    """
    if len(config.combinations) > 1:
        raise ConfigurationError(
            "dtype compares precisions, and a sampling option has several values: give one of it"
        )
    config.note_stored()
    fixed = config.combinations[0] if config.combinations else {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = partial(Pipeline.from_pretrained, config.model, device=device, weights=config.weights)
    dtypes = list(dict.fromkeys(("float32", *config.dtype)))
    pipeline = load()
    for dtype in dtypes:  # before anything is measured
        check_precision(pipeline.tokenizer, pipeline.prior, dtype)
    evaluation = config.evaluation
    sampling = checked(pipeline, evaluation, fixed)[1]
    evaluator = sample_evaluator(evaluation, pipeline)
    objective = Objective(config, evaluator, pipeline)
    asked = requests(evaluation, pipeline, evaluator)
    known = claimed(config, pipeline)
    results = []
    for dtype in dtypes:
        cast = pipeline if dtype == "float32" else load(dtype=dtype)
        for seed in range(config.seed, config.seed + config.seeds):
            options = {"dtype": dtype, "seed": seed}
            done = next((one for one in known if one["sampling"] == {**sampling, **options}), None)
            if done is None:
                seeded = replace(evaluation, seed=seed, **fixed)
                done = measured({}, seeded, cast, asked, objective)
                done |= {"options": options, "sampling": {**sampling, **options}}
                known.append(done)
                write_results(config, pipeline, known)
            results.append(done)
            say(f"{sampling_words(options)}: {done['value']:.4g}")
    chosen = fastest_without_loss(results, objective.lower_is_better)
    write_pages(config, results, next(r for r in results if r["options"]["dtype"] == chosen))
    if config.save_best and is_local(config.model):
        save_auto_dtype(Path(config.model), device, chosen)
        say(f'dtype "auto" of {config.model} on {device.type}: {chosen}')
    return results


def fastest_without_loss(results: Sequence[dict[str, Any]], lower_is_better: bool) -> str:
    """The precision with the shortest time of those whose mean metric is at most one standard
    deviation of float32 over its seeds worse than that of float32."""
    values, seconds = dict[str, list[float]](), dict[str, float]()
    for result in results:
        name, took = result["options"]["dtype"], result["seconds_per_picture"]
        values.setdefault(name, []).append(result["value"])
        seconds[name] = min(took, seconds.get(name, took))  # the first batch also warms up
    exact, sign = values["float32"], 1 if lower_is_better else -1
    noise = statistics.stdev(exact)
    worse = {n: sign * (statistics.mean(v) - statistics.mean(exact)) for n, v in values.items()}
    return min((name for name in values if worse[name] <= noise), key=lambda name: seconds[name])


def checked(
    pipeline: Pipeline, evaluation: EvaluateConfig, options: Combination
) -> tuple[Combination, dict[str, Any]]:
    """A combination as JSON holds it, and all options of its samples: the pipeline's own defaults
    stand where it has none.

    Raises:
        SmaltiError: the prior refuses an option.
    """
    check_options(pipeline.prior, replace(evaluation, **options).options)
    sampling = checked_sampling(pipeline.prior, pipeline.sampling_options(options))
    return {name: sampling[name] for name in options}, sampling


def measured(
    options: Combination,
    evaluation: EvaluateConfig,
    pipeline: Pipeline,
    asked: Requests,
    objective: Objective,
) -> dict[str, Any]:
    """Sample with these options, and measure."""
    started = time.perf_counter()
    samples = sample(replace(evaluation, **options), pipeline, asked)
    seconds = (time.perf_counter() - started) / len(asked.labels)
    value = objective.measure(samples, asked.labels)
    return {"options": options, "value": value, "seconds_per_picture": seconds}


def save_into(model: str, sampling: dict[str, Any]) -> None:
    """Save the sampling defaults of a pipeline with it, where it is a local folder."""
    if not is_local(model):
        return
    save_sampling(Path(model), sampling)
    say(f"sampling defaults of {model}: {sampling_words(sampling)}")


def is_local(model: str) -> bool:
    """Whether a model is a local folder of a pipeline; says so if not."""
    found = (Path(model) / INDEX).is_file()
    if not found:
        say(f"{model} is no local folder of a pipeline: nothing is saved with it")
    return found


# -------------------------------------------------------------------------------------------------
# The output folder


def settings_of(config: SweepConfig, pipeline: Pipeline) -> dict[str, Any]:
    """What all results of a folder have in common."""
    varied = {part.name for part in fields(SamplingGrid)}
    free = {*varied, "output_dir", "weights", "save_best", "dtype", "seeds"}
    settings = {name: value for name, value in saved_fields(config).items() if name not in free}
    return {**settings, "models": [pipeline.tokenizer.fingerprint, pipeline.prior.fingerprint]}


def claimed(config: SweepConfig, pipeline: Pipeline) -> list[dict[str, Any]]:
    """The results that the folder has.

    Raises:
        ConfigurationError: they are those of another sweep.
    """
    path = config.output_dir / RESULTS
    if not path.is_file():
        return []
    stored = read_hashed_json(path)
    different = first_difference(stored.get("settings", {}), settings_of(config, pipeline))
    if different:
        raise ConfigurationError(
            f"{config.output_dir} holds another sweep (its {different[0]} differs): choose another "
            "--output_dir"
        )
    return stored["results"]


def write_results(config: SweepConfig, pipeline: Pipeline, results: Sequence[Any]) -> None:
    """Write every result so far."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings_of(config, pipeline), "results": list(results)}
    write_hashed_json(config.output_dir / RESULTS, content)


def write_pages(config: SweepConfig, results: Sequence[Any], best: Any) -> None:
    """Write sweep.md and sweep.html."""
    order = sorted(results, key=lambda r: (r is not best, abs(r["value"] - best["value"])))
    names = list(results[0]["options"])
    rows = [
        {
            **{name: str(result["options"][name]) for name in names},
            config.metric: f"{result['value']:.4g}",
            "seconds per picture": f"{result['seconds_per_picture']:.4f}",
        }
        for result in order
    ]
    has_grid = (config.output_dir / SAMPLES).is_file()
    shown = f"\n![the best]({SAMPLES})\n" if has_grid else ""
    write_text(config.output_dir / "sweep.md", f"{markdown(rows)}\n{shown}")
    body = f"{plot(results, config.metric)}\n{html_table(rows)}{BEST if has_grid else ''}"
    write_text(config.output_dir / "sweep.html", page("sweep", body))


def plot(results: Sequence[Any], metric: str) -> str:
    """The metric over the option with the most values, a line for each choice of the others."""
    names = list(results[0]["options"])
    counts = {name: len({str(result["options"][name]) for result in results}) for name in names}
    over = max(names, key=lambda name: counts[name])
    values = [result["options"][over] for result in results]
    numeric = all(isinstance(value, int | float) for value in values)
    places: list[Any] = sorted({*values}) if numeric else list(dict.fromkeys(map(str, values)))
    low, high = (function(result["value"] for result in results) for function in (min, max))

    def point(result: Any) -> tuple[float, float]:
        value: Any = result["options"][over] if numeric else str(result["options"][over])
        share = places.index(value) / max(1, len(places) - 1)
        if numeric and places[-1] > places[0]:
            share = (value - places[0]) / (places[-1] - places[0])
        height = (result["value"] - low) / (high - low) if high > low else 0.5
        inner = HEIGHT - BOTTOM - 20
        return LEFT + share * (WIDTH - LEFT - 180), 20 + inner * (1 - height)

    lines: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        others = {name: v for name, v in result["options"].items() if name != over}
        varied = {n: v for n, v in others.items() if counts[n] > 1}
        lines.setdefault(sampling_words(varied), []).append(point(result))
    drawn = ""
    for (name, points), colour in zip(lines.items(), itertools.cycle(COLOURS), strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(points))
        x, y = max(points)
        drawn += f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        drawn += "".join(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points
        )
        drawn += f'<text x="{x + 8:.1f}" y="{y + 4:.1f}">{escape(name)}</text>'
    bottom = HEIGHT - BOTTOM
    ticks = "".join(
        f'<text x="{point({"options": {over: place}, "value": low})[0]:.1f}" y="{bottom + 16}" '
        f'text-anchor="middle">{escape(str(place))}</text>'
        for place in places
    )
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(metric)}">'
        f'<path d="M{LEFT},20V{bottom}H{WIDTH - 180}" fill="none" stroke="#ccc"/>{drawn}{ticks}'
        f'<text x="{LEFT - 6}" y="24" text-anchor="end">{high:.4g}</text>'
        f'<text x="{LEFT - 6}" y="{bottom}" text-anchor="end">{low:.4g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">{escape(metric)} over {escape(over)}</text></svg>'
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti sweep`."""
    config = parse_config(SweepConfig, argv, prog="smalti sweep")
    sweep(config)
    say(f"table and plot: {config.output_dir / 'sweep.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
