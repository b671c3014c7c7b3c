"""What it costs that a generated picture is the same to the byte at any batch size.

    python benchmarks/exact_generation.py --batch_size 64

In fp32 a generation job samples pictures in groups of a fixed size and decodes them one by one;
the alternative, batches of the requested size, is measured in turn with it. The models are the
small presets, with random weights: speed does not depend on them. The result is a ratio of times
per picture, which other load on the machine affects little.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from clock import now

from smalti.pipelines.generation import group_size, picture_generator
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.base import Prior
from smalti.prior.presets import PRESETS as PRIORS
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.presets import PRESETS as TOKENIZERS

PAIRS = (("vq-32-tiny", "gpt-nano"), ("var-32-tiny", "var-nano"), ("kl-32-tiny", "flow-nano"))
CLASSES = tuple(map(str, range(10)))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pipeline_of(tokenizer_preset: str, prior_preset: str) -> Pipeline:
    """Of random weights."""
    tokenizer = Tokenizer.registry.build(TOKENIZERS[tokenizer_preset])
    quantizer = getattr(tokenizer, "quantizer", None)
    config = PRIORS[prior_preset].fitted(
        tokenizer.spec, len(CLASSES), None, getattr(quantizer, "config", None)
    )
    prior: Prior = Prior.registry.build(config)
    prior.bind(quantizer)
    return Pipeline(tokenizer, prior, CLASSES)


def seconds(call: Callable[[], object]) -> float:
    """The time of one call."""
    start = now(DEVICE)
    call()
    return now(DEVICE) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64, help="of the alternative")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    args = parser.parse_args()
    count = args.batch_size
    labels = [index % len(CLASSES) for index in range(count)]
    print("| tokenizer, prior | group | sampling in groups | decoding one by one | together |")
    print("| --- | --- | --- | --- | --- |")
    for names in PAIRS:
        pipe = pipeline_of(*names).to(DEVICE)

        def sample(size: int, pipe: Pipeline = pipe) -> torch.Tensor:
            generators = [picture_generator(0, index) for index in range(count)]
            options = {"generator": generators, "batch_size": size, "output_type": "latent"}
            return pipe(labels, guidance_scale=args.guidance_scale, **options).latents

        @torch.no_grad()
        def decode(latents: torch.Tensor, size: int, pipe: Pipeline = pipe) -> None:
            for part in latents.split(size):
                pipe.tokenizer.decode(part).cpu()

        group, latents = group_size(pipe), sample(count)
        times: dict[str, list[float]] = {"batch": [], "group": [], "decode": [], "singly": []}
        decode(latents, count)
        for _ in range(args.rounds):
            times["batch"].append(seconds(lambda: sample(count)))
            times["group"].append(seconds(lambda size=group: sample(size)))
            times["decode"].append(seconds(lambda z=latents: decode(z, count)))
            times["singly"].append(seconds(lambda z=latents: decode(z, 1)))
        batch, grouped, together, singly = (statistics.median(t) for t in times.values())
        ratios = (grouped / batch, singly / together, (grouped + singly) / (batch + together))
        cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| `{names[0]}`, `{names[1]}` | {group} | {cells} |")


if __name__ == "__main__":
    main()
