"""A codebook: V vectors of d numbers, how they are compared, learned, and revived when dead.

EMA updates and the revival of dead codes are written here rather than taken from a library: they
use the features of all processes, run once per accepted optimizer step, and resume exactly.

    Codebook         learned by gradient descent on the codebook loss
    EMACodebook      running means of the features that chose each code
    SimVQCodebook    a fixed random table times one learned matrix
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.distributed import sum_over_processes, uniform_rows
from smalti.errors import ConfigurationError
from smalti.tokenizer.quantizers.base import Quantizer, nearest_codes

EMA_SMOOTHING = 1e-5  # pseudo-count of Laplace smoothing


@dataclass(frozen=True)
class CodebookConfig:
    """Sizes of a codebook, and how it learns; LlamaGen's has 16384 codes of 8 numbers.

    l2-normalised low-dimensional codes (ViT-VQGAN, 2110.04627) are the cheapest way to prevent
    codebook collapse.
    """

    # May change without changing what saved weights mean.
    NON_ARCHITECTURE_FIELDS: ClassVar[tuple[str, ...]] = ("ema_decay", "revive_after")

    vocab_size: int = 16384  # codes in the codebook, V
    code_dim: int = 8  # numbers per code, d
    l2_normalise: bool = True  # unit-length codes, compared by cosine
    # gradient: VQ-VAE's codebook loss. ema: running means of the features of each code.
    # simvq: a fixed random table times one learned matrix, which moves all codes together.
    learning: Literal["gradient", "ema", "simvq"] = "gradient"
    ema_decay: float = 0.99  # of the running means
    revive_after: int = 200  # steps unused until a code is replaced by a feature; 0 = never

    def __post_init__(self) -> None:
        if self.vocab_size < 2 or self.code_dim < 1:
            raise ConfigurationError(
                f"vocab_size {self.vocab_size} and code_dim {self.code_dim}: need at least 2 and 1"
            )
        if not 0 <= self.ema_decay < 1:
            raise ConfigurationError(f"ema_decay is {self.ema_decay}; it must lie in [0, 1)")
        if self.revive_after < 0:
            raise ConfigurationError(
                f"revive_after is {self.revive_after}; it must not be negative"
            )
        if self.learning == "simvq" and self.revive_after:
            raise ConfigurationError(
                "simvq moves all codes together and cannot revive single ones: set revive_after 0"
            )

    def build(self) -> "Codebook":
        """A new codebook of the class that `learning` names."""
        return {"gradient": Codebook, "ema": EMACodebook, "simvq": SimVQCodebook}[self.learning](
            self
        )


# -------------------------------------------------------------------------------------------------
# Gradient descent on |sg z - e|^2 (VQ-VAE, 1711.00937, eq. 3)


class Codebook(nn.Module):
    """Vectors learned by gradient descent on the codebook loss, which the quantizer adds."""

    learns_by_gradient = True

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self._make_table(self._initial_table())
        # Steps since each code was last used. It starts at the limit, so that codes which the
        # first batch does not use are replaced by features of that batch.
        self.register_buffer("idle_steps", torch.full((config.vocab_size,), config.revive_after))
        self.idle_steps: Tensor
        self.discard_step()

    def _initial_table(self) -> Tensor:
        size, dim = self.config.vocab_size, self.config.code_dim
        if self.config.l2_normalise:
            return F.normalize(torch.randn(size, dim), dim=-1)
        return torch.empty(size, dim).uniform_(-1 / size, 1 / size)

    def _make_table(self, table: Tensor) -> None:
        self.weight = nn.Parameter(table)  # (V, d)

    @property
    def vectors(self) -> Tensor:
        """The codebook vectors, (V, d) fp32."""
        return self.normalise(self.weight.float())

    def normalise(self, rows: Tensor) -> Tensor:
        """Rows (..., d) as they are compared with the codebook."""
        return F.normalize(rows, dim=-1) if self.config.l2_normalise else rows

    @torch.no_grad()
    def search(self, rows: Tensor) -> Tensor:
        """Normalised features (N, d) -> codes (N,) of the nearest vectors."""
        return nearest_codes(rows, self.vectors)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (...) in [0, V) -> vectors (..., d), fp32."""
        return self.normalise(F.embedding(codes, self.weight).float())

    # -- after an optimizer step: learning and revival ------------------------------------------

    def collect(self, rows: Tensor, codes: Tensor, used: Tensor | None = None) -> None:
        """Store the features (N, d) and codes (N,) of a training pass until the step ends.

        Args:
            used: (N,) bool, which of the codes count; None: all.
        """
        self._rows.append(rows.detach())
        self._codes.append(codes)
        self._used.append(torch.ones_like(codes, dtype=torch.bool) if used is None else used)

    def discard_step(self) -> None:
        """Discard what was collected."""
        self._rows: list[Tensor] = []  # candidates for revival
        self._codes: list[Tensor] = []
        self._used: list[Tensor] = []

    @torch.no_grad()
    def after_step(self, generator: torch.Generator) -> None:
        """Learn from the features of all processes, then replace dead codes by some of them."""
        if not self._codes:
            return
        rows, codes, used = map(torch.cat, (self._rows, self._codes, self._used))
        self.discard_step()
        counts = torch.bincount(codes[used], minlength=self.config.vocab_size)
        counts = sum_over_processes(counts)  # (V,)
        self._learn(rows[used], codes[used], counts)
        if not self.config.revive_after:
            return
        self.idle_steps.copy_(torch.where(counts > 0, 0, self.idle_steps + 1))
        dead = (self.idle_steps > self.config.revive_after).nonzero().flatten()
        # The number of dead codes is the same on all processes: all of them communicate or none.
        if len(dead):
            self._replace(dead, uniform_rows(rows, len(dead), generator))
            self.idle_steps[dead] = 0

    def _learn(self, rows: Tensor, codes: Tensor, counts: Tensor) -> None:
        del rows, codes, counts  # the optimizer updates the weights

    def _replace(self, dead: Tensor, rows: Tensor) -> None:
        self.weight[dead] = rows.to(self.weight.dtype)


