"""What users install: everything that is in the repository, and a quick front door."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_the_wheel_holds_every_tracked_file_of_the_packages(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(copy)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "src/smalti", *FOLDERS],
        cwd=copy,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    expected = {f"smalti/{f.removeprefix('src/smalti/')}" for f in tracked}
    assert expected <= packed
    assert not [name for name in packed if name.split("/")[0] in FOLDERS]
