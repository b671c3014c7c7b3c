"""Text encoders: captions -> the `TextCondition` of a prior.

    bytes               the UTF-8 bytes of a caption; `ByteEncoder`, a part of the prior that is
                        trained with it, turns them into features; works without any download
    a path or a Hub id  features of a frozen T5 or CLIP model of the package `transformers`

Of a frozen model only safetensors, JSON and vocabularies are read, no remote code runs, and a local
path never uses the network.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from smalti.errors import CheckpointError, ConfigurationError, GenerationError
from smalti.hub import Registry
from smalti.pretrained import import_transformers, load_model, load_part, loading_errors
from smalti.prior.conditions.byte_encoder import BYTES, END, FIRST_BYTE, PADDING
from smalti.prior.conditions.text import TextCondition
from smalti.repository import resolve_folder
from smalti.weights import hash_weights

# -------------------------------------------------------------------------------------------------
# What all encoders share


AT_ONCE = 4096  # captions tokenized at once, where only their lengths are needed


class TextEncoder(ABC):
    """Turns captions into what a prior is conditioned on.

    It is no `nn.Module`: the weights of a frozen encoder are not saved with a prior, which records
    its name and fingerprint instead.
    """

    name: str  # "bytes", or the path or Hub id of a frozen model
    dim: int  # D of the features; 0 if `encode` gives ids of bytes
    max_length: int | None = None  # most tokens of a caption; None: any number

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 of everything that decides the features; "" if the prior trains all of it."""

    @abstractmethod
    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """The token ids of every caption, the end token included, at any length."""

    @abstractmethod
    def embed(self, tokens: list[list[int]], length: int, batch_size: int) -> TextCondition:
        """The condition of token ids, each at most `length` of them, padded on the left."""

    def encode(self, captions: Sequence[str], length: int, *, batch_size: int = 1) -> TextCondition:
        """The condition of captions, padded on the left to `length` tokens.

        Args:
            captions: may be empty texts, which have the end token.
            batch_size: captions encoded at once. With 1, the features of a caption do not depend on
                the others at all; with more they do, by rounding.

        Raises:
            SmaltiError: a caption is no text, or has more than `length` tokens; the encoder cannot
                take `length` tokens.
        """
        self._check(captions, length)
        tokens = self.tokens(captions)
        self._check_lengths(captions, [len(ids) for ids in tokens], length)
        return self.embed(tokens, length, batch_size)

    def check_captions(self, captions: Sequence[str], length: int) -> None:
        """Raise like `encode`, of any number of captions: those of a data set, before any work."""
        self._check(captions, length)
        parts = (captions[i : i + AT_ONCE] for i in range(0, len(captions), AT_ONCE))
        counts = [len(ids) for part in parts for ids in self.tokens(part)]
        self._check_lengths(captions, counts, length)

    def check_fingerprint(self, expected: str, where: str = "the prior") -> None:
        """Raise `CheckpointError` unless this is the encoder with the fingerprint `expected`; ""
        stands for any."""
        if expected and expected != self.fingerprint:
            raise CheckpointError(
                f"the text encoder {self.name} (sha256 {self.fingerprint[:12] or 'none'}) is not "
                f"the one of {where} (sha256 {expected[:12]}): give the folder or the Hub id of "
                "that one"
            )

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, if there are any, to another device."""
        del device
        return self

    def _check(self, captions: Sequence[str], length: int) -> None:
        _check_texts(captions)
        if length < 1 or (self.max_length is not None and length > self.max_length):
            limit = "1 or more" if self.max_length is None else f"1 to {self.max_length}"
            raise ConfigurationError(
                f"the text length is {length} tokens; the text encoder {self.name} takes {limit}: "
                f"set --text.length to {max(1, self.max_length or 1)}"
            )

    def _check_lengths(self, captions: Sequence[str], counts: list[int], length: int) -> None:
        too_long = sum(count > length for count in counts)
        if not too_long:
            return
        longest = max(counts)
        text = " ".join(captions[counts.index(longest)].split())  # in one line
        text = text if len(text) <= 40 else f"{text[:40]}..."
        remedy = "shorten it"
        if self.max_length is None or longest <= self.max_length:
            remedy += f", or train with --text.length {longest}"
        raise GenerationError(
            f"{too_long} of {len(captions)} captions are longer than the text length of {length} "
            f'tokens; the longest has {longest} ("{text}"): {remedy}'
        )


def _check_texts(captions: Sequence[str]) -> None:
    if isinstance(captions, str):
        raise GenerationError(f"captions are the text {captions!r}: give a list of texts")
    for caption in captions:
        if not isinstance(caption, str):
            raise GenerationError(
                f"a caption is {caption!r}, a {type(caption).__name__}: give a text"
            )


# -------------------------------------------------------------------------------------------------
# Bytes


class ByteTokenizer(TextEncoder):
    """A caption's UTF-8 bytes and an end token, with the numbers of ByT5 (2105.13626)."""

    name = BYTES
    dim = 0

    @property
    def fingerprint(self) -> str:
        """ "": the prior trains all that decides the features."""
        return ""

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """The ids of the bytes of every caption, and the end token."""
        return [[byte + FIRST_BYTE for byte in _utf8(caption)] + [END] for caption in captions]

    def embed(self, tokens: list[list[int]], length: int, batch_size: int) -> TextCondition:
        """Ids (B, length) int64, padded on the left."""
        del batch_size
        rows = [[PADDING] * (length - len(ids)) + ids for ids in tokens]
        ids = torch.tensor(rows, dtype=torch.int64).view(-1, length)
        return TextCondition(ids, ids != PADDING)


