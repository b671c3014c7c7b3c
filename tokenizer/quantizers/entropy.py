"""Entropy regularisation: each feature should be sure of its code, the batch should use them all.

L = E[H(p(. | z))] - gamma H(E[p(. | z)]), with p(k | z) ~ exp(-|z - e_k|^2 / T) (MAGVIT-v2,
2310.05737, eq. 6). The mean is over all processes.
"""

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smalti.distributed import mean_over_processes

TINY = 1e-20  # below this, probabilities count as 0
CHUNK_ELEMENTS = 2**24  # probabilities held at once: 64 MB in fp32


def entropy(probabilities: Tensor) -> Tensor:
    """-sum p log p over the last dimension, in nats; its gradient is finite where p is 0."""
    return -(probabilities * probabilities.clamp_min(TINY).log()).sum(-1)


def entropy_loss(
    features: Tensor, codebook: Tensor, temperature: float, diversity: float = 1.0
) -> Tensor:
    """The loss above for features (N, d) and a codebook (V, d), a scalar in nats.

    The (N, V) probabilities are made chunk by chunk, again in the backward pass.
    """

    def part(rows: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        scores = (2 * rows @ vectors.T - vectors.square().sum(-1)) / temperature
        p = scores.softmax(-1)
        return entropy(p).sum(), p.sum(0)

    chunk = max(1, CHUNK_ELEMENTS // len(codebook))
    own = features.new_zeros(())
    mean = features.new_zeros(len(codebook))
    for rows in features.split(chunk):
        entropies, probabilities = checkpoint(part, rows, codebook, use_reentrant=False)
        own, mean = own + entropies, mean + probabilities
    mean = mean_over_processes(mean / len(features))
    return own / len(features) - diversity * entropy(mean)
