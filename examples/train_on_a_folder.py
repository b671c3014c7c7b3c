"""Train both stages on a folder of your own pictures, then sample from the result.

    python examples/train_on_a_folder.py --data my_pictures --output_dir runs/mine

The folder has one sub-folder per class. This is `smalti demo --data my_pictures` in Python: each
stage is one function, which takes the flags of its command and returns what was trained.
"""

import argparse
from pathlib import Path

import smalti
from smalti.pipelines.generation import sample_grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="emoji", help="folder with one sub-folder per class")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/mine"))
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each stage")
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args()

    # What both stages share: 5 % of the steps warm up, then the learning rate falls to 5 %.
    schedule = {
        "max_train_steps": options.steps,
        "train_batch_size": options.batch_size,
        "learning_rate": 1e-3,
        "lr_warmup_steps": options.steps // 20,
        "lr_final_ratio": 0.05,
        "ema_decay": 0.99,
    }

    # Stage one: pictures of 32 x 32 pixels <-> 8 x 8 codes.
    out = options.output_dir
    tokenizer = smalti.train_tokenizer(
        data=options.data, output_dir=out / "tokenizer", tokenizer="vq-32-tiny", **schedule
    )
    print(f"{tokenizer.spec.length} codes of {tokenizer.spec.vocab_size} for each picture")

    # Every picture and its mirror image are encoded once.
    latents = smalti.encode_pictures(
        data=options.data, tokenizer=out / "tokenizer" / "tokenizer", output_dir=out / "latents"
    )

    # Stage two: p(codes | class). The result is a pipeline: tokenizer, prior and class names.
    pipeline = smalti.train_prior(
        latents=latents,
        tokenizer=out / "tokenizer" / "tokenizer",
        output_dir=out / "prior",
        prior="gpt-nano",
        **schedule,
    )
    print(pipeline)
    grid = sample_grid(pipeline, per_row=4)  # a row per class
    grid.save(out / "samples.png")
    print(f"pipeline: {out / 'prior' / 'pipeline'}\nsamples: {out / 'samples.png'}")


if __name__ == "__main__":
    main()
