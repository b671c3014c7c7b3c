"""The model card that is saved with a pipeline."""

from collections.abc import Sequence

from torch import nn

from smalti.prior.base import Prior
from smalti.tokenizer.base import Tokenizer

SAMPLES = "samples.png"  # the grid that the card shows

_TEMPLATE = """\
---
library_name: smalti
pipeline_tag: unconditional-image-generation
tags:
- smalti
- image-generation
---

# A two-stage image generator made with smalti
{grid}
```python
import smalti

pipe = smalti.Pipeline.from_pretrained("PATH OR HUB ID")
images = pipe({example}, num_images_per_prompt=4, guidance_scale=2.0).images
```

| part | type | parameters | latents |
| --- | --- | --- | --- |
| tokenizer | {tokenizer} | {tokenizer_size} | {spec} |
| prior | {prior} | {prior_size} | |

Images are {size} x {size} pixels. {conditions}

{notes}"""


def model_card(
    tokenizer: Tokenizer, prior: Prior, classes: Sequence[str], has_grid: bool, notes: str
) -> str:
    """A README.md for a pipeline folder, with the YAML header that the Hub reads."""
    return _TEMPLATE.format(
        grid=f"\n![samples]({SAMPLES})\n" if has_grid else "",
        example=f"class_labels=[{classes[0]!r}]" if classes else "prompt_embeds=features",
        tokenizer=Tokenizer.registry.name_of(type(tokenizer)),
        tokenizer_size=f"{_millions(tokenizer)} M",
        prior=Prior.registry.name_of(type(prior)),
        prior_size=f"{_millions(prior)} M",
        spec=_plain(str(tokenizer.spec)),
        size=tokenizer.image_size,
        conditions=_conditions(classes),
        notes=notes,
    )


def _conditions(classes: Sequence[str]) -> str:
    if not classes:
        return "They are drawn from the features of captions."
    return f"Classes: {', '.join(_plain(name) for name in classes)}."


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}"


def _plain(text: str) -> str:
    """Text from outside, with what Markdown and HTML would act on taken out."""
    return "".join(c for c in text if c not in "<>`|[]\n\r")
