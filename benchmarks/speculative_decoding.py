"""Whether speculative decoding of a next-token prior would pay: a measurement, not a feature.

    OMP_NUM_THREADS=1 python benchmarks/speculative_decoding.py

Speculative Jacobi decoding (Teng et al., 2410.01699) needs no second model. Each pass reads a
window of drafts at once, k rows: it tests them from left to right by the rule of speculative
sampling (Leviathan et al., 2211.17192), which leaves the distribution of codes exact, and its
distributions give the drafts of the next pass behind the first one that is rejected. A pass yields
1 to k codes.

Counted are the codes per pass of a pipeline, one picture at a time, with the pipeline's own
sampling options. The time of a pass of k rows over one row is measured in turns, for the pipeline's
prior and for a large one with random weights. Codes per pass over that ratio is the speed to
expect, relative to decoding code by code; the test of drafts itself is left out.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from clock import in_turns, quartiles
from torch import Tensor

from smalti.data.latents import CodeSpec
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.attention import KeyValueCache
from smalti.prior.next_token.model import PRESETS, NextTokenPrior
from smalti.prior.sampling import SamplingOptions, filtered, guide

# Codes (n,) that are accepted, and drafts (m,) of those that follow -> probabilities (m + 1, V) of
# the codes n to n + m, each given all before it.
Conditional = Callable[[Tensor, Tensor], Tensor]
Quartiles = tuple[float, float, float]


def verified(
    drafts: Tensor, proposed: Tensor, true: Tensor, generator: torch.Generator
) -> tuple[int, Tensor]:
    """How many drafts are accepted, and the code (1,) after them.

    Draft i is accepted with probability min(1, true / proposed) of its code. The first one that is
    not is replaced by a code from max(true - proposed, 0), normalised (2211.17192, section 2.3).

    Args:
        drafts: (m,), each sampled from its row of `proposed` (m, V).
        true: (m + 1, V).
    """
    uniforms = torch.rand(len(drafts), generator=generator, dtype=true.dtype)
    for i, draft in enumerate(drafts.tolist()):
        if uniforms[i] * proposed[i, draft] >= true[i, draft]:
            return i, sampled((true[i] - proposed[i]).clamp(min=0)[None], generator)
    return len(drafts), sampled(true[-1:], generator)


def sampled(weights: Tensor, generator: torch.Generator) -> Tensor:
    """A code (n,) from each row of weights (n, V)."""
    if not len(weights):
        return torch.empty(0, dtype=torch.int64)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def jacobi(
    conditional: Conditional, length: int, window: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Codes (length,) and the number of passes of `window` rows that they took.

    Drafts of positions that enter the window are sampled from the distribution of the last
    position: no better one is known.
    """
    nothing = torch.empty(0, dtype=torch.int64)
    known, passes = conditional(nothing, nothing), 1  # (n, V): distributions of the drafts
    codes = sampled(known, generator)
    while len(codes) < length:
        drafts_now = min(window, length - len(codes)) - 1
        proposed = torch.cat([known, known[-1:].expand(window, -1)])[:drafts_now]
        drafts = sampled(proposed, generator)
        true = conditional(codes, drafts)
        accepted, code = verified(drafts, proposed, true, generator)
        codes = torch.cat([codes, drafts[:accepted], code])
        known = true[min(accepted + 1, drafts_now) :]
        passes += 1
    return codes, passes


class PriorConditional:
    """The `Conditional` of a prior, for one label, guided and filtered as a pipeline samples."""

    def __init__(self, prior: NextTokenPrior, label: int, options: SamplingOptions) -> None:
        self.prior, self.options = prior, options
        self.scales = options.guidance_scales(prior.config.spec.length)
        guided = options.guidance_scale != 1
        self.labels = torch.tensor([label, prior.num_classes] if guided else [label])
        self.cache = prior.empty_cache(len(self.labels), prior.tok_embeddings.weight)
        self.rope_freqs = prior.rope_freqs(self.labels.device)

    @torch.no_grad()
    def __call__(self, codes: Tensor, drafts: Tensor) -> Tensor:
        rows = torch.cat([codes, drafts]).expand(len(self.labels), -1)
        start = self.cache.length
        tokens = self.prior.tokens(self.labels, rows)[:, start:]
        hidden = read(self.prior, tokens, self.rope_freqs, self.cache)
        self.cache.length = self.prior.config.prefix_length + len(codes) - 1  # without the drafts
        logits = self.prior.output(hidden[:, -len(drafts) - 1 :]).float()  # (1 or 2, m + 1, V)
        if len(logits) == 2:
            scales = torch.tensor(self.scales[len(codes) :][: logits.shape[1]])[:, None]
            logits = guide(logits[:1], logits[1:], scales)  # type: ignore[arg-type]
        return filtered(logits[0], self.options).softmax(-1)


