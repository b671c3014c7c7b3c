"""What is downloaded from the Hub: the files that a model needs, and no others."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from smalti import Pipeline, Prior, Tokenizer
from smalti.errors import SmaltiError

SHARD_SIZE = 8_000  # bytes


class FakeHub:
    """Repositories as folders in `root`; a download copies the files that were asked for."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache

    def download(self, repo_id: str, *, allow_patterns: list[str], **options: object) -> str:
        source = self.root / repo_id.partition("/")[2]
        names = [str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()]
        self.fetched = sorted(filter_repo_objects(names, allow_patterns=allow_patterns))
        copy = self.cache / repo_id.replace("/", "--")
        for name in self.fetched:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((source / name).read_bytes())
        return str(copy)


@pytest.fixture
def hub(tokenizer, prior, tmp_path: Path, monkeypatch) -> FakeHub:
    """It has a pipeline, in several precisions, with other files beside it."""
    pipe = Pipeline(tokenizer, prior, ["a", "b", "c"])
    folder = tmp_path / "hub" / "model"
    pipe.save_pretrained(folder, samples=Image.new("RGB", (3, 3)))
    half = Pipeline.from_pretrained(folder, dtype=torch.float16)
    half.save_pretrained(folder, variant="fp16", max_shard_size=SHARD_SIZE)
    for name in ("training.json", "tokenizer/other.safetensors", "prior/pytorch_model.bin"):
        (folder / name).write_text("{}")
    hub = FakeHub(tmp_path / "hub", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    return hub


def files_of(part: str) -> list[str]:
    return [f"{part}/config.json", f"{part}/model.safetensors"]


def test_a_pipeline_fetches_the_files_of_its_models(hub) -> None:
    assert Pipeline.from_pretrained("me/model")(0, temperature=0).images
    own = ["model_index.json", *files_of("prior"), "samples.png", "sampling.json"]
    assert hub.fetched == [*own, *files_of("tokenizer")]


def test_a_variant_fetches_its_shards_alone(hub) -> None:
    pipe = Pipeline.from_pretrained("me/model", variant="fp16", dtype="auto")
    assert next(pipe.prior.parameters()).dtype == torch.float16
    weights = [name for name in hub.fetched if "/model" in name]
    assert len(weights) > 4 and all("fp16" in name for name in weights)


@pytest.mark.parametrize("cls", [Tokenizer, Prior])
def test_a_part_of_a_pipeline_is_fetched_alone(hub, cls) -> None:
    kind = cls.registry.kind
    local = cls.from_pretrained(hub.root / "model")
    assert cls.from_pretrained("me/model").fingerprint == local.fingerprint
    assert hub.fetched == ["model_index.json", *files_of(kind)]
    assert cls.from_pretrained("me/model", subfolder=kind).fingerprint == local.fingerprint
    assert hub.fetched == files_of(kind)


def test_a_model_of_diffusers_is_refused_before_its_weights_are_fetched(hub) -> None:
    folder = hub.root / "vae-of-diffusers"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (folder / "diffusion_pytorch_model.safetensors").touch()
    message = (
        "me/vae-of-diffusers is a AutoencoderKL of Diffusers, not a model of smalti: convert it "
        "with smalti convert diffusers-kl vae-of-diffusers vae-of-diffusers-smalti; "
        "hf download me/vae-of-diffusers --local-dir vae-of-diffusers downloads it"
    )
    with pytest.raises(SmaltiError) as error:
        Tokenizer.from_pretrained("me/vae-of-diffusers")
    assert str(error.value) == message and hub.fetched == ["config.json"]
