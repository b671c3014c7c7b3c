"""The tokenizers that smalti knows: one line each, resolved only when asked for."""

from smalti.hub import Registry

TOKENIZERS = Registry(
    "tokenizer",
    {
        "vq": "smalti.tokenizer.vq:VQTokenizer",
        "kl": "smalti.tokenizer.kl:KLTokenizer",
    },
)
