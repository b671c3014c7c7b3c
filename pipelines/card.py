"""The model card that is saved with a pipeline: README.md, with the metadata that the Hub reads."""

from collections.abc import Sequence

from torch import nn

from smalti.data.latents import resolution
from smalti.prior.base import Prior
from smalti.tokenizer.base import Tokenizer

SAMPLES = "samples.png"  # the grid that the card shows

BODY = """
# A two-stage image generator made with smalti
{grid}
```python
import smalti

pipe = smalti.Pipeline.from_pretrained("PATH OR HUB ID")
images = pipe({example}, num_images_per_prompt=4).images
```

| part | type | parameters | latents |
| --- | --- | --- | --- |
| tokenizer | {tokenizer} | {tokenizer_size} | {spec} |
| prior | {prior} | {prior_size} | |

Images are {size}. {conditions}

{notes}"""


def model_card(
    tokenizer: Tokenizer, prior: Prior, classes: Sequence[str], has_grid: bool, notes: str
) -> str:
    """The content of README.md.

    Args:
        has_grid: whether the file `SAMPLES` is saved beside it.
        notes: Markdown about the training data and the measurements, appended as it is.
    """
    from huggingface_hub import ModelCard, ModelCardData

    metadata = ModelCardData(
        library_name="smalti",
        pipeline_tag="unconditional-image-generation",
        tags=["smalti", "image-generation"],
    )
    body = BODY.format(
        grid=f"\n![samples]({SAMPLES})\n" if has_grid else "",
        example=f"class_labels=[{classes[0]!r}]" if classes else "prompt_embeds=features",
        tokenizer=Tokenizer.registry.name_of(type(tokenizer)),
        tokenizer_size=f"{_millions(tokenizer)} M",
        prior=Prior.registry.name_of(type(prior)),
        prior_size=f"{_millions(prior)} M",
        spec=_plain(str(tokenizer.spec)),
        size=image_words(tokenizer),
        conditions=_conditions(classes),
        notes=notes,
    )
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n{body}"))


def image_words(tokenizer: Tokenizer) -> str:
    """Size and channels of a tokenizer's images: 48 x 64 pixels (height x width), grey."""
    size = tokenizer.image_size
    order = "" if isinstance(size, int) else " (height x width)"
    channels = {1: ", grey", 4: ", RGB with alpha"}.get(tokenizer.image_channels, "")
    return f"{resolution(size)} pixels{order}{channels}"


def _conditions(classes: Sequence[str]) -> str:
    if not classes:
        return "They are generated from the features of captions."
    return f"Classes: {', '.join(_plain(name) for name in classes)}."


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}"


def _plain(text: str) -> str:
    """The text without the characters that Markdown or HTML would interpret."""
    return "".join(c for c in text if c not in "<>`|[]\n\r")
