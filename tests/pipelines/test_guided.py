"""A pipeline guided by a classifier: what the prior and the classifier get, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chance import generators, randomised

from smalti.data.latents import ContinuousSpec
from smalti.errors import SmaltiError
from smalti.files import read_json
from smalti.pipelines.generation import generate_folder
from smalti.pipelines.guided import GuidedPipeline
from smalti.pipelines.info import of_generated, of_model
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.flow.classifier import LatentClassifier, LatentClassifierConfig
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.guidance import Classifier
from smalti.prior.flow.path import VPLinearPath
from smalti.prior.flow.prior import FlowPrior
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer

CLASSES = ("cat", "dog", "owl")
CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=2
)
NETWORK = DiTConfig(
    in_channels=2, out_channels=2, grid=(4, 4), patch_size=2, depth=1, width=16, num_heads=2,
    num_classes=3, frequency_size=16,
)  # fmt: skip
TINY = LatentClassifierConfig(
    spec=ContinuousSpec(2, 4, 4), classes=CLASSES, patch_size=2, width=16, depth=1, num_heads=2
)
QUICK = {"num_inference_steps": 4, "output_type": "latent"}


def make_pipe(condition: str = "class") -> Pipeline:
    torch.manual_seed(0)
    tokenizer = KLTokenizer(KLConfig(image_size=8, conv=CONV))
    classes = CLASSES if condition == "class" else ()
    config = FlowConfig(
        network=replace(NETWORK, num_classes=len(classes)),
        condition=condition,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    return Pipeline(tokenizer, randomised(FlowPrior(config), 0.1), classes)


def make_classifier(pipe: Pipeline, **changes) -> LatentClassifier:
    torch.manual_seed(1)
    fingerprint = pipe.tokenizer.fingerprint
    return randomised(
        LatentClassifier(replace(TINY, **{"tokenizer_fingerprint": fingerprint, **changes})), 0.2
    )


def test_a_class_conditional_prior_is_guided_as_by_hand() -> None:
    pipe = make_pipe()
    classifier = make_classifier(pipe)
    labels = torch.tensor([0, 0, 2, 2])
    expected = pipe.prior.sample(
        labels,
        classifier=Classifier(classifier.log_probability, 3.0),
        guidance_scale=1.5,
        generator=generators(1, 2, 3, 4),
        num_inference_steps=4,
    )
    guided = GuidedPipeline(pipe, classifier, scale=3.0)
    found = guided(
        ["cat", "owl"],
        num_images_per_prompt=2,
        guidance_scale=1.5,
        generator=generators(1, 2, 3, 4),
        batch_size=3,
        **QUICK,
    )
    torch.testing.assert_close(found.latents, expected, rtol=1e-4, atol=1e-4)
    assert found.labels == labels.tolist() and found.names == ["cat", "cat", "owl", "owl"]


def test_an_unconditional_prior_is_guided_to_the_classes_of_the_classifier() -> None:
    """The prior gets zeros, the classifier the labels."""
    pipe = make_pipe("none")
    classifier = make_classifier(pipe)
    expected = pipe.prior.sample(
        torch.zeros(3, dtype=torch.int64),
        classifier=Classifier.of(classifier, 30.0),
        classifier_labels=torch.tensor([2, 0, 1]),
        generator=generators(1, 2, 3),
        num_inference_steps=4,
    )
    guided = GuidedPipeline(pipe, classifier, scale=30.0)
    found = guided(["owl", 0, "dog"], generator=generators(1, 2, 3), batch_size=2, **QUICK)
    torch.testing.assert_close(found.latents, expected, rtol=1e-4, atol=1e-4)
    assert found.names == ["owl", "cat", "dog"]
    plain = pipe(num_images=3, generator=generators(1, 2, 3), **QUICK).latents
    assert not torch.allclose(found.latents, plain, atol=0.05)


def test_a_trained_classifier_is_an_option_of_sampling_with_scale_one() -> None:
    pipe = make_pipe()
    classifier = make_classifier(pipe)
    found = pipe("dog", classifier=classifier, generator=generators(1), **QUICK).latents
    guided = GuidedPipeline(pipe, classifier)("dog", generator=generators(1), **QUICK).latents
    assert torch.equal(found, guided)


def test_a_scale_of_zero_is_the_prior_itself() -> None:
    pipe = make_pipe("none")
    guided = GuidedPipeline(pipe, make_classifier(pipe), scale=0.0)
    found = guided(["owl", "cat"], generator=generators(1, 2), **QUICK).latents
    plain = pipe(num_images=2, generator=generators(1, 2), **QUICK).latents
    torch.testing.assert_close(found, plain)


def test_of_an_offloaded_pipeline_it_is_offloaded() -> None:
    pipe = make_pipe()
    classifier = make_classifier(pipe)
    pipe.enable_model_cpu_offload("meta")  # instead of an accelerator
    guided = GuidedPipeline(pipe, classifier)
    assert guided.device.type == "meta" and next(guided.classifier.parameters()).is_meta
    pipe.to("cpu")
    assert guided.device.type == "cpu"


@pytest.mark.parametrize("condition", ["class", "none"])
def test_guidance_is_one_of_the_settings_of_a_job(condition: str, tmp_path: Path) -> None:
    """Another classifier, or another scale, is another job; the same job goes on."""
    pipe = make_pipe(condition)
    classifier = make_classifier(pipe)

    def job(labels: list[int], by: LatentClassifier, scale: float) -> list[Path]:
        guided = GuidedPipeline(pipe, by, scale)
        options = {"seed": 0, "batch_size": 4, "num_inference_steps": 2, "layout": "class"}
        return generate_folder(guided, tmp_path / "out", labels, **options)

    paths = job([0, 2], classifier, 2.0)
    assert [path.parent.name for path in paths] == ["cat", "owl"]
    settings = read_json(tmp_path / "out" / "generation.json")
    assert settings["options"]["classifier"] == classifier.checksum
    assert settings["options"]["classifier_scale"] == 2.0
    first = paths[0].read_bytes()
    assert len(job([0, 2, 1], classifier, 2.0)) == 3 and paths[0].read_bytes() == first
    for other, scale in ((classifier, 3.0), (make_classifier(pipe, depth=2), 2.0)):
        with pytest.raises(SmaltiError, match="of another job"):
            job([0, 2, 1], other, scale)
    lines = dict(of_generated(tmp_path / "out").lines)
    assert lines["classifier"] == f"{classifier.checksum[:12]}, scale 2.0"


def test_info_names_a_classifier_and_the_command_that_uses_it(tmp_path: Path) -> None:
    make_classifier(make_pipe()).save_pretrained(tmp_path / "model")
    lines = dict(of_model(tmp_path / "model").lines)
    assert lines["kind"] == "noisy-latents classifier" and lines["classes"] == "3: cat, dog, owl"
    assert lines["path"] == "linear" and lines["verified"].startswith("yes")
    assert lines["next"].endswith(f"--classifier {tmp_path / 'model'}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_fingerprint": "e" * 64}, "the classifier is for latents of tokenizer eeeeee"),
        ({"path": VPLinearPath()}, "was trained on the path VPLinearPath"),
        ({"classes": ("a", "b")}, "the classifier has 2 classes, and the pipeline 3"),
        ({"classes": ("cat", "owl", "x")}, 'class "owl" has the label 1 for the classifier, and 2'),
        ({"spec": ContinuousSpec(2, 8, 8)}, "takes 2 x 8 x 8 numbers, and the prior models 2 x 4"),
    ],
)
def test_another_classifier_is_refused(changes, message: str) -> None:
    pipe = make_pipe()
    with pytest.raises(SmaltiError, match=message):
        GuidedPipeline(pipe, make_classifier(pipe, **changes))


def test_another_image_size_is_refused() -> None:
    pipe = make_pipe()
    guided = GuidedPipeline(pipe, make_classifier(pipe))
    assert guided("cat", image_size=8, **QUICK).latents.shape == (1, 2, 4, 4)
    with pytest.raises(SmaltiError, match="image_size is 16 x 16, but the classifier"):
        guided("cat", image_size=16, **QUICK)


def test_the_names_of_classes_may_differ() -> None:
    """Converted pipelines have names of their own; labels are what counts."""
    pipe = make_pipe()
    guided = GuidedPipeline(pipe, make_classifier(pipe, classes=("n01", "n02", "n03")))
    assert guided.classes == CLASSES


def test_what_cannot_be_guided_is_refused(tokenizer, prior, tmp_path: Path) -> None:
    pipe = make_pipe("none")
    classifier = make_classifier(pipe)
    guided = GuidedPipeline(pipe, classifier)
    with pytest.raises(SmaltiError, match="guides a flow prior, and this pipeline has a next-tok"):
        GuidedPipeline(Pipeline(tokenizer, prior, CLASSES), classifier)
    with pytest.raises(SmaltiError, match="pass class_labels"):
        guided(num_images=2)
    with pytest.raises(SmaltiError, match='no class is named "lion"'):
        guided("lion")
    with pytest.raises(SmaltiError, match="no images were requested"):
        guided([])
    with pytest.raises(SmaltiError, match="by a prior that knows the classes"):
        guided("cat", image=torch.zeros(1, 3, 8, 8))
    with pytest.raises(SmaltiError, match="classifier_scale is nan"):
        GuidedPipeline(pipe, classifier, scale=float("nan"))
    with pytest.raises(SmaltiError, match="each in a folder of its own"):
        guided.save_pretrained(tmp_path / "saved")
    with pytest.raises(SmaltiError, match="no class 3: use labels from 0 to 2"):
        pipe.prior.sample(
            torch.zeros(1, dtype=torch.int64),
            classifier=Classifier.of(classifier),
            classifier_labels=torch.tensor([3]),
        )
