"""A pipeline with a text-conditional prior."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import smalti
from smalti.cli import main as smalti_main
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
        ({}, "this pipeline is text-conditional: pass prompt_embeds"),
        ({"class_labels": 0}, "pass prompt_embeds, and no class_labels"),
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
    for arguments in ({}, {"prompt_embeds": torch.zeros(1, T, D)}):
        with pytest.raises(
            smalti.SmaltiError, match="class-conditional: pass class_labels, and no prompt_embeds"
        ):
            classes(**arguments)


def test_the_command_line_says_that_it_needs_python(pipe, tmp_path: Path, capsys) -> None:
    pipe.save_pretrained(tmp_path / "pipe")
    command = ["generate", "--model", str(tmp_path / "pipe"), "--output_dir", str(tmp_path / "o")]
    assert smalti_main(command) == 2
    assert "is text-conditional" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
