"""The commands of the tutorial work, one after the other, in a short form."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import make_pictures

from smalti.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
TINY_RUN = ["--max_train_steps", "2", "--train_batch_size", "4", "--checkpointing_steps", "1"]
SAMPLES = ["--num_samples", "16", "--classifier_epochs", "1"]
# Options that make a command short; a command that waits for visitors prints its configuration.
SHORT = {
    "train-tokenizer": [*TINY_RUN, "--tokenizer.preset", "vq-32-tiny"],
    "train-prior": [*TINY_RUN, "--prior.preset", "gpt-nano", "--prior.depth", "1"],
    "evaluate": SAMPLES,
    "sweep": SAMPLES,
    "compare": [*SAMPLES, "--rounds", "1", "--timed_images", "1", "--columns", "1"],
    "generate": ["--num_images_per_class", "1"],
    "ui": ["--print-config"],
    "serve": ["--print-config"],
}


def commands_of(page: Path) -> list[list[str]]:
    """The arguments of each smalti command in the page's blocks, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("smalti ")]


def status_of(arguments: list[str]) -> int:
    """The exit status of a command."""
    try:
        return main(arguments)
    except SystemExit as end:  # --print-config
        return int(end.code or 0)


@pytest.mark.slow
def test_the_commands_of_the_tutorial_work(tmp_path: Path, monkeypatch) -> None:
    make_pictures(tmp_path / "my_pictures")
    (tmp_path / "scripts").symlink_to(PAGE.parents[1] / "scripts")
    monkeypatch.chdir(tmp_path)
    commands = commands_of(PAGE)
    assert [command for command, *_ in commands] == [
        "check-data", "train-tokenizer", "evaluate", "encode", "train-prior", "generate", "sweep",
        "evaluate", "info", "compare", "ui", "serve",
    ]  # fmt: skip
    for command, *options in commands:
        given = [option.replace("checkpoint-020000", "checkpoint-000002") for option in options]
        samples = command != "evaluate" or "runs/own/prior/pipeline" in given
        short = SHORT.get(command, []) if samples else []
        assert status_of([command, *given, *short]) == 0, command
    assert (tmp_path / "runs/own/samples/index.html").is_file()
    assert (tmp_path / "runs/own/prior/pipeline/sampling.json").is_file()
