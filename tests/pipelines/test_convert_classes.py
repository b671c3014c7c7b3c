"""Class tables with and without a null class, in every converter of priors."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.pipelines.conditions import check_options
from smalti.pipelines.convert.convert import export, read_published
from smalti.pipelines.convert.source import Options
from smalti.prior.base import Prior
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.path import DDPMPath
from smalti.prior.next_scale.config import NextScaleConfig
from smalti.prior.next_token.config import NextTokenConfig
from smalti.prior.registry import PRIORS
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer

SCALES = ((1, 1), (2, 2))
MULTI_SCALE = MultiScaleConfig(
    codebook=CodebookConfig(16, 4, l2_normalise=False),
    scales=SCALES,
    convolutions=1,
    sharing=(0, 0),
)
NETWORK = DiTConfig(grid=(4, 4), width=32, depth=1, num_heads=2)
NOISE: dict[str, Any] = {
    "path": DDPMPath(),
    "prediction": "noise",
    "time_scale": -1000.0,
    "time_shift": 999.0,
}


def flow(num_classes: int, **changes: Any) -> FlowConfig:
    return FlowConfig(network=replace(NETWORK, num_classes=num_classes), **changes)


def next_token(num_classes: int) -> NextTokenConfig:
    size = {"depth": 1, "width": 32, "num_heads": 2, "hidden": 32}
    spec = CodeSpec(16, ((2, 2),))
    return NextTokenConfig(spec=spec, num_classes=num_classes, prefix_rotary="zero", **size)


def next_scale(num_classes: int) -> NextScaleConfig:
    size = {"depth": 1, "width": 32, "num_heads": 2}
    spec = CodeSpec(16, SCALES)
    return NextScaleConfig(spec=spec, quantizer=MULTI_SCALE, num_classes=num_classes, **size)


@dataclass(frozen=True)
class Case:
    """A published layout."""

    config: Callable[[int], Any]  # of a prior with some number of classes
    table: str  # its class table
    options: Options
    null_is_optional: bool = True  # whether the original code can leave out the null class


@cache
def case(source: str) -> Case:
    if source == "var-prior":
        conv = ConvConfig(8, (1, 2), num_res_blocks=1, attention_levels=(1,), z_channels=4)
        tokenizer = VQTokenizer(VQConfig(image_size=4, conv=conv, quantizer=MULTI_SCALE)).eval()
        options = Options(tokenizer=tokenizer)
        return Case(next_scale, "class_emb.weight", options, null_is_optional=False)
    if source == "llamagen-prior":
        table = "cls_embedding.embedding_table.weight"
        return Case(next_token, table, Options(heads=2, scales=(2,)))
    kind = {"dit": NOISE, "sit": {}}[source]
    table = "y_embedder.embedding_table.weight"
    return Case(lambda classes: flow(classes, **kind), table, Options(heads=2))


SOURCES = ("dit", "sit", "llamagen-prior", "var-prior")


def published(source: str, rows: int, path: Path) -> Tensor:
    """Write a file whose class table has `rows` rows, none of them zero; return the table."""
    made = case(source)
    model = PRIORS.build(made.config(rows))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if made.options.tokenizer is not None:
        model.bind(made.options.tokenizer.quantizer)
    export(model, path, source)
    state = load_file(path)
    state[made.table] = state[made.table][:rows].contiguous()
    path.unlink()
    save_file(state, path)
    return state[made.table]


def read(source: str, path: Path, num_classes: int | None = None) -> tuple[Prior, list[str]]:
    options = replace(case(source).options, num_classes=num_classes)
    model, lines = read_published(source, path, options)
    return getattr(model, "prior", model), lines


def class_rows(prior: Prior) -> Tensor:
    return dict(prior.named_parameters())[prior.class_table].detach()


@pytest.mark.parametrize("source", SOURCES)
def test_every_row_is_a_class_if_num_classes_says_so(source: str, tmp_path: Path) -> None:
    table = published(source, 3, tmp_path / "x.safetensors")
    prior, lines = read(source, tmp_path / "x.safetensors", num_classes=3)
    assert prior.num_classes == 3 and torch.equal(class_rows(prior)[:3], table)
    assert "  classes: 3" in lines and "  null class: none" in lines
    assert prior.sample(torch.tensor([2]), generator=torch.Generator()).shape[0] == 1
    with pytest.raises(SmaltiError, match=r"guidance_scale is 2, but .* no null class"):
        prior.sample(torch.tensor([2]), guidance_scale=2)
    with pytest.raises(SmaltiError, match="guidance_scale is 2"):
        check_options(prior, {"guidance_scale": 2})
    with pytest.raises(SmaltiError, match=r"class label 3 is out of range: use 0 to 2$"):
        prior.sample(torch.tensor([3]))


@pytest.mark.parametrize("source", SOURCES)
def test_the_last_row_is_the_null_class_otherwise_and_this_is_told(
    source: str, tmp_path: Path
) -> None:
    table = published(source, 3, tmp_path / "x.safetensors")
    prior, lines = read(source, tmp_path / "x.safetensors")
    told = "the last of 3 rows; if it is a class, give --num_classes 3 (not in the file)"
    assert "  classes: 2" in lines and f"  null class: {told}" in lines
    stated, lines = read(source, tmp_path / "x.safetensors", num_classes=2)
    assert "  null class: yes" in lines and stated.checksum == prior.checksum
    assert torch.equal(class_rows(prior), table)
    prior.sample(torch.tensor([0, 2]), guidance_scale=2)
    for wrong in (1, 4):
        with pytest.raises(SmaltiError, match=rf"--num_classes is {wrong}, but .* 3 rows: give 2"):
            read(source, tmp_path / "x.safetensors", num_classes=wrong)


@pytest.mark.parametrize("source", SOURCES)
def test_one_class_works_with_and_without_a_null_class(source: str, tmp_path: Path) -> None:
    for rows in (1, 2):
        path = tmp_path / f"{rows}.safetensors"
        published(source, rows, path)
        prior, _ = read(source, path)
        assert prior.num_classes == 1 and prior.has_null_class == (rows == 2)
        assert len(prior.sample(torch.tensor([0, 0]), guidance_scale=float(rows))) == 2


@pytest.mark.parametrize("source", SOURCES)
def test_an_export_without_a_null_class_is_read_as_one(source: str, tmp_path: Path) -> None:
    published(source, 3, tmp_path / "x.safetensors")
    prior, _ = read(source, tmp_path / "x.safetensors", num_classes=3)
    lines = export(prior, tmp_path / "back.safetensors", source)
    again, _ = read(source, tmp_path / "back.safetensors", num_classes=3)
    assert again.checksum == prior.checksum and not again.has_null_class
    if case(source).null_is_optional:
        assert "--num_classes 3" in lines[1]
        given, back = (load_file(tmp_path / f"{name}.safetensors") for name in ("x", "back"))
        assert all(torch.equal(back[name], tensor) for name, tensor in given.items())


def test_captions_have_no_classes_to_count(tmp_path: Path) -> None:
    size = {"depth": 1, "width": 32, "num_heads": 2, "hidden": 32, "prefix_rotary": "zero"}
    text = {"condition": "text", "num_classes": 0, "text_length": 3, "text_dim": 8}
    config = NextTokenConfig(spec=CodeSpec(16, ((2, 2),)), **size, **text)  # type: ignore[arg-type]
    export(PRIORS.build(config), tmp_path / "x.safetensors")
    with pytest.raises(SmaltiError, match=r"--num_classes is 3, but .* captions: leave it out"):
        read("llamagen-prior", tmp_path / "x.safetensors", num_classes=3)


@pytest.mark.parametrize("make", [flow, next_token, next_scale])
def test_a_prior_of_one_class_is_trained_and_guided(make: Callable[[int], Any]) -> None:
    """Label dropout 0 alone takes nothing away: a saved prior may have a null class from before."""
    for dropout in (0.1, 0.0):
        prior = PRIORS.build(replace(make(1), label_dropout=dropout))
        prior.bind(getattr(case("var-prior").options.tokenizer, "quantizer", None))
        labels = torch.zeros(2, dtype=torch.int64)
        latents = prior.sample(labels, guidance_scale=2)
        assert prior.train()(latents, labels).total.isfinite()
