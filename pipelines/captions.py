"""Captions as the condition of a pipeline: prompts, or features of a text encoder.

TextSource       captions of a data set, prompts of a call
CaptionFeatures  what a latent cache holds of captions for a frozen text encoder
"""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from smalti.data.dataset import ImageBatch
from smalti.data.latent_cache.cache import LatentBatch
from smalti.data.latent_cache.manifest import CacheInfo, StoredCondition
from smalti.data.latent_cache.on_the_fly import Latents
from smalti.data.latents import as_tensor
from smalti.errors import DataError, GenerationError
from smalti.pipelines.conditions import ConditionEncoder, ConditionSource, Inputs, Prompts
from smalti.prior.conditions.base import Condition, ConditionKind, count, repeated, where
from smalti.prior.conditions.byte_encoder import BYTES
from smalti.prior.conditions.text import CaptionEmbedding, TextCondition, TextConfig
from smalti.prior.conditions.text_encoder import TextEncoder, text_encoder_of
from smalti.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)
FEATURES, MASK = "text_features", "text_mask"  # conditions of a latent cache


class CaptionFeatures(ConditionEncoder):
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


class TextSource(ConditionSource):
    """The captions of a data set; `prompt` of a call, or the features that encode it."""

    Kind: ClassVar[type[ConditionKind]] = CaptionEmbedding
    ARGUMENTS: ClassVar[tuple[str, ...]] = ("prompt", "prompt_embeds", "prompt_attention_mask")
    FLAGS: ClassVar[tuple[str, ...]] = ("prompts", "prompt", "negative_prompt")
    HAS_NAMES: ClassVar[bool] = True
    HUB_TASK: ClassVar[str] = "text-to-image"
    are_stored = False  # whether the latents have the features beside them

    @property
    def text(self) -> TextConfig:
        """The captions that the prior takes."""
        assert self.config.text is not None
        return self.config.text

    # -- from a data set

    @classmethod
    def check_options(cls, options: Any, used: bool) -> None:
        """Raise `ConfigurationError` if options of captions are given and captions not used."""
        options.text.refuse_unless(used)

    @classmethod
    def cache_encoder(cls, options: Any, tokenizer: Tokenizer) -> CaptionFeatures | None:
        """The features of a frozen encoder.

        Raises:
            SmaltiError: it cannot be loaded; the pictures have no captions, or one is too long.
        """
        if "text" not in options.condition.split("+"):
            return None
        sources, text = options.sources(), options.text
        for source in sources:
            source.require_captions()
        encoder = text_encoder_of(text.encoder).to(tokenizer.last_layer.device)
        captions = [text for s in sources for i in range(len(s)) for text in s.captions(i)]
        encoder.check_captions(captions, text.length)
        return CaptionFeatures(encoder, text.length) if encoder.dim else None

    @classmethod
    def prior_options(cls, options: Any, latents: Latents, condition: str) -> TextConfig | None:
        """The encoder and the size of captions; what --initial has, if no condition is given."""
        del latents, condition
        if options.initial and not options.condition:
            return None
        text, encoder = options.text, text_encoder_of(options.text.encoder)
        dim = encoder.dim or text.dim
        return TextConfig(text.length, dim, text.encoder, encoder.fingerprint)

    def check_latents(self, latents: Latents, heldout: Latents | None) -> None:
        """Raise `SmaltiError` if pictures have no captions, or one that is too long; note whether
        the features are stored."""
        if self.encoder is not None:
            features = CaptionFeatures(self.encoder, self.text.length)
            self.are_stored = features.are_in(latents.info)
        self._check_captions("", latents)
        if heldout is not None:
            self._check_captions("held-out ", heldout)

    def _check_captions(self, which: str, latents: Latents) -> None:
        texts = latents.all_captions([0] if self.are_stored else range(len(latents)))
        if texts is None:
            raise DataError(
                f"condition is {self.config.condition}, but the {which}pictures of {latents.place} "
                "have no captions: give pictures that have some, see smalti check-data"
            )
        if self.encoder is not None and not self.are_stored:
            self.encoder.check_captions([t for own in texts for t in own], self.text.length)

    def of_batch(self, batch: LatentBatch) -> TextCondition:
        if self.are_stored:
            return TextCondition(batch.conditions[FEATURES], batch.conditions[MASK])
        assert self.encoder is not None and batch.texts is not None
        return self.encoder.encode(batch.texts, self.text.length, batch_size=len(batch.texts))

    # -- from a call

    @classmethod
    def check_unused(cls, inputs: Inputs) -> None:
        """Raise `GenerationError` if there is a negative prompt."""
        if inputs.negative_prompt is not None:
            raise GenerationError(
                "negative_prompt is for a pipeline of captions: leave it out",
                argument="negative_prompt",
            )

    @property
    def argument(self) -> str:
        """`prompt_embeds` if the encoder is unknown."""
        return "prompt" if self.text.encoder else "prompt_embeds"

    def check(self, inputs: Inputs, each: int) -> None:
        """Raise `GenerationError` unless there are either prompts or features."""
        del each
        if (inputs.prompt is None) == (inputs.prompt_embeds is None):
            raise GenerationError("pass prompt or prompt_embeds, one of them")

    def of_call(self, inputs: Inputs) -> TextCondition:
        if inputs.prompt_embeds is None:
            return self._encoded(self.rows(inputs))
        features, mask = as_tensor(inputs.prompt_embeds), as_tensor(inputs.prompt_attention_mask)
        if mask is None:
            mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        return TextCondition.left_padded(features, mask.bool())

    def rows(self, inputs: Inputs) -> list[str]:
        return [] if inputs.prompt is None else as_texts("prompt", inputs.prompt)

    def _encoded(self, prompts: Sequence[str]) -> TextCondition:
        if self.encoder is None:
            raise GenerationError(
                "this prior was trained on features of an unknown text encoder: pass "
                "prompt_embeds, and no prompt"
            )
        return self.encoder.encode(prompts, self.text.length)

    def negative(
        self, inputs: Inputs, value: Condition, kind: ConditionKind, each: int
    ) -> TextCondition | None:
        """The negative prompts; an empty one is the null condition."""
        if inputs.negative_prompt is None:
            return None
        prompts, rows = as_texts("negative_prompt", inputs.negative_prompt), count(value)
        if len(prompts) not in (1, rows // each):
            raise GenerationError(
                f"{len(prompts)} of negative_prompt were given for {rows // each} conditions: give "
                "one, or one for each"
            )
        texts = repeated(self._encoded(prompts), rows // len(prompts))
        is_empty = torch.tensor([not t for t in prompts]).repeat_interleave(rows // len(prompts))
        return where(is_empty.to(texts.mask.device), kind.null(value), texts)

    # -- from a command, and in words

    def chosen(self, options: Any) -> list[str]:
        """The prompts."""
        if not (texts := options.texts()):
            raise GenerationError(
                f"{options.model} makes pictures of prompts: give --prompts FILE, a prompt in each "
                'line, or --prompt "a red apple"'
            )
        return texts

    @property
    def example(self) -> str:
        return 'prompt=["a red apple"]' if self.text.encoder else "prompt_embeds=features"

    @property
    def in_words(self) -> str:
        text = self.text
        encoder = {"": "an unknown text encoder", BYTES: "a byte-level encoder in the prior"}
        encoded_by = encoder.get(text.encoder, f"the text encoder {text.encoder}")
        identity = f" (sha256 {text.encoder_fingerprint[:12]})" if text.encoder_fingerprint else ""
        return f"Prompts have at most {text.length} tokens of {encoded_by}{identity}."


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
