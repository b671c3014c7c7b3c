"""Recipes that name a paper state its settings, and say what differs."""

import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from smalti.cli import parse_config
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_tokenizer import TrainTokenizerConfig

RECIPES = Path(__file__).parents[2] / "scripts" / "configs"
IMAGENET = 1_281_167  # training pictures

# The authors' settings, from their papers and code; epochs are of ImageNet.
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.95}
GAN = {"adam_beta1": 0.5, "adam_beta2": 0.9}
UNCLIPPED = {"max_grad_norm": 1e9}
VAR_STEPS = 250 * IMAGENET / 768
LPIPS = {"objective.perceptual_weight": 1.0, "objective.perceptual_network": "vgg"}
TRANSFORMER = {
    "train_batch_size": 256,
    "learning_rate": 1e-4,
    "lr_warmup_steps": 0,
    "lr_final_ratio": 1.0,
}
DIT = {**TRANSFORMER, **UNCLIPPED, "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.0}
AUTHORS: dict[str, dict[str, Any]] = {
    "vq_f16": {
        **LPIPS, **ADAM, "objective.l1_weight": 0.0, "objective.l2_weight": 1.0,
        "objective.adversarial_weight": 0.5, "objective.adaptive": False,
        "objective.adversarial_start": 20_000, "train_batch_size": 128, "learning_rate": 1e-4,
        "epochs": 40, "max_grad_norm": 1.0, "crop": "random", "random_crop.min_fraction": 0.8,
        "random_crop.max_fraction": 1.0, "flip": True,
    },
    "vqgan_f16": {
        **LPIPS, **GAN, "objective.l1_weight": 1.0, "objective.l2_weight": 0.0,
        "objective.adversarial_weight": 0.8, "objective.adaptive": True,
        "objective.adversarial_start": 250_000, "learning_rate": 4.5e-6 * 96,
        "train_batch_size": 96, "crop": "random", "flip": False, "weight_decay": 0.0,
        **UNCLIPPED,
    },
    "kl_f8": {
        **LPIPS, **GAN, "objective.l1_weight": 1.0, "objective.l2_weight": 0.0,
        "objective.adversarial_weight": 0.5, "objective.adaptive": True,
        "objective.adversarial_start": 50_000, "crop": "random", "flip": True,
        "tokenizer.kl_weight": 1e-6 / (3 * 256 * 256), "tokenizer.equivariance": 0.0,
        "learning_rate": 4.5e-6 * 96, "train_batch_size": 96, "weight_decay": 0.0, **UNCLIPPED,
    },
    "var_f16": {
        **LPIPS, **GAN, "objective.l1_weight": 0.2, "objective.l2_weight": 1.0,
        "objective.adversarial_weight": 0.4, "objective.adaptive": True,
        "objective.adversarial_start": 0.2 * VAR_STEPS, "epochs": 250,
        "objective.adversarial_ramp": 0.02 * VAR_STEPS, "lr_warmup_steps": 0.01 * VAR_STEPS,
        "train_batch_size": 768, "learning_rate": 3e-4, "lr_final_ratio": 0.3,
        "weight_decay": 0.005, "max_grad_norm": 10.0, "random_crop.min_fraction": 1 / 1.125,
        "random_crop.max_fraction": 1 / 1.125, "flip": False,
    },
    "vqvae_f4": {
        "objective.l2_weight": 1.0, "objective.perceptual_weight": 0.0, "learning_rate": 2e-4,
        "objective.adversarial_weight": 0.0, "train_batch_size": 128, "max_train_steps": 250_000,
        "tokenizer.quantizer.codebook.vocab_size": 512, **UNCLIPPED,
    },
    "gpt_b_prior": {
        **TRANSFORMER, **ADAM, "prior.dropout": 0.1, "prior.label_dropout": 0.1,
        "weight_decay": 0.05, "max_grad_norm": 1.0, "epochs": 300,
    },
    "var_d16_prior": {
        **ADAM, "train_batch_size": 768, "epochs": 200, "learning_rate": 3e-4,
        "lr_warmup_steps": 4 * IMAGENET / 768, "lr_final_ratio": 0.1, "weight_decay": 0.05,
        "max_grad_norm": 2.0,
    },
    "sit_xl2_prior": {**DIT, "epochs": 1400, "ema_decay": 0.9999},
    "dit_xl2_prior": {
        **DIT, "epochs": 1400, "ema_decay": 0.9999, "prior.guided_channels": 3,
        "prior.predicts_variance": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", AUTHORS)
def test_a_recipe_has_the_settings_of_its_paper(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    kind: Any = TrainPriorConfig if name.endswith("prior") else TrainTokenizerConfig
    config = parse_config(kind, ["--config", str(path)], prog="test")
    for setting, expected in AUTHORS[name].items():
        if setting == "epochs":
            found: Any = config.max_train_steps * config.train_batch_size / IMAGENET
        else:
            found = reduce(getattr, setting.split("."), config)
        if isinstance(expected, float | int) and not isinstance(expected, bool):
            expected = pytest.approx(expected, rel=0.01)
        assert found == expected, setting


@pytest.mark.parametrize("name", AUTHORS)
def test_a_recipe_names_its_paper_and_what_differs(name: str) -> None:
    comments = [
        line
        for line in (RECIPES / f"{name}.yaml").read_text().splitlines()
        if line.startswith("# ")
    ]
    assert re.search(r"\(\d{4}\.\d{5}\)", " ".join(comments[:2]))  # its number on arXiv
    assert any(line.startswith("# Differs") for line in comments)
