"""Multi-scale residual vector quantization (VAR, Tian et al., 2404.02905, algorithms 1 and 2).

The tokenizer of next-scale prediction. Features f are encoded coarse to fine: scale k quantizes the
residual that the scales before it left, averaged over h_k x w_k cells,

    r_k = area(f - sum_{j<k} f_j),   codes_k = nearest(r_k),   f_k = phi_k(upsample(e[codes_k])),

and all scales share one codebook e. phi_k is a convolution.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import ConfigurationError
from smalti.tokenizer.quantizers import QuantizerConfig
from smalti.tokenizer.quantizers.base import Estimator, Grids, Quantized, as_maps, as_rows, estimate
from smalti.tokenizer.quantizers.codebook import CodebookConfig, CodebookQuantizer

# Which of the shared convolutions each scale uses, by (scales, convolutions). VAR computes this for
# 10 scales and 4 convolutions by a rule with ties, which depend on rounding errors, so the result
# is stored here.
PUBLISHED_SHARING = {(10, 4): (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)}

# The last side of VAR's scales -> its scales at that side (256 and 512 px).
PUBLISHED_SIDES = {
    16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    32: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}


@dataclass(frozen=True)
class MultiScaleConfig(QuantizerConfig):
    """Scales and codebook; VAR has ten scales at 256 px, and 4096 codes of 32 numbers."""

    # May change without changing what saved weights mean.
    NON_ARCHITECTURE_FIELDS: ClassVar[tuple[str, ...]] = (
        "commitment_weight",
        "estimator",
        "scale_dropout",
        "scale_dropout_keeps",
    )

    kind: Literal["multi-scale"] = "multi-scale"  # the kind of quantizer
    codebook: CodebookConfig = field(
        default_factory=lambda: CodebookConfig(4096, 32, l2_normalise=False)
    )
    # (h, w) of every scale, coarse to fine; the last one is the grid of the encoder.
    scales: tuple[tuple[int, int], ...] = tuple((s, s) for s in PUBLISHED_SIDES[16])
    convolutions: int = 4  # shared by the scales: 1 = one for all, as many as scales = one each
    # Index of the convolution of each scale; empty = evenly. Some of the convolutions may stay
    # unused, as by VAR's rule for few scales.
    sharing: tuple[int, ...] = ()
    residual_ratio: float = 0.5  # r of phi(x) = (1 - r) x + r conv(x)
    commitment_weight: float = 0.25  # of the distance of features to their codes
    estimator: Estimator = "straight-through"  # how gradients pass the quantization
    scale_dropout: float = 0.0  # probability that an image keeps its first scales only
    scale_dropout_keeps: int = 3  # first scales that are never dropped (XQ-GAN)

    def __post_init__(self) -> None:
        if not self.scales or any(min(scale) < 1 for scale in self.scales):
            raise ConfigurationError(
                f"scales is {self.scales}; give at least one (h, w), sides >= 1"
            )
        last = self.scales[-1]
        if any(h > last[0] or w > last[1] for h, w in self.scales):
            raise ConfigurationError(
                f"the last scale, {last}, must be the largest; scales: {self.scales}"
            )
        count = len(self.scales)
        if self.convolutions < 1 or (self.convolutions > count and not self.sharing):
            raise ConfigurationError(
                f"convolutions is {self.convolutions}; use 1 to {count}, the scales"
            )
        if self.sharing and (
            len(self.sharing) != count or not {*self.sharing} <= {*range(self.convolutions)}
        ):
            raise ConfigurationError(
                f"sharing is {self.sharing}; give one number below {self.convolutions} for each of"
                f" the {count} scales"
            )
        if not 0 <= self.scale_dropout <= 1 or not 0 <= self.residual_ratio <= 1:
            raise ConfigurationError("scale_dropout and residual_ratio must lie in [0, 1]")
        if self.scale_dropout_keeps < 1 or self.commitment_weight < 0:
            raise ConfigurationError(
                "scale_dropout_keeps must be 1 or more, commitment_weight 0 or more"
            )

    def stretched(self, last: tuple[int, int]) -> Grids:
        """As many scales that end with another grid: VAR's where they are VAR's, otherwise sides
        that grow by the same powers."""
        published = {
            side: tuple((s, s) for s in all_of) for side, all_of in PUBLISHED_SIDES.items()
        }
        if self.scales in published.values() and last[0] == last[1] and last[0] in published:
            return published[last[0]]
        stretched = (
            tuple(_stretched([scale[axis] for scale in self.scales], last[axis]))
            for axis in range(2)
        )
        return tuple(zip(*stretched, strict=True))

    @property
    def shared_out(self) -> tuple[int, ...]:
        """Index of the convolution of each scale."""
        count, available = len(self.scales), self.convolutions
        published = PUBLISHED_SHARING.get((count, available))
        even = tuple(k * available // count for k in range(count))
        return self.sharing or published or even


def _stretched(sides: list[int], last: int) -> list[int]:
    """Sides s^p, rounded, with the p that leads from their last one to `last`: 1 stays 1."""
    if sides[-1] == 1:
        return [last if side == sides[-1] else side for side in sides]
    power = math.log(last) / math.log(sides[-1])
    return [*(max(1, round(side**power)) for side in sides[:-1]), last]


class ResidualConvolution(nn.Module):
    """phi(x) = (1 - r) x + r conv(x): restores detail after up-sampling."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, d, h, w)
        convolved = self.conv(x.to(self.conv.weight.dtype)).to(x.dtype)
        return (1 - self.ratio) * x + self.ratio * convolved


