"""What trackers are sent: values, speed and images."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from toy_run import toy_config, train

from smalti.training.logging import send_image

IMAGE = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))


class Recorder:
    """A tracker that keeps what it is sent, with the interface of Accelerate's."""

    def __init__(self, name: str) -> None:
        self.name, self.values, self.images = name, {}, []

    def log(self, values, step) -> None:
        self.values.setdefault(step, {}).update(values)

    def log_images(self, values, step, **options) -> None:
        self.images.append((values, step, options))

    def finish(self) -> None:
        self.values["finished"] = True


def test_a_tracker_gets_the_values_and_the_speed_of_a_run(tmp_path: Path) -> None:
    tracker = Recorder("tensorboard")

    def hook(run, model, step, loss):
        run.accelerator.trackers = [tracker]
        return loss

    config = toy_config(tmp_path / "run", max_train_steps=4, logging_steps=2)
    train(config, hook)
    assert tracker.values["finished"]
    assert {"loss", "images_per_second", "seconds_per_step"} <= tracker.values[4].keys()
    assert {2, 4} <= tracker.values.keys()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_an_image_is_sent_to_each_tracker_in_its_own_format(name: str, monkeypatch) -> None:
    monkeypatch.setitem(
        sys.modules, "trackio", SimpleNamespace(Image=lambda pixels: ("it", pixels))
    )
    tracker = Recorder(name)
    send_image(SimpleNamespace(trackers=[tracker]), 7, "samples", IMAGE)
    if name == "trackio":
        kind, pixels = tracker.values[7]["samples"]
        assert kind == "it"
    else:
        ((values, step, options),) = tracker.images
        assert step == 7 and options == ({"dataformats": "NHWC"} if name == "tensorboard" else {})
        (pixels,) = values["samples"]
    assert np.array_equal(pixels, np.asarray(IMAGE))
