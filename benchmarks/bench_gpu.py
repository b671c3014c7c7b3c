"""The whole check on a GPU, in at most six minutes: `make bench-gpu`.

    python benchmarks/bench_gpu.py --output bench.md

Runs the checks of device_checks.py, then the tests that need CUDA (where pytest is installed), then
the table of bench.py in fp32 and bf16. The report has the name of the card, and names what was left
out. smalti need not be installed: a checkout is enough. Without CUDA it ends with status 2;
`--device cpu --quick` runs all of it in a short form, to see that it works.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "tokenizer", "prior", "pipelines", "training", "evaluation", "scripts")
SECONDS = 270  # of six minutes; the rest is for the part that is running then
MARK = "cuda.is_available()"  # in the condition of every test that needs a GPU


def make_importable(folder: Path) -> None:
    """Lay out the checkout as the package `smalti`, by links, if none is installed."""
    try:
        import smalti.errors  # noqa: F401
    except ModuleNotFoundError:
        sys.modules.pop("smalti", None)  # a folder of that name, if there was one
        package = folder / "smalti"
        package.mkdir()
        for path in (*(ROOT / "src" / "smalti").iterdir(), *(ROOT / name for name in PACKAGES)):
            (package / path.name).symlink_to(path)
        about = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        found = re.search(r'^version = "(.+)"$', about, re.MULTILINE)
        version = found[1] if found else "0"
        info = folder / f"smalti-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: smalti\nVersion: {version}\n")
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = str(folder)


def checks(device: "torch.device") -> Iterator[tuple[bool, str]]:  # noqa: F821
    """Whether each check holds, and a line about it."""
    from device_checks import CHECKS

    for check in CHECKS:
        what = " ".join((check.__doc__ or "").split())
        start = time.monotonic()
        try:
            check(device)
        except ModuleNotFoundError as error:
            yield True, f"left out: {check.__name__}, there is no {error.name} here"
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [type(error).__name__]
            yield False, f"FAILED {check.__name__}: {what} ({lines[0]})"
        else:
            yield True, f"passed {check.__name__}, {time.monotonic() - start:.1f} s: {what}"


def cuda_tests(seconds: float) -> tuple[bool, str]:
    """Run the tests that are marked as needing CUDA."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if MARK in path.read_text()]
    names = [name for path in files for name in marked(path)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sorted(names)]
    try:
        import pytest  # noqa: F401

        end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except ModuleNotFoundError:
        return True, f"left out: {len(names)} tests that need CUDA, there is no pytest here"
    except subprocess.TimeoutExpired:
        return True, f"left out: {len(names)} tests that need CUDA, they took over {seconds:.0f} s"
    lines = end.stdout.strip().splitlines() or ["no output"]
    if end.returncode:
        print(end.stdout[-6000:], end.stderr[-2000:], file=sys.stderr)
    return end.returncode == 0, f"tests that need CUDA: {lines[-1].strip('= ')}"


def marked(path: Path) -> Iterator[str]:
    """The tests of a file whose decorators have MARK, as pytest names them."""
    decorated = r"((?:^@[^\n]*\n(?:[ )][^\n]*\n)*)+)def (test_\w+)"
    for found in re.finditer(decorated, path.read_text(encoding="utf-8"), re.MULTILINE):
        if MARK in found[1]:
            yield f"{path.relative_to(ROOT)}::{found[2]}"


def report(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """Lines of the report, and whether what they are about holds."""
    import torch
    from bench import PARTS, Setting, machine, measured

    start, device = time.monotonic(), torch.device(args.device)
    yield True, f"# smalti on {machine(device)}\n"
    yield from checks(device)
    if device.type == "cuda":
        yield cuda_tests(args.seconds / 3)
    for dtype in (torch.bfloat16, torch.float32):
        setting = Setting(device, dtype, 1 if args.quick else 5, args.quick, not args.quick)
        left = args.seconds - (time.monotonic() - start)
        yield True, f"\n## {str(dtype).removeprefix('torch.')}\n"
        for text in measured(setting, list(PARTS), left):
            yield True, text
    yield True, f"\n{time.monotonic() - start:.0f} s"


def main() -> int:
    """Write the report and print it; the exit status is 1 if a check fails, 2 without CUDA."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("bench-gpu.md"), help="the report")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no part begins after them")
    parser.add_argument(
        "--quick", action="store_true", help="small models, one round, to see that it works"
    )
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA here: run it on a machine with a GPU, or with --device cpu --quick")
        return 2
    folder = tempfile.mkdtemp()
    try:
        make_importable(Path(folder))
        whole = True
        with args.output.open("w", encoding="utf-8") as stream:
            for holds, line in report(args):
                whole = whole and holds
                print(line, flush=True)
                print(line, file=stream, flush=True)
    finally:
        shutil.rmtree(folder)
    return 0 if whole else 1


if __name__ == "__main__":
    raise SystemExit(main())
