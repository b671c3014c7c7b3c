"""Spectral normalisation (Miyato et al., 1802.05957): convolutions that cannot grow.

torch's own takes a power iteration in every forward pass of training, so that what a critic
computes depends on how often it was asked. Here the iteration is a step of its own, taken once per
optimizer step: gradient accumulation and second derivatives see one fixed estimate, in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STARTING_ITERATIONS = 15


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight, as a matrix (out, in * k * k), is divided by its largest
    singular value sigma, estimated as u^T W v (eq. 8 and algorithm 1)."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, padding)
        rows, columns = self.weight.flatten(1).shape
        self.register_buffer("u", F.normalize(torch.randn(rows), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(columns), dim=0))
        self.u: Tensor
        self.v: Tensor
        for _ in range(STARTING_ITERATIONS):
            self.advance()

    @torch.no_grad()
    def advance(self) -> None:
        """One power iteration: u and v come closer to the largest singular vectors."""
        matrix = self.weight.float().flatten(1)
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))
        self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))

    def normalised_weight(self) -> Tensor:
        """W / sigma, fp32; gradients pass through both."""
        with torch.autocast(self.weight.device.type, enabled=False):
            # Copies: a graph that is still to be walked must not see the next iteration.
            u, v = self.u.clone(), self.v.clone()
            return self.weight / (u @ (self.weight.flatten(1) @ v))

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.normalised_weight(), self.bias)


def advance_spectral_norms(network: nn.Module) -> None:
    """One power iteration in every spectrally normalised layer of a network."""
    for module in network.modules():
        if isinstance(module, SpectralConv2d):
            module.advance()
