"""Opening a folder of many pictures, the first and the second time.

    python benchmarks/folder_opening.py --pictures 1000000

Makes the folder once in --folder (hard links to a few small pictures, so that it takes entries of
folders and little else), then opens it in two new processes. Prints one line of JSON: seconds of
each opening, and system calls for files of one with an index (`strace -c`, if it is installed).
Sets of at most `--folder.verify_up_to` pictures are also decoded: use more.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

CLASSES, LINKS = 1000, 10_000  # file systems limit the links to one file

OPEN = """
import json, sys, time
import smalti.data.dataset, smalti.data.sources.folder
start, cpu = time.perf_counter(), time.process_time()
source = smalti.data.dataset.DataOptions(data=sys.argv[1]).source()
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
found = {"seconds": seconds, "seconds_of_cpu": cpu}
print(json.dumps({**{k: round(v, 2) for k, v in found.items()}, "pictures": len(source)}))
"""


def make_folder(root: Path, pictures: int) -> None:
    """`pictures` pictures in `CLASSES` folders, which have not changed for some seconds."""
    original = root.with_name("originals")
    original.mkdir(parents=True)
    for number in range(pictures):
        source = original / f"{number // LINKS}.png"
        if number % LINKS == 0:
            Image.new("RGB", (16, 16), (number // LINKS % 256, 0, 0)).save(source)
        folder = root / f"class {number % CLASSES:03}"
        if number < CLASSES:
            folder.mkdir(parents=True)
        os.link(source, folder / f"{number:07}.png")
    time.sleep(3)  # an index does not trust folders that have just changed


def opened(root: Path, cache: Path) -> dict[str, float]:
    """Seconds, number of pictures and system calls of one opening, in a process of its own."""
    command = [sys.executable, "-c", OPEN, str(root)]
    environment = {**os.environ, "SMALTI_CACHE": str(cache)}
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found = json.loads(run.stdout)
    if shutil.which("strace") and any(cache.rglob("*.json.gz")):
        counted = ["strace", "-f", "-c", "-e", "trace=file", *command]
        run = subprocess.run(counted, env=environment, check=True, capture_output=True, text=True)
        total = next(line for line in run.stderr.splitlines()[::-1] if line.endswith("total"))
        found["file_calls_with_index"] = int(total.split()[3])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--pictures", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to make it; removed at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root, cache = Path(folder) / "pictures", Path(folder) / "cache"
        make_folder(root, arguments.pictures)
        first = opened(root, cache)
        print(json.dumps({"first": first, "second": opened(root, cache)}))


if __name__ == "__main__":
    main()
