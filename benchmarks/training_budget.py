"""Operations, hours and storage of the recipes for ImageNet, by arithmetic.

    python benchmarks/training_budget.py --devices 8 --peak_tflops 989 --utilisation 0.4

The operations of a training step are three times those of a forward pass of one picture, which is
counted by torch's `FlopCounterMode` (forward, gradients of the inputs, gradients of the weights;
PaLM, 2204.02311, appendix B), times the batch. A tokenizer also has the losses: VGG16 of LPIPS sees
the picture and its reconstruction and passes a gradient to the latter. The small discriminator is
left out. Nothing is trained or measured: the hours assume the utilisation that is given.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from smalti.cli import parse_config
from smalti.data.latents import CodeSpec
from smalti.prior.base import Prior
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_tokenizer import TrainTokenizerConfig
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.quantizers import QUANTIZERS

RECIPES = Path(__file__).parents[1] / "scripts" / "configs"
TOKENIZERS = ("vq_f16", "var_f16", "kl_f8")
PRIORS = ("gpt_b_prior", "var_d16_prior", "sit_xl2_prior", "dit_xl2_prior")
PICTURES = 1_281_167  # of ImageNet's training set
HALF = 2  # bytes of a float16 number


def config_of(kind: Any, recipe: str) -> Any:
    """The configuration of a recipe."""
    return parse_config(kind, ["--config", str(RECIPES / f"{recipe}.yaml")], prog="budget")


def operations(call: Callable[[], Any]) -> int:
    """Floating point operations of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def of_tokenizer(recipe: str) -> tuple[Any, float, int]:
    """Configuration, operations of a step per picture, and bytes of a picture's latents."""
    config = config_of(TrainTokenizerConfig, recipe)
    with torch.device("meta"):
        tokenizer: Any = Tokenizer.registry.build(config.tokenizer)
        features = vgg16(weights=None).features
        image = torch.zeros(1, 3, config.tokenizer.image_size, config.tokenizer.image_size)
        grid = tokenizer.encoder(image).shape[2:]
        latents = torch.zeros(1, config.tokenizer.conv.z_channels, *grid)
        networks = operations(lambda: tokenizer.decoder(latents))
        networks += operations(lambda: tokenizer.encoder(image))
        loss = operations(lambda: features(image))
    return config, 3.0 * networks + 3.0 * loss, bytes_of(tokenizer.spec)


def of_prior(recipe: str) -> tuple[Any, float]:
    """Configuration, and operations of a training step per picture."""
    config = config_of(TrainPriorConfig, recipe)
    prior = Prior.registry.build(config.prior)
    if quantizer := getattr(config.prior, "quantizer", None):  # a next-scale prior reads its codes
        prior.bind(QUANTIZERS.build(quantizer))
    latents = example_of(prior.spec)
    return config, 3.0 * operations(lambda: prior(latents, torch.zeros(1, dtype=torch.long)))


def example_of(spec: Any) -> torch.Tensor:
    """The latents of one picture."""
    if isinstance(spec, CodeSpec):
        return torch.zeros(1, spec.length, dtype=torch.long)
    return torch.zeros(1, spec.channels, spec.height, spec.width)


def bytes_of(spec: Any) -> int:
    """Bytes of one view of a picture in the cache: codes, or means and standard deviations."""
    if isinstance(spec, CodeSpec):
        return spec.length * (2 if spec.vocab_size <= 2**16 else 4)
    return 2 * example_of(spec).numel() * HALF


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of one device, in bf16")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak reached")
    parser.add_argument("--recipes", nargs="+", default=[*TOKENIZERS, *PRIORS])
    args = parser.parse_args()
    speed = args.devices * args.peak_tflops * 1e12 * args.utilisation
    columns = "recipe", "steps", "batch", "epochs", "GFLOP per picture", "hours", "latents, a view"
    print(f"| {' | '.join(columns)} |")
    print(f"| {' | '.join('---' for _ in columns)} |")
    for recipe in args.recipes:
        if recipe.endswith("_prior"):
            (config, work), size = of_prior(recipe), "-"
        else:
            config, work, stored = of_tokenizer(recipe)
            size = f"{stored * PICTURES / 1e9:.1f} GB"
        pictures = config.max_train_steps * config.train_batch_size
        cells = [
            f"`{recipe}`",
            f"{config.max_train_steps:,}",
            str(config.train_batch_size),
            f"{pictures / PICTURES:.0f}",
            f"{work / 1e9:.0f}",
            f"{pictures * work / speed / 3600:.0f}",
            size,
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