def _utf8(caption: str) -> bytes:
    try:
        return caption.encode()
    except UnicodeEncodeError as error:
        raise GenerationError(
            f"the caption {caption!r} has a character that UTF-8 cannot encode, at position "
            f"{error.start}: remove it"
        ) from error


def tokenize_bytes(captions: Sequence[str], length: int) -> TextCondition:
    """The bytes of captions, ids (B, length) int64 with a mask, padded on the left.

    Raises:
        SmaltiError: see `TextEncoder.encode`.
    """
    return ByteTokenizer().encode(captions, length)


# -------------------------------------------------------------------------------------------------
# Frozen models of transformers

# `model_type` in config.json -> the class of transformers that encodes text.
FROZEN_MODELS = {
    "t5": "T5EncoderModel",  # also Flan-T5 and ByT5
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.json", "merges.txt", "added_tokens.json")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
WEIGHT_FILES = "model*.safetensors"
# What is downloaded of a repository: never a pickle.
DOWNLOADED = (
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    *VOCABULARIES,
    *TOKENIZER_SETTINGS,
)
# Whatever settings a tokenizer has, the fingerprint covers what they do to this text.
PROBE = "A Red apple, 3.5 cm; na\u00efve \u00dcber-\u732b \U0001f34e\n  end "


class FrozenTextEncoder(TextEncoder):
    """The last hidden states of a T5 encoder (1910.10683) or of CLIP's text model (2103.00020)."""

    def __init__(self, name: str, folder: Path, model: nn.Module, tokenizer: Any) -> None:
        self.name, self.folder = name, folder
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.dim = self.model.config.hidden_size
        # CLIP learned its positions; those of T5 are relative.
        self.max_length = getattr(self.model.config, "max_position_embeddings", None)

    @classmethod
    def load(cls, source: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """The text encoder in a folder of `transformers`, or at a Hub id.

        The tokenizer lies in the same folder or, as in a pipeline of Diffusers (`text_encoder_2`),
        beside it (`tokenizer_2`).

        Args:
            dtype: of the weights and the features. T5 in float16 overflows; bfloat16 does not.

        Raises:
            SmaltiError: `transformers` is missing; there is no such model, it is damaged or of
                another kind, lacks a tensor, has no safetensors, or no tokenizer of its own.
        """
        folder = resolve_folder(source, patterns=DOWNLOADED)
        transformers = import_transformers(
            "a frozen text encoder", ", or take --text.encoder bytes"
        )
        kind = _model_type(folder, source)
        _check_files(folder, source)
        remedy = "give a folder that save_pretrained of transformers wrote"
        with loading_errors("the text encoder", folder, remedy):
            place = _tokenizer_folder(folder, source)
            tokenizer = load_part(transformers.AutoTokenizer, place)
            model = load_model(getattr(transformers, FROZEN_MODELS[kind]), folder, dtype)
        if len(tokenizer) > (rows := model.get_input_embeddings().num_embeddings):
            raise CheckpointError(
                f"the tokenizer of {source} has {len(tokenizer):,} tokens, but the model knows "
                f"{rows:,}: give the tokenizer and the model of one repository"
            )
        return cls(str(source), folder, model, tokenizer)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """sha256 of the weights as stored, the vocabularies, and the token ids of a test text; the
        same for any `dtype` and any number of weight files."""
        digest = hashlib.sha256(hash_weights(_stored_weights(self.folder)).encode())
        for name in VOCABULARIES:
            path = _tokenizer_folder(self.folder, self.name) / name
            if path.is_file():
                digest.update(name.encode() + path.read_bytes())
        digest.update(json.dumps(self.tokens([PROBE, ""])).encode())
        return digest.hexdigest()

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """The token ids of every caption, with the special tokens of the model."""
        if not captions:
            return []
        return self.tokenizer(list(captions), verbose=False).input_ids

    @torch.no_grad()
    def embed(self, tokens: list[list[int]], length: int, batch_size: int) -> TextCondition:
        """Features (B, length, D), zeros at padding."""
        weight = next(self.model.parameters())
        features = weight.new_zeros(len(tokens), length, self.dim)
        mask = torch.zeros(len(tokens), length, dtype=torch.bool, device=weight.device)
        for start in range(0, len(tokens), batch_size):
            part = [torch.tensor(ids) for ids in tokens[start : start + batch_size]]
            # Padded on the right, as the models were trained.
            ids = nn.utils.rnn.pad_sequence(part, batch_first=True).to(weight.device)
            lengths = torch.tensor([len(row) for row in part], device=weight.device)
            is_token = torch.arange(ids.shape[1], device=weight.device) < lengths[:, None]
            output = self.model(input_ids=ids, attention_mask=is_token.long()).last_hidden_state
            for row, (values, count) in enumerate(zip(output, lengths.tolist(), strict=True)):
                features[start + row, length - count :] = values[:count]
                mask[start + row, length - count :] = True
        return TextCondition(features, mask)

    def to(self, device: torch.device | str) -> Self:
        """Move the weights to another device."""
        self.model.to(device)
        return self


def _model_type(folder: Path, source: str | Path) -> str:
    """The kind of model in a folder."""
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text())["model_type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"the text encoder {source} has no config.json with a model_type: give a folder that "
            "save_pretrained of transformers wrote, or a Hub id"
        ) from error
    if kind not in FROZEN_MODELS:
        raise ConfigurationError(
            f"{source} is a {kind}; a text encoder is one of {', '.join(FROZEN_MODELS)}, or bytes"
        )
    return kind


def _check_files(folder: Path, source: str | Path) -> None:
    """Raise `CheckpointError` unless a folder has weights that can be read without risk."""
    if any(folder.glob(WEIGHT_FILES)):
        return
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    found = f" ({pickles[0]} is a pickle, which can run code and is not read)" if pickles else ""
    raise CheckpointError(
        f"the text encoder {source} has no model.safetensors{found}: save it with "
        "save_pretrained of transformers, which writes safetensors"
    )


def _tokenizer_folder(folder: Path, source: str | Path) -> Path:
    """Where the tokenizer of a model lies.

    Raises:
        SmaltiError: nowhere (transformers would make one without a vocabulary), or a package that
            reads it is missing.
    """
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    for place in (folder, beside):
        found = [name for name in VOCABULARIES[:3] if (place / name).is_file()]
        if found == ["spiece.model"] and find_spec("sentencepiece") is None:
            raise ConfigurationError(
                f"the tokenizer of {source} is a SentencePiece model, which needs the package "
                "sentencepiece: pip install sentencepiece"
            )
        if found or _takes_bytes(place):
            return place
    raise CheckpointError(
        f"the text encoder {source} has no tokenizer.json: save its tokenizer into the same folder"
    )


def _takes_bytes(folder: Path) -> bool:
    """Whether the tokenizer of a folder is that of ByT5, which has no vocabulary."""
    path = folder / TOKENIZER_SETTINGS[0]
    return path.is_file() and '"ByT5Tokenizer"' in path.read_text()


def _stored_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors in the weight files of a folder, by name."""
    places = {}
    for path in sorted(folder.glob(WEIGHT_FILES)):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    for name in sorted(places):
        with safe_open(places[name], "pt") as file:
            yield name, file.get_tensor(name)


# -------------------------------------------------------------------------------------------------
# By name

TEXT_ENCODERS = Registry(
    "text encoder", {BYTES: "smalti.prior.conditions.text_encoder:ByteTokenizer"}
)


def text_encoder_of(name: str, dtype: torch.dtype = torch.float32) -> TextEncoder:
    """The text encoder of a registered name, of a folder of `transformers`, or of a Hub id.

    Args:
        dtype: of a frozen model's weights and features.

    Raises:
        SmaltiError: there is none; see `FrozenTextEncoder.load`.
    """
    if name in TEXT_ENCODERS:
        return TEXT_ENCODERS.resolve(name)()
    if "/" not in name and not Path(name).is_dir():
        raise ConfigurationError(
            f'there is no folder and no text encoder called "{name}": give '
            f"{', '.join(TEXT_ENCODERS)}, a folder of transformers, or a Hub id such as "
            "google/flan-t5-base"
        )
    return FrozenTextEncoder.load(name, dtype)
