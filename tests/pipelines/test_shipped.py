"""The pipelines that ship with smalti: found by short names without a network, and as good as their
cards say."""

import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image

from smalti import Pipeline, Prior, Tokenizer, repository
from smalti.cli import main, parse_config
from smalti.data.dataset import DataOptions, write_options
from smalti.errors import CheckpointError
from smalti.evaluation.metrics import Metric, write_summary
from smalti.files import read_hashed_json, write_lines
from smalti.repository import resolve_folder, shipped_pipelines
from smalti.scripts.evaluate import EvaluateConfig

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_shipped  # noqa: E402

SHIPPED = shipped_pipelines()
MAX_MB, MAX_MB_IN_ALL = 12.0, 40.0


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.fixture
def tiny(tokenizer, prior, tmp_path: Path, monkeypatch) -> Pipeline:
    """A pipeline that ships as smalti/tiny, and no other."""
    pipe = Pipeline(tokenizer, prior, ["a", "b", "c"])
    folder = pipe.save_pretrained(tmp_path / "package" / "tiny")
    monkeypatch.setattr(repository, "shipped_pipelines", lambda: {"smalti/tiny": folder})
    return pipe


def test_a_short_name_loads_a_pipeline_or_its_part(tiny) -> None:
    loaded = Pipeline.from_pretrained("smalti/tiny")
    assert loaded.prior.fingerprint == tiny.prior.fingerprint
    for base, part in ((Tokenizer, tiny.tokenizer), (Prior, tiny.prior)):
        for options in ({}, {"subfolder": base.registry.kind}):
            found = base.from_pretrained("smalti/tiny", **options)
            assert found.fingerprint == part.fingerprint
        assert base.from_pretrained(Path("smalti/tiny")).fingerprint == part.fingerprint
    half = Pipeline.from_pretrained("smalti/tiny", dtype="float16")
    assert next(half.prior.parameters()).dtype == torch.float16


def test_the_pictures_of_a_shipped_pipeline_are_known(tiny) -> None:
    folder = resolve_folder("smalti/tiny")
    write_options(folder / "tokenizer", DataOptions(data="fashion"))
    config = parse_config(EvaluateConfig, ["--model", "smalti/tiny"], prog="test")
    assert config.data == "fashion"


