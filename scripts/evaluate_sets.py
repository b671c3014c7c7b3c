"""`smalti evaluate --samples A --reference B`: two sets of pictures, whatever contains them.

    smalti evaluate --samples runs/samples --reference emoji --reference_split train
    smalti evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz \\
        --inception pt_inception-2015-12-05-6726825d.pth
"""

import inspect
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from smalti.checkpoints import Weights, has_prior
from smalti.config import ImageSize, plain
from smalti.data.dataset import DataOptions, Split
from smalti.data.latents import to_levels
from smalti.data.sources.base import fingerprint_of
from smalti.errors import ConfigurationError, DataError, GenerationError
from smalti.evaluation.comparison import (
    Side,
    cautions,
    classification,
    compare,
    ratio_metric,
    record_of,
    retrieval,
)
from smalti.evaluation.evaluator import evenly_spaced
from smalti.evaluation.features import FeatureExtractor, feature_extractors, resize_of
from smalti.evaluation.image_sets import (
    Gaussian,
    ImageSet,
    OpenedSet,
    Statistics,
    open_set,
    save_statistics,
)
from smalti.evaluation.metrics import Found, defined, write_summary
from smalti.evaluation.streaming import Gathered, dims_of, gather
from smalti.pipelines.conditions import arguments_for, check_options
from smalti.pipelines.generation import picture_generator
from smalti.pipelines.model_index import INDEX
from smalti.pipelines.pipeline import Pipeline
from smalti.scripts.options import DType, Sampling
from smalti.tokenizer.losses.perceptual import LPIPS
from smalti.training.processes import agreed_errors, join_job, resolve_precision, shared_work
from smalti.weights import short_name

logger = logging.getLogger(__name__)

PARTS = "parts"  # folder in --output_dir, until the evaluation is finished


@dataclass(frozen=True)
class SetOptions(DataOptions, Sampling):
    """Options of an evaluation, those of two sets of pictures among them."""

    # Pictures to measure, instead of --model: a folder, a data set as for --data, an npz (arr_0), a
    # folder of smalti generate, or a pipeline, which is sampled.
    samples: str = ""
    # What --samples are compared with: the same kinds, or an npz with statistics (mu and sigma).
    reference: str = ""
    # Of a data set as --reference: all pictures, or those of training or held out; with train, the
    # held-out ones measure what real pictures reach.
    reference_split: Split = "all"
    # Weight file of the Inception network of FID, which is then one of --features. Without a file,
    # --features inception uses the one that torch-fidelity downloads.
    inception: Path | None = None
    # npz file for the mean and covariance of --samples (mu, sigma), a --reference of later ones.
    save_statistics: Path | None = None
    dtype: DType = "fp32"  # precision of a pipeline, as of smalti generate
    output_dir: Path = Path("runs/evaluation")  # for summary.json and the image grids
    weights: Weights = "ema"  # of a checkpoint: averaged over its run (ema), or raw
    # Pixels, the side of a square or height x width as in 48x64, if not the size of the training
    # pictures. Priors with learned positions (next-scale) refuse it. With --samples: the pictures
    # of data sets and folders are cropped to their centre and resized.
    image_size: ImageSize | None = None
    # With the class proportions of the training images; of a pipeline that is given pictures, at
    # most one for each held-out picture.
    num_samples: int = 1024
    num_references: int = 20_000  # at most this many training images, evenly spaced
    seed: int = 0  # of the samples, the classifier, and the random subsets of metrics
    batch_size: int = 128  # images encoded, decoded or sampled at once
    # Networks for Frechet distance and KID: alexnet; efflite0 (smalti[eval] or --feature_weights);
    # inception; transformers:PATH, a vision model; or your own, module:name.
    features: tuple[str, ...] = ("alexnet",)
    feature_weights: Path | None = None  # weight file of efflite0; None = that of smalti[eval]
    # Of training the classifier on the real training images or, for a pipeline of captions, the
    # network that retrieves captions.
    classifier_epochs: int = 12

    def check_sets(self) -> None:
        """Raise `ConfigurationError` unless the options of two sets fit together."""
        if self.samples and not self.reference and self.save_statistics is None:
            raise ConfigurationError(
                "--samples is given without a --reference: give one, or --save_statistics FILE"
            )
        if self.samples:
            return
        for name in ("reference", "reference_split", "save_statistics"):
            if getattr(self, name) != getattr(SetOptions, name):
                raise ConfigurationError(
                    f"--{name} is for two sets of pictures: add --samples, or leave it out"
                )


