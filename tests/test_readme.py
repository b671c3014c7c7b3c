"""What the README, the pages of `docs/` and CONTRIBUTING.md name is there."""

import re
from pathlib import Path

import pytest

from smalti.cli import COMMANDS
from smalti.prior.presets import PRESETS as PRIORS
from smalti.tokenizer.presets import PRESETS as TOKENIZERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
}
EVERYTHING = "\n".join(PAGES.values())
FOLDERS = (
    "scripts|benchmarks|docs|data|tokenizer|prior|pipelines|training|evaluation|examples|tests|tools"
    "|src"
)
# What prints numbers: a command, a benchmark, or the record of how one was measured.
PRINTS = re.compile(
    r"make demo|smalti [a-z]+|python (?:benchmarks|examples)/\w+\.py|tokenizer/assets/README\.md"
)


def prose(text: str) -> str:
    """A page without code, addresses, numbers of papers and versions of Python."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\[\d{4}\.\d{5}\]\([^)]*\)", "", text)  # a paper
    return re.sub(r"`[^`]*`|\]\([^)]*\)|Python \d\.\d+|Apache-2\.0", "", text)


def test_every_test_that_holds_a_promise_exists() -> None:
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", EVERYTHING))
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in source] == []


def test_every_command_and_file_exists() -> None:
    commands = set(re.findall(r"^\s*smalti ([a-z][a-z-]*)", EVERYTHING, re.MULTILINE))
    commands |= set(re.findall(r"`smalti ([a-z][a-z-]*)", EVERYTHING))
    assert commands >= {"demo", "train-tokenizer", "encode", "train-prior", "evaluate", "generate"}
    assert commands <= set(COMMANDS)
    paths = re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w\.\w+", EVERYTHING)
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_every_command_of_the_library_is_described() -> None:
    table = PAGES["docs/getting_started.md"]
    assert [name for name in COMMANDS if f"`smalti {name}`" not in table] == []


def test_every_preset_exists() -> None:
    named = set(re.findall(r"`([a-z]+-[a-z0-9/-]+)`", EVERYTHING))
    known = set(TOKENIZERS) | set(PRIORS)
    ours = r"(vq|vqgan|vqvae|var|kl|fsq|lfq|bsq|ema|gpt|sit|dit|flow)-"
    like = {name for name in named if re.match(ours, name)}
    assert len(like) > 5 and like <= known


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in EVERYTHING
    assert len(re.findall(r"!\[[^\]]+\]\(docs/\w+\.png\)", README)) >= 1
    shown = {Path(image).name for image in re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", EVERYTHING)}
    assert shown == {path.name for path in ROOT.glob("docs/**/*.png")}


def test_the_readme_is_one_screen_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 100
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)", README)
    assert len(links) > 12
    for target, anchor in links:
        assert (ROOT / target).is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / target).read_text(), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/changelog.md"])
def test_no_number_stands_without_the_command_that_prints_it(page: str) -> None:
    """Decimal numbers in prose need a command on the page; in a table, one in the same section."""
    text = PAGES[page]
    if re.search(r"\d\.\d", prose(text)):
        assert PRINTS.search(text)
    for section in re.split(r"^#+ .*$", text, flags=re.MULTILINE):
        rows = [row for row in prose(section).splitlines() if row.startswith("|")]
        if re.search(r"\d\.\d", "\n".join(rows)):
            assert PRINTS.search(section)
