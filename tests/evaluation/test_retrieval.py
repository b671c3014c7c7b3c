"""Retrieval of captions: what the scorer learns, its accuracy as an expectation, its record."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from smalti.errors import DataError
from smalti.evaluation.retrieval import (
    ByteConvolutions,
    CaptionedImages,
    RetrievalScorer,
    retrieval_metrics,
    train_scorer,
)

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
WORDS = [f"{colour} {side}" for colour in COLOURS for side in ("left", "right")]


def pictures(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Noisy images with one bright half, and what they show."""
    rng = torch.Generator().manual_seed(seed)
    captions = [WORDS[i % len(WORDS)] for i in range(count)]
    images = torch.rand(count, 3, 32, 32, generator=rng) - 1
    for image, caption in zip(images, captions, strict=True):
        colour, side = caption.split()
        half = slice(0, 16) if side == "left" else slice(16, 32)
        image[:, :, half] += 0.5 * torch.tensor(COLOURS[colour])[:, None, None]
    return images.clamp(-1, 1), captions


def captioned(count: int, seed: int) -> CaptionedImages:
    images, captions = pictures(count, seed)
    return CaptionedImages.of([(images, [(text,) for text in captions])])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scorer() -> RetrievalScorer:
    return train_scorer(captioned(160, 0), generator=generator(), epochs=5, batch_size=16)


def test_the_scorer_tells_right_captions_from_wrong_ones(scorer: RetrievalScorer) -> None:
    """Also left from right: training does not mirror pictures."""
    heldout = captioned(48, 1)
    noise = CaptionedImages.of([(torch.rand(48, 3, 32, 32) * 2 - 1, heldout.captions)])
    values = {}
    for name, samples in (("good", captioned(48, 2)), ("noise", noise)):
        metrics = retrieval_metrics(scorer, samples, heldout, {"data": "x"}, generator=generator(1))
        values[name] = [metrics[f"retrieval_accuracy_{k}"].value for k in ("samples", "shuffled")]
        assert metrics["retrieval_accuracy_heldout"].value > 0.9
    assert values["good"][0] > 0.9 and values["good"][1] < 0.1
    assert values["noise"][0] < 0.4
    record = metrics["retrieval_accuracy_samples"].protocol
    assert record["candidates"] == 8 and record["chance"] == 1 / 8 and record["data"] == "x"
    assert record["training"]["captions"] == 8 and record["training"]["epochs"] == 5
    assert record["pictures"] == 48 and len(record["scorer_sha256"]) == 64


def test_training_is_reproducible() -> None:
    state = torch.random.get_rng_state()

    def weights(seed: int) -> torch.Tensor:
        model = train_scorer(captioned(16, 0), generator=generator(seed), epochs=1, batch_size=8)
        return model.text.embedding.weight

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))
    assert torch.equal(torch.random.get_rng_state(), state)


@torch.no_grad()
def test_oracle_the_accuracy_is_the_mean_over_all_draws() -> None:
    torch.manual_seed(0)
    model = RetrievalScorer().eval()
    images = captioned(5, 3)
    scores = model.embed_images(images.levels) @ model.embed_texts(WORDS).T
    won = []
    for row, text in enumerate(images.first_captions):
        right = WORDS.index(text)
        others = [i for i in range(len(WORDS)) if i != right]
        for draw in itertools.combinations(others, 2):
            won.append(bool(scores[row, right] > scores[row, list(draw)].max()))
    found = model.accuracy(images.levels, images.first_captions, WORDS, 3)
    assert math.isclose(found, sum(won) / len(won), rel_tol=1e-9) and 0 < found < 1
    every = model.accuracy(images.levels, images.first_captions, WORDS, len(WORDS))
    best = scores.argmax(1).tolist()
    right = [WORDS.index(text) for text in images.first_captions]
    assert every == sum(a == b for a, b in zip(best, right, strict=True)) / 5


def test_equal_captions_are_not_negatives_of_each_other() -> None:
    torch.manual_seed(0)
    model, levels = RetrievalScorer().eval(), captioned(3, 4).levels
    texts = ["red", "blue", "red"]
    image, text = model.embed_images(levels), model.embed_texts(texts)
    logits = image @ text.T / 0.07
    pairs = [(0, [0, 1]), (1, [0, 1, 2]), (2, [1, 2])]  # what each is compared with
    expected = [
        F.cross_entropy(table[row, columns], torch.tensor(columns.index(row)))
        for table in (logits, logits.T)
        for row, columns in pairs
    ]
    torch.testing.assert_close(model(levels, texts), torch.stack(expected).mean())


@torch.no_grad()
def test_vectors_of_a_text_do_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    model = ByteConvolutions(8).eval()
    texts = ["", "red", "na\u00efve " * 9]
    together = model(texts)
    assert together.shape == (3, 8) and together.isfinite().all()
    for row, text in enumerate(texts):
        torch.testing.assert_close(model([text])[0], together[row])


def test_pictures_of_any_size_are_kept_small() -> None:
    """Batches are read one after the other; captions of a picture stay together."""
    large = torch.rand(2, 3, 48, 64) * 2 - 1
    found = CaptionedImages.of(iter([(large, [("a", "b"), ("c",)]), (large[:1], [("d",)])]))
    assert found.levels.shape == (3, 3, 32, 32) and found.levels.dtype == torch.uint8
    assert found.captions == (("a", "b"), ("c",), ("d",))
    assert found.first_captions == ["a", "c", "d"] and len(found) == 3
    with pytest.raises(DataError, match="2 pictures have captions of 1"):
        CaptionedImages.of([(large, [("a",), ()])])
    with pytest.raises(DataError, match="no picture with a caption"):
        CaptionedImages.of([])


def test_one_caption_for_all_is_nothing_to_retrieve() -> None:
    one = CaptionedImages.of([(torch.zeros(2, 3, 32, 32), [("a",), ("a",)])])
    with pytest.raises(DataError, match="1 different captions; retrieval needs 2 or more"):
        retrieval_metrics(RetrievalScorer(), one, one, {}, generator=generator())
