"""Vector quantization against brute force and the definitions of its gradients."""

import pytest
import torch
import torch.nn.functional as F
from vector_quantize_pytorch import SimVQ, VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from smalti.errors import SmaltiError
from smalti.tokenizer.quantizers import base as entropy_module
from smalti.tokenizer.quantizers import base as quantize
from smalti.tokenizer.quantizers.base import as_maps, as_rows, entropy_loss, nearest_codes, rotation
from smalti.tokenizer.quantizers.codebook import EMA_SMOOTHING, CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig, NearestQuantizer

LEARNING = ("gradient", "ema", "simvq")


def quantizer(l2: bool = True, revive_after: int = 0, **options) -> NearestQuantizer:
    names = ("vocab_size", "code_dim", "learning", "ema_decay")
    table = {"vocab_size": 32, "code_dim": 4} | {k: options.pop(k) for k in names if k in options}
    codebook = CodebookConfig(l2_normalise=l2, revive_after=revive_after, **table)
    return NearestQuantizer(NearestConfig(codebook=codebook, **options))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("l2", [True, False])
def test_search_is_the_brute_force_nearest_neighbour(l2: bool, learning: str) -> None:
    q, z = quantizer(l2, learning=learning), torch.randn(3, 4, 5, 6)
    features = F.normalize(z, dim=1) if l2 else z
    distances = torch.cdist(features.movedim(1, -1).reshape(-1, 4), q.codebook.vectors)
    assert torch.equal(q.search(z).flatten(), distances.argmin(-1))


def test_rows_and_maps_are_inverse() -> None:
    z = torch.randn(2, 4, 3, 5)
    assert torch.equal(as_maps(as_rows(z), 2, 3, 5), z)
    assert torch.equal(as_rows(z)[7], z[0, :, 1, 2])


def test_chunks_change_nothing(monkeypatch) -> None:
    features, codebook = torch.randn(100, 4), torch.randn(32, 4)
    whole = nearest_codes(features, codebook)
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 32 * 7)
    assert torch.equal(nearest_codes(features, codebook), whole)
    with pytest.raises(SmaltiError, match="3 numbers each but codes have 4"):
        nearest_codes(torch.randn(2, 3), codebook)


def test_latents_are_codebook_vectors_and_gradients_pass_straight_through() -> None:
    q, z = quantizer(l2=False), torch.randn(2, 4, 3, 3, requires_grad=True)
    out = q(z)
    torch.testing.assert_close(out.latents, q.lookup(out.codes, 3, 3))
    weight = torch.randn_like(out.latents)
    (out.latents * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)  # identity
    assert q.codebook.weight.grad is None  # none to the codebook


def test_rotation_keeps_the_value_and_turns_the_gradient_with_the_vector() -> None:
    z, q = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    out = rotation(z, q)
    torch.testing.assert_close(out, q)
    gradient = torch.randn(6, 4)
    (out * gradient).sum().backward()
    # The gradient keeps its angle to the vector it belongs to, and is scaled by |q| / |z|.
    ratio = (q.norm(dim=1) / z.norm(dim=1)).detach()
    torch.testing.assert_close(z.grad.norm(dim=1), ratio * gradient.norm(dim=1))
    torch.testing.assert_close(
        F.cosine_similarity(z.grad, z.detach()), F.cosine_similarity(gradient, q)
    )


def test_oracle_rotation_of_vector_quantize_pytorch() -> None:
    z, q = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    gradient = torch.randn(6, 4)
    (ours,) = torch.autograd.grad((rotation(z, q) * gradient).sum(), z)
    (theirs,) = torch.autograd.grad((rotate_to(z, q) * gradient).sum(), z)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_each_loss_has_gradients_for_its_own_side_only() -> None:
    q, z = quantizer(l2=False), torch.randn(2, 4, 3, 3, requires_grad=True)
    out = q(z)
    out.losses["codebook"].backward(retain_graph=True)
    assert z.grad is None and q.codebook.weight.grad is not None
    q.codebook.weight.grad = None
    out.losses["commitment"].backward()
    assert q.codebook.weight.grad is None
    expected = 0.25 * 2 * (z - q.lookup(out.codes, 3, 3)) / z.numel()
    torch.testing.assert_close(z.grad, expected)


