"""dtype of a pipeline: what runs, what is refused, and what stays."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from chance import generators

from smalti.errors import CheckpointError, ConfigurationError
from smalti.pipelines.generation import generate_folder
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.weight_only import quantized_layers
from smalti.scripts.options import DType
from smalti.weights import AS_SAVED, PRECISIONS, SHORT_NAMES, WEIGHT_ONLY_NAMES

CLASSES = ("cat", "dog", "emu")


@pytest.fixture
def folder(tokenizer, prior, tmp_path: Path) -> Path:
    return Pipeline(tokenizer, prior, CLASSES).save_pretrained(tmp_path / "pipeline")


def test_the_commands_have_the_names_of_the_table() -> None:
    names = {*PRECISIONS, *WEIGHT_ONLY_NAMES, *SHORT_NAMES, AS_SAVED} - {"float64"}
    assert {*get_args(DType)} == names


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("float16", torch.float16)],
)
def test_a_floating_point_precision_is_that_of_both_models(folder, name, dtype) -> None:
    pipe = Pipeline.from_pretrained(folder, dtype=name)
    assert pipe.dtype == pipe.tokenizer.last_layer.dtype == dtype
    assert Pipeline.from_pretrained(folder).to(dtype=name).dtype == dtype
    assert str(dtype).removeprefix("torch.") in repr(pipe)


def test_int8_is_of_the_linear_layers_alone(folder, tmp_path) -> None:
    saved = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    exact = Pipeline.from_pretrained(folder)
    pipe = Pipeline.from_pretrained(folder, dtype="int8")
    assert pipe.dtype == torch.int8 and "int8 on cpu" in repr(pipe)
    assert len(quantized_layers(pipe.prior)) == 2 * 5 + 1
    assert {p.dtype for m in (pipe.prior, pipe.tokenizer) for p in m.parameters()} == {
        torch.float32
    }
    assert pipe.prior.fingerprint == exact.prior.fingerprint
    assert pipe(["cat"], generator=generators(0)).latents.shape == (1, 64)
    assert exact.to(dtype="int8").dtype == torch.int8
    with pytest.raises(CheckpointError, match="int8, which is chosen when a model is loaded"):
        pipe.save_pretrained(tmp_path / "copy")
    with pytest.raises(ConfigurationError, match="load the model again"):
        pipe.to(torch.float32)
    assert {file: file.read_bytes() for file in saved} == saved


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_a_picture_of_a_job_does_not_depend_on_its_batch(folder, tmp_path, dtype) -> None:
    """In all precisions with a fixed number of rows: to the byte, whatever is sampled beside it."""
    pipe = Pipeline.from_pretrained(folder, dtype=dtype)
    first = generate_folder(pipe, tmp_path / "a", [0, 1, 2, 0], seed=0, batch_size=4)
    other = generate_folder(pipe, tmp_path / "b", [0, 2, 2, 2], seed=0, batch_size=4)
    assert first[0].read_bytes() == other[0].read_bytes()
    assert first[2].read_bytes() == other[2].read_bytes()
    if dtype != "bf16":
        small = generate_folder(pipe, tmp_path / "c", [0, 1], seed=0, batch_size=1)
        assert [one.read_bytes() for one in small] == [one.read_bytes() for one in first[:2]]


def test_another_size_keeps_int8(folder) -> None:
    pipe = Pipeline.from_pretrained(folder, dtype="int8")
    large = pipe.resized(24)
    assert large.dtype == torch.int8
    assert large(["cat"], generator=generators(0)).latents.shape == (1, 144)


def test_what_models_cannot_have_is_refused(flow_pipe, folder, tmp_path) -> None:
    flow = flow_pipe.save_pretrained(tmp_path / "flow")
    with pytest.raises(ConfigurationError, match="a flow prior has no weights of this type: use"):
        Pipeline.from_pretrained(flow, dtype="int8")
    with pytest.raises(ConfigurationError, match="is for from_pretrained: give a precision"):
        flow_pipe.to(dtype="auto")
    for name in ("int9", torch.int16):
        with pytest.raises(ConfigurationError, match="not a precision of a model"):
            Pipeline.from_pretrained(folder, dtype=name)
    pipe = Pipeline.from_pretrained(folder)
    with torch.no_grad():
        pipe.prior.output.weight[0, 0] = 1e5
    with pytest.raises(ConfigurationError, match=r"output.weight has values beyond.*use bfloat16"):
        pipe.to(torch.float16)
    assert pipe.dtype == torch.float32


def test_int4_is_packed_for_its_device(folder) -> None:
    """Layers of a model this small are int8, which `dtype` says."""
    assert Pipeline.from_pretrained(folder, dtype="int4").dtype == torch.int8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_weight_only_on_a_gpu(folder, dtype) -> None:
    pipe = Pipeline.from_pretrained(folder, device="cuda", dtype=dtype)
    assert pipe(["cat"], generator=generators(0)).latents.shape == (1, 64)
