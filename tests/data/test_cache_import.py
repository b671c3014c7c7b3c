"""Latents of other code are imported completely, or the message names a file."""

import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from smalti.data.latent_cache.cache import LatentCache
from smalti.data.latent_cache.imports import (
    TEN_CROPS,
    Division,
    Origin,
    import_latents,
    open_foreign,
)
from smalti.data.latents import CodeSpec, ContinuousSpec
from smalti.data.transforms import VIEW_SETS
from smalti.errors import SmaltiError

COUNT = 30
CODES = Origin(CodeSpec(64, ((2, 3),)), "the tokenizer", (6,))
REAL = Origin(
    ContinuousSpec(2, 3, 4),
    "the tokenizer",
    stored_shape=(4, 3, 4),
    stored_statistics=("mean", "std"),
    mean=(1.0, -2.0),
    std=(0.5, 4.0),
)
SMALL = Division(heldout_fraction=0.2, shard_size=4)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def llamagen(root: Path, views: int = 10) -> np.ndarray:
    """Write LlamaGen's folders; return all codes, (N, views, L)."""
    codes = np.random.default_rng(0).integers(0, 64, (COUNT, views, 6))
    for name in ("codes", "labels"):
        (root / f"emoji256_{name}").mkdir(parents=True)
    for i in range(COUNT):
        np.save(root / "emoji256_codes" / f"{i}.npy", codes[i : i + 1])
        np.save(root / "emoji256_labels" / f"{i}.npy", np.array([i % 3]))
    return codes


