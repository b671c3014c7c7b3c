"""Captions to features: bytes against ByT5, the byte encoder written out, frozen models against
transformers, and what is refused."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backbones import CONFIGS, write_text_encoder
from chance import randomised
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    ByT5Tokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    T5EncoderModel,
)

from smalti.errors import SmaltiError
from smalti.prior.conditions import text_encoder
from smalti.prior.conditions.byte_encoder import ByteEncoder
from smalti.prior.conditions.text import TextCondition
from smalti.prior.conditions.text_encoder import (
    TEXT_ENCODERS,
    ByteTokenizer,
    text_encoder_of,
    tokenize_bytes,
)

CAPTIONS = ["a red apple", "", "na\u00efve \u732b", "the"]
KINDS = ("t5", "byt5", "clip")
MODELS = {"t5": T5EncoderModel, "byt5": T5EncoderModel, "clip": CLIPTextModel}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: write_text_encoder(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture
def folder(folders, tmp_path: Path) -> Path:
    """A T5 that a test may damage."""
    return Path(shutil.copytree(folders["t5"], tmp_path / "model"))


# -- bytes -----------------------------------------------------------------------------------------


def test_oracle_ids_are_those_of_byt5() -> None:
    found = tokenize_bytes(CAPTIONS, 16)
    expected = ByT5Tokenizer(padding_side="left")(
        CAPTIONS, padding="max_length", max_length=16, return_tensors="pt"
    )
    assert torch.equal(found.features, expected.input_ids)
    assert torch.equal(found.mask, expected.attention_mask.bool())
    assert found.mask.sum(1).tolist() == [12, 1, 11, 4]  # bytes and the end token
    assert len(tokenize_bytes([], 16)) == 0


def test_long_captions_are_counted_and_the_remedy_works() -> None:
    captions = ["red", "a red apple", "apple pie"]
    message = (
        r"2 of 3 captions are longer than the text length of 9 tokens; the longest has 12 "
        r'\("a red apple"\): shorten it, or train with --text\.length 12'
    )
    with pytest.raises(SmaltiError, match=message):
        tokenize_bytes(captions, 9)
    assert tokenize_bytes(captions, 12).features.shape == (3, 12)
    with pytest.raises(SmaltiError, match=r"length is 0 .* set --text\.length to 1"):
        tokenize_bytes([""], 0)


def test_captions_of_a_set_are_counted_together(monkeypatch) -> None:
    monkeypatch.setattr(text_encoder, "AT_ONCE", 2)
    captions = ["red", "a red apple", "the", "apple pie"]
    with pytest.raises(SmaltiError, match=r"2 of 4 captions are longer .* the longest has 12"):
        ByteTokenizer().check_captions(captions, 9)
    ByteTokenizer().check_captions(captions, 12)


def test_what_is_no_caption_is_refused() -> None:
    with pytest.raises(SmaltiError, match="captions are the text 'red': give a list"):
        tokenize_bytes("red", 9)
    with pytest.raises(SmaltiError, match="a caption is 3, a int"):
        tokenize_bytes([3], 9)  # type: ignore[list-item]
    with pytest.raises(SmaltiError, match="UTF-8 cannot encode, at position 1"):
        tokenize_bytes(["a\ud800"], 9)


def encoder(dim: int = 16) -> ByteEncoder:
    torch.manual_seed(0)
    return randomised(ByteEncoder(dim)).eval()


@torch.no_grad()
def test_oracle_the_byte_encoder_written_out() -> None:
    """One caption without padding; half of the pairs of channels rotate by the position."""
    model, dim = encoder(), 16
    text = tokenize_bytes(["red"], 4)
    weights = model.state_dict()
    x = weights["embedding.weight"][text.features[0]]  # (4, dim)
    theta = torch.cat([torch.zeros(4), 10000 ** (-torch.arange(4) / 4)])
    angles = torch.arange(4)[:, None] * theta  # (4, dim / 2)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotated(v: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(v[:, ::2], v[:, 1::2]) * turn
        return torch.stack([pairs.real, pairs.imag], -1).flatten(1)

    def norm(v: torch.Tensor, name: str) -> torch.Tensor:
        return v / (v.square().mean(1, keepdim=True) + 1e-5).sqrt() * weights[name]

    for i in range(2):
        name = f"blocks.{i}"
        query, key, value = (
            norm(x, f"{name}.attention_norm.weight") @ weights[f"{name}.wqkv.weight"].T
        ).chunk(3, 1)
        scores = (rotated(query) @ rotated(key).T / math.sqrt(dim)).softmax(1)
        x = x + scores @ value @ weights[f"{name}.wo.weight"].T
        hidden = norm(x, f"{name}.ffn_norm.weight")
        w1, w2, w3 = (weights[f"{name}.feed_forward.w{k}.weight"] for k in (1, 2, 3))
        x = x + (F.silu(hidden @ w1.T) * (hidden @ w3.T)) @ w2.T
    expected = norm(x, "norm.weight")
    torch.testing.assert_close(model(text.features, text.mask)[0], expected)


@torch.no_grad()
def test_padding_has_no_influence_and_every_byte_has() -> None:
    model = encoder(128)  # two heads
    short, long = tokenize_bytes(CAPTIONS, 12), tokenize_bytes(CAPTIONS, 20)
    features = model(short.features, short.mask)
    assert features.shape == (4, 12, 128) and features.isfinite().all()
    junk = torch.where(long.mask, long.features, 77)
    found = model(junk, long.mask)[:, 8:]
    torch.testing.assert_close(found[short.mask], features[short.mask], rtol=1e-4, atol=1e-5)
    texts = tokenize_bytes(["cat", "car", "act"], 4)
    first, last, order = model(texts.features, texts.mask)
    assert not torch.allclose(first[0], last[0])  # "c", which comes before what differs
    assert not torch.allclose(first[3], order[3], atol=1e-3)  # the end token


def test_every_weight_of_the_byte_encoder_learns() -> None:
    model, text = encoder(), tokenize_bytes(CAPTIONS, 12)
    model(text.features, text.mask)[text.mask].square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    for dim in (100, 128):
        assert ByteEncoder(dim, depth=1).norm.weight.shape == (dim,)
    for dim in (0, 6, 130):
        with pytest.raises(SmaltiError, match=f"text_dim is {dim}, .* to a multiple of 64"):
            ByteEncoder(dim)


# -- frozen models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_oracle_features_are_the_last_hidden_states_of_transformers(kind: str, folders) -> None:
    state = torch.random.get_rng_state()
    frozen = text_encoder_of(str(folders[kind]))
    assert torch.equal(torch.random.get_rng_state(), state)
    found = frozen.encode(CAPTIONS, 12, batch_size=3)
    tokenizer = AutoTokenizer.from_pretrained(folders[kind], padding_side="right")
    batch = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    output = MODELS[kind].from_pretrained(folders[kind]).eval()(**batch).last_hidden_state
    assert found.features.shape == (4, 12, 16) and frozen.dim == 16
    for row, mask in enumerate(batch.attention_mask.bool()):
        expected = output[row][mask]
        assert found.mask[row].tolist() == [False] * (12 - len(expected)) + [True] * len(expected)
        values = found.features[row]
        torch.testing.assert_close(values[found.mask[row]], expected, rtol=1e-4, atol=1e-5)
        assert not values[~found.mask[row]].any()


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_a_caption_do_not_depend_on_the_others(kind: str, folders) -> None:
    frozen = text_encoder_of(str(folders[kind]))
    together = frozen.encode(CAPTIONS, 12)
    assert not together.features.requires_grad
    for row, caption in enumerate(CAPTIONS):
        alone = frozen.encode([caption], 12)
        assert torch.equal(alone.features[0], together.features[row])
        assert torch.equal(alone.mask[0], together.mask[row])
    assert len(frozen.encode([], 12)) == 0


def test_the_precision_of_features_and_the_fingerprint(folders, tmp_path: Path) -> None:
    """The fingerprint is that of the stored weights and of the vocabulary."""
    frozen = text_encoder_of(str(folders["t5"]))
    half = text_encoder_of(str(folders["t5"]), dtype=torch.bfloat16)
    features = half.encode(CAPTIONS, 12).features
    assert features.dtype == torch.bfloat16
    expected = frozen.encode(CAPTIONS, 12).features
    torch.testing.assert_close(features.float(), expected, rtol=0.1, atol=0.1)
    shutil.copytree(folders["t5"], tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    T5EncoderModel.from_pretrained(folders["t5"]).save_pretrained(
        tmp_path / "shards", max_shard_size="5KB"
    )
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    shards = text_encoder_of(str(tmp_path / "shards"))
    assert frozen.fingerprint == half.fingerprint == shards.fingerprint
    other = text_encoder_of(str(write_text_encoder(tmp_path / "other", "t5", seed=8)))
    found = shards.encode(CAPTIONS, 12).features
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    frozen.check_fingerprint(shards.fingerprint)
    frozen.check_fingerprint("")
    with pytest.raises(
        SmaltiError, match=r"other \(sha256 .* is not the one of the prior \(sha256"
    ):
        other.check_fingerprint(frozen.fingerprint)
    with pytest.raises(SmaltiError, match=r"bytes \(sha256 none\) is not the one of the cache"):
        ByteTokenizer().check_fingerprint(frozen.fingerprint, "the cache")


def test_another_vocabulary_is_another_encoder(folder: Path) -> None:
    before = text_encoder_of(str(folder)).fingerprint
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("\u2581apple", "\u2581peach"))
    assert text_encoder_of(str(folder)).fingerprint != before


@torch.no_grad()
def test_the_text_model_of_a_whole_clip_is_taken(folders, tmp_path: Path) -> None:
    text = CLIPTextModel.from_pretrained(folders["clip"])
    vision = CONFIGS["clip"].to_dict()
    whole = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=vision))
    whole.text_model.load_state_dict(getattr(text, "text_model", text).state_dict())
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders["clip"]).save_pretrained(tmp_path)
    one, other = (text_encoder_of(str(place)) for place in (tmp_path, folders["clip"]))
    assert one.max_length == other.max_length == 12
    assert torch.equal(one.encode(CAPTIONS, 12).features, other.encode(CAPTIONS, 12).features)


def test_the_folders_of_a_diffusers_pipeline(folders, tmp_path: Path) -> None:
    place = shutil.copytree(folders["t5"], tmp_path / "text_encoder_2")
    tokenizer = tmp_path / "tokenizer_2"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(place / name, tokenizer / name)
    one, other = (text_encoder_of(str(path)) for path in (place, folders["t5"]))
    assert one.fingerprint == other.fingerprint
    assert torch.equal(one.encode(CAPTIONS, 12).features, other.encode(CAPTIONS, 12).features)


# -- what is refused -------------------------------------------------------------------------------


def test_clip_takes_as_many_tokens_as_it_has_positions(folders) -> None:
    frozen = text_encoder_of(str(folders["clip"]))
    with pytest.raises(SmaltiError, match=r"13 tokens; .* takes 1 to 12: set --text\.length to 12"):
        frozen.encode(["red"], 13)
    with pytest.raises(SmaltiError, match=r"the longest has 13 .*: shorten it$"):
        frozen.encode(["a", "a red apples s", "the red"], 12)
    with pytest.raises(SmaltiError, match=r"the longest has 6 .*, or train with --text\.length 6$"):
        frozen.encode(["a red"], 5)
    assert frozen.encode(["a red"], 12).mask.sum() == 6


def test_a_pickle_is_never_read(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    message = r"has no model\.safetensors \(pytorch_model\.bin is a pickle, which can run code"
    with pytest.raises(SmaltiError, match=message):
        text_encoder_of(str(folder))


def test_a_folder_that_cannot_be_used_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "encoder.block.1.layer.0.SelfAttention.k.weight"
    key = weights.pop(name)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SmaltiError, match=f"lacks the tensor {name}"):
        text_encoder_of(str(folder))
    save_file({**weights, name: key[:3].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(SmaltiError, match="cannot be loaded"):
        text_encoder_of(str(folder))
    path.write_bytes(b"junk")
    with pytest.raises(SmaltiError, match="cannot be loaded"):
        text_encoder_of(str(folder))


def test_a_tokenizer_must_be_that_of_the_model(folder: Path, folders, monkeypatch) -> None:
    shutil.copy(folders["clip"] / "tokenizer.json", folder)
    shutil.copy(folders["clip"] / "tokenizer_config.json", folder)
    with pytest.raises(SmaltiError, match="has 514 tokens, but the model knows 34"):
        text_encoder_of(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SmaltiError, match=r"has no tokenizer\.json: save its tokenizer into"):
        text_encoder_of(str(folder))
    (folder / "spiece.model").write_bytes(b"junk")
    monkeypatch.setattr(text_encoder, "find_spec", lambda name: None)
    with pytest.raises(SmaltiError, match="pip install sentencepiece"):
        text_encoder_of(str(folder))


def test_another_kind_of_model_and_other_names_are_named(tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub import constants

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(SmaltiError, match=r"is a bert; a text encoder is one of t5, .*, or bytes"):
        text_encoder_of(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(["no config"]))
    with pytest.raises(SmaltiError, match=r"has no config\.json with a model_type"):
        text_encoder_of(str(tmp_path))
    with pytest.raises(
        SmaltiError, match='no folder and no text encoder called "byts": give bytes'
    ):
        text_encoder_of("byts")
    with pytest.raises(SmaltiError, match="folder not found: /no/such"):
        text_encoder_of("/no/such")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SmaltiError, match="cannot be downloaded from the Hub"):
        text_encoder_of("nobody/nothing")


def test_a_missing_package_is_named(monkeypatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SmaltiError, match=r"pip install 'smalti\[vision\]'.*--text\.encoder bytes"):
        text_encoder_of(str(folder))


# -- the registry ----------------------------------------------------------------------------------


class Vowels(ByteTokenizer):
    """Drops all but the vowels."""

    name = "vowels"

    def tokens(self, captions):
        return super().tokens(["".join(c for c in text if c in "aeiou") for text in captions])


def test_a_new_encoder_is_one_entry() -> None:
    TEXT_ENCODERS.register("vowels", Vowels)
    found = text_encoder_of("vowels").encode(["a red apple"], 6)
    assert isinstance(found, TextCondition)
    assert torch.equal(found.features, tokenize_bytes(["aeae"], 6).features)
