"""smalti compare: one table and one grid over several pipelines or tokenizers."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from smalti.cli import main as smalti_main
from smalti.data.latents import CodeSpec
from smalti.errors import ConfigurationError
from smalti.evaluation.metrics import Metric
from smalti.files import read_hashed_json
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowPrior
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.scripts.compare import (
    CompareConfig,
    PipelineCandidate,
    Task,
    TokenizerCandidate,
    check_comparable,
)
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

CONV = ConvConfig(
    channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, attention_levels=(), z_channels=8
)
CLASSES = ("even", "odd")
SMALL = ["--timed_images", "4", "--rounds", "2"]
OF_SAMPLES = ["--num_samples", "16", "--classifier_epochs", "1", "--other_data"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """40 pictures in two classes, two pipelines and their tokenizers."""
    root = tmp_path_factory.mktemp("compare")
    for i in range(40):
        folder = root / "data" / CLASSES[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (200 * (i % 2), 3 * i, 90)).save(folder / f"{i}.png")
    torch.manual_seed(0)
    book = NearestConfig(codebook=CodebookConfig(32, 4))
    vq = VQTokenizer(VQConfig(image_size=32, conv=CONV, quantizer=book))
    tokens = NextTokenConfig(
        spec=CodeSpec(32, ((8, 8),)), depth=1, width=16, num_heads=2, hidden=32, num_classes=2
    )
    Pipeline(vq, NextTokenPrior(tokens), CLASSES).save_pretrained(root / "codes" / "pipeline")
    kl = KLTokenizer(KLConfig(image_size=32, conv=replace(CONV, z_channels=4)))
    network = DiTConfig(4, 4, (8, 8), patch_size=2, width=16, depth=1, num_heads=2, num_classes=2)
    flow = FlowPrior(FlowConfig(network=network))
    pipe = Pipeline(kl, flow, CLASSES)
    pipe.sampling = {"num_inference_steps": 5}
    pipe.save_pretrained(root / "flow" / "pipeline")
    return root


@pytest.fixture
def compare(place: Path, tmp_path: Path, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command -> exit status, standard output, standard error."""

    def run(*arguments: str, out: Path = tmp_path / "out") -> tuple[int, str, str]:
        shared = ["--data", str(place / "data"), "--output_dir", str(out), *SMALL]
        of_samples = [] if arguments[0].endswith("tokenizer") else OF_SAMPLES
        status = smalti_main(["compare", *arguments, *shared, *of_samples])
        return status, *capsys.readouterr()

    return run


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines]


def test_pipelines_are_compared_in_a_table_and_a_grid(compare, place: Path, tmp_path: Path) -> None:
    models = [str(place / "codes"), str(place / "flow" / "pipeline")]
    status, printed, said = compare(*models)
    assert status == 0, said
    heads, _, codes, flow = cells(printed)
    assert cells((tmp_path / "out" / "comparison.md").read_text()) == cells(printed)
    by_name = [dict(zip(heads, row, strict=True)) for row in (codes, flow)]
    assert [row["model"] for row in by_name] == ["codes", "flow"]
    assert [row["kind"] for row in by_name] == ["next-token", "flow"]
    record = read_hashed_json(tmp_path / "out" / "comparison.json")
    assert record["codes"]["sampling"] == {"guidance_scale": 2.0}
    assert [record[name]["evaluations"] for name in ("codes", "flow")] == [65, 10]
    assert [row["evaluations"] for row in by_name] == ["65", "10"]  # Heun: 2 x 5
    assert all(len(record[name]["seconds"]) == 2 for name in ("codes", "flow"))
    summary = read_hashed_json(tmp_path / "out" / "flow" / "summary.json")["metrics"]
    assert by_name[1]["Frechet distance, AlexNet"] == f"{summary['fd_alexnet']['value']:.1f}"
    assert by_name[1]["memory, MB"].endswith(f"{record['flow']['peak_memory_bytes'] / 1e6:.0f}")
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "<td>codes</td>" in page and 'src="samples.png"' in page
    grid = Image.open(tmp_path / "out" / "samples.png")
    assert grid.width > 8 * 34 * 2 and grid.height > 2 * 34 * 2  # 2 classes; 4 of each pipeline