def test_oracle_vector_quantize_pytorch() -> None:
    q, z = quantizer(), torch.randn(2, 4, 5, 5)
    oracle = VectorQuantize(dim=4, codebook_size=32, use_cosine_sim=True).eval()
    oracle._codebook.embed.data.copy_(q.codebook.vectors[None])
    latents, codes, _ = oracle(z.flatten(2).mT)  # (B, h*w, d)
    out = q(z)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.latents.flatten(2).mT, latents)


@pytest.mark.parametrize("learning", LEARNING)
def test_codes_do_not_change_under_bf16_autocast(learning: str) -> None:
    q, z = quantizer(learning=learning), torch.randn(4, 4, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = q(z)
    assert torch.equal(inside.codes, q(z).codes)
    assert inside.latents.dtype == torch.float32


# -- revival ------------------------------------------------------------------------------------


@pytest.mark.parametrize("learning", ["gradient", "ema"])
def test_the_first_step_puts_unused_codes_onto_the_data(learning: str) -> None:
    q = quantizer(revive_after=5, learning=learning)
    direction = F.normalize(torch.tensor([1.0, 2.0, 3.0, 4.0]), dim=0)
    z = direction.view(1, 4, 1, 1) + 0.01 * torch.randn(2, 4, 4, 4)
    used = q(z).codes.unique()
    q.after_step(seeded())
    others = [i for i in range(32) if i not in used]
    assert (q.codebook.vectors[others] @ direction > 0.99).all()


def test_only_codes_idle_for_longer_than_the_limit_are_revived() -> None:
    q = quantizer(False, 2, vocab_size=4, code_dim=2)
    book = q.codebook
    book.weight.data = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.0, 1.0], [1.0, 0.0]])
    book.idle_steps.zero_()
    z = torch.tensor([[0.0, 0.0], [0.0, 1.0]]).T.reshape(1, 2, 1, 2)  # hits codes 0 and 2
    rng = seeded()
    for step in range(3):
        q(z)
        q.after_step(rng)
        alive = torch.equal(book.weight[1], torch.tensor([9.0, 9.0]))
        assert alive == (step < 2)
    assert book.idle_steps[[0, 2]].tolist() == [0, 0]
    assert book.weight[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("learning", ["gradient", "ema"])
def test_a_skipped_step_leaves_no_trace(learning: str) -> None:
    q, z = quantizer(revive_after=1, learning=learning), torch.randn(1, 4, 2, 2)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    q(z)
    q.discard_step()
    q.after_step(torch.Generator())
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())


def test_without_revival_a_gradient_codebook_is_left_to_the_optimizer() -> None:
    q, z = quantizer(revive_after=0), torch.randn(1, 4, 2, 2)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    q(z)
    q.after_step(torch.Generator())
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())


def test_evaluation_collects_nothing() -> None:
    q = quantizer(revive_after=1).eval()
    q(torch.randn(1, 4, 2, 2))
    assert not q.codebook._rows


# -- running means --------------------------------------------------------------------------------


def test_running_means_are_those_of_a_loop() -> None:
    q = quantizer(False, learning="ema", ema_decay=0.9)
    table = q.codebook.weight.clone()
    counts, sums = torch.ones(32), table.clone()
    for _ in range(3):
        micro_batches = [torch.randn(2, 4, 3, 3) for _ in range(2)]
        new_counts, new_sums = torch.zeros(32), torch.zeros(32, 4)
        for z in micro_batches:
            codes = q(z).codes.flatten()
            for row, code in zip(as_rows(z), codes, strict=True):
                new_counts[code] += 1
                new_sums[code] += row
        q.after_step(seeded())
        counts = 0.9 * counts + 0.1 * new_counts
        sums = 0.9 * sums + 0.1 * new_sums
        total = counts.sum()
        smoothed = (counts + EMA_SMOOTHING) / (total + 32 * EMA_SMOOTHING) * total
        torch.testing.assert_close(q.codebook.vectors, sums / smoothed[:, None])
    assert not list(q.parameters())
    assert q(torch.randn(1, 4, 2, 2)).losses.keys() == {"commitment"}


