"""The report of `smalti info` on latent caches and on pictures in shards."""

from pathlib import Path

from smalti.data.latent_cache.cache import MANIFEST, SPLITS, CacheInfo, read_manifest, shard_path
from smalti.data.latents import CodeSpec, LatentSpec
from smalti.data.sources.webdataset import ShardPictures
from smalti.errors import SmaltiError
from smalti.files import read_json, sha256_of
from smalti.folder_info import Info, command


def of_cache(path: Path) -> Info:
    """Report on a latent cache, or on a folder with the caches of several splits."""
    folders = [path] if holds_latents(path) else splits(path)
    lines, whole = [("kind", "latent cache")], True
    for folder in folders:
        name = "" if folder == path else f"{folder.name}: "
        if (folder / MANIFEST).is_file():
            found = read_manifest(folder)
            bad = [f"{shard} differs from the manifest" for shard in _damaged_shards(folder, found)]
            lines += _cache_lines(name, found)
        else:
            bad = ["not finished: run the command that began it again"]
        lines.append(("verified", f"{name}no: {bad[0]}" if bad else f"{name}yes: all shards"))
        whole = whole and not bad
    both = _of_both_splits(path.parent if folders == [path] else path)
    if both is not None:
        options = ("--latents", both, "--tokenizer", "THE_TOKENIZER")
        lines.append(("go on", command("train-prior", *options)))
    return Info(lines, whole)


def _of_both_splits(path: Path) -> Path | None:
    """The folder if it has a cache for each split, as `train-prior` needs."""
    return path if all(holds_latents(path / split) for split in SPLITS) else None


def _cache_lines(name: str, found: CacheInfo) -> list[tuple[str, str]]:
    views = ", ".join(found.views)
    return [
        ("latents", f"{name}{found.num_samples:,} x {views}, {spec_in_words(found.spec)}"),
        ("classes", f"{name}{len(found.classes)}"),
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
    """Names of shards that are missing, or whose hash differs from the manifest."""
    files = [shard_path(folder, number) for number in range(found.num_shards)]
    pairs = zip(files, found.shards, strict=True)
    return [file.name for file, hash in pairs if not file.is_file() or sha256_of(file) != hash]


def spec_in_words(spec: LatentSpec) -> str:
    """A latent spec in words."""
    if isinstance(spec, CodeSpec):
        grids = ", ".join(f"{height} x {width}" for height, width in spec.grids)
        return f"{spec.length} codes of {spec.vocab_size:,} ({grids})"
    return f"{spec.channels} x {spec.height} x {spec.width} numbers"


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
        ("classes", f"{len(found.classes)}"),
        ("verified", "yes: each shard holds as many samples as the manifest says"),
        ("go on", command("check-data", "--data", path)),
    ]
    return Info(lines)


def is_shards(path: Path) -> bool:
    """Whether the manifest in a folder is that of shards, as check-data writes it."""
    if not (path / MANIFEST).is_file():
        return False
    content = read_json(path / MANIFEST)
    return isinstance(content, dict) and isinstance(content.get("shards"), dict)
