"""The discriminator in a real run: left out at weight 0, resumed bit-exactly, and independent of
how a batch is divided among micro-batches and processes."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from backbones import write_file
from jobs import forked
from PIL import Image
from runs import losses, weights

from smalti.cli import main as smalti_main
from smalti.config import config_to_dict
from smalti.scripts.train_tokenizer import TrainTokenizerConfig, discriminator_uniforms, train
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.discriminators.augmentation import AugmentConfig
from smalti.tokenizer.discriminators.frozen_features import FrozenFeatureDiscriminatorConfig
from smalti.tokenizer.discriminators.patchgan import PatchGANConfig
from smalti.tokenizer.discriminators.regularisers import PenaltyConfig
from smalti.tokenizer.discriminators.stylegan import StyleGANDiscriminatorConfig
from smalti.tokenizer.losses.objective import ObjectiveConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig
from smalti.training.config import RunConfig

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), z_channels=8
)
VQ = VQConfig(image_size=32, conv=CONV, quantizer=NearestConfig(codebook=CodebookConfig(16, 4)))
# Everything that could depend on how a batch is cut, or be forgotten by a checkpoint.
EVERYTHING = ObjectiveConfig(
    gram_weight=0.1,
    adaptive=True,
    adversarial_start=1,
    adversarial_ramp=2,
    discriminator=PatchGANConfig(8, 1, "spectral"),
    augment=AugmentConfig(1.0, 0.125, 0.5),
    penalties=PenaltyConfig(0.1, 2, 0.1, 0.1, 0.5),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        (root / name).mkdir()
        for i in range(12):
            pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            picture = Image.fromarray(pixels.numpy()).resize((32, 32), Image.Resampling.BILINEAR)
            picture.save(root / name / f"{i}.png")
    return root


def config(pictures: Path, out: Path, **changes) -> TrainTokenizerConfig:
    base = TrainTokenizerConfig(
        output_dir=out,
        data=str(pictures),
        tokenizer=VQ,
        objective=EVERYTHING,
        train_batch_size=8,
        mixed_precision="no",
        learning_rate=1e-3,
        max_train_steps=4,
        validation_steps=100,
        logging_steps=1,
    )
    return replace(base, **changes)


def test_a_weight_of_zero_leaves_the_network_out(pictures: Path, tmp_path: Path, monkeypatch):
    """A plain VQ-VAE builds neither discriminator nor LPIPS; its checkpoint holds neither."""
    from smalti.scripts import train_tokenizer as script
    from smalti.tokenizer.losses.perceptual import LPIPS

    def never(*args, **options):
        raise AssertionError("built though its weight is 0")

    monkeypatch.setattr(script, "DiscriminatorObjective", never)
    monkeypatch.setattr(LPIPS, "__init__", never)
    plain = ObjectiveConfig(adversarial_weight=0.0, perceptual_weight=0.0)
    train(config(pictures, tmp_path / "run", objective=plain, max_train_steps=2))
    names = {path.name for path in (tmp_path / "run" / "checkpoint-000002").iterdir()}
    assert not [name for name in names if "discriminator" in name]
    logged = losses(tmp_path / "run")[0]
    assert {"l2", "codebook", "commitment"} <= logged.keys()
    assert not {"perceptual", "gram", "adversarial", "discriminator", "logits_real"} & set(logged)


def test_gram_alone_needs_the_network_of_lpips(pictures: Path, tmp_path: Path) -> None:
    gram = ObjectiveConfig(adversarial_weight=0.0, perceptual_weight=0.0, gram_weight=1.0)
    train(config(pictures, tmp_path / "run", objective=gram, max_train_steps=1))
    assert losses(tmp_path / "run")[0]["gram"] > 0


def test_a_cut_batch_trains_as_the_whole(pictures: Path, tmp_path: Path) -> None:
    """Adaptive weight, penalties, anchors, augmentation and power iterations included."""
    for name, micro in (("one", 1), ("four", 4)):
        train(config(pictures, tmp_path / name, gradient_accumulation_steps=micro))
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    for a, b in zip(one[:4], four[:4], strict=True):
        assert {k: b[k] for k in a} == pytest.approx(a, rel=2e-3, abs=1e-5)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "four")
    for key in a:
        if key.endswith(("exp_avg", "anchors", ".u", ".v", "updates")):
            torch.testing.assert_close(a[key], b[key], rtol=2e-2, atol=2e-4, msg=key)


def test_resume_restores_the_whole_state_of_the_discriminator(
    pictures: Path, tmp_path: Path
) -> None:
    train(config(pictures, tmp_path / "whole"))
    out = tmp_path / "cut"
    train(config(pictures, out, max_train_steps=3))
    train(config(pictures, out, resume_from_checkpoint="latest"))
    whole, cut = weights(tmp_path / "whole"), weights(out)
    assert whole.keys() == cut.keys()
    assert [k for k in whole if not torch.equal(whole[k], cut[k])] == []
    kept = {key.rpartition("/")[2] for key in whole if key.startswith("discriminator.")}
    assert {"lecam.anchors", "lecam.updates", "discriminator.main.0.u"} <= kept
    assert whole["discriminator.safetensors/lecam.updates"] == 4


def test_bf16_keeps_second_derivatives_in_fp32(pictures: Path, tmp_path: Path) -> None:
    train(config(pictures, tmp_path / "run", mixed_precision="bf16"))
    logged = losses(tmp_path / "run")
    assert all(isinstance(v, float | int) for line in logged for v in line.values())  # no NaN
    assert ["r1" in line for line in logged[:4]] == [False, True, False, True]
    updates = weights(tmp_path / "run")["discriminator.safetensors/lecam.updates"]
    assert updates == 4  # no step of the discriminator was skipped


@pytest.mark.parametrize("kind", ["stylegan", "features"])
def test_other_discriminators_train_and_resume(pictures: Path, tmp_path: Path, kind: str) -> None:
    file = write_file(tmp_path / "vit.safetensors", depth=2, patch_size=8)
    discriminator = {
        "stylegan": StyleGANDiscriminatorConfig(4, 8),
        "features": FrozenFeatureDiscriminatorConfig(
            file, num_heads=2, depths=(0, 1), image_size=32
        ),
    }[kind]
    objective = replace(EVERYTHING, discriminator=discriminator)
    train(config(pictures, tmp_path / "whole", objective=objective, max_train_steps=3))
    out = tmp_path / "cut"
    train(config(pictures, out, objective=objective, max_train_steps=2))
    train(
        config(
            pictures, out, objective=objective, max_train_steps=3, resume_from_checkpoint="latest"
        )
    )
    whole, cut = weights(tmp_path / "whole"), weights(out)
    assert whole.keys() == cut.keys()
    assert [k for k in whole if not torch.equal(whole[k], cut[k])] == []
    assert not [k for k in whole if "backbone" in k]


def test_the_uniforms_of_an_image_depend_only_on_its_place_in_the_batch() -> None:
    def uniforms(world: int, rank: int, micro: int, step: int = 3) -> list[torch.Tensor]:
        run = SimpleNamespace(
            config=RunConfig(train_batch_size=24, gradient_accumulation_steps=micro),
            rank=rank,
            world_size=world,
            device=torch.device("cpu"),
        )
        return discriminator_uniforms(run, step)  # type: ignore[arg-type]

    (whole,) = uniforms(1, 0, 1)
    for world, micro in ((1, 4), (2, 1), (2, 3), (4, 2)):
        parts = [part for rank in range(world) for part in uniforms(world, rank, micro)]
        assert [len(part) for part in parts] == [24 // (world * micro)] * (world * micro)
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(uniforms(1, 0, 1, step=4)[0], whole)


def launch(settings: TrainTokenizerConfig, processes: int) -> None:
    """Train on some processes, as a recipe."""
    recipe = settings.output_dir.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(config_to_dict(settings)))
    command = ["train-tokenizer", "--config", str(recipe)]
    done = forked(lambda: sys.exit(smalti_main(command)), processes)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_second_derivatives_work_in_bf16_on_two_processes(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = config(pictures, out, mixed_precision="bf16", max_train_steps=2)
    launch(settings, processes=2)
    assert all(isinstance(v, float | int) for line in losses(out) for v in line.values())
    assert weights(out)["discriminator.safetensors/lecam.updates"] == 2  # no step was skipped


@pytest.mark.slow
def test_two_processes_train_a_discriminator_as_one_does(pictures: Path, tmp_path: Path) -> None:
    """Also with the batch cut and second derivatives under DDP."""
    for processes, micro in ((1, 1), (2, 2)):
        out = tmp_path / str(processes)
        launch(
            config(pictures, out, gradient_accumulation_steps=micro, max_train_steps=3), processes
        )
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    for a, b in zip(one[:3], two[:3], strict=True):
        assert {k: b[k] for k in a} == pytest.approx(a, rel=2e-3, abs=1e-5)
    first, second = weights(tmp_path / "1"), weights(tmp_path / "2")
    for key in first:
        if key.endswith(("exp_avg", "anchors", ".u", ".v", "updates")):
            torch.testing.assert_close(first[key], second[key], rtol=2e-2, atol=2e-4, msg=key)


def test_the_adversarial_loss_does_not_count_as_divergence(pictures: Path, tmp_path: Path) -> None:
    """It starts late and then rises; the level of the loss is that of the other losses."""
    run = config(pictures, tmp_path / "run")
    train(run)
    lines = [line for line in losses(tmp_path / "run") if "loss" in line]
    parts = [(line["loss"], line.get("adversarial", 0.0)) for line in lines]
    assert len(parts) == 4 and parts[0][1] == 0 and parts[-1][1] != 0
    state = json.loads((tmp_path / "run" / "checkpoint-000004" / "state.json").read_text())
    level = state["skipped"]["levels"]["tokenizer"]["mean"]
    assert level == pytest.approx(sum(loss - part for loss, part in parts) / 4, rel=1e-4)
    assert level != pytest.approx(sum(loss for loss, _ in parts) / 4, rel=1e-4)
