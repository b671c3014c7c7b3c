"""Speed of smalti's DiT relative to diffusers' `DiTTransformer2DModel` of the same size.

    python benchmarks/dit_speed.py --preset dit-s/2 --batch_size 4

Prints ratios of median times, smalti over diffusers (below 1 smalti is faster), for a forward pass
without gradients (one network evaluation of a sampler), for a forward and backward pass, and for a
training step with AdamW. Both compute the same function, but diffusers has a copy of the time and
label embedders in every block, which it evaluates and updates as well. Both are timed in turns in
one process, so that other load on the machine affects them equally.
"""

import argparse

import diffusers
import torch
from tokenizer_speed import ratio, training_step
from torch import Tensor

from smalti.prior.flow.dit import PRESETS, DiT, DiTConfig


def theirs_of(config: DiTConfig) -> diffusers.DiTTransformer2DModel:
    """The same architecture in diffusers; the config must have the options of the paper."""
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


def compare(config: DiTConfig, batch_size: int, rounds: int, device: str) -> dict[str, float]:
    """Time of smalti over that of diffusers, by kind of pass."""
    ours, theirs = DiT(config).to(device), theirs_of(config).to(device)
    x = torch.randn(batch_size, config.in_channels, *config.grid, device=device)
    t = torch.randint(1000, (batch_size,), device=device)
    labels = torch.randint(config.num_classes, (batch_size,), device=device)

    def finished(value: Tensor) -> Tensor:
        """Wait for the device: the value is computed once its sum is on the CPU."""
        value.sum().item()
        return value

    def our_output() -> Tensor:
        return finished(ours(x, t, labels))

    def their_output() -> Tensor:
        return finished(theirs(x, timestep=t, class_labels=labels).sample)

    def gradients(model: torch.nn.Module, output: Tensor) -> None:
        model.zero_grad()
        output.square().mean().backward()
        finished(next(model.parameters()).grad)  # type: ignore[arg-type]

    with torch.no_grad():
        measured = {"forward": ratio(our_output, their_output, rounds)}
    measured["forward and backward"] = ratio(
        lambda: gradients(ours, our_output()), lambda: gradients(theirs, their_output()), rounds
    )
    steps = (
        training_step(ours, lambda: our_output().square().mean()),
        training_step(theirs, lambda: their_output().square().mean()),
    )
    measured["training step"] = ratio(*steps, rounds)
    return measured


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    published = [name for name in PRESETS if "/" in name]
    parser.add_argument(
        "--preset", choices=published, default="dit-s/2", help="preset of the network"
    )
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    measured = compare(PRESETS[args.preset], args.batch_size, args.rounds, args.device)
    for what, value in measured.items():
        print(f"{args.preset:8} {what:20} smalti / diffusers = {value:.2f}")


if __name__ == "__main__":
    main()
