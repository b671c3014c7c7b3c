"""Features of captions in the latent cache: those of the frozen text encoder, for each caption."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbones import write_text_encoder
from torch import Tensor

from smalti.data.dataset import ImageBatch
from smalti.data.latent_cache.cache import EncodedRange, LatentCache, write_cache
from smalti.data.latent_cache.manifest import CacheInfo
from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.pipelines.captions import CaptionFeatures
from smalti.pipelines.conditions import BatchConditions
from smalti.prior.conditions.text import TextCondition, TextConfig
from smalti.prior.conditions.text_encoder import TextEncoder, text_encoder_of
from smalti.prior.next_token.model import NextTokenConfig

TEXTS = [("a red apple", "red"), ("the apple",), ("a",), ("apple", "the", "a red")]
LENGTH = 8
INFO = CacheInfo(
    spec=CodeSpec(16, ((2, 2),)),
    classes=(),
    num_samples=4,
    views=("identity",),
    tokenizer_fingerprint="t",
    dataset_fingerprint="d",
    shard_size=3,
    captions="hash",
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> TextEncoder:
    return text_encoder_of(str(write_text_encoder(tmp_path_factory.mktemp("t5"), "t5")))


def written(folder: Path, features: CaptionFeatures) -> LatentCache:
    """A cache of 4 captioned samples, with features."""

    def encode(start: int, stop: int) -> EncodedRange:
        rows = torch.arange(start, stop)
        batch = ImageBatch(torch.zeros(len(rows), 3, 8, 8), rows * 0, rows, TEXTS[start:stop])
        codes = torch.zeros(len(rows), 1, 4, dtype=torch.int64)
        return EncodedRange(codes, rows * 0, TEXTS[start:stop], features(batch, ()))

    write_cache(folder, replace(INFO, conditions=features.stored), encode)
    return LatentCache(folder)


def conditions(encoder: TextEncoder, latents: LatentCache, length: int = LENGTH) -> BatchConditions:
    text = TextConfig(length, encoder.dim or 16, encoder.name, encoder.fingerprint)
    config = NextTokenConfig(spec=INFO.spec, width=16, num_heads=2).conditioned("text", text)
    return BatchConditions(config, encoder, latents)


def values(condition: object) -> tuple[Tensor, Tensor]:
    assert isinstance(condition, TextCondition)
    return condition.features, condition.mask


def test_training_takes_the_stored_features_of_the_shown_caption(encoder, tmp_path) -> None:
    latents = written(tmp_path, CaptionFeatures(encoder, LENGTH))
    assert [c.rows for c in latents.info.conditions] == ["caption", "caption"]
    condition_of = conditions(encoder, latents)
    assert condition_of.sources["text"].are_stored  # type: ignore[attr-defined]
    seen = set()
    for epoch in range(4):
        batch = latents.__getitems__([(epoch, 3), (epoch, 0), (epoch, 1)])
        assert batch.texts is not None
        seen |= set(batch.texts)
        features, mask = values(condition_of(batch))
        expected = encoder.encode(batch.texts, LENGTH)
        torch.testing.assert_close(features, expected.features, rtol=1e-3, atol=1e-3)
        assert torch.equal(mask, expected.mask)
    assert seen == {*TEXTS[3], *TEXTS[0], *TEXTS[1]}
    features, _ = values(condition_of(latents.first_view([0])))
    first = encoder.encode(["a red apple"], LENGTH).features
    torch.testing.assert_close(features, first, rtol=1e-3, atol=1e-3)


def test_features_of_another_length_are_not_used(encoder, tmp_path, caplog) -> None:
    latents = written(tmp_path, CaptionFeatures(encoder, LENGTH))
    with caplog.at_level(logging.WARNING):
        condition_of = conditions(encoder, latents, length=6)
    assert "another text encoder or --text.length" in caplog.text
    batch = latents.first_view([0, 1])
    features, _ = values(condition_of(batch))
    expected = encoder.encode(["a red apple", "the apple"], 6).features
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_bytes_need_no_features(encoder, tmp_path, caplog) -> None:
    """Captions that are too long are refused before training."""
    in_bytes = text_encoder_of("bytes")
    assert CaptionFeatures(in_bytes, LENGTH).stored == ()
    latents = written(tmp_path, CaptionFeatures(encoder, LENGTH))
    ids, _ = values(conditions(in_bytes, latents, 12)(latents.first_view([0])))
    assert ids.dtype == torch.int64 and not caplog.text
    with pytest.raises(SmaltiError, match=r"2 of 7 captions .* of 9 tokens; the longest has 12"):
        conditions(in_bytes, latents, 9)


def test_another_encoder_makes_another_cache(encoder, tmp_path: Path) -> None:
    written(tmp_path / "cache", CaptionFeatures(encoder, LENGTH))
    other = text_encoder_of(str(write_text_encoder(tmp_path / "other", "t5", seed=8)))
    with pytest.raises(SmaltiError, match="choose another output folder"):
        written(tmp_path / "cache", CaptionFeatures(other, LENGTH))