def test_a_folder_of_that_name_comes_first(tiny, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = Path("smalti", "tiny")
    tiny.save_pretrained(here, notes="of the folder")
    assert Pipeline.from_pretrained("smalti/tiny").notes == "of the folder"
    (tmp_path / "smalti" / "tiny").rename(tmp_path / "smalti" / "other")
    assert Pipeline.from_pretrained("smalti/tiny").notes == ""


def test_an_unknown_short_name_lists_those_that_ship(tiny, capsys) -> None:
    message = (
        'no pipeline that ships with smalti is called "smalti/tinny"; there are smalti/tiny; a '
        "repository of that name on the Hub is loaded from a copy: hf download smalti/tinny "
        "--local-dir tinny"
    )
    for base in (Pipeline, Tokenizer, Prior):
        with pytest.raises(CheckpointError) as error:
            base.from_pretrained("smalti/tinny")
        assert str(error.value) == message
    assert main(["generate", "--model", "smalti/tinny"]) == 2
    assert message in capsys.readouterr().err


def test_a_revision_is_one_of_the_hub(tiny, monkeypatch, tmp_path: Path) -> None:
    asked = []

    def download(name: str, *, revision: str | None, **options: object) -> str:
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_folder("smalti/tiny", revision="main") == tmp_path
    assert asked == [("smalti/tiny", "main")]


def test_commands_take_a_short_name(tiny, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    options = ["--num_images_per_class", "1", "--output_dir", str(out)]
    assert main(["generate", "--model", "smalti/tiny", *options]) == 0
    assert len(list(out.glob("*.png"))) == 3
    assert main(["export", "smalti/tiny", str(tmp_path / "exported")]) == 2
    assert "smalti/tiny is a pipeline" in capsys.readouterr().err


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_pipeline_makes_pictures(name: str, capsys) -> None:
    """Loading compares every value with the hashes that were saved."""
    pipe = Pipeline.from_pretrained(name)
    size = pipe.tokenizer.image_size
    assert next(pipe.prior.parameters()).dtype == torch.float32
    out = pipe([0, len(pipe.classes) - 1], generator=torch.Generator().manual_seed(0))
    assert [image.size for image in out.images] == [(size, size)] * 2
    saved = Pipeline.from_pretrained(name, dtype="auto")
    for model in (saved.tokenizer, saved.prior):
        types = {p.dtype for p in model.parameters() if p.requires_grad}
        assert types == {torch.float16}  # the copy of a quantizer stays in fp32
    assert pipe.prior.tokenizer_fingerprint == pipe.tokenizer.fingerprint
    assert main(["info", name]) == 0
    shown = capsys.readouterr().out
    assert "config and weights have the hashes" in shown
    assert f"smalti generate --model {name}\n" in shown


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_pipeline_meets_the_bar_or_its_card_says_no(name: str) -> None:
    folder = SHIPPED[name]
    card = (folder / "README.md").read_text()
    summary = read_hashed_json(folder / make_shipped.SUMMARY)
    pipe = Pipeline.from_pretrained(name)
    assert summary["prior"] == pipe.prior.fingerprint
    for words, value, _, met in make_shipped.measured(summary):
        assert f"| {words} | {value:.3f} |" in card
        assert met or "**no**" in card, words


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_of_a_shipped_pipeline_says_how_it_was_made(name: str) -> None:
    short, folder = name.partition("/")[2], SHIPPED[name]
    card = (folder / "README.md").read_text()
    assert any(licence in card for licence in ("MIT licence", "CC-BY-4.0"))
    for stage in ("tokenizer", "prior"):
        recipe = make_shipped.recipe(short, stage)
        assert recipe.is_file() and recipe.name in card
    assert f'from_pretrained("{name}")' in card
    for part in ("minutes of the tokenizer", "thread", "near copies", "By eye: "):
        assert part in card
    for file in ("samples.png", make_shipped.CURVES, make_shipped.SUMMARY):
        assert file in card and (folder / file).is_file()
    page = (ROOT / "docs" / "pretrained.md").read_text()
    assert make_shipped.row(short, folder) in page
    assert f"tools/make_shipped.py {short}\n" in card and short in make_shipped.PIPELINES


def test_the_bar_is_a_limit_of_ratios_and_of_near_copies() -> None:
    values = {
        "classifier_accuracy_samples": 0.76, "classifier_accuracy_heldout": 0.8,
        "fd_alexnet": 5.2, "fd_alexnet_heldout": 2.0, "share_of_near_copies": 0.004,
    }  # fmt: skip
    summary = {"metrics": {name: {"value": value} for name, value in values.items()}}
    found = [(round(value, 3), met) for _, value, _, met in make_shipped.measured(summary)]
    assert found == [(0.95, True), (2.6, False), (0.004, True)]


def test_packing_rounds_a_pipeline_and_writes_the_card_of_its_run(
    tokenizer, prior, tmp_path: Path, monkeypatch
) -> None:
    """Training and measuring are replaced: other tests run these commands."""
    folder, name = tmp_path / "run", "fashion-next-token"
    pipe = Pipeline(tokenizer, prior, ["a", "b", "c"])
    pipe.sampling = {"guidance_scale": 1.5}
    pipe.save_pretrained(folder / "prior" / "pipeline")
    (folder / "tokenizer" / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer" / "pictures.json").write_text("{}")
    for run, names in (("tokenizer", ["val_psnr"]), ("prior", ["loss", "val_loss"])):
        lines = [{"step": step, **dict.fromkeys(names, 1.0)} for step in (10, 20)]
        write_lines(folder / run / "metrics.jsonl", lines)
        write_lines(folder / run / "timing.jsonl", [{"step": 20, "seconds_per_step": 9.0}])

    def evaluate(command: str, *options: object) -> None:
        assert command == "evaluate" and "fashion" in options
        Path(folder / "evaluation").mkdir()
        Image.new("RGB", (4, 4)).save(folder / "evaluation" / "samples.png")
        metrics = {name: Metric(1.0, {}) for row in make_shipped.BAR for name in row[:2] if name}
        write_summary(folder / "evaluation" / "summary.json", metrics)

    monkeypatch.setattr(make_shipped, "run", evaluate)
    out = tmp_path / "out"
    make_shipped.measure(name, folder)
    make_shipped.pack(name, folder, out)
    packed = Pipeline.from_pretrained(out)
    assert packed.prior.fingerprint == pipe.prior.fingerprint
    assert packed.sampling == {"guidance_scale": 1.5}
    weights = (out / "prior" / "model.safetensors").stat().st_size
    assert weights < 1.5 * sum(p.numel() * 2 for p in prior.parameters()) + 5000
    card = (out / "README.md").read_text()
    assert "in 3 minutes of the tokenizer and 3 of the prior" in card
    assert "| classifier on samples / on held-out pictures | 1.000 | 0.9 | yes |" in card
    assert "| near copies of training pictures | 1.000 | 0.005 | **no** |" in card
    assert {path.name for path in out.iterdir()} >= {"summary.json", "curves.png", "samples.png"}


def test_the_seconds_of_a_run_are_those_of_its_steps(tmp_path: Path) -> None:
    lines = [{"step": 20, "seconds_per_step": 0.5}, {"step": 50, "seconds_per_step": 1.0}]
    write_lines(tmp_path / "timing.jsonl", lines)
    assert make_shipped.seconds_of(tmp_path) == 20 * 0.5 + 30 * 1.0


def test_shipped_pipelines_are_small() -> None:
    sizes = {name: make_shipped.megabytes(folder) for name, folder in SHIPPED.items()}
    assert all(size <= MAX_MB for size in sizes.values()), sizes
    assert sum(sizes.values()) <= MAX_MB_IN_ALL
