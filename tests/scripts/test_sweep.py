"""smalti sweep: sampling options against a metric, the best saved with the pipeline."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from smalti.cli import main as smalti_main
from smalti.data.latents import CodeSpec
from smalti.files import read_hashed_json
from smalti.pipelines.model_index import save_sampling
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.scripts import sweep as module
from smalti.scripts.options import SamplingGrid
from smalti.scripts.sweep import fastest_without_loss, plot
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, attention_levels=(), z_channels=8
)
CLASSES = ("even", "odd")
GRID = ["--guidance_scale", "1", "3", "--temperature", "0.5", "1"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A pipeline, beside 40 pictures in two classes."""
    for i in range(40):
        folder = tmp_path / "data" / CLASSES[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (200 * (i % 2), 3 * i, 90)).save(folder / f"{i}.png")
    torch.manual_seed(0)
    book = NearestConfig(codebook=CodebookConfig(32, 4))
    tokenizer = VQTokenizer(VQConfig(image_size=32, conv=CONV, quantizer=book))
    config = NextTokenConfig(
        spec=CodeSpec(32, ((8, 8),)), depth=1, width=16, num_heads=2, hidden=32, num_classes=2
    )
    prior = NextTokenPrior(config)
    torch.nn.init.normal_(prior.output.weight)
    return Pipeline(tokenizer, prior, CLASSES).save_pretrained(tmp_path / "pipeline")


@pytest.fixture
def run(model: Path, tmp_path: Path, capsys) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        place = ["--model", str(model), "--data", str(tmp_path / "data"), "--num_samples", "16"]
        out = ["--output_dir", str(tmp_path / "out"), "--other_data", "--classifier_epochs", "1"]
        return smalti_main(["sweep", *place, *out, *arguments]), *capsys.readouterr()

    return run


@pytest.fixture
def loads(monkeypatch) -> list[str | None]:
    """The precision of each pipeline that is loaded."""
    found = list[str | None]()
    load = Pipeline.from_pretrained

    def counted(path: str, **options: Any) -> Pipeline:
        found.append(options.get("dtype"))
        return load(path, **options)

    monkeypatch.setattr(Pipeline, "from_pretrained", counted)
    return found


def results(tmp_path: Path) -> list[dict]:
    return read_hashed_json(tmp_path / "out" / "sweep.json")["results"]


def test_every_combination_is_measured_and_the_best_is_saved(run, model, tmp_path: Path) -> None:
    status, _, said = run(*GRID)
    assert status == 0, said
    found = results(tmp_path)
    wanted = itertools.product((1.0, 3.0), (0.5, 1.0))
    assert [tuple(result["options"].values()) for result in found] == list(wanted)
    assert len({result["value"] for result in found}) == 4
    best = min(found, key=lambda result: result["value"])["options"]
    pipeline = Pipeline.from_pretrained(model)
    assert {name: pipeline.sampling[name] for name in best} == best
    given = pipeline("odd", generator=torch.Generator().manual_seed(1), **best).latents
    assert torch.equal(given, pipeline("odd", generator=torch.Generator().manual_seed(1)).latents)
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert page.count("<circle") == 4 and page.count("<polyline") == 2
    first = (tmp_path / "out" / "sweep.md").read_text().splitlines()[2]
    assert first.startswith(f"| {best['guidance_scale']} | {best['temperature']} | ")
    assert Image.open(tmp_path / "out" / "samples.png").width > 100


def test_a_value_is_that_of_smalti_evaluate(run, model: Path, tmp_path: Path, capsys) -> None:
    assert run("--temperature", "0.5", "--no-save_best")[0] == 0
    (result,) = results(tmp_path)
    place = ["--model", str(model), "--data", str(tmp_path / "data"), "--num_samples", "16"]
    out = ["--output_dir", str(tmp_path / "evaluation"), "--other_data", "--temperature", "0.5"]
    assert smalti_main(["evaluate", *place, *out, "--classifier_epochs", "1"]) == 0
    summary = read_hashed_json(tmp_path / "evaluation" / "summary.json")["metrics"]
    assert result["value"] == pytest.approx(summary["fd_alexnet"]["value"], rel=1e-9)
    assert "temperature" not in Pipeline.from_pretrained(model).sampling


def test_the_classifier_is_trained_once_and_its_accuracy_maximised(
    run, model: Path, tmp_path: Path, monkeypatch
) -> None:
    trained = []
    original = module.SampleEvaluator.trained_classifier
    monkeypatch.setattr(
        module.SampleEvaluator,
        "trained_classifier",
        lambda self, *given: trained.append(1) or original(self, *given),
    )
    assert run("--guidance_scale", "1", "4", "--metric", "classifier_accuracy")[0] == 0
    found = results(tmp_path)
    best = max(found, key=lambda result: result["value"])["options"]
    assert len(trained) == 1 and all(0 <= result["value"] <= 1 for result in found)
    assert Pipeline.from_pretrained(model).sampling["guidance_scale"] == best["guidance_scale"]


def test_a_sweep_continues_and_grows(run, tmp_path: Path, monkeypatch) -> None:
    assert run("--guidance_scale", "1", "2", "--no-save_best")[0] == 0
    before = results(tmp_path)
    sampled = []
    original = module.sample
    monkeypatch.setattr(module, "sample", lambda *given: sampled.append(1) or original(*given))
    assert run("--guidance_scale", "1", "2", "3", "--no-save_best")[0] == 0
    assert len(sampled) == 1 and results(tmp_path)[:2] == before
    status, _, said = run("--guidance_scale", "1", "2", "--seed", "1")
    assert status == 2 and "holds another sweep (its seed differs)" in said


