"""A random campaign of faults: kills, full disks, flipped bits and edited recipes.

    make fault-campaign                                   20 minutes at most
    python tools/fault_campaign.py --minutes 2 --seed 7   another campaign, shorter

Every trial is chosen by the seed and its number alone. The results are appended to results.jsonl
in the campaign's folder, so the same command continues an interrupted campaign. At the end the
table of docs/reliability.md is printed. The exit status is 1 if any trial did not hold.

The trials come in three groups:

    interrupt   A command meets a fault at one of its file operations: SIGKILL, SIGTERM, SIGINT, or
                a disk that is full from then on. The same command, repeated, must succeed, leave no
                temporary files, and write the same weights, latents and pictures.
    flip        One bit of one file that smalti wrote is flipped. `smalti info`, or the commands
                that read the file, must report it.
    edit        One value of a recipe is replaced. The command must run, or refuse the value.

In every group a traceback, a command that does not end, and a status other than the documented ones
are failures.
"""

import argparse
import contextlib
import errno
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import yaml
from PIL import Image

from smalti.cli import COMMANDS, main
from smalti.errors import EXIT_INTERRUPTED

SECONDS = 300  # that a command of a trial may take; a few on a quiet machine
MEMORY = 16 * 2**30  # bytes of address space that a command may take beyond that of the parent
DOCUMENTED = (0, 1, 2, EXIT_INTERRUPTED)  # exit statuses
TEMPORARY = ".tmp-"

# -- commands -------------------------------------------------------------------------------------

