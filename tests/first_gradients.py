"""The first gradients of every kind of stage, as each process holds them after they are averaged.

    torchrun --nproc_per_node=2 tests/first_gradients.py ROOT OUT [sharded]

With whatever is random but dropout: scale dropout, noise, transformations, times, dropped labels.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from toy_run import shard_on_cpu

from smalti.cli import leave_job
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowConfig
from smalti.prior.next_scale.model import NextScaleConfig
from smalti.prior.next_token.model import NextTokenConfig
from smalti.scripts import train_prior, train_tokenizer
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.options import TextOptions
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.discriminators.patchgan import PatchGANConfig
from smalti.tokenizer.kl import KLConfig
from smalti.tokenizer.losses.objective import ObjectiveConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig
from smalti.training.checkpoint import full_tensor, is_sharded
from smalti.training.optim import clip_gradients
from smalti.training.processes import join_job

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=8
)
CODEBOOK = CodebookConfig(16, 4)
SCALES = MultiScaleConfig(
    codebook=CODEBOOK,
    scales=((1, 1), (3, 3), (8, 8)),
    convolutions=1,
    scale_dropout=0.5,
    scale_dropout_keeps=1,
)
TOKENIZERS = {
    "nearest": VQConfig(image_size=16, conv=CONV, quantizer=NearestConfig(codebook=CODEBOOK)),
    "ema": VQConfig(
        image_size=16,
        conv=CONV,
        quantizer=NearestConfig(codebook=replace(CODEBOOK, learning="ema")),
    ),
    "multi-scale": VQConfig(image_size=16, conv=CONV, quantizer=SCALES),
    "kl": KLConfig(image_size=16, conv=replace(CONV, z_channels=2), equivariance=1.0),
}
FLOW = FlowConfig(
    network=DiTConfig(patch_size=2, depth=2, width=16, num_heads=1, frequency_size=16)
)
PRIORS = {  # tokenizer, prior, condition
    "next-token": (
        "nearest",
        NextTokenConfig(depth=2, width=16, num_heads=2, hidden=32),
        "class+text",
    ),
    "next-scale": ("multi-scale", NextScaleConfig(depth=2, width=16, num_heads=2), "class"),
    "flow": ("kl", FLOW, "class"),
    "flow-all": ("kl", FLOW, "class+text+image"),
}
COMMON = {
    "max_train_steps": 1,
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "mixed_precision": "no",
    "max_grad_norm": 1e-3,
}


def tokenizer_config(root: Path, out: Path, name: str) -> train_tokenizer.TrainTokenizerConfig:
    """The adversarial loss is on from the first step, its adaptive weight is of the whole batch."""
    return train_tokenizer.TrainTokenizerConfig(
        output_dir=out / "run" / name,
        data=str(root / "pictures"),
        tokenizer=TOKENIZERS[name],
        objective=ObjectiveConfig(
            adaptive=True,
            adversarial_start=0,
            perceptual_weight=0.0,
            discriminator=PatchGANConfig(8, 1),
        ),
        **COMMON,
    )


def prior_config(root: Path, out: Path, name: str) -> train_prior.TrainPriorConfig:
    tokenizer, prior, condition = PRIORS[name]
    within = ("dropout", "drop_path", *(() if tokenizer == "kl" else ("label_dropout",)))
    without = {f: 0.0 for f in within if hasattr(prior, f)}
    return train_prior.TrainPriorConfig(
        output_dir=out / "run" / name,
        latents=root / f"{tokenizer}-latents",
        tokenizer=root / tokenizer,
        prior=replace(prior, **without),
        condition=condition,
        text=TextOptions(length=8, dim=64) if "text" in condition else TextOptions(),
        **COMMON,
    )


def make_inputs(root: Path) -> None:
    """Tokenizers and latents, beside `root/pictures`."""
    for name in {tokenizer for tokenizer, *_ in PRIORS.values()}:
        torch.manual_seed(0)
        Tokenizer.registry.build(TOKENIZERS[name]).save_pretrained(root / name)
        encode(
            EncodeConfig(
                data=str(root / "pictures"),
                tokenizer=root / name,
                output_dir=root / f"{name}-latents",
                image_task="inpainting" if name == "kl" else "",
            )
        )


def gradients_of(root: Path, out: Path, *, sharded: bool = False) -> None:
    """Write OUT/{stage}-{number of the optimizer}.safetensors of the first step of each stage."""
    jobs = {} if sharded else {f"tokenizer-{name}": tokenizer_config for name in TOKENIZERS}
    jobs |= {f"prior-{name}": prior_config for name in PRIORS}
    for job, config_of in jobs.items():
        kind, name = job.split("-", 1)
        seen: list[Tensor] = []

        def recorded(module, max_norm, job=job, seen=seen):
            assert is_sharded(module) == sharded
            named = module.named_parameters()
            found = {k: full_tensor(p.grad).contiguous() for k, p in named if p.grad is not None}
            if join_job().is_main_process:
                save_file(found, out / f"{job}-{len(seen)}.safetensors")
            seen.append(found)
            return clip_gradients(module, max_norm)

        script = train_prior if kind == "prior" else train_tokenizer
        script.clip_gradients = recorded
        script.train(config_of(root, out, name))
        script.clip_gradients = clip_gradients


if __name__ == "__main__":
    root, out, *rest = sys.argv[1:]
    if rest:
        shard_on_cpu()
    gradients_of(Path(root), Path(out), sharded=bool(rest))
    assert torch.distributed.get_world_size() == 2
    leave_job()
