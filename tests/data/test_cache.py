"""The latent cache: written once whatever the world size, resumable, refused when damaged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smalti.data.cache import CacheInfo, EncodedRange, LatentCache, read_manifest, write_cache
from smalti.data.latents import CodeSpec, ContinuousSpec
from smalti.errors import SmaltiError

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


def test_any_world_size_writes_the_same_files(tmp_path: Path) -> None:
    write_cache(tmp_path / "one", INFO, encode)
    for rank in (1, 0):  # the last one writes the manifest
        write_cache(tmp_path / "two", INFO, encode, rank=rank, world_size=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_an_interrupted_encoding_goes_on(tmp_path: Path) -> None:
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
    with pytest.raises(SmaltiError, match="begun with another tokenizer"):
        write_cache(tmp_path / "c", replace(INFO, dataset_fingerprint="other"), encode)
    assert files(tmp_path / "c") == before


def test_another_tokenizer_or_stranger_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", INFO, encode)
    before = files(tmp_path / "c")
    with pytest.raises(SmaltiError, match="another tokenizer"):
        write_cache(tmp_path / "c", replace(INFO, tokenizer_fingerprint="other"), encode)
    assert files(tmp_path / "c") == before
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "diary.txt").write_text("mine")
    with pytest.raises(SmaltiError, match=r"holds diary\.txt"):
        write_cache(tmp_path / "s", INFO, encode)


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


def test_specs_check_their_sizes() -> None:
    assert CodeSpec(4, ((1, 1), (2, 3))).length == 7
    with pytest.raises(SmaltiError, match="vocab_size is 0"):
        CodeSpec(0, ((1, 1),))
    with pytest.raises(SmaltiError, match="grids is"):
        CodeSpec(4, ())
    with pytest.raises(SmaltiError, match="at least 1"):
        ContinuousSpec(0, 1, 1)