class MultiScaleQuantizer(CodebookQuantizer):
    """Approximates features (B, d, H, W) by the sum of f_k over scales.

    H and W are the sides of the last scale, which is the latent grid of the encoder.
    """

    Config: ClassVar[type] = MultiScaleConfig

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__(config.codebook)
        self.config = config
        self.residual_convs = nn.ModuleList(
            ResidualConvolution(self.dim, config.residual_ratio) for _ in range(config.convolutions)
        )

    @property
    def lengths(self) -> list[int]:
        """Codes per scale."""
        return [h * w for h, w in self.config.scales]

    def grids(self, height: int, width: int) -> Grids:
        """The (h, w) of every scale, coarse to fine.

        Raises:
            ConfigurationError: the last one is not the grid of the features.
        """
        if self.config.scales[-1] != (height, width):
            raise ConfigurationError(
                f"the last scale is {self.config.scales[-1]}, but the encoder makes a "
                f"{height} x {width} grid: make them equal"
            )
        return self.config.scales

    # -- one scale ------------------------------------------------------------------------------

    def _cells(self, maps: Tensor, scale: int) -> Tensor:
        """Maps (B, d, H, W) averaged over the cells of a scale, as rows (B h_k w_k, d)."""
        if scale < len(self.config.scales) - 1:
            maps = F.interpolate(maps, self.config.scales[scale], mode="area")
        return as_rows(maps)

    def _place(self, vectors: Tensor, batch: int, scale: int) -> Tensor:
        """Vectors (B h_k w_k, d) of a scale -> f_k = phi_k(upsample(vectors)), (B, d, H, W)."""
        maps = as_maps(vectors, batch, *self.config.scales[scale])
        if scale < len(self.config.scales) - 1:
            maps = F.interpolate(maps, self.config.scales[-1], mode="bicubic")
        return self.residual_convs[self.config.shared_out[scale]](maps)

    def contribution(self, codes: Tensor, scale: int) -> Tensor:
        """f_k, what the codes (B, h_k w_k) of one scale add to the sum, (B, d, H, W) fp32."""
        with torch.autocast(codes.device.type, enabled=False):
            return self._place(self.codebook.lookup(codes.flatten()), len(codes), scale)

    # -- training -------------------------------------------------------------------------------

    def sample_random_inputs(
        self, count: int, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Scale dropout: `kept_scales` (B,), how many scales each image keeps."""
        config, scales = self.config, len(self.config.scales)
        if not config.scale_dropout or scales <= config.scale_dropout_keeps:
            return {}
        options = {"generator": generator, "device": generator and generator.device}
        fewer = torch.randint(config.scale_dropout_keeps, scales, (count,), **options)
        dropped = torch.rand(count, **options) < config.scale_dropout
        return {"kept_scales": torch.where(dropped, fewer, scales)}

    def forward(self, features: Tensor, kept_scales: Tensor | None = None) -> Quantized:
        """The differentiable pass over features (B, d, H, W).

        Args:
            kept_scales: (B,), as `sample_random_inputs` gives it; None: sampled here, from torch's
                global generator. Without effect in eval mode, which keeps all scales.
        """
        with torch.autocast(features.device.type, enabled=False):
            return self._quantize(features.float(), kept_scales)

    def _quantize(self, features: Tensor, kept_scales: Tensor | None = None) -> Quantized:
        batch, device = len(features), features.device
        if self.training and kept_scales is None:
            kept_scales = self.sample_random_inputs(batch, None).get("kept_scales")
        if not self.training or kept_scales is None:
            kept_scales = torch.full((batch,), len(self.config.scales))
        kept_scales = kept_scales.to(device)  # (B,)
        residual, total = features.detach(), torch.zeros_like(features)  # (B, d, H, W)
        cells, codes, losses = [], [], []
        for scale in range(len(self.config.scales)):
            rows = self.codebook.normalise(self._cells(residual, scale))
            found = self.codebook.search(rows)  # (B h_k w_k,)
            kept = (kept_scales > scale)[:, None, None, None]  # (B, 1, 1, 1)
            added = self._place(self.codebook.lookup(found), batch, scale) * kept
            total = total + added
            residual = residual - added.detach()
            cells.append(rows.view(batch, -1, self.dim))
            codes.append(found.view(batch, -1))
            losses.append(self._losses(features, total, kept))
        all_codes = torch.cat(codes, 1)  # (B, L)
        if self.training:
            lengths = torch.tensor(self.lengths, device=device)
            scale_of = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
            used = kept_scales[:, None] > scale_of  # (B, L)
            # Image by image, so that the order is the same on any number of processes.
            rows = torch.cat(cells, 1).flatten(0, 1)  # (B L, d)
            self.codebook.collect(rows, all_codes.flatten(), used.flatten())
        mean = {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}
        return Quantized(estimate(self.config.estimator, features, total), all_codes, mean)

    def _losses(self, features: Tensor, total: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """Commitment and codebook loss of the sum so far (B, d, H, W); dropped images count 0."""

        def distance(a: Tensor, b: Tensor) -> Tensor:
            return ((a - b).square() * kept).mean()

        commitment = self.config.commitment_weight * distance(features, total.detach())
        # Even where the codebook learns by running means: the convolutions learn from this loss.
        return {"commitment": commitment, "codebook": distance(total, features.detach())}

    # -- codes ----------------------------------------------------------------------------------

    def _search(self, features: Tensor) -> Tensor:
        residual, codes = features, []
        for scale in range(len(self.config.scales)):
            found = self.codebook.search(self.codebook.normalise(self._cells(residual, scale)))
            codes.append(found.view(len(features), -1))  # (B, h_k w_k)
            residual = residual - self.contribution(codes[-1], scale)
        return torch.cat(codes, 1)

    def _lookup(self, codes: Tensor, height: int, width: int) -> Tensor:
        del height, width  # those of the last scale
        return self.lookup_first(codes, len(self.config.scales))

    def lookup_first(self, codes: Tensor, scales: int) -> Tensor:
        """The sum (B, d, H, W) over the first `scales` scales only: a progressive preview.

        Args:
            codes: (B, L) of all scales, or of at least the first ones.
        """
        lengths, total = self.lengths[:scales], self._blank(codes)
        for scale, part in enumerate(codes[:, : sum(lengths)].split_with_sizes(lengths, 1)):
            total = total + self.contribution(part, scale)
        return total

    def _blank(self, codes: Tensor) -> Tensor:
        height, width = self.config.scales[-1]
        return torch.zeros(len(codes), self.dim, height, width, device=codes.device)

    # -- inputs of a next-scale prior -----------------------------------------------------------

    def place(self, vectors: Tensor, scale: int) -> Tensor:
        """What vectors (B, h_k w_k, d) at one scale add to the sum, (B, d, H, W) fp32."""
        with torch.autocast(vectors.device.type, enabled=False):
            return self._place(vectors.flatten(0, 1), len(vectors), scale)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Codes (B, n) of the codebook vectors nearest to (B, n, d)."""
        with torch.autocast(vectors.device.type, enabled=False):
            rows = self.codebook.normalise(vectors.flatten(0, 1))
            return self.codebook.search(rows).view(vectors.shape[:2])

    def scale_input(self, total: Tensor, scale: int) -> Tensor:
        """Input of a prior that predicts a scale: the sum of the scales before it, on its grid.

        Args:
            total: (B, d, H, W).

        Returns:
            (B, h_k w_k, d).
        """
        return self._cells(total, scale).view(len(total), -1, self.dim)

    def next_scale_inputs(self, codes: Tensor) -> Tensor:
        """Teacher forcing: the inputs of scales 1, 2, ... concatenated, (B, L - h_0 w_0, d).

        Equal to what `scale_input` gives step by step while decoding.
        """
        parts = codes.split_with_sizes(self.lengths, 1)
        total, inputs = self._blank(codes), [codes.new_zeros(len(codes), 0, self.dim).float()]
        for scale in range(1, len(parts)):
            total = total + self.contribution(parts[scale - 1], scale - 1)
            inputs.append(self.scale_input(total, scale))
        return torch.cat(inputs, 1)
