"""Time of a next-scale prior per image, and the share saved by projecting the class once.

    python benchmarks/next_scale_speed.py --preset var-nano --sides 1 2 3 4 6 8 --rows 8

A third of the weights (those of the adaLN modulation) depend on the class alone, which is the same
at every scale. smalti multiplies with them once per image, but the published code at every scale.
Both are timed in turns in one process, so that other load on the machine affects them equally: the
second is the first with the projections computed again before every scale but the first.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, replace

import torch
from clock import now
from torch import Tensor

from smalti.data.latents import CodeSpec
from smalti.prior.next_scale.model import PRESETS, NextScalePrior
from smalti.prior.sampling import OnStep
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer

PUBLISHED_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # VAR at 256 px
MAX_CONVOLUTIONS = 4


@dataclass(frozen=True)
class Result:
    """Medians over the rounds."""

    once_seconds: float  # of a sampling call, with the class projected once
    every_scale_seconds: float  # the same, projected at every scale

    @property
    def saved(self) -> float:
        """Share of the time that projecting once saves."""
        return 1 - self.once_seconds / self.every_scale_seconds


def build(preset: str, sides: list[int]) -> NextScalePrior:
    """A prior with random weights for square grids with these sides."""
    scales = tuple((side, side) for side in sides)
    quantizer = MultiScaleConfig(scales=scales, convolutions=min(MAX_CONVOLUTIONS, len(scales)))
    spec = CodeSpec(quantizer.codebook.vocab_size, scales)
    prior = NextScalePrior(replace(PRESETS[preset], spec=spec, quantizer=quantizer))
    prior.bind(MultiScaleQuantizer(quantizer))
    return prior.eval()


def measure(prior: NextScalePrior, labels: Tensor, guidance_scale: float, rounds: int) -> Result:
    """Time both variants of sampling in turns."""
    guided = guidance_scale != 1  # rows are the labels, then as many null labels
    rows = torch.cat([labels, torch.full_like(labels, prior.num_classes)]) if guided else labels

    def project_again(done: int, total: int, _: Tensor) -> None:
        if done < total:
            prior.modulation(prior.class_emb(rows))

    def seconds(on_step: OnStep | None) -> float:
        start = now(labels.device)
        prior.sample(labels, guidance_scale=guidance_scale, on_step=on_step)
        return now(labels.device) - start

    once, every_scale = [], []
    for _ in range(rounds + 1):  # the first round warms up
        once.append(seconds(None))
        every_scale.append(seconds(project_again))
    return Result(statistics.median(once[1:]), statistics.median(every_scale[1:]))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="var-d16", help="preset of the prior"
    )
    parser.add_argument(
        "--sides",
        type=int,
        nargs="+",
        default=list(PUBLISHED_SIDES),
        help="sides of the code grids",
    )
    parser.add_argument("--rows", type=int, default=1, help="samples per batch")
    parser.add_argument(
        "--guidance_scale", type=float, default=1.0, help="guidance scale; 1 is off"
    )
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Print one line of JSON."""
    args = arguments()
    torch.manual_seed(0)
    prior = build(args.preset, args.sides).to(args.device, getattr(torch, args.dtype))
    labels = torch.arange(args.rows, device=args.device) % prior.num_classes
    result = measure(prior, labels, args.guidance_scale, args.rounds)
    print(
        json.dumps(
            {
                **vars(args),
                "threads": torch.get_num_threads(),
                "seconds_per_image": round(result.once_seconds / args.rows, 5),
                "saved_by_projecting_once": round(result.saved, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
