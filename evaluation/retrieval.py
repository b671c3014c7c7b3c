"""Retrieval of captions: whether a picture shows what its caption says.

A contrastive scorer (CLIP, 2103.00020) is trained on the real training pictures and their captions.
Given a picture, it ranks the right caption among others. The scorer is independent of the
generator: it has its own networks, weights and seed, and its input is pixels and text.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.data.latents import rounded, to_float, to_levels
from smalti.errors import DataError
from smalti.evaluation.classifier import ImageClassifier, shifted
from smalti.evaluation.features import weights_sha256
from smalti.evaluation.metrics import Metric

CANDIDATES = 64  # captions that a picture chooses from
SIDE = ImageClassifier.side  # pixels

# -------------------------------------------------------------------------------------------------
# Pictures and captions, as the scorer sees them


@dataclass(frozen=True)
class CaptionedImages:
    """Small pictures with one or several captions each: 3 kB per picture."""

    levels: Tensor  # (N, 3, 32, 32) uint8
    captions: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, batches: Iterable[tuple[Tensor, Sequence[Sequence[str]]]]) -> "CaptionedImages":
        """From batches of images (B, 3, H, W) in [-1, 1] and the captions of each; only the small
        pictures are kept.

        Raises:
            DataError: there is no picture, or one has no caption.
        """
        levels: list[Tensor] = []
        captions: list[tuple[str, ...]] = []
        for images, texts in batches:
            levels.append(to_levels(_resized(rounded(images.cpu()))).to(torch.uint8))
            captions += [tuple(own) for own in texts]
            if len(images) != len(texts) or not all(texts):
                raise DataError(
                    f"{len(images)} pictures have captions of {sum(map(bool, texts))}: give each "
                    "at least one caption"
                )
        if not levels:
            raise DataError("there is no picture with a caption to measure retrieval on")
        return cls(torch.cat(levels), tuple(captions))

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def first_captions(self) -> list[str]:
        """The first caption of every picture."""
        return [own[0] for own in self.captions]


def _resized(images: Tensor) -> Tensor:
    if images.shape[-2:] == (SIDE, SIDE):
        return images
    return F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)


# -------------------------------------------------------------------------------------------------
# The scorer

END, VOCAB_SIZE = 257, 258  # 0 is padding, then come the 256 bytes


class ByteConvolutions(nn.Module):
    """Texts -> vectors (B, dim): convolutions of several widths over the bytes, each followed by
    the maximum over the text (Kim et al., 1508.06615), then two linear layers."""

    widths = (1, 3, 5, 7)  # bytes
    channels = 128  # of each width

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, 64, padding_idx=0)
        self.convs = nn.ModuleList(
            nn.Conv1d(64, self.channels, width, padding="same") for width in self.widths
        )
        hidden = self.channels * len(self.widths)
        self.head = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Vectors (B, dim); they do not depend on the other texts of the batch."""
        rows = [torch.tensor([*(byte + 1 for byte in t.encode()), END]) for t in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.embedding.weight.device)
        bytes_ = self.embedding(ids).mT  # (B, 64, T)
        is_padding = (ids == 0)[:, None]
        found = [conv(bytes_).masked_fill(is_padding, -torch.inf).amax(2) for conv in self.convs]
        return self.head(torch.cat(found, 1))


