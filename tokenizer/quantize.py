"""Vector quantization: continuous features -> the nearest entries of a learned codebook.

VQ-VAE (van den Oord et al., 1711.00937), with l2-normalised low-dimensional codes (ViT-VQGAN,
2110.04627) and revival of dead codes. Pure: no encoder, no decoder; a prior may own a copy.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import SmaltiError

SEARCH_ELEMENTS = 2**24  # scores held at once in the nearest-code search: 64 MB in fp32


@dataclass
class Quantized:
    """One pass through a quantizer."""

    latents: Tensor  # (B, d, h, w): codebook vectors, gradients pass straight through
    codes: Tensor  # (B, h, w) int64
    codebook_loss: Tensor  # scalar: pulls codes towards features
    commitment_loss: Tensor  # scalar, not yet weighted: pulls features towards codes


class VectorQuantizer(nn.Module):
    """A codebook of `vocab_size` vectors of `dim` numbers, learned by gradient descent.

    Args:
        vocab_size: number of codes, V.
        dim: numbers per code, d.
        l2_normalise: compare and return unit vectors (cosine similarity).
        revive_after: optimizer steps without a hit after which a code is dead and is replaced by
            a random feature of the current batch; 0 never revives.

    All arithmetic is in fp32, also under autocast: in bf16 6 % of features change their code.
    """

    def __init__(self, vocab_size: int, dim: int, l2_normalise: bool, revive_after: int) -> None:
        super().__init__()
        self.l2_normalise = l2_normalise
        self.revive_after = revive_after
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / vocab_size, 1 / vocab_size)
        if l2_normalise:
            nn.init.normal_(self.embedding.weight)
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)
        # Steps since each code was last used. It starts at the limit: codes that the first batch
        # does not hit are drawn from that batch, so the codebook begins where the data are.
        self.register_buffer("idle_steps", torch.full((vocab_size,), revive_after))
        self.idle_steps: Tensor
        self._pending_counts: Tensor | None = None  # (V,) hits since the last accepted step
        self._pending_features: list[Tensor] = []  # (N, d) each: candidates for revival

    @property
    def vocab_size(self) -> int:
        return self.embedding.num_embeddings

    @property
    def codebook(self) -> Tensor:
        """The vectors that codes stand for, (V, d)."""
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=-1) if self.l2_normalise else weight

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) in [0, V) -> vectors (B, d, h, w)."""
        vectors = F.embedding(codes, self.embedding.weight).float()
        if self.l2_normalise:
            vectors = F.normalize(vectors, dim=-1)
        return vectors.movedim(-1, 1)

    def features(self, z: Tensor) -> Tensor:
        """Encoder output (B, d, h, w) as it is compared with the codebook, fp32."""
        return F.normalize(z.float(), dim=1) if self.l2_normalise else z.float()

    @torch.no_grad()
    def search(self, z: Tensor) -> Tensor:
        """Encoder output (B, d, h, w) -> codes (B, h, w) of the nearest vectors."""
        features = self.features(z).movedim(1, -1)  # (B, h, w, d)
        flat = features.reshape(-1, features.shape[-1])
        return nearest_codes(flat, self.codebook).view(features.shape[:-1])

    def forward(self, z: Tensor) -> Quantized:  # (B, d, h, w)
        with torch.autocast(z.device.type, enabled=False):
            features = self.features(z)
            codes = self.search(z)
            vectors = self.lookup(codes)
            if self.training:
                self._collect(features.detach(), codes)
            return Quantized(
                latents=features + (vectors - features).detach(),  # straight-through estimator
                codes=codes,
                codebook_loss=F.mse_loss(vectors, features.detach()),  # |sg z - e|^2
                commitment_loss=F.mse_loss(features, vectors.detach()),  # |z - sg e|^2
            )

    def _collect(self, features: Tensor, codes: Tensor) -> None:
        counts = torch.bincount(codes.flatten(), minlength=self.vocab_size)
        pending = self._pending_counts
        self._pending_counts = counts if pending is None else pending + counts
        self._pending_features.append(features.movedim(1, -1).flatten(0, -2))  # (N, d)

    def discard_step(self) -> None:
        """Forget hits and candidates of a step whose update was skipped."""
        self._pending_counts, self._pending_features = None, []

    @torch.no_grad()
    def after_step(self, generator: torch.Generator) -> None:
        """Age the codes over all processes, then replace the dead ones by features of this step.

        `generator` is a CPU generator, equal on all processes.
        """
        counts, candidates = self._pending_counts, self._pending_features
        self.discard_step()
        if counts is None or not self.revive_after:
            return
        if dist.is_initialized():
            dist.all_reduce(counts)
        self.idle_steps.copy_(torch.where(counts > 0, 0, self.idle_steps + 1))
        dead = (self.idle_steps > self.revive_after).nonzero().flatten()
        # The number of dead codes is the same everywhere: so is the decision to communicate.
        if len(dead):
            fresh = _draw(torch.cat(candidates), len(dead), generator)
            self.embedding.weight[dead] = fresh.to(self.embedding.weight.dtype)
            self.idle_steps[dead] = 0


def _draw(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows of the features (N, d) of all processes laid end to end, the same on each."""
    size = len(features)
    distributed = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    choice = torch.randint(world * size, (count,), generator=generator).to(features.device)
    mine = choice // size == rank
    rows = torch.where(mine[:, None], features[choice % size], 0.0)
    if distributed:
        dist.all_reduce(rows)
    return rows


def nearest_codes(features: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook vector with the least Euclidean distance to each feature.

    Args:
        features: (N, d).
        codebook: (V, d).

    Returns:
        (N,) int64. |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 does not matter; features are
        taken in chunks so that memory is bounded whatever N and V.
    """
    if features.shape[-1] != codebook.shape[-1]:
        raise SmaltiError(
            f"features have {features.shape[-1]} numbers each but codes have {codebook.shape[-1]}"
        )
    half_norms = codebook.square().sum(-1) / 2  # (V,)
    chunk = max(1, SEARCH_ELEMENTS // len(codebook))
    return torch.cat(
        [
            torch.addmm(half_norms, part, codebook.T, alpha=-1).argmin(-1)
            for part in features.split(chunk)
        ]
    )
