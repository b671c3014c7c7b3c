"""Retrieval of captions: whether a picture shows what its caption says.

A contrastive scorer (CLIP, 2103.00020) is trained on the real training pictures and their captions.
Given a picture, it ranks the right caption among others. It is independent of the generator: its
input is pixels and text, and what it learns is learned from real pictures alone. Of a picture it
sees the features of a frozen network that was trained on ImageNet, the AlexNet in LPIPS: with a
few thousand pictures, a network trained from scratch finds fewer of the captions of new ones.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.data.latents import rounded
from smalti.errors import DataError
from smalti.evaluation.features import AlexNetFeatures, resized, weights_sha256
from smalti.evaluation.metrics import Metric
from smalti.tokenizer.losses.perceptual import LPIPS

CANDIDATES = 64  # captions that a picture chooses from
RETRIEVAL_METRICS = tuple(f"retrieval_accuracy_{x}" for x in ("samples", "heldout", "shuffled"))

# -------------------------------------------------------------------------------------------------
# Pictures and captions, as the scorer sees them


class ImageFeatures:
    """Features of images, (B, 1920): of the AlexNet in LPIPS, the means of the first four ReLU
    layers over positions, and those of the fifth over each quarter of the image."""

    dim = 64 + 192 + 384 + 256 + 4 * 256
    side = AlexNetFeatures.side  # pixels; images are resized to it, bicubic

    def __init__(self, lpips: LPIPS) -> None:
        self.lpips = lpips
        self.weights_sha256 = weights_sha256(lpips)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        images = resized(images.to(next(self.lpips.parameters()).device), self.side)
        *first, last = self.lpips.features(images)
        means = [layer.mean((2, 3)) for layer in first]
        return torch.cat([*means, F.adaptive_avg_pool2d(last, 2).flatten(1)], 1)


@dataclass(frozen=True)
class CaptionedImages:
    """The features of pictures, 4 kB each, with one or several captions each."""

    features: Tensor  # (N, d) float16
    captions: tuple[tuple[str, ...], ...]

    @classmethod
    def of(
        cls,
        batches: Iterable[tuple[Tensor, Sequence[Sequence[str]]]],
        extractor: Callable[[Tensor], Tensor],
    ) -> "CaptionedImages":
        """From batches of images (B, C, H, W) in [-1, 1] and the captions of each; the images are
        not kept.

        Args:
            extractor: images, rounded to 8 bits -> features (B, d), see `ImageFeatures`.

        Raises:
            DataError: there is no picture, or one has no caption.
        """
        features: list[Tensor] = []
        captions: list[tuple[str, ...]] = []
        for images, texts in batches:
            if len(images) != len(texts) or not all(texts):
                raise DataError(
                    f"{len(images)} pictures have captions of {sum(map(bool, texts))}: give each "
                    "at least one caption"
                )
            features.append(extractor(rounded(images)).cpu().half())
            captions += [tuple(own) for own in texts]
        if not features:
            raise DataError("there is no picture with a caption to measure retrieval on")
        return cls(torch.cat(features), tuple(captions))

    def __len__(self) -> int:
        return len(self.features)

    @property
    def first_captions(self) -> list[str]:
        """The first caption of every picture."""
        return [own[0] for own in self.captions]


# -------------------------------------------------------------------------------------------------
# The scorer

END, VOCAB_SIZE = 257, 258  # 0 is padding, then come the 256 bytes


class ByteConvolutions(nn.Module):
    """Texts -> vectors (B, dim): convolutions of several widths over the bytes, each followed by
    the maximum over the text (Kim et al., 1508.06615), then two linear layers."""

    widths = (1, 3, 5, 7)  # bytes
    channels, embedding_dim = 128, 64

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, self.embedding_dim, padding_idx=0)
        self.convs = nn.ModuleList(
            nn.Conv1d(self.embedding_dim, self.channels, width, padding="same")
            for width in self.widths
        )
        hidden = self.channels * len(self.widths)
        self.head = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, dim)
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
    """Pictures and captions as unit vectors; their scalar product is the score.

    Args:
        train: training pictures, whose mean and standard deviation normalise the features.
    """

    dim = 128

    def __init__(self, train: CaptionedImages) -> None:
        super().__init__()
        features = train.features.float()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("std", features.std(0, unbiased=False).clamp(min=1e-3))
        self.mean: Tensor
        self.std: Tensor
        self.image = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(features.shape[1], 512),
            nn.GELU(),
            nn.Dropout(0.5),
            nn.Linear(512, self.dim),
        )
        self.text = ByteConvolutions(self.dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.training_record: dict[str, Any] = {}  # settings of its training, for the protocol

    def embed_images(self, features: Tensor, noise: Tensor | None = None) -> Tensor:
        """Unit vectors (N, dim) of features (N, d); noise (N, d) is added to the normalised
        features."""
        x = (features.to(self.mean.device).float() - self.mean) / self.std
        if noise is not None:
            x = x + noise.to(x.device)
        return F.normalize(self.image(x), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, dim) of texts."""
        return F.normalize(self.text(texts), dim=1)

    def forward(
        self,
        features: Tensor,
        captions: Sequence[str],
        texts: Sequence[str],
        noise: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch: the cross-entropy of the right caption for every picture and of the
        right picture for every caption.

        Args:
            captions: B of them; equal ones are not negatives of each other.
            texts: the captions as they are embedded, for example without some words.
        """
        scale = self.log_scale.exp().clamp(max=100)
        logits = scale * self.embed_images(features, noise) @ self.embed_texts(texts).T  # (B, B)
        number = {text: i for i, text in enumerate(captions)}
        same = torch.tensor([number[text] for text in captions], device=logits.device)
        others = (same[:, None] == same) & ~torch.eye(
            len(same), dtype=torch.bool, device=same.device
        )
        logits = logits.masked_fill(others, -torch.inf)
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    @torch.no_grad()
    def accuracy(
        self, features: Tensor, texts: Sequence[str], pool: Sequence[str], candidates: int
    ) -> float:
        """The expected share of pictures whose right caption has the highest score among
        `candidates` captions: the right one, and others drawn from `pool` without replacement. The
        expectation over the draws is computed, not sampled: if L of the M other captions have a
        lower score, it is C(L, candidates - 1) / C(M, candidates - 1).

        Args:
            features: (N, d) of the pictures.
            texts: N right captions, each of `pool`.
            pool: different captions.
        """
        self.eval()
        place = {text: i for i, text in enumerate(pool)}
        right = torch.tensor([place[text] for text in texts])
        vectors = torch.cat([self.embed_texts(pool[i : i + 256]) for i in range(0, len(pool), 256)])
        shares = []
        for part, rows in zip(features.split(256), right.split(256), strict=True):
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

NOISE = 0.3  # standard deviations of the features
LEFT_OUT = 0.3  # probability of a word


def train_scorer(
    train: CaptionedImages,
    *,
    generator: torch.Generator,
    epochs: int,
    batch_size: int = 256,
    peak_learning_rate: float = 2e-3,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] = lambda steps: None,
) -> RetrievalScorer:
    """Train on pictures and captions. Against overfitting, noise is added to the features, and
    words of a caption are left out. Reproducible: all random numbers come from `generator`, on the
    CPU (those of dropout from a seed that it gives).

    Args:
        progress: called with 1 after every step.
    """
    cuda = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # initial weights and dropout use the global state
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = RetrievalScorer(train).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak_learning_rate, weight_decay=0.1)
        steps = epochs * math.ceil(len(train) / batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_learning_rate, steps)
        model.train()
        for _ in range(epochs):
            order = torch.randperm(len(train), generator=generator)
            for rows in order.split(batch_size):
                features = train.features[rows]
                noise = NOISE * torch.randn(features.shape, generator=generator)
                captions = [_one_of(train.captions[row], generator) for row in rows.tolist()]
                texts = [_with_fewer_words(text, generator) for text in captions]
                loss = model(features, captions, texts, noise)
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
        "seed": generator.initial_seed(),
    }
    return model.eval()


def _one_of(captions: Sequence[str], generator: torch.Generator) -> str:
    return captions[int(torch.randint(len(captions), (), generator=generator))]


def _with_fewer_words(text: str, generator: torch.Generator) -> str:
    """Each word is left out with a probability, but not all of them."""
    words = text.split()
    kept = torch.rand(len(words), generator=generator) >= LEFT_OUT
    return " ".join(w for w, keep in zip(words, kept.tolist(), strict=True) if keep) or text


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
        "features": f"AlexNet in LPIPS at {ImageFeatures.side} px, bicubic",
    }
    values = {
        "samples": scorer.accuracy(samples.features, asked, pool, candidates),
        "heldout": scorer.accuracy(heldout.features, heldout.first_captions, pool, candidates),
        "shuffled": scorer.accuracy(samples.features, wrong, pool, candidates),
    }
    counts = {"samples": len(samples), "heldout": len(heldout), "shuffled": len(samples)}
    return {
        f"retrieval_accuracy_{name}": Metric(value, {**base, "pictures": counts[name]})
        for name, value in values.items()
    }
