"""The rule by which benchmarks/speculative_decoding.py accepts drafts."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from speculative_decoding import jacobi, verified

LENGTH, CODES, RUNS = 4, 3, 2000


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def chain(codes: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
    """A distribution in which every code depends on the two before it."""
    given, rows = torch.cat([codes, drafts]).tolist(), []
    for i in range(len(codes), len(given) + 1):
        before = sum((j + 1) * code for j, code in enumerate(given[max(0, i - 2) : i]))
        rows.append([1.0 + (before + k) % CODES * 2 for k in range(CODES)])
    rows = torch.tensor(rows, dtype=torch.float64)
    return rows / rows.sum(1, keepdim=True)


def test_a_rejected_draft_is_replaced_so_that_the_distribution_is_the_true_one():
    torch.manual_seed(0)
    proposed, true = torch.rand(2, 5, dtype=torch.float64).softmax(1)
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(5)
    rows = torch.stack([true, true])
    for draft in torch.multinomial(proposed, RUNS, True, generator=generator):
        accepted, code = verified(draft[None], proposed[None], rows, generator)
        counts[draft if accepted else code] += 1
    assert chi_square(counts, true) < 13.3  # 1 % of 4 degrees of freedom


@pytest.mark.parametrize("window", [2, 4])
def test_jacobi_decoding_is_exact(window: int):
    """The joint distribution of all codes, in fewer passes than codes."""
    generator, counts, passes = torch.Generator().manual_seed(0), torch.zeros(CODES**LENGTH), 0
    for _ in range(RUNS):
        codes, taken = jacobi(chain, LENGTH, window, generator)
        counts[int((codes * CODES ** torch.arange(LENGTH)).sum())] += 1
        passes += taken
    exact = []
    for index in range(CODES**LENGTH):
        codes = torch.tensor([index // CODES**i % CODES for i in range(LENGTH)])
        given = chain(codes[:0], codes)[:-1]
        exact.append(given.gather(1, codes[:, None]).prod())
    assert chi_square(counts, torch.stack(exact)) < 112.3  # 1 % of 80 degrees of freedom
    assert passes < RUNS * LENGTH
