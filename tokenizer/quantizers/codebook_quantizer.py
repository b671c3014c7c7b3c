"""What quantizers with a learned codebook share."""

import torch

from smalti.tokenizer.quantizers.base import Quantizer
from smalti.tokenizer.quantizers.codebook import CodebookConfig


class CodebookQuantizer(Quantizer):
    """A quantizer whose codes are the rows of one codebook, which learns when a step ends."""

    def __init__(self, codebook: CodebookConfig) -> None:
        super().__init__()
        self.codebook = codebook.build()

    @property
    def vocab_size(self) -> int:
        return self.codebook.config.vocab_size

    @property
    def dim(self) -> int:
        return self.codebook.config.code_dim

    def after_step(self, generator: torch.Generator) -> None:
        self.codebook.after_step(generator)

    def discard_step(self) -> None:
        self.codebook.discard_step()
