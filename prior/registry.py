"""The registered priors, one line each. A class is imported when it is first used."""

from smalti.hub import Registry

PRIORS = Registry(
    "prior",
    {
        "next-token": "smalti.prior.next_token.model:NextTokenPrior",
        "next-scale": "smalti.prior.next_scale.model:NextScalePrior",
        "flow": "smalti.prior.flow.prior:FlowPrior",
    },
)