def lightningdit(root: Path, *, flip: bool = True) -> torch.Tensor:
    """Write LightningDiT's shards, of two processes; return all latents (N, views, C, h, w)."""
    root.mkdir()
    noise = torch.randn(COUNT, 1 + flip, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    unit = torch.tensor(REAL.mean), torch.tensor(REAL.std)
    latents = noise * unit[1].view(2, 1, 1) + unit[0].view(2, 1, 1)
    for number, start in enumerate(range(0, COUNT, 8)):
        rows = latents[start : start + 8]
        tensors = {"latents": rows[:, 0], "labels": torch.arange(start, start + len(rows)) % 3}
        if flip:
            tensors["latents_flip"] = rows[:, 1]
        name = f"latents_rank{number // 2:02d}_shard{number % 2:03d}.safetensors"
        content = {key: value.contiguous() for key, value in tensors.items()}
        save_file(content, root / name, metadata={"total_size": str(len(rows))})
    statistics = {name: v.view(1, 2, 1, 1) for name, v in zip(("mean", "std"), unit, strict=True)}
    torch.save(statistics, root / "latents_stats.pt")
    return latents


def take(
    source: Path,
    out: Path,
    layout,
    division: Division = SMALL,
    *,
    normalised: bool = False,
    origin: Origin | None = None,
) -> tuple[LatentCache, LatentCache]:
    origin = origin or (CODES if layout == "llamagen" else REAL)
    import_latents(open_foreign(source, layout, origin, normalised), origin, out, division)
    return LatentCache(out / "train"), LatentCache(out / "heldout")


def joined(train: LatentCache, heldout: LatentCache) -> list[tuple[int, bytes]]:
    """(label, first view) of all samples, sorted."""
    pairs = []
    for cache in (train, heldout):
        first = cache.all_views(range(len(cache)))[:, 0]
        pairs += [(int(k), row.tobytes()) for k, row in zip(cache.labels, first, strict=True)]
    return sorted(pairs)


@pytest.mark.parametrize("views", [1, 2, 10])
def test_codes_of_llamagen_are_imported_completely(tmp_path: Path, views: int) -> None:
    codes = llamagen(tmp_path / "src", views)
    train, heldout = take(tmp_path / "src", tmp_path / "out", "llamagen")
    order = list(TEN_CROPS) if views == 10 else list(range(views))
    expected = codes[:, order].astype(np.uint16)
    assert joined(train, heldout) == sorted((i % 3, expected[i, 0].tobytes()) for i in range(COUNT))
    found = {row.tobytes() for row in train.all_views(range(len(train)))}
    assert found <= {row.tobytes() for row in expected} and len(found) == len(train)
    assert len(train.info.views) == views and heldout.info.views == train.info.views[:1]
    assert train.info.views in VIEW_SETS.values()
    assert train.classes == ("0", "1", "2") and train.info.tokenizer_fingerprint == "the tokenizer"


@pytest.mark.parametrize("flip", [False, True])
def test_latents_of_lightningdit_are_imported_completely(tmp_path: Path, flip: bool) -> None:
    latents = lightningdit(tmp_path / "src", flip=flip)
    train, heldout = take(tmp_path / "src", tmp_path / "out", "lightningdit")
    expected = torch.cat([latents, torch.zeros_like(latents)], 2).numpy().astype(np.float16)
    assert joined(train, heldout) == sorted((i % 3, expected[i, 0].tobytes()) for i in range(COUNT))
    found = {row.tobytes() for row in train.all_views(range(len(train)))}
    assert found <= {row.tobytes() for row in expected} and len(found) == len(train)
    assert train.info.views == VIEW_SETS["flip" if flip else "identity"]


def test_a_tokenizer_without_statistics_stores_the_latents_alone(tmp_path: Path) -> None:
    latents = lightningdit(tmp_path / "src")
    plain = replace(REAL, stored_shape=(2, 3, 4), stored_statistics=())
    train, heldout = take(tmp_path / "src", tmp_path / "out", "lightningdit", origin=plain)
    expected = latents.numpy().astype(np.float16)
    assert joined(train, heldout) == sorted((i % 3, expected[i, 0].tobytes()) for i in range(COUNT))
    assert train.info.shape == (2, 3, 4) and train.info.statistics == ()
    other = replace(REAL, stored_statistics=("mean", "logvar"))
    with pytest.raises(SmaltiError, match="the tokenizer stores mean, logvar"):
        take(tmp_path / "src", tmp_path / "other", "lightningdit", origin=other)


def test_normalised_latents_are_imported_raw(tmp_path: Path) -> None:
    raw = lightningdit(tmp_path / "raw")
    lightningdit(tmp_path / "unit")
    mean, std = (torch.tensor(values).view(2, 1, 1) for values in (REAL.mean, REAL.std))
    for number, start in enumerate(range(0, COUNT, 8)):
        rows = ((raw[start : start + 8] - mean) / std).unbind(1)
        tensors = dict(zip(("latents", "latents_flip"), map(torch.clone, rows), strict=True))
        tensors["labels"] = torch.arange(start, min(start + 8, COUNT)) % 3
        name = f"latents_rank{number // 2:02d}_shard{number % 2:03d}.safetensors"
        save_file(tensors, tmp_path / "unit" / name)
    one, _ = take(tmp_path / "raw", tmp_path / "one", "lightningdit")
    two, _ = take(tmp_path / "unit", tmp_path / "two", "lightningdit", normalised=True)
    keys = range(len(one))
    torch.testing.assert_close(
        one.first_view(keys).stored, two.first_view(keys).stored, rtol=2e-3, atol=2e-3
    )
    assert one.info.imported != two.info.imported
    (tmp_path / "unit" / "latents_stats.pt").unlink()
    with pytest.raises(SmaltiError, match=r"latents_stats\.pt is missing"):
        take(tmp_path / "unit", tmp_path / "three", "lightningdit", normalised=True)


@pytest.mark.parametrize("layout", ["llamagen", "lightningdit"])
def test_an_import_is_the_same_on_two_processes_and_after_a_kill(tmp_path: Path, layout) -> None:
    (llamagen if layout == "llamagen" else lightningdit)(tmp_path / "src")
    take(tmp_path / "src", tmp_path / "one", layout)
    origin = CODES if layout == "llamagen" else REAL
    latents = open_foreign(tmp_path / "src", layout, origin, False)
    original, reads = latents.read, []

    def killed(indices):
        if reads:
            raise KeyboardInterrupt
        reads.append(indices)
        return original(indices)

    latents.read = killed
    with pytest.raises(KeyboardInterrupt):
        import_latents(latents, origin, tmp_path / "two", SMALL)
    latents.read = original
    kept = (tmp_path / "two" / "train" / "shard-00000.safetensors").stat().st_mtime_ns
    for rank in (1, 0):
        # A process that does not wait for the others finds their shards missing: it comes last.
        import_latents(latents, origin, tmp_path / "two", SMALL, rank=rank, world_size=2)
    names = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*")]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "two" / "train" / "shard-00000.safetensors").stat().st_mtime_ns == kept


def test_classes_are_named_beside_the_latents(tmp_path: Path) -> None:
    llamagen(tmp_path / "src")
    (tmp_path / "src" / "classes.json").write_text('["cat", "dog", "bird", "fish"]')
    train, heldout = take(tmp_path / "src", tmp_path / "out", "llamagen")
    assert train.classes == heldout.classes == ("cat", "dog", "bird", "fish")
    (tmp_path / "src" / "classes.json").write_text('["cat", "dog"]')
    with pytest.raises(SmaltiError, match="labels go up to 2"):
        take(tmp_path / "src", tmp_path / "other", "llamagen")


def test_an_import_of_other_latents_is_not_continued(tmp_path: Path) -> None:
    llamagen(tmp_path / "src")
    take(tmp_path / "src", tmp_path / "out", "llamagen")
    np.save(tmp_path / "src" / "emoji256_labels" / "3.npy", np.array([2]))
    with pytest.raises(SmaltiError, match="latents of other pictures"):
        take(tmp_path / "src", tmp_path / "out", "llamagen")


@pytest.mark.parametrize("layout", ["llamagen", "lightningdit"])
def test_the_number_of_samples_is_checked(tmp_path: Path, layout) -> None:
    (llamagen if layout == "llamagen" else lightningdit)(tmp_path / "src")
    take(tmp_path / "src", tmp_path / "out", layout, Division(num_samples=COUNT))
    with pytest.raises(SmaltiError, match="holds 30 samples, and --num_samples is 31"):
        take(tmp_path / "src", tmp_path / "other", layout, Division(num_samples=31))
    assert not (tmp_path / "other").exists()


# -- faults -----------------------------------------------------------------------------------


def renamed(old: str, new: str):
    return lambda root: (root / old).rename(root / new)


def saved(name: str, array: np.ndarray):
    return lambda root: np.save(root / name, array)


def removed(name: str):
    return lambda root: (root / name).unlink()


def cut(name: str):
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-7])


