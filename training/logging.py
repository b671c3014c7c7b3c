"""What a run tells while it goes: metrics, times, trackers, and the page that shows them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from PIL import Image

from smalti.config import config_to_dict, recipe_text
from smalti.files import write_text
from smalti.training.config import RunConfig
from smalti.training.folder import METRICS, RECIPE, TIMING
from smalti.training.log import MetricsLog
from smalti.training.report import write_report
from smalti.training.throughput import Throughput, peak_flops
from smalti.training.trackers import finish_trackers, send, send_picture, start_trackers


class Progress:
    """The files of a run that people read. Only the main process writes any.

    Nothing is written before the first step is done.

    Args:
        start_step: the first one of this process; later lines of the logs are dropped.
    """

    def __init__(
        self, folder: Path, config: RunConfig, accelerator: Accelerator, start_step: int
    ) -> None:
        self.folder, self.config, self.accelerator = folder, config, accelerator
        self.start_step = start_step
        self._metrics: MetricsLog | None = None
        devices = accelerator.num_processes
        dynamo = accelerator.state.dynamo_plugin
        compiled = dynamo is not None and dynamo.backend != DynamoBackend.NO
        sharded = accelerator.distributed_type == DistributedType.FSDP
        self._clock = Throughput(
            folder / TIMING,
            resume_step=start_step,
            images=config.train_batch_size,
            processes=devices,
            peak=peak_flops(accelerator.device, accelerator.mixed_precision) * devices,
            count=not (compiled or sharded),
        )

    def begin(self) -> None:
        """Claim the folder, with the first step: the recipe, the trackers, the log."""
        if self.accelerator.is_main_process and self._metrics is None:
            start_trackers(self.accelerator, self.config.report_to, config_to_dict(self.config))
            write_text(self.folder / RECIPE, recipe_text(self.config))
            self._metrics = MetricsLog(self.folder / METRICS, self.accelerator, self.start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of a number of finished steps."""
        self.begin()
        if self._metrics is not None:
            self._metrics.write(step, dict(values))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time one step."""
        with self._clock.step():
            yield

    def after_step(self, *, logged: bool, validated: bool, step: int) -> None:
        """Once after each step: the times if it was logged, the page if it was validated."""
        self.begin()
        if self.accelerator.is_main_process:
            if logged and (speed := self._clock.write(step)):
                send(self.accelerator, step, speed)
            if validated:
                self.write_page()

    def show(self, step: int, name: str, picture: Image.Image) -> None:
        """Send a picture, drawn after a number of finished steps, to the trackers."""
        if self.accelerator.is_main_process:
            send_picture(self.accelerator, step, name, picture)

    def write_page(self) -> None:
        """Write `report.html`."""
        if self.accelerator.is_main_process:
            write_report(self.folder)

    def finish(self) -> None:
        """Close the trackers, and write the page a last time."""
        finish_trackers(self.accelerator)
        self.write_page()