def test_results_count_for_all_options(run, model, tmp_path: Path, monkeypatch) -> None:
    """Results count for the options that they were sampled with, the pipeline's own among them."""
    grid = ["--guidance_interval", "0", "1", "0", "0.5"]
    assert run(*grid, "--no-save_best")[0] == 0
    found = results(tmp_path)
    assert [one["options"]["guidance_interval"] for one in found] == [[0, 1], [0, 0.5]]
    sampled = []
    original = module.sample
    monkeypatch.setattr(module, "sample", lambda *given: sampled.append(1) or original(*given))
    assert run(*grid, "--no-save_best")[0] == 0
    assert not sampled and results(tmp_path) == found
    save_sampling(model, {"guidance_scale": 2.0, "temperature": 0.5})
    assert run(*grid)[0] == 0
    assert len(sampled) == 2 and results(tmp_path)[2]["sampling"]["temperature"] == 0.5
    saved = Pipeline.from_pretrained(model).sampling
    assert saved in [one["sampling"] for one in results(tmp_path)[2:]]


def test_the_models_stay_to_the_byte(run, model: Path) -> None:
    Pipeline.from_pretrained(model, dtype="bfloat16").save_pretrained(model)
    (model / "tokenizer" / "notes.txt").write_text("mine")
    files = [file for part in ("tokenizer", "prior") for file in (model / part).iterdir()]
    before = {file: file.read_bytes() for file in files}
    assert run("--temperature", "0.5")[0] == 0
    assert {file: file.read_bytes() for file in files} == before
    assert Pipeline.from_pretrained(model).sampling == {"guidance_scale": 2.0, "temperature": 0.5}


def test_the_fastest_precision_without_loss_is_that_of_auto(
    run, model, loads, tmp_path, caplog
) -> None:
    assert Pipeline.from_pretrained(model, dtype="auto").dtype == torch.float32
    assert "smalti sweep --model" in caplog.text
    precisions = ["--dtype", "bfloat16", "int8", "--seeds", "2", "--temperature", "0.9"]
    loads.clear()
    status, said, _ = run(*precisions)
    assert status == 0 and loads == [None, "bfloat16", "int8"]  # each once
    found = results(tmp_path)
    asked = [tuple(one["options"].values()) for one in found]
    assert asked == list(itertools.product(("float32", "bfloat16", "int8"), (0, 1)))
    chosen = fastest_without_loss(found, lower_is_better=True)
    assert f'dtype "auto" of {model} on cpu: {chosen}' in said
    assert Pipeline.from_pretrained(model, dtype="auto").dtype == getattr(torch, chosen)
    assert Pipeline.from_pretrained(model).dtype == torch.float32
    copied = Pipeline.from_pretrained(model).save_pretrained(tmp_path / "copy")
    assert Pipeline.from_pretrained(copied, dtype="auto").dtype == getattr(torch, chosen)
    status, _, said = run("--dtype", "int8", "--temperature", "0.9", "1")
    assert status == 2 and "a sampling option has several values" in said


def test_a_precision_that_the_prior_cannot_have_is_refused_before_it_is_loaded(
    run, loads, monkeypatch
) -> None:
    monkeypatch.setattr(NextTokenPrior, "weight_only_parts", ())
    status, _, said = run("--dtype", "bfloat16", "int4", "--seeds", "2")
    assert status == 2 and "dtype is int4, and a next-token prior has no weights of" in said
    assert loads == [None]


def test_a_precision_that_loses_quality_is_not_chosen() -> None:
    def row(dtype: str, value: float, seconds: float) -> dict:
        return {"options": {"dtype": dtype}, "value": value, "seconds_per_picture": seconds}

    exact = [row("float32", 10.0, 3.0), row("float32", 12.0, 3.0)]
    near = [row("bfloat16", 11.0, 2.0), row("bfloat16", 12.5, 2.5)]
    far = [row("int8", 13.0, 1.0), row("int8", 14.0, 1.0)]
    assert fastest_without_loss([*exact, *near, *far], lower_is_better=True) == "bfloat16"
    assert fastest_without_loss([*exact, *near, *far], lower_is_better=False) == "int8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no option has several values"),
        (["--guidance_scale", "1", "--metric", "beauty"], "metric is beauty; use fd_ or kid_"),
        (["--solver", "euler"], "solver"),
        (["--top_k", "-1"], "top_k"),
    ],
)
def test_what_cannot_be_swept_is_refused(run, tmp_path: Path, arguments, message: str) -> None:
    status, _, said = run(*arguments)
    assert status == 2 and message in said
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_combinations_are_products_in_order() -> None:
    grid = SamplingGrid(guidance_scale=(1.0, 2.0), top_k=(0, 5))  # type: ignore[call-arg]
    assert [tuple(row.values()) for row in grid.combinations] == [(1, 0), (1, 5), (2, 0), (2, 5)]
    assert SamplingGrid().combinations == []


def test_the_plot_puts_words_at_equal_distances() -> None:
    rows = [
        {"options": {"solver": name}, "value": value}
        for name, value in (("euler", 3.0), ("heun", 1.0), ("rk4", 2.0))
    ]
    picture = plot(rows, "fd_alexnet")
    assert 'cx="70.0" cy="20.0"' in picture and 'cx="265.0" cy="280.0"' in picture
    assert all(f">{name}</text>" in picture for name in ("euler", "heun", "rk4"))
