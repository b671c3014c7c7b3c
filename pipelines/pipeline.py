"""Tokenizer and prior as one object: classes, prompts or nothing in, images out.

A saved pipeline is a folder:

    model_index.json     which models, the class names, and the hashes of this, of sampling.json
                         and of both config.json, which hold those of the weights
    sampling.json        options of a call that gives none
    tokenizer/ prior/    config.json and model.safetensors each
    README.md            the model card
    samples.png          the grid that the card shows, if there is one
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from PIL import Image
from torch import Tensor

from smalti.checkpoints import Weights, check_weights, is_checkpoint
from smalti.config import ImageSize
from smalti.data.buckets import Bucket
from smalti.data.classes import check_class_names
from smalti.data.latents import as_image_size
from smalti.errors import CheckpointError, ConfigurationError
from smalti.folders import replacing_folder
from smalti.pipelines.callbacks import Callback, Progress, Steps, preview
from smalti.pipelines.card import SAMPLES, described
from smalti.pipelines.class_labels import label_ids
from smalti.pipelines.conditions import (
    ClassLabels,
    Conditions,
    Inputs,
    Prompts,
    conditions_of,
    separated,
)
from smalti.pipelines.editing import Edit
from smalti.pipelines.image_tasks import with_image_condition
from smalti.pipelines.model_index import (
    CONFIGS,
    INDEX,
    SavedPipeline,
    check_pair,
    check_pipeline,
    check_target,
    files_of_pipeline,
    read_pipeline,
    read_run,
    weights_of_parts,
    write_pipeline,
)
from smalti.pipelines.offloading import Offloading
from smalti.pipelines.output import OutputType, PipelineOutput, as_output, check_output, png_of
from smalti.pipelines.precision import loading, set_precision
from smalti.pipelines.sampling import (
    checked_sampling,
    default_sampling,
    explicit,
    row_options,
    sampling_words,
)
from smalti.prior.base import Prior
from smalti.prior.conditions.base import moved, rows
from smalti.prior.conditions.text_encoder import TextEncoder, text_encoder_of
from smalti.randomness import Generators, check_generators
from smalti.repository import Uploadable, check_loading_options, resolve_folder, shipped_pipelines
from smalti.tokenizer.base import Tokenizer, check_finite
from smalti.weights import unwrapped

DEMO = "runs/demo/pipeline"  # what `smalti demo` writes, and other commands read by default


class Pipeline(Uploadable):
    """A tokenizer and a prior that was trained on its latents, with the names of the classes.

    Raises:
        ConfigurationError: the specs differ; the prior was trained on the latents of another
            tokenizer; there are more or fewer names than classes.
        DataError: two names are the same, or one cannot be printed.
    """

    uploaded_as: ClassVar[str] = "pipeline"

    def __init__(self, tokenizer: Tokenizer, prior: Prior, classes: Sequence[str]) -> None:
        check_pair(tokenizer, prior)
        if len(classes) != prior.num_classes:
            raise ConfigurationError(
                f"{len(classes)} class names were given; the prior has {prior.num_classes} classes"
            )
        check_class_names(classes, "the pipeline")
        self.tokenizer = tokenizer.eval()
        self.prior = prior.eval()
        self.classes = tuple(classes)
        self.notes = ""  # Markdown for the model card
        self.training_pictures = ""  # fingerprint of the prior's training data, if known
        self._text_encoder: TextEncoder | None = None  # loaded when it is first needed
        self._sampling = default_sampling(prior)
        self._progress = Progress()
        self._samples: bytes | None = None  # PNG of the grid that the model card shows
        self.auto_dtype: Mapping[str, str] = {}  # what dtype="auto" is, by type of device

    # -- loading and saving -------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        subfolder: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        weights: Weights = "ema",
        verify: bool = True,
        variant: str | None = None,
        low_cpu_mem_usage: bool | None = None,
        device_map: Any = None,
    ) -> Self:
        """Load a folder written by `save_pretrained`, a pipeline that ships with smalti
        ("smalti/fashion-next-token"), or a model repository on the Hub.

        Loading a local folder does not use the network. Only JSON and safetensors are read.
        A folder may also be a checkpoint of a train-prior run, whose latents and tokenizer are
        still where they were.

        Args:
            weights: of a checkpoint: "ema", the average over the run, or "raw".
            revision, token, local_files_only, cache_dir: for the Hub, as in Diffusers.
            subfolder: the folder of the pipeline within the path or the repository; nothing else is
                downloaded.
            dtype: precision of both models, a type or its name: float32, bfloat16, float16 (fp32,
                bf16, fp16), int8 or int4, see pipelines/precision.py. "auto" is the fastest without
                loss that `smalti sweep --dtype` found on this type of device, or without a sweep
                the one that each model was saved in. None is fp32.
            torch_dtype: another name of `dtype`.
            verify: compare all files but the model card with the hashes that were saved with them,
                see `Tokenizer.from_pretrained`.
            variant, low_cpu_mem_usage, device_map: see `Tokenizer.from_pretrained`.

        Raises:
            SmaltiError: the folder does not exist, or a file is missing, damaged or does not fit;
                there is no such precision, or the models cannot have it; an option cannot be met.
        """
        check_loading_options(device_map=device_map, low_cpu_mem_usage=low_cpu_mem_usage)
        folder = resolve_folder(
            path_or_hub_id,
            subfolder=subfolder,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
            needs=(INDEX, *CONFIGS, *weights_of_parts(variant)),
            patterns=files_of_pipeline(weights, variant),
        )
        check_weights(folder, weights, variant)
        of_run = is_checkpoint(folder)
        precision = loading(folder, device, dtype, torch_dtype)
        if of_run:
            saved = read_run(folder, weights, precision.read_as)
        else:
            saved = read_pipeline(folder, precision.read_as, verify, variant)
        pipeline = cls(saved.tokenizer, saved.prior, saved.classes)
        if verify and not of_run:  # last: the checks before it have more precise messages
            check_pipeline(folder)
        pipeline.notes, pipeline.training_pictures = saved.notes, saved.training_pictures
        pipeline._sampling, pipeline._samples = saved.sampling, saved.grid
        pipeline.auto_dtype = saved.auto_dtype
        return pipeline.to(device, precision.cast_to)

    def save_pretrained(
        self,
        path: str | Path,
        *,
        samples: Image.Image | None = None,
        notes: str | None = None,
        **weights: Any,
    ) -> Path:
        """Write tokenizer/, prior/, a model card and `model_index.json`.

        They are written beside `path` and swapped in as a whole: a process that ends at any moment
        leaves the pipeline that was there, or the new one. Other files in the folder are kept.

        Args:
            samples: a grid of samples for the card, saved as samples.png; None keeps the one that
                the pipeline was loaded with or last saved with.
            notes: Markdown for the card, for example measurements; None keeps the current notes.
            weights: `variant` and `max_shard_size`, see `Tokenizer.save_pretrained`.

        Raises:
            CheckpointError: `path` exists and is not a saved pipeline.
            ConfigurationError: the tokenizer was changed since it was paired with the prior.
        """
        folder = Path(path)
        tokenizer = cast(Tokenizer, unwrapped(self.tokenizer))
        prior = cast(Prior, unwrapped(self.prior))
        check_pair(tokenizer, prior)
        notes = self.notes if notes is None else notes
        grid = self._samples if samples is None else png_of(samples)
        with replacing_folder(
            folder, products=(SAMPLES,), check=lambda: check_target(folder)
        ) as new:
            about = (notes, self.training_pictures, self.sampling, grid, self.auto_dtype)
            saved = SavedPipeline(tokenizer, prior, self.classes, *about)
            write_pipeline(new, saved, folder, **weights)
        self.notes, self._samples = notes, grid
        return folder

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Self:
        """Move both models, change their precision (as in `from_pretrained`), or both; return self.

        Raises:
            ConfigurationError: dtype is "auto", there is none such, or the models cannot have it.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if self._offloading is not None:
            self._offloading.remove()
        set_precision(self.tokenizer, self.prior, dtype, device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the prior; torch.int8 and torch.int4 are of its linear layers."""
        return self.prior.dtype

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        where = f"{sampling_words(self.sampling)}, {dtype} on {self.device}"
        models = described(self.tokenizer, self.prior, self.classes)
        return "\n  ".join(["Pipeline(", *models, where]) + "\n)"

    def resized(self, image_size: ImageSize) -> Self:
        """A pipeline with the same weights, not a copy, for images of another size; itself at its
        own.

        Args:
            image_size: pixels: the side of a square, or (height, width).

        Raises:
            ConfigurationError: the tokenizer has no latents for images of this size.
            GenerationError: the prior has learned its positions, and so samples its own size only.
        """
        tokenizer = cast(Tokenizer, unwrapped(self.tokenizer))
        size = as_image_size(image_size)
        if size == tokenizer.image_size:
            return self
        tokenizer = tokenizer.sharing_weights(size)
        prior = cast(Prior, unwrapped(self.prior)).resized(tokenizer.spec, tokenizer.fingerprint)
        pipeline = type(self)(tokenizer, prior, self.classes)
        pipeline._continue(self)
        for old, new in ((self.tokenizer, tokenizer), (self.prior, prior)):
            if old.compiled_with is not None:
                new.compile_parts(**old.compiled_with)
        if self._offloading is not None:
            pipeline.enable_model_cpu_offload(self._offloading.device)
        return pipeline

    def _continue(self, other: "Pipeline") -> None:
        """Take what another pipeline of the same weights has been told and has loaded."""
        self.notes, self.training_pictures = other.notes, other.training_pictures
        self._sampling, self._progress = dict(other.sampling), other._progress
        self._text_encoder = other._text_encoder

    def compile(self, **options: Any) -> Self:
        """Make sampling faster; return self. Samples then differ by rounding. Pipelines that
        `resized` makes of this one are compiled likewise. The blocks of the prior and the decoder
        are compiled, with options of torch.compile. Without options, on a CPU, the prior packs its
        large weights instead, in a second and as much memory again, or is compiled if it has none;
        the decoder stays. Call it again after weights have changed, `to` another device or type
        too: a pipeline that was packed is not compiled there."""
        self.prior.compile_parts(**options)
        self.tokenizer.compile_parts(**options)
        return self

    def enable_model_cpu_offload(self, device: torch.device | str | None = None) -> None:
        """Keep both models in the memory of the CPU, and move each to the accelerator while it is
        used. `to` ends that.

        Args:
            device: the accelerator; None: the one that the machine has.

        Raises:
            ConfigurationError: there is none.
        """
        Offloading([self.tokenizer, self.prior], device)  # the models keep it

    @property
    def _offloading(self) -> Offloading | None:
        return Offloading.of([self.tokenizer, self.prior])

    def release(self) -> None:
        """Move models that are offloaded off the accelerator, as every call does at its end."""
        if self._offloading is not None:
            self._offloading.release()

    def _use(self, model: torch.nn.Module) -> None:
        if self._offloading is not None:
            self._offloading.use(model)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The sizes of images that the prior was trained on, each for pictures of another aspect
        ratio; () if it was trained on one."""
        grids = getattr(self.prior.config, "buckets", ())
        sizes = tuple(self.tokenizer.size_of(grid) for grid in grids)
        return tuple(Bucket(number, sizes) for number in range(len(sizes)))

    @property
    def bucket(self) -> Bucket | None:
        """The bucket of its image size; None if it has none."""
        mine = (b for b in self.buckets if b.size == self.tokenizer.image_size)
        return next(mine, None)

    @property
    def device(self) -> torch.device:
        """Where models run."""
        if self._offloading is not None:
            return self._offloading.device
        return next(self.prior.parameters()).device

    @property
    def components(self) -> dict[str, Any]:
        """What makes another pipeline of the same models: `Pipeline(**pipe.components)`."""
        return {"tokenizer": self.tokenizer, "prior": self.prior, "classes": self.classes}

    # -- sampling -----------------------------------------------------------------------------

    @property
    def sampling(self) -> dict[str, Any]:
        """The options of a call that gives none, `guidance_scale` among them, by name. They are
        saved with the pipeline.

        Raises:
            SmaltiError: when it is set: the prior has no such option, or refuses the value.
        """
        return self._sampling

    @sampling.setter
    def sampling(self, options: Mapping[str, Any]) -> None:
        self._sampling = checked_sampling(self.prior, options)

    def sampling_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a call: those that are given, and not None, and otherwise `sampling`."""
        return {**self.sampling, **explicit(given)}

    @property
    def guidance_scale(self) -> float:
        """`sampling["guidance_scale"]`."""
        return self.sampling["guidance_scale"]

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self.sampling["guidance_scale"] = scale

    @property
    def interrupt(self) -> bool:
        """Whether sampling ends after the step that is running, with what there is then: codes not
        yet sampled are -1, latents of a flow contain noise, and further batches are left out. A
        callback, or another thread during a call with a callback or a progress bar, sets it; a
        call begins with False."""
        return self._progress.interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._progress.interrupt = value

    _interrupt = interrupt  # what callbacks that were written for Diffusers set

    @property
    def num_timesteps(self) -> int:
        """The steps of a batch of the running or last call that had a callback or progress bar."""
        return self._progress.steps

    def set_progress_bar_config(self, **options: Any) -> None:
        """Show a progress bar over the steps of every call, with these options of tqdm, such as
        `desc` and `leave`; `disable=True` shows none, which is the default."""
        self._progress.bar = options

    @torch.no_grad()
    def preview(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of the latents that a callback gets, to be called inside
        it: of the codes so far, a next-scale prior's coarse scales or the first codes of a
        next-token prior, whose other positions are zero vectors; or of E[x_1 | x_t], which takes
        one evaluation of a flow prior's network."""
        latents = self.prior.estimated(latents.to(self.device))
        self._use(self.tokenizer)
        images = (preview(self.tokenizer, self.prior.spec, latents).cpu() + 1) / 2
        self._use(self.prior)
        return images

    @property
    def text_encoder(self) -> TextEncoder | None:
        """What encodes prompts; None if the prior takes none, or features of an unknown encoder.

        May be set to the same encoder in another place: its weights are compared.

        Raises:
            SmaltiError: it cannot be loaded, or is not the one that the prior was trained with.
        """
        text = self.prior.config.text
        if self._text_encoder is None and text is not None and text.encoder:
            self.text_encoder = text_encoder_of(text.encoder)
        return self._text_encoder

    @text_encoder.setter
    def text_encoder(self, encoder: TextEncoder) -> None:
        text = self.prior.config.text
        if text is None:
            raise ConfigurationError("the prior of this pipeline takes no captions")
        encoder.check_fingerprint(text.encoder_fingerprint)
        self._text_encoder = encoder.to(self.device)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        *,
        prompt: Prompts | None = None,
        negative_prompt: Prompts | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        num_images: int | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        generator: Generators = None,
        output_type: OutputType = "pil",
        batch_size: int | None = None,
        image_size: ImageSize | None = None,
        progress: bool | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        **options: Any,
    ) -> PipelineOutput:
        """Generate images of classes, of prompts or of both, as the prior was trained; without
        either if it is unconditional.

        Args:
            class_labels: a class, or several, by number or name; `num_images_per_prompt` images
                are generated of each, in order.
            prompt: a text, or several, likewise.
            negative_prompt: what guidance leads away from, one text or one for each prompt; an
                empty text, like None, is "no text".
            prompt_embeds: instead of prompts, the output of a text encoder for them, (B, T, D)
                with the T and D that the prior was trained with, padded anywhere.
            prompt_attention_mask: (B, T), nonzero at tokens; None: nothing is padding.
            num_images: of an unconditional prior, or of each image that it edits; None is 1.
            image: pictures to edit, of the size of the images: one for all classes or prompts, or
                one for each; of Pillow, or values in [0, 1].
            mask_image: masks of that size: white is generated, black is kept.
            strength: in (0, 1]: how far a flow prior goes from the image; None is 1 inside a mask,
                and 0.8 without one.
            guidance_scale: s in uncond + s (cond - uncond); 1 is off and costs no second pass; None
                is that of `sampling`, as for all options of the prior.
            generator: one generator, or a list with one per image. With a list, image i does not
                depend on its neighbours or on `batch_size`, except that sampling rounds
                differently in batches of another size; a generation job excludes that, too.
            output_type: "pil", "np", "pt" or "latent" (nothing is decoded).
            batch_size: images per batch; None is one batch of all images.
            image_size: pixels, the side of a square or (height, width), if not that of the
                tokenizer; see `resized`. Priors with learned positions refuse it.
            progress: show a progress bar over the steps; None: as `set_progress_bar_config` says.
            callback_on_step_end: called after each step of each batch with the pipeline, the index
                of the step from 0, the share of the steps that are done, and {"latents": ...};
                latents in a mapping that it returns replace them. See `preview`, `interrupt`.
            callback_on_step_end_tensor_inputs: what the callback gets: ["latents"], or [].
            return_dict: False returns the fields of the result as a tuple, images first.
            options: of the prior's `sample`, and arguments of a further `ConditionSource`.

        Raises:
            GenerationError: an input that the prior does not take, an unknown class, output type or
                option, or a wrong number of generators or of rows.
        """
        pipe = self if image_size is None else self.resized(image_size)
        others, options = separated(pipe.prior, options)
        texts = (prompt, negative_prompt, prompt_embeds, prompt_attention_mask)
        inputs = Inputs(class_labels, *texts, num_images, image, mask_image, strength, others)
        conditions, edit = pipe.conditions(inputs, num_images_per_prompt)
        self._text_encoder = pipe._text_encoder  # loaded once for all sizes
        options = pipe.sampling_options({"guidance_scale": guidance_scale, **options}) | edit
        check_output(output_type, batch_size)
        check_generators(generator, len(conditions))
        size = int(batch_size or len(conditions))
        steps = Steps(pipe, pipe._progress, -(-len(conditions) // size), progress)
        steps.call(options.pop("on_step", None))
        steps.call_back(callback_on_step_end, callback_on_step_end_tensor_inputs)
        with steps:
            sampled = pipe._batches(conditions, options, generator, size, steps)
            output = pipe._output(sampled, conditions, generator, output_type)
        return output if return_dict else cast(Any, output.to_tuple())

    def _output(
        self,
        batches: Iterable[Tensor],
        conditions: Conditions,
        generator: Generators,
        output_type: OutputType,
    ) -> PipelineOutput:
        """Latents, decoded batch by batch unless they are asked for."""
        latents, images = [], []
        for sampled in batches:
            latents.append(sampled)
            if output_type != "latent":
                images.append(self._decode(sampled, singly=isinstance(generator, Sequence)))
        decoded = as_output(torch.cat(images), output_type) if images else None
        made = sum(map(len, latents))  # fewer than conditions if sampling was interrupted
        labels, prompts = conditions.labels[:made], conditions.prompts[:made]
        names = [self.classes[label] for label in labels]
        return PipelineOutput(decoded, torch.cat(latents), labels, names, prompts)

    def _batches(
        self,
        conditions: Conditions,
        options: Mapping[str, Any],
        generator: Generators,
        size: int,
        steps: Steps,
    ) -> Iterator[Tensor]:
        """The sampled latents, `size` at a time."""
        by_row = row_options(self.prior, options, len(conditions))
        if conditions.negative is not None:
            by_row["negative_condition"] = conditions.negative
        options = {**options, **steps.options}
        for start in range(0, len(conditions), size):
            part = slice(start, start + size)
            self._use(self.prior)
            sampled = self.prior.sample(
                moved(rows(conditions.value, part), self.device),
                generator=generator[part] if isinstance(generator, Sequence) else generator,
                **{**options, **{name: rows(value, part) for name, value in by_row.items()}},
            )
            check_finite(sampled, "the prior", None, "conditions")
            steps.batch_is_done()
            yield sampled
            if self.interrupt:
                return

    def conditions(self, inputs: Inputs, each: int) -> tuple[Conditions, dict[str, Any]]:
        """The conditions of the images, and the options of `sample` that edit given ones."""
        encoder = self.text_encoder if inputs.needs_encoder else None
        if inputs.edits or self.prior.config.image is not None:
            self._use(self.tokenizer)

        def conditions(each: int) -> Conditions:
            return conditions_of(self.prior, inputs, each, self.classes, encoder)

        if self.prior.config.image is not None:
            inputs, edit = with_image_condition(self.tokenizer, self.prior, inputs)
            found = conditions(each)
            return found, edit.options(len(found), each) if edit else {}
        if not inputs.edits:
            return conditions(each), {}
        edit = Edit.of(self.tokenizer, self.prior, inputs)
        found, each = edit.conditions(self.prior, inputs, each, conditions)
        return found, edit.options(len(found), each)

    def _decode(self, latents: Tensor, *, singly: bool) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] on the CPU.

        Args:
            singly: whether images must not depend on the others of the batch. In fp32 they are
                then decoded one by one, because convolutions round differently in batches of
                another size. In half precision sampling rounds too coarsely for that to help.
        """
        self._use(self.tokenizer)
        if self.interrupt and not latents.is_floating_point() and (latents < 0).any():
            return preview(self.tokenizer, self.prior.spec, latents).cpu()
        exact = singly and self.tokenizer.last_layer.dtype in (torch.float32, torch.float64)
        parts = latents.split(1) if exact else (latents,)
        return torch.cat([self.tokenizer.decode(part).float().clamp(-1, 1).cpu() for part in parts])

    def label_ids(self, class_labels: ClassLabels) -> list[int]:
        """The labels of classes that are given by number or name.

        Raises:
            GenerationError: there is no such class; the message lists similar names.
        """
        return label_ids(class_labels, self.classes)


def check_model(model: str) -> None:
    """Raise `CheckpointError` if a command was given no model, and `smalti demo` has made none."""
    if model == DEMO and not Path(model).is_dir():
        raise CheckpointError(
            f"there is no model in {DEMO}, the default of --model: train one with smalti demo, or "
            f"give --model a folder, an id on the Hub, or {' or '.join(shipped_pipelines())}"
        )