A, B = "emoji256_codes", "emoji256_labels"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (removed(f"{A}/7.npy"), r"emoji256_codes/7\.npy is missing"),
        (removed(f"{A}/29.npy"), r"emoji256_codes/29\.npy is missing"),
        (removed(f"{B}/7.npy"), r"emoji256_labels/7\.npy is missing"),
        (renamed(f"{A}/7.npy", f"{A}/30.npy"), r"emoji256_codes/7\.npy is missing"),
        (renamed(f"{A}/7.npy", f"{A}/07.npy"), r"07\.npy has leading zeros: rename it to 7\.npy"),
        (renamed(f"{A}/7.npy", f"{A}/x.npy"), r"x\.npy is not a numbered \.npy file"),
        (renamed(B, "labels"), "emoji256_labels of the labels is missing"),
        (renamed(A, "codes"), "one folder NAME_codes; it has none"),
        (cut(f"{A}/7.npy"), r"emoji256_codes/7\.npy is damaged"),
        (cut(f"{B}/7.npy"), r"emoji256_labels/7\.npy is damaged"),
        (saved(f"{A}/7.npy", np.zeros((1, 10, 7), int)), r"7\.npy has shape \(1, 10, 7\)"),
        (saved(f"{A}/7.npy", np.zeros((1, 2, 6), int)), r"7\.npy has shape \(1, 2, 6\)"),
        (saved(f"{A}/0.npy", np.zeros((1, 3, 6), int)), r"0\.npy has shape \(1, 3, 6\)"),
        (saved(f"{A}/7.npy", np.full((1, 10, 6), 64)), r"7\.npy holds codes from 64 to 64"),
        (saved(f"{A}/7.npy", np.zeros((1, 10, 6))), r"7\.npy holds float64"),
        (saved(f"{B}/7.npy", np.array([-1])), r"labels/7\.npy holds \[-1\]"),
        (saved(f"{B}/7.npy", np.array([1, 2])), r"labels/7\.npy holds \[1, 2\]"),
    ],
)
def test_a_fault_in_llamagens_files_is_named(tmp_path: Path, damage, message) -> None:
    llamagen(tmp_path / "src")
    damage(tmp_path / "src")
    with pytest.raises(SmaltiError, match=message):
        take(tmp_path / "src", tmp_path / "out", "llamagen")
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


def rewritten(name: str, **tensors: torch.Tensor):
    def write(root: Path) -> None:
        content = {
            "latents": torch.ones(8, 2, 3, 4),
            "latents_flip": torch.ones(8, 2, 3, 4),
            "labels": torch.zeros(8, dtype=torch.int64),
            **tensors,
        }
        kept = {key: value for key, value in content.items() if value.numel()}
        save_file(kept, root / name, metadata={"total_size": "8"})

    return write


def statistics(mean: float, std: float):
    values = {"mean": torch.full((1, 2, 1, 1), mean), "std": torch.full((1, 2, 1, 1), std)}
    return lambda root: torch.save(values, root / "latents_stats.pt")


