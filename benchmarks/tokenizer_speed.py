"""Speed of smalti's tokenizers relative to diffusers' of the same sizes.

    python benchmarks/tokenizer_speed.py --image_size 64 --batch_size 8

Prints ratios of median times, smalti over diffusers (below 1 smalti is faster), for encoding,
decoding and a training step of the KL-VAE (`AutoencoderKL`) and of the VQ model (`VQModel`), and
the time and peak memory of the codebook search with 16,384 and 262,144 codes. Both sides are timed
in turns in one process, so that other load on the machine affects them equally.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.quantizers import base as quantize
from smalti.tokenizer.quantizers.base import nearest_codes
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=64, channel_mult=(1, 2, 4), num_res_blocks=2, attention_levels=(), z_channels=4
)
VQ_CODES = 1024


def theirs_options() -> dict[str, object]:
    """CONV as the options of diffusers' models."""
    levels = len(CONV.channel_mult)
    return {
        "block_out_channels": tuple(CONV.channels * m for m in CONV.channel_mult),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": CONV.num_res_blocks,
        "latent_channels": CONV.z_channels,
        "norm_num_groups": 16,
    }


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> float:
    """Median time of `ours` over that of `theirs`, timed in turns."""
    seconds: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    for _ in range(rounds + 1):  # the first round warms up
        for call in (ours, theirs):
            start = time.perf_counter()
            call()
            seconds[call].append(time.perf_counter() - start)
    return statistics.median(seconds[ours][1:]) / statistics.median(seconds[theirs][1:])


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A function that takes one step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def compare_kl(images: Tensor, rounds: int) -> dict[str, float]:
    """KLTokenizer relative to AutoencoderKL, by kind of pass."""
    ours = KLTokenizer(KLConfig(image_size=images.shape[-1], conv=CONV))
    theirs = diffusers.AutoencoderKL(**theirs_options())
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


def compare_vq(images: Tensor, rounds: int) -> dict[str, float]:
    """VQTokenizer relative to VQModel, by kind of pass, both with a plain codebook and
    straight-through gradients."""
    codebook = CodebookConfig(VQ_CODES, CONV.z_channels, l2_normalise=False, revive_after=0)
    quantizer = NearestConfig(codebook=codebook)
    config = VQConfig(image_size=images.shape[-1], conv=CONV, quantizer=quantizer)
    ours = VQTokenizer(config)
    theirs = diffusers.VQModel(**theirs_options(), num_vq_embeddings=VQ_CODES)

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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each side")
    parser.add_argument(
        "--codes", type=int, nargs="+", default=[16_384, 262_144], help="sizes of codebooks"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size) * 2 - 1
    for name, compare in (("KL-VAE", compare_kl), ("VQ", compare_vq)):
        for what, value in compare(images, args.rounds).items():
            print(f"{name:6} {what:13} smalti / diffusers = {value:.2f}")
    for vocab_size in args.codes:
        print(search_memory(vocab_size, 16_384))


if __name__ == "__main__":
    main()
