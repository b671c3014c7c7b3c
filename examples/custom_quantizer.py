"""A quantizer of your own in one class and one line, inside a tokenizer of smalti's.

    python examples/custom_quantizer.py --steps 300 --output_dir runs/sign

The quantizer keeps the sign of each number: d numbers are d bits, so there are 2^d codes, and the
gradient passes straight through. (LFQ, 2310.05737, without its entropy loss.)
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from smalti.data.dataset import DataOptions
from smalti.data.image_io import image_grid
from smalti.scripts.train_tokenizer import TrainTokenizerConfig, train
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.presets import PRESETS
from smalti.tokenizer.quantizers import QUANTIZERS, QuantizerConfig
from smalti.tokenizer.quantizers.base import Quantized, Quantizer, straight_through


@dataclass(frozen=True)
class SignConfig(QuantizerConfig):
    """The number of bits per position."""

    kind: Literal["sign"] = "sign"
    bits: int = 10


class SignQuantizer(Quantizer):
    """Features (B, d, h, w) -> their signs; bit i of a code says that number i is positive."""

    Config: ClassVar[type] = SignConfig

    def __init__(self, config: SignConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def vocab_size(self) -> int:
        return 2**self.config.bits

    @property
    def dim(self) -> int:
        return self.config.bits

    def _search(self, features: Tensor) -> Tensor:
        weights = 2 ** torch.arange(self.dim, device=features.device).view(-1, 1, 1)  # (d, 1, 1)
        return ((features > 0) * weights).sum(1).flatten(1)  # (B, h w)

    def _lookup(self, codes: Tensor, height: int, width: int) -> Tensor:
        bits = codes[:, None] >> torch.arange(self.dim, device=codes.device).view(-1, 1) & 1
        return (2.0 * bits - 1).unflatten(2, (height, width))  # (B, d, h, w)

    def _quantize(self, features: Tensor, random_inputs: object) -> Quantized:
        codes = self._search(features)
        signs = self._lookup(codes, *features.shape[2:])
        return Quantized(straight_through(features, signs), codes)


QUANTIZERS.register("sign", SignQuantizer)  # all that is needed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sign"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args()

    config = replace(PRESETS["vq-32-tiny"], quantizer=SignConfig(bits=10))
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

    # It is saved and loaded like any other: config.json says {"kind": "sign", "bits": 10}.
    tokenizer = Tokenizer.from_pretrained(folder)
    heldout = DataOptions(data=options.data).dataset("heldout", tokenizer.image_size)
    images = next(iter(heldout.batches(12))).images
    both = torch.cat([images, tokenizer.reconstruct(images)])
    grid = image_grid(both, len(images), row_labels=("original", "reconstruction"), scale=2)
    grid.save(options.output_dir / "reconstructions.png")
    print(f"tokenizer: {folder}")


if __name__ == "__main__":
    main()
