"""The names of the 1000 classes of ImageNet, as models of them number their labels."""

from collections import Counter

NUM_CLASSES = 1000


def imagenet_classes() -> tuple[str, ...]:
    """The names in label order, each once.

    They come with torchvision; where it calls two classes alike, the number tells them apart.
    """
    from torchvision.models import AlexNet_Weights

    names: list[str] = AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    return tuple(f"{n} ({i})" if n in repeated else n for i, n in enumerate(names))


def class_names(count: int) -> tuple[str, ...]:
    """Names for the classes of a published model: ImageNet's for 1000, else their numbers."""
    if count == NUM_CLASSES:
        return imagenet_classes()
    return tuple(str(number) for number in range(count))