# -------------------------------------------------------------------------------------------------
# Exponential moving averages: e_k = m_k / N_k (VQ-VAE, appendix A.1)


class EMACodebook(Codebook):
    """Each vector is the running mean of the features that chose it.

    Counts have Laplace smoothing; normalised codes are mean directions. The means are over the
    whole batch, whatever the number of processes, and stay as they are if a step is skipped.
    """

    learns_by_gradient = False

    def _make_table(self, table: Tensor) -> None:
        self.register_buffer("weight", table)  # (V, d)
        self.register_buffer("mean_counts", torch.ones(len(table)))  # N_k, (V,)
        self.register_buffer("mean_sums", table.clone())  # m_k, (V, d)
        self.weight: Tensor
        self.mean_counts: Tensor
        self.mean_sums: Tensor

    def _learn(self, rows: Tensor, codes: Tensor, counts: Tensor) -> None:
        sums = torch.zeros_like(self.mean_sums).index_add_(0, codes, rows.float())
        sums = sum_over_processes(sums)
        decay = self.config.ema_decay
        self.mean_counts.lerp_(counts.float(), 1 - decay)
        self.mean_sums.lerp_(sums, 1 - decay)
        # A code that is hardly ever used would otherwise divide by almost 0.
        total, size = self.mean_counts.sum(), self.config.vocab_size
        smoothed = (self.mean_counts + EMA_SMOOTHING) / (total + size * EMA_SMOOTHING) * total
        self.weight.copy_(self.normalise(self.mean_sums / smoothed[:, None]))

    def _replace(self, dead: Tensor, rows: Tensor) -> None:
        super()._replace(dead, rows)
        self.mean_counts[dead] = 1.0
        self.mean_sums[dead] = rows.float()


# -------------------------------------------------------------------------------------------------
# SimVQ: E = C W with C fixed and random and W learned (2411.02038)


class SimVQCodebook(Codebook):
    """One learned matrix moves all codes together, so that none stays unused."""

    def _make_table(self, table: Tensor) -> None:
        self.register_buffer("table", torch.randn_like(table))  # C, (V, d)
        self.table: Tensor
        self.transform = nn.Parameter(torch.eye(table.shape[1]))  # W, (d, d)

    @property
    def vectors(self) -> Tensor:
        """The codebook vectors, (V, d) fp32."""
        return self.normalise(self.table.float() @ self.transform.float())

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (...) in [0, V) -> vectors (..., d), fp32."""
        return self.normalise(F.embedding(codes, self.table).float() @ self.transform.float())


# -------------------------------------------------------------------------------------------------
# Quantizers with a learned codebook


class CodebookQuantizer(Quantizer):
    """A quantizer whose codes are the rows of one codebook, which is updated after each step."""

    def __init__(self, codebook: CodebookConfig) -> None:
        super().__init__()
        self.codebook = codebook.build()

    @property
    def vocab_size(self) -> int:
        return self.codebook.config.vocab_size

    @property
    def dim(self) -> int:
        return self.codebook.config.code_dim

    def after_step(self, generator: torch.Generator) -> None:
        self.codebook.after_step(generator)

    def discard_step(self) -> None:
        self.codebook.discard_step()
