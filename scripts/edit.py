"""Editing: pictures and masks in, edited pictures and a strip out.

    smalti edit --model runs/demo/pipeline --image cat.png --box 8,8,24,24 --class_labels fish

Any prior edits zero-shot. A prior that is conditional on pictures does its task: super-resolution,
or inpainting. The strip has a row for each picture and class: the original, the condition, the
results; for super-resolution also the bicubic enlargement.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image

from smalti.checkpoints import Weights
from smalti.cli import parse_config, run_command
from smalti.config import check_at_least
from smalti.data.image_io import TRANSPARENT, WHITE, FolderOptions, save_png, to_channels
from smalti.data.latents import height_and_width
from smalti.data.sources.folder import read_picture
from smalti.errors import ConfigurationError, GenerationError
from smalti.folders import contents, replacing_folder
from smalti.pipelines.conditions import conditional_on, sources_of
from smalti.pipelines.editing import STRIP, box_mask, fitted, masked, pasted, strip
from smalti.pipelines.generation import picture_generator
from smalti.pipelines.image_tasks import make_task
from smalti.pipelines.model_flag import place_of
from smalti.pipelines.pipeline import DEMO, Pipeline, check_model
from smalti.scripts.options import Sampling, refuse_other_conditions

CONDITIONS = ("class_labels", "prompt", "image")  # that there is a flag for
Masked = tuple[Image.Image, Image.Image | None]  # a picture and its mask


@dataclass(frozen=True)
class EditConfig(Sampling):
    """Generate a region of pictures anew, or change pictures as a whole, with a saved pipeline."""

    model: Annotated[str, place_of("A pipeline")] = DEMO
    weights: Weights = "ema"  # of a checkpoint: averaged over its run (ema), or raw
    image: tuple[Path, ...] = ()  # picture files to edit
    # Pictures of the same size, white where to generate, black where to keep: one for all, or one
    # for each.
    mask: tuple[Path, ...] = ()
    box: str = ""  # x0,y0,x1,y1: a white box, in pixels of each picture, instead of --mask
    class_labels: tuple[str, ...] = ()  # names or numbers; each picture is edited with each of them
    prompt: tuple[str, ...] = ()  # of a text-conditional pipeline, likewise; with each class
    # Flow priors: how far to go from the picture, in (0, 1]; 1 inside a mask, and 0.8 without one.
    strength: float | None = None
    resize: bool = False  # crop the centre of pictures and masks, and resize it to the model's size
    paste: bool = True  # outside a mask, the pixels of the picture instead of decoded ones
    num_images: int = 4  # results for each picture and class or prompt
    seed: int = 0  # result i depends on the seed and i alone
    batch_size: int = 64  # pictures sampled at once
    output_dir: Path = Path("edited")  # new folder of the results and the strip

    def __post_init__(self) -> None:
        check_at_least(1, self, "num_images", "batch_size")

    def check_pictures(self) -> None:
        """Raise `ConfigurationError` if there is no picture, or pictures and masks do not fit."""
        if not self.image:
            raise ConfigurationError("no picture was given: pass --image FILE")
        if self.mask and self.box:
            raise ConfigurationError("both a mask and a box were given: pass one of them")
        if len(self.mask) not in (0, 1, len(self.image)):
            raise ConfigurationError(
                f"{len(self.image)} pictures and {len(self.mask)} masks were given: pass one mask "
                "for all pictures, or one for each"
            )

    def read(self, channels: int) -> list[Masked]:
        """Each picture, of so many channels, with its mask.

        Raises:
            DataError: a file cannot be used; the box is not inside a picture.
        """
        background = TRANSPARENT if channels == 4 else WHITE
        # What is not 8-bit RGB is converted, as in the window; small pictures may be enlarged.
        options = FolderOptions(unusual_images="convert", background=background, min_side=1)
        pictures = [to_channels(read_picture(path, options), channels) for path in self.image]
        if self.box:
            return [(each, box_mask(self.box, (each.height, each.width))) for each in pictures]
        if not self.mask:
            return [(each, None) for each in pictures]
        with_alpha = replace(options, background=TRANSPARENT)  # so that it is refused, as in Python
        masks = [read_picture(path, with_alpha) for path in self.mask]
        return list(zip(pictures, masks * (len(pictures) // len(masks)), strict=True))


def edit(config: EditConfig) -> list[Path]:
    """Write the results and the strip; return the paths of the results.

    Raises:
        ConfigurationError: the output folder is not empty.
        SmaltiError: a picture, a mask or an option does not fit the model.
    """
    config.check_pictures()
    check_model(config.model)
    _check_output(config.output_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = Pipeline.from_pretrained(config.model, device=device, weights=config.weights)
    _check_conditions(config, pipeline)
    edits = config.read(pipeline.tokenizer.image_channels)
    if config.resize:
        edits = [fitted(*each, pipeline.tokenizer.image_size) for each in edits]
    count, classes, prompts = config.num_images, config.class_labels, config.prompt
    pairs = [(label, text) for text in prompts or [""] for label in classes or [""]]
    rows = [each for each in edits for _ in pairs]  # each picture with each class and prompt
    pairs *= len(edits)
    unconditional = list(pipeline.prior.condition_kinds) == ["none"]
    output = pipeline(
        class_labels=[label for label, _ in pairs] if classes else None,
        prompt=[text for _, text in pairs] if prompts else None,
        image=[picture for picture, _ in rows],
        mask_image=None if rows[0][1] is None else [mask for _, mask in rows],
        strength=config.strength,
        **{"num_images" if unconditional else "num_images_per_prompt": count},
        generator=[picture_generator(config.seed, i) for i in range(len(rows) * count)],
        batch_size=config.batch_size,
        progress=True,
        **config.options,
    )
    results = [output.images[i * count : (i + 1) * count] for i in range(len(rows))]
    given = shown_conditions(pipeline, rows)
    labels = [" ".join(filter(None, pair)) for pair in pairs]
    return _write(config, rows, given, results, labels if prompts or classes else [])


def _check_conditions(config: EditConfig, pipeline: Pipeline) -> None:
    """Raise `SmaltiError` if a pipeline is conditional on what no flag gives, or on what was not
    given, or is not conditional on what was given."""
    prior = pipeline.prior
    sources = sources_of(prior.condition_kinds, prior.config, pipeline.classes)
    described = f"{config.model} is {conditional_on(sources)}"
    refuse_other_conditions(config, sources, described)
    for source in sources.values():
        if not source.is_needed(sources):
            continue
        if source.argument not in CONDITIONS:
            raise ConfigurationError(
                f"{described} and needs {source.argument}, for which there is no flag: call it in "
                "Python"
            )
        has_default = [*sources] == ["class"] and prior.has_null_class
        if not getattr(config, source.argument) and not has_default:
            raise GenerationError(f"{described}: give --{source.argument}")


def shown_conditions(pipeline: Pipeline, rows: Sequence[Masked]) -> list[list[Image.Image]]:
    """For each picture, what the strip shows before its results."""
    image = pipeline.prior.config.image
    if image is not None:
        return make_task(image.task).shown(rows, height_and_width(pipeline.tokenizer.image_size))
    return [[p, *([] if mask is None else [masked(p, mask)])] for p, mask in rows]


def _write(
    config: EditConfig,
    rows: list[Masked],
    given: list[list[Image.Image]],
    results: list[list[Image.Image]],
    labels: list[str],
) -> list[Path]:
    """Write the results of each picture with its mask, and the strip."""
    names, shown = [], []
    with replacing_folder(config.output_dir, check=lambda: _check_output(config.output_dir)) as new:
        for (picture, mask), condition, images in zip(rows, given, results, strict=True):
            if config.paste and mask is not None:
                images = [pasted(image, picture, mask) for image in images]
            for image in images:
                names.append(f"{len(names):06d}.png")
                save_png(new / names[-1], image)
            shown.append([*condition, *images])
        save_png(new / STRIP, strip(shown, labels))
    return [config.output_dir / name for name in names]


def _check_output(folder: Path) -> None:
    """Raise `ConfigurationError` if the output folder contains anything."""
    if folder.is_dir() and contents(folder):
        raise ConfigurationError(f"{folder} is not empty: choose another --output_dir")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti edit`."""
    config = parse_config(EditConfig, argv, prog="smalti edit")
    print(f"{len(edit(config))} pictures, and {STRIP}: {config.output_dir}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
