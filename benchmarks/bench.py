"""The table of `make bench`: smalti beside its peers and beside the limits of the machine.

    python benchmarks/bench.py --parts next-token tokenizers

Nothing is downloaded: weights are random. Both sides of a row are timed in turns in one process, so
that other load on the machine affects both. A ratio is the time of the other side over smalti's: of
a peer, above 1 smalti is faster; of a limit, it is the share that smalti reaches. The limits are
measured in the same type of numbers: `bandwidth` reads a matrix much larger than any cache,
`matmul` multiplies square matrices.

Peers: diffusers' own DiT, AutoencoderKL and VQModel; LlamaGen, VAR and SiT as plain_llamagen.py,
plain_var.py and dit_speed.py restate them, with the same weights, the first two held to the same
greedy codes. A part whose libraries are missing is left out, and named.
"""

import argparse
import contextlib
import copy
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from clock import Row, in_turns, table
from torch import Tensor, nn

from smalti.hub import Pretrained

GUIDANCE_SCALE = 4.0
READING = "reading the weights once"  # a limit, of next-token sampling
EXACT = "smalti in float32"  # beside half precision
HAS_DIFFUSERS = importlib.util.find_spec("diffusers") is not None
Pass = Callable[[], object]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Setting:
    """Where and how passes are timed."""

    device: torch.device
    dtype: torch.dtype
    rounds: int
    quick: bool  # models too small for a number, to see that it works
    compile: bool  # further rows, in which smalti's models are compiled
    batches: tuple[int, ...] = ()  # of next-token and next-scale sampling; (): each part's own

    @property
    def large(self) -> bool:
        """Whether the device is an accelerator, which small models do not keep busy."""
        return self.device.type != "cpu"

    def rows(self, what: str, ours: Pass, others: Mapping[str, Pass]) -> Iterator[Row]:
        """A row for each of `others`, by name."""
        first, *rest = in_turns(self.device, self.rounds, ours, *others.values())
        for name, seconds in zip(others, rest, strict=True):
            yield Row(what, name, seconds, first)

    def stages(self, *models: Pretrained, **options: str) -> Iterator[str]:
        """ "" for the models as they are, then, if that is wanted, ", compiled" with options."""
        yield ""
        if self.compile:
            for model in models:
                model.compile_parts(**options)
            yield ", compiled"

    def model(self, model: Model) -> Model:
        """A model on the device, in the type of numbers, in eval mode."""
        return model.to(self.device, self.dtype).eval()

    def exact(self, model: Model) -> Model | None:
        """A copy of a model in fp32, beside which half precision is timed; None in fp32."""
        if self.dtype == torch.float32:
            return None
        return copy.deepcopy(model).to(self.device).eval()

    def autocast(self) -> torch.autocast:
        """The context in which published code runs in half precision."""
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=half)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


# -------------------------------------------------------------------------------------------------
# Limits of the machine


class Limits:
    """A matrix-vector product, and a product of matrices, timed."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        megabytes, side = (4, 64) if setting.quick else (512, 8192 if setting.large else 1024)
        rows = megabytes * 2**20 // (4096 * setting.dtype.itemsize)
        self.matrix, self.vector = setting.randn(rows, 4096), setting.randn(4096)
        self.left, self.right = setting.randn(side, side), setting.randn(side, side)

    def read(self) -> None:
        """Read the matrix once."""
        torch.mv(self.matrix, self.vector)

    def multiply(self) -> None:
        """2 side^3 operations."""
        torch.mm(self.left, self.right)

    def reading(self, row: Row, size: int) -> Row:
        """A row whose other side was `read`, for `size` bytes."""
        return self._scaled(row, size / self.matrix.nbytes)

    def multiplying(self, row: Row, operations: int) -> Row:
        """A row whose other side was `multiply`, for a number of operations."""
        return self._scaled(row, operations / (2 * len(self.left) ** 3))

    def _scaled(self, row: Row, factor: float) -> Row:
        return replace(row, theirs=[seconds * factor for seconds in row.theirs])

    def line(self) -> str:
        """Both, in words."""
        times = in_turns(self.setting.device, self.setting.rounds, self.read, self.multiply)
        read, multiply = map(min, times)
        return (
            f"bandwidth {self.matrix.nbytes / read / 1e9:,.1f} GB/s, "
            f"matmul {2 * len(self.left) ** 3 / multiply / 1e12:,.3f} TFLOP/s"
        )


def bytes_of_products(model: nn.Module) -> int:
    """Bytes of the matrices that a decoding step multiplies with: all but embedding tables."""
    return sum(part.weight.nbytes for part in model.modules() if isinstance(part, nn.Linear))


def operations_of(call: Callable[[], object]) -> int:
    """Additions and multiplications of a call, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# -------------------------------------------------------------------------------------------------
