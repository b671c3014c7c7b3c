"""The documentation: it builds, its links lead somewhere, docstrings fit their functions."""

import ast
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("data", "tokenizer", "prior", "pipelines", "training", "evaluation", "scripts")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]


def build(config: Path, site: Path, packages: Path | None = None) -> subprocess.CompletedProcess:
    """`mkdocs build --strict`, as `make docs` calls it."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    if packages is not None:
        environment["SMALTI_PACKAGES"] = str(packages)
    command = ["-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    packages = tmp_path / "packages"  # laid out as they are imported, as `make layout` does
    shutil.copytree(ROOT / "src" / "smalti", packages / "smalti")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, packages / "smalti" / folder)
    result = build(ROOT / "mkdocs.yml", tmp_path / "site", packages)
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / "site" / "reference" / "tokenizer" / "index.html").read_text()
    assert 'id="smalti.tokenizer.base.Tokenizer.decode"' in reference
    served = (tmp_path / "site" / "index.html").read_text()
    assert "fonts.googleapis.com" not in served


DEAD = {  # a link, and how a warning names its target
    "[nowhere](missing.md)": "contains a link 'missing.md', but",
    "[no such heading](#missing)": "contains a link '#missing', but",
    "![no picture](missing.png)": "contains a link 'missing.png', but",
    "[beside it](other.md)": 'not included in the "nav" configuration:\n  - other.md',
}


@pytest.mark.slow
def test_a_dead_link_fails_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    config = tmp_path / "mkdocs.yml"
    config.write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nnav: [index.md]\nplugins: []\n"
    )
    (docs / "index.md").write_text("# Title\n")
    assert build(config, tmp_path / "site").returncode == 0
    (docs / "index.md").write_text("# Title\n\n" + "\n\n".join(DEAD))
    (docs / "other.md").write_text("# Other\n")
    failed = build(config, tmp_path / "site")
    assert failed.returncode != 0
    assert [said for said in DEAD.values() if said not in failed.stderr] == []
    assert failed.stderr.count("WARNING") == len(DEAD)


@pytest.mark.parametrize("folder", [*FOLDERS, "src/smalti"])
def test_the_arguments_of_docstrings_exist(folder: str) -> None:
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                unknown = documented(node) - taken(node)
                wrong += [f"{path.relative_to(ROOT)}:{node.name}: {name}" for name in unknown]
    assert wrong == []


def documented(function: ast.FunctionDef) -> set[str]:
    """The names under "Args:"; "a, b: text" describes two."""
    text = ast.get_docstring(function) or ""
    found = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    lines = re.findall(r"^    ([\w, *]+):", found[1], re.MULTILINE) if found else []
    return {name.strip(" *") for line in lines for name in line.split(",")}


def taken(function: ast.FunctionDef) -> set[str]:
    """The names of a function's parameters."""
    given = function.args
    all_of = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return {argument.arg for argument in all_of if argument is not None}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_in_the_pages_compiles(page: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert not any("--8 <" in block for block in blocks)  # a formatted marker includes no file
    for block in blocks:
        if not block.startswith("--8<--"):
            compile(block, str(page), "exec")


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^### ([^\n]+)$.*?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = dict(SECTION.findall(CONTRIBUTING))  # heading -> its code block
IN_FILES = {  # heading -> the file in tests/ with the same code
    "A quantizer": "extension.py",
    "A tokenizer": "extension.py",
    "A prior": "extension.py",
    "A condition": "colour.py",
}


def test_contributing_has_an_example_of_everything() -> None:
    others = {"A path of a flow prior", "A solver of a flow prior", "A discriminator"}
    others |= {"A data source", "A metric", "A text encoder"}
    assert EXAMPLES.keys() == {*IN_FILES, *others}


@pytest.mark.parametrize("heading", IN_FILES)
def test_some_examples_are_those_that_every_command_is_tested_with(heading: str) -> None:
    """`tests/test_extension.py` and `tests/pipelines/test_own_condition.py` run them."""
    file = ROOT / "tests" / IN_FILES[heading]
    assert EXAMPLES[heading] in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("heading", [name for name in EXAMPLES if name not in IN_FILES])
def test_an_example_of_contributing_runs(heading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is a module, and ends with its own test; what it registers is undone."""
    from smalti.data.sources.base import SOURCES
    from smalti.prior.conditions.text_encoder import TEXT_ENCODERS
    from smalti.prior.flow.path import PATHS
    from smalti.prior.flow.solvers.base import SOLVERS
    from smalti.tokenizer.discriminators import DISCRIMINATORS

    for registry in (PATHS, SOLVERS, DISCRIMINATORS, TEXT_ENCODERS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    sources = dict(SOURCES)
    block = EXAMPLES[heading]
    named = re.match(r"# (\w+)\.py\n", block)
    module = types.ModuleType(named[1] if named else "contributed")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    try:
        exec(compile(block, heading, "exec"), vars(module))
    finally:
        SOURCES.clear()
        SOURCES.update(sources)


# -------------------------------------------------------------------------------------------------
# Messages that the pages quote

TROUBLES = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SOURCES = ("src/smalti", "data", "tokenizer", "prior", "pipelines", "training", "evaluation")


def text_of(node: ast.expr) -> str | None:
    """A string of the source, with "..." for what is filled in when it is shown."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-.0-9]*[sdg]", "...", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "..." for part in node.values)
    return None


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Every string in the sources."""
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    return [text for node in nodes if isinstance(node, ast.expr) and (text := text_of(node))]


@pytest.mark.parametrize("quoted", re.findall(r'"([^"]+)"', TROUBLES.replace("\n", " ")))
def test_a_message_that_is_quoted_is_in_the_sources(quoted: str, texts: list[str]) -> None:
    pattern = re.compile(".*".join(map(re.escape, quoted.split("..."))), re.DOTALL)
    assert any(pattern.search(text) for text in texts), quoted