def test_the_same_seeds_show_the_same_pictures(compare, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "codes", tmp_path / "again")
    assert compare(str(place / "codes"), str(tmp_path / "again"))[0] == 0
    grid = Image.open(tmp_path / "out" / "samples.png")
    side, left = 2 * 34, grid.width - (8 * 34 * 2 + 4)
    rows = [grid.crop((left + 4 + c * side, 20, left + (c + 1) * side, 84)) for c in range(8)]
    assert [rows[c].tobytes() for c in range(4)] == [rows[c + 4].tobytes() for c in range(4)]
    assert rows[0].tobytes() != rows[1].tobytes()


def test_tokenizers_are_compared_by_their_reconstructions(
    compare, place: Path, tmp_path: Path
) -> None:
    models = [str(place / name / "pipeline" / "tokenizer") for name in ("codes", "flow")]
    status, printed, said = compare(*models)
    assert status == 0, said
    heads, _, codes, flow = cells(printed)
    assert codes[:3] == ["codes", "vq", "64 codes of 32 (8 x 8)"]
    psnr = read_hashed_json(tmp_path / "out" / "flow" / "summary.json")["metrics"]["psnr"]["value"]
    assert flow[heads.index("PSNR, dB")] == f"{psnr:.2f}"
    assert flow[heads.index("codebook usage")] == "-"
    grid = Image.open(tmp_path / "out" / "reconstructions.png")
    assert grid.width == (3 * 34 + 2) * 2  # the original and two reconstructions


def test_a_comparison_continues_with_what_is_measured(compare, place, tmp_path, monkeypatch):
    models = [str(place / "codes"), str(place / "flow")]
    assert compare(*models)[0] == 0
    summary = tmp_path / "out" / "flow" / "summary.json"
    before = summary.stat().st_mtime_ns
    assert compare(*models)[0] == 0
    assert summary.stat().st_mtime_ns == before
    status, _, said = compare(*models, "--seed", "3")
    assert status == 2 and "holds another evaluation (its seed differs)" in said


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["codes"], "1 models were given: give at least two"),
        (["codes", "codes/pipeline"], "two models have the name codes: give one for each"),
        (["codes", "flow/pipeline/tokenizer"], "codes and flow are a pipeline and a tokenizer"),
        (["codes", "flow", "--temperature", "0.5"], "temperature"),
        (["codes", "flow", "--names", "one"], "1 names were given for 2 models"),
        (["codes", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    compare, place: Path, tmp_path: Path, models: list[str], message: str
) -> None:
    folders = ("codes", "flow", "nowhere")
    paths = [str(place / one) if one.split("/")[0] in folders else one for one in models]
    status, _, said = compare(*paths)
    assert status == 2 and message in said
    assert not (tmp_path / "out" / "comparison.md").exists()


def test_pipelines_that_are_given_pictures_are_refused(place: Path, monkeypatch) -> None:
    path = str(place / "flow" / "pipeline")
    one = PipelineCandidate("flow", path, Pipeline.from_pretrained(path))
    monkeypatch.setattr(FlowPrior, "condition_kinds", ("class", "image"))
    with pytest.raises(ConfigurationError, match="flow makes pictures of given ones"):
        check_comparable([one, one], CompareConfig(models=("a", "b")))


def test_distances_of_any_network_are_in_the_table() -> None:
    one = object.__new__(PipelineCandidate)
    names = ("fd_dino", "fd_dino_heldout", "fd_dino_floor", "fd_alexnet")
    one.metrics = {name: Metric(1.0, {}) for name in names}
    assert list(one.qualities()) == ["Frechet distance, dino", "Frechet distance, AlexNet"]


def test_a_timed_batch_is_full_where_few_pictures_are_held_out(place: Path) -> None:
    path = place / "codes" / "pipeline" / "tokenizer"
    one = TokenizerCandidate("codes", str(path), Tokenizer.from_pretrained(path))
    images = one.make(Task(torch.rand(3, 3, 32, 32), [], [], [], 0, {}), 5)
    assert len(images) == 5 and torch.allclose(images[3:], images[:2], atol=1e-5)


def test_tokenizers_of_other_sizes_are_refused(compare, place: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(place / "codes" / "pipeline" / "tokenizer")
    tokenizer.resized(48).save_pretrained(tmp_path / "large")
    status, _, said = compare(str(place / "flow/pipeline/tokenizer"), str(tmp_path / "large"))
    assert status == 2 and "32 x 32 with 3 channels, and large of 48 x 48" in said
