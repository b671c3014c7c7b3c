"""A quantizer of your own in one class and one line, inside a tokenizer of smalti's.

    python examples/custom_quantizer.py --steps 300 --output_dir runs/ternary

Each number is rounded to -1, 0 or 1, so d numbers make 3^d codes, and the gradient passes straight
through (FSQ, 2309.15505, with three levels everywhere).
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor

from smalti.data.dataset import DataOptions
from smalti.data.image_io import image_grid
from smalti.scripts.train_tokenizer import TrainTokenizerConfig, train
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.presets import PRESETS
from smalti.tokenizer.quantizers import QUANTIZERS, QuantizerConfig
from smalti.tokenizer.quantizers.base import Quantized, Quantizer, straight_through


@dataclass(frozen=True)
class TernaryConfig(QuantizerConfig):
    """The defaults give 3^6 = 729 codes."""

    kind: Literal["ternary"] = "ternary"
    digits: int = 6  # numbers per position of the grid


class TernaryQuantizer(Quantizer):
    """Features (B, d, h, w) -> numbers in {-1, 0, 1}; a code is its d numbers read in base 3."""

    Config: ClassVar[type] = TernaryConfig

    def __init__(self, config: TernaryConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("radix", 3 ** torch.arange(config.digits), persistent=False)
        self.radix: Tensor  # (d,)

    @property
    def vocab_size(self) -> int:
        return 3**self.config.digits

    @property
    def dim(self) -> int:
        return self.config.digits

    def _search(self, features: Tensor) -> Tensor:  # (B, d, h, w) -> codes (B, h w)
        digits = features.tanh().round().long() + 1  # 0, 1 or 2
        return (rearrange(digits, "b d h w -> b (h w) d") * self.radix).sum(-1)

    def _lookup(self, codes: Tensor, height: int, width: int) -> Tensor:  # (B, h w) -> (B, d, h, w)
        digits = codes[..., None] // self.radix % 3
        return rearrange(digits.float() - 1, "b (h w) d -> b d h w", h=height, w=width)

    def _quantize(self, features: Tensor) -> Quantized:
        codes = self._search(features)
        rounded = self._lookup(codes, *features.shape[2:])
        return Quantized(straight_through(features.tanh(), rounded), codes)


QUANTIZERS.register("ternary", TernaryQuantizer)  # all that is needed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ternary"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args()

    config = replace(PRESETS["vq-32-tiny"], quantizer=TernaryConfig())
    folder = train(
        TrainTokenizerConfig(
            data=options.data,
            output_dir=options.output_dir,
            tokenizer=config,
            max_train_steps=options.steps,
            train_batch_size=options.batch_size,
            learning_rate=1e-3,
            ema_decay=0.99,
        )
    )

    # It is saved and loaded like any other: config.json says {"type": "ternary", "digits": 6}.
    tokenizer = Tokenizer.from_pretrained(folder)
    heldout = DataOptions(data=options.data).dataset("heldout", tokenizer.image_size)
    images = next(iter(heldout.batches(12))).images
    both = torch.cat([images, tokenizer.reconstruct(images)])
    grid = image_grid(both, len(images), row_labels=("original", "reconstruction"), scale=2)
    grid.save(options.output_dir / "reconstructions.png")
    print(f"tokenizer: {folder}")


if __name__ == "__main__":
    main()
