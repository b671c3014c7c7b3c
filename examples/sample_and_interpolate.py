"""Sample from a saved pipeline with and without guidance, and interpolate between two samples.

    python examples/sample_and_interpolate.py --pipeline runs/demo/pipeline --output_dir samples

Any pipeline will do, whatever its tokenizer and prior.
"""

import argparse
from pathlib import Path

import torch

from smalti import Pipeline
from smalti.data.image_io import image_grid
from smalti.tokenizer.manipulation import interpolate, spherical

SCALES = (1.0, 2.0, 4.0)  # guidance_scale; 1 is off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default="runs/demo/pipeline", help="a folder, or on the Hub")
    parser.add_argument("--output_dir", type=Path, default=Path("samples"))
    parser.add_argument("--count", type=int, default=8, help="pictures per row")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = Pipeline.from_pretrained(options.pipeline, device=device)
    labels = [i % len(pipeline.classes) for i in range(options.count)]

    # One generator per picture: picture i has the same noise at every guidance scale, and does not
    # depend on its neighbours or on the batch size.
    rows = []
    for scale in SCALES:
        generators = [torch.Generator().manual_seed(i) for i in range(options.count)]
        output = pipeline(
            labels, guidance_scale=scale, generator=generators, output_type="pt", batch_size=32
        )
        rows.append(output.images * 2 - 1)  # [0, 1] -> [-1, 1]
    names = [f"guidance {scale}" for scale in SCALES]
    grid = image_grid(torch.cat(rows), options.count, row_labels=names, scale=2)
    grid.save(options.output_dir / "guidance.png")

    # Codes cannot be averaged, but the vectors that the decoder receives can: (B, d, h, w).
    tokenizer = pipeline.tokenizer
    with torch.no_grad():
        vectors = tokenizer.vectors(output.latents[:2])
        path = interpolate(vectors[:1], vectors[1:], options.count, spherical)  # (1, N, d, h, w)
        pictures = tokenizer.decode_vectors(path[0]).float().cpu()
    image_grid(pictures, options.count, scale=2).save(options.output_dir / "interpolation.png")
    print(f"guidance.png and interpolation.png: {options.output_dir}")


if __name__ == "__main__":
    main()
