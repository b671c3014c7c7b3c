"""The interface of priors (stage two), and what priors over codes share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.config import added
from smalti.data.latents import CodeSpec, LatentSpec, as_tensor
from smalti.errors import ConfigurationError, GenerationError
from smalti.hub import Registry
from smalti.prior.conditions.base import (
    Combination,
    Condition,
    ConditionKind,
    VectorKind,
    count,
    part_of,
)
from smalti.prior.conditions.image import ImageConfig
from smalti.prior.conditions.registry import CONDITIONS
from smalti.prior.conditions.text import TextConfig
from smalti.prior.layers import arrange_for_few_rows
from smalti.prior.packing import Packable, share_packed_weights
from smalti.prior.registry import PRIORS
from smalti.prior.sampling import OnStep
from smalti.prior.weight_only import Quantizable, share_quantized_layers
from smalti.randomness import Generators, RandomInputs


@dataclass
class Loss:
    """What a prior minimises."""

    total: Tensor  # scalar
    parts: dict[str, Tensor] = field(default_factory=dict)  # detached scalars for the log


@dataclass(frozen=True)
class PriorConfig:
    """The configuration of a prior: a frozen dataclass with a `kind`, the prior's registered name.

    Every subclass has `spec`, `num_classes` and `tokenizer_fingerprint`, as fields or properties.
    """

    registry: ClassVar[Registry] = PRIORS
    # Fields that may change without changing what saved weights compute.
    NON_ARCHITECTURE_FIELDS: ClassVar[tuple[str, ...]] = ()
    # Fields that `fitted` takes from the latents: help texts do not offer them.
    FROM_LATENTS: ClassVar[tuple[str, ...]] = (
        "spec",
        "num_classes",
        "tokenizer_fingerprint",
        "text_encoder_fingerprint",
        "image_channels",
        "image_task",
    )
    # Fields that `conditioned` sets, and the flags of train-prior for them.
    SET_BY_FLAGS: ClassVar[Mapping[str, str]] = {
        "condition": "--condition",
        "text_length": "--text.length",
        "text_dim": "--text.dim",
        "text_encoder": "--text.encoder",
    }
    # Kinds of condition that priors of this class take, beside none, and whether they also take
    # every `VectorKind`.
    CONDITIONS: ClassVar[tuple[str, ...]] = ("class",)
    TAKES_VECTORS: ClassVar[bool] = False

    condition: str = added("class")  # kinds joined by "+", such as class+text; or none
    text_length: int = added(64)  # tokens of a caption, padded
    text_dim: int = added(256)  # channels of the features of a caption token
    text_encoder: str = added("")  # what makes the features, see `TextConfig`
    text_encoder_fingerprint: str = added("")  # sha256 of a frozen text encoder
    image_channels: int = added(0)  # of the latents of pictures; 0: they are no condition
    image_task: str = added("")  # see `ImageConfig`

    @property
    def conditions(self) -> tuple[str, ...]:
        """The kinds of condition; () for an unconditional prior."""
        return () if self.condition == "none" else tuple(self.condition.split("+"))

    @property
    def known_conditions(self) -> tuple[str, ...]:
        """The kinds of condition that priors of this class take, beside none."""
        kinds = {name: CONDITIONS.resolve(name) for name in CONDITIONS}
        vectors = (name for name, kind in kinds.items() if issubclass(kind, VectorKind))
        return (*self.CONDITIONS, *(vectors if self.TAKES_VECTORS else ()))

    @property
    def text(self) -> TextConfig | None:
        """The captions that the prior takes, if it takes any."""
        if "text" not in self.conditions:
            return None
        return TextConfig(
            self.text_length, self.text_dim, self.text_encoder, self.text_encoder_fingerprint
        )

    @property
    def image(self) -> ImageConfig | None:
        """The pictures that the prior takes, if it takes any."""
        return ImageConfig(self.image_channels, self.image_task) if self.image_channels else None

    def check_conditions(self, num_classes: int) -> None:
        """Raise `ConfigurationError` if conditions are unknown, or the number of classes or the
        size of captions does not fit them."""
        known = self.known_conditions
        for name in self.conditions:
            if name not in known or self.conditions.count(name) > 1:
                raise ConfigurationError(
                    f'condition is "{self.condition}"; a {getattr(self, "kind", "")} prior takes '
                    f"none, {', '.join(known)}, or several of them joined by +"
                )
        for name in CONDITIONS:
            CONDITIONS.resolve(name).check_config(self, name in self.conditions, num_classes)

    def classes_of(self, num_classes: int) -> int:
        """The number of classes of a prior of latents with `num_classes` classes."""
        return num_classes if "class" in self.conditions else 0

    def conditioned(
        self, condition: str, text: TextConfig | None = None, image: ImageConfig | None = None
    ) -> Self:
        """This configuration with other conditions. `fitted` sets the number of classes.

        Args:
            text: the captions, if text is among the conditions; None keeps what is set.
            image: the pictures, if image is among the conditions; None keeps what is set.

        Raises:
            ConfigurationError: the prior does not take these conditions.
        """
        changes: dict[str, Any] = {"condition": condition}
        kinds = condition.split("+")
        if "image" not in kinds:
            image = ImageConfig(0)
        for part in filter(None, (text, image)):
            changes |= part.fields
        classes = max(1, getattr(self, "num_classes", 0)) if "class" in kinds else 0
        found = replace(self, **changes, **self._with_classes(classes))
        found.check_conditions(classes)
        return found

    def _with_classes(self, num_classes: int) -> dict[str, Any]:
        """The fields that hold the number of classes, with this number."""
        return {"num_classes": num_classes}

    def fitted(
        self,
        spec: LatentSpec,
        num_classes: int,
        tokenizer_fingerprint: str | None,
        quantizer: object = None,
    ) -> Self:
        """This configuration, with the same size of network, for other latents.

        Args:
            num_classes: of the latents; see `classes_of`.
            quantizer: the configuration of the tokenizer's quantizer, if it has one.

        Raises:
            ConfigurationError: the prior does not model such latents.
        """
        raise NotImplementedError

    def bucketed(self, grids: Sequence[tuple[int, int]]) -> Self:
        """This configuration for latents on several grids (h, w), those of aspect-ratio buckets;
        none: for those of `spec` alone.

        Raises:
            ConfigurationError: the prior models latents on one grid.
        """
        if grids:
            raise ConfigurationError(
                f"a {getattr(self, 'kind', '')} prior models a fixed number of latents, and these "
                f"are on {len(grids)} grids: train a flow prior, as in --prior.preset flow-nano, "
                "or give the latents of one bucket"
            )
        return self


class Prior(nn.Module, Quantizable, Packable, ABC):
    """A distribution over the latents described by `spec`, given a condition.

    A condition is class labels (B,) int64 in [0, num_classes], where `num_classes` itself is the
    null label; or another value of prior/conditions/, as `config.condition` says. Without classes
    labels are zeros. `forward` is the training objective, so that DDP, FSDP and compile wrap the
    object itself. The keyword options of `sample`, with their types, defaults and the help texts of
    its docstring, are the flags of the commands that sample.
    """

    registry: ClassVar[Registry] = PRIORS
    PRESETS: ClassVar[Mapping[str, Any]] = {}  # configurations by name, for --prior.preset
    class_table: str = ""  # name of the weight whose rows are the classes, the null last
    row_options: ClassVar[tuple[str, ...]] = ()  # options of `sample` with a row for each sample
    # Options of `sample` that belong to given latents: `smalti edit` has them, other commands not.
    editing_options: ClassVar[tuple[str, ...]] = ("known", "known_mask", "strength")
    no_weight_decay: ClassVar[tuple[str, ...]] = ()  # names of layers' weights without weight decay
    config: Any

    @classmethod
    @abstractmethod
    def supports(cls, spec: LatentSpec) -> bool:
        """Whether priors of this class model latents like these."""

    @property
    def spec(self) -> LatentSpec:
        """The specification of the latents that this prior models."""
        return self.config.spec

    @property
    def num_classes(self) -> int:
        """Number of classes, without the null label."""
        return self.config.num_classes

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """The fingerprint of the tokenizer whose latents this prior models; None if unknown."""
        return self.config.tokenizer_fingerprint

    @abstractmethod
    def forward(
        self, latents: Tensor, condition: Any, random_inputs: RandomInputs | None = None
    ) -> Loss:
        """The training objective; drops conditions at random in training mode.

        Args:
            random_inputs: rows of what `sample_random_inputs` returned, one for each sample; None
                samples the random numbers from torch's global generators.
        """

    @abstractmethod
    def sample(
        self,
        condition: Any,
        *,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Sample latents for every condition (B,). Each prior adds keyword options of its own.

        `generator` may be a list with one generator per sample: sample i then depends on its own
        generator only. guidance_scale s means uncond + s (cond - uncond); 1 is off. `on_step` is
        called after each step; a prior that samples in one step need not have it.
        """

    def estimated(self, latents: Tensor) -> Tensor:
        """The best guess of the finished sample from the latents of an `OnStep`, inside it."""
        return latents

    def arrange_for_sampling(self) -> None:
        """Store weights as sampling reads them fastest, as a pipeline does; values stay."""
        if self.has_few_rows:
            arrange_for_few_rows(self)

    @property
    def positions_per_step(self) -> int:
        """Latent positions that a sample has in one pass of the network, on average: one code, the
        codes of a scale, or all numbers of a map."""
        spec = self.spec
        if not isinstance(spec, CodeSpec):
            return spec.height * spec.width
        return max(1, spec.length // len(spec.grids)) if len(spec.grids) > 1 else 1

    def sample_random_inputs(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random numbers of a training pass by name, a row for each of `count` samples: the
        `random_inputs` of `forward`. Empty if `forward` takes them from torch's generators."""
        del count, generator
        return {}

    def bind(self, quantizer: nn.Module | None) -> None:
        """Before training, copy the weights of the tokenizer's quantizer that the prior uses; most
        priors use none. `quantizer` is None if the tokenizer has none."""
        del quantizer

    def adapt_positions(self, weights: dict[str, Tensor], source: Any) -> str:
        """Fit what depends on positions to the latents of this prior: called when fine-tuning
        starts from the weights of `source`, a prior for latents of other grids.

        Args:
            weights: of `source`; entries are replaced in place.

        Returns:
            What happens to the positions, for the log.
        """
        del weights, source
        return "its weights are taken as they are"

    @property
    def positions_are_computed(self) -> bool:
        """Whether these weights can sample latents on other grids, because none of them belongs to
        a position."""
        return False

    def resized(self, spec: LatentSpec, tokenizer_fingerprint: str | None) -> Self:
        """A prior with the same weights, not a copy, for latents on another grid.

        How good its samples are there is for the user to see: positions that were never trained are
        extrapolated.

        Args:
            tokenizer_fingerprint: of the tokenizer at the size of these latents.

        Raises:
            GenerationError: its positions are learned.
        """
        if not self.positions_are_computed:
            kind = self.registry.name_of(type(self))
            raise GenerationError(
                f"this {kind} prior samples {self.spec.in_words} only, because it has learned its "
                f"positions: fine-tune it for {spec.in_words} with train-prior --initial"
            )
        quantizer = getattr(self.config, "quantizer", None)
        config = self.config.fitted(spec, self.num_classes, tokenizer_fingerprint, quantizer)
        config = config.bucketed(getattr(self.config, "buckets", ()))
        with torch.random.fork_rng(devices=[]):
            prior = type(self)(config)
        share_quantized_layers(self, prior)
        prior.load_state_dict(self.state_dict(), assign=True)
        share_packed_weights(self, prior)
        return prior.to(next(self.parameters()).device).train(self.training)

    def adapt_conditions(self, weights: dict[str, Tensor], source: Any) -> str:
        """Fit what depends on the kinds of condition: called when fine-tuning starts from the
        weights of `source`, a prior with other kinds.

        Args:
            weights: of `source`; entries are added, replaced and removed in place.

        Returns:
            What happens to them, for the log.
        """
        ours = self.state_dict()
        if source.class_table in weights and self.class_table in ours:  # may have another name
            weights[self.class_table] = weights.pop(source.class_table)
        for name in weights.keys() - ours.keys():
            del weights[name]
        for name in ours.keys() - weights.keys():
            weights[name] = ours[name]
        return "what only one of them has is left out, or newly initialised"

    def set_progress(self, progress: float) -> None:
        """Set the share of the training that is done: called before every training step.

        It is not saved: it is a function of the step alone, so a resumed run sets it again. A prior
        whose objective changes during training overrides this.

        Raises:
            ConfigurationError: progress is outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ConfigurationError(
                f"progress is {progress}; it is a share of the training, 0 to 1"
            )

    def bits_per_dimension(
        self, latents: Tensor, condition: Any, *, generator: Generators = None
    ) -> Tensor:
        """-log2 p(latents | condition) per code, or per element of continuous latents, (B,).

        A prior need not have a likelihood: see `has_likelihood`.

        Raises:
            GenerationError: this prior has no likelihood.
        """
        raise GenerationError(
            f"a {self.registry.name_of(type(self))} prior has no likelihood: leave out "
            "bits per dimension"
        )

    @property
    def has_likelihood(self) -> bool:
        """Whether this prior implements `bits_per_dimension`."""
        return type(self).bits_per_dimension is not Prior.bits_per_dimension

    # -- the condition --------------------------------------------------------------------------

    @property
    def condition_kinds(self) -> dict[str, ConditionKind]:
        """What this prior knows about each kind of its condition, by name."""
        names = self.config.conditions or ("none",)
        return {name: CONDITIONS.resolve(name).of(self, name) for name in names}

    def class_rows(self, condition: Condition) -> Tensor:
        """The row of the class table for each condition, (B,): that of its class, or the only one.

        Args:
            condition: as `check_condition` takes it.
        """
        names = self.config.conditions
        if "class" in names or not names:
            return part_of(condition, "class")
        device = next(self.parameters()).device
        return torch.zeros(count(condition), dtype=torch.int64, device=device)

    @property
    def class_table_has_null(self) -> bool:
        """Whether the null label has an embedding.

        Published weights that were trained without class dropout have none. A converted prior has
        label_dropout 0 then, and zeros in the last row of its class table.
        """
        if getattr(self.config, "label_dropout", None) != 0:
            return True
        table = dict(self.named_parameters()).get(self.class_table)
        return table is None or bool(table[-1].any())

    def check_condition(self, condition: Condition, samples: int | None = None) -> None:
        """Raise `GenerationError` unless a condition has the kinds and sizes of the config.

        Args:
            samples: the number of conditions that is needed; None: any.
        """
        kinds = self.condition_kinds
        given = set(condition.parts) if isinstance(condition, Combination) else set()
        if (len(kinds) > 1 or given) and given != set(kinds):
            raise GenerationError(
                f"this prior is conditional on {' and '.join(kinds)}: give a Combination of these "
                f"for every sample, not {' and '.join(sorted(given)) or type(condition).__name__}"
            )
        for name, kind in kinds.items():
            kind.check(part_of(condition, name))
        if samples is not None and count(condition) != samples:
            raise GenerationError(
                f"{count(condition)} conditions were given for {samples} samples: give one each"
            )

    def check_labels(self, labels: Tensor) -> None:
        """`check_condition` of class labels (B,)."""
        self.check_condition(labels)

    def null(self, condition: Condition) -> Condition:
        """The null condition for as many samples; captions keep their padding, and an image stays:
        it has no null."""
        return self._changed(condition, lambda kind, part: kind.null(part))

    def unconditional(self, condition: Condition, negative: Condition | None) -> Condition:
        """What guidance leads away from: the negative condition, or the null condition.

        Raises:
            GenerationError: the negative condition does not fit the prior, or is not one for each
                sample.
        """
        if negative is None:
            return self.null(condition)
        self.check_condition(negative, count(condition))
        return negative

    def drop(
        self, condition: Condition, probability: float, uniforms: Tensor | None = None
    ) -> Condition:
        """In training, replace each condition by the null condition with a probability
        (classifier-free guidance, Ho and Salimans, 2207.12598).

        Args:
            uniforms: random numbers in [0, 1), one per sample: a condition is dropped, of all kinds
                at once, if its number is below the probability. None samples them from torch's
                global generator.
        """
        if not (self.training and probability):
            return condition
        if uniforms is None:
            device = next(self.parameters()).device
            uniforms = torch.rand(count(condition), device=device)
        which = uniforms < probability
        return self._changed(condition, lambda kind, part: kind.dropped(part, which))

    def drop_labels(
        self, labels: Tensor, probability: float, uniforms: Tensor | None = None
    ) -> Tensor:
        """`drop` of class labels (B,)."""
        return self.drop(labels, probability, uniforms)

    def _changed(
        self, condition: Condition, change: Callable[[ConditionKind, Condition], Condition]
    ) -> Condition:
        kinds = self.condition_kinds
        if isinstance(condition, Combination):
            return Combination({n: change(kinds[n], p) for n, p in condition.parts.items()})
        return change(next(iter(kinds.values())), condition)

    def no_conditions(self) -> Condition:
        """An empty batch of conditions: for example labels (0,)."""
        device = next(self.parameters()).device
        parts = {name: kind.empty(device) for name, kind in self.condition_kinds.items()}
        return Combination(parts) if len(parts) > 1 else next(iter(parts.values()))

    @property
    def has_null_class(self) -> bool:
        """Whether there is a null condition, against which to guide."""
        return any(kind.has_null for kind in self.condition_kinds.values())

    def check_guidance(self, guidance_scale: float) -> None:
        """Raise `GenerationError` if guidance is on and there is nothing to guide."""
        if guidance_scale == 1 or self.has_null_class:
            return
        reasons = [kind.WITHOUT_NULL for kind in self.condition_kinds.values() if kind.WITHOUT_NULL]
        nothing = f"has condition {self.config.condition}: there is nothing to guide"
        why = next(iter(reasons), nothing)
        raise GenerationError(
            f"guidance_scale is {guidance_scale}, but this prior {why}: set guidance_scale to 1"
        )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode inside the block; afterwards every module returns to its previous mode."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def check_codes(codes: Tensor, spec: CodeSpec) -> None:
    """Raise `GenerationError` unless codes are (B, L) int64 in [0, vocab_size)."""
    if codes.ndim != 2 or codes.shape[1] != spec.length or codes.dtype != torch.int64:
        raise GenerationError(
            f"codes have shape {tuple(codes.shape)} and type {codes.dtype}; "
            f"this prior takes (B, {spec.length}) int64"
        )
    if torch.compiler.is_compiling():  # a branch on values would break the graph
        return
    if codes.numel() and (codes.min() < 0 or codes.max() >= spec.vocab_size):
        raise GenerationError(
            f"codes lie in [{codes.min().item()}, {codes.max().item()}]; "
            f"the codes of this prior are 0 to {spec.vocab_size - 1}"
        )


@dataclass(frozen=True)
class KnownCodes:
    """Codes of given images, some of which sampling keeps: zero-shot in-painting."""

    codes: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) bool, True where a code is kept

    @classmethod
    def checked(
        cls,
        codes: Tensor | None,
        mask: Tensor | None,
        rows: int,
        spec: CodeSpec,
        device: torch.device,
    ) -> Self | None:
        """The options `known` and `known_mask` of a call of `sample` for `rows` samples, on the
        device of the model; None if neither is given.

        Raises:
            GenerationError: one is missing, or has the wrong shape, type or values.
        """
        codes, mask = as_tensor(codes), as_tensor(mask)
        if codes is None and mask is None:
            return None
        if codes is None or mask is None:
            given, missing = ("known", "known_mask") if mask is None else ("known_mask", "known")
            raise GenerationError(
                f"{given} was given without {missing}: give the codes, and which of them to keep"
            )
        check_codes(codes, spec)
        if mask.dtype != torch.bool or mask.shape != codes.shape or len(codes) != rows:
            raise GenerationError(
                f"known has shape {tuple(codes.shape)}, known_mask {tuple(mask.shape)} and type "
                f"{mask.dtype}; for {rows} samples give ({rows}, {spec.length}) int64 and bool"
            )
        return cls(codes.to(device), mask.to(device))


class CodePrior(Prior):
    """A distribution over codes that gives the probability of each."""

    has_few_rows: ClassVar[bool] = True

    @abstractmethod
    def logits(self, codes: Tensor, condition: Any) -> Tensor:
        """Teacher-forced logits (B, L, V) of codes (B, L) given a condition."""

    @torch.no_grad()
    def bits_per_dimension(
        self, latents: Tensor, condition: Any, *, generator: object = None
    ) -> Tensor:
        """-log2 p(codes | condition) per code, (B,), exact: no generator is needed."""
        del generator
        latents = as_tensor(latents)
        with self.evaluating():
            logits = self.logits(latents, condition).float()
        nats = F.cross_entropy(logits.transpose(1, 2), latents, reduction="none")  # (B, L)
        return nats.mean(1) / math.log(2)
