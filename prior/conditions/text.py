"""Captions as a condition: features of their tokens, and their embedding.

A text encoder (text_encoder.py) turns captions into features (B, T, D), or, where the encoder is
trained with the prior, into ids of bytes (B, T). `CaptionEmbedding` projects the features to tokens
of the prior's width: the prefix of a next-token prior (LlamaGen, 2406.06525), and what the
cross-attention of the other priors attends to (`TextAttention`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from smalti.config import check_at_least
from smalti.errors import GenerationError
from smalti.prior.attention import attend
from smalti.prior.conditions.base import (
    Combination,
    Condition,
    ConditionKind,
    moved,
    part_of,
    repeated,
    rows,
)
from smalti.prior.conditions.byte_encoder import BYTES, ByteEncoder


@dataclass(frozen=True)
class TextConfig:
    """The captions that a prior takes."""

    length: int  # T, tokens of a caption, padded
    dim: int  # D, channels of the features of a token
    encoder: str = ""  # "bytes": trained with the prior; a transformers model; "": any features
    encoder_fingerprint: str = ""  # of a transformers model, see `FrozenTextEncoder`

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a `PriorConfig`."""
        return {
            "text_length": self.length,
            "text_dim": self.dim,
            "text_encoder": self.encoder,
            "text_encoder_fingerprint": self.encoder_fingerprint,
        }


def _check_shapes(features: Tensor, mask: Tensor) -> None:
    ids = features.ndim == 2 and features.dtype == torch.int64
    if not ids and (features.ndim != 3 or not features.dtype.is_floating_point):
        raise GenerationError(
            f"text features have shape {tuple(features.shape)} and type {features.dtype}; "
            "give (B, T, D) of a floating-point type, or ids of bytes (B, T) int64"
        )
    if mask.shape != features.shape[:2] or mask.dtype != torch.bool:
        raise GenerationError(
            f"the mask has shape {tuple(mask.shape)} and type {mask.dtype}; "
            f"give {tuple(features.shape[:2])} bool, True at tokens"
        )


@dataclass(frozen=True, eq=False)
class TextCondition:
    """Features of captions from a text encoder, padded on the left to one length.

    Raises:
        GenerationError: the shapes or types differ from those below; a caption has no token, or its
            padding is not on the left.
    """

    # (B, T, D) floating point, or ids of bytes (B, T) int64; values at padding have no influence
    features: Tensor
    mask: Tensor  # (B, T) bool, True at tokens
    # (B,) bool, True where the condition is "no text" instead; None: nowhere
    is_null: Tensor | None = None

    def __post_init__(self) -> None:
        mask = self.mask
        _check_shapes(self.features, mask)
        if self.is_null is None:
            nowhere = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
            object.__setattr__(self, "is_null", nowhere)
        if torch.compiler.is_compiling():  # a branch on values would break the graph
            return
        if not mask.any(1).all():
            raise GenerationError(
                "a caption has no token: give at least the end token, also for an empty text"
            )
        if (mask[:, :-1] & ~mask[:, 1:]).any():
            raise GenerationError(
                "a caption is not padded on the left: use TextCondition.left_padded"
            )

    @classmethod
    def left_padded(cls, features: Tensor, mask: Tensor) -> Self:
        """From features (B, T, D) or ids (B, T), and a mask (B, T) bool with padding anywhere; the
        order of the tokens stays.

        Raises:
            GenerationError: the shapes or types differ from those above; a caption has no token.
        """
        _check_shapes(features, mask)
        order = mask.int().argsort(dim=1, stable=True)  # padding first
        places = order if features.ndim == 2 else order[..., None]
        return cls(features.take_along_dim(places, 1), mask.gather(1, order))

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, chosen: slice | Tensor) -> Self:
        return rows(self, chosen)

    def repeat(self, each: int) -> Self:
        """Every caption `each` times, copies next to each other: (B * each, T, D)."""
        return repeated(self, each)

    def to(self, device: torch.device | str) -> Self:
        """The same captions on another device."""
        return moved(self, device)


