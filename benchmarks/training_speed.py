"""Speed of a training step of a next-token prior, beside a plain PyTorch restatement; and how much
of the loop is outside the network and its optimizer.

    python benchmarks/training_speed.py --preset gpt-b --grid 8 --batch_size 1
    python benchmarks/training_speed.py --quick   # within 20 seconds

Prints the ratio of median times of a step with AdamW, smalti over the restatement (below 1 smalti
is faster), with the quartiles of the ratios of single rounds. The restatement is LlamaGen's code on
the same weights; losses are compared. Then it prints the shares of the demo's step of its prior:
what the loop does besides the forward pass, the backward pass and the optimizer, by name.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from clock import quartiles
from dit_speed import ratios
from torch import Tensor

from smalti.data.latents import CodeSpec
from smalti.prior.next_token.model import PRESETS, NextTokenPrior
from smalti.training.config import RunConfig
from smalti.training.logging import mean_of
from smalti.training.optim import (
    EMA,
    StepGuard,
    adamw,
    clip_gradients,
    learning_rate,
    set_learning_rate,
)
from smalti.training.run import seed_everything

# -------------------------------------------------------------------------------------------------
# LlamaGen's code (2406.06525) on our weights


def plain_norm(norm: Any, x: Tensor) -> Tensor:
    """RMS norm."""
    scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.eps)
    return scaled.type_as(x) * norm.weight


def plain_rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary positions; x (B, T, heads, head_dim), table (T, head_dim / 2, 2)."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    table = table.view(1, len(table), 1, -1, 2)
    real = pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1]
    imaginary = pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1]
    return torch.stack([real, imaginary], -1).flatten(3).type_as(x)


def plain_loss(prior: Any, codes: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    """The cross-entropy of codes (B, L), without dropout."""
    heads = prior.config.num_heads
    prefix = prior.cls_embedding(labels)[:, None]
    x = torch.cat([prefix, prior.tok_embeddings(codes[:, :-1])], 1)
    for layer in prior.layers:
        qkv = layer.attention.wqkv(plain_norm(layer.attention_norm, x)).chunk(3, -1)
        q, k, v = (part.view(*x.shape[:2], heads, -1) for part in qkv)
        q, k = plain_rotate(q, table), plain_rotate(k, table)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + layer.attention.wo(attended.transpose(1, 2).reshape(x.shape))
        hidden, feed = plain_norm(layer.ffn_norm, x), layer.feed_forward
        x = x + feed.w2(F.silu(feed.w1(hidden)) * feed.w3(hidden))
    logits = prior.output(plain_norm(prior.norm, x))
    return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())


def made(preset: str, grid: int, vocab_size: int, **changes: Any) -> NextTokenPrior:
    """A prior without dropout, with random weights: the output layer of a new one is zero."""
    spec = CodeSpec(vocab_size, ((grid, grid),))
    config = replace(PRESETS[preset], spec=spec, dropout=0.0, label_dropout=0.0, **changes)
    prior = NextTokenPrior(config)
    torch.nn.init.normal_(prior.output.weight, std=0.02)
    return prior


def training_ratios(prior: NextTokenPrior, batch_size: int, rounds: int) -> list[float]:
    """Time of a training step, smalti over the restatement, in each round."""
    config = prior.config
    codes = torch.randint(config.spec.vocab_size, (batch_size, config.spec.length))
    labels = torch.randint(config.num_classes, (batch_size,))
    table = torch.view_as_real(prior.rope_freqs(torch.device("cpu")))
    expected = plain_loss(prior, codes, labels, table)
    torch.testing.assert_close(prior(codes, labels).total, expected)
    optimizer = torch.optim.AdamW(prior.parameters(), fused=True)

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def take() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return take

    ours = step(lambda: prior(codes, labels).total)
    theirs = step(lambda: plain_loss(prior, codes, labels, table))
    return ratios(ours, theirs, rounds)


# -------------------------------------------------------------------------------------------------
# The loop of `smalti train-prior`


def loop_shares(prior: NextTokenPrior, batch_size: int, steps: int) -> dict[str, float]:
    """Share of each part of a step, of the processor's time of the whole; medians of steps."""
    config = RunConfig(Path("unused"), train_batch_size=batch_size)
    optimizer, ema = adamw(prior, config), EMA(prior, config.ema_decay)
    guard = StepGuard(config.max_skipped_steps, lambda values: values)
    spec = prior.config.spec
    codes = torch.randint(spec.vocab_size, (batch_size, spec.length))
    labels = torch.randint(prior.config.num_classes, (batch_size,))
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, part: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = part()
        seconds[name].append(time.process_time() - start)
        return result

    for step in range(steps + 1):
        timed("seed", lambda step=step: seed_everything(0, step, 0))
        loss = timed("forward", lambda: prior(codes, labels))
        timed("backward", lambda loss=loss: loss.total.backward())
        norm = timed("clip", lambda: clip_gradients(prior, config.max_grad_norm))
        losses = [loss.total.detach()]
        timed("guard", partial(guard.accepts, "model", step, losses, norm))
        timed("rate", lambda step=step: set_learning_rate(optimizer, learning_rate(config, step)))
        timed("optimizer", optimizer.step)
        timed("average", lambda: ema.update(prior))
        timed("zero", optimizer.zero_grad)
        timed("metrics", lambda loss=loss: mean_of([{"loss": loss.total.detach(), **loss.parts}]))
    medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    return {name: value / sum(medians.values()) for name, value in medians.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="gpt-b")
    parser.add_argument("--grid", type=int, default=8, help="codes per side of a picture")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each side")
    parser.add_argument("--quick", action="store_true", help="a sixth of the blocks, few rounds")
    args = parser.parse_args()
    torch.manual_seed(0)
    changes = {"depth": max(1, PRESETS[args.preset].depth // 6)} if args.quick else {}
    rounds = 3 if args.quick else args.rounds
    prior = made(args.preset, args.grid, 2048 if args.quick else 16384, **changes)
    low, middle, high = quartiles(training_ratios(prior, args.batch_size, rounds))
    print(f"{args.preset} training step / plain PyTorch: {middle:.2f} ({low:.2f} to {high:.2f})")
    shares = loop_shares(made("gpt-nano", 8, 512), 8 if args.quick else 64, rounds)
    print("share of the demo's step:", ", ".join(f"{k} {v:.2%}" for k, v in shares.items()))
    outside = 1 - sum(shares[name] for name in ("forward", "backward", "optimizer"))
    print(f"outside of network and optimizer: {outside:.2%}")


if __name__ == "__main__":
    main()