# -------------------------------------------------------------------------------------------------
# A pipeline as a set


class PipelineSet(ImageSet):
    """Samples of a pipeline; sample i has a generator of its own.

    Args:
        labels: (N,) class of each sample; zeros without classes.
        prompts: of each sample, or none.
        chosen: how these were chosen, for the protocol.
    """

    def __init__(
        self,
        config: SetOptions,
        name: str,
        pipeline: Pipeline,
        labels: Tensor,
        prompts: Sequence[str],
        chosen: dict[str, str],
    ) -> None:
        self.pipeline, self.asked, self.prompts = pipeline, labels, prompts
        self.seed, self.batch_size = config.seed, config.batch_size
        self.options = config.guided_like(pipeline).options
        check_options(pipeline.prior, self.options)
        models = {"tokenizer": pipeline.tokenizer.fingerprint, "prior": pipeline.prior.fingerprint}
        settings = {**defaults_of(pipeline), **self.options}
        drawn = {"seed": config.seed, "dtype": short_name(pipeline.dtype)}
        sampling = {**drawn, **plain_values(settings), **chosen}
        asked = json.dumps([models, sampling, labels.tolist(), list(prompts)], default=str)
        super().__init__(
            name,
            "pipeline",
            fingerprint_of([asked.encode()]),
            classes=pipeline.classes,
            labels=labels,
            captions=prompts,
            protocol={"models": models, "sampling": sampling, "crop": "none"},
        )

    def __len__(self) -> int:
        return len(self.asked)

    def levels(self, rows: Sequence[int]) -> Tensor:
        found = []
        for part in torch.as_tensor(rows).split(self.batch_size):
            prompts = [self.prompts[row] for row in part.tolist()] if self.prompts else ()
            output = self.pipeline(
                **arguments_for(self.pipeline.classes, self.asked[part], prompts),
                generator=[picture_generator(self.seed, row) for row in part.tolist()],
                output_type="pt",
                **self.options,
            )
            if not output.images.isfinite().all():
                raise DataError(
                    f"{self.name} makes pictures with infinite or NaN values: use --dtype bf16 or "
                    "fp32, or a model whose training did not diverge"
                )
            found.append(to_levels(output.images * 2 - 1).byte().cpu())
        return torch.cat(found)


def defaults_of(pipeline: Pipeline) -> dict[str, Any]:
    """The options of the prior's `sample` that are plain values, with their defaults."""
    parameters = inspect.signature(pipeline.prior.sample).parameters.values()
    known = (bool, int, float, str, tuple)
    return {p.name: p.default for p in parameters if isinstance(p.default, known)}


def plain_values(options: dict[str, Any]) -> dict[str, Any]:
    """Options as a protocol records them."""
    return {name: plain(value) for name, value in options.items()}


def is_pipeline(spec: str) -> bool:
    """Whether a set is a pipeline: a folder of one, or an id on the Hub."""
    folder = Path(spec).expanduser()
    if folder.exists():
        return (folder / INDEX).is_file() or (folder.is_dir() and has_prior(folder))
    owner, _, name = spec.partition("/")
    return (
        bool(owner and name)
        and not set(spec) & set(":*{}~")
        and "/" not in name
        and ("." not in name and not Path(owner).is_dir())
    )


def pipeline_set(
    config: SetOptions, spec: str, device: torch.device, reference: ImageSet | None
) -> PipelineSet:
    """A pipeline that is sampled with the classes or captions of the reference.

    Raises:
        SmaltiError: it cannot be loaded; it makes pictures of captions, and there are none; it is
            given pictures.
    """
    pipeline = Pipeline.from_pretrained(
        spec, device=device, weights=config.weights, dtype=config.dtype
    )
    if config.image_size is not None:
        pipeline = pipeline.resized(config.image_size)
    kinds, count = pipeline.prior.condition_kinds, config.num_samples
    if "image" in kinds:
        raise GenerationError(
            f"{spec} samples from given pictures: measure it with --model, or give a folder of its "
            "pictures as --samples"
        )
    labels, prompts, chosen = torch.zeros(count, dtype=torch.int64), list[str](), {}
    if pipeline.classes:
        labels, chosen = torch.arange(count) % len(pipeline.classes), {"labels": "balanced"}
        if reference is not None and {*reference.classes} == {*pipeline.classes}:
            numbers = torch.tensor([pipeline.classes.index(name) for name in reference.classes])
            assert reference.labels is not None, "a set with classes has labels"
            theirs = numbers[reference.labels].sort().values
            labels = theirs[evenly_spaced(count, len(theirs))]
            chosen = {"labels": "as in the reference"}
    if "text" in kinds:
        if reference is None or not reference.captions:
            raise GenerationError(
                f"{spec} makes pictures of prompts: give a --reference with captions"
            )
        rows = evenly_spaced(count, len(reference)).tolist()
        prompts = [str(reference.captions[row]) for row in rows]
        chosen = {**chosen, "prompts": "captions of the reference, evenly spaced"}
    return PipelineSet(config, spec, pipeline, labels, prompts, chosen)


