"""Vector quantization against brute force and the definitions of its gradients."""

import pytest
import torch
import torch.nn.functional as F
from vector_quantize_pytorch import VectorQuantize

from smalti.errors import SmaltiError
from smalti.tokenizer import quantize
from smalti.tokenizer.quantize import VectorQuantizer, nearest_codes


def quantizer(l2: bool = True, revive_after: int = 0) -> VectorQuantizer:
    return VectorQuantizer(32, 4, l2, revive_after)


@pytest.mark.parametrize("l2", [True, False])
def test_search_is_the_brute_force_nearest_neighbour(l2: bool) -> None:
    q, z = quantizer(l2), torch.randn(3, 4, 5, 6)
    features = F.normalize(z, dim=1) if l2 else z
    distances = torch.cdist(features.movedim(1, -1).reshape(-1, 4), q.codebook)
    assert torch.equal(q.search(z).flatten(), distances.argmin(-1))


def test_chunks_change_nothing(monkeypatch) -> None:
    features, codebook = torch.randn(100, 4), torch.randn(32, 4)
    whole = nearest_codes(features, codebook)
    monkeypatch.setattr(quantize, "SEARCH_ELEMENTS", 32 * 7)
    assert torch.equal(nearest_codes(features, codebook), whole)
    with pytest.raises(SmaltiError, match="3 numbers each but codes have 4"):
        nearest_codes(torch.randn(2, 3), codebook)


def test_latents_are_codebook_vectors_and_gradients_pass_straight_through() -> None:
    q, z = quantizer(l2=False), torch.randn(2, 4, 3, 3, requires_grad=True)
    out = q(z)
    torch.testing.assert_close(out.latents, q.lookup(out.codes))
    weight = torch.randn_like(out.latents)
    (out.latents * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)  # identity
    assert q.embedding.weight.grad is None  # none to the codebook


def test_losses_pull_only_their_own_side() -> None:
    q, z = quantizer(l2=False), torch.randn(2, 4, 3, 3, requires_grad=True)
    out = q(z)
    out.codebook_loss.backward(retain_graph=True)
    assert z.grad is None and q.embedding.weight.grad is not None
    q.embedding.weight.grad = None
    out.commitment_loss.backward()
    assert q.embedding.weight.grad is None
    expected = 2 * (z - q.lookup(out.codes)) / z.numel()
    torch.testing.assert_close(z.grad, expected)


def test_oracle_vector_quantize_pytorch() -> None:
    q, z = quantizer(), torch.randn(2, 4, 5, 5)
    oracle = VectorQuantize(dim=4, codebook_size=32, use_cosine_sim=True).eval()
    oracle._codebook.embed.data.copy_(q.codebook[None])
    latents, codes, _ = oracle(z.flatten(2).mT)  # (B, h*w, d)
    out = q(z)
    assert torch.equal(out.codes.flatten(1), codes)
    torch.testing.assert_close(out.latents.flatten(2).mT, latents)


def test_codes_do_not_change_under_bf16_autocast() -> None:
    q, z = quantizer(), torch.randn(4, 4, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = q(z)
    assert torch.equal(inside.codes, q(z).codes)
    assert inside.latents.dtype == torch.float32


def test_the_first_step_puts_unused_codes_onto_the_data() -> None:
    q = VectorQuantizer(32, 4, True, revive_after=5)
    direction = F.normalize(torch.tensor([1.0, 2.0, 3.0, 4.0]), dim=0)
    z = direction.view(1, 4, 1, 1) + 0.01 * torch.randn(2, 4, 4, 4)
    used = q(z).codes.unique()
    q.after_step(torch.Generator().manual_seed(0))
    others = [i for i in range(32) if i not in used]
    assert (q.codebook[others] @ direction > 0.99).all()


def test_only_codes_idle_for_longer_than_the_limit_are_revived() -> None:
    q = VectorQuantizer(4, 2, False, revive_after=2)
    q.embedding.weight.data = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.0, 1.0], [1.0, 0.0]])
    q.idle_steps.zero_()
    z = torch.tensor([[0.0, 0.0], [0.0, 1.0]]).T.reshape(1, 2, 1, 2)  # hits codes 0 and 2
    rng = torch.Generator().manual_seed(0)
    for step in range(3):
        q(z)
        q.after_step(rng)
        alive = torch.equal(q.embedding.weight[1], torch.tensor([9.0, 9.0]))
        assert alive == (step < 2)
    assert q.idle_steps[[0, 2]].tolist() == [0, 0]
    assert q.embedding.weight[0].tolist() == [0.0, 0.0]


def test_a_skipped_step_leaves_no_trace() -> None:
    q, z = VectorQuantizer(32, 4, True, revive_after=0), torch.randn(1, 4, 2, 2)
    revived = VectorQuantizer(32, 4, True, revive_after=1)
    before = {k: v.clone() for k, v in revived.state_dict().items()}
    revived(z)
    revived.discard_step()
    revived.after_step(torch.Generator())
    assert all(torch.equal(v, before[k]) for k, v in revived.state_dict().items())
    never = {k: v.clone() for k, v in q.state_dict().items()}
    q(z)
    q.after_step(torch.Generator())
    assert all(torch.equal(v, never[k]) for k, v in q.state_dict().items())


def test_evaluation_collects_nothing() -> None:
    q = VectorQuantizer(8, 4, True, revive_after=1).eval()
    q(torch.randn(1, 4, 2, 2))
    assert q._pending_counts is None
