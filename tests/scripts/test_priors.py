"""Every family of priors through the one script: trained, resumed, sampled, refused."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import assert_same, losses, stop_after

import smalti
from smalti.cli import main as smalti_main
from smalti.config import recipe_text
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.path import DDPMPath
from smalti.prior.flow.prior import FlowConfig
from smalti.prior.next_scale.model import NextScaleConfig
from smalti.prior.next_token.model import NextTokenConfig
from smalti.prior.presets import PRESETS as PRIORS
from smalti.scripts import train_prior as script
from smalti.scripts.demo import DemoConfig, chosen_scale
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.evaluate import EvaluateConfig, evaluate
from smalti.scripts.train_prior import PriorConfig, TrainPriorConfig, train
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.presets import PRESETS as TOKENIZERS
from smalti.tokenizer.presets import TokenizerConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 1, 2), num_res_blocks=1, attention_levels=(), z_channels=8
)
CODEBOOK = CodebookConfig(16, 4)
VQ = VQConfig(image_size=32, conv=CONV, quantizer=NearestConfig(codebook=CODEBOOK))
SCALES = MultiScaleConfig(codebook=CODEBOOK, scales=((1, 1), (3, 3), (8, 8)), convolutions=1)
KL = KLConfig(
    image_size=32,
    conv=replace(CONV, z_channels=2),
    latent_mean=(0.1, -0.2),
    latent_std=(0.5, 0.3),
)
NETWORK = DiTConfig(patch_size=2, depth=1, width=16, num_heads=1, frequency_size=16)


@dataclass(frozen=True)
class Case:
    tokenizer: TokenizerConfig
    prior: PriorConfig
    sampling: tuple[str, ...]  # flags of its own
    foreign: str  # a flag of another family


CASES = {
    "next-token": Case(
        VQ,
        NextTokenConfig(depth=1, width=16, num_heads=2, hidden=32, dropout=0.1),
        ("--temperature", "0.9", "--top_k", "5", "--guidance_schedule", "linear"),
        "solver",
    ),
    "next-scale": Case(
        replace(VQ, quantizer=SCALES),
        NextScaleConfig(depth=2, width=16, num_heads=2, drop_path=0.2, context_noise=0.2),
        ("--smooth", "True", "--top_p", "0.9"),
        "num_inference_steps",
    ),
    "flow": Case(
        KL,
        FlowConfig(network=NETWORK),
        ("--solver", "ddim:eta=0.5", "--schedule", "shifted:shift=2", "--num_inference_steps", "3"),
        "temperature",
    ),
    "diffusion": Case(
        KL,
        FlowConfig(network=NETWORK, path=DDPMPath(), prediction="noise", time_scale=1000.0),
        ("--solver", "ddpm", "--num_inference_steps", "3"),
        "top_k",
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures, and a folder for each case."""
    root = tmp_path_factory.mktemp("priors")
    generator = torch.Generator().manual_seed(0)
    for name in ("round", "square"):
        (root / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / "pictures" / name / f"{number}.png")
    return root


def config_of(root: Path, name: str) -> TrainPriorConfig:
    """Its recipe; tokenizer and latents are made at the first call."""
    folder, case = root / name, CASES[name]
    if not folder.exists():
        torch.manual_seed(0)
        cls = KLTokenizer if isinstance(case.tokenizer, KLConfig) else VQTokenizer
        cls(case.tokenizer).save_pretrained(folder / "tokenizer")
        encode(
            EncodeConfig(
                data=str(root / "pictures"),
                tokenizer=folder / "tokenizer",
                output_dir=folder / "latents",
            )
        )
    return TrainPriorConfig(
        output_dir=folder / "prior",
        latents=folder / "latents",
        tokenizer=folder / "tokenizer",
        prior=case.prior,
        max_train_steps=6,
        train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        weight_decay=0.1,
        mixed_precision="no",
        validation_steps=3,
        logging_steps=1,
    )


@pytest.fixture(params=CASES)
def trained(root: Path, request) -> tuple[str, TrainPriorConfig]:
    config = config_of(root, request.param)
    if not config.output_dir.exists():
        train(config)
    return request.param, config


def test_every_prior_resumes_bit_exactly(trained, tmp_path: Path) -> None:
    _, config = trained
    cut = replace(config, output_dir=tmp_path / "cut", resume_from_checkpoint="latest")
    for step in (2, 5):
        stop_after(cut, step, train)
    train(cut)
    assert_same(config.output_dir, cut.output_dir)
    assert [line["step"] for line in losses(cut.output_dir) if "val_loss" in line] == [3, 6]


def test_the_grid_of_the_last_step_is_not_sampled_twice(
    root: Path, tmp_path: Path, monkeypatch
) -> None:
    calls = []
    original = script.sample_grid
    monkeypatch.setattr(script, "sample_grid", lambda *a, **o: calls.append(1) or original(*a, **o))
    folder = train(replace(config_of(root, "next-token"), output_dir=tmp_path / "run"))
    assert len(calls) == 2  # after steps 3 and 6
    last = tmp_path / "run" / "samples" / "step_000006.png"
    with Image.open(folder / "samples.png") as saved, Image.open(last) as shown:
        assert saved.tobytes() == shown.tobytes()