# -------------------------------------------------------------------------------------------------
# The comparison


@dataclass
class Comparison:
    """Two sets that were opened, and the extractors that measure them."""

    config: SetOptions
    samples: OpenedSet
    reference: OpenedSet | None
    heldout: OpenedSet | None  # held-out pictures of the reference
    extractors: list[FeatureExtractor]
    lpips: LPIPS

    @classmethod
    def open(cls, config: SetOptions) -> Self:
        """Open the sets of a configuration.

        Raises:
            SmaltiError: a set cannot be opened, or does not fit the extractors.
        """
        if not any(spec and is_pipeline(spec) for spec in (config.samples, config.reference)):
            refuse_pipeline_flags(config)
        device = join_job().device
        assert device is not None, "PartialState always has a device"
        lpips = LPIPS.from_embedded().to(device)
        weights = config.feature_weights
        extractors = feature_extractors(config.features, lpips, weights, config.inception)
        reference = heldout = None
        if config.reference:
            reference = opened(config, config.reference, device, None, config.reference_split)
            if config.reference_split == "train":
                heldout = open_set(
                    config.reference, config, size=config.image_size, split="heldout"
                )
        pictures = reference.pictures if reference is not None else None
        samples = opened(config, config.samples, device, pictures, "all")
        dims = {extractor.name: dims_of(extractor)["features"] for extractor in extractors}
        for one in (samples, reference):
            if one is not None and one.statistics is not None:
                one.fits = names_that_fit(extractors, dims, one.statistics)
                if one.pictures is None:
                    extractors = [e for e in extractors if e.name in one.fits]
        return cls(config, samples, reference, heldout, extractors, lpips)

    @property
    def identities(self) -> list[str]:
        """What the numbers depend on beside the configuration."""
        sets = [one.identity for one in (self.samples, self.reference) if one is not None]
        return [*sets, *(extractor.weights_sha256 for extractor in self.extractors)]

    def measure(self) -> Found:
        """Measure, write the summary, and return the metrics, in every process."""
        sets = [one.pictures if one else None for one in self._sets]
        total = sum(len(one) for one in sets if one is not None)
        gathered: list[Gathered | None] = []
        folder = self.config.output_dir / PARTS
        with shared_work(total, "extract features") as share:
            for pictures in sets:
                found = None
                if pictures is not None:
                    found = gather(
                        pictures, self.extractors, folder, seed=self.config.seed, **share
                    )
                gathered.append(found)
        results: list[Found] = [{}]
        with agreed_errors():
            if join_job().is_main_process:
                results = [self._metrics(gathered)]
                shutil.rmtree(folder, ignore_errors=True)
        broadcast_object_list(results)
        return results[0]

    @property
    def _sets(self) -> tuple[OpenedSet, OpenedSet | None, OpenedSet | None]:
        return self.samples, self.reference, self.heldout

    def _metrics(self, gathered: list[Gathered | None]) -> Found:
        """All metrics of what was gathered of samples, reference and held-out pictures."""
        config, records = self.config, list[dict[str, Any]]()
        for one, found in zip(self._sets, gathered, strict=True):
            if one is not None:
                records.append(record_of(one.pictures, one.statistics, found))
        if config.save_statistics is not None:
            self._save_statistics(config.save_statistics, gathered[0], records[0])
        names = ("samples", "reference", "heldout")
        sets: dict[str, Any] = dict(zip(names, records, strict=False))
        metrics: Found = {}
        if self.reference is not None:
            shared = gathered[0].shared_with(gathered[1]) if gathered[0] and gathered[1] else 0
            protocol = {**sets, "cautions": cautions(records[0], records[1], shared)}
            sides = {e.name: self._sides(e.name, gathered) for e in self.extractors}
            for extractor in self.extractors:
                samples, reference, _ = sides[extractor.name]
                metrics |= compare(samples, reference, extractor, protocol, config.seed)
            metrics |= ratio_metric(sides, protocol)
            metrics |= self._conditional(protocol)
            notes = [m.protocol["note"] for m in defined(metrics).values() if "note" in m.protocol]
            for caution in dict.fromkeys([*protocol["cautions"], *notes]):
                logger.warning(caution)
        write_summary(config.output_dir / "summary.json", metrics, sets=sets)
        return metrics

    def _sides(self, name: str, gathered: list[Gathered | None]) -> tuple[Side, Side, Side | None]:
        a, b, c = (
            Side.of(name, found, one.statistics if one is not None and name in one.fits else None)
            for one, found in zip(self._sets, gathered, strict=True)
        )
        return a, b, c if self.heldout is not None else None

    def _conditional(self, protocol: dict[str, Any]) -> Found:
        """Metrics of the classes and captions of the two sets."""
        samples, reference, heldout = (one.pictures if one else None for one in self._sets)
        if samples is None or reference is None:
            return {}
        config, device = self.config, next(self.lpips.parameters()).device
        bf16 = resolve_precision("auto", device) == "bf16"
        found = classification(
            *(samples, reference, heldout, protocol),
            epochs=config.classifier_epochs,
            limit=config.num_references,
            seed=config.seed,
            device=device,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            folder=config.output_dir,
        )
        return found | retrieval(
            *(samples, reference, heldout, protocol),
            epochs=config.classifier_epochs,
            limit=config.num_references,
            seed=config.seed,
            lpips=self.lpips,
        )

    def _save_statistics(
        self, path: Path, gathered: Gathered | None, record: dict[str, Any]
    ) -> None:
        """Write mu and sigma of the samples in the features of Inception, or of the only one."""
        chosen = [e for e in self.extractors if e.name.startswith("inception")] or self.extractors
        if gathered is None or len(chosen) != 1:
            raise ConfigurationError(
                "--save_statistics needs pictures as --samples, and one of --features besides those"
                " of Inception, which is preferred: leave the others out"
            )
        extractor = chosen[0]
        moments = gathered.kept[extractor.name].moments
        pairs = {n: Gaussian(m.mean, m.covariance, m.count) for n, m in moments.items()}
        about = {
            "features": extractor.name,
            "weights_sha256": extractor.weights_sha256,
            "resize": resize_of(extractor),
            "pictures": moments["features"].count,
            "set": record,
        }
        save_statistics(path, pairs["features"], pairs.get("spatial"), about)


