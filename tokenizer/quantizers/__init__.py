"""The registered quantizers: the config of each, told apart by its `kind`, and its class."""

from smalti.hub import Registry
from smalti.tokenizer.quantizers.fsq import FSQConfig
from smalti.tokenizer.quantizers.gumbel import GumbelConfig
from smalti.tokenizer.quantizers.lookup_free import LookupFreeConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig

QuantizerConfig = NearestConfig | FSQConfig | LookupFreeConfig | MultiScaleConfig | GumbelConfig

QUANTIZERS = Registry(
    "quantizer",
    {
        "nearest": "smalti.tokenizer.quantizers.nearest:NearestQuantizer",
        "fsq": "smalti.tokenizer.quantizers.fsq:FSQuantizer",
        "lookup-free": "smalti.tokenizer.quantizers.lookup_free:LookupFreeQuantizer",
        "multi-scale": "smalti.tokenizer.quantizers.multi_scale:MultiScaleQuantizer",
        "gumbel": "smalti.tokenizer.quantizers.gumbel:GumbelQuantizer",
    },
)