def read(prior: NextTokenPrior, tokens: Tensor, rope_freqs: Tensor, cache: KeyValueCache) -> Tensor:
    """Hidden states (rows, n, width) of tokens (rows, n, width) behind those in a cache."""
    start, stop = cache.length, cache.length + tokens.shape[1]
    earlier = torch.arange(stop) <= torch.arange(start, stop)[:, None]
    mask = earlier if tokens.shape[1] > 1 else None
    return prior.transform(tokens, rope_freqs[start:stop], mask, cache)


def codes_per_pass(pipe: Pipeline, window: int, pictures: int) -> float:
    """Codes over passes, of pictures of all classes in turns."""
    options = SamplingOptions(**pipe.sampling)
    length, passes = pipe.prior.config.spec.length, 0
    for picture in range(pictures):
        generator = torch.Generator().manual_seed(picture)
        conditional = PriorConditional(pipe.prior, picture % pipe.prior.num_classes, options)
        passes += jacobi(conditional, length, window, generator)[1]
    return pictures * length / passes


def costs(
    prior: NextTokenPrior, rows: int, windows: list[int], rounds: int
) -> dict[int, Quartiles]:
    """The time of a pass of each window over that of one row, quartiles, behind half of the codes.

    Args:
        rows: 2 with guidance.
    """
    half = prior.config.spec.length // 2
    cache = prior.empty_cache(rows, prior.tok_embeddings.weight)
    cache.keys.zero_(), cache.values.zero_()
    rope_freqs = prior.rope_freqs(cache.keys.device)

    @torch.no_grad()
    def timed(window: int) -> None:
        cache.length = half
        tokens = prior.tok_embeddings(torch.zeros(rows, window, dtype=torch.int64))
        prior.output(read(prior, tokens, rope_freqs, cache))

    passes = [lambda window=window: timed(window) for window in (1, *windows)]
    one, *others = in_turns(cache.keys.device, rounds, *passes)
    ratios = ([a / b for a, b in zip(times, one, strict=True)] for times in others)
    return {window: quartiles(values) for window, values in zip(windows, ratios, strict=True)}


def large_prior(preset: str) -> NextTokenPrior:
    """A preset for 64 codes, with random weights as sampling reads them."""
    config = replace(PRESETS[preset], spec=CodeSpec(16384, ((8, 8),)), num_classes=10)
    prior = NextTokenPrior(config).eval()
    prior.arrange_for_sampling()
    return prior


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smalti/fashion-next-token", help="a pipeline")
    parser.add_argument("--preset", choices=list(PRESETS), default="gpt-b", help="a large prior")
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 4, 8], help="rows of a pass")
    parser.add_argument("--pictures", type=int, default=20, help="for the codes per pass")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each pass")
    args = parser.parse_args()
    pipe = Pipeline.from_pretrained(args.model)
    rows = 2 if pipe.guidance_scale != 1 else 1
    measured = {
        f"{args.model}, {rows} rows": costs(pipe.prior, rows, args.windows, args.rounds),
        f"{args.preset}, 1 row": costs(large_prior(args.preset), 1, args.windows, args.rounds),
    }
    print("| k | codes per pass | prior | pass of k over one row | quartiles | speed to expect |")
    print("| --- | --- | --- | --- | --- | --- |")
    for window in args.windows:
        codes = codes_per_pass(pipe, window, args.pictures)
        for name, ratios in measured.items():
            low, middle, high = ratios[window]
            print(
                f"| {window} | {codes:.2f} | {name} | {middle:.2f} | {low:.2f} to {high:.2f} | "
                f"{codes / middle:.2f} |"
            )


if __name__ == "__main__":
    main()
