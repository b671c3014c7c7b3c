"""LlamaGen's tokenizers VQ-8 and VQ-16 (Sun et al., 2406.06525)."""

from typing import Any

import torch

from smalti.pipelines.convert.conv import OneCodebook
from smalti.pipelines.convert.conv_names import ConvNames, mirrored
from smalti.pipelines.convert.layout import Buffer
from smalti.pipelines.convert.reader import Checkpoint

NAMES = ConvNames(
    rules=(
        (r"^encoder\.down\.([^.]+)\.", r"encoder.conv_blocks.\1."),
        (r"^decoder\.up\.(\d+)\.", mirrored("decoder.conv_blocks")),
        (r"(conv_blocks\.[^.]+)\.block\.", r"\1.res."),
        (r"\.mid\.block_1\.", ".mid.0."),
        (r"\.mid\.attn_1\.", ".mid.1."),
        (r"\.mid\.block_2\.", ".mid.2."),
        (r"^quantizer\.codebook\.weight$", "quantize.embedding.weight"),
    ),
)
USAGE_WINDOW = 65536  # codes that its count of used codes remembers


class LlamaGenTokenizer(OneCodebook):
    """Codes are compared and looked up at length 1, which no tensor tells."""

    title = "LlamaGen tokenizer"
    names = NAMES
    l2_normalise = True
    export_wrapper = "model"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.has("encoder.conv_blocks.") or checkpoint.has("decoder.conv_blocks.")

    def buffers(self, config: Any) -> dict[str, Buffer]:
        """The codes that training saw last; original code loads no file without it."""
        del config
        return {"quantize.codebook_used": Buffer(torch.zeros(USAGE_WINDOW), derived=False)}

    def fits(self, config: Any) -> bool:
        return super().fits(config) and (
            config.conv.mid_attention
            and config.conv.attention_levels == (len(config.conv.channel_mult) - 1,)
        )
