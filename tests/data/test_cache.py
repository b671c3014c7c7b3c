"""The latent cache: equal files at any world size, resumable, refused when damaged."""

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from smalti.data.dataset import DataOptions, write_options
from smalti.data.latent_cache import cache as cache_module
from smalti.data.latent_cache.cache import EncodedRange, LatentCache, write_cache
from smalti.data.latent_cache.manifest import CacheInfo, StoredCondition, read_manifest
from smalti.data.latent_cache.splits import open_splits
from smalti.data.latents import CodeSpec, ContinuousSpec
from smalti.data.transforms import VIEW_SETS
from smalti.errors import SmaltiError
from smalti.files import sha256_of

INFO = CacheInfo(
    spec=CodeSpec(70000, ((2, 3),)),
    classes=("a", "b"),
    num_samples=10,
    views=("identity", "flip"),
    tokenizer_fingerprint="t",
    dataset_fingerprint="d",
    shard_size=4,
)


def encode(start: int, stop: int) -> EncodedRange:
    """Sample i, view v holds the codes 1000 i + 100 v + 0..5 (beyond 16 bits for i > 65)."""
    codes = torch.arange(6) + 1000 * torch.arange(start, stop)[:, None, None]
    views = torch.cat([codes, codes + 100], dim=1)
    return EncodedRange(views, torch.arange(start, stop) % 2)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_round_trip(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", INFO, encode)
    cache = LatentCache(tmp_path / "c")
    assert len(cache) == 10 and cache.spec == INFO.spec and cache.classes == ("a", "b")
    batch = cache.first_view([7, 2])
    assert batch.stored.dtype == torch.int64
    assert batch.stored.tolist() == [[7000 + i for i in range(6)], [2000 + i for i in range(6)]]
    assert batch.labels.tolist() == [1, 0] and batch.indices.tolist() == [7, 2]


def test_views_are_a_pure_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", INFO, encode)
    keys = [(epoch, index) for epoch in range(20) for index in range(10)]
    once, again, other = (
        LatentCache(tmp_path / "c", seed=seed).__getitems__(keys).stored for seed in (0, 0, 1)
    )
    assert torch.equal(once, again) and not torch.equal(once, other)
    flipped = (once[:, 0] % 1000 == 100).float().mean()
    assert 0.35 < flipped < 0.65


def test_training_sees_all_ten_views_and_evaluation_the_first(tmp_path: Path) -> None:
    info = replace(INFO, views=VIEW_SETS["ten-crop"], num_samples=4)
    codes = (100 * torch.arange(4)[:, None, None] + torch.arange(10)[:, None]).expand(4, 10, 6)
    labels = torch.zeros(4, dtype=torch.int64)
    write_cache(tmp_path / "c", info, lambda a, b: EncodedRange(codes, labels))
    cache = LatentCache(tmp_path / "c")
    shown = [cache.__getitems__([(e, i) for i in range(4)]).stored[:, 0] for e in range(60)]
    counts = (torch.stack(shown) % 100).flatten().bincount(minlength=10)
    assert counts.min() > 10 and counts.max() < 40  # 24 each on average
    assert cache.first_view(range(4)).stored[:, 0].tolist() == [0, 100, 200, 300]


def test_a_batch_joins_samples_of_all_shards_in_the_order_of_its_keys(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", INFO, encode)
    cache = LatentCache(tmp_path / "c")
    wanted = [9, 0, 5, 4, 3, 9]
    batch = cache.__getitems__([(3, i) for i in wanted])
    assert (batch.stored[:, 0] // 1000).tolist() == wanted == batch.indices.tolist()
    assert batch.labels.tolist() == [i % 2 for i in wanted]
    everything = cache.all_views(range(10))
    assert everything.dtype == np.int32
    assert np.array_equal(everything, encode(0, 10).stored.numpy())


def test_a_worker_process_maps_the_files_again(tmp_path: Path) -> None:
    info = replace(INFO, num_samples=4000, shard_size=1000)
    write_cache(tmp_path / "c", info, encode_small)
    cache = LatentCache(tmp_path / "c")
    cache.first_view([0])
    content = pickle.dumps(cache)
    assert len(content) < 4000 * (8 + 4)  # labels, but no codes
    assert torch.equal(
        pickle.loads(content).first_view([7, 3999]).stored, cache.first_view([7, 3999]).stored
    )


def encode_small(start: int, stop: int) -> EncodedRange:
    return EncodedRange(encode(start, stop).stored % 70000, torch.arange(start, stop) % 2)


READ_WITHIN = """
import resource, sys
from smalti.data.latent_cache.cache import LatentCache
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
limit = (used << 10) + (48 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
cache = LatentCache(sys.argv[1])
print(cache.first_view(range(0, len(cache), 64)).stored.mean().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_cache_larger_than_memory_is_read(tmp_path: Path) -> None:
    """128 MiB of latents, by a process that may allocate 48 MiB more than its imports did."""
    info = replace(INFO, spec=ContinuousSpec(4, 32, 32), views=("identity",))
    info = replace(info, num_samples=8192, shard_size=2048)
    ones = EncodedRange(torch.ones(2048, 1, 8, 32, 32), torch.zeros(2048, dtype=torch.int64))
    write_cache(tmp_path / "c", info, lambda a, b: ones)
    assert sum(p.stat().st_size for p in (tmp_path / "c").glob("shard-*")) > 2 * 48 << 20
    command = [sys.executable, "-c", READ_WITHIN, str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "1.0", done.stderr[-2000:]


def test_any_world_size_writes_the_same_files(tmp_path: Path) -> None:
    write_cache(tmp_path / "one", INFO, encode)
    for rank in (1, 0):  # the last one writes the manifest
        write_cache(tmp_path / "two", INFO, encode, rank=rank, world_size=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_an_interrupted_encoding_continues(tmp_path: Path) -> None:
    done = []

    def failing(start: int, stop: int) -> EncodedRange:
        if start == 8:
            raise KeyboardInterrupt
        done.append(start)
        return encode(start, stop)

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "c", INFO, failing)
    with pytest.raises(SmaltiError, match="is not finished"):
        LatentCache(tmp_path / "c")
    again = []
    write_cache(tmp_path / "c", INFO, lambda a, b: again.append(a) or encode(a, b))
    assert done == [0, 4] and again == [8]
    assert len(LatentCache(tmp_path / "c")) == 10


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("byte", [-1, -110, 10], ids=["stored", "labels", "header"])
def test_a_damaged_shard_is_encoded_again(tmp_path: Path, finished: bool, byte: int) -> None:
    write_cache(tmp_path / "c", INFO, encode)
    before = files(tmp_path / "c")
    content = bytearray(before["shard-00001.safetensors"])
    content[byte] ^= 1
    (tmp_path / "c" / "shard-00001.safetensors").write_bytes(bytes(content))
    if not finished:
        (tmp_path / "c" / "manifest.json").unlink()
    again = []
    write_cache(tmp_path / "c", INFO, lambda a, b: again.append(a) or encode(a, b))
    assert again == [4] and files(tmp_path / "c") == before
    LatentCache(tmp_path / "c")


def test_a_shard_that_cannot_be_opened_is_encoded_again(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "shard-00000.safetensors").write_bytes(b"cut")
    write_cache(tmp_path / "c", INFO, encode)
    assert len(LatentCache(tmp_path / "c")) == 10


def test_shards_of_another_cache_without_a_manifest_are_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", INFO, encode)
    (tmp_path / "c" / "manifest.json").unlink()
    before = files(tmp_path / "c")
    with pytest.raises(SmaltiError, match="written with another tokenizer"):
        write_cache(tmp_path / "c", replace(INFO, dataset_fingerprint="other"), encode)
    assert files(tmp_path / "c") == before


def test_a_folder_with_anything_else_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", INFO, encode)
    before = files(tmp_path / "c")
    with pytest.raises(SmaltiError, match="another tokenizer"):
        write_cache(tmp_path / "c", replace(INFO, tokenizer_fingerprint="other"), encode)
    assert files(tmp_path / "c") == before
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "diary.txt").write_text("mine")
    with pytest.raises(SmaltiError, match=r"holds diary\.txt"):
        write_cache(tmp_path / "s", INFO, encode)


def test_a_cache_whose_manifest_is_damaged_is_encoded_again_without_it(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", INFO, encode)
    write_options(tmp_path / "c", DataOptions())  # as `smalti encode` does at its end
    before = files(tmp_path / "c")
    manifest = tmp_path / "c" / "manifest.json"
    content = json.loads(before["manifest.json"])
    for change in ({"num_samples": 9}, {"num_samples": 99}):
        manifest.write_text(json.dumps({**content, **change}))
        with pytest.raises(SmaltiError, match="remove it, and encode again"):
            write_cache(tmp_path / "c", INFO, encode)
        manifest.unlink()
        write_cache(tmp_path / "c", INFO, encode)
        assert files(tmp_path / "c") == before


def test_damage_is_named(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", INFO, encode)
    shard = tmp_path / "c" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(SmaltiError, match=r"shard-00001\.safetensors is damaged"):
        LatentCache(tmp_path / "c")
    shard.unlink()
    with pytest.raises(SmaltiError, match=r"shard-00001\.safetensors is missing"):
        LatentCache(tmp_path / "c")
    with pytest.raises(SmaltiError, match="does not exist"):
        LatentCache(tmp_path / "nowhere")
    for text in (b"{", b'{"spec": "\xff"}'):  # no JSON; no UTF-8
        (tmp_path / "c" / "manifest.json").write_bytes(text)
        with pytest.raises(SmaltiError, match=r"manifest\.json is damaged"):
            read_manifest(tmp_path / "c")


def test_latents_may_have_any_strides(tmp_path: Path) -> None:
    def strided(start: int, stop: int) -> EncodedRange:
        part = encode(start, stop)
        return EncodedRange(part.stored.permute(2, 1, 0).contiguous().permute(2, 1, 0), part.labels)

    write_cache(tmp_path / "one", INFO, encode)
    write_cache(tmp_path / "two", INFO, strided)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_small_vocabularies_take_two_bytes_per_code(tmp_path: Path) -> None:
    small = replace(INFO, spec=CodeSpec(65536, ((2, 3),)))
    top = EncodedRange(torch.full((4, 2, 6), 65535), torch.zeros(4, dtype=torch.int64))
    write_cache(tmp_path / "s", replace(small, num_samples=4), lambda a, b: top)
    assert LatentCache(tmp_path / "s").first_view([0]).stored.max() == 65535
    write_cache(tmp_path / "b", INFO, encode)
    sizes = [(tmp_path / n / "shard-00000.safetensors").stat().st_size for n in ("s", "b")]
    assert sizes[1] - sizes[0] == 2 * 4 * 2 * 6


def test_continuous_latents_come_back_as_float32(tmp_path: Path) -> None:
    info = replace(INFO, spec=ContinuousSpec(2, 3, 3), views=("identity",), num_samples=4)
    values = torch.randn(4, 1, 4, 3, 3)
    labels = torch.zeros(4, dtype=torch.int64)
    write_cache(tmp_path / "c", info, lambda a, b: EncodedRange(values, labels))
    batch = LatentCache(tmp_path / "c").first_view([0, 1, 2, 3])
    assert batch.stored.dtype == torch.float32
    torch.testing.assert_close(batch.stored, values[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [65520.0, -70000.0, float("inf"), float("nan")])
def test_a_latent_beyond_half_precision_is_an_error_naming_it(tmp_path: Path, value: float) -> None:
    info = replace(INFO, spec=ContinuousSpec(1, 1, 1), views=("identity",))

    def one_large(start: int, stop: int) -> EncodedRange:
        stored = torch.arange(start, stop).float().view(-1, 1, 1, 1, 1).repeat(1, 1, 2, 1, 1)
        stored[stored == 6] = value
        return EncodedRange(stored, torch.zeros(stop - start, dtype=torch.int64))

    with pytest.raises(SmaltiError, match=f"sample 6 has the latent {value:g}"):
        write_cache(tmp_path / "c", info, one_large)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["shard-00000.safetensors"]


def test_the_largest_half_is_kept(tmp_path: Path) -> None:
    info = replace(INFO, spec=ContinuousSpec(1, 1, 1), views=("identity",), num_samples=1)
    top = EncodedRange(torch.full((1, 1, 2, 1, 1), -65504.0), torch.zeros(1, dtype=torch.int64))
    write_cache(tmp_path / "c", info, lambda a, b: top)
    assert LatentCache(tmp_path / "c").first_view([0]).stored.unique().tolist() == [-65504.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stored": 70000}, "sample 5 has the code 70000, which is none of the 70000"),
        ({"stored": -1}, "sample 5 has the code -1"),
        ({"labels": 2}, "sample 5 has the label 2, which is none of the 2 classes"),
    ],
)
def test_latents_outside_the_manifest_are_never_written(tmp_path, change, message) -> None:
    def wrong(start: int, stop: int) -> EncodedRange:
        part = encode(start, stop)
        if start == 4:
            part.labels[1] = change.get("labels", 0)
            part.stored[1, 1, 3] = change.get("stored", 0)
        return part

    with pytest.raises(SmaltiError, match=message):
        write_cache(tmp_path / "c", INFO, wrong)
    with pytest.raises(SmaltiError, match=r"have shape \(3, 2, 6\)"):
        write_cache(tmp_path / "d", INFO, lambda a, b: encode(a, b - 1))


def test_a_manifest_that_does_not_describe_its_shards_is_an_error(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", INFO, encode)
    manifest = tmp_path / "c" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["sha256"]  # as in a manifest of smalti 0.1.0
    for change, message in (
        ({"shards": content["shards"][:2]}, "names 2 of 3 shards"),
        ({"num_samples": 13}, "names 3 of 4 shards"),
        ({"num_samples": 11}, r"shard-00002\.safetensors holds int32 \(2, 2, 6\)"),
        ({"spec": {**content["spec"], "vocab_size": 9}}, "the manifest requires uint16"),
        ({"shard_size": 0}, "0 samples per file; each number"),
    ):
        manifest.write_text(json.dumps({**content, **change}))
        with pytest.raises(SmaltiError, match=message):
            LatentCache(tmp_path / "c")


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("continuous", float("nan"), "holds latents that are NaN or infinite: check the tokenizer"),
        ("continuous", float("inf"), "holds latents that are NaN or infinite"),
        ("codes", 70000, "holds codes from 0 to 70000, but the tokenizer has 70000"),
        ("codes", -1, "holds codes from -1 to"),
        ("labels", 2, "holds labels from 0 to 2, but the manifest has 2 classes"),
    ],
)
def test_values_that_no_latent_has_are_refused_when_a_cache_is_read(
    tmp_path: Path, monkeypatch, kind: str, value: float, message: str
) -> None:
    """Written by other code, with all hashes right."""
    spec = ContinuousSpec(2, 3, 4) if kind == "continuous" else INFO.spec
    info = replace(INFO, spec=spec)

    def unchecked(info, start, stop, part):
        arrays = {"stored": np.zeros((stop - start, 2, *info.shape), info.disk_type)}
        arrays["labels"] = np.zeros(stop - start, np.int64)
        arrays["labels" if kind == "labels" else "stored"].flat[-1 if start == 4 else 0] = (
            value if start == 4 else 0
        )
        return arrays

    monkeypatch.setattr(cache_module, "on_disk", unchecked)
    write_cache(tmp_path / "c", info, lambda a, b: None)
    with pytest.raises(SmaltiError, match=rf"shard-00001\.safetensors {message}"):
        LatentCache(tmp_path / "c")


@pytest.mark.parametrize(
    "change",
    [{"classes": ["a", "c"]}, {"tokenizer_fingerprint": "u"}, {"views": ["identity", "x"]}],
)
def test_a_manifest_that_changed_after_the_shards_is_refused(tmp_path: Path, change: dict) -> None:
    write_cache(tmp_path / "c", INFO, encode)
    manifest = tmp_path / "c" / "manifest.json"
    content = {**json.loads(manifest.read_text()), **change}
    for _ in range(2):  # with the hash, and without one as in a manifest of smalti 0.1.0
        manifest.write_text(json.dumps(content))
        with pytest.raises(SmaltiError, match=r"manifest\.json is damaged or was edited"):
            LatentCache(tmp_path / "c")
        content.pop("sha256", None)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tokenizer_fingerprint": "u"}, "tokenizer differs"),
        ({"classes": ("a", "c")}, "table of classes differs"),
        ({"classes": ("b", "a")}, "table of classes differs"),
        ({"spec": CodeSpec(70001, ((2, 3),))}, "specification of latents differs"),
    ],
)
def test_splits_that_do_not_belong_together_are_refused(
    tmp_path: Path, change: dict, what: str
) -> None:
    write_cache(tmp_path / "train", INFO, encode)
    write_cache(tmp_path / "heldout", replace(INFO, **change), encode)
    with pytest.raises(SmaltiError, match=rf"do not belong together, because the {what}"):
        open_splits(tmp_path)


def test_splits_belong_together_whatever_the_form_of_their_letters(tmp_path: Path) -> None:
    for split, name in (("train", "caf\u00e9"), ("heldout", "cafe\u0301")):
        write_cache(tmp_path / split, replace(INFO, classes=("a", name)), encode)
    train, heldout = open_splits(tmp_path, seed=3)
    assert train.seed == 3 and len(heldout) == 10
    shutil.rmtree(tmp_path / "heldout")
    with pytest.raises(SmaltiError, match="heldout does not exist"):
        open_splits(tmp_path)


def test_a_shard_with_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", INFO, encode)
    before, shard = files(tmp_path / "c"), tmp_path / "c" / "shard-00001.safetensors"
    header = b'{"stored": ' + b"[" * 2**20
    shard.write_bytes(len(header).to_bytes(8, "little") + header)
    manifest = tmp_path / "c" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["shards"][1] = sha256_of(shard)
    del content["sha256"]  # as in a manifest of smalti 0.1.0
    manifest.write_text(json.dumps(content))
    with pytest.raises(SmaltiError, match=r"shard-00001\S+ is not .*header has 1048587 bytes"):
        LatentCache(tmp_path / "c")
    manifest.unlink()
    write_cache(tmp_path / "c", INFO, encode)  # as the message says: it is damaged, and replaced
    assert files(tmp_path / "c") == before


def test_specs_check_their_sizes() -> None:
    assert CodeSpec(4, ((1, 1), (2, 3))).length == 7
    with pytest.raises(SmaltiError, match="vocab_size is 0"):
        CodeSpec(0, ((1, 1),))
    with pytest.raises(SmaltiError, match="grids is"):
        CodeSpec(4, ())
    with pytest.raises(SmaltiError, match="at least 1"):
        ContinuousSpec(0, 1, 1)
    with pytest.raises(SmaltiError, match="sides from 1 to 16384"):
        CodeSpec(4, ((8589934592, 1),))
    with pytest.raises(SmaltiError, match="use at most 16384"):
        ContinuousSpec(4, 1, 8589934592)
    for make in (
        lambda: CodeSpec(4, ((3163, 3163),)),
        lambda: CodeSpec(4, ((1000, 1000),) * 2),
        lambda: ContinuousSpec(4, 3163, 3163),
    ):
        with pytest.raises(SmaltiError, match="positions; use at most 1048576"):
            make()
    with pytest.raises(SmaltiError, match="channels is 10000000; use at most 65536"):
        ContinuousSpec(10_000_000, 1, 1)


@pytest.mark.parametrize(
    ("info", "stated", "identity"),
    [
        (
            INFO,
            {"stored_shape": (6,)},
            "518dc045eef3011ed80f86dd2821a1edd9f860b088d8dc0dd40717efbb560eed",
        ),
        (
            replace(INFO, spec=ContinuousSpec(2, 3, 4)),
            {"stored_shape": (4, 3, 4), "stored_statistics": ("mean", "std")},
            "25a374710ca26896455f678f9115aa4ea9e1671f9617bb8ec724f85da7b1e3f1",
        ),
        (
            replace(INFO, spec=ContinuousSpec(2, 3, 4), pairs="p"),
            {"stored_shape": (4, 3, 4)},
            "2322b9914a979803a29b7caa17dfe95ed3165a686786b362f077a428280d596e",
        ),
    ],
    ids=["codes", "mean and std", "pairs"],
)
def test_the_identity_of_old_caches_stays(info: CacheInfo, stated: dict, identity: str) -> None:
    """Caches of smalti 0.1.0, whose manifests state no shape, are continued and resumed."""
    stating = replace(info, **stated)
    assert info.identity() == stating.identity() == identity
    assert (info.shape, info.statistics) == (stating.shape, stating.statistics)
    assert repr(info) == repr(stating)  # which `LatentCache.fingerprint` hashes
    plain = replace(info, stored_shape=(2, 3, 4), stored_statistics=())
    assert plain.identity() != identity and plain.shape == (2, 3, 4)


def test_a_manifest_records_what_the_tokenizer_states(tmp_path: Path) -> None:
    spec, stated = ContinuousSpec(2, 3, 3), {"stored_shape": (2, 3, 3), "views": ("identity",)}
    info = replace(INFO, spec=spec, num_samples=4, **stated)
    values, labels = torch.randn(4, 1, 2, 3, 3).half().float(), torch.zeros(4, dtype=torch.int64)
    write_cache(tmp_path / "c", info, lambda a, b: EncodedRange(values, labels))
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["stored_shape"] == [2, 3, 3] and manifest["stored_statistics"] == []
    cache = LatentCache(tmp_path / "c")
    assert torch.equal(cache.first_view(range(4)).stored, values[:, 0])
    assert cache.all_views([1]).shape == (1, 1, 2, 3, 3)
    with pytest.raises(SmaltiError, match="must be a multiple of the 2 stored statistics"):
        replace(info, stored_shape=(3, 3, 3), stored_statistics=("mean", "std"))


# -- Captions, further conditions, and pictures without classes -----------------------------------

TEXTS = [("a red apple",), ("ein Ball", "a ball", "un ballon \U0001f3c8")] * 5
CAPTIONED = replace(INFO, captions="hash of the texts")


def captioned(start: int, stop: int) -> EncodedRange:
    return replace(encode(start, stop), captions=TEXTS[start:stop])


def test_captions_come_back_whichever_shard_holds_them(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", CAPTIONED, captioned)
    cache = LatentCache(tmp_path / "c")
    assert cache.all_captions(range(10)) == TEXTS
    batch = cache.first_view([9, 0, 4, 5])
    assert batch.captions == [TEXTS[i] for i in (9, 0, 4, 5)]
    assert batch.texts == ["ein Ball", "a red apple", "a red apple", "ein Ball"]
    again = pickle.loads(pickle.dumps(cache))
    assert again.first_view([9]).captions == [TEXTS[9]]
    plain = tmp_path / "plain"
    write_cache(plain, INFO, encode)
    assert LatentCache(plain).first_view([0]).captions is None
    assert LatentCache(plain).first_view([0]).texts is None


def test_the_caption_of_an_epoch_is_a_pure_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", CAPTIONED, captioned)
    keys = [(epoch, index) for epoch in range(60) for index in range(10)]
    once, again, other = (
        LatentCache(tmp_path / "c", seed=seed).__getitems__(keys) for seed in (0, 0, 1)
    )
    assert once.texts == again.texts != other.texts
    assert once.shown is not None and once.shown[::2].unique().tolist() == [0]  # of one caption
    counts = once.shown[1::2].bincount(minlength=3)
    assert counts.sum() == 300 and counts.min() > 70  # 100 each on average


def test_conditions_follow_the_view_and_the_caption_of_their_sample(tmp_path: Path) -> None:
    """Row (i, v) of "low" is 10 i + v, row i of "depth" is i, and that of text t of sample i is
    100 i + t."""
    info = replace(
        CAPTIONED,
        conditions=(
            StoredCondition("low", (2,), "float16", "view", "r"),
            StoredCondition("depth", (), "int32", "sample", "r"),
            StoredCondition("features", (3, 1), "float32", "caption", "r"),
            StoredCondition("mask", (3,), "bool", "caption", "r"),
        ),
    )

    def conditioned(start: int, stop: int) -> EncodedRange:
        samples = torch.arange(start, stop)
        low = 10 * samples[:, None, None] + torch.arange(2)[:, None] + torch.zeros(2)
        texts = [100 * i + t for i in range(start, stop) for t in range(len(TEXTS[i]))]
        rows = torch.tensor(texts, dtype=torch.float32)
        features, mask = rows[:, None, None].repeat(1, 3, 1), rows[:, None].repeat(1, 3) % 2 == 1
        parts = {"low": low, "depth": samples, "features": features, "mask": mask}
        return replace(captioned(start, stop), conditions=parts)

    write_cache(tmp_path / "c", info, conditioned)
    cache = LatentCache(tmp_path / "c")
    batch = cache.__getitems__([(epoch, index) for epoch in range(9) for index in (7, 2, 9, 3)])
    view = batch.stored[:, 0] % 1000 // 100
    assert view.unique().tolist() == [0, 1]
    assert torch.equal(batch.conditions["low"], (10 * batch.indices + view)[:, None].expand(-1, 2))
    assert torch.equal(batch.conditions["depth"], batch.indices)
    row = 100 * batch.indices + batch.shown
    assert torch.equal(batch.conditions["features"][:, 2, 0], row)
    assert torch.equal(batch.conditions["mask"][:, 1], row % 2 == 1)
    types = {name: values.dtype for name, values in batch.conditions.items()}
    assert list(types.values()) == [torch.float32, torch.int64, torch.float32, torch.bool]
    assert cache.first_view([7]).conditions["features"].flatten().tolist() == [700] * 3

    def without(start: int, stop: int) -> EncodedRange:
        part = conditioned(start, stop)
        return replace(part, conditions={**part.conditions, "mask": part.conditions["mask"][1:]})

    with pytest.raises(SmaltiError, match=r"the condition mask .* is of shape \(7, 3\)"):
        write_cache(tmp_path / "d", info, without)
    with pytest.raises(SmaltiError, match="the condition low of the samples from 0 on is missing"):
        write_cache(tmp_path / "e", info, captioned)
    too_large = replace(info, conditions=(replace(info.conditions[1], dtype="uint8"),))
    with pytest.raises(SmaltiError, match=r"depth .* has values that uint8 does not hold"):
        write_cache(
            tmp_path / "f",
            too_large,
            lambda a, b: replace(conditioned(a, b), conditions={"depth": torch.arange(a, b) * 100}),
        )
    other = tuple(replace(c, recipe="s") for c in info.conditions)
    with pytest.raises(SmaltiError, match="another tokenizer or layout"):
        write_cache(tmp_path / "c", replace(info, conditions=other), conditioned)


def test_a_cache_with_captions_continues_and_is_the_same_at_any_world_size(tmp_path: Path) -> None:
    write_cache(tmp_path / "one", CAPTIONED, captioned)
    for rank in (1, 0):
        write_cache(tmp_path / "two", CAPTIONED, captioned, rank=rank, world_size=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    shard = tmp_path / "one" / "shard-00002.safetensors"
    again = []
    for position in range(0, shard.stat().st_size, 37):  # any damage is found, and repaired
        content = bytearray(files(tmp_path / "two")[shard.name])
        content[position] ^= 1
        shard.write_bytes(bytes(content))
        with pytest.raises(SmaltiError):
            LatentCache(tmp_path / "one")
        again.clear()
        write_cache(tmp_path / "one", CAPTIONED, lambda a, b: again.append(a) or captioned(a, b))
        assert again == [8] and files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "have no captions"),
        ([("a",)], "have 1 captions"),
        ([("a",), ("a", ""), ("a",), ("a",)], "sample 1 has no caption, or an empty one"),
        ([("a",), ("a",), ("a",), ()], "sample 3 has no caption"),
        ([("\ud800",)] * 4, "a caption of sample 0 is not Unicode"),
    ],
)
def test_captions_that_no_cache_stores(tmp_path: Path, texts, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        write_cache(tmp_path / "c", CAPTIONED, lambda a, b: replace(encode(a, b), captions=texts))
    assert not list((tmp_path / "c").iterdir())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("captions", lambda a: a * 0 + 0xFF, "are not UTF-8"),
        ("caption_ends", lambda a: a * 0, "do not have one or more texts"),
        ("captions_until", lambda a: a[::-1], "do not have one or more texts"),
        ("captions_until", lambda a: a[:1], "are uint8, int64, int64 of 1 samples"),
        ("caption_ends", lambda a: a + (np.arange(len(a)) == 1), "are not divided into texts"),
    ],
)
def test_captions_of_other_code_are_verified(
    tmp_path: Path, monkeypatch, name: str, change, message: str
) -> None:
    real = cache_module.on_disk
    monkeypatch.setattr(
        cache_module,
        "on_disk",
        lambda *parts: {k: change(v) if k == name else v for k, v in real(*parts).items()},
    )
    texts = [("a", "\u00e9t\u00e9", "\u00e9", "\u00e9")] * 10
    write_cache(tmp_path / "c", CAPTIONED, lambda a, b: replace(encode(a, b), captions=texts[a:b]))
    with pytest.raises(SmaltiError, match=f"the captions in .*shard-0000\\d.* {message}"):
        LatentCache(tmp_path / "c")


def test_a_shard_has_what_the_manifest_says(tmp_path: Path) -> None:
    """With all hashes right, as other code could write them."""
    write_cache(tmp_path / "c", CAPTIONED, captioned)
    content = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert content["captions"] == CAPTIONED.captions and "conditions" not in content
    del content["sha256"], content["captions"]
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(SmaltiError, match="holds captions, and the manifest requires none"):
        LatentCache(tmp_path / "c")
    condition = {"name": "x", "shape": [], "dtype": "bool", "rows": "sample", "recipe": ""}
    content |= {"captions": "texts", "conditions": [condition]}
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(SmaltiError, match=r"the manifest requires bool \(4,\): encode again"):
        LatentCache(tmp_path / "c")


@pytest.mark.parametrize("finished", [True, False])
def test_a_cache_begun_without_captions_continues_without_them(
    tmp_path: Path, finished: bool, caplog
) -> None:
    """One of smalti 0.1.0, of pictures that have captions: it is not refused as another one."""
    folder = tmp_path / "c"
    write_cache(folder, INFO, encode)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if not finished:
        (folder / "manifest.json").unlink()
        (folder / "shard-00001.safetensors").unlink()
    write_cache(folder, CAPTIONED, captioned)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "were begun without captions, which are left out" in caplog.text
    condition = StoredCondition("features", (2,), "float16", "caption", "recipe")
    with pytest.raises(SmaltiError, match="or of other captions: choose another output folder"):
        write_cache(folder, replace(CAPTIONED, conditions=(condition,)), captioned)


def test_a_cache_without_captions_has_the_manifest_of_earlier_versions(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", INFO, encode)
    content = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert not {"captions", "conditions"} & content.keys()
    assert repr(CAPTIONED) == repr(INFO) and CAPTIONED.identity() != INFO.identity()


def test_pictures_without_classes(tmp_path: Path) -> None:
    info = replace(INFO, classes=())
    zeros = lambda a, b: replace(encode(a, b), labels=torch.zeros(b - a, dtype=torch.int64))  # noqa: E731
    write_cache(tmp_path / "c", info, zeros)
    cache = LatentCache(tmp_path / "c")
    assert cache.classes == () and cache.num_classes == 0
    assert cache.first_view([1, 9]).labels.tolist() == [0, 0]
    assert len(cache.even_subset(4, 0)) == 4
    with pytest.raises(SmaltiError, match="has the label 1, which is none of the 1"):
        write_cache(tmp_path / "d", info, encode)


@pytest.mark.parametrize("name", ["", "Text", "a b", "a" * 65, "a.b"])
def test_names_of_conditions(name: str) -> None:
    with pytest.raises(SmaltiError, match="use lower-case letters"):
        StoredCondition(name, (), "bool", "sample", "")
    with pytest.raises(SmaltiError, match="2 conditions have the same name"):
        replace(INFO, conditions=(StoredCondition("a", (), "bool", "sample", ""),) * 2)
    with pytest.raises(SmaltiError, match="a row for each caption, and there are no captions"):
        replace(INFO, conditions=(StoredCondition("a", (), "bool", "caption", ""),))
