"""Multi-scale residual vector quantization, the tokenizer of next-scale prediction (VAR, Tian et
al., 2404.02905, algorithms 1 and 2).

A map of features f is told coarse to fine: scale k quantizes what the scales before it left over,
looked at through h_k x w_k cells; all scales share one codebook.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import SmaltiError
from smalti.randomness import RandomInputs
from smalti.tokenizer.quantizers.base import Estimator, Grids, Quantized, as_maps, as_rows, estimate
from smalti.tokenizer.quantizers.codebook import CodebookConfig, CodebookQuantizer

# Where a scale's convolution lies among few shared ones (VAR): scale k uses convolution i. Its
# published map for 10 scales and 4 convolutions rests on ties that rounding in double precision
# breaks, so it is written down rather than computed.
PUBLISHED_SHARING = {(10, 4): (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)}


@dataclass(frozen=True)
class MultiScaleConfig:
    """Defaults: VAR's quantizer at 256 px."""

    # May change without changing what saved weights mean.
    NON_ARCHITECTURE_FIELDS: ClassVar[tuple[str, ...]] = (
        "commitment_weight",
        "estimator",
        "scale_dropout",
        "scale_dropout_keeps",
    )

    kind: Literal["multi-scale"] = "multi-scale"
    codebook: CodebookConfig = field(
        default_factory=lambda: CodebookConfig(4096, 32, l2_normalise=False)
    )
    # (h, w) of every scale, coarse to fine; the last one is the grid of the encoder.
    scales: tuple[tuple[int, int], ...] = tuple((s, s) for s in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    convolutions: int = 4  # shared out among the scales: 1 = one for all; as many as scales = own
    # Which convolution each scale uses; empty = evenly. A list may leave some of them unused, as
    # VAR's rule does for few scales.
    sharing: tuple[int, ...] = ()
    residual_ratio: float = 0.5  # phi(x) = (1 - r) x + r conv(x)
    commitment_weight: float = 0.25
    estimator: Estimator = "straight-through"
    scale_dropout: float = 0.0  # probability that a picture is told by its first scales only
    scale_dropout_keeps: int = 3  # scales that are never dropped (XQ-GAN)

    def __post_init__(self) -> None:
        if not self.scales or any(min(scale) < 1 for scale in self.scales):
            raise SmaltiError(f"scales is {self.scales}; give at least one (h, w), sides >= 1")
        last = self.scales[-1]
        if any(h > last[0] or w > last[1] for h, w in self.scales):
            raise SmaltiError(f"the last scale, {last}, must be the largest; scales: {self.scales}")
        count = len(self.scales)
        if self.convolutions < 1 or (self.convolutions > count and not self.sharing):
            raise SmaltiError(f"convolutions is {self.convolutions}; use 1 to {count}, the scales")
        if self.sharing and (
            len(self.sharing) != count or not {*self.sharing} <= {*range(self.convolutions)}
        ):
            raise SmaltiError(
                f"sharing is {self.sharing}; give one number below {self.convolutions} for each of"
                f" the {count} scales"
            )
        if not 0 <= self.scale_dropout <= 1 or not 0 <= self.residual_ratio <= 1:
            raise SmaltiError("scale_dropout and residual_ratio must lie in [0, 1]")
        if self.scale_dropout_keeps < 1 or self.commitment_weight < 0:
            raise SmaltiError("scale_dropout_keeps must be 1 or more, commitment_weight 0 or more")

    @property
    def shared_out(self) -> tuple[int, ...]:
        """Number of the convolution of each scale."""
        count, available = len(self.scales), self.convolutions
        published = PUBLISHED_SHARING.get((count, available))
        even = tuple(k * available // count for k in range(count))
        return self.sharing or published or even


class ResidualConvolution(nn.Module):
    """phi(x) = (1 - r) x + r conv(x): mends what up-sampling blurs."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, d, h, w)
        mended = self.conv(x.to(self.conv.weight.dtype)).to(x.dtype)
        return (1 - self.ratio) * x + self.ratio * mended


class MultiScaleQuantizer(CodebookQuantizer):
    """Features (B, d, H, W) = sum over scales of phi_k(upsample(vectors of codes_k)), about."""

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
        """The scales.

        Raises:
            SmaltiError: the last one is not the grid of the features.
        """
        if self.config.scales[-1] != (height, width):
            raise SmaltiError(
                f"the last scale is {self.config.scales[-1]}, but the encoder makes a "
                f"{height} x {width} grid: make them equal"
            )
        return self.config.scales

    # -- one scale ------------------------------------------------------------------------------

    def contribution(self, codes: Tensor, scale: int) -> Tensor:
        """What the codes (B, h_k w_k) of one scale add to the sum, (B, d, H, W) fp32."""
        with torch.autocast(codes.device.type, enabled=False):
            return self._place(self.codebook.lookup(codes.flatten()), len(codes), scale)

    def _place(self, vectors: Tensor, batch: int, scale: int) -> Tensor:
        maps = as_maps(vectors, batch, *self.config.scales[scale])
        if scale < len(self.config.scales) - 1:
            maps = F.interpolate(maps, self.config.scales[-1], mode="bicubic")
        return self.residual_convs[self.config.shared_out[scale]](maps)

    def _cells(self, maps: Tensor, scale: int) -> Tensor:
        """Maps (B, d, H, W) seen through the cells of a scale, as rows (B h_k w_k, d)."""
        if scale < len(self.config.scales) - 1:
            maps = F.interpolate(maps, self.config.scales[scale], mode="area")
        return as_rows(maps)

    # -- training -------------------------------------------------------------------------------

    def sample_random_inputs(
        self, count: int, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """For scale dropout: how many scales would be kept, and the chance to drop any, (B,)."""
        config, scales = self.config, len(self.config.scales)
        if not config.scale_dropout or scales <= config.scale_dropout_keeps:
            return {}
        options = {"generator": generator, "device": generator and generator.device}
        fewer = torch.randint(config.scale_dropout_keeps, scales, (count,), **options)
        return {"fewer_scales": fewer, "scale_dropout": torch.rand(count, **options)}

    def _quantize(self, features: Tensor, random_inputs: RandomInputs | None) -> Quantized:
        batch, scales = len(features), range(len(self.config.scales))
        kept = self._kept_scales(features, random_inputs)  # (B,)
        rest, total = features.detach(), torch.zeros_like(features)
        cells, codes, losses = [], [], []
        for scale in scales:
            rows = self.codebook.normalise(self._cells(rest, scale))
            found = self.codebook.search(rows)
            heard = (kept > scale)[:, None, None, None]
            added = self._place(self.codebook.lookup(found), batch, scale) * heard
            total = total + added
            rest = rest - added.detach()
            cells.append(rows.view(batch, -1, self.dim))
            codes.append(found.view(batch, -1))
            losses.append(self._loss(features, total, heard))
        all_codes = torch.cat(codes, 1)  # (B, L)
        if self.training:
            lengths = torch.tensor(self.lengths, device=kept.device)
            scale_of = torch.arange(len(lengths), device=kept.device).repeat_interleave(lengths)
            used = kept[:, None] > scale_of  # (B, L)
            # Picture by picture, so that the order is the same on any number of processes.
            rows = torch.cat(cells, 1).flatten(0, 1)
            self.codebook.collect(rows, all_codes.flatten(), used.flatten())
        mean = {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}
        return Quantized(estimate(self.config.estimator, features, total), all_codes, mean)

    def _kept_scales(self, features: Tensor, random_inputs: RandomInputs | None) -> Tensor:
        """How many scales tell each picture, (B,): all, or by chance fewer in training."""
        kept = torch.full((len(features),), len(self.config.scales), device=features.device)
        if self.training and random_inputs is None:
            random_inputs = self.sample_random_inputs(len(features), None)
        if not self.training or not random_inputs:
            return kept
        dropped = random_inputs["scale_dropout"].to(kept.device) < self.config.scale_dropout
        return torch.where(dropped, random_inputs["fewer_scales"].to(kept.device), kept)

    def _loss(self, features: Tensor, total: Tensor, heard: Tensor) -> dict[str, Tensor]:
        """Both sides of the VQ loss for the sum so far; pictures without this scale add nothing."""

        def distance(a: Tensor, b: Tensor) -> Tensor:
            return ((a - b).square() * heard).mean()

        commitment = self.config.commitment_weight * distance(features, total.detach())
        # Also with running means: the convolutions learn from it.
        return {"commitment": commitment, "codebook": distance(total, features.detach())}

    # -- codes ----------------------------------------------------------------------------------

    def _search(self, features: Tensor) -> Tensor:
        rest, codes = features, []
        for scale in range(len(self.config.scales)):
            found = self.codebook.search(self.codebook.normalise(self._cells(rest, scale)))
            codes.append(found.view(len(features), -1))
            rest = rest - self.contribution(codes[-1], scale)
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

    # -- what a next-scale prior reads -----------------------------------------------------------

    def place(self, vectors: Tensor, scale: int) -> Tensor:
        """What vectors (B, h_k w_k, d) at one scale add to the sum, (B, d, H, W) fp32."""
        with torch.autocast(vectors.device.type, enabled=False):
            return self._place(vectors.flatten(0, 1), len(vectors), scale)

    def scale_input(self, total: Tensor, scale: int) -> Tensor:
        """What a prior sees before it predicts a scale: the sum (B, d, H, W) of the scales before
        it, through the cells of this one, (B, h_k w_k, d)."""
        return self._cells(total, scale).view(len(total), -1, self.dim)

    def next_scale_inputs(self, codes: Tensor) -> Tensor:
        """Teacher forcing: the inputs of scales 1, 2, ... laid end to end, (B, L - h_0 w_0, d).

        They are those that `scale_input` gives step by step while decoding.
        """
        parts = codes.split_with_sizes(self.lengths, 1)
        total, inputs = self._blank(codes), [codes.new_zeros(len(codes), 0, self.dim).float()]
        for scale in range(1, len(parts)):
            total = total + self.contribution(parts[scale - 1], scale - 1)
            inputs.append(self.scale_input(total, scale))
        return torch.cat(inputs, 1)
