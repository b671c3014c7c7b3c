"""A run as a page, and how fast it went."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from runs import losses
from torch import nn
from toy_run import toy_config, train

from smalti.training import logging as throughput
from smalti.training.logging import Throughput, peak_flops
from smalti.training.report import MAX_IMAGES, MAX_POINTS, chart, curves, thinned, write_report


class Page(HTMLParser):
    """The tags of a page with their attributes; checks that they are nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_the_report_of_a_run_needs_no_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "run <1> & more"
    train(toy_config(folder))
    (folder / "samples").mkdir()
    for step in range(20):
        (folder / "samples" / f"step_{step:06d}.png").touch()
    text = write_report(folder).read_text()
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert "script" not in names and "link" not in names and "http" not in text
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert 0 < len(sources) <= MAX_IMAGES and sources[0] == "samples/step_000019.png"
    assert all((folder / source).is_file() for source in sources)
    labels = {attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"}
    assert {"loss", "val_norm", "images_per_second"} <= labels
    assert "run &lt;1&gt; &amp; more" in text and "<1>" not in text
    assert "train_batch_size: 8" in text


def test_a_curve_ends_where_its_values_do() -> None:
    sampled = chart("loss", [(0, 1.0), (50, 3.0), (100, 2.0)])
    points = re.search(r'points="([^"]*)"', sampled)[1].split()
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points)
    assert x0 < x1 < x2 and x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 > y2 > y1  # down is small
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.11)
    assert "loss: 2<" in sampled and ">3<" in sampled and ">1<" in sampled
    assert chart("flat", [(1, 2.0)]).count("polyline") == 1  # one value has no height


def test_training_and_validation_share_a_plot_and_the_important_come_first(tmp_path: Path) -> None:
    names = ["gradient_norm", "l1", "learning_rate", "loss", "val_psnr", "val_loss"]
    lines = [json.dumps({"step": step, **dict.fromkeys(names, -1.234e-5)}) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "timing.jsonl").write_text('{"step": 1, "images_per_second": 3.0}\n')
    text = write_report(tmp_path).read_text()
    charts = [dict(attributes)["aria-label"] for tag, attributes in Page(text).tags if tag == "svg"]
    expected = ["loss", "val_psnr", "l1", "gradient_norm", "learning_rate", "images_per_second"]
    assert charts == expected
    assert text.count("<polyline") == len(expected) + 1 and "validation: -1.234e-05" in text
    label = re.search(r'<text x="(\d+)" [^>]*>-1.234e-05<', text)
    assert int(label[1]) >= 7 * len("-1.234e-05")  # 7 px a letter: nothing is cut at the left


def test_two_curves_have_common_axes() -> None:
    sampled = chart("loss", [(0, 1.0), (100, 2.0)], [(50, 4.0)])
    one, two = re.findall(r'points="([^"]*)"', sampled)
    x, y = map(float, two.split(","))
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in one.split())
    assert x == pytest.approx((x0 + x1) / 2, abs=0.11) and y < y1 < y0
    assert ">4<" in sampled and ">1<" in sampled


def test_long_curves_are_thinned_to_means_and_keep_their_end() -> None:
    points = [(step, float(step % 2)) for step in range(10_001)]
    few = thinned(points)
    assert len(few) <= MAX_POINTS and few[-1] == points[-1]
    assert all(abs(value - 0.5) < 0.1 for _, value in few[:-1])


def test_values_that_are_not_finite_are_not_plotted() -> None:
    lines = [{"step": 1, "loss": "nan"}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": "inf"}]
    assert curves(lines) == {"loss": [(2, 0.5)]}


def test_times_stand_apart_and_every_step_once(tmp_path: Path) -> None:
    train(toy_config(tmp_path / "run", max_train_steps=4))
    train(toy_config(tmp_path / "run", resume_from_checkpoint="latest"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").open()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == 6
    for line in lines:
        expected = 8 / line["seconds_per_step"]
        assert line["images_per_second"] == pytest.approx(expected, rel=1e-3)
    assert not any("second" in name for line in losses(tmp_path / "run") for name in line)


def test_operations_of_both_passes_are_counted_and_change_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(throughput.time, "perf_counter", iter(range(100)).__next__)
    clock = Throughput(
        tmp_path / "timing.jsonl",
        resume_step=0,
        images=6,
        processes=2,
        peak=lambda: 1e4,
        count=True,
    )
    torch.manual_seed(0)
    layer, rows = nn.Linear(4, 5, bias=False), torch.randn(3, 4)
    gradients = []
    for _ in range(3):
        with clock.step():
            layer(rows).square().sum().backward()
        gradients.append(layer.weight.grad.clone())
        layer.zero_grad()
    clock.write(3)
    line = json.loads((tmp_path / "timing.jsonl").read_text())
    operations = 2 * 3 * 4 * 5 * 2  # multiply and add, forward and to the weight; each process
    assert line["model_flops_per_second"] == operations * 2
    assert line["model_flops_utilisation"] == pytest.approx(operations * 2 / 1e4)
    assert line["images_per_second"] == 6 and line["seconds_per_step"] == 1
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[1], gradients[2])


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA Unknown", 5.0),
    ],
)
def test_peaks_are_known_by_name_in_bf16_or_else_measured(monkeypatch, name: str, peak) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(throughput, "measured_flops", lambda device, dtype: 5.0)
    assert peak_flops(torch.device("cuda"), "bf16") == peak
    assert peak_flops(torch.device("cuda"), "no") == peak_flops(torch.device("cpu"), "bf16") == 5.0


def test_a_peak_is_measured_by_a_matrix_product() -> None:
    measured = throughput.measured_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < measured < 1e14
