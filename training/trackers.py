"""Trackers: services that show what a run logs. One that fails is left out, the run goes on."""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from smalti.errors import SmaltiError

logger = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "wandb", "trackio")


def check_tracker(report_to: str) -> None:
    """Raise `SmaltiError` if the tracker is unknown or its package is missing."""
    if report_to == "none":
        return
    if report_to not in TRACKERS:
        raise SmaltiError(f'report_to is "{report_to}"; choose none, {", ".join(TRACKERS)}')
    package = importlib.util.find_spec(report_to)
    if package is None or package.origin is None:  # no origin: any folder of that name
        raise SmaltiError(
            f'report_to is "{report_to}" but that package is not installed: '
            f"pip install {report_to}, or use --report_to none"
        )


def start_trackers(accelerator: Accelerator, report_to: str, config: dict[str, Any]) -> None:
    """Initialise the tracker named by `report_to` ("none" starts nothing)."""
    if report_to != "none":
        flat = {k: v for k, v in config.items() if isinstance(v, int | float | str | bool)}
        try:
            accelerator.init_trackers("smalti", config=flat)
        except Exception as error:
            accelerator.trackers = []
            logger.warning("the tracker %s does not start, the run goes on: %s", report_to, error)


def send(accelerator: Accelerator, step: int, values: Mapping[str, float]) -> None:
    """Send values of a number of finished steps."""
    _each(accelerator, lambda tracker: tracker.log(dict(values), step=step))


def send_picture(accelerator: Accelerator, step: int, name: str, picture: Image.Image) -> None:
    """Send a picture, under a name that it shares with earlier ones."""
    pixels = np.array(picture.convert("RGB"))  # (H, W, 3) uint8

    def show(tracker: Any) -> None:
        if tracker.name == "trackio":  # Accelerate knows no pictures of it
            import trackio  # type: ignore[import-not-found]

            tracker.log({name: trackio.Image(pixels)}, step=step)
        elif tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({name: [pixels]}, step=step)

    _each(accelerator, show)


def finish_trackers(accelerator: Accelerator) -> None:
    """Close them."""
    _each(accelerator, lambda tracker: tracker.finish())


def _each(accelerator: Accelerator, act: Callable[[Any], None]) -> None:
    """Do it with every tracker; one that fails is left out from then on."""
    for tracker in list(accelerator.trackers):
        try:
            act(tracker)
        except Exception as error:
            accelerator.trackers = [other for other in accelerator.trackers if other is not tracker]
            name = getattr(tracker, "name", type(tracker).__name__)
            logger.warning("the tracker %s failed and is left out: %s", name, error)
