"""Softmax attention with shared heads, and rotary frequencies."""

import pytest
import torch

from smalti.prior.attention import (
    attend,
    interpolated_positions,
    raster_positions,
    rotary_frequencies,
    rotate,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_shared_heads_attend_as_repeated_ones(tokens: int, dtype) -> None:
    query = torch.randn(2, 6, tokens, 8).to(dtype)
    key, value = torch.randn(2, 2, 2, 5, 8).to(dtype)
    mask = torch.rand(2, 1, tokens, 5) < 0.6
    mask[..., 0] = True
    repeated = (part.repeat_interleave(3, 1) for part in (key, value))
    expected = attend(query, *repeated, mask=mask)
    attended = attend(query, key, value, mask=mask)
    assert attended.dtype == dtype
    torch.testing.assert_close(attended, expected)


def test_positions_are_in_raster_order() -> None:
    rows, columns = raster_positions((2, 3))
    assert rows.flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert columns.flatten().tolist() == [0, 1, 2, 0, 1, 2]


def test_rotary_scores_depend_on_the_offset_alone() -> None:
    rope_freqs = rotary_frequencies((6, 6), 16, 10000.0, 1, False)[1:].view(6, 6, 8)
    query, key = torch.randn(2, 16)

    def score(a: tuple[int, int], b: tuple[int, int]) -> float:
        rotated = [
            rotate(x.view(1, 1, 1, 16), rope_freqs[p].view(1, 8)).flatten()
            for x, p in ((query, a), (key, b))
        ]
        return (rotated[0] @ rotated[1]).item()

    assert score((1, 2), (3, 5)) == pytest.approx(score((2, 0), (4, 3)), rel=1e-4)
    assert score((1, 2), (3, 5)) != pytest.approx(score((1, 2), (5, 3)), rel=1e-2)


def test_rotary_frequencies_are_llamagens() -> None:
    """Pairs rotate with the row first, then with the column; base^(-2i / (head_dim / 2))."""
    rope_freqs = rotary_frequencies((2, 3), 8, 10000.0, 1, True)
    assert rope_freqs.shape == (7, 4) and not rope_freqs[0].abs().any()
    row, column = 1, 2
    angles = torch.tensor([row * 1.0, row * 0.01, column * 1.0, column * 0.01])
    torch.testing.assert_close(rope_freqs[1 + row * 3 + column].angle(), angles)
    assert (rotary_frequencies((2, 3), 8, 10000.0, 1, False)[0] == 1).all()


def test_learned_positions_are_interpolated_on_the_grid() -> None:
    """Twice the side: positions lie at (i + 1/2) / 2 - 1/2 of the old grid; edges are flatter."""
    rows, columns = raster_positions((6, 6))
    table = torch.cat([rows, columns], 1).float()  # (36, 2): a linear function of the position
    larger = interpolated_positions(table, (6, 6), (12, 12)).view(12, 12, 2)
    expected = (torch.arange(12) + 0.5) / 2 - 0.5
    inner = slice(4, 8)
    torch.testing.assert_close(larger[inner, 0, 0], expected[inner])
    torch.testing.assert_close(larger[0, inner, 1], expected[inner])
    assert interpolated_positions(table, (6, 6), (6, 6)) is table
