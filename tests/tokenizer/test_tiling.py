"""Tiled and sliced decoding: bounded memory, and the same pictures."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import SmaltiError
from smalti.tokenizer.conv import AttentionBlock, ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.tiling import Tiling
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=2
)


def decoder() -> nn.Sequential:
    """Without norms: pixels depend on those at most 3 away. Twice the resolution."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.Upsample(scale_factor=2.0),
        nn.Conv2d(8, 3, 3, padding=1),
    ).double()


@pytest.mark.parametrize(
    ("grid", "tile", "overlap"),
    [((32, 32), 32, 16), ((19, 40), 24, 16), ((8, 33), 40, 20), ((64, 9), 30, 18)],
)
@torch.no_grad()
def test_tiles_make_the_whole_picture_where_the_receptive_field_allows(grid, tile, overlap) -> None:
    model, vectors = decoder(), torch.randn(2, 2, *grid, dtype=torch.float64)
    sides, sizes = [], tuple(2 * side for side in grid)

    def decode(part: Tensor) -> Tensor:
        sides.append(tuple(part.shape[2:]))
        return model(part)

    tiled = Tiling(tile, overlap).decode(decode, vectors, sizes)
    torch.testing.assert_close(tiled, model(vectors), rtol=0, atol=1e-12)
    assert len(sides) > 1 and all(max(side) <= tile // 2 for side in sides)


@torch.no_grad()
def test_tiles_without_overlap_are_set_side_by_side() -> None:
    model, vectors = decoder(), torch.randn(1, 2, 16, 16, dtype=torch.float64)
    tiled = Tiling(16, 0).decode(model, vectors, (32, 32))
    corner = model(vectors[:, :, :8, :8])
    torch.testing.assert_close(tiled[:, :, :16, :16], corner)


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (8, 8), (8, -1), (8.0, 2)])
def test_sizes_that_make_no_tiles_are_refused(tile, overlap) -> None:
    with pytest.raises(SmaltiError, match="0 <= overlap < tile"):
        KLTokenizer(KLConfig(image_size=16, conv=CONV)).enable_tiling(tile, overlap)


@torch.no_grad()
def test_a_tokenizer_decodes_in_tiles_and_slices() -> None:
    model = KLTokenizer(KLConfig(image_size=(32, 48), conv=CONV)).eval()
    latents = torch.randn(3, model.spec.channels, model.spec.height, model.spec.width)
    whole, seen = model.decode(latents), []
    for layer in (model.decoder.conv_in, model.decoder.norm_out):  # once for the picture; per tile
        layer.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    model.enable_slicing()
    torch.testing.assert_close(model.decode(latents), whole)
    assert [shape[0] for shape in seen] == 2 * [1, 1, 1]
    model.enable_tiling(16, 4)
    seen.clear()
    assert model.decode(latents).shape == whole.shape
    assert {shape[0] for shape in seen} == {1}
    assert [shape[2:] for shape in seen].count((16, 24)) == 3
    assert {shape[2:] for shape in seen} == {(16, 24), (16, 16)}
    large = model.sharing_weights((64, 48))  # keeps both
    assert large._tiling == model._tiling and large._slicing
    model.disable_tiling()
    model.disable_slicing()
    seen.clear()
    assert torch.equal(model.decode(latents), whole) and len(seen) == 2
    model.enable_tiling(64, 16)  # one tile
    assert torch.equal(model.decode(latents), whole)


@torch.no_grad()
def test_normalisations_of_equal_statistics_make_the_whole_picture() -> None:
    """Where every n-th position has the means and variances of all, the estimate is exact; and no
    hook stays."""
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1)).double()
    vectors = torch.randn(2, 2, 8, 8, dtype=torch.float64).repeat_interleave(4, 2)
    vectors = vectors.repeat_interleave(4, 3)
    tiled = Tiling(16, 4).decode(model, vectors, (32, 32), [model[1]])
    torch.testing.assert_close(tiled, model(vectors), rtol=1e-5, atol=1e-5)  # statistics are fp32
    assert not model[1]._forward_hooks


@pytest.mark.parametrize(
    "attention", [{}, {"mid_attention": True}, {"mid_attention": True, "attention_levels": (1,)}]
)
@torch.no_grad()
def test_seams_of_a_smooth_picture_are_below_a_grey_level(attention) -> None:
    """Away from the border, no step between neighbouring pixels differs by a grey level, of which
    the picture has 255, from that of a whole decode, by a decoder that normalises, and attends at
    the resolution of the latents."""
    conv = replace(CONV, channels=16, mid_attention=False, z_channels=4)
    model = KLTokenizer(KLConfig(image_size=96, conv=replace(conv, **attention))).eval()
    coarse = torch.randn(1, model.spec.channels, 2, 2)
    latents = F.interpolate(coarse, (48, 48), mode="bilinear", align_corners=True)
    whole = model.decode(latents)
    model.enable_tiling(48, 32)
    pictures = [image[..., 16:-16, 16:-16] for image in (whole, model.decode(latents))]
    steps = [[picture.diff(dim=dim) for dim in (2, 3)] for picture in pictures]
    seams = max((a - b).abs().max() for a, b in zip(*steps, strict=True))
    assert seams * 255 / (whole.max() - whole.min()) < 1


@torch.no_grad()
def test_stages_are_the_whole_decoder() -> None:
    conv = replace(CONV, attention_levels=(1,))
    quantizer = NearestConfig(codebook=CodebookConfig(16, 2))
    vq = VQTokenizer(VQConfig(image_size=16, conv=conv, quantizer=quantizer)).eval()
    kl = KLTokenizer(
        KLConfig(image_size=16, conv=conv, latent_mean=(1.0, 2.0), latent_std=(0.5, 2.0))
    ).eval()
    for model in (vq, kl):
        vectors, stages = torch.randn(1, 2, 8, 8), model.decoding_stages()
        assert torch.equal(stages.tiled(stages.whole(vectors)), model.decode_vectors(vectors))


@torch.no_grad()
def test_attention_allocates_no_matrix_of_all_pairs_of_positions() -> None:
    """64 x 64 positions have 16.8 million pairs, 64 MB; their maps of 8 channels have 128 kB."""
    model = AttentionBlock(8, None).eval()
    x = torch.randn(1, 8, 64, 64).to(memory_format=torch.channels_last)
    with torch.profiler.profile(profile_memory=True) as profile:
        model(x)
    assert max(event.cpu_memory_usage for event in profile.events()) < 2**22


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({"mid_attention": True, "attention_levels": (1,)}, False),
        ({"attention_levels": (0,)}, True),
        ({}, False),
    ],
)
def test_attention_in_the_tiles_is_warned_of_in_one_line(changes, warns, caplog) -> None:
    conv = replace(CONV, mid_attention=False)
    KLTokenizer(KLConfig(image_size=16, conv=replace(conv, **changes))).enable_tiling(16, 4)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == warns and all("seams exceed one grey level" in m for m in messages)
