"""The benchmarks run, at sizes too small for meaningful timings."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from jobs import forked, program
from PIL import Image
from runs import small_demo

from smalti.pipelines.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bake_off  # noqa: E402


def run(script: str, *arguments: str) -> str:
    """The standard output of a benchmark."""
    done = forked(program(ROOT / "benchmarks" / script, *arguments))
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def light_and_dark(folder: Path) -> Path:
    """A folder of 60 pictures in two classes, of 32 x 32 pixels."""
    for name in ("light", "dark"):
        (folder / name).mkdir(parents=True)
        for i in range(30):
            shade = i + (200 if name == "light" else 0)
            Image.new("RGB", (32, 32), (shade, 90, 2 * i)).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.slow
def test_tokenizer_speed_is_a_ratio_to_diffusers() -> None:
    small = ("--presets", "--small", "--image_size=16", "--rounds=1", "--codes=64")
    lines = run("tokenizer_speed.py", *small).splitlines()
    assert len(lines) == 7
    assert all(float(line.rpartition("= ")[2].split()[0]) > 0 for line in lines[:6])


@pytest.mark.slow
def test_tokenizer_speed_has_a_quick_run_of_published_presets() -> None:
    lines = run("tokenizer_speed.py", "--quick").splitlines()
    assert [line.split()[:2] for line in lines] == [
        [preset, part] for preset in ("kl-f8", "vq-f16") for part in ("encode", "decode")
    ]


@pytest.mark.slow
def test_decoding_is_compared_with_reading_the_weights() -> None:
    precisions = ("float32-rows", "float32", "bfloat16", "int8", "int4")
    small = ("--preset=gpt-nano", "--side=2", "--rounds=1", "--profile")
    out = run("decode_next_token.py", *small, "--dtype", *precisions)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["dtype"] for row in rows] == [*precisions]
    exact, *_ = rows
    assert exact["speed_over_first"] == 1 and exact["step_over_weights"] > 0
    sizes = [row["weights_mb"] for row in rows]
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3] > sizes[4]
    assert {row["products"] for row in rows if row["dtype"] != "float32"} == {exact["products"]}
    assert rows[1]["products"] <= exact["products"]  # where w1 and w3 are read by one product
    assert all(row["operators"] > row["products"] and row["products_gb_s"] > 0 for row in rows)


@pytest.mark.slow
def test_the_gain_of_speculative_decoding_is_a_table() -> None:
    small = ("--preset=gpt-nano", "--windows=3", "--pictures=1", "--rounds=1")
    *_, shipped, large = run("speculative_decoding.py", *small).splitlines()
    for line in (shipped, large):
        window, codes, _, ratio, _, speed = line.strip("| ").split(" | ")
        assert int(window) == 3 and 1 <= float(codes) <= 3 and float(ratio) > 0 and float(speed) > 0


@pytest.mark.slow
def test_precisions_are_compared_in_a_table(tokenizer, prior, pictures: Path, tmp_path) -> None:
    classes = ("blue", "green", "red")
    folder = Pipeline(tokenizer, prior, classes).save_pretrained(tmp_path / "pipeline")
    small = (
        "--num_samples=16",
        "--seeds=2",
        "--classifier_epochs=1",
        "--dtype",
        "bfloat16",
        "int8",
    )
    out = run("precision.py", "--models", str(folder), "--data", str(pictures), *small)
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["float32", "bfloat16", "int8"]
    assert rows[2][3:] == ["1.00", "equal", "100 %"]
    assert all(" ± " in row[1] and " ± " in row[2] and "dB" in row[4] for row in rows[3:])


@pytest.mark.slow
def test_tiled_decoding_is_compared_with_a_whole_decode() -> None:
    sizes = ("--image_size=128", "--channels=8", "--tile=64", "--overlap=32")
    lines = run("tiled_decoding.py", *sizes).splitlines()
    assert [line.split()[0] for line in lines] == ["tiled", "whole", "seams"]
    assert 0 < float(lines[2].split()[1]) < 5


@pytest.mark.slow
def test_tokenizers_are_compared_in_a_table(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    small_demo(monkeypatch)
    arguments = ("--presets", "vq-32-tiny", "kl-32-tiny", "--max_train_steps", "1")
    data = ("--data", str(pictures))
    out = run("compare_tokenizers.py", *arguments, *data, "--output_dir", str(tmp_path / "out"))
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert rows[0].endswith("| seconds of training |")
    assert rows[-2].startswith("| vq-32-tiny | vq | 64 codes of 512")
    assert rows[-1].startswith("| kl-32-tiny | kl | ")
    assert (tmp_path / "out" / "comparison" / "reconstructions.png").is_file()


@pytest.mark.slow
def test_priors_are_compared_in_a_table_and_a_grid(tmp_path: Path, monkeypatch) -> None:
    small_demo(monkeypatch)
    data = light_and_dark(tmp_path / "data")
    out = run(
        "compare_priors.py",
        *("--data", str(data), "--output_dir", str(tmp_path / "runs"), "--quick"),
        *("--tokenizer_steps", "1", "--prior_steps", "1", "--num_samples", "16"),
    )
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][2:]
    assert [row[:2] for row in rows] == [
        ["| gpt-nano", "next-token"],
        ["| var-nano", "next-scale"],
        ["| flow-nano", "flow"],
    ]
    assert [row[-3] for row in rows] == ["65", "6", "24"]  # evaluations of the network
    assert (tmp_path / "runs" / "comparison" / "samples.png").is_file()


@pytest.mark.slow
def test_dit_speed_is_a_ratio_to_diffusers() -> None:
    out = run("dit_speed.py", "--quick", "--device=cpu")
    assert len(re.findall(r"\d\.\d\d", out)) >= 6


@pytest.mark.slow
def test_cache_reading_is_a_ratio_to_plain_numpy() -> None:
    out = run("cache_reading.py", "--samples=600", "--rounds=1", "--batches=2")
    assert json.loads(out)["cache_to_plain"] > 0


@pytest.mark.slow
def test_a_checkpoint_is_compared_with_a_plain_file() -> None:
    out = run("checkpoint_stall.py", "--parameters", "2e6", "--rounds", "1")
    assert float(out.rpartition("= ")[2]) > 0


@pytest.mark.slow
def test_next_scale_speed_is_a_ratio_to_a_plain_var_with_the_same_codes() -> None:
    rows = run("next_scale_speed.py", "--quick", "--rounds", "1", "--device", "cpu").splitlines()
    assert len(rows) == 2 + 2 * 4 + 1
    assert all(float(row.split("|")[4]) > 0 for row in rows[2:])


@pytest.mark.slow
def test_exact_generation_is_a_ratio_to_batches_of_any_size() -> None:
    rows = run("exact_generation.py", "--batch_size", "2", "--rounds", "1").splitlines()
    assert len(rows) == 5
    assert all(float(cell) > 0 for row in rows[2:] for cell in row.split("|")[3:6])


@pytest.mark.slow
def test_serving_many_clients_is_a_ratio_to_one_by_one() -> None:
    arguments = ("--clients", "4", "--pictures", "4", "--singly", "1", "--rounds", "1")
    lines = run("serving_load.py", *arguments).splitlines()
    assert len(lines) == 2
    assert all(float(line.rpartition("= ")[2]) > 0 for line in lines)


@pytest.mark.slow
def test_joining_a_batch_is_compared_with_waiting_for_it() -> None:
    line = run("serving_load.py", "--arrivals", "2", "--rounds", "1", "--shares", "0.5")
    assert float(line.partition("joining = ")[2].split()[0]) > 0


@pytest.mark.slow
def test_the_loader_is_compared_with_the_prior_that_it_feeds() -> None:
    line = json.loads(run("data_loading.py", "--rounds", "1", "--steps", "1"))
    assert line["loader_to_prior"] > 1 and line["promised"] == 10
    assert line["cache_256_codes"] > 0


def test_accumulation_of_features_is_counted_per_second_of_cpu_time() -> None:
    lines = run("feature_moments.py", "--features", "256", "--dim", "32").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 32", "| 128", "| 1024"]


@pytest.mark.slow
def test_the_share_of_generation_outside_the_models_is_printed(monkeypatch) -> None:
    small_demo(monkeypatch)
    out = run("generation_overhead.py", "--num_images", "2", "--formats", "png", "npz")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| `")]
    assert [row[1] for row in rows] == ["png", "npz"] * 3
    assert all(0 < float(row[3].strip(" |%")) < 100 for row in rows)


@pytest.mark.slow
def test_the_budget_of_a_recipe_is_that_of_its_paper() -> None:
    out = run("training_budget.py", "--recipes", "sit_xl2_prior", "vq_f16")
    prior, tokenizer = (line.split(" | ") for line in out.splitlines()[2:])
    # 118.6 GFLOPs by DiT's paper (2212.09748), which counts a multiplication and addition as one.
    assert float(prior[4]) == pytest.approx(3 * 2 * 118.6, rel=0.05)
    assert prior[3] == "1399" and tokenizer[3] == "40"
    assert tokenizer[6] == "0.7 GB |"  # 256 codes of 2 bytes, 1,281,167 times


@pytest.mark.slow
def test_the_check_on_a_gpu_runs_on_a_cpu_in_a_short_form(tmp_path: Path) -> None:
    """Every check, and every part of the table of `make bench`, in both types of numbers."""
    report = tmp_path / "report.md"
    out = run("bench_gpu.py", "--device", "cpu", "--quick", "--output", str(report))
    assert report.read_text() == out
    lines = out.splitlines()
    assert lines[0].startswith("# smalti on ") and "torch" in lines[0]
    assert len([line for line in lines if line.startswith("passed ")]) == 7
    assert "FAILED" not in out and "left out" not in out
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    for beside in ("LlamaGen, restated", "VAR, restated", "diffusers", "multiplying matrices"):
        assert len([row for row in rows if row[1] == beside]) >= 2, beside
    numbers = [float(row[2]) for row in rows if row[2][0].isdigit()]
    assert len(numbers) > 20 and min(numbers) > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_so_in_one_line(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    done = forked(program(ROOT / "benchmarks" / "bench_gpu.py", "--output", report))
    assert done.returncode == 2 and not report.exists()
    assert done.stdout.startswith("there is no CUDA here: ") and done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.slow
def test_the_table_of_benchmarks_names_what_it_leaves_out() -> None:
    parts = ("--parts", "next-token", "tokenizers")
    lines = run("bench.py", "--quick", *parts, "--seconds", "0").splitlines()
    assert lines[0].endswith(" TFLOP/s")
    assert lines[-2:] == [f"left out: {part}: no time was left" for part in parts[1:]]


@pytest.mark.slow
def test_start_up_and_loading_are_measured_beside_python_and_the_weights() -> None:
    out = run("start_up.py", "--rounds", "1", "--presets", "vq-32-tiny", "gpt-nano")
    times, memory = (part.splitlines()[2:] for part in out.split("\n\n"))
    assert [row.split(" | ")[0] for row in times][:2] == ["| `python -c pass`", "| `import smalti`"]
    assert [row.split(" | ")[:2] for row in memory] == [["| float32", "33"], ["| bfloat16", "16"]]


@pytest.mark.parametrize("size", bake_off.SIZES)
@pytest.mark.parametrize("group", bake_off.GROUPS)
def test_the_trials_of_a_group_differ(group: str, size: str) -> None:
    scales = [trial.scale("emoji", size, Path("vgg")) for trial in bake_off.GROUPS[group].values()]
    assert len({repr(scale) for scale in scales}) == len(scales) > 1


@pytest.mark.slow
def test_the_bake_off_shares_stages_and_continues(tmp_path: Path, monkeypatch) -> None:
    small_demo(monkeypatch)
    data = light_and_dark(tmp_path / "data")
    arguments = (
        *("--data", str(data), "--output_dir", str(tmp_path / "out")),
        *("--groups", "LPIPS", "queries and keys", "--seeds", "0", "--seconds", "0"),
        *("--num_samples", "16"),
    )
    out = run("bake_off.py", *arguments)
    assert "left out: LPIPS VGG16: give --perceptual_weights" in out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][2:]
    assert [row[:2] for row in rows] == [
        ["| LPIPS", "AlexNet"],
        ["| queries and keys", "plain"],
        ["| queries and keys", "normalised"],
    ]
    assert rows[0][2:] == rows[1][2:] and rows[1] != rows[2]  # the first two are the same trial
    assert len(list((tmp_path / "out" / "tokenizers").iterdir())) == 1
    priors = sorted((tmp_path / "out" / "priors").iterdir())
    assert len(priors) == 2
    results = sorted((tmp_path / "out" / "priors").glob("*/*/results.json"))
    assert len(results) == 2
    before = [file.stat().st_mtime_ns for file in results]
    assert run("bake_off.py", *arguments).splitlines()[-6:] == out.splitlines()[-6:]
    assert [file.stat().st_mtime_ns for file in results] == before
    assert (tmp_path / "out" / "plot.png").is_file()


@pytest.mark.slow
def test_a_training_step_is_compared_with_plain_torch() -> None:
    small = ("--preset=gpt-nano", "--grid=2", "--quick")
    assert "training step / plain PyTorch" in run("training_speed.py", *small)


@pytest.mark.slow
def test_the_second_opening_of_a_folder_is_measured(tmp_path: Path) -> None:
    found = json.loads(run("folder_opening.py", "--pictures=40", f"--folder={tmp_path}"))
    assert {*found} == {"first", "second"}
