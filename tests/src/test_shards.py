"""Weights in several files, and variants of them, named as in Hugging Face's libraries."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import load_torch_model
from safetensors.torch import load_file, save_file

from smalti.errors import SmaltiError
from smalti.files import sha256_of
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.vq import VQTokenizer

INDEX = "model.safetensors.index.json"
SIZE = 8_000  # bytes of a shard


@pytest.fixture
def sharded(tokenizer, tmp_path: Path) -> Path:
    return tokenizer.save_pretrained(tmp_path / "model", max_shard_size=SIZE)


def weight_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model*"))


def test_large_weights_are_saved_in_shards_and_loaded(tokenizer, sharded) -> None:
    names = [name for name in weight_files(sharded) if name != INDEX]
    assert len(names) > 2 and INDEX in weight_files(sharded)
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    state = tokenizer.state_dict()
    index = json.loads((sharded / INDEX).read_text())
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    recorded = json.loads((sharded / "config.json").read_text())["sha256"]
    assert all(recorded[name] == sha256_of(sharded / name) for name in weight_files(sharded))
    loaded = Tokenizer.from_pretrained(sharded)
    assert loaded.fingerprint == tokenizer.fingerprint
    half = Tokenizer.from_pretrained(sharded, dtype="bfloat16")
    assert half.fingerprint == tokenizer.fingerprint
    assert half.last_layer.dtype == torch.bfloat16
    again = Tokenizer.from_pretrained(loaded.save_pretrained(sharded))  # one file again
    assert weight_files(sharded) == ["model.safetensors"]
    assert again.fingerprint == tokenizer.fingerprint


def test_hugging_face_reads_our_shards(tokenizer, sharded) -> None:
    other = VQTokenizer(tokenizer.config)
    load_torch_model(other, sharded, strict=True)
    assert other.checksum == tokenizer.checksum


@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_changed_shard_is_found(sharded, number: int) -> None:
    name = [name for name in weight_files(sharded) if name != INDEX][number]
    content = bytearray((sharded / name).read_bytes())
    content[-3] ^= 1
    (sharded / name).write_bytes(bytes(content))
    with pytest.raises(SmaltiError, match=f"{name} is damaged, or was changed"):
        Tokenizer.from_pretrained(sharded)
    Tokenizer.from_pretrained(sharded, verify=False)


def test_shards_are_read_strictly(sharded) -> None:
    names = [name for name in weight_files(sharded) if name != INDEX]
    index = json.loads((sharded / INDEX).read_text())
    second = load_file(sharded / names[1])

    def refused(message: str, verify: bool = False) -> None:
        with pytest.raises(SmaltiError, match=message):
            Tokenizer.from_pretrained(sharded, verify=verify)

    extra = dict(second) | {next(iter(load_file(sharded / names[0]))): torch.zeros(1)}
    save_file(extra, sharded / names[1])
    refused("both have")
    save_file({**second, "surplus": torch.zeros(1)}, sharded / names[1])
    refused("has a tensor surplus that the model does not have")
    (sharded / names[1]).unlink()
    refused(f"lacks {names[1]}, which {INDEX} names: copy it again")
    save_file(dict(list(second.items())[1:]), sharded / names[1])
    refused("lacks the tensor")
    save_file(second, sharded / names[1])
    for content, message in (
        ({**index, "weight_map": {}}, 'has no "weight_map": it is damaged'),
        ({**index, "weight_map": {"a": "../model.safetensors"}}, "which is no file of weights"),
        ({**index, "weight_map": {"a": "model.bin"}}, "which is no file of weights"),
    ):
        (sharded / INDEX).write_text(json.dumps(content))
        refused(message)


def test_a_changed_index_is_found(sharded) -> None:
    index = json.loads((sharded / INDEX).read_text())
    (sharded / INDEX).write_text(json.dumps({**index, "note": 1}))
    with pytest.raises(SmaltiError, match=rf"{INDEX} is damaged, or was changed"):
        Tokenizer.from_pretrained(sharded)


def test_a_size_of_shards_must_be_a_size(tokenizer, tmp_path) -> None:
    with pytest.raises(SmaltiError, match="max_shard_size is 'large'; give a size such as"):
        tokenizer.save_pretrained(tmp_path / "m", max_shard_size="large")
    assert not (tmp_path / "m").exists()


def test_a_half_downloaded_sharded_model_is_named(sharded, monkeypatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(sharded))
    assert Tokenizer.from_pretrained("someone/model", local_files_only=True)
    (sharded / INDEX).unlink()
    with pytest.raises(SmaltiError, match="its download was not finished"):
        Tokenizer.from_pretrained("someone/model", local_files_only=True)


# -- variants --------------------------------------------------------------------------------------


def test_a_variant_lies_beside_the_weights_it_is_one_of(tokenizer, tmp_path) -> None:
    folder = tokenizer.save_pretrained(tmp_path / "m")
    half = Tokenizer.from_pretrained(folder, dtype="float16")
    half.save_pretrained(folder, variant="fp16")
    assert weight_files(folder) == ["model.fp16.safetensors", "model.safetensors"]
    loaded = Tokenizer.from_pretrained(folder, variant="fp16", dtype="auto")
    assert loaded.last_layer.dtype == torch.float16
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.checksum == half.checksum
    assert Tokenizer.from_pretrained(folder).checksum == tokenizer.checksum
    tokenizer.save_pretrained(folder, max_shard_size=SIZE)  # the variant stays, verified
    half.save_pretrained(folder, variant="fp16", max_shard_size=SIZE // 2)
    names = weight_files(folder)
    assert "model.safetensors.index.fp16.json" in names and INDEX in names
    assert any(name.startswith("model.fp16-00001-of-") for name in names)
    assert Tokenizer.from_pretrained(folder, variant="fp16").fingerprint == tokenizer.fingerprint
    assert Tokenizer.from_pretrained(folder).checksum == tokenizer.checksum


def test_a_variant_of_other_weights_goes(tokenizer, tmp_path) -> None:
    folder = tokenizer.save_pretrained(tmp_path / "m", variant="fp16")
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias.add_(1)
    tokenizer.save_pretrained(folder)
    assert weight_files(folder) == ["model.safetensors"]


def test_a_variant_that_is_not_there_is_named(tokenizer, tmp_path) -> None:
    folder = tokenizer.save_pretrained(tmp_path / "m", variant="fp16")
    with pytest.raises(SmaltiError, match=r'has no model\.safetensors; .* give variant="fp16"'):
        Tokenizer.from_pretrained(folder)
    message = r"has no model\.bf16\.safetensors; it has model\.fp16\.safetensors: leave variant out"
    with pytest.raises(SmaltiError, match=message):
        Tokenizer.from_pretrained(folder, variant="bf16")
    for wrong in ("../x", "a.b", ""):
        with pytest.raises(SmaltiError, match="give letters and digits"):
            Tokenizer.from_pretrained(folder, variant=wrong)


def test_a_pipeline_has_variants_and_shards(tokenizer, prior, tmp_path) -> None:
    pipe = Pipeline(tokenizer, prior, ("cat", "dog", "emu"))
    folder = pipe.save_pretrained(tmp_path / "p", max_shard_size=SIZE)
    assert len(weight_files(folder / "prior")) > 2
    half = Pipeline.from_pretrained(folder, dtype="float16")
    half.save_pretrained(folder, variant="fp16")
    for options, dtype in (({}, torch.float32), ({"variant": "fp16"}, torch.float16)):
        loaded = Pipeline.from_pretrained(folder, dtype="auto", **options)
        assert loaded.tokenizer.last_layer.dtype == dtype
        assert loaded.prior.fingerprint == prior.fingerprint
    part = Prior.from_pretrained(folder, variant="fp16")
    assert part.fingerprint == prior.fingerprint
