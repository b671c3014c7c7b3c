"""Edit held-out pictures with a saved pipeline, and measure how well the known pixels are kept.

    python examples/edit_pictures.py --pipeline runs/demo/pipeline --data emoji --output_dir edited

Any pipeline with class labels will do, whatever its tokenizer and prior.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from smalti import Pipeline
from smalti.data.dataset import ImageDataset
from smalti.data.image_io import image_grid
from smalti.data.latents import height_and_width
from smalti.data.sources.base import open_source

SHOWN = 8  # pictures in the grid


def regions(height: int, width: int) -> dict[str, Tensor]:
    """Masks (H, W) bool by name, True where to generate."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    middle = (abs(rows - (height - 1) / 2) < height / 4) & (
        abs(columns - (width - 1) / 2) < width / 4
    )
    right, bottom = (
        (columns >= width // 2).expand(height, -1),
        (rows >= height // 2).expand(-1, width),
    )
    return {"middle": middle, "right half": right, "bottom half": bottom, "all but middle": ~middle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default="runs/demo/pipeline", help="a folder, or on the Hub")
    parser.add_argument("--data", default="emoji", help="pictures that the pipeline was trained on")
    parser.add_argument("--output_dir", type=Path, default=Path("edited"))
    parser.add_argument("--count", type=int, default=48, help="pictures")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = Pipeline.from_pretrained(options.pipeline, device=device)
    tokenizer = pipeline.tokenizer
    size, channels = tokenizer.image_size, tokenizer.image_channels
    heldout = ImageDataset(open_source(options.data), size, channels=channels, split="heldout")
    heldout.number_as(pipeline.classes)
    batch = next(heldout.batches_of(heldout.even_subset(options.count, 0), options.count))
    originals = batch.images
    reconstructions = torch.cat(
        [tokenizer.reconstruct(x[None].to(device)).cpu() for x in originals]
    )

    rows = [originals, reconstructions]
    print("mean squared error of the known pixels, in [-1, 1]")
    for name, region in regions(*height_and_width(size)).items():
        # One generator per picture: a result does not depend on the others of its batch.
        generators = [torch.Generator().manual_seed(i) for i in range(len(originals))]
        output = pipeline(
            batch.labels,
            image=(originals + 1) / 2,
            mask_image=region,
            generator=generators,
            output_type="pt",
            batch_size=32,
        )
        results = output.images * 2 - 1
        rows += [originals.masked_fill(region, 0), results]

        def error(one: Tensor, other: Tensor, known: Tensor = ~region) -> float:
            return (one - other)[..., known].square().mean().item()

        print(
            f"{name} generated: reconstruction to picture {error(reconstructions, originals):.4f}, "
            f"result to picture {error(results, originals):.4f}, "
            f"result to reconstruction {error(results, reconstructions):.4f}"
        )
    shown = min(SHOWN, len(originals))
    grid = image_grid(torch.cat([row[:shown] for row in rows]), shown, scale=2)
    grid.save(options.output_dir / "edits.png")
    print(f"edits.png: {options.output_dir}")


if __name__ == "__main__":
    main()
