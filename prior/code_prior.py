"""What priors over discrete codes share."""

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.prior.base import Prior


class CodePrior(Prior):
    """A distribution over codes that gives the probability of each."""

    @abstractmethod
    def logits(self, codes: Tensor, condition: Any) -> Tensor:
        """Teacher-forced logits (B, L, V) of codes (B, L) given a condition."""

    @torch.no_grad()
    def bits_per_dimension(
        self, latents: Tensor, condition: Any, *, generator: object = None
    ) -> Tensor:
        """-log2 p(codes | condition) per code, (B,), exact: no generator is needed."""
        del generator
        with self.evaluating():
            logits = self.logits(latents, condition).float()
        nats = F.cross_entropy(logits.transpose(1, 2), latents, reduction="none")  # (B, L)
        return nats.mean(1) / math.log(2)
