"""Quantizers: continuous features -> codes. The registered ones, and their configurations."""

from dataclasses import dataclass
from typing import ClassVar

from smalti.hub import Registry

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


@dataclass(frozen=True)
class QuantizerConfig:
    """The configuration of a quantizer: a frozen dataclass with a `kind`, its registered name."""

    registry: ClassVar[Registry] = QUANTIZERS
