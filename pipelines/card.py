"""The model card that is saved with a pipeline: README.md, with the metadata that the Hub reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from smalti.data.latents import resolution
from smalti.pipelines.conditions import CONDITION_SOURCES, ConditionSource, sources_of
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

Images are {size}{sizes}. {conditions}

## Sampling defaults

Options of a call that gives none ([`sampling.json`](sampling.json)): {sampling}.

{notes}"""


def model_card(
    tokenizer: Tokenizer,
    prior: Prior,
    classes: Sequence[str],
    has_grid: bool,
    notes: str,
    sampling: Mapping[str, Any],
) -> str:
    """The content of README.md.

    Args:
        has_grid: whether the file `SAMPLES` is saved beside it.
        notes: Markdown about the training data and the measurements, appended as it is.
        sampling: the options of a call that gives none.
    """
    from huggingface_hub import ModelCard, ModelCardData

    sources = list(sources_of(prior.condition_kinds, prior.config, classes).values())
    tasks = [source.HUB_TASK for source in sources if source.HUB_TASK]
    metadata = ModelCardData(
        library_name="smalti",
        # image-to-image, if it is one of them
        pipeline_tag=min(tasks, default="unconditional-image-generation"),
        tags=["smalti", "image-generation"],
    )
    body = BODY.format(
        grid=f"\n![samples]({SAMPLES})\n" if has_grid else "",
        example=_example(prior, sources),
        tokenizer=Tokenizer.registry.name_of(type(tokenizer)),
        tokenizer_size=f"{_millions(tokenizer)} M",
        prior=Prior.registry.name_of(type(prior)),
        prior_size=f"{_millions(prior)} M",
        spec=_plain(str(tokenizer.spec)),
        size=image_words(tokenizer),
        sizes=_other_sizes(tokenizer, prior),
        conditions=_conditions(sources),
        sampling=", ".join(f"`{_plain(f'{k}={v}')}`" for k, v in sampling.items()),
        notes=notes,
    )
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n{body}"))


def described(tokenizer: Tokenizer, prior: Prior, classes: Sequence[str]) -> list[str]:
    """A line about each model."""

    def size(model: nn.Module) -> str:
        return f"{type(model).__name__}, {_millions(model)} M parameters"

    some = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
    conditions = f"{len(classes)} classes: {some}" if classes else "no classes"
    others = [kind for kind in prior.condition_kinds if kind not in ("class", "none")]
    conditions += "".join(f", {CONDITION_SOURCES.resolve(kind).ARGUMENTS[0]}" for kind in others)
    return [
        f"tokenizer: {size(tokenizer)}, {image_words(tokenizer)} <-> {tokenizer.spec.in_words}",
        f"prior: {size(prior)}, {conditions}",
    ]


def image_words(tokenizer: Tokenizer, unit: str = "pixels") -> str:
    """Size and channels of a tokenizer's images: 48 x 64 pixels (height x width), grey."""
    size = tokenizer.image_size
    order = "" if isinstance(size, int) else " (height x width)"
    channels = {1: ", grey", 4: ", RGB with alpha"}.get(tokenizer.image_channels, "")
    return f"{resolution(size)} {unit}{order}{channels}"


def _other_sizes(tokenizer: Tokenizer, prior: Prior) -> str:
    """The other sizes that a prior was trained on, to follow that of its images."""
    sizes = [tokenizer.size_of(grid) for grid in getattr(prior.config, "buckets", ())]
    others = [resolution(size) for size in sizes if size != tokenizer.image_size]
    if not others:
        return ""
    return f", or, with `image_size`, {', '.join(others)} (height x width)"


def _example(prior: Prior, sources: Sequence[ConditionSource]) -> str:
    """The arguments of a call that makes four images."""
    if not prior.config.conditions:
        return "num_images=4"
    return ", ".join([*(source.example for source in sources), "num_images_per_prompt=4"])


def _conditions(sources: Sequence[ConditionSource]) -> str:
    sentences = [_plain(source.in_words) for source in sources if source.in_words]
    return " ".join(sentences) or "They are generated without a condition."


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}"


def _plain(text: str) -> str:
    """The text without the characters that Markdown or HTML would interpret."""
    return "".join(c for c in text if c not in "<>`|[]\n\r")
