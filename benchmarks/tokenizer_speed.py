"""Speed of smalti's tokenizers relative to diffusers' of the same sizes.

    python benchmarks/tokenizer_speed.py --quick
    python benchmarks/tokenizer_speed.py --presets kl-f8 vq-f16 --image_size 256 --rounds 3
    python benchmarks/tokenizer_speed.py --small --image_size 64 --batch_size 8

Prints ratios of times, smalti over diffusers (below 1 smalti is faster), of `AutoencoderKL` and
`VQModel`: for encoding and decoding of published presets in fp32; with `--small` also for a
training step of small models; and the time and peak memory of the codebook search. Both sides are
timed in turns in one process, so that other load on the machine affects them equally; a ratio is
the median over the rounds, with the least and the greatest. `--more` adds, for each preset, the
compiled decoder, and bfloat16: its time relative to fp32 and how far its pictures are from those
of fp32. `--trained FOLDER` measures what bfloat16 costs a trained tokenizer: the PSNR of its
reconstructions of held-out emoji. `--demo_step` prints the shares of a training step of the demo,
and the least time that its operations take. `--quick` is a short run, with models a quarter as
wide, that ends within 20 s.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from smalti.data.dataset import ImageDataset
from smalti.data.sources.base import open_source
from smalti.scripts.demo import SCALES
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.discriminators.adversarial import (
    compute_adaptive_weight,
    last_layer_gradients,
)
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.losses.objective import (
    UNIFORMS_PER_IMAGE,
    DiscriminatorObjective,
    LossNetworks,
    adversarial_loss,
    reconstruction_losses,
    sum_of,
)
from smalti.tokenizer.losses.perceptual import LPIPS
from smalti.tokenizer.presets import PRESETS
from smalti.tokenizer.quantizers import base as quantize
from smalti.tokenizer.quantizers.base import nearest_codes
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=64, channel_mult=(1, 2, 4), num_res_blocks=2, attention_levels=(), z_channels=4
)
VQ_CODES = 1024


def theirs_options(conv: ConvConfig) -> dict[str, object]:
    """The same sizes as options of diffusers' models."""
    levels = range(len(conv.channel_mult))
    kinds = ["Attn" if level in conv.attention_levels else "" for level in levels]
    return {
        "block_out_channels": tuple(conv.channels * m for m in conv.channel_mult),
        "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)),
        "layers_per_block": conv.num_res_blocks,
        "latent_channels": conv.z_channels,
        "norm_num_groups": min(32, conv.channels // 4),
    }


class Ratio(list[float]):
    """Ratios of times, one for each round."""

    def __str__(self) -> str:
        return f"{statistics.median(self):.2f} ({min(self):.2f} to {max(self):.2f})"


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> Ratio:
    """Time of `ours` over that of `theirs`, timed in turns."""
    # With one thread, the time of the processor, which other programs do not lengthen.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    ratios = Ratio()
    for _ in range(rounds + 1):
        seconds = []
        for call in (ours, theirs):
            start = clock()
            call()
            seconds.append(clock() - start)
        ratios.append(seconds[0] / seconds[1])
    return Ratio(ratios[1:])  # the first round warms up


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A function that takes one step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def compare_kl(images: Tensor, rounds: int) -> dict[str, Ratio]:
    """KLTokenizer relative to AutoencoderKL, by kind of pass."""
    ours = KLTokenizer(KLConfig(image_size=images.shape[-1], conv=CONV))
    theirs = diffusers.AutoencoderKL(**theirs_options(CONV))
    with torch.no_grad():
        z = ours.encode(images)
        measured = {
            "encode": ratio(
                lambda: ours.encode(images), lambda: theirs.encode(images).latent_dist.mean, rounds
            ),
            "decode": ratio(lambda: ours.decode(z), lambda: theirs.decode(z).sample, rounds),
        }

    def our_loss() -> Tensor:
        output = ours(images)
        return (output.images - images).square().mean() + output.losses["kl"]

    def their_loss() -> Tensor:
        posterior = theirs.encode(images).latent_dist
        output = theirs.decode(posterior.sample()).sample
        return (output - images).square().mean() + 1e-6 * posterior.kl().mean()

    steps = training_step(ours, our_loss), training_step(theirs, their_loss)
    return {**measured, "training step": ratio(*steps, rounds)}


def compare_vq(images: Tensor, rounds: int) -> dict[str, Ratio]:
    """VQTokenizer relative to VQModel, by kind of pass, both with a plain codebook and
    straight-through gradients."""
    codebook = CodebookConfig(VQ_CODES, CONV.z_channels, l2_normalise=False, revive_after=0)
    quantizer = NearestConfig(codebook=codebook)
    config = VQConfig(image_size=images.shape[-1], conv=CONV, quantizer=quantizer)
    ours = VQTokenizer(config)
    theirs = diffusers.VQModel(**theirs_options(CONV), num_vq_embeddings=VQ_CODES)

    def their_codes() -> Tensor:
        return theirs.quantize(theirs.encode(images).latents)[2][2]

    with torch.no_grad():
        codes = ours.encode(images)
        shape = (len(images), *config.grid, CONV.z_channels)

        def their_decode() -> Tensor:
            entries = theirs.quantize.get_codebook_entry(codes.flatten(), shape)
            return theirs.decode(entries, force_not_quantize=True).sample

        measured = {
            "encode": ratio(lambda: ours.encode(images), their_codes, rounds),
            "decode": ratio(lambda: ours.decode(codes), their_decode, rounds),
        }

    def our_loss() -> Tensor:
        output = ours(images)
        return (output.images - images).square().mean() + sum(output.losses.values())

    def their_loss() -> Tensor:
        output = theirs(images)
        return (output.sample - images).square().mean() + output.commit_loss.mean()

    steps = training_step(ours, our_loss), training_step(theirs, their_loss)
    return {**measured, "training step": ratio(*steps, rounds)}


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio of images in [-1, 1], in dB."""
    return float(-10 * ((images - reference) / 2).square().mean().log10())


@torch.no_grad()
def compare_preset(
    name: str, images: Tensor, rounds: int, more: bool, narrow: bool
) -> dict[str, object]:
    """Encoding and decoding of a preset, or of one a quarter as wide, relative to diffusers' model
    of the same sizes."""
    config = replace(PRESETS[name], image_size=images.shape[-1])
    if narrow:
        config = replace(config, conv=replace(config.conv, channels=config.conv.channels // 4))
    ours: Tokenizer = {"kl": KLTokenizer, "vq": VQTokenizer}[config.kind](config).eval()
    options, theirs = theirs_options(config.conv), None
    if config.kind == "kl":
        theirs = diffusers.AutoencoderKL(**options)
    else:
        codebook = config.quantizer.codebook
        options |= {"num_vq_embeddings": codebook.vocab_size, "vq_embed_dim": codebook.code_dim}
        theirs = diffusers.VQModel(**options)
    latents = ours.encode(images)
    vectors = ours.vectors(latents)

    def their_encoding() -> object:
        if config.kind == "kl":
            return theirs.encode(images).latent_dist.mean
        return theirs.quantize(theirs.encode(images).latents)[2][2]

    def their_decoding() -> object:
        known = {} if config.kind == "kl" else {"force_not_quantize": True}
        return theirs.decode(vectors, **known).sample

    measured: dict[str, object] = {
        "encode": ratio(lambda: ours.encode(images), their_encoding, rounds),
        "decode": ratio(lambda: ours.decode(latents), their_decoding, rounds),
    }
    if more:
        measured |= other_decoders(ours, latents, their_decoding, rounds)
    return measured


def other_decoders(
    ours: Tokenizer, latents: Tensor, their_decoding: Callable[[], object], rounds: int
) -> dict[str, object]:
    """Decoding in bfloat16, relative to fp32, and compiled, relative to diffusers."""
    half, exact = copy.deepcopy(ours).cast(torch.bfloat16), ours.decode(latents)
    dtype = latents.dtype if latents.dtype == torch.int64 else torch.bfloat16
    given = latents.to(dtype)
    measured: dict[str, object] = {
        "bfloat16": f"{ratio(lambda: half.decode(given), lambda: ours.decode(latents), rounds)}, "
        f"pictures {psnr(half.decode(given).float(), exact):.1f} dB from those of fp32"
    }
    ours.compile_parts(backend="inductor")
    measured["compiled"] = ratio(lambda: ours.decode(latents), their_decoding, rounds)
    return measured


def search_memory(vocab_size: int, features: int, dim: int = 8) -> str:
    """Time of a codebook search, and the memory of its scores beside that of the full distance
    matrix."""
    rows, codebook = torch.randn(features, dim), torch.randn(vocab_size, dim)
    start = time.perf_counter()
    nearest_codes(rows, codebook)
    seconds = time.perf_counter() - start
    chunk = max(1, quantize.CHUNK_ELEMENTS // vocab_size)
    used, full = min(chunk, features) * vocab_size * 4, features * vocab_size * 4  # bytes
    return (
        f"{vocab_size:7} codes, {features} features: {seconds:.2f} s, "
        f"{used / 2**20:.0f} MiB of scores (full matrix: {full / 2**20:.0f} MiB)"
    )


@torch.no_grad()
def precision_of(folder: str) -> str:
    """PSNR of the reconstructions of 256 held-out emoji by a trained tokenizer, in fp32, with the
    decoder in bfloat16, and with encoder and decoder in bfloat16."""
    exact = Tokenizer.from_pretrained(folder).eval()
    half = copy.deepcopy(exact).cast(torch.bfloat16)
    dataset = ImageDataset(open_source("emoji"), exact.image_size, split="heldout")
    levels = dataset.levels
    assert levels is not None
    images = levels[:256] / 127.5 - 1
    latents = exact.encode(images)
    given = latents if latents.dtype == torch.int64 else latents.bfloat16()
    reference = psnr(exact.decode(latents).clamp(-1, 1), images)
    decoder = psnr(half.decode(given).float().clamp(-1, 1), images) - reference
    both = psnr(half.reconstruct(images.bfloat16()).float(), images) - reference
    return (
        f"{folder}: fp32 {reference:.3f} dB, bfloat16 decoder {decoder:+.4f} dB, encoder and "
        f"decoder {both:+.4f} dB"
    )


def demo_step(rounds: int) -> str:
    """Shares of a step of the demo's recipe, all losses on, in processor time; its floating-point
    operations, and the time that they would take at the speed of a product of matrices."""
    recipe = SCALES["cpu"].tokenizer
    objective, model = recipe.objective, VQTokenizer(recipe.tokenizer).train()
    judge = DiscriminatorObjective(objective, recipe.tokenizer.image_size)
    networks = LossNetworks(LPIPS.from_embedded(), judge.discriminator)
    optimizers = [torch.optim.AdamW(m.parameters(), fused=True) for m in (model, judge)]
    images = torch.rand(recipe.train_batch_size, 3, 32, 32) * 2 - 1
    uniforms = torch.rand(len(images), UNIFORMS_PER_IMAGE)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = call()
        seconds.setdefault(name, []).append(time.process_time() - start)
        return result

    def step() -> None:
        output = timed("tokenizer forward", lambda: model(images))
        parts = timed("LPIPS forward", lambda: reconstruction_losses(objective, networks, output))
        total = sum_of(parts)
        adversarial = timed(
            "discriminator of the tokenizer's loss",
            lambda: adversarial_loss(objective, judge.discriminator, output.images, uniforms),
        )
        weight = timed(
            "adaptive weight",
            lambda: compute_adaptive_weight(
                [last_layer_gradients(total, adversarial, model.last_layer)]
            ),
        )
        total = total + sum_of(output.losses) + 0.05 * weight * adversarial
        timed("backward of all these", total.backward)
        loss = timed(
            "discriminator forward", lambda: judge(images, output.images.detach(), uniforms, 0)
        )
        timed("discriminator backward", loss.total.backward)
        for optimizer in optimizers:
            timed("optimizers", optimizer.step)
            optimizer.zero_grad()
        model.discard_step()

    with FlopCounterMode(display=False) as counter:
        step()
    seconds.clear()
    for _ in range(rounds):
        step()
    shares = {name: sum(values) / rounds for name, values in seconds.items()}
    matrix = torch.randn(1024, 1024)
    for _ in range(rounds):
        timed("probe", lambda: matrix @ matrix)
    floor = counter.get_total_flops() * min(seconds["probe"]) / (2 * 1024**3)
    lines = [f"{name:40} {1e3 * value:7.0f} ms" for name, value in shares.items()]
    return "\n".join(
        [
            *lines,
            f"together {sum(shares.values()):.2f} s of the processor; "
            f"{counter.get_total_flops() / 1e9:.0f} GFLOP take at least {floor:.2f} s",
        ]
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="*", default=["kl-f8", "vq-f16"])
    parser.add_argument("--small", action="store_true", help="also small models, with training")
    parser.add_argument("--more", action="store_true", help="also bfloat16 and compiled decoders")
    parser.add_argument("--trained", nargs="*", default=[], help="folders of trained tokenizers")
    parser.add_argument("--demo_step", action="store_true", help="also the demo's training step")
    parser.add_argument("--quick", action="store_true", help="one round of 64 px, narrow models")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--codes", type=int, nargs="*", default=[], help="sizes of codebooks")
    args = parser.parse_args()
    if args.quick:
        args.image_size, args.batch_size, args.rounds = 64, 1, 1
    torch.manual_seed(0)
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size) * 2 - 1
    found = {
        name: compare_preset(name, images, args.rounds, args.more, args.quick)
        for name in args.presets
    }
    if args.small:
        found |= {"KL-VAE": compare_kl(images, args.rounds), "VQ": compare_vq(images, args.rounds)}
    for name, parts in found.items():
        for what, value in parts.items():
            peer = "fp32" if what == "bfloat16" else "diffusers"
            print(f"{name:6} {what:13} smalti / {peer} = {value}")
    for folder in args.trained:
        print(precision_of(folder))
    if args.demo_step:
        print(demo_step(args.rounds))
    for vocab_size in args.codes:
        print(search_memory(vocab_size, 16_384))


if __name__ == "__main__":
    main()
