"""The inputs of a pipeline: the condition of every image, and the options of the prior.

label_ids        classes by name or number -> class labels
Inputs           what a caller gives: classes, prompts, or a number of images
Conditions       the same as a prior takes it, a row for each image
CaptionFeatures  what a latent cache holds of captions for a frozen text encoder
BatchConditions  the conditions of training batches
check_options    whether a prior's `sample` takes these options, before any work is done
"""

import difflib
import hashlib
import inspect
import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smalti.config import nearest
from smalti.data.classes import class_number, shown
from smalti.data.dataset import ImageBatch
from smalti.data.latent_cache.cache import LatentBatch
from smalti.data.latent_cache.manifest import CacheInfo, StoredCondition
from smalti.data.latent_cache.on_the_fly import Latents
from smalti.data.latents import as_tensor
from smalti.errors import DataError, GenerationError
from smalti.prior.base import Prior, PriorConfig
from smalti.prior.conditions.base import Combination, Condition, count, repeated, where
from smalti.prior.conditions.image import ImageCondition, ImageConfig
from smalti.prior.conditions.text import TextCondition, TextConfig
from smalti.prior.conditions.text_encoder import TextEncoder

# -- class labels ---------------------------------------------------------------------------------

ClassLabels = int | str | Sequence[int | str] | Tensor


