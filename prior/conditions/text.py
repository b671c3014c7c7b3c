"""Text as a condition: features of captions, and their embedding as prefix tokens (LlamaGen)."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import GenerationError


def _check_shapes(features: Tensor, mask: Tensor) -> None:
    is_ids = features.ndim == 2 and features.dtype == torch.int64
    if not is_ids and (features.ndim != 3 or not features.dtype.is_floating_point):
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

    def __post_init__(self) -> None:
        mask = self.mask
        _check_shapes(self.features, mask)
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
        index = order if features.ndim == 2 else order[..., None]
        return cls(features.take_along_dim(index, 1), mask.gather(1, order))

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(self.features[rows], self.mask[rows])

    def repeat(self, each: int) -> Self:
        """Every caption `each` times, copies next to each other: (B * each, T, D)."""
        features, mask = (t.repeat_interleave(each, 0) for t in (self.features, self.mask))
        return type(self)(features, mask)

    def to(self, device: torch.device | str) -> Self:
        """The same captions on another device."""
        return type(self)(self.features.to(device), self.mask.to(device))

    def attention_mask(self, start: int, stop: int) -> Tensor:
        """The causal mask of the tokens start to stop of a sequence that begins with the caption,
        (B, 1, stop - start, stop) bool, True where a token may attend to another.

        Each attends to itself and to earlier ones, but not to padding. (Padding attends to itself,
        so that no softmax is empty.)
        """
        keys = torch.arange(stop, device=self.mask.device)
        queries = keys[start:, None]
        # No token after the caption is padding.
        tokens = F.pad(self.mask, (0, max(0, stop - self.mask.shape[1])), value=True)[:, :stop]
        return ((keys < queries) & tokens[:, None, None]) | (keys == queries)


Condition = Tensor | TextCondition  # class labels (B,), or captions


class CaptionProjection(nn.Module):
    """fc2(gelu(fc1 x)), with the tanh approximation of GELU and no biases."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:  # (B, T, dim) -> (B, T, width)
        hidden = self.fc1(features.to(self.fc1.weight.dtype))
        return self.fc2(F.gelu(hidden, approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Projects features of captions to prefix tokens; has learned features for "no text".

    Module names are LlamaGen's. (Its features for "no text" are a buffer that was never trained.)
    """

    def __init__(self, length: int, dim: int, width: int) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(dim, width)
        self.uncond_embedding = nn.Parameter(torch.randn(length, dim) / dim**0.5)

    def forward(self, condition: TextCondition) -> Tensor:  # (B, T, width)
        # Padding may contain any value. A NaN would spread: in attention 0 * NaN is NaN.
        features = condition.features.masked_fill(~condition.mask[..., None], 0)
        return self.cap_proj(features)

    def null(self, condition: TextCondition) -> TextCondition:
        """The condition "no text", with the padding of these captions."""
        features = self.uncond_embedding.expand(len(condition), -1, -1)
        return TextCondition(features, condition.mask)

    def drop(self, condition: TextCondition, probability: float) -> TextCondition:
        """Replace each caption by "no text" with a probability (2207.12598)."""
        dropped = torch.rand(len(condition), 1, 1, device=condition.features.device) < probability
        features = torch.where(dropped, self.uncond_embedding, condition.features)
        return TextCondition(features, condition.mask)

    def check(self, condition: object) -> None:
        """Raise `GenerationError` unless these are captions of the right length and width."""
        if not isinstance(condition, TextCondition):
            raise GenerationError(
                f"this prior takes text, not a {type(condition).__name__}: give a TextCondition"
            )
        if condition.features.shape[1:] != self.uncond_embedding.shape:
            expected = ", ".join(map(str, self.uncond_embedding.shape))
            raise GenerationError(
                f"text features have shape {tuple(condition.features.shape)}; "
                f"this prior takes (B, {expected})"
            )
