"""Contents and problems of a set of pictures, a latent cache, or a folder of shards.

The reports of `smalti check-data` and of `smalti info`.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from torch import Tensor

from smalti.data.dataset import read_options
from smalti.data.image_io import FolderOptions
from smalti.data.latent_cache.manifest import (
    BUCKETS,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    CacheInfo,
    bucket_folders,
    read_manifest,
)
from smalti.data.latent_cache.shard import identity_in, shard_path
from smalti.data.order import divide
from smalti.data.sources.base import (
    EncodedPictures,
    ImageSource,
    captions_found,
    classes_kept,
)
from smalti.data.sources.listing import printable
from smalti.data.sources.verification import Finding, in_threads, verify, without_effect
from smalti.data.sources.webdataset import ShardPictures
from smalti.data.value_range import ValueRange, common_range, written
from smalti.errors import SmaltiError
from smalti.files import Info, command, read_json, sha256_of

SHOWN_CLASSES = 20  # in a summary; the report lists all
SHOWN_CAPTIONS = 5  # examples in a report
SMALL_CLASS = 10  # pictures; a class with fewer is noted


@dataclass(frozen=True)
class BadFile:
    """A picture that training would refuse."""

    place: str
    reason: str


@dataclass(frozen=True)
class Range:
    """Smallest, median and largest width or height of the usable pictures, in pixels."""

    min: int
    median: float
    max: int


@dataclass(frozen=True)
class Duplicates:
    """Pictures whose files have equal bytes."""

    extra: int  # copies, not counting one of each group
    across_classes: int  # copies whose label differs from that of the first of their group
    groups: list[list[str]]  # the places of equal pictures


@dataclass(frozen=True)
class Captions:
    """The captions of a set."""

    pictures: int  # that have a caption
    several: int  # of these, pictures with more than one
    longest: int  # characters of the longest caption
    longest_bytes: int  # of the longest one in UTF-8
    examples: list[str]
    place: str  # where they are; "" for the embedded sets


@dataclass(frozen=True)
class Report:
    """The report on a set; plain values, as in the JSON file."""

    data: str
    pictures: int  # files, including bad ones
    bad: list[BadFile]
    classes: dict[str, int]  # usable pictures of each
    width: Range | None  # None: no picture is usable
    height: Range | None
    modes: dict[str, int]  # pictures of each colour mode, by Pillow's names
    duplicates: Duplicates
    train: int  # sizes of the splits, without bad pictures
    heldout: int
    captions: Captions | None = None  # None: no picture has one
    remarks: list[str] = field(default_factory=list)  # possible problems that are not errors


def inspect(
    data: str,
    pictures: ImageSource | EncodedPictures,
    options: FolderOptions,
    *,
    value_range: ValueRange | None = None,
    heldout_fraction: float,
    split_seed: int,
) -> Report:
    """Decode all pictures of a set, and report on them."""
    findings = findings_of(pictures, options, value_range)
    good = [row for row, found in enumerate(findings) if not found.problem]
    used = [findings[row] for row in good]
    labels = pictures.labels[good]
    remarks = list(pictures.remarks)
    counts = Counter(labels.tolist())
    names = pictures.classes
    if isinstance(pictures, EncodedPictures) and len(pictures):
        names, remark = classes_kept(data, names, pictures.labels, options)
        remarks += [remark] if remark else []
    classes = {name: counts[number] for number, name in enumerate(names)}
    duplicates = _duplicates(pictures, good, used, labels)
    heldout = _num_heldout(pictures, good, used, heldout_fraction, split_seed, remarks)
    remarks += _remarks(classes, duplicates)
    captions = _captions(pictures, remarks)
    remarks += _remarks_on_files(pictures, findings)
    deep = sum(found.extent is not None for found in findings)
    if remark := without_effect(data, value_range, deep):
        remarks.append(remark)
    return Report(
        data=data,
        pictures=len(findings),
        bad=[
            BadFile(_place(pictures, row), found.problem)
            for row, found in enumerate(findings)
            if found.problem
        ],
        classes=classes,
        width=_range([found.width for found in used]),
        height=_range([found.height for found in used]),
        modes=dict(Counter(found.mode for found in used).most_common()),
        duplicates=duplicates,
        train=len(good) - heldout,
        heldout=heldout,
        captions=captions,
        remarks=remarks,
    )


def findings_of(
    pictures: ImageSource | EncodedPictures,
    options: FolderOptions,
    value_range: ValueRange | None = None,
) -> list[Finding]:
    """The result of decoding every picture; the sha256 is of the pixels where there is no file."""
    if isinstance(pictures, EncodedPictures):
        return verify(pictures, options, value_range)

    def examine(index: int) -> Finding:
        image = pictures.read(index)
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes())
        return Finding(digest.hexdigest(), None, False, *image.size, image.mode)

    return in_threads(examine, len(pictures), "check pictures")


def summary(report: Report) -> str:
    """The report in a few lines of text."""
    shown = list(report.classes.items())[:SHOWN_CLASSES]
    more = len(report.classes) - len(shown)
    lines = [
        f"{report.data}: {report.pictures} pictures, {len(report.bad)} of them bad",
        f"classes: {len(report.classes) or 'none'}",
        *(f"  {count:8}  {name or '(none)'}" for name, count in shown),
        *([f"  and {more} more"] if more else []),
    ]
    for side, values in (("width", report.width), ("height", report.height)):
        if values:
            lines.append(f"{side}: {values.min} to {values.max} pixels, median {values.median:g}")
    modes = ", ".join(f"{count} {mode}" for mode, count in report.modes.items())
    lines += [
        *_caption_lines(report.captions),
        f"colours: {modes or 'none'}",
        f"copies: {report.duplicates.extra}, under another label "
        f"{report.duplicates.across_classes}",
        f"split: {report.train} to train on, {report.heldout} held out",
        *(f"note: {remark}" for remark in report.remarks),
    ]
    return "\n".join(lines)


def _caption_lines(captions: Captions | None) -> list[str]:
    if captions is None:
        return ["captions: none"]
    return [
        f"captions: {captions.pictures} pictures have one, {captions.several} of them several; the "
        f"longest has {captions.longest} characters, {captions.longest_bytes} bytes"
        + (f" ({captions.place})" if captions.place else ""),
        *(f"  {printable(text)}" for text in captions.examples),
    ]


def _captions(pictures: ImageSource | EncodedPictures, remarks: list[str]) -> Captions | None:
    """The captions of all pictures that have any; a problem is added to `remarks`."""
    place = ""
    if isinstance(pictures, EncodedPictures):
        place = pictures.captions_from
        captioned, problem = captions_found(pictures, read=True)
        remarks += [f"captions are not used: {problem}"] if problem else []
        rows = captioned.nonzero().flatten().tolist()
    else:
        rows = range(len(pictures))
    found = [texts for texts in map(pictures.captions, rows) if texts]
    if not found:
        return None
    texts = [text for of_picture in found for text in of_picture]
    step = -(-len(found) // SHOWN_CAPTIONS)
    return Captions(
        pictures=len(found),
        several=sum(len(of_picture) > 1 for of_picture in found),
        longest=max(map(len, texts)),
        longest_bytes=max(len(text.encode()) for text in texts),
        examples=[of_picture[0] for of_picture in found[::step]],
        place=place,
    )


def _place(pictures: ImageSource | EncodedPictures, row: int) -> str:
    return pictures.place(row) if isinstance(pictures, EncodedPictures) else pictures.name(row)


def _range(sides: list[int]) -> Range | None:
    return Range(min(sides), median(sides), max(sides)) if sides else None


def _duplicates(
    pictures: ImageSource | EncodedPictures, good: list[int], used: list[Finding], labels: Tensor
) -> Duplicates:
    same: dict[str, list[int]] = {}
    for number, found in enumerate(used):
        same.setdefault(found.sha256, []).append(number)
    groups = [numbers for numbers in same.values() if len(numbers) > 1]
    across = sum(
        sum(labels[number].item() != labels[numbers[0]].item() for number in numbers)
        for numbers in groups
    )
    places = [[_place(pictures, good[number]) for number in numbers] for numbers in groups]
    return Duplicates(sum(len(numbers) - 1 for numbers in groups), across, places)


def _num_heldout(
    pictures: ImageSource | EncodedPictures,
    good: list[int],
    used: list[Finding],
    fraction: float,
    seed: int,
    remarks: list[str],
) -> int:
    if not good:
        return 0
    if pictures.heldout is not None:
        return int(pictures.heldout[good].sum())
    # Grouped as in training: by the source, or else equal files form a group.
    if isinstance(pictures, ImageSource):
        groups = [pictures.group(row) for row in good]
    else:
        groups = [found.sha256 for found in used]
    try:
        return int(divide(pictures.labels[good], groups, fraction, seed).sum())
    except SmaltiError as error:
        remarks.append(str(error))
        return 0


def _remarks(classes: dict[str, int], duplicates: Duplicates) -> list[str]:
    remarks = []
    small = [name or "(none)" for name, count in classes.items() if count < SMALL_CLASS]
    if small:
        named = ", ".join(small[:SHOWN_CLASSES]) + (", ..." if len(small) > SHOWN_CLASSES else "")
        remarks.append(f"{len(small)} classes with fewer than {SMALL_CLASS} pictures: {named}")
    if duplicates.across_classes:
        remarks.append("the same picture has two labels: see duplicates in --json")
    return remarks


def _remarks_on_files(
    pictures: ImageSource | EncodedPictures, findings: list[Finding]
) -> list[str]:
    remarks = []
    deep = [found.extent for found in findings if found.extent]
    if deep:
        limits = common_range(deep)
        values = (min(extent.low for extent in deep), max(extent.high for extent in deep))
        fits = f"--value_range {written(limits)} fits all" if limits else "no range fits all"
        remarks.append(
            f"{len(deep)} pictures with more than 8 bits per channel, values from {values[0]:g} to "
            f"{values[1]:g}: {fits}"
        )
    noted = [row for row, found in enumerate(findings) if found.note]
    if noted:
        remarks.append(
            f"{len(noted)} pictures whose metadata are ignored, the first "
            f"{printable(_place(pictures, noted[0]))}: {findings[noted[0]].note}"
        )
    return remarks


# -------------------------------------------------------------------------------------------------
# The report of `smalti info` on latent caches and shards


def of_cache(path: Path) -> Info:
    """Report on a latent cache, or on a folder with the caches of several splits."""
    folders = [path] if holds_latents(path) else splits(path)
    lines, complete = [("kind", "latent cache")], True
    if (path / BUCKETS).is_file():
        names = [inside.name for inside in bucket_folders(path)]
        lines.append(("buckets", f"{', '.join(names)} (height x width, the default first)"))
        folders = [split for inside in bucket_folders(path) for split in splits(inside)]
    for folder in folders:
        name = "" if folder == path else f"{folder.relative_to(path)}: "
        if (folder / MANIFEST).is_file():
            found = read_manifest(folder)
            bad = [f"{shard} differs from the manifest" for shard in _damaged_shards(folder, found)]
            bad += _damaged_options(folder)
            lines += _cache_lines(name, found)
        else:
            bad = ["not finished: repeat the command that writes it"]
        lines.append(("verified", f"{name}no: {bad[0]}" if bad else f"{name}yes: all shards"))
        complete = complete and not bad
    both = _of_both_splits(path.parent if folders == [path] else path)
    if both is not None:
        saved = both / TOKENIZER  # of a checkpoint
        tokenizer = saved if saved.is_dir() else "THE_TOKENIZER"
        options = ("--latents", both, "--tokenizer", tokenizer)
        lines.append(("next", command("train-prior", *options)))
    return Info(lines, complete)


def _damaged_options(folder: Path) -> list[str]:
    """What is wrong with the stored options of the pictures; empty if nothing."""
    try:
        read_options(folder)
    except SmaltiError as error:
        return [str(error)]
    return []


def _of_both_splits(path: Path) -> Path | None:
    """The folder if it has a cache for each split, as `train-prior` needs."""
    both = all(holds_latents(path / split) for split in SPLITS)
    return path if both or (path / BUCKETS).is_file() else None


def _cache_lines(name: str, found: CacheInfo) -> list[tuple[str, str]]:
    views = ", ".join(found.views)
    return [
        ("latents", f"{name}{found.num_samples:,} x {views}, {found.spec.in_words}"),
        ("classes", f"{name}{len(found.classes) or 'none'}"),
        *([("captions", f"{name}yes")] if found.captions else []),
        *[("condition", f"{name}{condition.in_words}") for condition in found.conditions],
        ("tokenizer", found.tokenizer_fingerprint[:12]),
    ]


def holds_latents(path: Path) -> bool:
    """Whether a folder is a latent cache, finished or not."""
    manifest = (path / MANIFEST).is_file() and not is_shards(path)
    return manifest or shard_path(path, 0).is_file()


def splits(path: Path) -> list[Path]:
    """The caches in a folder."""
    return sorted(folder for folder in path.iterdir() if holds_latents(folder))


def _damaged_shards(folder: Path, found: CacheInfo) -> list[str]:
    """Names of shards that are missing, or that differ from the manifest: in their hash, or in the
    contents of the manifest that they were written for."""
    identity = found.identity()

    def is_as_written(file: Path, sha256: str) -> bool:
        return file.is_file() and sha256_of(file) == sha256 and identity_in(file) == identity

    files = [shard_path(folder, number) for number in range(found.num_shards)]
    pairs = zip(files, found.shards, strict=True)
    return [file.name for file, sha256 in pairs if not is_as_written(file, sha256)]


def of_shards(path: Path) -> Info:
    """Report on pictures in WebDataset shards with a manifest."""
    lines = [("kind", "WebDataset shards")]
    try:
        found = ShardPictures(str(path), sorted(path.glob("*.tar")), expect_all=True)
    except SmaltiError as error:
        return Info([*lines, ("verified", f"no: {error}")], whole=False)
    lines += [
        ("shards", f"{len(found.shards)}"),
        ("pictures", f"{len(found)}, not decoded here"),
        ("classes", f"{len(found.classes) or 'none'}"),
        ("verified", "yes: each shard has the number of samples in the manifest"),
        ("next", command("check-data", "--data", path)),
    ]
    return Info(lines)


def is_shards(path: Path) -> bool:
    """Whether the manifest in a folder is that of shards, as check-data writes it."""
    if not (path / MANIFEST).is_file():
        return False
    content = read_json(path / MANIFEST)
    return isinstance(content, dict) and isinstance(content.get("shards"), dict)