def without_common_padding(condition: Condition) -> Condition:
    """The condition, captions alone or with others, without the first columns that are padding in
    every row, in steps of 8 columns, so that few lengths occur.

    Padding is never attended to, and in training a batch need not have the length of the longest
    caption of all.
    """
    text = part_of(condition, "text")
    used = int(text.mask.any(0).sum())
    kept = min(-(-used // 8) * 8, text.mask.shape[1])
    shorter = TextCondition(text.features[:, -kept:], text.mask[:, -kept:], text.is_null)
    if isinstance(condition, Combination):
        return Combination({**condition.parts, "text": shorter})
    return shorter


def causal_mask(masks: Tensor, start: int, stop: int) -> Tensor:
    """The causal mask of the tokens start to stop of a sequence that begins with captions of masks
    (B, T), (B, 1, stop - start, stop) bool, True where a token may attend to another.

    Each attends to itself and to earlier ones, but not to padding. (Padding attends to itself, so
    that no softmax is empty.)
    """
    keys = torch.arange(stop, device=masks.device)
    queries = keys[start:, None]
    # No token after the caption is padding.
    tokens = F.pad(masks, (0, max(0, stop - masks.shape[1])), value=True)[:, :stop]
    return ((keys < queries) & tokens[:, None, None]) | (keys == queries)


@dataclass(frozen=True)
class Embedded:
    """An embedded condition of B samples."""

    # (B, width): the class, and in priors with text a function of the mean of the caption's tokens
    vector: Tensor
    tokens: Tensor | None = None  # (B, T, width) of the caption
    mask: Tensor | None = None  # (B, T) bool, True at tokens

    def first(self, samples: int) -> "Embedded":
        """Those of the first samples."""
        if self.tokens is None or self.mask is None:
            return Embedded(self.vector[:samples])
        return Embedded(self.vector[:samples], self.tokens[:samples], self.mask[:samples])


class CaptionProjection(nn.Module):
    """fc2(gelu(fc1 x)), with the tanh approximation of GELU and no biases."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:  # (B, T, dim) -> (B, T, width)
        hidden = self.fc1(features.to(self.fc1.weight.dtype))
        return self.fc2(F.gelu(hidden, approximate="tanh"))


class CaptionEmbedding(nn.Module, ConditionKind):
    """Projects features of captions to tokens; has learned features for "no text".

    Module names are LlamaGen's. (Its features for "no text" are a buffer that was never trained.)

    Args:
        has_null: whether captions are dropped in training. If not, the features for "no text" are
            zeros, as long as no other weights are loaded.
    """

    WITHOUT_NULL: ClassVar[str] = (
        "was trained without dropping captions (label_dropout 0) and has no null to guide against"
    )

    def __init__(self, config: TextConfig, width: int, has_null: bool = True) -> None:
        super().__init__()
        self.config = config
        self.encoder = ByteEncoder(config.dim) if config.encoder == BYTES else None
        self.cap_proj = CaptionProjection(config.dim, width)
        self.uncond_embedding = nn.Parameter(
            torch.randn(config.length, config.dim) / config.dim**0.5
        )
        self.is_dropped = has_null
        if not has_null:
            nn.init.zeros_(self.uncond_embedding)

    @classmethod
    def of(cls, prior: Any, name: str) -> Self:
        """The module of the prior."""
        del name
        return prior.captions

    @classmethod
    def of_config(cls, config: Any, width: int) -> Self | None:
        """That of a new prior with this `PriorConfig`; None if it takes no captions."""
        return None if config.text is None else cls(config.text, width, config.label_dropout > 0)

    @classmethod
    def check_config(cls, config: Any, used: bool, num_classes: int) -> None:
        """Raise `ConfigurationError` unless captions have tokens and channels."""
        del used, num_classes
        check_at_least(1, config, "text_length", "text_dim")

    @property
    def has_null(self) -> bool:
        """Whether there are features for "no text": trained here, or loaded."""
        return self.is_dropped or bool(self.uncond_embedding.any())

    def forward(self, value: TextCondition) -> Tensor:  # (B, T, width)
        features = value.features
        if self.encoder is not None:
            features = self.encoder(features, value.mask)
        assert value.is_null is not None
        no_text = self.uncond_embedding[-features.shape[1] :]  # the last columns are never padding
        features = torch.where(value.is_null[:, None, None], no_text, features)
        # Padding may contain any value. A NaN would spread: in attention 0 * NaN is NaN.
        return self.cap_proj(features.masked_fill(~value.mask[..., None], 0))

    def embedded(self, value: TextCondition) -> Embedded:
        """Captions as tokens and as their mean without padding."""
        tokens = self(value)
        weights = value.mask[..., None].to(tokens.dtype)
        return Embedded((tokens * weights).sum(1) / weights.sum(1), tokens, value.mask)

    def check(self, value: Condition) -> None:
        """Raise `GenerationError` unless these are captions of the right length and width."""
        if not isinstance(value, TextCondition):
            raise GenerationError(
                f"this prior takes text, not a {type(value).__name__}: give a TextCondition"
            )
        expected: Sequence[int] = self.uncond_embedding.shape
        if self.encoder is not None:
            expected = expected[:1]
        if tuple(value.features.shape[1:]) != tuple(expected):
            raise GenerationError(
                f"text features have shape {tuple(value.features.shape)}; "
                f"this prior takes (B, {', '.join(map(str, expected))})"
            )

    def empty(self, device: torch.device) -> TextCondition:
        shape = (0, self.config.length)
        mask = torch.empty(shape, dtype=torch.bool, device=device)
        if self.encoder is not None:
            return TextCondition(mask.long(), mask)
        return TextCondition(mask.float()[..., None].expand(*shape, self.config.dim), mask)

    def null(self, value: TextCondition) -> TextCondition:
        """The condition "no text", with the padding of these captions."""
        everywhere = torch.ones(len(value), dtype=torch.bool, device=value.mask.device)
        return TextCondition(value.features, value.mask, everywhere)

    def dropped(self, value: TextCondition, which: Tensor) -> TextCondition:
        """The captions, with "no text" in the rows where `which` (B,) bool is True."""
        assert value.is_null is not None
        return TextCondition(value.features, value.mask, value.is_null | which)


KeysValues = tuple[Tensor, Tensor]  # each (B, heads, T, head_dim)


class TextAttention(nn.Module):
    """Cross-attention of a block's tokens to the tokens of a caption, after its self-attention
    (PixArt-alpha, 2310.00426, section 2.3; for next-scale prediction Infinity, 2412.04431).

    Its output layer starts at zero: a model without text, continued with text, is unchanged at
    first.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def reset_output(self) -> None:
        """Set the output layer to zero."""
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """Keys and values of the tokens of captions (B, T, width)."""
        key, value = rearrange(
            self.kv_linear(tokens), "b t (k h d) -> k b h t d", k=2, h=self.num_heads
        )
        return key, value

    def forward(self, x: Tensor, condition: Embedded, known: KeysValues | None = None) -> Tensor:
        """Tokens x (B, N, width) and embedded captions -> like x.

        Args:
            known: `keys_values` of the captions; None: they are computed.
        """
        assert condition.tokens is not None and condition.mask is not None
        query = rearrange(self.q_linear(x), "b n (h d) -> b h n d", h=self.num_heads)
        key, value = self.keys_values(condition.tokens) if known is None else known
        # (B, 1, N, T); every caption has a token, so that no softmax is empty
        allowed = condition.mask[:, None, None].expand(-1, 1, x.shape[1], -1)
        attended = attend(query, key, value, mask=allowed)
        return self.proj(rearrange(attended, "b h n d -> b n (h d)"))
