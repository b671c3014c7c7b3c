"""The stages as users run them: tiny, on a CPU, killed, resumed, on two processes."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbones import write_file
from jobs import forked
from runs import assert_same, losses, small_demo, stop_after, weights

import smalti
from smalti.cli import main as smalti_main
from smalti.cli import parse_config
from smalti.config import recipe_text
from smalti.data.dataset import DataOptions, read_options
from smalti.data.latent_cache.cache import LatentCache
from smalti.errors import SmaltiError
from smalti.prior.next_token.model import NextTokenConfig
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_prior import train as train_prior
from smalti.scripts.train_tokenizer import TrainTokenizerConfig
from smalti.scripts.train_tokenizer import train as train_tokenizer
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.discriminators.patchgan import PatchGANConfig
from smalti.tokenizer.kl import KLConfig
from smalti.tokenizer.losses.alignment import AlignmentConfig
from smalti.tokenizer.losses.objective import ObjectiveConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.fsq import FSQConfig
from smalti.tokenizer.quantizers.lookup_free import LookupFreeConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), z_channels=8
)
QUANTIZER = NearestConfig(codebook=CodebookConfig(16, 4, revive_after=2))
VQ = VQConfig(image_size=32, conv=CONV, quantizer=QUANTIZER)
OBJECTIVE = ObjectiveConfig(
    adaptive=True,
    adversarial_start=3,
    adversarial_ramp=3,
    discriminator=PatchGANConfig(8, 1),
)
COMMON = {
    "train_batch_size": 8,
    "mixed_precision": "no",
    "learning_rate": 1e-3,
    "validation_steps": 100,
    "logging_steps": 1,
}


def tokenizer_config(pictures: Path, out: Path, **changes) -> TrainTokenizerConfig:
    base = TrainTokenizerConfig(
        output_dir=out, data=str(pictures), tokenizer=VQ, objective=OBJECTIVE, **COMMON
    )
    return replace(base, max_train_steps=8, checkpointing_steps=100, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Pictures, a tokenizer, latents and a prior, made once."""
    root = tmp_path_factory.mktemp("stages")
    make_pictures(root / "pictures")
    tokenizer = train_tokenizer(tokenizer_config(root / "pictures", root / "tok"))
    encode(EncodeConfig(data=str(root / "pictures"), tokenizer=tokenizer, output_dir=root / "lat"))
    train_prior(prior_config(root, root / "prior"))
    return root


def make_pictures(root: Path) -> None:
    from PIL import Image

    for number, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir(parents=True)
        for i in range(8):
            colour = [20 * i] * 3
            colour[number] = 255
            Image.new("RGB", (40, 36), tuple(colour)).save(root / name / f"{i}.png")


def prior_config(root: Path, out: Path, **changes) -> TrainPriorConfig:
    base = TrainPriorConfig(
        output_dir=out,
        latents=root / "lat",
        tokenizer=root / "tok" / "tokenizer",
        prior=NextTokenConfig(depth=1, width=16, num_heads=2, hidden=32),
        **COMMON,
    )
    return replace(base, **{"max_train_steps": 8, "checkpointing_steps": 100, **changes})


def test_the_stages_leave_what_they_promise(trained: Path) -> None:
    tokenizer = smalti.Tokenizer.from_pretrained(trained / "tok" / "tokenizer")
    prior = smalti.Prior.from_pretrained(trained / "prior" / "pipeline" / "prior")
    cache = LatentCache(trained / "lat" / "train")
    assert prior.tokenizer_fingerprint == tokenizer.fingerprint
    assert prior.spec == tokenizer.spec == cache.spec
    assert cache.info.views == ("identity", "flip")
    assert (trained / "tok" / "reconstructions" / "step_000008.png").is_file()
    assert (trained / "prior" / "samples" / "step_000008.png").is_file()
    assert losses(trained / "tok")[-1].keys() == {"step", "val_psnr", "val_usage"}
    pipe = smalti.Pipeline(tokenizer, prior, cache.classes)
    assert pipe("red").images[0].size == (32, 32)


