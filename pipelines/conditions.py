"""The conditions of a pipeline: one protocol for all kinds, from a data set to a call.

ConditionSource    where the conditions of one kind come from; one file for each kind
CONDITION_SOURCES  the registered ones
Inputs             what a caller gives: classes, prompts, pictures, or a number of images
Conditions         the same as a prior takes it, a row for each image
BatchConditions    the conditions of training batches
check_options      whether a prior's `sample` takes these options, before any work is done
"""

import inspect
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from smalti.config import nearest
from smalti.data.dataset import ImageBatch
from smalti.data.latent_cache.cache import LatentBatch
from smalti.data.latent_cache.manifest import StoredCondition
from smalti.data.latent_cache.on_the_fly import Latents
from smalti.data.order import Key
from smalti.errors import DataError, GenerationError, SmaltiError
from smalti.hub import Registry
from smalti.prior.base import Prior, PriorConfig
from smalti.prior.conditions.base import (
    Combination,
    Condition,
    ConditionKind,
    count,
    repeated,
)
from smalti.prior.conditions.image import ImageCondition
from smalti.prior.conditions.registry import CONDITIONS
from smalti.prior.conditions.text_encoder import TextEncoder
from smalti.tokenizer.base import Tokenizer


class Sources(Registry):
    """The registered sources. The kind of a class that is added here is known to priors, too."""

    def register(self, name: str, target: "type[ConditionSource]") -> None:  # type: ignore[override]
        """Add the source of a new kind, and the kind itself."""
        super().register(name, target)
        CONDITIONS.register(name, target.Kind)

    @property
    def classes(self) -> dict[str, "type[ConditionSource]"]:
        """All of them by name."""
        return {name: self.resolve(name) for name in self}


CONDITION_SOURCES = Sources(
    "condition",
    {
        "class": "smalti.pipelines.class_labels:ClassSource",
        "image": "smalti.pipelines.image_tasks:ImageTaskSource",
        "text": "smalti.pipelines.captions:TextSource",
        "none": "smalti.pipelines.class_labels:Unconditional",
    },
)

# -- what a latent cache holds --------------------------------------------------------------------