def test_every_prior_is_generated_from_by_flags_of_its_own(trained, tmp_path: Path, capsys) -> None:
    name, config = trained
    job = ["generate", "--model", str(config.output_dir / "pipeline"), "--num_images_per_class"]
    job += ["2", "--output_dir", str(tmp_path / "out")]
    assert smalti_main([*job, *CASES[name].sampling]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 4


def test_an_option_of_another_family_is_refused_before_anything_is_written(
    trained, tmp_path: Path, capsys
) -> None:
    name, config = trained
    flag = CASES[name].foreign
    value = "heun" if flag == "solver" else "1"
    for command in ("generate", "evaluate"):
        job = [command, "--model", str(config.output_dir / "pipeline"), f"--{flag}", value]
        job += ["--data", str(root_of(config) / "pictures")] if command == "evaluate" else []
        assert smalti_main([*job, "--output_dir", str(tmp_path / command)]) == 2
        assert f'no sampling option "{flag}"' in capsys.readouterr().err
        assert not (tmp_path / command).exists()


def root_of(config: TrainPriorConfig) -> Path:
    return config.output_dir.parent.parent


@pytest.mark.parametrize("name", ["next-token", "next-scale", "flow"])
def test_every_prior_is_evaluated_with_its_likelihood(root: Path, tmp_path: Path, name) -> None:
    config = config_of(root, name)
    if not config.output_dir.exists():
        train(config)
    steps = {"num_inference_steps": 2} if name == "flow" else {}
    metrics = evaluate(
        EvaluateConfig(
            model=str(config.output_dir / "pipeline"),
            data=str(root / "pictures"),
            output_dir=tmp_path / "evaluation",
            num_samples=16,
            classifier_epochs=1,
            **steps,
        )
    )
    bits = metrics["heldout_bits_per_dimension"]
    if name == "flow":
        assert bits.protocol["dimension"] == "a number; of a density"
    else:  # six steps from ln V: 4 bits for each of 16 codes
        assert bits.value == pytest.approx(4, abs=0.5)
        assert bits.protocol["dimension"] == "a code"


@pytest.mark.parametrize(
    ("latents", "prior", "message"),
    [
        ("flow", "next-token", "a next-token prior models codes"),
        ("flow", "next-scale", "a next-scale prior models codes"),
        ("next-scale", "next-token", "use a next-scale prior"),
        ("next-scale", "flow", "a flow prior models continuous latents"),
        ("next-token", "next-scale", "a next-scale prior needs a multi-scale tokenizer"),
    ],
)
def test_a_prior_of_another_kind_of_latents_is_refused(
    root: Path, tmp_path: Path, latents: str, prior: str, message: str
) -> None:
    config = replace(
        config_of(root, latents), prior=CASES[prior].prior, output_dir=tmp_path / "out"
    )
    with pytest.raises(smalti.SmaltiError, match=message):
        train(config)
    assert not (tmp_path / "out").exists()


def test_a_flow_learns_posterior_samples_and_is_validated_on_the_mean(
    root: Path, tmp_path: Path, monkeypatch
) -> None:
    asked = []
    original = KLTokenizer.latents

    def latents(self, stored, *, generator=None, noise=None):
        asked.append(noise is not None)
        return original(self, stored, generator=generator, noise=noise)

    monkeypatch.setattr(KLTokenizer, "latents", latents)
    config = replace(config_of(root, "flow"), output_dir=tmp_path / "out", max_train_steps=1)
    train(config)
    assert asked == [True, True, False]  # two micro-batches, one validation


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prior.kind", "flow", "--prior.network.num_classes", "7"], "network.num_classes is 7"),
        (
            ["--prior.preset", "flow-nano", "--prior.network.grid", "4", "4"],
            "network.grid is (4, 4)",
        ),
        (["--prior.preset", "var-nano", "--prior.num_classes", "7"], "prior.num_classes is 7"),
        (["--prior.preset", "vra-nano"], 'did you mean "var-nano"'),
        (["--preview.solver", "heun"], 'no sampling option "solver"'),
        (["--preview.guidance_scale", "nan"], "guidance_scale is nan"),
        (["--prior.preset", "flow-nano", "--prior.kind", "next-scale"], "leave out one of the two"),
    ],
)
def test_what_the_latents_or_the_prior_do_not_allow_is_named(
    root: Path, tmp_path: Path, capsys, flags: list[str], message: str
) -> None:
    config = config_of(root, "next-token")
    command = ["train-prior", "--latents", str(config.latents), "--tokenizer"]
    command += [str(config.tokenizer), "--output_dir", str(tmp_path / "out"), *flags]
    assert smalti_main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- the demo ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "tokenizer", "prior"),
    [
        ({}, "vq-32-tiny", "gpt-nano"),
        ({"prior": "var-micro"}, "var-32-tiny", "var-micro"),
        ({"prior": "flow-nano"}, "kl-32-tiny", "flow-nano"),
        ({"tokenizer": "kl-32-tiny"}, "kl-32-tiny", "flow-nano"),
        ({"tokenizer": "var-32-tiny"}, "var-32-tiny", "var-nano"),
        ({"tokenizer": "fsq-32-tiny"}, "fsq-32-tiny", "gpt-nano"),
        ({"tokenizer": "fsq-32-tiny", "prior": "gpt-micro"}, "fsq-32-tiny", "gpt-micro"),
        ({"condition": "image"}, "kl-32-tiny", "flow-nano"),
        ({"condition": "text", "tokenizer": "fsq-32-tiny"}, "fsq-32-tiny", "gpt-nano"),
    ],
)
def test_the_demo_finds_the_tokenizer_for_a_prior_and_the_prior_for_a_tokenizer(
    monkeypatch, asked, tokenizer: str, prior: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scale = chosen_scale(DemoConfig(**asked))
    assert scale.tokenizer.tokenizer == TOKENIZERS[tokenizer]
    assert scale.prior.prior == PRIORS[prior]


def test_the_demo_with_captions_has_fewer_steps_and_samples_unless_asked(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain, text, asked = (
        chosen_scale(DemoConfig(**settings))
        for settings in ({}, {"condition": "text"}, {"condition": "text", "prior_steps": 900})
    )
    assert text.prior.max_train_steps == 0.8 * plain.prior.max_train_steps
    assert text.num_samples == 0.5 * plain.num_samples
    assert asked.prior.max_train_steps == 900


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prior": "var-nano", "tokenizer": "kl-32-tiny"}, "need a flow prior"),
        ({"prior": "gpt-nano", "tokenizer": "var-32-tiny"}, "need a next-scale prior"),
        ({"prior": "gpt-nona"}, 'did you mean "gpt-nano"'),
        ({"tokenizer": "kl-32-tyni"}, 'did you mean "kl-32-tiny"'),
    ],
)
def test_the_demo_refuses_a_pair_that_does_not_fit(asked, message: str) -> None:
    with pytest.raises(smalti.SmaltiError, match=message):
        chosen_scale(DemoConfig(**asked))