class RetrievalScorer(nn.Module):
    """Pictures and captions as unit vectors; their scalar product is the score."""

    dim = 128

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.image = ImageClassifier(self.dim, width)  # its head gives vectors instead of logits
        self.text = ByteConvolutions(self.dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.training_record: dict[str, Any] = {}  # settings of its training, for the protocol

    def embed_images(self, levels: Tensor) -> Tensor:
        """Unit vectors (N, dim) of pictures (N, 3, 32, 32) uint8."""
        images = to_float(levels.to(self.log_scale.device))
        return F.normalize(self.image(images).float(), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, dim) of texts."""
        return F.normalize(self.text(texts).float(), dim=1)

    def forward(self, levels: Tensor, texts: Sequence[str]) -> Tensor:
        """The loss of a batch: the cross-entropy of the right caption for every picture and of the
        right picture for every caption; equal captions are not negatives of each other."""
        scale = self.log_scale.exp().clamp(max=100)
        logits = scale * self.embed_images(levels) @ self.embed_texts(texts).T  # (B, B)
        number = {text: i for i, text in enumerate(texts)}
        same = torch.tensor([number[text] for text in texts], device=logits.device)
        others = (same[:, None] == same) & ~torch.eye(len(same), dtype=bool, device=same.device)
        logits = logits.masked_fill(others, -torch.inf)
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    @torch.no_grad()
    def accuracy(
        self, levels: Tensor, texts: Sequence[str], pool: Sequence[str], candidates: int
    ) -> float:
        """The expected share of pictures (N, 3, 32, 32) uint8 whose right caption has the highest
        score among `candidates` captions: the right one, and others drawn from `pool` without
        replacement. The expectation over the draws is computed, not sampled: if L of the M other
        captions have a lower score, it is C(L, candidates - 1) / C(M, candidates - 1).

        Args:
            texts: N right captions, each of `pool`.
            pool: different captions.
        """
        self.eval()
        place = {text: i for i, text in enumerate(pool)}
        right = torch.tensor([place[text] for text in texts])
        vectors = torch.cat([self.embed_texts(pool[i : i + 256]) for i in range(0, len(pool), 256)])
        shares = []
        for part, rows in zip(levels.split(256), right.split(256), strict=True):
            scores = (self.embed_images(part) @ vectors.T).cpu()
            lower = (scores < scores.gather(1, rows[:, None])).sum(1)
            shares.append(_share_of_draws(lower, len(pool) - 1, candidates - 1))
        return torch.cat(shares).mean().item()


def _share_of_draws(lower: Tensor, total: int, drawn: int) -> Tensor:
    """C(lower, drawn) / C(total, drawn): the share of draws of `drawn` out of `total` that contain
    only ones of `lower` (N,)."""
    lower = lower.double()
    factors = [(lower - k).clamp(min=0) / (total - k) for k in range(drawn)]
    return torch.stack(factors).prod(0) if factors else torch.ones_like(lower)


# -------------------------------------------------------------------------------------------------
# Training and measuring


def train_scorer(
    train: CaptionedImages,
    *,
    generator: torch.Generator,
    epochs: int,
    batch_size: int = 128,
    peak_learning_rate: float = 2e-3,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], object] = lambda steps: None,
) -> RetrievalScorer:
    """Train on pictures and captions; pictures are shifted at random but not mirrored, because a
    caption may say "left". Reproducible: all random numbers come from `generator`, on the CPU
    (those of dropout from a seed that it gives).

    Args:
        dtype: arithmetic of the networks.
        progress: called with 1 after every step.
    """
    with torch.random.fork_rng(devices=[]):  # initial weights and dropout use the global state
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = RetrievalScorer().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak_learning_rate, weight_decay=0.1)
        steps = epochs * math.ceil(len(train) / batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_learning_rate, steps)
        model.train()
        for _ in range(epochs):
            order = torch.randperm(len(train), generator=generator)
            for rows in order.split(batch_size):
                draws = torch.rand(len(rows), generator=generator).tolist()
                captions = (train.captions[row] for row in rows.tolist())
                texts = [own[int(u * len(own))] for own, u in zip(captions, draws, strict=True)]
                levels = shifted(train.levels[rows].float(), generator).to(torch.uint8)
                with torch.autocast(torch.device(device).type, dtype, dtype != torch.float32):
                    loss = model(levels, texts)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress(1)
    model.training_record = {
        "pictures": len(train),
        "captions": len({text for own in train.captions for text in own}),
        "epochs": epochs,
        "batch_size": batch_size,
        "peak_learning_rate": peak_learning_rate,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": generator.initial_seed(),
    }
    return model.eval()


def retrieval_metrics(
    scorer: RetrievalScorer,
    samples: CaptionedImages,
    heldout: CaptionedImages,
    protocol: dict[str, Any],
    *,
    generator: torch.Generator,
) -> dict[str, Metric]:
    """The accuracy of retrieving the right caption among 64, of samples, of the real held-out
    pictures, and of samples with a wrong caption as the right one, which is about 1/64.

    Args:
        samples: generated pictures and the held-out captions that they were generated from.
        generator: of the wrong captions.

    Raises:
        DataError: fewer than 2 different held-out captions.
    """
    pool = sorted({*heldout.first_captions, *samples.first_captions})
    if len(pool) < 2:
        raise DataError(
            f"the held-out pictures have {len(pool)} different captions; retrieval needs 2 or more"
        )
    candidates = min(CANDIDATES, len(pool))
    place = {text: i for i, text in enumerate(pool)}
    asked = samples.first_captions
    steps = torch.randint(1, len(pool), (len(asked),), generator=generator).tolist()
    wrong = [pool[(place[t] + step) % len(pool)] for t, step in zip(asked, steps, strict=True)]
    base = {
        **protocol,
        "scorer": "contrastive, trained on the real training pictures and their captions",
        "scorer_sha256": weights_sha256(scorer),
        "training": scorer.training_record,
        "candidates": candidates,
        "distractors": f"drawn from {len(pool)} different captions; expectation over all draws",
        "chance": 1 / candidates,
        "rounding": "uint8",
        "resize": f"bilinear with antialiasing to {SIDE} px",
    }
    values = {
        "samples": scorer.accuracy(samples.levels, asked, pool, candidates),
        "heldout": scorer.accuracy(heldout.levels, heldout.first_captions, pool, candidates),
        "shuffled": scorer.accuracy(samples.levels, wrong, pool, candidates),
    }
    counts = {"samples": len(samples), "heldout": len(heldout), "shuffled": len(samples)}
    return {
        f"retrieval_accuracy_{name}": Metric(value, {**base, "pictures": counts[name]})
        for name, value in values.items()
    }
