"""Train both stages on a folder of your own pictures, then sample from the result.

    python examples/train_on_a_folder.py --data my_pictures --output_dir runs/mine

The folder has one sub-folder per class. This is `smalti demo --data my_pictures` in Python: each
stage is one function and takes one dataclass, whose fields are the flags of the command.
"""

import argparse
from pathlib import Path

from smalti import Pipeline
from smalti.pipelines.generation import class_grid
from smalti.prior.presets import PRESETS as PRIORS
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_prior import train as train_prior
from smalti.scripts.train_tokenizer import TrainTokenizerConfig
from smalti.scripts.train_tokenizer import train as train_tokenizer
from smalti.tokenizer.presets import PRESETS as TOKENIZERS


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
    tokenizer = train_tokenizer(
        TrainTokenizerConfig(
            data=options.data,
            output_dir=options.output_dir / "tokenizer",
            tokenizer=TOKENIZERS["vq-32-tiny"],
            **schedule,
        )
    )

    # Every picture and its mirror image are encoded once.
    latents = encode(
        EncodeConfig(
            data=options.data, tokenizer=tokenizer, output_dir=options.output_dir / "latents"
        )
    )

    # Stage two: p(codes | class). The result is a pipeline: tokenizer, prior and class names.
    folder = train_prior(
        TrainPriorConfig(
            latents=latents,
            tokenizer=tokenizer,
            output_dir=options.output_dir / "prior",
            prior=PRIORS["gpt-nano"],
            **schedule,
        )
    )

    pipeline = Pipeline.from_pretrained(folder)
    grid = class_grid(pipeline, per_class=4, guidance_scale=2.0)  # a row per class
    grid.save(options.output_dir / "samples.png")
    print(f"pipeline: {folder}\nsamples: {options.output_dir / 'samples.png'}")


if __name__ == "__main__":
    main()
