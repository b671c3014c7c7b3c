"""The quantizers that smalti knows: a configuration each, told apart by `kind`, and their class."""

from smalti.hub import Registry
from smalti.tokenizer.fsq import FSQConfig
from smalti.tokenizer.gumbel import GumbelConfig
from smalti.tokenizer.lookup_free import LookupFreeConfig
from smalti.tokenizer.multi_scale import MultiScaleConfig
from smalti.tokenizer.nearest import NearestConfig

QuantizerConfig = NearestConfig | FSQConfig | LookupFreeConfig | MultiScaleConfig | GumbelConfig

QUANTIZERS = Registry(
    "quantizer",
    {
        "nearest": "smalti.tokenizer.nearest:NearestQuantizer",
        "fsq": "smalti.tokenizer.fsq:FSQuantizer",
        "lookup-free": "smalti.tokenizer.lookup_free:LookupFreeQuantizer",
        "multi-scale": "smalti.tokenizer.multi_scale:MultiScaleQuantizer",
        "gumbel": "smalti.tokenizer.gumbel:GumbelQuantizer",
    },
)
