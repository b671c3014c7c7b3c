"""The registered tokenizers: one line each, imported at the first use."""

from smalti.hub import Registry

TOKENIZERS = Registry(
    "tokenizer",
    {
        "vq": "smalti.tokenizer.vq:VQTokenizer",
        "kl": "smalti.tokenizer.kl:KLTokenizer",
    },
)
