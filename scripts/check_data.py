"""Before the stages: decode every picture of a set, and report the bad ones.

smalti check-data --data my_pictures --json report.json
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smalti.cli import parse_config, run_command
from smalti.config import config_to_dict
from smalti.data.dataset import DataOptions
from smalti.data.inspection import BadFile, Report, inspect, summary
from smalti.data.sources.base import measured_range, open_unverified
from smalti.data.sources.listing import printable
from smalti.data.sources.webdataset import ShardPictures
from smalti.data.value_range import limits_of
from smalti.errors import ConfigurationError
from smalti.files import replacing, write_json
from smalti.folders import claimed

EXIT_BAD_FILES = 1
SHOWN_BAD_FILES = 20  # on the screen; the list has all


@dataclass(frozen=True)
class CheckDataConfig(DataOptions):
    """Decode every picture of a set; report its contents and which files are bad.

    A file is bad if training with the same options would refuse, replace or skip it. The exit
    status is 1 if there is any.
    """

    # A list of the bad files, each with the reason; it is written only if there are any.
    bad_files: Path = Path("bad_files.txt")
    json: Path | None = None  # receives the complete report
    write_manifest: bool = False  # write the number of samples of each shard beside the shards


def check_data(config: CheckDataConfig) -> Report:
    """Write the list of bad files and the report; return the report.

    Raises:
        DataError: there is no such set.
        ConfigurationError: a manifest was requested, but the set has no shards.
    """
    if config.heldout_data:
        raise ConfigurationError(
            "--heldout_data is checked by a command of its own: smalti check-data --data "
            f"{config.heldout_data}"
        )
    pictures = open_unverified(config.data, config)
    if config.write_manifest and not isinstance(pictures, ShardPictures):
        raise ConfigurationError(
            f"--write_manifest is for shards; {config.data} has none: leave it out"
        )
    report = inspect(
        config.data,
        pictures,
        config.folder,
        value_range=limits_of(measured_range(config.data, config, pictures)),
        heldout_fraction=config.heldout_fraction,
        split_seed=config.split_seed,
    )
    write_list(config.bad_files, report.bad)
    if config.json is not None:
        with claimed(config.json):
            write_json(config.json, config_to_dict(report))
    if config.write_manifest and isinstance(pictures, ShardPictures):
        written = pictures.write_manifests()
        print(f"manifest: {', '.join(map(str, written)) or 'there already, with these numbers'}")
    return report


def write_list(path: Path, bad: Sequence[BadFile]) -> None:
    """One line for each bad file: place, tab, reason; names that are not UTF-8 keep their bytes.

    If none is bad, the list of an earlier check is removed.
    """
    if not bad:
        path.unlink(missing_ok=True)
        return
    lines = [
        f"{file.place}\t{file.reason}".replace("\n", " ").encode(errors="surrogateescape")
        for file in bad
    ]
    with claimed(path), replacing(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti check-data`."""
    config = parse_config(CheckDataConfig, argv, prog="smalti check-data")
    report = check_data(config)
    print(summary(report))
    for file in report.bad[:SHOWN_BAD_FILES]:
        print(f"bad: {printable(file.place)} {file.reason}")
    more = len(report.bad) - SHOWN_BAD_FILES
    if more > 0:
        print(f"bad: {more} more")
    listed = f", listed in {config.bad_files}" if report.bad else ""
    print(f"bad files: {len(report.bad)}{listed}")
    return EXIT_BAD_FILES if report.bad else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
