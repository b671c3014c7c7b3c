"""Start-up time of commands beside that of Python, and the peak memory of loading a pipeline.

    python benchmarks/start_up.py

Times are of the processor, of new processes in turns, with files that are already in the memory of
the system. The peak is the resident memory that loading adds to a process that has loaded a small
pipeline before, over the size of the weights in memory. Weights are random, in a temporary folder.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import smalti": ["-c", "import smalti"],
    "smalti --help": ["-m", "smalti", "--help"],
    "smalti train-prior --help": ["-m", "smalti", "train-prior", "--help"],
    "import torch": ["-c", "import torch"],
    "from smalti import Pipeline": ["-c", "from smalti import Pipeline"],
}
PEAK = """
import sys
from pathlib import Path
import smalti

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])

small, large, dtype = sys.argv[1:]
smalti.Pipeline.from_pretrained(small, dtype=dtype)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = kilobytes("VmRSS")
pipe = smalti.Pipeline.from_pretrained(large, dtype=dtype)
size = sum(p.nbytes for model in (pipe.tokenizer, pipe.prior) for p in model.parameters())
print(size, (kilobytes("VmHWM") - before) * 1024)
"""


def seconds_of(arguments: list[str]) -> float:
    """Seconds of the processor that a new Python takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def save(folder: Path, tokenizer_name: str, prior_name: str) -> None:
    """Save a pipeline of two presets."""
    from device_checks import pipeline_of

    pipeline_of(tokenizer_name, prior_name).save_pretrained(folder)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="processes of each command")
    parser.add_argument("--presets", nargs=2, default=["vq-f16", "gpt-b"], help="of the pipeline")
    parser.add_argument(
        "--parts", nargs="*", choices=["time", "memory"], default=["time", "memory"]
    )
    args = parser.parse_args()
    if "time" in args.parts:
        times = [[seconds_of(c) for c in COMMANDS.values()] for _ in range(args.rounds + 1)][1:]
        print("| command | seconds of the processor | over python -c pass |\n| --- | --- | --- |")
        for number, command in enumerate(COMMANDS):
            own = statistics.median(row[number] for row in times)
            ratio = statistics.median(row[number] / row[0] for row in times)
            print(f"| `{command}` | {own:.2f} | {ratio:.1f} |")
    if "memory" in args.parts:
        print(
            "\n| precision | weights, MB | peak of loading, MB | ratio |\n| --- | --- | --- | --- |"
        )
        with tempfile.TemporaryDirectory() as temporary:
            small, large = Path(temporary, "small"), Path(temporary, "large")
            save(small, "vq-32-tiny", "gpt-nano")
            save(large, *args.presets)
            for dtype in ("float32", "bfloat16"):
                command = [sys.executable, "-c", PEAK, small, large, dtype]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                size, peak = map(int, done.stdout.split())
                print(f"| {dtype} | {size / 1e6:.0f} | {peak / 1e6:.0f} | {peak / size:.2f} |")


if __name__ == "__main__":
    main()
