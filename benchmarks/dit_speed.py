"""Speed of smalti's DiT relative to diffusers' `DiTTransformer2DModel` and to SiT's own code.

    python benchmarks/dit_speed.py --preset sit-s/2 --batch_size 1
    python benchmarks/dit_speed.py --quick   # within 20 seconds

Prints ratios of median times, smalti over the other (below 1 smalti is faster), with the quartiles
of the ratios of single rounds, for guided sampling with Euler's method, for a forward pass without
gradients, and for a training step with AdamW. All are timed in turns in one process, so that other
load on the machine affects them equally.

SiT's code is restated here in plain PyTorch, on the weights of smalti's network: it computes adaLN
in every block and step, and guides by a batch of twice the size; both samples are compared.
diffusers has a copy of the time and label embedders in every block.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from clock import quartiles
from torch import Tensor, nn

from smalti.prior.flow.dit import DiT, DiTConfig, sinusoids
from smalti.prior.flow.prior import PRESETS, FlowPrior

GUIDANCE = 4.0
Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, times (B,), labels (B,) -> like x


def diffusers_dit(config: DiTConfig) -> nn.Module:
    """The same architecture in diffusers; the config must have the options of the paper."""
    import diffusers

    return diffusers.DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.grid[0],
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    )


# -------------------------------------------------------------------------------------------------
# SiT's code (2401.08740) on our weights


def plain_block(block: Any, x: Tensor, c: Tensor, heads: int) -> Tensor:
    """One block: timm's attention and MLP, and DiT's `modulate`."""

    def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def attention(x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = block.attn.qkv(x).reshape(batch, tokens, 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        return block.attn.proj(attended.transpose(1, 2).reshape(batch, tokens, width))

    linear = block.adaLN_modulation[1]
    shift1, scale1, gate1, shift2, scale2, gate2 = linear(F.silu(c)).chunk(6, dim=1)
    x = x + gate1.unsqueeze(1) * attention(modulate(block.norm1(x), shift1, scale1))
    hidden = F.gelu(block.mlp.fc1(modulate(block.norm2(x), shift2, scale2)), approximate="tanh")
    return x + gate2.unsqueeze(1) * block.mlp.fc2(hidden)


def plain_network(model: Any, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """SiT's forward pass: the velocity."""
    config: DiTConfig = model.config
    c = model.t_embedder.mlp(sinusoids(t, config.frequency_size)) + model.y_embedder(labels)
    tokens = model.x_embedder.proj(x).flatten(2).transpose(1, 2) + model.pos_embed.table
    for block in model.blocks:
        tokens = plain_block(block, tokens, c, config.num_heads)
    shift, scale = model.final_layer.adaLN_modulation[1](F.silu(c)).chunk(2, dim=1)
    tokens = model.final_layer.norm_final(tokens) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    out = model.final_layer.linear(tokens)
    (h, w), p = config.token_grid, config.patch_size
    out = out.reshape(len(x), h, w, p, p, config.out_channels)
    out = torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), -1, h * p, w * p)
    return out.chunk(2, dim=1)[0]


@torch.no_grad()
def plain_euler(network: Network, noise: Tensor, labels: Tensor, null: int, steps: int) -> Tensor:
    """Euler's method with classifier-free guidance, as SiT samples."""
    x, both = noise, torch.cat([labels, torch.full_like(labels, null)])
    for step in range(steps):
        t = torch.full((len(both),), step / steps, device=x.device)
        cond, uncond = network(torch.cat([x, x]), t, both).chunk(2)
        x = x + (uncond + GUIDANCE * (cond - uncond)) / steps
    return x


# -------------------------------------------------------------------------------------------------
# Timing


def ratios(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> list[float]:
    """Time of `ours` over that of `theirs` in each round, timed in turns, after one to warm up."""
    found = []
    for _ in range(rounds + 1):
        seconds = []
        for call in (ours, theirs) if len(found) % 2 else (theirs, ours):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        if not len(found) % 2:
            seconds.reverse()
        found.append(seconds[0] / seconds[1])
    return found[1:]


def training_step(module: nn.Module, output: Callable[[], Tensor]) -> Callable[[], None]:
    """A function that takes one step of AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        output().square().mean().backward()
        optimizer.step()
        next(module.parameters()).sum().item()  # waits for the device

    return step


def compare(
    prior: FlowPrior, batch_size: int, steps: int, rounds: int
) -> Iterator[tuple[str, list[float]]]:
    """What is done, and ratios of times, smalti over the others."""
    network: DiT = prior.network
    device, config = network.pos_embed.table.device, network.config  # type: ignore[union-attr]
    theirs = diffusers_dit(config).to(device)
    published = copy.deepcopy(network)  # neither packed nor compiled
    x = torch.randn(batch_size, config.in_channels, *config.grid, device=device)
    t = torch.rand(batch_size, device=device)
    labels = torch.randint(config.num_classes, (batch_size,), device=device)
    null, channels = config.num_classes, config.in_channels

    def plain(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return plain_network(published, x, t, labels)

    def their_velocity(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return theirs(x, timestep=t, class_labels=labels).sample[:, :channels]

    def sample() -> Tensor:
        options = {"solver": "euler", "num_inference_steps": steps, "guidance_scale": GUIDANCE}
        return prior.sample(labels, noise=x, **options)  # type: ignore[arg-type]

    expected = plain_euler(plain, x, labels, null, steps)
    torch.testing.assert_close(sample(), expected, rtol=1e-3, atol=1e-3)
    peers: dict[str, tuple[nn.Module, Network]] = {
        "SiT's code": (published, plain),
        "diffusers": (theirs, their_velocity),
    }
    for name, (module, velocity) in peers.items():
        prior.eval(), theirs.eval()

        def their_sample(velocity: Network = velocity) -> float:
            return plain_euler(velocity, x, labels, null, steps).sum().item()

        def forward(velocity: Network) -> Callable[[], float]:
            return torch.no_grad()(lambda: velocity(x, t, labels).sum().item())

        yield (
            f"guided Euler / {name}",
            ratios(lambda: sample().sum().item(), their_sample, rounds),
        )
        yield f"forward pass / {name}", ratios(forward(network), forward(velocity), rounds)
        prior.train(), theirs.train()
        ours = training_step(network, lambda: network(x, t, labels))
        other = training_step(module, lambda velocity=velocity: velocity(x, t, labels))
        yield f"training step / {name}", ratios(ours, other, rounds)


def made(preset: str, device: str, depth: int | None) -> FlowPrior:
    """A prior with random weights: those of a new one give zeros."""
    config = PRESETS[preset]
    if depth is not None:
        config = replace(config, network=replace(config.network, depth=depth))
    prior = FlowPrior(config)
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.02)
    return prior.to(device)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    published = [name for name in PRESETS if name.startswith("sit-")]
    parser.add_argument(
        "--preset", choices=published, default="sit-s/2", help="preset of the prior"
    )
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="steps of Euler's method")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each side")
    parser.add_argument("--depth", type=int, help="number of blocks; default: that of the preset")
    parser.add_argument("--quick", action="store_true", help="two blocks, two steps, few rounds")
    parser.add_argument(
        "--compile", action="store_true", help="compile our network, which takes minutes"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    depth = 2 if args.quick else args.depth
    steps, rounds = (2, 3) if args.quick else (args.steps, args.rounds)
    prior = made(args.preset, args.device, depth)
    if args.compile:
        prior.compile_parts()
    for what, found in compare(prior, args.batch_size, steps, rounds):
        low, middle, high = quartiles(found)
        print(f"{args.preset:8} {what:28} {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    main()
