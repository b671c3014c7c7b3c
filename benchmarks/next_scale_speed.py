"""Speed of the next-scale prior beside VAR, restated as its published code runs it (plain_var.py).

    python benchmarks/next_scale_speed.py --batch_sizes 1 4 --training_batch_size 2

Both have the same random weights and are first held to give the same greedy codes, guided. Then
sampling (top-k 900, top-p 0.96, guidance), sampling and decoding, and a training step with AdamW
are timed in turns in one process, so that other load on the machine affects all equally. "Packed"
is the prior after `compile_parts()`, which packs its weights on a CPU. Prints the median time per
call of each side, and the ratio of the peer's time to smalti's: its median over the rounds, and its
quartiles. Above 1, smalti is faster.

    python benchmarks/next_scale_speed.py --parts

times parts of a call at 256 px in two ways instead: attention in training with a mask and scale by
scale, sampling from all logits at once and in portions, a product in bf16 and in fp32.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from clock import in_turns, quartiles
from plain_var import PlainVAR, decode
from torch import Tensor

from smalti.data.latents import CodeSpec
from smalti.prior.next_scale import decoding
from smalti.prior.next_scale.decoding import ScaleDecoder
from smalti.prior.next_scale.model import PRESETS, BlockCausal, NextScalePrior
from smalti.prior.sampling import SamplingOptions
from smalti.tokenizer.presets import PRESETS as TOKENIZERS
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

SIDES_128 = (1, 2, 3, 4, 5, 6, 8)  # the grids of 128 px
SIDES_256 = (*SIDES_128, 10, 13, 16)
MAX_CONVOLUTIONS = 4
GUIDANCE_SCALE, TOP_K, TOP_P = 2.5, 900, 0.96  # VAR's for its published numbers

Pass = Callable[[], object]


def build(
    preset: str, sides: Sequence[int], quick: bool = False
) -> tuple[NextScalePrior, VQTokenizer]:
    """A prior for square grids with these sides, and VAR's tokenizer, with random weights.

    The gates of the residual branches and the output layer begin near 0: they are made to matter.

    Args:
        quick: a tokenizer with a fifth of the channels.
    """
    scales = tuple((side, side) for side in sides)
    quantizer = MultiScaleConfig(scales=scales, convolutions=min(MAX_CONVOLUTIONS, len(scales)))
    published = TOKENIZERS["var-f16"]
    assert isinstance(published, VQConfig)
    config = replace(published, image_size=16 * sides[-1], quantizer=quantizer)
    if quick:
        config = replace(config, conv=replace(config.conv, channels=32))
    tokenizer = VQTokenizer(config)
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    spec = CodeSpec(quantizer.codebook.vocab_size, scales)
    sizes = replace(PRESETS[preset], gate_init=1.0, drop_path=0.0)
    prior = NextScalePrior(replace(sizes, spec=spec, quantizer=quantizer))
    torch.nn.init.normal_(prior.head.weight, std=0.2)
    prior.bind(tokenizer.quantizer)
    return prior.eval(), tokenizer.eval()


class Comparison:
    """smalti and its peer with the same weights, on one device."""

    def __init__(self, prior: NextScalePrior, tokenizer: VQTokenizer, rounds: int) -> None:
        self.prior, self.tokenizer, self.rounds = prior, tokenizer, rounds
        self.peer = PlainVAR(prior)
        self.device = prior.head.weight.device
        self.packed = NextScalePrior(prior.config).eval()  # shares the weights
        self.packed.load_state_dict(prior.state_dict(), assign=True)
        self.packed.compile_parts()

    def check_codes(self, labels: Tensor) -> None:
        """Exit unless both give the same greedy codes, guided, and the same pictures."""
        theirs, features = self.peer.sample(labels, GUIDANCE_SCALE, top_k=1)
        for prior in (self.packed, self.prior):
            ours = prior.sample(labels, guidance_scale=GUIDANCE_SCALE, temperature=0)
            if not torch.equal(ours, theirs):
                share = (ours != theirs).float().mean().item()
                raise SystemExit(f"{share:.0%} of the greedy codes differ from those of the peer")
        with torch.no_grad():
            pictures = self.tokenizer.decode(ours).clamp(-1, 1)
        torch.testing.assert_close(decode(self.tokenizer, features), pictures, rtol=0, atol=1e-3)

    def sampling(self, labels: Tensor) -> None:
        """Print the rows of sampling alone, and with decoding."""
        options = {"guidance_scale": GUIDANCE_SCALE, "top_k": TOP_K, "top_p": TOP_P}

        def ours() -> Tensor:
            return self.prior.sample(labels, **options)  # type: ignore[arg-type]

        def packed() -> Tensor:
            return self.packed.sample(labels, **options)  # type: ignore[arg-type]

        def theirs() -> Tensor:
            return self.peer.sample(labels, GUIDANCE_SCALE, TOP_K, TOP_P)[1]

        codes, features = ours(), theirs()

        @torch.no_grad()
        def our_decoding() -> Tensor:
            return self.tokenizer.decode(codes)

        passes = theirs, ours, packed, lambda: decode(self.tokenizer, features), our_decoding
        peer, plain, fast, peer_decoding, decoding = self.times(*passes)
        batch = f"batch {len(labels)}"
        for name, sampled in (("", plain), (", packed", fast)):
            report(f"sampling, {batch}{name}", peer, sampled)
        for name, sampled in (("", plain), (", packed", fast)):
            both = summed(peer, peer_decoding), summed(sampled, decoding)
            report(f"sampling and decoding, {batch}{name}", *both)

    def training(self, labels: Tensor) -> None:
        """Print the row of a training step."""
        from tokenizer_speed import training_step  # needs diffusers

        length, vocab_size = self.prior.spec.length, self.prior.spec.vocab_size
        codes = torch.randint(vocab_size, (len(labels), length), device=self.device)
        self.prior.train()
        ours = training_step(self.prior, lambda: self.prior(codes, labels).total)
        theirs = training_step(self.peer, lambda: self.peer(codes, labels))
        our_times, their_times = self.times(ours, theirs)
        self.prior.eval()
        report(f"training step, batch {len(labels)}", their_times, our_times)

    def times(self, *passes: Pass) -> list[list[float]]:
        """Seconds of each pass in every round."""
        return in_turns(self.device, self.rounds, *passes)


# -------------------------------------------------------------------------------------------------
# Parts of a call, at 256 px


def attention_passes(device: torch.device) -> tuple[Pass, Pass]:
    """Attention of VAR-d12 with its gradients, two samples: with the mask, and scale by scale."""
    grids = tuple((side, side) for side in SIDES_256)
    length = sum(height * width for height, width in grids)
    states = [torch.randn(2, 12, length, 64, device=device, requires_grad=True) for _ in range(3)]
    mask = BlockCausal(grids, torch.device("cpu"))
    assert mask.bias is not None
    mask.bias = mask.bias.to(device)

    def backward(attend: Callable[..., Tensor]) -> None:
        torch.autograd.grad(attend(*states, scale=1.0).sum(), states)

    return lambda: backward(mask.attend), lambda: backward(mask.scale_by_scale)


def sampling_passes(batch: int) -> tuple[Pass, Pass]:
    """Codes of the last scale from the output of the last block: at once, and in portions."""
    prior, _ = build("var-nano", SIDES_256, quick=True)
    options = SamplingOptions(1.0, TOP_K, TOP_P, GUIDANCE_SCALE, "linear")
    labels = torch.arange(batch)
    decoder = ScaleDecoder(prior, labels, torch.full_like(labels, prior.num_classes), options)
    last, length = len(SIDES_256) - 1, SIDES_256[-1] ** 2
    hidden = torch.randn(2 * batch, length, prior.config.width)
    uniforms = torch.rand(batch, length, dtype=torch.float64)
    usual = decoding.LOGITS_AT_ONCE_ON_CPU

    @torch.no_grad()
    def sample(at_once: int) -> Tensor:
        decoding.LOGITS_AT_ONCE_ON_CPU = at_once
        return decoder._sample(hidden, uniforms, last)

    assert torch.equal(sample(decoding.LOGITS_AT_ONCE), sample(usual))
    return lambda: sample(decoding.LOGITS_AT_ONCE), lambda: sample(usual)


def product_passes(device: torch.device) -> tuple[Pass, Pass]:
    """A product of 128 rows with a weight of VAR-d12, in bf16 and in fp32."""
    x, weight = torch.randn(128, 768, device=device), torch.randn(3072, 768, device=device)
    half = x.bfloat16(), weight.bfloat16()
    return lambda: F.linear(*half), lambda: F.linear(x, weight)


def report_parts(rounds: int, device: torch.device) -> None:
    """Print a table of parts."""
    print("| part | first, s | second, s | ratio | quartiles |")
    print("| --- | --- | --- | --- | --- |")
    for what, passes in (
        ("attention and gradients, with a mask and scale by scale", attention_passes(device)),
        ("sampling 8 x 256 codes, at once and in portions", sampling_passes(8)),
        ("a product, in bf16 and in fp32", product_passes(device)),
    ):
        report(what, *in_turns(device, rounds, *passes))


def report(what: str, theirs: list[float], ours: list[float]) -> None:
    """Print one row of the table."""
    low, middle, high = quartiles([a / b for a, b in zip(theirs, ours, strict=True)])
    print(
        f"| {what} | {statistics.median(theirs):.3f} | {statistics.median(ours):.3f} "
        f"| {middle:.2f} | {low:.2f} to {high:.2f} |",
        flush=True,
    )


def summed(first: list[float], second: list[float]) -> list[float]:
    """Seconds of two passes, one after the other."""
    return [a + b for a, b in zip(first, second, strict=True)]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="var-d12", help="preset of the prior"
    )
    parser.add_argument(
        "--sides", type=int, nargs="+", default=list(SIDES_128), help="sides of the code grids"
    )
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 4], help="of sampling")
    parser.add_argument("--training_batch_size", type=int, default=0, help="0: no training steps")
    parser.add_argument("--parts", action="store_true", help="only parts, in two ways")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="a small model and few rounds, to see that it works"
    )
    args = parser.parse_args()
    if args.quick:
        args.preset, args.sides, args.rounds = "var-nano", [1, 2, 3, 4], 2
        args.training_batch_size = args.training_batch_size or 2
    return args


def main() -> None:
    """Print the table."""
    args = arguments()
    torch.manual_seed(0)
    if args.parts:
        report_parts(args.rounds, torch.device(args.device))
        return
    prior, tokenizer = build(args.preset, args.sides, args.quick)
    comparison = Comparison(prior.to(args.device), tokenizer.to(args.device), args.rounds)

    def labels(count: int) -> Tensor:
        return torch.arange(count, device=args.device) % prior.num_classes

    comparison.check_codes(labels(2))
    print("| next-scale prior | VAR, s | smalti, s | ratio | quartiles |")
    print("| --- | --- | --- | --- | --- |")
    for count in args.batch_sizes:
        comparison.sampling(labels(count))
    if args.training_batch_size:
        comparison.training(labels(args.training_batch_size))


if __name__ == "__main__":
    main()
