"""Retrieval of captions: what the scorer learns, its accuracy as an expectation, its record."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from smalti.errors import DataError
from smalti.evaluation.features import resized
from smalti.evaluation.retrieval import (
    ByteConvolutions,
    CaptionedImages,
    ImageFeatures,
    RetrievalScorer,
    _with_fewer_words,
    retrieval_metrics,
    train_scorer,
)
from smalti.tokenizer.losses.perceptual import LPIPS

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


def halves(images: torch.Tensor) -> torch.Tensor:
    """The mean colour of each half, (B, 6), in place of the features of a network."""
    return torch.cat([half.mean((2, 3)) for half in images.chunk(2, 3)], 1)


def captioned(count: int, seed: int) -> CaptionedImages:
    images, captions = pictures(count, seed)
    return CaptionedImages.of([(images, [(text,) for text in captions])], halves)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scorer() -> RetrievalScorer:
    return train_scorer(captioned(320, 0), generator=generator(), epochs=12, batch_size=32)


def test_the_scorer_tells_right_captions_from_wrong_ones(scorer: RetrievalScorer) -> None:
    heldout = captioned(48, 1)
    noise = CaptionedImages.of([(torch.rand(48, 3, 8, 8) * 2 - 1, heldout.captions)], halves)
    values = {}
    for name, samples in (("good", captioned(48, 2)), ("noise", noise)):
        metrics = retrieval_metrics(scorer, samples, heldout, {"data": "x"}, generator=generator(1))
        values[name] = [metrics[f"retrieval_accuracy_{k}"].value for k in ("samples", "shuffled")]
        assert metrics["retrieval_accuracy_heldout"].value > 0.9
    assert values["good"][0] > 0.9 and values["good"][1] < 0.1
    assert values["noise"][0] < 0.4
    record = metrics["retrieval_accuracy_samples"].protocol
    assert record["candidates"] == 8 and record["chance"] == 1 / 8 and record["data"] == "x"
    assert record["training"]["captions"] == 8 and record["training"]["epochs"] == 12
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
    images = captioned(5, 3)
    model = RetrievalScorer(images).eval()
    scores = model.embed_images(images.features) @ model.embed_texts(WORDS).T
    won = []
    for row, text in enumerate(images.first_captions):
        right = WORDS.index(text)
        others = [i for i in range(len(WORDS)) if i != right]
        for draw in itertools.combinations(others, 2):
            won.append(bool(scores[row, right] > scores[row, list(draw)].max()))
    found = model.accuracy(images.features, images.first_captions, WORDS, 3)
    assert math.isclose(found, sum(won) / len(won), rel_tol=1e-9) and 0 < found < 1
    every = model.accuracy(images.features, images.first_captions, WORDS, len(WORDS))
    best = scores.argmax(1).tolist()
    right = [WORDS.index(text) for text in images.first_captions]
    assert every == sum(a == b for a, b in zip(best, right, strict=True)) / 5


def test_equal_captions_are_not_negatives_of_each_other() -> None:
    torch.manual_seed(0)
    images = captioned(3, 4)
    model, features = RetrievalScorer(images).eval(), images.features
    captions, texts = ["red box", "blue", "red box"], ["red", "blue", "box"]  # words are left out
    image, text = model.embed_images(features), model.embed_texts(texts)
    logits = image @ text.T / 0.07
    pairs = [(0, [0, 1]), (1, [0, 1, 2]), (2, [1, 2])]  # what each is compared with
    expected = [
        F.cross_entropy(table[row, columns], torch.tensor(columns.index(row)))
        for table in (logits, logits.T)
        for row, columns in pairs
    ]
    torch.testing.assert_close(model(features, captions, texts), torch.stack(expected).mean())


@torch.no_grad()
def test_vectors_of_a_text_do_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    model = ByteConvolutions(8).eval()
    texts = ["", "red", "na\u00efve " * 9]
    together = model(texts)
    assert together.shape == (3, 8) and together.isfinite().all()
    for row, text in enumerate(texts):
        torch.testing.assert_close(model([text])[0], together[row])


def test_features_of_batches_are_kept_and_images_are_not() -> None:
    """Captions of a picture stay together; images are rounded to 8 bits first."""
    large = torch.rand(2, 3, 48, 64) * 2 - 1
    batches = iter([(large, [("a", "b"), ("c",)]), (large[:1], [("d",)])])
    found = CaptionedImages.of(batches, halves)
    assert found.features.shape == (3, 6) and found.features.dtype == torch.float16
    assert torch.equal(found.features[2], found.features[0])
    assert found.captions == (("a", "b"), ("c",), ("d",))
    assert found.first_captions == ["a", "c", "d"] and len(found) == 3
    close = CaptionedImages.of([(large + 0.0001, [("a",), ("a",)])], lambda images: images[:, 0, 0])
    exact = CaptionedImages.of([(large, [("a",), ("a",)])], lambda images: images[:, 0, 0])
    assert (close.features == exact.features).double().mean() > 0.9
    with pytest.raises(DataError, match="2 pictures have captions of 1"):
        CaptionedImages.of([(large, [("a",), ()])], halves)
    with pytest.raises(DataError, match="no picture with a caption"):
        CaptionedImages.of([], halves)


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_means_and_those_of_the_last_layer_are_of_each_quarter(channels: int) -> None:
    lpips = LPIPS.from_embedded()
    images = torch.rand(2, channels, 32, 48) * 2 - 1
    found = ImageFeatures(lpips)(images)
    layers = lpips.features(resized(images.expand(-1, 3, -1, -1), 128))
    assert found.shape == (2, ImageFeatures.dim)
    first = torch.cat([layer.mean((2, 3)) for layer in layers[:4]], 1)
    torch.testing.assert_close(found[:, :896], first)
    quarters = found[:, 896:].view(2, 256, 2, 2)
    torch.testing.assert_close(quarters[..., 0, 0], layers[4][..., :4, :4].mean((2, 3)))
    torch.testing.assert_close(quarters[..., 0, 1], layers[4][..., :4, 3:].mean((2, 3)))


def test_one_caption_for_all_is_nothing_to_retrieve() -> None:
    one = CaptionedImages.of([(torch.zeros(2, 3, 8, 8), [("a",), ("a",)])], halves)
    with pytest.raises(DataError, match="1 different captions; retrieval needs 2 or more"):
        retrieval_metrics(RetrievalScorer(one), one, one, {}, generator=generator())


def test_a_sentence_keeps_some_of_its_words() -> None:
    rng = generator()
    found = {_with_fewer_words("a red apple", rng) for _ in range(100)}
    assert {"a red apple", "red apple", "apple"} <= found and "" not in found
    assert _with_fewer_words("", rng) == ""
