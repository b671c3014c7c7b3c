"""What users install: everything that is in the repository, and a quick front door."""

import ast
import contextlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import (
    PackageNotFoundError,
    distribution,
    packages_distributions,
    requires,
)
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FOLDERS = ("data", "tokenizer", "prior", "pipelines", "training", "evaluation", "scripts")


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_importing_smalti_does_not_import_torch() -> None:
    assert run("import smalti, sys; print('torch' in sys.modules)").strip() == "False"


def test_the_help_of_the_console_command_does_not_import_torch() -> None:
    out = run(
        "from smalti.cli import main; import sys; main(['--help']); print('torch' in sys.modules)"
    )
    assert out.strip().endswith("False")
    assert "train-tokenizer" in out


def test_public_names_are_there() -> None:
    import smalti

    for name in smalti.__all__:
        assert getattr(smalti, name) is not None
    with pytest.raises(AttributeError, match="Tokeniser"):
        smalti.Tokeniser  # noqa: B018


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_the_version_is_the_same_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.search(r"^## (\d\S+) - (\S+)$", changelog, re.MULTILINE)
    assert released and released[1] == PROJECT["version"]
    assert f"version: {released[1]}\ndate-released: {released[2]}\n" in citation


def installed_by(*extras: str) -> set[str]:
    """The distributions that smalti with these extras requires, and what those require."""
    wanted = [(Requirement(text), "") for text in PROJECT["dependencies"]]
    wanted += [(Requirement(text), "") for extra in extras for text in EXTRAS[extra]]
    found: set[tuple[str, str]] = set()
    while wanted:
        requirement, of = wanted.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": of}):
            continue
        for extra in ("", *requirement.extras):
            key = canonicalize_name(requirement.name), extra
            if key not in found:
                found.add(key)
                with contextlib.suppress(PackageNotFoundError):
                    wanted += [(Requirement(text), extra) for text in requires(key[0]) or []]
    return {name for name, _ in found}


def imported_packages(file: Path) -> Iterator[str]:
    """Top-level names that a file imports, but for lines that the type checker is told to skip."""
    lines = file.read_text().splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        if "ignore[" not in lines[node.lineno - 1]:
            yield from (name.split(".")[0] for name in names)


def test_the_type_checker_and_the_tests_have_every_package_that_the_code_imports() -> None:
    found = installed_by("test", "eval")  # by make types and make test
    makers = packages_distributions()
    ours = {"smalti", *sys.stdlib_module_names}
    for file in (file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")):
        for name in set(imported_packages(file)) - ours:
            distributions = {canonicalize_name(maker) for maker in makers.get(name, [name])}
            assert distributions & found, f"{file} imports {name}, which no requirement installs"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A fresh clone of the repository."""
    copy = tmp_path_factory.mktemp("packaging") / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    return copy


@pytest.fixture(scope="module")
def wheel(clone: Path) -> Path:
    """The wheel that is built from it."""
    out = clone.parent / "dist"
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(clone)], check=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(clone: Path) -> Path:
    """The source distribution that is built from it."""
    out = clone.parent / "sdist"
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True, capture_output=True)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(clone: Path, wheel: Path) -> dict[str, str]:
    """An environment in which the installed wheel is imported, not the clone."""
    site = clone.parent / "site"
    install(wheel, site)
    return {**os.environ, "PYTHONPATH": str(site)}


def install(wheel: Path, site: Path) -> None:
    """Put the packages of a wheel into a folder, without what it requires."""
    options = ["-q", "--no-deps", "--no-compile", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)


def alone(folder: Path, wheel: Path, *extras: str) -> Path:
    """The Python of an environment with the wheel, and nothing else but what it requires."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in installed_by(*extras):
        with contextlib.suppress(PackageNotFoundError):  # for other machines or Pythons
            files = distribution(name).files or []
            for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
                link = site / top
                if not link.exists():
                    link.symlink_to(distribution(name).locate_file(top))
    install(wheel, site)
    return folder / "bin" / "python"


GENERATE = ("generate", "--model", "smalti/fashion-next-token", "--num_images", "2")


@pytest.mark.slow
def test_the_wheel_needs_what_it_requires_and_nothing_else(wheel: Path, tmp_path: Path) -> None:
    python = alone(tmp_path / "environment", wheel)
    done = use(python, tmp_path, *GENERATE, "--output_dir", "new")
    assert done.returncode == 0, done.stderr[-1000:]
    assert len(list((tmp_path / "new").rglob("*.png"))) >= 2
    for extra, *command in (("ui", "ui"), ("serve", "serve")):
        refused = use(python, tmp_path, *command, "--model", "smalti/fashion-next-token")
        assert refused.returncode and "Traceback" not in refused.stderr
        assert f"pip install 'smalti[{extra}]'" in refused.stderr


@pytest.mark.slow
def test_the_wheel_with_an_extra_has_what_its_command_needs(wheel: Path, tmp_path: Path) -> None:
    python = alone(tmp_path / "environment", wheel, "serve", "ui")
    code = "import smalti.pipelines.serving, gradio, uvicorn, fastapi, prometheus_client"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


def use(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the smalti of an environment, which sees no other package."""
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(
        [str(python), "-m", "smalti", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_wheel_holds_every_tracked_file_of_the_packages(clone: Path, wheel: Path) -> None:
    """No sub-package, recipe, asset or py.typed is missing; no folder is installed bare."""
    packed = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "src/smalti", *FOLDERS],
        cwd=clone,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    expected = {f"smalti/{name.removeprefix('src/smalti/')}" for name in tracked}
    assert expected <= packed
    assert not [name for name in packed if name.split("/")[0] in FOLDERS]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["inside the clone", "elsewhere"])
def test_the_installed_package_works_everywhere(
    place: str, clone: Path, installed: dict[str, str], tmp_path: Path
) -> None:
    """No folder of the clone hides the installed package."""
    folder = clone if place == "inside the clone" else tmp_path
    code = "import smalti, sys; print(smalti.Pipeline.__module__, smalti.__file__, flush=True); "
    code += "from smalti.cli import main; main(['train-prior', '--print-config'])"
    done = execute(["-c", code], folder, installed)
    assert done.stdout.split()[1].startswith(installed["PYTHONPATH"])


@pytest.mark.slow
def test_the_installed_package_is_launched(clone: Path, installed: dict[str, str]) -> None:
    """As a module, where folders of the clone have the names of its packages."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    script = ["-m", "smalti.scripts.train_tokenizer", "--print-config"]
    execute([*launch, *script], clone, installed)
    assert "train-tokenizer" in execute(["-m", "smalti", "--help"], clone, installed).stdout


def execute(
    arguments: list[str], folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """What Python does with these arguments in that folder; it must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    return done


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(
    sdist: Path, wheel: Path, tmp_path: Path
) -> None:
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(sdist)], check=True)
    (again,) = tmp_path.glob("*.whl")
    assert again.name == wheel.name
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_distributions_are_small(sdist: Path, wheel: Path) -> None:
    """The embedded pictures, and the pipelines that ship, are most of it."""
    assert wheel.stat().st_size < 60e6 and sdist.stat().st_size < 60e6
