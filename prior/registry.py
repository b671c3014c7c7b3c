"""The priors that smalti knows: one line each, resolved only when asked for."""

from smalti.hub import Registry

PRIORS = Registry(
    "prior",
    {
        "next-token": "smalti.prior.next_token.model:NextTokenPrior",
        "next-scale": "smalti.prior.next_scale.model:NextScalePrior",
        "flow": "smalti.prior.flow.prior:FlowPrior",
    },
)
