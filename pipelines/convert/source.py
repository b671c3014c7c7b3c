"""What every source of published weights promises: one code base, one kind of model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from smalti.errors import SmaltiError
from smalti.hub import Registry
from smalti.pipelines.convert.layout import Layout
from smalti.pipelines.convert.reader import WRAPPERS, Checkpoint
from smalti.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Options:
    """What the shapes of tensors cannot tell; None stands for the published default."""

    heads: int | None = None  # attention heads of a prior
    # Sides of the code grids, coarse to fine; one number for a single grid.
    scales: tuple[int, ...] | None = None
    image_size: int | None = None  # pixels per side of a tokenizer
    scaling_factor: float | None = None  # of continuous latents: they are multiplied by it
    tokenizer: Tokenizer | None = None  # that a prior belongs to

    def __post_init__(self) -> None:
        for name, value in (("heads", self.heads), ("image_size", self.image_size)):
            if value is not None and value < 1:
                raise SmaltiError(f"{name} is {value}; it must be at least 1")
        if self.scales is not None and (not self.scales or min(self.scales) < 1):
            raise SmaltiError(f"scales is {self.scales}; give at least one side, each 1 or more")
        if self.scaling_factor is not None and self.scaling_factor <= 0:
            raise SmaltiError(f"scaling_factor is {self.scaling_factor}; it must be positive")

    @property
    def given(self) -> set[str]:
        """Names of the options that were set."""
        return {f.name for f in fields(self) if getattr(self, f.name) is not None}


@dataclass(frozen=True)
class Inferred:
    """What a checkpoint says about its model."""

    config: Any  # of our model
    facts: Mapping[str, object] = field(default_factory=dict)  # read from the tensors, to print
    assumed: Mapping[str, object] = field(default_factory=dict)  # options or published defaults


class Source(ABC):
    """Published weights of one kind: how they are recognised, measured and laid out.

    A source keeps no state. `infer` looks at shapes, `layout` follows from our config alone, so
    that it serves import and export alike.
    """

    title: ClassVar[str]  # "LlamaGen tokenizer", for messages
    registry: ClassVar[Registry]  # TOKENIZERS or PRIORS: builds the model from the config
    options: ClassVar[frozenset[str]]  # names in `Options` that it takes
    wrappers: ClassVar[tuple[str, ...]] = WRAPPERS  # keys under which its state dict may lie
    # What `prepare` puts before the names of tensors of other models in the same file.
    aside: ClassVar[str] = ""
    # Of a file that original code reads: the key around the state dict, empty for none.
    export_wrapper: ClassVar[str] = ""

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with older spellings of its names made current."""
        return checkpoint

    @abstractmethod
    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Whether the names of the tensors look like this source, though some may be missing."""

    @abstractmethod
    def infer(self, checkpoint: Checkpoint, options: Options) -> Inferred:
        """The config of our model.

        Raises:
            SmaltiError: a tensor that tells a size is missing, or the sizes are impossible.
        """

    def stated(self, config: Any) -> Mapping[str, object]:
        """What config.json beside the tensors says if it is theirs: their sizes, once more."""
        del config
        return {}

    @abstractmethod
    def layout(self, config: Any) -> Layout:
        """Where every tensor of theirs belongs in the model that `config` describes."""

    def own_tensors(self, config: Any, options: Options) -> dict[str, Tensor]:
        """Values of the tensors of ours that theirs does not have (`Layout.own`)."""
        del config, options
        return {}

    def fits(self, config: Any) -> bool:
        """Whether a model of this config can be written in this layout."""
        del config
        return False

    def flags(self, config: Any) -> dict[str, object]:
        """The options that are needed to read an exported file again, beside the defaults."""
        del config
        return {}

    def remarks(self, config: Any) -> list[str]:
        """What those should know who give an exported file to its code base, one line each."""
        del config
        return []

    def export_config(self, config: Any) -> dict[str, Any] | None:
        """The config.json of a Diffusers folder; None for code bases that keep a file alone."""
        del config
        return None
