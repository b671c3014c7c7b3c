"""The interface of priors (stage two), and what priors over codes share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.data.latents import CodeSpec, LatentSpec, as_tensor
from smalti.errors import ConfigurationError, GenerationError
from smalti.hub import Pretrained, Registry
from smalti.prior.registry import PRIORS
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
    FROM_LATENTS: ClassVar[tuple[str, ...]] = ("spec", "num_classes", "tokenizer_fingerprint")
    # Fields that no command can work with, unless they have their defaults.
    PYTHON_ONLY: ClassVar[tuple[str, ...]] = ()

    def fitted(
        self,
        spec: LatentSpec,
        num_classes: int,
        tokenizer_fingerprint: str | None,
        quantizer: object = None,
    ) -> Self:
        """This configuration, with the same size of network, for other latents.

        Args:
            quantizer: the configuration of the tokenizer's quantizer, if it has one.

        Raises:
            ConfigurationError: the prior does not model such latents.
        """
        raise NotImplementedError


class Prior(nn.Module, Pretrained, ABC):
    """A distribution over the latents described by `spec`, given a condition.

    A condition is class labels (B,) int64 in [0, num_classes]; `num_classes` itself is the null
    label: no condition. (A next-token prior may take a `TextCondition` instead, and has no classes
    then.) `forward` is the training objective, so that DDP, FSDP and compile wrap the object
    itself. The keyword options of `sample`, with their types, defaults and the help texts of its
    docstring, are the flags of the commands that sample.
    """

    registry: ClassVar[Registry] = PRIORS
    PRESETS: ClassVar[Mapping[str, Any]] = {}  # configurations by name, for --prior.preset
    class_table: ClassVar[str] = ""  # name of the weight whose rows are the classes, the null last
    row_options: ClassVar[tuple[str, ...]] = ()  # options of `sample` with a row for each sample
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
    ) -> Tensor:
        """Sample latents for every condition (B,). Each prior adds keyword options of its own.

        `generator` may be a list with one generator per sample: sample i then depends on its own
        generator only. guidance_scale s means uncond + s (cond - uncond); 1 is off.
        """

    @property
    def in_full_precision(self) -> bool:
        """Whether the weights are fp32 or better. In half precision a sample also depends on the
        other samples of its batch, by rounding."""
        return all(p.dtype not in (torch.bfloat16, torch.float16) for p in self.parameters())

    def sample_random_inputs(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random numbers for a training pass over `count` samples by name, a row for each sample:
        the `random_inputs` of `forward`. Empty if `forward` takes them from torch's generators."""
        del count, generator
        return {}

    def no_conditions(self) -> Any:
        """An empty batch of conditions: labels (0,)."""
        return torch.empty(0, dtype=torch.int64, device=next(self.parameters()).device)

    def bind(self, quantizer: nn.Module | None) -> None:
        """Copy the weights of the tokenizer's quantizer that the prior uses; most priors use none.

        Called once, before training; `quantizer` is None if the tokenizer has none.
        """
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
        with torch.random.fork_rng(devices=[]):
            prior = type(self)(config)
        prior.load_state_dict(self.state_dict(), assign=True)
        return prior.to(next(self.parameters()).device).train(self.training)

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
        self,
        latents: Tensor,
        condition: Any,
        *,
        generator: Generators = None,
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

    def check_labels(self, labels: Tensor) -> None:
        """Raise `GenerationError` unless labels are (B,) integers in [0, num_classes]."""
        if not isinstance(labels, Tensor):
            raise GenerationError(f"labels are a {type(labels).__name__}; give a tensor (B,) int64")
        if labels.ndim != 1 or labels.dtype not in (torch.int64, torch.int32):
            raise GenerationError(
                f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; give (B,) int64"
            )
        if torch.compiler.is_compiling():  # a branch on values would break the graph
            return
        if not labels.numel():
            return
        lowest, highest = int(labels.min()), int(labels.max())
        null = self.num_classes
        if lowest < 0 or highest > null or (highest == null and not self.has_null_class):
            wrong = lowest if lowest < 0 else highest
            no_class = f", or {null} for no class" if self.has_null_class else ""
            raise GenerationError(
                f"class label {wrong} is out of range: use 0 to {null - 1}{no_class}"
            )

    @property
    def has_null_class(self) -> bool:
        """Whether the null label has an embedding.

        Published weights that were trained without class dropout have none. A converted prior has
        label_dropout 0 then, and zeros in the last row of its class table.
        """
        if getattr(self.config, "label_dropout", None) != 0:
            return True
        table = dict(self.named_parameters()).get(self.class_table)
        return table is None or bool(table[-1].any())

    def check_guidance(self, guidance_scale: float) -> None:
        """Raise `GenerationError` if guidance is on and this prior has no null class."""
        if guidance_scale != 1 and not self.has_null_class:
            raise GenerationError(
                f"guidance_scale is {guidance_scale}, but this prior was trained without class "
                "dropout and has no null class to guide against: set guidance_scale to 1"
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

    def drop_labels(
        self, labels: Tensor, probability: float, uniforms: Tensor | None = None
    ) -> Tensor:
        """In training, replace each label by the null label with a probability
        (classifier-free guidance, Ho and Salimans, 2207.12598).

        Args:
            uniforms: random numbers in [0, 1), one per label: a label is dropped if its number is
                below the probability. None samples them from torch's global generator.
        """
        if not (self.training and probability):
            return labels
        if uniforms is None:
            uniforms = torch.rand(labels.shape, device=labels.device)
        return torch.where(uniforms < probability, self.num_classes, labels)


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


class CodePrior(Prior):
    """A distribution over codes that gives the probability of each."""

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
