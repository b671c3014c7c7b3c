"""A small residual network (pre-activation, He et al., 1603.05027), trained on real images, that
measures whether samples show the requested class. It is independent of the generator: it has its
own weights and seed, and its input is pixels."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.data.latents import as_rgb


class Residual(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))); where the width grows, the resolution halves."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(hidden)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(hidden))))


class ImageClassifier(nn.Module):
    """Class logits of images (B, C, H, W) in [-1, 1], seen as RGB, alpha on white."""

    side = 32  # pixels; images of another size are resized

    def __init__(self, num_classes: int, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        widths = (width, 2 * width, 4 * width)
        blocks = [Residual(i, o) for i, o in zip((width, *widths[:-1]), widths, strict=True)]
        self.blocks = nn.Sequential(nn.MaxPool2d(2), *blocks)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)
        self.training_record: dict[str, Any] = {}  # settings of its training, for the protocol

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, num_classes)."""
        images, size = as_rgb(images), (self.side, self.side)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        x = self.blocks(self.stem(images))  # (B, 4 width, 4, 4)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Most likely class of each image, (B,)."""
        self.eval()
        device = self.head.weight.device
        return torch.cat([self(part.to(device)).argmax(1).cpu() for part in images.split(256)])

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of the images (B, C, H, W) whose predicted class is their label (B,)."""
        return (self.predict(images) == labels).double().mean().item()


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    generator: torch.Generator,
    epochs: int,
    batch_size: int,
    peak_learning_rate: float = 2e-3,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], object] = lambda steps: None,
) -> ImageClassifier:
    """Train on images (N, C, H, W) in [-1, 1] with labels (N,), augmented by mirroring and
    shifting. Reproducible: all random numbers come from `generator`, on the CPU.

    Args:
        dtype: arithmetic of the convolutions. bfloat16 is faster on GPUs and on CPUs with AMX
            (1.6 times); other CPUs emulate it, up to 14 times slower than float32.
        progress: called with 1 after every step.
    """
    with torch.random.fork_rng(devices=[]):  # weights are initialised from the global state
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = ImageClassifier(num_classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_learning_rate, weight_decay=0.05)
    steps = epochs * math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_learning_rate, steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            batch = _augment(images[rows], generator).to(device)
            with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
                logits = model(batch)
            target = labels[rows].to(device)
            loss = F.cross_entropy(logits.float(), target, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress(1)
    model.training_record = {
        "pictures": len(images),
        "epochs": epochs,
        "batch_size": batch_size,
        "peak_learning_rate": peak_learning_rate,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": generator.initial_seed(),
    }
    return model.eval()


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image with probability 1/2 and shift it by up to an eighth of its width."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    max_shift = images.shape[-1] // 8
    padded = F.pad(images, (max_shift,) * 4, mode="replicate")
    corners = torch.randint(2 * max_shift + 1, (len(images), 2), generator=generator).tolist()
    h, w = images.shape[2:]
    crops = [p[:, y : y + h, x : x + w] for p, (y, x) in zip(padded, corners, strict=True)]
    return torch.stack(crops)
