"""Stage two: what every prior promises."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.data.latents import CodeSpec, LatentSpec
from smalti.errors import SmaltiError
from smalti.hub import Pretrained, Registry
from smalti.prior.registry import PRIORS

# -------------------------------------------------------------------------------------------------
# Stage two: what every prior promises.


@dataclass
class Loss:
    """What a prior minimises."""

    total: Tensor  # scalar
    parts: dict[str, Tensor] = field(default_factory=dict)  # detached scalars for the log


class Prior(nn.Module, Pretrained, ABC):
    """A distribution over the latents described by `spec`, given a condition.

    A condition is class labels (B,) int64 in [0, num_classes]; `num_classes` itself is the null
    label: no condition. (A next-token prior may take a `TextCondition` instead, and has no classes
    then.) `forward` is the training objective, so that DDP, FSDP and compile wrap the object
    itself.
    """

    registry: ClassVar[Registry] = PRIORS
    class_table: ClassVar[str]  # name of the weight whose rows are the classes, the last one null
    no_weight_decay: ClassVar[
        tuple[str, ...]
    ] = ()  # weights of layers that weight decay must spare
    config: Any

    @property
    def spec(self) -> LatentSpec:
        """The latents that are modelled."""
        return self.config.spec

    @property
    def num_classes(self) -> int:
        """Number of classes, without the null label."""
        return self.config.num_classes

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Of the tokenizer whose latents were learned; None if unknown."""
        return self.config.tokenizer_fingerprint

    @abstractmethod
    def forward(self, latents: Tensor, condition: Any) -> Loss:
        """The training objective; drops labels at random in training mode."""

    @abstractmethod
    def sample(
        self,
        condition: Any,
        *,
        guidance_scale: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Draw latents for every condition (B,). Each prior adds keyword options of its own.

        `generator` may be a list with one generator per sample: sample i then depends on its own
        generator only. guidance_scale s means uncond + s (cond - uncond); 1 is off.
        """

    def sample_random_inputs(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random numbers for a training pass over `count` samples, a row for each, which `forward`
        takes as `drawn`; most priors draw within."""
        del count, generator
        return {}

    def no_conditions(self) -> Any:
        """The condition of no samples at all: labels (0,)."""
        return torch.empty(0, dtype=torch.int64, device=next(self.parameters()).device)

    def bind(self, quantizer: nn.Module | None) -> None:
        """Take what the prior needs of the quantizer of the tokenizer whose latents it models, if
        that has one: once, before training. Most need nothing."""
        del quantizer

    def set_progress(self, progress: float) -> None:
        """Tell the prior the share of the training that is done, before every training step.

        It is no part of the state: a function of the step alone, which a resumed run gives again.
        A prior whose objective changes as training goes on overrides this; others need no call.

        Raises:
            SmaltiError: it does not lie in [0, 1].
        """
        if not 0 <= progress <= 1:
            raise SmaltiError(f"progress is {progress}; it is a share of the training, 0 to 1")

    @abstractmethod
    def bits_per_dimension(
        self,
        latents: Tensor,
        condition: Any,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """-log2 p(latents | condition) per code, or per number of continuous latents, (B,)."""

    def check_labels(self, labels: Tensor) -> None:
        """Raise `SmaltiError` unless labels are (B,) integers in [0, num_classes]."""
        if not isinstance(labels, Tensor):
            raise SmaltiError(f"labels are a {type(labels).__name__}; give a tensor (B,) int64")
        if labels.ndim != 1 or labels.dtype not in (torch.int64, torch.int32):
            raise SmaltiError(
                f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; give (B,) int64"
            )
        if torch.compiler.is_compiling():  # a branch on values would break the graph
            return
        if labels.numel() and (labels.min() < 0 or labels.max() > self.num_classes):
            wrong = labels.min().item() if labels.min() < 0 else labels.max().item()
            raise SmaltiError(
                f"class label {wrong} is out of range: use 0 to {self.num_classes - 1}, "
                f"or {self.num_classes} for no class"
            )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode inside the block; afterwards every module is in the mode it was in."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def drop_labels(
        self, labels: Tensor, probability: float, chance: Tensor | None = None
    ) -> Tensor:
        """In training, replace each label by the null label with a probability
        (classifier-free guidance, Ho and Salimans, 2207.12598).

        Args:
            chance: numbers in [0, 1) like labels that decide it; None draws them.
        """
        if not (self.training and probability):
            return labels
        if chance is None:
            chance = torch.rand(labels.shape, device=labels.device)
        return torch.where(chance < probability, self.num_classes, labels)


def check_codes(codes: Tensor, spec: CodeSpec) -> None:
    """Raise `SmaltiError` unless codes are (B, L) int64 in [0, vocab_size)."""
    if codes.ndim != 2 or codes.shape[1] != spec.length or codes.dtype != torch.int64:
        raise SmaltiError(
            f"codes have shape {tuple(codes.shape)} and type {codes.dtype}; "
            f"this prior takes (B, {spec.length}) int64"
        )
    if torch.compiler.is_compiling():  # a branch on values would break the graph
        return
    if codes.numel() and (codes.min() < 0 or codes.max() >= spec.vocab_size):
        raise SmaltiError(
            f"codes lie in [{codes.min().item()}, {codes.max().item()}]; "
            f"this prior knows 0 to {spec.vocab_size - 1}"
        )


# -------------------------------------------------------------------------------------------------
# What priors over discrete codes share.


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
        with self.evaluating():
            logits = self.logits(latents, condition).float()
        nats = F.cross_entropy(logits.transpose(1, 2), latents, reduction="none")  # (B, L)
        return nats.mean(1) / math.log(2)