# -- options that only some networks can follow -------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ("ddpm:variance=learned", "this network predicts no variance"),
        ("ddim:eta=" + "[" * 50, "is not a value"),
        ("ddim:eta=[1", '"[1" in "ddim:eta=[1" is not a value'),
        ("ddim:eta=1,eta=0", '"eta" is repeated'),
        ("ddim:kind=heun", '"kind" is repeated'),
        ("ddim:eta", "is not an option"),
        ("huen", 'did you mean "heun"'),
    ],
)
def test_a_solver_that_cannot_work_is_refused_before_the_folder_is_claimed(
    root: Path, tmp_path: Path, capsys, solver: str, message: str
) -> None:
    config = config_of(root, "flow")
    if not config.output_dir.exists():
        train(config)
    pipeline, out = str(config.output_dir / "pipeline"), str(tmp_path / "out")
    flat = replace(config.prior, network=replace(NETWORK, out_channels=4))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(replace(config, prior=flat, output_dir=tmp_path / "out")))
    commands = [["train-prior", "--config", str(recipe), "--preview.solver", solver]]
    if "variance" not in solver:  # what was trained above does predict one
        commands.append(["generate", "--model", pipeline, "--solver", solver, "--output_dir", out])
    for command in commands:
        assert smalti_main(command) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_the_preview_may_change_on_resume(root: Path, tmp_path: Path) -> None:
    config = replace(config_of(root, "flow"), output_dir=tmp_path / "run", max_train_steps=1)
    train(config)
    train(
        replace(
            config,
            max_train_steps=2,
            preview=replace(config.preview, num_inference_steps=2),
            resume_from_checkpoint="latest",
        )
    )


def test_a_tokenizer_is_not_evaluated_with_flags_for_sampling(
    root: Path, tmp_path: Path, capsys
) -> None:
    config = config_of(root, "flow")
    command = ["evaluate", "--model", str(config.tokenizer), "--data", str(root / "pictures")]
    command += ["--output_dir", str(tmp_path / "out"), "--temperature", "0.5"]
    assert smalti_main(command) == 2
    assert "has no samples: leave out --temperature" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["next-token", "next-scale"])
def test_codes_and_labels_of_different_number_are_refused(root: Path, name: str) -> None:
    config = config_of(root, name)
    if not config.output_dir.exists():
        train(config)
    prior = smalti.Pipeline.from_pretrained(config.output_dir / "pipeline").prior
    codes = torch.zeros(4, prior.spec.length, dtype=torch.int64)
    with pytest.raises(smalti.SmaltiError, match="3 conditions were given for 4 samples"):
        prior.bits_per_dimension(codes, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", [{"guidance_scale": None}, {"guidance_interval": 0.5}])
def test_options_of_a_wrong_type_are_explained(root: Path, name: str, options) -> None:
    config = config_of(root, name)
    if not config.output_dir.exists():
        train(config)
    prior = smalti.Pipeline.from_pretrained(config.output_dir / "pipeline").prior
    with pytest.raises(smalti.SmaltiError, match=f"{next(iter(options))} is"):
        prior.sample(torch.zeros(1, dtype=torch.int64), **options)
