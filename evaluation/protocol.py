"""A number and how it was made belong together."""

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smalti.files import write_json


@dataclass(frozen=True)
class Metric:
    """A measured value with everything needed to measure it again."""

    value: float
    protocol: dict[str, Any] = field(default_factory=dict)


def write_summary(path: Path, metrics: dict[str, Metric], **context: Any) -> None:
    """Write {"metrics": {name: {"value", "protocol"}}, "versions", ...context} as JSON."""
    content = {name: asdict(metric) for name, metric in sorted(metrics.items())}
    versions = {package: version(package) for package in ("smalti", "torch", "torchvision")}
    write_json(path, {**context, "versions": versions, "metrics": content})