# Parts of the table


def next_token(setting: Setting) -> Iterator[Row]:
    """Sampling of LlamaGen's smallest model, and of its 343 M model on an accelerator."""
    from plain_llamagen import PlainLlamaGen

    from smalti.data.latents import CodeSpec
    from smalti.prior.next_token.model import PRESETS, NextTokenPrior

    preset = "gpt-nano" if setting.quick else "gpt-l" if setting.large else "gpt-b"
    side = 2 if setting.quick else 8 if setting.large else 5
    config = replace(PRESETS[preset], spec=CodeSpec(16384, ((side, side),)), num_classes=1000)
    prior = NextTokenPrior(config)
    nn.init.normal_(prior.output.weight, std=0.02)
    exact = setting.exact(prior)
    setting.model(prior)
    peer, limits = PlainLlamaGen(copy.deepcopy(prior)), Limits(setting)
    for model in filter(None, (prior, exact)):
        model.arrange_for_sampling()  # as a pipeline does; the peer's weights stay as published
    batches = (1, 2) if setting.quick else (1, 64) if setting.large else (1, 8)
    eager = copy.deepcopy(prior) if setting.compile else prior
    # CUDA graphs: a step is too short for a host that starts its kernels one by one.
    stages = setting.stages(prior, **({"mode": "reduce-overhead"} if setting.large else {}))
    for stage, batch in ((s, b) for s in stages for b in setting.batches or batches):
        labels = torch.arange(batch, device=setting.device)
        if setting.dtype == torch.float32:
            check_equal(
                prior.sample(labels, temperature=0, guidance_scale=GUIDANCE_SCALE),
                peer.sample(labels, GUIDANCE_SCALE, top_k=1, top_p=1.0),
            )
        for scale, name in ((1.0, ""), (GUIDANCE_SCALE, ", guidance")):

            def ours(labels: Tensor = labels, scale: float = scale) -> Tensor:
                return prior.sample(labels, guidance_scale=scale, top_k=2000)

            def theirs(labels: Tensor = labels, scale: float = scale) -> Tensor:
                return peer.sample(labels, scale, top_k=2000, top_p=1.0)

            what = f"{preset}, {side * side} codes, batch {batch}{name}{stage}"
            others: dict[str, Pass] = {"LlamaGen, restated": theirs}
            if stage:
                others["smalti, not compiled"] = partial(
                    eager.sample, labels, guidance_scale=scale, top_k=2000
                )
            if exact is not None:
                others[EXACT] = partial(exact.sample, labels, guidance_scale=scale, top_k=2000)
            if batch == 1 and not name:
                others[READING] = limits.read
            size = side * side * bytes_of_products(prior)
            for row in setting.rows(what, ours, others):
                yield limits.reading(row, size) if row.beside == READING else row


def next_scale(setting: Setting) -> Iterator[Row]:
    """Sampling and decoding of VAR."""
    from next_scale_speed import build
    from plain_var import PlainVAR, decode

    preset = "var-nano" if setting.quick else "var-d16" if setting.large else "var-d12"
    sides = (1, 2) if setting.quick else (1, 2, 3, 4, 5, 6, 8, *((10, 13, 16) * setting.large))
    prior, tokenizer = build(preset, sides, setting.quick)
    peer = PlainVAR(copy.deepcopy(prior)).to(setting.device).eval()  # fp32, as published
    exact, exact_tokenizer = setting.exact(prior), setting.exact(tokenizer)
    setting.model(prior), setting.model(tokenizer)
    for model in filter(None, (prior, exact)):
        model.arrange_for_sampling()
    batches = (1,) if setting.quick else (1, 16) if setting.large else (1, 4)
    stages = setting.stages(prior, tokenizer)
    for stage, batch in ((s, b) for s in stages for b in setting.batches or batches):
        labels = torch.arange(batch, device=setting.device)
        if setting.dtype == torch.float32:
            greedy = prior.sample(labels, temperature=0, guidance_scale=GUIDANCE_SCALE)
            check_equal(greedy, peer.sample(labels, GUIDANCE_SCALE, top_k=1)[0])

        @torch.no_grad()
        def pictures(prior: Any, tokenizer: Any, labels: Tensor = labels) -> Tensor:
            options = {"guidance_scale": GUIDANCE_SCALE, "top_k": 900, "top_p": 0.96}
            return tokenizer.decode(prior.sample(labels, **options))

        def theirs(labels: Tensor = labels) -> Tensor:
            with setting.autocast():
                return decode(tokenizer, peer.sample(labels, GUIDANCE_SCALE, 900, 0.96)[1])

        what = f"{preset}, {16 * sides[-1]} px, sampling, decoding, batch {batch}, guidance{stage}"
        others: dict[str, Pass] = {"VAR, restated": theirs}
        if exact is not None:
            others[EXACT] = partial(pictures, exact, exact_tokenizer)
        yield from setting.rows(what, partial(pictures, prior, tokenizer), others)