class ConditionEncoder(ABC):
    """Makes what a latent cache holds beside latents, labels and captions."""

    @property
    def versions(self) -> int:
        """How often each view of a training picture is stored, with other random choices."""
        return 1

    @property
    @abstractmethod
    def stored(self) -> Sequence[StoredCondition]:
        """What it makes."""

    @abstractmethod
    def __call__(self, batch: ImageBatch, views: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """By name, the rows of some samples, as `EncodedRange.conditions` takes them.

        Args:
            views: of the images, (B, C, H, W) each, on the device of the tokenizer.
        """


class PictureEncoder(ConditionEncoder):
    """Makes conditions of the pictures themselves, a row for each view. Without a cache they are
    made of the pictures of each training step."""

    @abstractmethod
    def of_images(self, images: Tensor, keys: Sequence[Key]) -> Mapping[str, Tensor]:
        """By name, the rows (B, ...) of images (B, C, H, W) in [-1, 1].

        Args:
            keys: (epoch, index) of each sample, of which random choices are a pure function.
        """

    def __call__(self, batch: ImageBatch, views: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Rows (B, views, ...). The random choices of view k are those of epoch k."""
        indices = batch.indices.tolist()
        made = [self.of_images(v, [(k, index) for index in indices]) for k, v in enumerate(views)]
        return {name: torch.stack([rows[name] for rows in made], 1) for name in made[0]}


# -- the protocol ---------------------------------------------------------------------------------


class ConditionSource(ABC):
    """Where the conditions of one kind come from: from a data set, from the arguments of a call of
    a pipeline, or from the flags of a command. An object is the source of one prior.

    Args:
        config: of the prior.
        classes: the names of its classes.
        encoder: what encodes its captions; None if that is unknown, or not needed.
    """

    Kind: ClassVar[type[ConditionKind]]  # what priors know about it
    # The arguments of a call of a pipeline. The first one takes a row for each image.
    ARGUMENTS: ClassVar[tuple[str, ...]]
    EXCLUSIVE: ClassVar[bool] = True  # whether a prior without this kind refuses the arguments
    STORED: ClassVar[tuple[str, ...]] = ()  # what `of_batch` reads beside the latents
    FLAGS: ClassVar[tuple[str, ...]] = ()  # of `smalti generate`
    # The help text of the flag, if there is one that `smalti generate` does not declare itself; it
    # takes several texts.
    FLAG_HELP: ClassVar[str] = ""
    # Whether the rows of a grid of samples are named; if not, they show samples of a data set.
    HAS_NAMES: ClassVar[bool] = False
    HUB_TASK: ClassVar[str] = ""  # the name of the task on the Hub

    def __init__(
        self,
        config: PriorConfig,
        classes: Sequence[str] = (),
        encoder: TextEncoder | None = None,
    ) -> None:
        self.config: Any = config  # every subclass of `PriorConfig` has more fields
        self.classes, self.encoder = classes, encoder

    # From a data set. `options` are those of smalti encode or train-prior.

    @classmethod
    def check_options(cls, options: Any, used: bool) -> None:
        """Raise `ConfigurationError` if options of this kind are missing, or given and not used."""
        del options, used

    @classmethod
    def picture_encoder(cls, options: Any, tokenizer: Tokenizer) -> PictureEncoder | None:
        """What makes the conditions of pictures, if they are among the options."""
        del options, tokenizer
        return None

    @classmethod
    def cache_encoder(cls, options: Any, tokenizer: Tokenizer) -> ConditionEncoder | None:
        """What makes the conditions that a latent cache holds, if it holds any."""
        return cls.picture_encoder(options, tokenizer)

    @classmethod
    def prior_options(cls, options: Any, latents: Latents, condition: str) -> Any:
        """What `PriorConfig.conditioned` takes for this kind; None: nothing, or what is set.

        Args:
            condition: all kinds of the new prior.

        Raises:
            SmaltiError: the latents do not have what this kind needs.
        """
        del options, latents, condition
        return None

    def check_latents(self, latents: Latents, heldout: Latents | None) -> None:
        """Raise `SmaltiError` unless `of_batch` can take the batches of a training run."""
        del heldout
        found = {condition.name for condition in latents.info.conditions}
        if not found.issuperset(self.STORED):
            raise DataError(
                f"condition is {self.config.condition}, but the latents of {latents.place} have no "
                f"{' and '.join(self.STORED)} beside them: encode with --condition "
                f"{self.config.condition}"
            )

    @abstractmethod
    def of_batch(self, batch: LatentBatch) -> Condition:
        """The condition of each sample; on the CPU, or where the text encoder is."""

    # From a call.

    @classmethod
    def is_given(cls, inputs: "Inputs") -> bool:
        """Whether one of the arguments is given."""
        return any(inputs.get(argument) is not None for argument in cls.ARGUMENTS)

    @classmethod
    def check_unused(cls, inputs: "Inputs") -> None:
        """Raise `GenerationError` if an argument needs this kind, which the prior does not have."""
        del inputs

    @property
    def argument(self) -> str:
        """The argument that a caller should pass."""
        return self.ARGUMENTS[0]

    def is_needed(self, kinds: Iterable[str]) -> bool:
        """Whether a call must give it, for a prior of these kinds."""
        del kinds
        return True

    def check(self, inputs: "Inputs", each: int) -> None:
        """Raise `GenerationError` if the arguments do not fit each other.

        Args:
            each: `num_images_per_prompt`.
        """
        del inputs, each

    @abstractmethod
    def of_call(self, inputs: "Inputs") -> Condition:
        """The conditions of a call, one for each that is given.

        Raises:
            SmaltiError: they do not fit the prior.
        """

    def rows(self, inputs: "Inputs") -> list[Any]:
        """What is recorded of each condition of a call, as JSON has it; [] for nothing."""
        del inputs
        return []

    def negative(
        self, inputs: "Inputs", value: Condition, kind: ConditionKind, each: int
    ) -> Condition | None:
        """What guidance leads away from instead of the null condition, for the conditions `value`
        of all images, `each` of one kind next to each other."""
        del inputs, value, kind, each
        return None

    # From a command, and in words.

    def chosen(self, options: Any) -> list[Any]:
        """The conditions that the flags of `smalti generate` give, as rows of the first argument;
        [] if it has none of its own.

        Raises:
            SmaltiError: there are none, or they are not those of the prior.
        """
        texts = [text for flag in self.FLAGS for text in getattr(options, flag)]
        if self.FLAGS and not texts:
            raise GenerationError(
                f"{options.model} makes pictures of {self.ARGUMENTS[0]}: give --{self.FLAGS[0]}"
            )
        try:
            return [self.read(text) for text in texts]
        except SmaltiError:
            raise
        except ValueError as error:
            raise GenerationError(
                f"--{self.FLAGS[0]} is {' '.join(texts)} ({error}): give {self.FLAG_HELP}"
            ) from error

    def read(self, text: str) -> Any:
        """The row of the first argument that a flag gives, as JSON has it.

        Raises:
            ValueError: it is none.
        """
        return text

    def shown(self, value: Condition, tokenizer: Tokenizer) -> Tensor | None:
        """Images (B, C, H, W) in [-1, 1] of conditions, for a grid of samples; None: there are
        none."""
        del value, tokenizer
        return None

    @property
    def example(self) -> str:
        """The argument in the call that a model card shows."""
        return f"{self.ARGUMENTS[0]}=..."

    @property
    def in_words(self) -> str:
        """What a model card says about it, in whole sentences; "": nothing."""
        return ""


def sources_of(
    kinds: Iterable[str],
    config: PriorConfig,
    classes: Sequence[str] = (),
    encoder: TextEncoder | None = None,
) -> dict[str, ConditionSource]:
    """The sources of kinds of condition of a prior, by name."""
    return {kind: CONDITION_SOURCES.resolve(kind)(config, classes, encoder) for kind in kinds}


def combined(values: Mapping[str, Condition]) -> Condition:
    """Conditions by kind as one."""
    return Combination(values) if len(values) > 1 else next(iter(values.values()))


# -- a call ---------------------------------------------------------------------------------------

ClassLabels = int | str | Sequence[int | str] | Tensor
Prompts = str | Sequence[str]


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
    others: Mapping[str, Any] = field(default_factory=dict)  # arguments of other kinds
    encoded_image: ImageCondition | None = None  # the image as a condition

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From the arguments of a call, also those of other kinds."""
        known = {part.name for part in fields(cls)}
        others = {name: value for name, value in arguments.items() if name not in known}
        return cls(**{k: v for k, v in arguments.items() if k in known}, others=others)

    def get(self, argument: str) -> Any:
        """An argument by name; None: not given."""
        return getattr(self, argument, self.others.get(argument))

    @property
    def edits(self) -> bool:
        """Whether there is an image to edit, or an option of one."""
        return any(value is not None for value in (self.image, self.mask_image, self.strength))

    @property
    def has_condition(self) -> bool:
        """Whether there is a class, a text, another condition, or a number of images."""
        texts = (self.prompt, self.negative_prompt, self.prompt_embeds, self.prompt_attention_mask)
        given = (self.class_labels, *texts, self.num_images, *self.others.values())
        return any(value is not None for value in given)

    @property
    def needs_encoder(self) -> bool:
        """Whether there are texts to encode."""
        return self.prompt is not None or self.negative_prompt is not None

    def check(self, sources: Mapping[str, ConditionSource], num_images_per_prompt: int) -> None:
        """Raise `GenerationError` unless these are the arguments of a prior with these sources."""
        registered = CONDITION_SOURCES.classes
        known = {name: source for name, source in registered.items() if source.EXCLUSIVE}
        for name, source in known.items():
            needed = name in sources and sources[name].is_needed(sources)
            given = source.is_given(self)
            if (given and name not in sources) or (needed and not given):
                wanted = " and ".join(sources[kind].argument for kind in sorted(sources))
                unused = {n for kind in known.keys() - sources for n in known[kind].ARGUMENTS}
                others = sorted(name for name in unused if self.get(name) is not None)
                raise GenerationError(
                    f"this pipeline is {conditional_on(sources)}: pass {wanted}"
                    + (f", and no {' or '.join(others)}" if others else ""),
                    argument=others[0] if others else sources[name].argument,
                )
        for name, source in registered.items():
            if name in sources:
                sources[name].check(self, num_images_per_prompt)
            else:
                source.check_unused(self)


def arguments_for(
    classes: Sequence[str],
    labels: Sequence[int] | Tensor,
    prompts: Sequence[str],
    **others: Any,
) -> dict[str, Any]:
    """The arguments of a pipeline with these classes for images of these labels, and of these
    prompts if it takes prompts; () otherwise. Without classes, labels only tell the number.

    Args:
        others: arguments of other kinds of condition, with a row for each image.
    """
    given = dict(others)
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


def conditions_of(
    prior: Prior, inputs: Inputs, each: int, classes: Sequence[str], encoder: TextEncoder | None
) -> Conditions:
    """`each` images of every condition, in order.

    A single condition of one kind is used with each of several of another kind.

    Raises:
        GenerationError: the inputs are not those of the prior, or do not fit together; there is no
            such class; a number is not an integer; there are no images to generate.
        SmaltiError: captions do not fit, see `TextCondition`.
    """
    kinds = prior.condition_kinds
    sources = sources_of(kinds, prior.config, classes, encoder)
    each = integer("num_images_per_prompt", each)
    inputs.check(sources, each)
    values = {name: source.of_call(inputs) for name, source in sources.items()}
    rows = max(count(value) for value in values.values())
    refuse_none(min(rows, each), "at least one class or prompt, num_images_per_prompt >= 1")
    for name, value in values.items():
        if count(value) not in (1, rows):
            raise GenerationError(
                f"{count(value)} of {sources[name].ARGUMENTS[0]} were given for {rows} images: "
                "give one, or one for each"
            )
        values[name] = repeated(value, rows * each // count(value))
    negatives = {
        name: source.negative(inputs, values[name], kinds[name], each)
        for name, source in sources.items()
    }
    negatives = {name: value for name, value in negatives.items() if value is not None}
    nulls = {name: kinds[name].null(value) for name, value in values.items() if negatives}
    recorded = {source.ARGUMENTS[0]: source.rows(inputs) for source in sources.values()}
    labels, prompts = (
        [row for row in given for _ in range(rows * each // len(given))]
        for given in (recorded.get("class_labels", []), recorded.get("prompt", []))
    )
    return Conditions(
        combined(values), combined({**nulls, **negatives}) if negatives else None, labels, prompts
    )


def refuse_none(images: int, what: str) -> None:
    """Raise `GenerationError` if no images are requested."""
    if images < 1:
        raise GenerationError(f"no images were requested: pass {what}")


# -- conditions of training -----------------------------------------------------------------------


class BatchConditions:
    """The conditions of batches of latents, from what the data set has beside them.

    Raises:
        SmaltiError: the data set does not have them, or they do not fit the prior.
    """

    def __init__(
        self,
        config: PriorConfig,
        encoder: TextEncoder | None,
        latents: Latents,
        heldout: Latents | None = None,
    ) -> None:
        kinds = config.conditions or ("none",)
        self.sources = sources_of(kinds, config, latents.classes, encoder)
        for source in self.sources.values():
            source.check_latents(latents, heldout)

    def __call__(self, batch: LatentBatch) -> Condition:
        """The condition of each sample; on the CPU, or where the text encoder is."""
        return combined({name: source.of_batch(batch) for name, source in self.sources.items()})


# -- options of a prior's `sample` ----------------------------------------------------------------

FILLED_BY_PIPELINE = {"condition", "negative_condition", "generator"}


class UnknownOption(GenerationError, TypeError):
    """A keyword that a prior's `sample` does not take."""


def check_names(prior: Prior, options: Mapping[str, Any]) -> None:
    """Raise `UnknownOption` if `prior.sample` does not have one of these options."""
    known = set(inspect.signature(prior.sample).parameters) - FILLED_BY_PIPELINE
    likely = known - {"on_step", *prior.editing_options}  # what a command has as flags
    for name in options:
        if name not in known:
            kind = Prior.registry.name_of(type(prior))
            raise UnknownOption(
                f'a {kind} prior has no sampling option "{name}"; {nearest(name, likely)}',
                argument=name,
            )


def separated(prior: Prior, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords of a call of a pipeline that `Inputs` has no field for: the arguments of the
    conditions, and the options of the prior's `sample`.

    Raises:
        UnknownOption: one of them is neither.
    """
    kinds = prior.condition_kinds
    own = {name for kind in kinds for name in CONDITION_SOURCES.resolve(kind).ARGUMENTS}
    others = {name: value for name, value in options.items() if name in own}
    options = {name: value for name, value in options.items() if name not in own}
    check_names(prior, options)
    return others, options


def check_options(prior: Prior, options: Mapping[str, Any]) -> None:
    """Raise `SmaltiError` if `prior.sample` refuses an option; calls it with no conditions."""
    check_names(prior, options)
    try:
        prior.sample(prior.no_conditions(), **options)
    except SmaltiError as error:
        error.argument = _wrong_option(prior, options)
        raise


def _wrong_option(prior: Prior, options: Mapping[str, Any]) -> str | None:
    """The option without which `prior.sample` takes the others, or which it refuses alone."""

    def refuses(some: Mapping[str, Any]) -> bool:
        try:
            prior.sample(prior.no_conditions(), **some)
        except SmaltiError:
            return True
        return False

    without = {name: {k: v for k, v in options.items() if k != name} for name in options}
    return next(
        (name for name in options if not refuses(without[name])),
        next((name for name in options if refuses({name: options[name]})), None),
    )