def refuse_pipeline_flags(config: SetOptions) -> None:
    """Raise `ConfigurationError` if a flag of sampling is given, and no set is a pipeline."""
    for name in (*(part.name for part in fields(Sampling)), "num_samples", "dtype", "weights"):
        if getattr(config, name) != getattr(SetOptions, name):
            raise ConfigurationError(
                f"neither --samples nor --reference is a pipeline to sample: leave out --{name}"
            )


def opened(
    config: SetOptions,
    spec: str,
    device: torch.device,
    reference: ImageSet | None,
    split: Split,
) -> OpenedSet:
    """The set that `spec` names, a pipeline among them."""
    if is_pipeline(spec):
        return OpenedSet(pipeline_set(config, spec, device, reference))
    return open_set(spec, config, size=config.image_size, split=split)


def names_that_fit(
    extractors: list[FeatureExtractor], dims: dict[str, int], statistics: Statistics
) -> set[str]:
    """The names of the extractors that statistics may be of.

    Raises:
        DataError: there is none.
    """
    fits, problems = set[str](), list[DataError]()
    for extractor in extractors:
        name = extractor.name
        try:
            statistics.check_extractor(
                name, extractor.weights_sha256, dims[name], resize_of(extractor)
            )
            fits.add(name)
        except DataError as error:
            problems.append(error)
    if not fits:
        raise problems[0]
    if len(fits) > 1 and not statistics.record:
        raise DataError(
            f"{statistics.name} does not say of which network its statistics are, and they may be "
            f"of {' or '.join(sorted(fits))}: give one of them as --features"
        )
    return fits