def flow(setting: Setting) -> Iterator[Row]:
    """The network of SiT and DiT, guided sampling with it, and its training step."""
    from dit_speed import diffusers_dit, made, plain_euler, plain_network, training_step

    from smalti.prior.flow.prior import FlowPrior

    Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]

    preset = "sit-s/8" if setting.quick else "sit-b/2" if setting.large else "sit-s/2"
    batch, steps = (1, 2) if setting.quick else (32, 20) if setting.large else (1, 4)
    prior = made(preset, setting.device.type, depth=1 if setting.quick else None)
    exact = setting.exact(prior)
    setting.model(prior)
    network, config = prior.network, prior.config.network
    published = copy.deepcopy(network)  # neither packed nor compiled
    x = setting.randn(batch, config.in_channels, *config.grid)
    t = torch.full((batch,), 0.5, device=setting.device)
    labels = torch.arange(batch, device=setting.device) % config.num_classes

    def ours(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return network(x, t, labels)

    def plain(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        with setting.autocast():
            return plain_network(published, x, t, labels)

    def sample(prior: FlowPrior = prior) -> Tensor:
        noise = x.to(prior.network.final_layer.linear.weight.dtype)
        options = {"num_inference_steps": steps, "solver": "euler", "noise": noise}
        return prior.sample(labels, guidance_scale=GUIDANCE_SCALE, **options)

    def euler(velocity: Velocity) -> Pass:
        return lambda: plain_euler(velocity, x, labels, config.num_classes, steps)

    def forward(velocity: Velocity) -> Pass:
        return torch.no_grad()(lambda: velocity(x, t, labels))

    limits, peers = Limits(setting), {"SiT's code": plain}
    if HAS_DIFFUSERS:
        theirs = setting.model(diffusers_dit(config))

        def diffusers(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            times = t.to(setting.dtype)
            return theirs(x, timestep=times, class_labels=labels).sample[:, : config.in_channels]

        peers["diffusers"] = diffusers
    with torch.no_grad():
        operations = operations_of(forward(ours))
    for stage in setting.stages(prior):
        others = {name: forward(velocity) for name, velocity in peers.items()}
        others["multiplying matrices"] = limits.multiply
        what = f"{preset} forward, batch {batch}{stage}"
        *rows, limit = setting.rows(what, forward(ours), others)
        yield from (*rows, limits.multiplying(limit, operations))
        others = {name: euler(velocity) for name, velocity in peers.items()}
        if exact is not None:
            others[EXACT] = partial(sample, exact)
        what = f"{preset} sampling, {steps} Euler steps, guidance, batch {batch}{stage}"
        yield from setting.rows(what, sample, others)
    if HAS_DIFFUSERS:
        prior.train(), theirs.train()
        step = training_step(network, lambda: ours(x, t, labels).float())
        their_step = training_step(theirs, lambda: diffusers(x, t, labels).float())
        what = f"{preset} training step, batch {batch}"
        yield from setting.rows(what, step, {"diffusers": their_step})


def tokenizers(setting: Setting) -> Iterator[Row]:
    """Encoding and decoding, beside diffusers' autoencoders of the same sizes."""
    import diffusers

    from smalti.tokenizer.conv import ConvConfig
    from smalti.tokenizer.kl import KLConfig, KLTokenizer
    from smalti.tokenizer.quantizers.codebook import CodebookConfig
    from smalti.tokenizer.quantizers.nearest import NearestConfig
    from smalti.tokenizer.vq import VQConfig, VQTokenizer

    side, batch = (16, 1) if setting.quick else (256, 16) if setting.large else (128, 2)
    images = setting.randn(batch, 3, side, side).clamp(-1, 1)
    conv = ConvConfig(64, (1, 2, 4), num_res_blocks=2, attention_levels=(), z_channels=4)
    levels, vocab_size = len(conv.channel_mult), 1024
    options = {
        "block_out_channels": tuple(conv.channels * factor for factor in conv.channel_mult),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": conv.num_res_blocks,
        "latent_channels": conv.z_channels,
        "norm_num_groups": 16,
    }
    quantizer = NearestConfig(codebook=CodebookConfig(vocab_size, conv.z_channels, False))
    kl = KLTokenizer(KLConfig(image_size=side, conv=conv))
    vq = VQTokenizer(VQConfig(image_size=side, conv=conv, quantizer=quantizer))
    their_kl = diffusers.AutoencoderKL(**options)
    their_vq = diffusers.VQModel(**options, num_vq_embeddings=vocab_size)
    exact_kl, exact_vq = setting.exact(kl), setting.exact(vq)
    for model in (kl, vq, their_kl, their_vq):
        setting.model(model)
    shape = (batch, *vq.config.grid, conv.z_channels)

    def their_codes() -> Tensor:
        return their_vq.quantize(their_vq.encode(images).latents)[2][2]

    with torch.no_grad():
        z, codes = kl.encode(images).to(setting.dtype), vq.encode(images)

        def their_decoding() -> Tensor:
            entries = their_vq.quantize.get_codebook_entry(codes.flatten(), shape)
            return their_vq.decode(entries, force_not_quantize=True).sample

        def passes(kl: Any, vq: Any, images: Tensor, z: Tensor) -> tuple[Pass, ...]:
            return (
                lambda: kl.encode(images),
                lambda: kl.decode(z),
                lambda: vq.encode(images),
                lambda: vq.decode(codes),
            )

        peers: tuple[tuple[str, Pass], ...] = (
            ("KL encoding", lambda: their_kl.encode(images).latent_dist),
            ("KL decoding", lambda: their_kl.decode(z).sample),
            ("VQ encoding", their_codes),
            ("VQ decoding", their_decoding),
        )
        exact = passes(exact_kl, exact_vq, images.float(), z.float()) if exact_kl else ()
        for number, ours in enumerate(passes(kl, vq, images, z)):
            what, theirs = peers[number]
            others = {"diffusers": theirs, **({EXACT: exact[number]} if exact else {})}
            yield from setting.rows(f"{what}, {side} px, batch {batch}", ours, others)


PARTS = {
    "next-token": next_token,
    "next-scale": next_scale,
    "flow": flow,
    "tokenizers": tokenizers,
}


def check_equal(ours: Tensor, theirs: Tensor) -> None:
    """Exit if greedy codes differ."""
    if not torch.equal(ours, theirs):
        share = (ours != theirs).float().mean().item()
        raise SystemExit(f"{share:.0%} of the greedy codes differ from those of the peer")


# -------------------------------------------------------------------------------------------------
# The command


def machine(device: torch.device) -> str:
    """The device and the libraries, in words."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = processor() + f", {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def processor() -> str:
    """The name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measured(setting: Setting, parts: list[str], seconds: float) -> Iterator[str]:
    """The text of the table, in pieces: the machine, the rows, and what is left out."""
    end = time.monotonic() + seconds
    kind = str(setting.dtype).removeprefix("torch.")
    yield f"{machine(setting.device)}; {kind}: {Limits(setting).line()}\n"
    rows: list[Row] = []
    left_out = [] if HAS_DIFFUSERS else ["rows beside diffusers, which is not installed here"]
    for part in parts:
        if time.monotonic() > end:
            left_out.append(f"{part}: no time was left")
            continue
        try:
            for row in PARTS[part](setting):
                print(row.line, file=sys.stderr)  # a run that is cut off keeps them
                rows.append(row)
        except ModuleNotFoundError as error:
            left_out.append(f"{part}: there is no {error.name} here")
    yield table(rows)
    yield from (f"left out: {line}" for line in left_out)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--seconds", type=float, default=600, help="after them no part begins")
    parser.add_argument("--batches", nargs="+", type=int, default=[], help="of codes' sampling")
    parser.add_argument("--compile", action="store_true", help="further rows, after compile_parts")
    parser.add_argument(
        "--quick", action="store_true", help="small models, one round, to see that it works"
    )
    return parser.parse_args(argv)


def main() -> None:
    """Print the table."""
    args = arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.manual_seed(0)
    rounds = 1 if args.quick else args.rounds
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    setting = Setting(device, dtype, rounds, args.quick, args.compile, tuple(args.batches))
    for text in measured(setting, args.parts, args.seconds):
        print(text, flush=True)


if __name__ == "__main__":
    main()
