"""Folders of pipelines: their parts by themselves, and what to do with those of Diffusers."""

import shlex
from pathlib import Path

import pytest

from smalti.cli import main
from smalti.errors import SmaltiError
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.tokenizer.base import Tokenizer

CLASSES = ("cat", "dog", "emu")
LOADERS = (Pipeline, Tokenizer, Prior)


@pytest.fixture
def pipe(tokenizer, prior) -> Pipeline:
    return Pipeline(tokenizer, prior, CLASSES)


@pytest.fixture
def folder(pipe, tmp_path) -> Path:
    return pipe.save_pretrained(tmp_path / "p")


def test_a_part_is_taken_out_of_a_pipeline(pipe, folder, monkeypatch) -> None:
    import huggingface_hub

    assert Prior.from_pretrained(folder).fingerprint == pipe.prior.fingerprint
    assert Tokenizer.from_pretrained(folder).fingerprint == pipe.tokenizer.fingerprint
    assert Prior.from_pretrained(folder.parent, subfolder="p").config == pipe.prior.config
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert Prior.from_pretrained("someone/pipeline", local_files_only=True)
    (folder / "prior" / "model.safetensors").unlink()
    with pytest.raises(SmaltiError, match=r"prior has no model\.safetensors"):
        Prior.from_pretrained(folder)


def test_the_hub_is_asked_for_the_subfolder_in_the_given_cache(folder, monkeypatch) -> None:
    import huggingface_hub

    asked = {}

    def download(*names, **options) -> str:
        asked.update(options)
        return str(folder.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    Pipeline.from_pretrained("someone/models", subfolder="p", cache_dir="/tmp/cache")
    assert asked["cache_dir"] == "/tmp/cache"
    assert all(pattern.startswith("p/") for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("cls", LOADERS)
def test_a_device_map_is_refused(folder, cls) -> None:
    with pytest.raises(SmaltiError, match=r'device_map is .auto.*device="cuda", or call enable_m'):
        cls.from_pretrained(folder, device_map="auto")


# -- folders of Diffusers: the message has the commands, and they run --------------------------


def commands(error: pytest.ExceptionInfo) -> list[list[str]]:
    """The commands of smalti in a message."""
    rest = str(error.value).partition("convert it with ")[2].split(", where")[0]
    return [shlex.split(text)[1:] for text in rest.split(" and then ")]


@pytest.fixture
def diffusers_folder(tmp_path, monkeypatch) -> Path:
    """A tiny DiTPipeline, as Diffusers saves it."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        layers_per_block=1,
        latent_channels=4,
    )
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    )
    scheduler = diffusers.DDIMScheduler()
    diffusers.DiTPipeline(transformer, vae, scheduler).save_pretrained("my dit")
    return Path("my dit")


@pytest.mark.parametrize("cls", LOADERS)
def test_a_diffusers_pipeline_is_converted_as_the_message_says(diffusers_folder, cls) -> None:
    with pytest.raises(SmaltiError, match="is a DiTPipeline of Diffusers") as error:
        cls.from_pretrained(diffusers_folder)
    first, second = commands(error)
    assert first[1] == "diffusers-kl" and second[1] == "diffusers-dit"
    if cls is Pipeline:
        assert main(first) == 0 and main(second) == 0
        pipe = Pipeline.from_pretrained("my dit-smalti")
        assert pipe(0, num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("cls", LOADERS)
def test_a_diffusers_vae_is_converted_as_the_message_says(diffusers_folder, cls) -> None:
    with pytest.raises(SmaltiError, match="is a AutoencoderKL of Diffusers") as error:
        cls.from_pretrained(diffusers_folder / "vae")
    (command,) = commands(error)
    if cls is Tokenizer:
        assert main(command) == 0
        assert Tokenizer.from_pretrained("vae-smalti").spec.channels == 4
    with pytest.raises(SmaltiError, match=r"--tokenizer DIR, where DIR is the converted VAE"):
        cls.from_pretrained(diffusers_folder / "transformer")


def test_other_pipelines_of_diffusers_are_named(diffusers_folder) -> None:
    index = diffusers_folder / "model_index.json"
    index.write_text(index.read_text().replace("DiTPipeline", "OtherPipeline"))
    (diffusers_folder / "transformer" / "config.json").unlink()
    with pytest.raises(SmaltiError, match=r"OtherPipeline of Diffusers.*its VAE is converted by"):
        Pipeline.from_pretrained(diffusers_folder)
    (diffusers_folder / "vae" / "config.json").unlink()
    with pytest.raises(SmaltiError, match=r"OtherPipeline of Diffusers.*none that smalti conv"):
        Pipeline.from_pretrained(diffusers_folder)