CONV = {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_levels": []}
RUN = {
    "max_train_steps": 2,
    "train_batch_size": 8,
    "mixed_precision": "no",
    "checkpointing_steps": 1,
    "validation_steps": 2,
    "logging_steps": 1,
}
VQ = {"kind": "vq", "image_size": 32, "conv": {**CONV, "z_channels": 8}}
KL = {"kind": "kl", "image_size": 32, "conv": {**CONV, "z_channels": 2}}
NEXT_TOKEN = {
    "kind": "next-token",
    "depth": 1,
    "width": 16,
    "num_heads": 2,
    "hidden": 32,
    "prefix_rotary": "zero",
}
FLOW = {
    "kind": "flow",
    "network": {"depth": 1, "width": 16, "num_heads": 2, "patch_size": 4, "frequency_size": 16},
}
RECIPES = {
    "tokenizer": {**RUN, "data": "gold/pictures", "tokenizer": VQ},
    "kl": {**RUN, "data": "gold/pictures", "tokenizer": KL},
    "prior": {
        **RUN,
        "latents": "gold/latents",
        "tokenizer": "gold/tokenizer/tokenizer",
        "prior": NEXT_TOKEN,
    },
    "flow": {**RUN, "latents": "gold/kl-latents", "tokenizer": "gold/kl/tokenizer", "prior": FLOW},
}
RESUME = ("--resume_from_checkpoint", "latest")


@dataclass(frozen=True)
class Job:
    """A command; `{out}` in its arguments is the folder that it writes into."""

    name: str  # of its result in the campaign's folder
    command: str
    arguments: tuple[str, ...]

    def argv(self, out: str) -> list[str]:
        return [self.command, *(argument.format(out=out) for argument in self.arguments)]


def _training(name: str, command: str) -> Job:
    recipe = ("--config", f"gold/{name}.yaml", "--output_dir", "{out}", *RESUME)
    return Job(name, command, recipe)


def _on_pictures(command: str, *options: str, indices: tuple[str, ...] = ("0",)) -> Job:
    model = ("--model", "gold/kl/tokenizer", "--data", "gold/pictures", "--indices", *indices)
    return Job(command, command, (*model, "--output", "{out}/grid.png", "--overwrite", *options))


PIPELINE = ("--model", "gold/prior/pipeline")
PICTURES = ("--data", "gold/pictures")
OUTPUT = ("--output_dir", "{out}")
TWO_STEPS = ("--num_inference_steps", "2")  # of a solver

# In an order in which each finds what it needs.
JOBS = (
    Job("checked", "check-data", (*PICTURES, "--json", "{out}/report.json")),
    _training("tokenizer", "train-tokenizer"),
    _training("kl", "train-tokenizer"),
    Job("latents", "encode", ("--tokenizer", "gold/tokenizer/tokenizer", *PICTURES, *OUTPUT)),
    Job("kl-latents", "encode", ("--tokenizer", "gold/kl/tokenizer", *PICTURES, *OUTPUT)),
    _training("prior", "train-prior"),
    _training("flow", "train-prior"),
    Job(
        "samples",
        "generate",
        (*PIPELINE, *OUTPUT, "--num_images_per_class", "2", "--batch_size", "4"),
    ),
    Job(
        "evaluation",
        "evaluate",
        (*PIPELINE, *PICTURES, *OUTPUT, "--num_samples", "16", "--classifier_epochs", "1"),
    ),
    Job(
        "pairs",
        "reflow",
        ("--model", "gold/flow/pipeline", *OUTPUT, "--num_pairs=6", "--num_heldout=2", *TWO_STEPS),
    ),
    Job("exported-latents", "export-latents", ("gold/latents", "{out}")),
    Job(
        "imported",
        "import-latents",
        ("gold/theirs", "{out}", "--tokenizer", "gold/tokenizer/tokenizer"),
    ),
    Job("published", "export", ("gold/prior/pipeline/prior", "{out}/model.safetensors")),
    Job(
        "converted",
        "convert",
        ("llamagen-prior", "gold/published/model.safetensors", "{out}", "--heads", "2"),
    ),
    _on_pictures("interpolate", "--steps", "2", indices=("0", "9")),
    _on_pictures("attribute", "--positive", "red", "--negative", "blue"),
    _on_pictures("traverse", "--channels", "0"),
    _on_pictures("invert", "--steps", "2", "--perceptual_weight", "0"),
)
BY_NAME = {job.name: job for job in JOBS}

# What reads a result: the first argument says where, the others are the command.
READERS: dict[str, list[tuple[str, ...]]] = {
    "tokenizer": [
        ("info", "{in}/tokenizer"),
        ("encode", "--tokenizer", "{in}/tokenizer", *PICTURES, *OUTPUT),
    ],
    "kl": [
        ("info", "{in}/tokenizer"),
        ("encode", "--tokenizer", "{in}/tokenizer", *PICTURES, *OUTPUT),
    ],
    "latents": [("train-prior", "--config", "gold/prior.yaml", "--latents", "{in}", *OUTPUT)],
    "kl-latents": [("train-prior", "--config", "gold/flow.yaml", "--latents", "{in}", *OUTPUT)],
    "prior": [("info", "{in}/pipeline"), ("generate", "--model", "{in}/pipeline", *OUTPUT)],
    "flow": [
        ("info", "{in}/pipeline"),
        ("generate", "--model", "{in}/pipeline", *OUTPUT, *TWO_STEPS),
    ],
    "samples": [tuple(BY_NAME["samples"].argv("{in}"))],
    "evaluation": [tuple(BY_NAME["evaluation"].argv("{in}"))],
    "pairs": [tuple(BY_NAME["pairs"].argv("{in}"))],
    "converted": [],
}


def prepare(folder: Path) -> None:
    """Write the pictures and recipes, and run every command once without a fault."""
    gold = folder / "gold"
    if (gold / "complete").is_file():
        return
    shutil.rmtree(gold, ignore_errors=True)
    random_pixels = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (gold / "pictures" / name).mkdir(parents=True)
        for number in range(8):
            pixels = random_pixels.integers(0, 80, (36, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(gold / "pictures" / name / f"{number}.png")
    for name, recipe in RECIPES.items():
        (gold / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    for number in range(8):  # codes as LlamaGen writes them
        for part, values in (
            ("codes", random_pixels.integers(0, 16, (1, 1, 64))),
            ("labels", [number % 3]),
        ):
            (gold / "theirs" / f"toy_{part}").mkdir(parents=True, exist_ok=True)
            np.save(gold / "theirs" / f"toy_{part}" / f"{number}.npy", np.asarray(values))
    for job in JOBS:
        end = run(folder, job.argv(f"gold/{job.name}"))
        if end.status != 0:
            raise SystemExit(f"smalti {' '.join(job.argv('gold'))} failed:\n{end.text}")
    (gold / "complete").touch()


# -- running a command in a child -----------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """How a command ended."""

    status: int  # negative: the signal that ended it
    text: str  # what it printed
    operations: int  # file operations below the folder `watched`

    @property
    def complaint(self) -> str:
        """What is wrong with the end itself; empty if nothing."""
        if "Traceback (most recent call last)" in self.text:
            return f"traceback: {self.text.strip().splitlines()[-1]}"
        if self.status == -signal.SIGALRM:
            return f"did not end within {SECONDS} s"
        return "" if self.status in DOCUMENTED else f"status {self.status}"


Fault = Callable[[str], None]  # called with the name of the audit event


def run(folder: Path, argv: list[str], fault: Fault | None = None, at: int = -1) -> End:
    """Run a command in a forked child, in `folder`; `fault` is called before operation `at`.

    A file operation is one of Python's audit events that changes a file below folder/trial.
    """
    log, count = folder / "log", folder / "count"
    count.write_text("0")
    child = os.fork()
    if child == 0:
        os._exit(_in_child(folder, argv, fault, at, log, count))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return End(status, log.read_text(errors="replace"), int(count.read_text()))


def _in_child(
    folder: Path, argv: list[str], fault: Fault | None, at: int, log: Path, count: Path
) -> int:
    os.setpgrp()
    signal.alarm(SECONDS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    # pytest has put objects of its own in their place
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115 (until the process ends)
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.chdir(folder)
    operations = [0]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if _changes_a_file(event, arguments, "trial"):
            operations[0] += 1
            if fault and operations[0] > at:
                fault(event)

    sys.addaudithook(watch)
    try:
        status = main(argv)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 98
    fault = None
    count.write_text(str(operations[0]))
    sys.stdout.flush()
    sys.stderr.flush()
    return status


CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _changes_a_file(event: str, arguments: tuple[Any, ...], below: str) -> bool:
    """Whether an audit event changes a file in the folder `below`."""
    if event == "open":
        path, mode, flags = arguments
        writes = set("wax+") & set(mode) if isinstance(mode, str) else (flags or 0) & WRITING
        return bool(writes) and _is_below(path, below)
    return event in CHANGES and _is_below(arguments[0], below)


def _is_below(path: Any, folder: str) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    parts = os.fsdecode(path)
    return parts.startswith(f"{folder}/") or f"/{folder}/" in parts


# -- faults ---------------------------------------------------------------------------------------


def once(number: int) -> Fault:
    """Send a signal to the process itself, the first time."""
    sent = []

    def fault(event: str) -> None:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    return fault


def full_disk(event: str) -> None:
    """Every file or folder that is created from now on fails; files can still be removed."""
    if event in ("open", "os.mkdir", "os.link", "os.symlink"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "trial")


FAULTS: dict[str, Callable[[], Fault]] = {
    "SIGKILL": lambda: once(signal.SIGKILL),
    "SIGTERM": lambda: once(signal.SIGTERM),
    "SIGINT": lambda: once(signal.SIGINT),
    "full disk": lambda: full_disk,
}

# -- trials ---------------------------------------------------------------------------------------


def interrupt(folder: Path, chance: random.Random) -> dict[str, str]:
    """A command meets a fault, and is repeated."""
    job = chance.choice(JOBS)
    name, make = chance.choice(list(FAULTS.items()))
    total = operations_of(folder, job)
    at = chance.randrange(total)
    trial = fresh(folder)
    ended = run(folder, job.argv("trial/out"), make(), at)
    what = {"of": job.command, "fault": f"{name} at operation {at} of {total}"}
    killed = ended.status == -signal.SIGKILL and name == "SIGKILL"
    if not killed and ended.complaint:
        return {**what, "outcome": "failed", "why": ended.complaint}
    again = run(folder, job.argv("trial/out"))
    # Conversions and exports overwrite nothing, not even what they finished as they were stopped.
    finished = "nothing is overwritten" in again.text
    if again.status != 0 and not finished:
        return {
            **what,
            "outcome": "stuck",
            "why": f"status {again.status}: {again.text.strip()[-300:]}",
        }
    left = [str(p.relative_to(trial)) for p in trial.rglob(f"{TEMPORARY}*")]
    if left:
        return {**what, "outcome": "leftover", "why": ", ".join(left)}
    different = first_difference(folder / "gold" / job.name, trial / "out")
    return {**what, "outcome": "differs" if different else "held", "why": different}


def operations_of(folder: Path, job: Job) -> int:
    """The number of file operations of a command, counted once."""
    known = folder / "operations.json"
    counts = json.loads(known.read_text()) if known.is_file() else {}
    if job.name not in counts:
        fresh(folder)
        counts[job.name] = run(folder, job.argv("trial/out")).operations
        known.write_text(json.dumps(counts))
    return counts[job.name]


def fresh(folder: Path) -> Path:
    """An empty folder for a trial."""
    trial = folder / "trial"
    shutil.rmtree(trial, ignore_errors=True)
    trial.mkdir()
    return trial


def first_difference(gold: Path, result: Path) -> str:
    """The first file of weights, latents or pictures that is missing or has other bytes."""
    for path in sorted(gold.rglob("*")):
        if path.suffix in (".safetensors", ".png", ".parquet", ".npy"):
            other = result / path.relative_to(gold)
            if not other.is_file():
                return f"{path.relative_to(gold)} is missing"
            if digest(path) != digest(other):
                return f"{path.relative_to(gold)} has other bytes"
    return ""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Pictures that are shown and texts that are read by people: a flipped bit there changes no result.
SHOWN = (".md", ".html", ".log")


def flip(folder: Path, chance: random.Random) -> dict[str, str]:
    """One bit of a file is flipped, and the file is read."""
    name = chance.choice(list(READERS))
    files = sorted(
        p for p in (folder / "gold" / name).rglob("*") if p.is_file() and p.stat().st_size
    )
    files = [p for p in files if p.suffix not in SHOWN and not is_preview(p)]
    path = chance.choice(files)
    copy = fresh(folder) / "in"
    shutil.copytree(folder / "gold" / name, copy)
    damaged = copy / path.relative_to(folder / "gold" / name)
    content = bytearray(path.read_bytes())
    position, bit = chance.randrange(len(content)), chance.randrange(8)
    content[position] ^= 1 << bit
    damaged.write_bytes(content)
    what = {"of": f"{name}: {path.name}", "fault": f"bit {bit} of byte {position}"}
    for argv in (["info", "{in}"], *READERS[name]):
        shutil.rmtree(folder / "trial" / "out", ignore_errors=True)
        words = [word.replace("{in}", "trial/in").replace("{out}", "trial/out") for word in argv]
        end = run(folder, words)
        if end.complaint:
            return {**what, "outcome": "failed", "why": end.complaint}
        if end.status != 0 or "damaged" in end.text or "differs" in end.text:
            return {**what, "outcome": "held", "why": end.text.strip()[-200:]}
    same = digest(damaged) == digest(path)  # a reader has repaired the file
    return {
        **what,
        "outcome": "held" if same or means_the_same(path, damaged) else "silent",
        "why": "",
    }


def is_preview(path: Path) -> bool:
    """Whether a file is a picture that a run shows, and not one of a generated folder."""
    return path.suffix == ".png" and not path.stem.isdecimal()


def means_the_same(path: Path, other: Path) -> bool:
    """Whether two JSON files have equal values."""
    if path.suffix != ".json":
        return False
    with contextlib.suppress(ValueError):
        return json.loads(path.read_bytes()) == json.loads(other.read_bytes())
    return False


VALUES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2.5,
    "",
    "x",
    [],
    [1, 2],
    {},
    {"a": 1},
    10**7,
    1e300,
    "nan",
    "é\n",
)


def edit(folder: Path, chance: random.Random) -> dict[str, str]:
    """One value of a complete recipe is replaced."""
    name = chance.choice(list(RECIPES))
    recipe = yaml.safe_load((folder / "gold" / name / "config.yaml").read_text())
    place, key = chance.choice(list(leaves(recipe)))
    value = chance.choice(VALUES)
    if value == {} and isinstance(place[key], dict):
        value = {"a": 1}  # without options a network has its published size: minutes for a step
    place[key] = value
    trial = fresh(folder)
    recipe.update(output_dir="trial/out", max_train_steps=1, resume_from_checkpoint=None)
    (trial / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    job = BY_NAME[name]
    end = run(folder, [job.command, "--config", "trial/recipe.yaml"])
    why = end.complaint
    what = {"of": f"recipe of {job.command}", "fault": f"{key}: {value!r}"}
    return {**what, "outcome": "failed" if why else "held", "why": why}


def leaves(recipe: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in a recipe."""
    items = recipe.items() if isinstance(recipe, dict) else enumerate(recipe)
    for key, value in list(items):
        yield recipe, key
        if isinstance(value, dict | list):
            yield from leaves(value)


GROUPS = {"interrupt": interrupt, "flip": flip, "edit": edit}

# -- the campaign ---------------------------------------------------------------------------------


def campaign(folder: Path, seed: int, minutes: float, trials: int) -> list[dict[str, str]]:
    """Run trials until the time is over, or `trials` of them are done; return their results."""
    torch.set_num_threads(1)
    for module, _ in COMMANDS.values():
        importlib.import_module(module)  # once, and not in every child
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    results = folder / "results.jsonl"
    done = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    )
    done = [line for line in done if line["seed"] == seed]
    end = time.monotonic() + 60 * minutes
    for index in range(len(done), trials):
        if time.monotonic() > end:
            break
        chance = random.Random(f"{seed}/{index}")
        group = list(GROUPS)[index % len(GROUPS)]
        line = {"seed": seed, "index": index, "group": group, **GROUPS[group](folder, chance)}
        with results.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        done.append(line)
        if line["outcome"] != "held":
            print(json.dumps(line), flush=True)
    return done


def table(results: list[dict[str, str]]) -> str:
    """The results as a table in Markdown."""
    rows = ["| trials | of | number | held | other |", "| --- | --- | --- | --- | --- |"]
    for group in GROUPS:
        mine = [line for line in results if line["group"] == group]
        for of in sorted({line["of"].split(":")[0] for line in mine}):
            outcomes = Counter(line["outcome"] for line in mine if line["of"].split(":")[0] == of)
            other = ", ".join(f"{n} {name}" for name, n in outcomes.items() if name != "held")
            rows.append(
                f"| {group} | {of} | {outcomes.total()} | {outcomes['held']} | {other or '-'} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/fault_campaign"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--trials", type=int, default=10_000)
    options = parser.parse_args()
    found = campaign(options.folder.absolute(), options.seed, options.minutes, options.trials)
    print(table(found))
    raise SystemExit(any(line["outcome"] != "held" for line in found))