R = "latents_rank00_shard001.safetensors"
EMPTY, NAN = torch.empty(0), torch.full((8, 2, 3, 4), float("nan"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (removed(R), f"{R} is missing"),
        (removed("latents_rank01_shard001.safetensors"), "latents_rank01_shard001.* is missing"),
        (renamed(R, "latents_rank00_shard002.safetensors"), f"{R} is missing"),
        (renamed(R, "latents_rank0_shard0.safetensors"), "are the same shard"),
        (renamed(R, "more.safetensors"), r"more\.safetensors is not named like the other"),
        (cut(R), f"{R} is damaged"),
        (rewritten(R, latents_flip=EMPTY), f"{R} holds labels, latents; it must hold"),
        (rewritten(R, labels=EMPTY), f"{R} holds latents, latents_flip; it must hold"),
        (rewritten(R, labels=torch.zeros(7, dtype=torch.int64)), f"{R} is F32 .* 7 labels"),
        (rewritten(R, latents=torch.ones(8, 2, 3, 5)), f"latents of .*{R} is F32"),
        (rewritten(R, latents=torch.ones(8, 2, 3, 4, dtype=torch.int32)), f"{R} is I32"),
        (rewritten(R, latents=NAN), f"row . of .*{R} holds numbers that are not finite"),
        (rewritten(R, labels=torch.full((8,), -1)), f"labels of .*{R} must be integers"),
        (statistics(0.0, 1.0), "channel 0 has mean 0 and std 1, and the tokenizer normalises"),
        (statistics(0.0, float("nan")), r"latents_stats\.pt must hold mean and std of 2"),
        (cut("latents_stats.pt"), r"latents_stats\.pt is damaged"),
    ],
)
def test_a_fault_in_lightningdits_files_is_named(tmp_path: Path, damage, message) -> None:
    lightningdit(tmp_path / "src")
    damage(tmp_path / "src")
    with pytest.raises(SmaltiError, match=message):
        take(tmp_path / "src", tmp_path / "out", "lightningdit")
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


def test_a_shard_that_lost_samples_is_named(tmp_path: Path) -> None:
    lightningdit(tmp_path / "src")
    tensors = {"latents": torch.ones(5, 2, 3, 4), "labels": torch.zeros(5, dtype=torch.int64)}
    tensors["latents_flip"] = tensors["latents"] + 1
    save_file(tensors, tmp_path / "src" / R, metadata={"total_size": "8"})
    with pytest.raises(SmaltiError, match=f"{R} holds 5 samples, but its header declares 8"):
        take(tmp_path / "src", tmp_path / "out", "lightningdit")


def test_bombs_are_refused_before_memory_is_allocated(tmp_path: Path) -> None:
    llamagen(tmp_path / "a")
    with (tmp_path / "a" / A / "7.npy").open("wb") as stream:
        header = {"descr": "<i8", "fortran_order": False, "shape": (1, 10, 10**12)}
        np.lib.format.write_array_header_1_0(stream, header)
    with pytest.raises(SmaltiError, match=r"7\.npy .* its header declares 80000000000000 bytes"):
        take(tmp_path / "a", tmp_path / "out", "llamagen")
    (tmp_path / "a" / A / "7.npy").unlink()
    os.mkfifo(tmp_path / "a" / A / "7.npy")
    with pytest.raises(SmaltiError, match=r"7\.npy is not a file"):
        take(tmp_path / "a", tmp_path / "out", "llamagen")

    lightningdit(tmp_path / "b")
    expanded = torch.zeros(1).expand(10**12)  # one number with a stride of zero
    torch.save({"mean": expanded, "std": expanded}, tmp_path / "b" / "latents_stats.pt")
    with pytest.raises(SmaltiError, match=r"latents_stats\.pt must hold mean and std of 2"):
        take(tmp_path / "b", tmp_path / "out", "lightningdit")
    with zipfile.ZipFile(tmp_path / "b" / "latents_stats.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", bytes(2**23))
    with pytest.raises(SmaltiError, match=r"latents_stats\.pt is too large for the mean and std"):
        take(tmp_path / "b", tmp_path / "out", "lightningdit")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    fuse = tmp_path / "exploded"
    llamagen(tmp_path / "a")
    np.save(tmp_path / "a" / A / "7.npy", np.array([Bomb(fuse)], dtype=object), allow_pickle=True)
    with pytest.raises(SmaltiError, match=r"7\.npy is damaged, or not an array of plain numbers"):
        take(tmp_path / "a", tmp_path / "out", "llamagen")
    lightningdit(tmp_path / "b")
    torch.save({"mean": Bomb(fuse)}, tmp_path / "b" / "latents_stats.pt")
    with pytest.raises(
        SmaltiError, match=r"latents_stats\.pt is damaged, or holds more than tensors"
    ):
        take(tmp_path / "b", tmp_path / "out", "lightningdit")
    assert not fuse.exists()


def test_latents_of_another_kind_of_tokenizer_are_refused(tmp_path: Path) -> None:
    llamagen(tmp_path / "a")
    lightningdit(tmp_path / "b")
    with pytest.raises(SmaltiError, match="makes continuous latents"):
        open_foreign(tmp_path / "a", "llamagen", REAL, False)
    with pytest.raises(SmaltiError, match="makes codes"):
        open_foreign(tmp_path / "b", "lightningdit", CODES, False)
    with pytest.raises(SmaltiError, match="leave out --normalised"):
        open_foreign(tmp_path / "a", "llamagen", CODES, True)
    with pytest.raises(SmaltiError, match="does not exist"):
        open_foreign(tmp_path / "nowhere", "llamagen", CODES, False)
