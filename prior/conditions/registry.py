"""The kinds of condition, one line each. A class is imported when it is first used.

Where the conditions of a kind come from is registered in `pipelines/conditions.py`.
"""

from smalti.hub import Registry

CONDITIONS = Registry(
    "condition",
    {
        "none": "smalti.prior.conditions.none:NoneKind",
        "class": "smalti.prior.conditions.classes:ClassKind",
        "text": "smalti.prior.conditions.text:CaptionEmbedding",
        "image": "smalti.prior.conditions.image:ImageKind",
    },
)