def integer(name: str, value: Any) -> int:
    """`value` as an int; 1.9, True and None are refused.

    Raises:
        GenerationError: it is not an integer.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise GenerationError(f"{name} is {value!r}; it must be an integer")


def label_ids(class_labels: ClassLabels, classes: Sequence[str]) -> list[int]:
    """The labels of one or several classes, each given by its name or its number.

    Text is looked up as a name, in any Unicode form of its letters; it is read as a number only if
    no class name is a number.

    Raises:
        GenerationError: there is no such class (the message lists similar names), or a label is
            neither a name nor a number.
    """
    if isinstance(class_labels, Tensor):
        class_labels = class_labels.flatten().tolist()
    if isinstance(class_labels, str) or not isinstance(class_labels, Iterable):
        class_labels = [class_labels]
    return [_label_id(label, classes) for label in class_labels]


def _label_id(label: int | str, classes: Sequence[str]) -> int:
    if isinstance(label, str):
        if (number := class_number(label, classes)) is not None:
            return number
        if not label.isdecimal() or any(name.isdecimal() for name in classes):
            near = difflib.get_close_matches(label, classes, n=3, cutoff=0.3) or classes[:10]
            raise GenerationError(
                f"no class is named {shown(label)}; known are for example {', '.join(near)}"
            )
        label = int(label)
    number = integer("class label", label)
    if not 0 <= number < len(classes):
        named = f', or "{number}", the name of a class' if str(number) in classes else ""
        raise GenerationError(
            f"class label {number} is out of range: use 0 to {len(classes) - 1}{named}"
        )
    return number


# -- conditions -----------------------------------------------------------------------------------

Prompts = str | Sequence[str]


@dataclass(frozen=True)
class Inputs:
    """What the caller of a pipeline gives, as its arguments; None: not given."""

    class_labels: ClassLabels | None = None
    prompt: Prompts | None = None
    negative_prompt: Prompts | None = None
    prompt_embeds: Tensor | None = None  # (B, T, D), of a text encoder, padded anywhere
    prompt_attention_mask: Tensor | None = None  # (B, T), nonzero at tokens
    num_images: int | None = None
    image: Any = None  # a condition, see image_tasks.py, or to edit, see editing.py
    mask_image: Any = None
    strength: float | None = None
    encoded_image: ImageCondition | None = None  # the image as a condition

    @property
    def edits(self) -> bool:
        """Whether there is an image to edit, or an option of one."""
        return any(value is not None for value in (self.image, self.mask_image, self.strength))

    @property
    def has_condition(self) -> bool:
        """Whether there is a class, a text or a number of images."""
        texts = (self.prompt, self.negative_prompt, self.prompt_embeds, self.prompt_attention_mask)
        return any(value is not None for value in (self.class_labels, *texts, self.num_images))

    @property
    def needs_encoder(self) -> bool:
        """Whether there are texts to encode."""
        return self.prompt is not None or self.negative_prompt is not None

    def check(
        self, kinds: Iterable[str], num_images_per_prompt: int, text: TextConfig | None = None
    ) -> None:
        """Raise `GenerationError` unless these are the arguments of a prior with these kinds of
        condition, and captions such as `text`."""
        kinds = set(kinds)
        features = text is not None and not text.encoder  # of an unknown encoder
        wanted = " and ".join(
            "prompt_embeds" if kind == "text" and features else ARGUMENTS[kind]
            for kind in sorted(kinds)
        )
        given = {
            "class": self.class_labels is not None,
            "text": any(
                value is not None
                for value in (self.prompt, self.prompt_embeds, self.prompt_attention_mask)
            ),
            "none": self.num_images is not None,
        }
        for kind, is_given in given.items():
            # One image if no number is given; no class if only a picture is.
            needed = kind in kinds and kind != "none" and not (kind == "class" and "image" in kinds)
            if (is_given and kind not in kinds) or (needed and not is_given):
                others = [ARGUMENTS[kind] for kind in given if kind not in kinds]
                raise GenerationError(
                    f"this pipeline is {conditional_on(kinds)}: pass "
                    f"{wanted}, and no {' or '.join(others)}"
                )
        if "image" in kinds and self.encoded_image is None:
            raise GenerationError(
                "this pipeline is conditional on pictures: pass image, or use smalti edit"
            )
        if self.negative_prompt is not None and "text" not in kinds:
            raise GenerationError("negative_prompt is for a pipeline of captions: leave it out")
        if (self.prompt is None) == (self.prompt_embeds is None) and "text" in kinds:
            raise GenerationError("pass prompt or prompt_embeds, one of them")
        if kinds == {"none"} and num_images_per_prompt != 1:
            raise GenerationError(
                "num_images_per_prompt is for prompts and classes, and this pipeline is "
                "unconditional: pass num_images"
            )


# How a caller gives a condition of each kind.
ARGUMENTS = {"class": "class_labels", "image": "image", "text": "prompt", "none": "num_images"}


def arguments_for(
    classes: Sequence[str], labels: Sequence[int] | Tensor, prompts: Sequence[str]
) -> dict[str, Any]:
    """The arguments of a pipeline with these classes for images of these labels, and of these
    prompts if it takes prompts; () otherwise. Without classes, labels only tell the number."""
    given: dict[str, Any] = {}
    if classes:
        given["class_labels"] = labels
    if prompts:
        given["prompt"] = list(prompts)
    return given or {"num_images": len(labels)}


def conditional_on(kinds: Iterable[str]) -> str:
    """What a pipeline with these kinds of condition is called."""
    names = sorted(kinds)
    if names == ["none"]:
        return "unconditional"
    return f"{names[0]}-conditional" if len(names) == 1 else f"conditional on {' and '.join(names)}"


@dataclass(frozen=True)
class Conditions:
    """The condition of each image of a call."""

    value: Condition
    negative: Condition | None = None  # what guidance leads away from; None: the null condition
    labels: list[int] = field(default_factory=list)  # of the images; empty without classes
    prompts: list[str] = field(default_factory=list)  # of the images; empty without prompts

    def __len__(self) -> int:
        return count(self.value)


def as_texts(name: str, value: Prompts) -> list[str]:
    """One or several texts.

    Raises:
        GenerationError: one of them is no text.
    """
    texts = [value] if isinstance(value, str) else list(value)
    for text in texts:
        if not isinstance(text, str):
            raise GenerationError(f"{name} has {text!r}, a {type(text).__name__}: give texts")
    return texts


def conditions_of(
    prior: Prior, inputs: Inputs, each: int, classes: Sequence[str], encoder: TextEncoder | None
) -> Conditions:
    """`each` images of every condition, in order.

    A single class or prompt is used with each of several prompts or classes.

    Raises:
        GenerationError: the inputs are not those of the prior, or do not fit together; there is no
            such class; a number is not an integer; there are no images to generate.
        SmaltiError: captions do not fit, see `TextCondition`.
    """
    kinds = prior.condition_kinds
    each = integer("num_images_per_prompt", each)
    inputs.check(kinds, each, prior.config.text)
    if list(kinds) == ["none"]:
        wanted = 1 if inputs.num_images is None else integer("num_images", inputs.num_images)
        _refuse_none(wanted, "num_images >= 1")
        return Conditions(torch.zeros(wanted, dtype=torch.int64))
    values: dict[str, Condition] = {}
    labels: list[int] = []
    if "class" in kinds and inputs.class_labels is not None:
        labels = label_ids(inputs.class_labels, classes)
        values["class"] = torch.tensor(labels, dtype=torch.int64)
    elif "class" in kinds:
        values["class"] = torch.tensor([prior.num_classes])
    prompts: list[str] = []
    if "text" in kinds:
        prompts = [] if inputs.prompt is None else as_texts("prompt", inputs.prompt)
        values["text"] = _captions(prior, inputs, prompts, encoder)
    if "image" in kinds:
        values["image"] = inputs.encoded_image
    rows = max(count(value) for value in values.values())
    _refuse_none(min(rows, each), "at least one class or prompt, num_images_per_prompt >= 1")
    for name, value in values.items():
        if count(value) not in (1, rows):
            raise GenerationError(
                f"{count(value)} of {ARGUMENTS[name]} were given for {rows} images: give one, or "
                "one for each"
            )
        values[name] = repeated(value, rows * each // count(value))
    whole = Combination(values) if len(values) > 1 else next(iter(values.values()))
    return Conditions(
        whole,
        _negative(prior, inputs.negative_prompt, values, each, encoder),
        [label for label in labels for _ in range(rows * each // len(labels))],
        [prompt for prompt in prompts for _ in range(rows * each // len(prompts))],
    )


def _refuse_none(images: int, what: str) -> None:
    if images < 1:
        raise GenerationError(f"no images were requested: pass {what}")


def _captions(
    prior: Prior, inputs: Inputs, prompts: list[str], encoder: TextEncoder | None
) -> TextCondition:
    """The captions of the inputs: (B, T, D)."""
    if inputs.prompt_embeds is not None:
        features, mask = as_tensor(inputs.prompt_embeds), as_tensor(inputs.prompt_attention_mask)
        if mask is None:
            mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        return TextCondition.left_padded(features, mask.bool())
    return _encoded(prior, prompts, encoder)


def _encoded(prior: Prior, prompts: Sequence[str], encoder: TextEncoder | None) -> TextCondition:
    if encoder is None:
        raise GenerationError(
            "this prior was trained on features of an unknown text encoder: pass prompt_embeds, "
            "and no prompt"
        )
    return encoder.encode(prompts, prior.config.text.length)


def _negative(
    prior: Prior, prompt: Prompts | None, values: Mapping[str, Condition], each: int, encoder: Any
) -> Condition | None:
    """What guidance leads away from: the negative prompts, and no class. An empty prompt is the
    null condition."""
    if prompt is None:
        return None
    prompts, rows = as_texts("negative_prompt", prompt), count(values["text"])
    if len(prompts) not in (1, rows // each):
        raise GenerationError(
            f"{len(prompts)} of negative_prompt were given for {rows // each} conditions: give "
            "one, or one for each"
        )
    texts = repeated(_encoded(prior, prompts, encoder), rows // len(prompts))
    is_empty = torch.tensor([not text for text in prompts]).repeat_interleave(rows // len(prompts))
    nulls = {name: prior.condition_kinds[name].null(value) for name, value in values.items()}
    negative: Condition = where(is_empty.to(texts.mask.device), nulls["text"], texts)
    if len(values) == 1:
        return negative
    return Combination({**nulls, "text": negative})


# -- conditions of training ------------------------------------------------------------------------

logger = logging.getLogger(__name__)
FEATURES, MASK = "text_features", "text_mask"  # conditions of a latent cache


class CaptionFeatures:
    """The features of every caption of a data set, as a latent cache holds them for the training of
    a prior: half-precision features (length, D) and a mask (length,) for each caption."""

    def __init__(self, encoder: TextEncoder, length: int) -> None:
        self.encoder, self.length = encoder, length

    @property
    def stored(self) -> tuple[StoredCondition, ...]:
        """What the cache declares; nothing of an encoder that is trained with the prior."""
        if not self.encoder.dim:
            return ()
        made = f"captions/{self.encoder.fingerprint}/{self.length}"
        recipe = hashlib.sha256(made.encode()).hexdigest()
        shape = (self.length, self.encoder.dim)
        return (
            StoredCondition(FEATURES, shape, "float16", "caption", recipe),
            StoredCondition(MASK, shape[:1], "bool", "caption", recipe),
        )

    def __call__(self, batch: ImageBatch, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """A row for every caption of every picture of the batch."""
        del views
        captions = [text for own in batch.captions or () for text in own]
        texts = self.encoder.encode(captions, self.length, batch_size=max(1, len(batch.images)))
        return {FEATURES: texts.features.half(), MASK: texts.mask}

    def are_in(self, info: CacheInfo) -> bool:
        """Whether a cache holds these; if it holds others, the log says so."""
        found = [condition for condition in info.conditions if condition.name in (FEATURES, MASK)]
        if not found or not self.stored:
            return False
        if found == list(self.stored):
            return True
        logger.warning(
            "the latents hold %s of another text encoder or --text.length than %s with %d: its "
            "features are computed in every step",
            found[0].in_words,
            self.encoder.name,
            self.length,
        )
        return False


IMAGE = "image"  # the condition of a latent cache that holds encoded pictures


def stored_image(latents: Latents) -> ImageConfig | None:
    """The encoded pictures that a cache holds beside its latents; None if it holds none."""
    found = next((c for c in latents.info.conditions if c.name == IMAGE), None)
    return None if found is None else ImageConfig(found.shape[0], found.recipe)


class BatchConditions:
    """The conditions of batches of latents, from what the data set has beside them.

    Raises:
        SmaltiError: the prior takes captions, and a data set has none, or one that is too long.
    """

    def __init__(
        self,
        config: PriorConfig,
        encoder: TextEncoder | None,
        latents: Latents,
        heldout: Latents | None = None,
    ) -> None:
        self.kinds, self.text, self.encoder = config.conditions, config.text, encoder
        self.are_stored = False
        if encoder is not None and self.text is not None:
            self.are_stored = CaptionFeatures(encoder, self.text.length).are_in(latents.info)
        if self.text is not None:
            self._check_captions(config.condition, "", latents)
            if heldout is not None:
                self._check_captions(config.condition, "held-out ", heldout)
        if config.image is not None and stored_image(latents) != config.image:
            raise DataError(
                f"condition is {config.condition}, but the latents of {latents.place} have no "
                f"pictures for {config.image.task}: encode with --image_task {config.image.task}"
            )

    def _check_captions(self, condition: str, which: str, latents: Latents) -> None:
        texts = latents.all_captions([0] if self.are_stored else range(len(latents)))
        if texts is None:
            raise DataError(
                f"condition is {condition}, but the {which}pictures of {latents.place} have no "
                "captions: encode pictures that have captions, see smalti check-data"
            )
        if self.encoder is not None and self.text is not None and not self.are_stored:
            self.encoder.check_captions([t for own in texts for t in own], self.text.length)

    def __call__(self, batch: LatentBatch) -> Condition:
        """The condition of each sample; on the CPU, or where the text encoder is."""
        values: dict[str, Condition] = {}
        if "class" in self.kinds:
            values["class"] = batch.labels
        if self.text is not None:
            values["text"] = self._captions(batch)
        if "image" in self.kinds:
            values["image"] = ImageCondition(batch.conditions[IMAGE])
        if not values:
            return torch.zeros_like(batch.labels)
        return Combination(values) if len(values) > 1 else next(iter(values.values()))

    def _captions(self, batch: LatentBatch) -> TextCondition:
        if self.are_stored:
            return TextCondition(batch.conditions[FEATURES], batch.conditions[MASK])
        assert self.encoder is not None and self.text is not None and batch.texts is not None
        return self.encoder.encode(batch.texts, self.text.length, batch_size=len(batch.texts))


# -- options of a prior's `sample` ----------------------------------------------------------------

FILLED_BY_PIPELINE = {"condition", "negative_condition", "generator"}


class UnknownOption(GenerationError, TypeError):
    """A keyword that a prior's `sample` does not take."""


def check_names(prior: Prior, options: Mapping[str, Any]) -> None:
    """Raise `UnknownOption` if `prior.sample` does not have one of these options."""
    known = set(inspect.signature(prior.sample).parameters) - FILLED_BY_PIPELINE
    for name in options:
        if name not in known:
            kind = Prior.registry.name_of(type(prior))
            raise UnknownOption(
                f'a {kind} prior has no sampling option "{name}"; {nearest(name, known)}'
            )


def check_options(prior: Prior, options: Mapping[str, Any]) -> None:
    """Raise `SmaltiError` if `prior.sample` refuses an option; calls it with no conditions."""
    check_names(prior, options)
    prior.sample(prior.no_conditions(), **options)
