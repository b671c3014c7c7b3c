"""The model card that is saved with a pipeline: README.md, with the metadata that the Hub reads."""

from collections.abc import Sequence

from torch import nn

from smalti.data.latents import resolution
from smalti.pipelines.image_tasks import make_task
from smalti.prior.base import Prior
from smalti.tokenizer.base import Tokenizer

SAMPLES = "samples.png"  # the grid that the card shows

BODY = """
# A two-stage image generator made with smalti
{grid}
```python
import smalti

pipe = smalti.Pipeline.from_pretrained("PATH OR HUB ID")
images = pipe({example}).images
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

    kinds = prior.condition_kinds
    tag = "unconditional-image-generation"
    if "image" in kinds:
        tag = "image-to-image"
    elif "text" in kinds:
        tag = "text-to-image"
    metadata = ModelCardData(
        library_name="smalti",
        pipeline_tag=tag,
        tags=["smalti", "image-generation"],
    )
    body = BODY.format(
        grid=f"\n![samples]({SAMPLES})\n" if has_grid else "",
        example=_example(prior, classes),
        tokenizer=Tokenizer.registry.name_of(type(tokenizer)),
        tokenizer_size=f"{_millions(tokenizer)} M",
        prior=Prior.registry.name_of(type(prior)),
        prior_size=f"{_millions(prior)} M",
        spec=_plain(str(tokenizer.spec)),
        size=image_words(tokenizer),
        conditions=_conditions(prior, classes),
        notes=notes,
    )
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n{body}"))


def image_words(tokenizer: Tokenizer, unit: str = "pixels") -> str:
    """Size and channels of a tokenizer's images: 48 x 64 pixels (height x width), grey."""
    size = tokenizer.image_size
    order = "" if isinstance(size, int) else " (height x width)"
    channels = {1: ", grey", 4: ", RGB with alpha"}.get(tokenizer.image_channels, "")
    return f"{resolution(size)} {unit}{order}{channels}"


def _example(prior: Prior, classes: Sequence[str]) -> str:
    """The arguments of a call that makes four images."""
    given = []
    if classes:
        given.append(f"class_labels=[{classes[0]!r}]")
    text = prior.config.text
    if text is not None:
        given.append('prompt=["a red apple"]' if text.encoder else "prompt_embeds=features")
    image = prior.config.image
    if image is not None:
        given.append("image=picture")
        if image.task and make_task(image.task).takes_mask:
            given.append("mask_image=mask")
    return ", ".join([*given, "num_images_per_prompt=4"]) if given else "num_images=4"


def _conditions(prior: Prior, classes: Sequence[str]) -> str:
    sentences = []
    if classes:
        sentences.append(f"Classes: {', '.join(_plain(name) for name in classes)}.")
    text = prior.config.text
    if text is not None:
        encoder = {"": "an unknown text encoder", "bytes": "a byte-level encoder in the prior"}
        encoded_by = encoder.get(text.encoder, f"the text encoder {_plain(text.encoder)}")
        sentences.append(
            f"Prompts have at most {text.length} tokens of {encoded_by}"
            + (f" (sha256 {text.encoder_fingerprint[:12]})." if text.encoder_fingerprint else ".")
        )
    if prior.config.image is not None:
        task = prior.config.image.task or "an unknown task"
        sentences.append(f"They are conditional on pictures: {_plain(task)}.")
    return " ".join(sentences) or "They are generated without a condition."


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}"


def _plain(text: str) -> str:
    """The text without the characters that Markdown or HTML would interpret."""
    return "".join(c for c in text if c not in "<>`|[]\n\r")