def test_the_resolved_config_of_a_run_is_a_recipe(trained: Path) -> None:
    file = str(trained / "tok" / "config.yaml")
    config = parse_config(TrainTokenizerConfig, ["--config", file], prog="test")
    assert config == tokenizer_config(trained / "pictures", trained / "tok")


def test_the_pipeline_of_a_run_shows_its_samples(trained: Path) -> None:
    folder = trained / "prior" / "pipeline"
    assert smalti.Pipeline.from_pretrained(folder).classes == ("blue", "green", "red")
    assert (folder / "samples.png").is_file()
    assert "![samples](samples.png)" in (folder / "README.md").read_text()


def test_cached_codes_are_those_of_the_pictures(trained: Path) -> None:
    from smalti.data.dataset import ImageDataset
    from smalti.data.sources.base import open_source

    tokenizer = smalti.Tokenizer.from_pretrained(trained / "tok" / "tokenizer")
    images = ImageDataset(open_source(str(trained / "pictures")), 32, split="train").all_images()
    cache = LatentCache(trained / "lat" / "train")
    assert torch.equal(cache.first_view(range(len(cache))).stored, tokenizer.encode(images))
    mirrored = cache.all_views(range(len(cache)))[:, 1]
    assert torch.equal(
        torch.from_numpy(mirrored.astype("int64")), tokenizer.encode(images.flip(-1))
    )


@pytest.mark.parametrize("cut", [2, 3, 5])  # before, at and after adversarial_start
def test_tokenizer_resume_is_bit_exact(trained: Path, tmp_path: Path, cut: int) -> None:
    config = tokenizer_config(
        trained / "pictures", tmp_path / "cut", resume_from_checkpoint="latest"
    )
    stop_after(config, cut, train_tokenizer)
    train_tokenizer(config)
    assert_same(trained / "tok", tmp_path / "cut")


OTHER_TOKENIZERS = {
    "ema": replace(VQ, quantizer=NearestConfig(codebook=CodebookConfig(16, 4, learning="ema"))),
    "entropy": replace(VQ, quantizer=NearestConfig(codebook=QUANTIZER.codebook, entropy_weight=1)),
    "fsq": replace(VQ, quantizer=FSQConfig(levels=(4, 4))),
    "spherical": replace(VQ, quantizer=LookupFreeConfig(bits=4, spherical=True)),
    "multi-scale": replace(
        VQ,
        quantizer=MultiScaleConfig(
            codebook=QUANTIZER.codebook,
            scales=((1, 1), (4, 4), (16, 16)),
            convolutions=1,
            scale_dropout=0.5,
            scale_dropout_keeps=1,
        ),
    ),
    "kl": KLConfig(image_size=32, conv=CONV, equivariance=0.5, kl_weight=1e-3),
}


@pytest.mark.parametrize("name", OTHER_TOKENIZERS)
def test_every_tokenizer_resumes_bit_exactly(trained: Path, tmp_path: Path, name: str) -> None:
    config = tokenizer_config(trained / "pictures", tmp_path / "whole")
    config = replace(config, tokenizer=OTHER_TOKENIZERS[name], max_train_steps=6)
    whole = train_tokenizer(config)
    cut = replace(config, output_dir=tmp_path / "cut", resume_from_checkpoint="latest")
    stop_after(cut, 4, train_tokenizer)
    resumed = train_tokenizer(cut)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    first, second = map(smalti.Tokenizer.from_pretrained, (whole, resumed))
    assert first.fingerprint == second.fingerprint
    if name == "kl":
        assert len(first.config.latent_std) == CONV.z_channels


