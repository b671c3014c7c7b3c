"""Stage one: images <-> latents."""

from smalti.tokenizer.base import Reconstruction, Tokenizer
from smalti.tokenizer.registry import TOKENIZERS

__all__ = ["TOKENIZERS", "Reconstruction", "Tokenizer"]