def test_running_means_converge_to_cluster_centres() -> None:
    centres = 5 * torch.randn(4, 2)
    q = quantizer(False, 1, learning="ema", vocab_size=4, code_dim=2, ema_decay=0.5)
    for _ in range(60):
        rows = centres[torch.randint(4, (64,))] + 0.01 * torch.randn(64, 2)
        q(rows.T.reshape(1, 2, 8, 8))
        q.after_step(torch.Generator())
    distances = torch.cdist(centres, q.codebook.vectors).min(1).values
    assert (distances < 0.05).sum() >= 3  # two close centres may share a code


# -- SimVQ and entropy -----------------------------------------------------------------------------


def test_simvq_learns_one_matrix_and_moves_all_codes() -> None:
    q = quantizer(False, learning="simvq")
    assert [name for name, _ in q.named_parameters()] == ["codebook.transform"]
    before = q.codebook.vectors.detach().clone()
    q(torch.randn(1, 4, 2, 2)).losses["codebook"].backward()
    with torch.no_grad():
        q.codebook.transform -= q.codebook.transform.grad
    assert ((q.codebook.vectors - before).abs().sum(1) > 0).all()


def test_oracle_simvq_of_vector_quantize_pytorch() -> None:
    q, z = quantizer(False, learning="simvq"), torch.randn(2, 4, 5, 5)
    oracle = SimVQ(dim=4, codebook_size=32, rotation_trick=False).eval()
    oracle.frozen_codebook.copy_(q.codebook.table)
    oracle.code_transform.weight.data.copy_(q.codebook.transform.T)
    latents, codes, _ = oracle(z.flatten(2).mT)
    out = q(z)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.latents.flatten(2).mT, latents)


def test_entropy_loss_is_its_definition(monkeypatch) -> None:
    features, codebook = torch.randn(50, 4, requires_grad=True), torch.randn(8, 4)
    p = (-torch.cdist(features, codebook).square() / 0.7).softmax(-1)
    own = -(p * p.log()).sum(-1).mean()
    batch = -(p.mean(0) * p.mean(0).log()).sum()
    expected = own - 2.0 * batch
    monkeypatch.setattr(entropy_module, "CHUNK_ELEMENTS", 8 * 7)
    ours = entropy_loss(features, codebook, 0.7, diversity=2.0)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(
        torch.autograd.grad(ours, features), torch.autograd.grad(expected, features), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_entropy_has_finite_gradients_where_probabilities_vanish() -> None:
    features = (100 * torch.randn(10, 4)).requires_grad_()
    entropy_loss(features, 100 * torch.randn(8, 4), 1e-3).backward()
    assert features.grad.isfinite().all()


def test_entropy_is_an_option_of_the_loss() -> None:
    q, z = quantizer(entropy_weight=0.5), torch.randn(2, 4, 3, 3)
    rows = q.codebook.normalise(as_rows(z))
    expected = 0.5 * entropy_loss(rows, q.codebook.vectors, 0.01)
    torch.testing.assert_close(q(z).losses["entropy"], expected)
    assert "entropy" not in quantizer()(z).losses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 1}, "need at least 2"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"revive_after": -1}, "revive_after is -1"),
        ({"learning": "simvq", "revive_after": 5}, "set revive_after 0"),
        ({"commitment_weight": -1.0}, "must not be negative"),
        ({"entropy_temperature": 0.0}, "must be positive"),
    ],
)
def test_impossible_configs_are_refused(changes, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        quantizer(**changes)
