"""Pipelines of captions, and unconditional ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chance import generators, randomised

import smalti
from smalti.cli import main as smalti_main
from smalti.files import checked_lines
from smalti.prior.conditions.text import TextCondition
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.tokenizer.vq import VQTokenizer

T, D = 5, 6


@pytest.fixture
def pipe(tokenizer: VQTokenizer) -> smalti.Pipeline:
    config = NextTokenConfig(
        spec=tokenizer.spec,
        num_classes=0,
        condition="text",
        text_length=T,
        text_dim=D,
        depth=2,
        width=16,
        num_heads=2,
        hidden=32,
    )
    prior = NextTokenPrior(replace(config, tokenizer_fingerprint=tokenizer.fingerprint))
    torch.nn.init.normal_(prior.output.weight, std=0.5)
    return smalti.Pipeline(tokenizer, prior, ())


@pytest.fixture
def captions() -> tuple[torch.Tensor, torch.Tensor]:
    """Two captions of 5 and 3 tokens, padded on the right as tokenizers do."""
    return torch.randn(2, T, D), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_captions_become_pictures_in_order(pipe, captions) -> None:
    features, mask = captions
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    output = pipe(
        prompt_embeds=features,
        prompt_attention_mask=mask,
        num_images_per_prompt=2,
        generator=generators,
        guidance_scale=2.0,
        batch_size=3,
    )
    assert len(output.images) == 4
    assert output.labels == []
    last = TextCondition.left_padded(features[1:], mask[1:].bool())
    alone = pipe.prior.sample(
        last, generator=[torch.Generator().manual_seed(3)], guidance_scale=2.0
    )
    assert torch.equal(output.latents[3:], alone)


def test_padding_has_no_influence(pipe, captions) -> None:
    features, mask = captions
    other = features.clone()
    other[1, 3:] = 7.0
    draw = {"prompt_attention_mask": mask, "output_type": "latent"}
    one = pipe(prompt_embeds=features, generator=torch.Generator().manual_seed(0), **draw)
    two = pipe(prompt_embeds=other, generator=torch.Generator().manual_seed(0), **draw)
    assert torch.equal(one.latents, two.latents)


def test_it_is_saved_and_loaded(pipe, captions, tmp_path: Path) -> None:
    features, mask = captions
    pipe.save_pretrained(tmp_path / "pipe")
    again = smalti.Pipeline.from_pretrained(tmp_path / "pipe")
    assert again.classes == ()
    assert "prompt_embeds" in (tmp_path / "pipe" / "README.md").read_text()
    draw = {"prompt_embeds": features, "prompt_attention_mask": mask, "output_type": "latent"}
    one = pipe(generator=torch.Generator().manual_seed(0), **draw)
    two = again(generator=torch.Generator().manual_seed(0), **draw)
    assert torch.equal(one.latents, two.latents)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "this pipeline is text-conditional: pass prompt_embeds$"),
        ({"class_labels": 0}, "pass prompt_embeds, and no class_labels$"),
        ({"prompt": "a"}, "features of an unknown text encoder: pass prompt_embeds"),
        ({"prompt_embeds": torch.zeros(2, T)}, r"shape \(2, 5\)"),
        ({"prompt_embeds": torch.zeros(0, T, D)}, "no images were requested"),
        ({"prompt_embeds": torch.zeros(1, T + 1, D)}, r"this prior takes \(B, 5, 6\)"),
        (
            {
                "prompt_embeds": torch.zeros(1, T, D),
                "prompt_attention_mask": torch.zeros(1, T),
            },
            "a caption has no token",
        ),
        (
            {"prompt_embeds": torch.zeros(1, T, D), "prompt_attention_mask": torch.ones(2, T)},
            "the mask has shape",
        ),
    ],
)
def test_wrong_captions_are_refused(pipe, arguments, message) -> None:
    with pytest.raises(smalti.SmaltiError, match=message):
        pipe(**arguments)


def test_a_class_conditional_pipeline_takes_no_captions(tokenizer, prior) -> None:
    classes = smalti.Pipeline(tokenizer, prior, ("a", "b", "c"))
    captions = {"prompt_embeds": torch.zeros(1, T, D), "num_images": 2}
    for arguments, others in (({}, ""), (captions, ", and no num_images or prompt_embeds")):
        with pytest.raises(
            smalti.SmaltiError, match=f"class-conditional: pass class_labels{others}$"
        ):
            classes(**arguments)


def test_the_command_line_asks_for_prompts(pipe, tmp_path: Path, capsys) -> None:
    pipe.save_pretrained(tmp_path / "pipe")
    command = ["generate", "--model", str(tmp_path / "pipe"), "--output_dir", str(tmp_path / "o")]
    assert smalti_main(command) == 2
    assert "makes pictures of prompts: give --prompts FILE" in capsys.readouterr().err
    assert smalti_main([*command, "--prompt", "a red apple"]) == 2
    assert "features of an unknown text encoder" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


# -- prompts ---------------------------------------------------------------------------------------


@pytest.fixture
def byte_pipe(tokenizer: VQTokenizer) -> smalti.Pipeline:
    config = NextTokenConfig(
        spec=tokenizer.spec,
        num_classes=0,
        condition="text",
        text_length=12,
        text_dim=8,
        text_encoder="bytes",
        depth=1,
        width=16,
        num_heads=2,
        hidden=32,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    prior = randomised(NextTokenPrior(config))
    return smalti.Pipeline(tokenizer, prior, ())


def test_prompts_become_pictures_in_order(byte_pipe) -> None:
    draw = {"guidance_scale": 3.0, "output_type": "latent"}
    both = byte_pipe(
        prompt=["red", "blue"], num_images_per_prompt=2, generator=generators(0, 1, 2, 3), **draw
    )
    assert both.prompts == ["red", "red", "blue", "blue"] and both.labels == []
    alone = byte_pipe(prompt="blue", generator=generators(2), **draw)
    assert torch.equal(both.latents[2:3], alone.latents)
    assert "2 prompts" not in repr(both) and "red, blue" in repr(both)


def test_an_empty_negative_prompt_is_no_text(byte_pipe) -> None:
    def latents(**inputs) -> torch.Tensor:
        draw = {"guidance_scale": 30.0, "output_type": "latent", "generator": generators(0, 1)}
        return byte_pipe(prompt=["red", "blue"], **draw, **inputs).latents

    plain, other = latents(), latents(negative_prompt="green")
    assert torch.equal(plain, latents(negative_prompt=""))
    assert not torch.equal(plain, other)
    mixed = latents(negative_prompt=["", "green"])
    assert torch.equal(mixed[0], plain[0]) and torch.equal(mixed[1], other[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ["a" * 20]}, "longer than the text length of 12 tokens"),
        ({"prompt": [3]}, "give texts"),
        ({"prompt": []}, "no images were requested"),
        ({"prompt": "a", "negative_prompt": ["a", "b"]}, "2 of negative_prompt were given for 1"),
        ({"num_images": 2}, "text-conditional: pass prompt, and no num_images"),
    ],
)
def test_wrong_prompts_are_refused(byte_pipe, arguments, message) -> None:
    with pytest.raises(smalti.SmaltiError, match=message):
        byte_pipe(**arguments)


def test_the_command_generates_pictures_of_prompts(byte_pipe, tmp_path: Path, capsys) -> None:
    """A job that is stopped continues, with more prompts of the same file it grows, and the index
    names the prompt of each picture."""
    byte_pipe.save_pretrained(tmp_path / "pipe")
    assert 'prompt=["a red apple"]' in (tmp_path / "pipe" / "README.md").read_text()
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("red\n\nblue  \n", encoding="utf-8")
    command = ["generate", "--model", str(tmp_path / "pipe"), "--output_dir", str(out)]
    command += ["--prompts", str(prompts), "--num_images_per_prompt"]
    assert smalti_main([*command, "2"]) == 0
    first = {path.name: path.read_bytes() for path in out.glob("*.png")}
    index, _ = checked_lines(out / "manifest.jsonl", "index")
    assert [entry["prompt"] for entry in index] == ["red", "red", "blue", "blue"]
    assert "label" not in index[0]
    assert smalti_main([*command, "3"]) == 0
    again = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert len(again) == 6 and first.items() <= again.items()
    assert smalti_main([*command, "3", "--num_images_per_class", "2"]) == 2
    assert "num_images_per_class is 2, but" in capsys.readouterr().err
    assert smalti_main([*command, "3", "--negative_prompt", "green"]) == 2
    assert "its negative_prompt differs" in capsys.readouterr().err


def test_a_file_without_prompts_is_refused(byte_pipe, tmp_path: Path, capsys) -> None:
    byte_pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00a")
    command = ["generate", "--model", str(tmp_path / "pipe"), "--output_dir", str(tmp_path / "o")]
    for name, message in (
        ("empty.txt", "has no prompt: write one in each line"),
        ("binary.txt", "cannot be read"),
        ("missing.txt", "cannot be read"),
    ):
        assert smalti_main([*command, "--prompts", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


# -- no condition ----------------------------------------------------------------------------------


@pytest.fixture
def unconditional(tokenizer: VQTokenizer) -> smalti.Pipeline:
    config = NextTokenConfig(
        spec=tokenizer.spec,
        num_classes=0,
        condition="none",
        depth=1,
        width=16,
        num_heads=2,
        hidden=32,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    return smalti.Pipeline(tokenizer, randomised(NextTokenPrior(config)), ())


def test_an_unconditional_pipeline_takes_a_number(unconditional, tmp_path: Path) -> None:
    """Without guidance, for which there is nothing; the card has no word of classes."""
    assert unconditional.guidance_scale == 1.0
    output = unconditional(num_images=3, generator=generators(0, 1, 2))
    assert len(output.images) == 3 and output.labels == [] and output.names == []
    assert len(unconditional().images) == 1
    unconditional.save_pretrained(tmp_path / "pipe")
    card = (tmp_path / "pipe" / "README.md").read_text()
    assert "pipe(num_images=4)" in card and "class" not in card.lower()
    assert smalti.Pipeline.from_pretrained(tmp_path / "pipe").classes == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 0}, "unconditional: pass num_images, and no class_labels$"),
        ({"prompt": "a"}, "unconditional: pass num_images, and no prompt$"),
        ({"num_images": 0}, "no images were requested: pass num_images >= 1"),
        ({"num_images_per_prompt": 2}, "pass num_images"),
        ({"guidance_scale": 2.0}, "there is nothing to guide"),
    ],
)
def test_an_unconditional_pipeline_takes_no_condition(unconditional, arguments, message) -> None:
    with pytest.raises(smalti.SmaltiError, match=message):
        unconditional(**arguments)


def test_the_command_generates_unconditional_pictures(unconditional, tmp_path: Path, capsys):
    unconditional.save_pretrained(tmp_path / "pipe")
    command = ["generate", "--model", str(tmp_path / "pipe"), "--output_dir", str(tmp_path / "o")]
    assert smalti_main([*command, "--num_images", "3"]) == 0
    index, _ = checked_lines(tmp_path / "o" / "manifest.jsonl", "index")
    assert [sorted(entry) for entry in index] == [["file", "index", "seed", "sha256"]] * 3
    for flag in (["--class_labels", "a"], ["--prompt", "a"], ["--negative_prompt", "a"]):
        assert smalti_main([*command, *flag]) == 2
        assert f"{flag[0]} is given, but {tmp_path / 'pipe'} is unconditional: leave it out" in (
            capsys.readouterr().err
        )
    assert smalti_main([*command, "--num_images_per_prompt", "3"]) == 2
    assert "give --num_images_per_class or --num_images" in capsys.readouterr().err
    assert smalti_main([*command, "--num_images", "3", "--layout", "class"]) == 2