def test_an_aligned_tokenizer_resumes_bit_exactly(trained: Path, tmp_path: Path) -> None:
    write_file(tmp_path / "vit.safetensors", depth=2, patch_size=8)
    config = replace(
        tokenizer_config(trained / "pictures", tmp_path / "whole"),
        tokenizer=OTHER_TOKENIZERS["kl"],
        alignment=AlignmentConfig(
            tmp_path / "vit.safetensors", num_heads=2, depth=1, image_size=32
        ),
        max_train_steps=5,
    )
    train_tokenizer(config)
    assert all(line["alignment"] > 0 for line in losses(config.output_dir) if "alignment" in line)
    cut = replace(config, output_dir=tmp_path / "cut", resume_from_checkpoint="latest")
    stop_after(cut, 3, train_tokenizer)
    train_tokenizer(cut)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(ValueError, match="use a KL tokenizer"):
        train_tokenizer(replace(config, tokenizer=VQ, output_dir=tmp_path / "vq"))


def test_usage_of_the_codebook_is_logged(trained: Path) -> None:
    steps = [line for line in losses(trained / "tok") if "code_usage" in line]
    assert len(steps) == 8
    assert all(0 < s["code_usage"] <= 1 and 1 <= s["code_perplexity"] <= 16 for s in steps)


def test_prior_resume_is_bit_exact_even_twice(trained: Path, tmp_path: Path) -> None:
    config = prior_config(trained, tmp_path / "cut", resume_from_checkpoint="latest")
    for cut in (3, 5):
        stop_after(config, cut, train_prior)
    train_prior(config)
    assert_same(trained / "prior", tmp_path / "cut")


def test_accumulation_equals_one_large_batch(trained: Path, tmp_path: Path) -> None:
    config = replace(prior_config(trained, tmp_path / "one"), max_train_steps=3)
    plain = replace(config.prior, dropout=0.0, label_dropout=0.0)
    for name, micro in (("one", 1), ("four", 4)):
        train_prior(
            replace(
                config, prior=plain, output_dir=tmp_path / name, gradient_accumulation_steps=micro
            )
        )
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    for key in one:
        torch.testing.assert_close(one[key], four[key], rtol=1e-4, atol=1e-6)


def test_a_nan_skips_the_step_everywhere_and_stops_the_run_in_the_end(
    trained: Path, tmp_path: Path, monkeypatch
) -> None:
    from smalti.scripts import train_tokenizer as script

    original = script.generator_loss

    def poisoned(*args, step: int, **options):
        loss = original(*args, step=step, **options)
        if step >= 4:
            loss.total = loss.total * float("nan")
        return loss

    monkeypatch.setattr(script, "generator_loss", poisoned)
    config = tokenizer_config(trained / "pictures", tmp_path / "nan", max_skipped_steps=3)
    with pytest.raises(SmaltiError, match="not finite in 3 steps in a row, up to step 6"):
        train_tokenizer(replace(config, checkpointing_steps=4))
    last = weights(tmp_path / "nan")
    assert all(value.isfinite().all() for value in last.values())
    assert (tmp_path / "nan" / "checkpoint-000004").is_dir()


# -- the command line -------------------------------------------------------------------------

TINY_FLAGS = [
    "--tokenizer.conv.channels", "8", "--tokenizer.conv.channel_mult", "1", "2",
    "--tokenizer.conv.attention_levels", "1", "--tokenizer.conv.z_channels", "8",
    "--tokenizer.quantizer.codebook.vocab_size", "16", "--objective.discriminator.channels", "8",
    "--train_batch_size", "8", "--mixed_precision", "no",
]  # fmt: skip


def test_commands_from_pictures_to_metrics(trained: Path, tmp_path: Path, capsys) -> None:
    model = ["--model", str(trained / "prior" / "pipeline")]
    out = ["--output_dir", str(tmp_path / "samples"), "--num_images_per_class", "2"]
    assert smalti_main(["generate", *model, *out, "--class_labels", "red", "0"]) == 0
    assert len(list((tmp_path / "samples").glob("*.png"))) == 4
    arguments = ["--data", str(trained / "pictures"), "--num_samples", "16"]
    folder = ["--output_dir", str(tmp_path / "eval"), "--classifier_epochs", "1"]
    assert smalti_main(["evaluate", *model, *arguments, *folder]) == 0
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    expected = {"psnr", "ssim", "lpips", "codebook_usage", "fd_alexnet", "kid_alexnet"}
    assert expected < set(summary["metrics"])
    assert all(metric["protocol"] for metric in summary["metrics"].values())
    for name in ("samples.png", "reconstructions.png", "neighbours.png"):
        assert (tmp_path / "eval" / name).is_file()


