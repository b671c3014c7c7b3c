"""Models that are on the accelerator only while they run. There is none here: the meta device and
the CPU stand in, as far as they go."""

import pytest
import torch
from chance import generators

from smalti.errors import SmaltiError
from smalti.pipelines.offloading import Offloading
from smalti.pipelines.pipeline import Pipeline

CLASSES = ("cat", "dog", "emu")


@pytest.fixture
def pipe(tokenizer, prior) -> Pipeline:
    return Pipeline(tokenizer, prior, CLASSES)


def test_without_an_accelerator_it_is_refused(pipe, monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(SmaltiError, match="this machine has none: leave it out"):
        pipe.enable_model_cpu_offload()
    assert len(pipe("cat").images) == 1


def test_each_model_moves_when_it_is_used(pipe, monkeypatch) -> None:
    """In the order of use; a preview gives the place back to the prior."""
    order = []
    names = {pipe.tokenizer: "tokenizer", pipe.prior: "prior"}
    use, release = Offloading.use, Offloading.release

    def watched(self, model) -> None:
        order.append(names[model])
        use(self, model)

    expected = pipe([0, 1, 2], generator=generators(0, 1, 2), output_type="pt").images
    monkeypatch.setattr(Offloading, "use", watched)
    monkeypatch.setattr(Offloading, "release", lambda self: (order.append("none"), release(self)))
    pipe.enable_model_cpu_offload("cpu")
    out = pipe([0, 1, 2], generator=generators(0, 1, 2), output_type="pt", batch_size=2)
    torch.testing.assert_close(out.images, expected)
    assert order == ["prior", "tokenizer", "prior", "tokenizer", "none"]
    order.clear()

    def callback(pipeline, step, share, kwargs) -> None:
        if step == 0:
            pipeline.preview(kwargs["latents"])

    pipe("cat", callback_on_step_end=callback)
    assert order == ["prior", "tokenizer", "prior", "tokenizer", "none"]
    pipe.to("cpu")
    order.clear()
    pipe("cat")
    assert order == []


def test_pipelines_of_the_same_models_share_it(pipe) -> None:
    pipe.enable_model_cpu_offload("meta")
    same = Pipeline(**pipe.components)
    assert same.device.type == pipe.resized(24).device.type == "meta"
    pipe.enable_model_cpu_offload("cpu")  # in place of the other
    assert same.device.type == "cpu"
    assert same("cat", image_size=24).images[0].size == (24, 24)
    same.to("cpu")
    assert Offloading.of([pipe.tokenizer, pipe.prior]) is None


def test_the_models_of_others_leave_the_device(pipe) -> None:
    """To the meta device a model can move; only that it leaves it again cannot be seen there."""
    offloading = Offloading([pipe.tokenizer, pipe.prior], "meta")
    assert offloading.device == torch.device("meta")
    offloading.use(pipe.prior)
    assert next(pipe.prior.parameters()).is_meta
    assert not next(pipe.tokenizer.parameters()).is_meta