def test_a_tokenizer_is_measured_alone(trained: Path, tmp_path: Path) -> None:
    model, data = str(trained / "tok" / "tokenizer"), str(trained / "pictures")
    arguments = ["--model", model, "--data", data, "--output_dir", str(tmp_path)]
    assert smalti_main(["evaluate", *arguments]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    bits = summary["metrics"]["bits_per_pixel"]["value"]
    assert bits == pytest.approx(16 * 16 * 4 / 32**2)  # codes per image, log2(16), pixels
    assert "fd_alexnet" not in summary["metrics"] and "prior" not in summary


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train-tokenizer", "--data", "nowhere/at/all"], "does not exist: check --data"),
        (["train-tokenizer", "--data", "emojj"], 'did you mean "emoji"'),
        (["train-tokenizer", "--train_batch_size", "0"], "train_batch_size is 0"),
        (["train-tokenizer", "--tokenizer.preset", "vq-f61"], "no preset is called"),
        (["train-tokenizer", "--config", "nowhere.yaml"], "does not exist: check --config"),
        (["train-tokenizer", "--seed", "99999999999999999999"], "seed is 99999999999999999999"),
        (["train-prior", "--latents", "nowhere"], "does not exist"),
        (["train-prior", "--prior.num_classes", "7"], "prior.num_classes is 7, but it is taken"),
        (["train-prior", "--prior.tokenizer_fingerprint", "x"], "is taken from the latents"),
        (["train-prior", "--prior.spec.vocab_size", "8"], "is taken from the latents"),
        (["encode", "--batch_size", "0"], "batch_size is 0; it must be at least 1"),
        (["encode", "--shard_size", "-1"], "shard_size is -1; it must be at least 1"),
        (["demo", "--data", "emojj"], 'did you mean "emoji"'),
        (["demo", "--data", "nowhere/at/all"], "does not exist"),
        (["demo", "--seed", "-1"], "seed is -1"),
        (["demo", "--tokenizer_steps", "-1"], "max_train_steps is -1"),
        (["encode", "--tokenizer", "nowhere"], "folder not found: nowhere"),
        (["generate", "--model", "./nowhere"], "folder not found"),
        (["generate", "--temperature", "-1", "--model", "PIPE"], "temperature is -1"),
        (["generate", "--class_labels", "7", "--model", "PIPE"], "class label 7 is out of range"),
        (["generate", "--class_labels", "rad", "--model", "PIPE"], 'no class is named "rad"'),
        (["evaluate", "--data", "fashion", "--model", "PIPE"], "give --data as in training"),
    ],
)
def test_errors_end_in_one_line_and_write_nothing(
    trained: Path, tmp_path: Path, capsys, monkeypatch, arguments, message
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = trained / "prior" / "pipeline"
    arguments = [str(pipe) if a == "PIPE" else a for a in arguments]
    status = smalti_main([*arguments, "--output_dir", "out"])
    error = capsys.readouterr().err
    assert status == 2
    assert message in error.strip().splitlines()[-1]
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train-tokenizer", "train-prior", "encode", "demo"])
def test_an_output_that_is_a_file_is_one_line(
    trained: Path, tmp_path: Path, capsys, command: str
) -> None:
    (tmp_path / "file").write_text("x")
    inputs = {
        "train-prior": [
            "--latents", str(trained / "lat"), "--tokenizer", str(trained / "tok" / "tokenizer")
        ],
        "encode": [
            "--data", str(trained / "pictures"), "--tokenizer", str(trained / "tok" / "tokenizer")
        ],
    }.get(command, ["--data", str(trained / "pictures")])  # fmt: skip
    assert smalti_main([command, *inputs, "--output_dir", str(tmp_path / "file")]) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "file" in error and "choose another" in error
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_demo_that_failed_at_once_does_not_hold_its_folder(
    trained: Path, tmp_path: Path, capsys
) -> None:
    arguments = ["demo", "--data", str(trained / "pictures"), "--output_dir", str(tmp_path / "out")]
    assert smalti_main([*arguments, "--heldout_fraction", "2"]) == 2
    assert "heldout_fraction is 2" in capsys.readouterr().err
    assert smalti_main([*arguments, "--split_seed", "1", "--heldout_fraction", "3"]) == 2
    assert "heldout_fraction is 3" in capsys.readouterr().err  # and not "another split_seed"


def test_the_config_of_a_prior_run_is_a_recipe(trained: Path) -> None:
    file = str(trained / "prior" / "config.yaml")
    config = parse_config(TrainPriorConfig, ["--config", file], prog="test")
    assert config == prior_config(trained, trained / "prior")


@pytest.mark.parametrize("other", ["pipeline", "thesis"])
def test_a_pipeline_of_another_run_is_refused_before_training(
    trained: Path, tmp_path: Path, other: str
) -> None:
    target = tmp_path / "pipeline"
    first = prior_config(trained, tmp_path / "first", pipeline_dir=target, max_train_steps=1)
    if other == "pipeline":
        train_prior(first)
        train_prior(replace(first, resume_from_checkpoint="latest"))  # its own: saved again
    else:
        target.mkdir()
        (target / "thesis.tex").write_text("x")
    before = {p: p.stat().st_mtime_ns for p in target.rglob("*")}
    with pytest.raises(SmaltiError, match="was not saved by this run"):
        train_prior(replace(first, output_dir=tmp_path / "second"))
    assert {p: p.stat().st_mtime_ns for p in target.rglob("*")} == before
    assert not (tmp_path / "second").exists()


def test_a_prior_does_not_continue_with_other_latents(trained: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(trained, root)
    train_prior(prior_config(root, root / "run"))
    shutil.rmtree(root / "lat")
    encode(
        EncodeConfig(
            data=str(root / "pictures"),
            tokenizer=root / "tok" / "tokenizer",
            output_dir=root / "lat",
            views="identity",
        )
    )
    again = prior_config(root, root / "run", resume_from_checkpoint="latest", max_train_steps=9)
    with pytest.raises(SmaltiError, match="was trained on other data"):
        train_prior(again)


def test_another_run_is_never_overwritten(trained: Path, capsys) -> None:
    before = {p: p.stat().st_mtime_ns for p in (trained / "tok").rglob("*")}
    arguments = ["--data", str(trained / "pictures"), "--output_dir", str(trained / "tok")]
    assert smalti_main(["train-tokenizer", *arguments, *TINY_FLAGS]) == 2
    assert "already holds a run" in capsys.readouterr().err
    resume = ["--resume_from_checkpoint", "latest"]
    assert smalti_main(["train-tokenizer", *arguments, *TINY_FLAGS, *resume]) == 2
    assert "was made with" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (trained / "tok").rglob("*")} == before


def test_a_prior_refuses_latents_of_another_tokenizer(trained: Path, tmp_path: Path) -> None:
    other = train_tokenizer(tokenizer_config(trained / "pictures", tmp_path / "other", seed=5))
    with pytest.raises(SmaltiError, match="were made by another tokenizer"):
        train_prior(prior_config(trained, tmp_path / "prior", tokenizer=other))


# -- two processes ----------------------------------------------------------------------------


def launch(*command: str, processes: int) -> str:
    """What all processes of a command print."""
    done = forked(lambda: sys.exit(smalti_main(command)), processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nearest", "ema", "entropy", "spherical", "multi-scale"])
def test_two_processes_train_as_one_does(trained: Path, tmp_path: Path, name: str) -> None:
    """The first gradients agree to rounding, and the codebook learns and revives alike."""
    quantizer = {"nearest": VQ, **OTHER_TOKENIZERS}[name].quantizer
    recipe = tmp_path / "recipe.yaml"
    changed = replace(VQ, quantizer=quantizer)
    config = replace(tokenizer_config(trained / "pictures", tmp_path), tokenizer=changed)
    recipe.write_text(recipe_text(replace(config, max_train_steps=1)))
    for processes in (1, 2):
        out = tmp_path / str(processes)
        flags = ["--config", str(recipe), "--output_dir", str(out)]
        launch("train-tokenizer", *flags, processes=processes)
        state = json.loads((out / "checkpoint-000001" / "state.json").read_text())
        assert state["num_processes"] == processes
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    compared = [k for k in one if k.endswith(".exp_avg") or "quantizer.codebook" in k]
    assert {key.partition("/")[0] for key in compared} >= {
        "optimizer.safetensors", "discriminator_optimizer.safetensors",
    }  # fmt: skip
    for key in compared:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-6, msg=key)


@pytest.mark.slow
def test_two_processes_encode_the_same_files(trained: Path, tmp_path: Path) -> None:
    arguments = [
        "--data", str(trained / "pictures"), "--output_dir", str(tmp_path / "lat"),
        "--tokenizer", str(trained / "tok" / "tokenizer"), "--shard_size", "7",
    ]  # fmt: skip
    out = launch("encode", *arguments, processes=2)
    assert out.count("latents:") == 1  # the second knows that it is not the first
    one, two = (LatentCache(root / "lat" / "train") for root in (trained, tmp_path))
    assert len(two.info.shards) > 1
    keys = [(0, i) for i in range(len(one))]
    assert torch.equal(one.__getitems__(keys).stored, two.__getitems__(keys).stored)


@pytest.mark.slow
def test_the_demo_runs_stops_and_continues(
    trained: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    small_demo(monkeypatch)
    arguments = [
        "demo", "--data", str(trained / "pictures"), "--output_dir", str(tmp_path / "demo"),
        "--quick", "--tokenizer_steps", "2", "--prior_steps", "2",
    ]  # fmt: skip
    assert smalti_main(arguments) == 0
    folder = tmp_path / "demo"
    for name in ("samples.png", "reconstructions.png", "neighbours.png", "summary.json"):
        assert (folder / name).is_file()
    pipe = smalti.Pipeline.from_pretrained(folder / "pipeline")
    assert pipe.classes == ("blue", "green", "red")
    before = (folder / "summary.json").read_text()
    assert smalti_main(arguments) == 0  # nothing left to train
    assert (folder / "summary.json").read_text() == before
    capsys.readouterr()
    assert smalti_main([*arguments, "--seed", "3"]) == 2
    assert "another seed" in capsys.readouterr().err
    (folder / "demo.json").write_text("{")
    assert smalti_main(arguments) == 2
    assert "demo.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_task", "inpainting"], "image_task is inpainting, and condition is class"),
        (["--condition", "image", "--prior", "gpt-nano"], "this kind of prior takes none or class"),
        (["--condition", "sound"], "condition is sound; the demo has none, class, text"),
    ],
)
def test_the_demo_refuses_what_does_not_fit_before_it_trains(
    trained: Path, tmp_path: Path, capsys, flags: list[str], message: str
) -> None:
    place = ["--data", str(trained / "pictures"), "--output_dir", str(tmp_path / "demo")]
    assert smalti_main(["demo", *place, "--quick", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_every_stage_stores_the_options_of_the_pictures(trained: Path) -> None:
    folders = ["tok/tokenizer", "lat/train", "prior/pipeline"]
    folders += ["tok/checkpoint-000008", "prior/checkpoint-000008"]
    stored = [read_options(trained / folder) for folder in folders]
    assert stored == [DataOptions(data=str(trained / "pictures"))] * 5


def test_a_prior_without_label_dropout_is_not_guided_by_default(
    trained: Path, tmp_path: Path
) -> None:
    config = prior_config(trained, tmp_path / "prior", max_train_steps=1)
    undropped = replace(config, prior=replace(config.prior, label_dropout=0.0))
    assert smalti.Pipeline.from_pretrained(train_prior(undropped)).guidance_scale == 1.0
    checkpoint = smalti.Pipeline.from_pretrained(tmp_path / "prior" / "checkpoint-000001")
    assert checkpoint.guidance_scale == 1.0
