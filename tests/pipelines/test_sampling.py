"""Sampling defaults of a pipeline: set, saved, shown, and used where a call gives no option."""

import json

import pytest
import torch
from chance import generators

from smalti.errors import SmaltiError
from smalti.files import sha256_of, write_hashed_json
from smalti.pipelines.generation import generate_folder
from smalti.pipelines.model_index import save_sampling
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.flow.solvers.runge_kutta import Euler
from smalti.scripts.options import Sampling

CLASSES = ("cat", "dog", "emu")


@pytest.fixture
def pipe(tokenizer, prior) -> Pipeline:
    return Pipeline(tokenizer, prior, CLASSES)


def latents(pipe: Pipeline, **options) -> torch.Tensor:
    generator = generators(0, 1, 2, 3)
    return pipe(["cat", "emu", 1, 1], generator=generator, output_type="latent", **options).latents


def test_a_default_is_used_where_a_call_gives_none(pipe) -> None:
    wanted = {"temperature": 0.5, "top_k": 4, "guidance_interval": (0.0, 0.5)}
    before = latents(pipe)
    given = latents(pipe, **wanted)
    pipe.sampling = wanted
    assert pipe.sampling == {
        "guidance_scale": 2.0, "temperature": 0.5, "top_k": 4, "guidance_interval": [0.0, 0.5]
    }  # fmt: skip
    assert not torch.equal(before, given)
    assert torch.equal(latents(pipe), given)
    assert torch.equal(latents(pipe, temperature=None, guidance_scale=None), given)
    explicit = {"temperature": 1.0, "top_k": 0, "guidance_interval": (0.0, 1.0)}
    assert torch.equal(latents(pipe, **explicit), before)


def test_they_are_saved_with_their_hash_and_shown(pipe, tmp_path) -> None:
    pipe.sampling = {"guidance_scale": 3.0, "temperature": 0.7}
    folder = pipe.save_pretrained(tmp_path / "p")
    assert json.loads((folder / "sampling.json").read_text()) == pipe.sampling
    index = json.loads((folder / "model_index.json").read_text())
    assert index["sha256"]["sampling.json"] == sha256_of(folder / "sampling.json")
    assert index["guidance_scale"] == 3.0  # for earlier versions
    card = (folder / "README.md").read_text()
    assert "## Sampling defaults" in card and "`guidance_scale=3.0`, `temperature=0.7`" in card
    loaded = Pipeline.from_pretrained(folder)
    assert loaded.sampling == pipe.sampling and loaded.guidance_scale == 3.0
    assert "guidance_scale 3.0, temperature 0.7, float32 on cpu" in repr(loaded)
    assert torch.equal(latents(loaded), latents(pipe))
    for content in ('{"guidance_scale": 9.0}', None):
        path = folder / "sampling.json"
        path.write_text(content) if content else path.unlink()
        with pytest.raises(SmaltiError, match=r"sampling\.json"):
            Pipeline.from_pretrained(folder)


def test_a_pipeline_of_an_earlier_version_keeps_its_guidance(pipe, tmp_path) -> None:
    pipe.guidance_scale = 3.5
    folder = pipe.save_pretrained(tmp_path / "p")
    (folder / "sampling.json").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    index.pop("sha256")
    write_hashed_json(
        folder / "model_index.json", index, ("tokenizer/config.json", "prior/config.json")
    )
    loaded = Pipeline.from_pretrained(folder)
    assert loaded.sampling == {"guidance_scale": 3.5}
    (folder / "sampling.json").write_text('{"temperature": 0.1}')  # of nobody knows whom
    with pytest.raises(SmaltiError, match=r"sampling\.json"):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatur": 0.5}, '"temperatur" is not a sampling default .* "temperature"'),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan, which JSON does not hold"),
        ({"guidance_scale": "high"}, "guidance_scale is high"),
        ({"known": [1]}, '"known" is not a sampling default'),
        ({"generator": 0}, '"generator" is not a sampling default'),
        ({"on_step": print}, '"on_step" is not a sampling default'),
    ],
)
def test_what_the_prior_refuses_is_refused(pipe, tmp_path, options, message) -> None:
    before = pipe.sampling
    with pytest.raises(SmaltiError, match=message):
        pipe.sampling = options
    assert pipe.sampling is before
    pipe.sampling |= {}  # still good
    pipe._sampling = {**before, **options}  # as if changed in place
    with pytest.raises(SmaltiError, match=message):
        pipe.save_pretrained(tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_wrong_file_is_named(pipe, tmp_path) -> None:
    folder = pipe.save_pretrained(tmp_path / "p")
    for content, message in (
        ("[]", r"sampling\.json does not hold sampling options"),
        ("{", r"sampling\.json.* is damaged"),
        ('{"heat": 1}', r'sampling\.json: "heat" is not a sampling default'),
    ):
        (folder / "sampling.json").write_text(content)
        with pytest.raises(SmaltiError, match=message):
            Pipeline.from_pretrained(folder, verify=False)


def test_a_job_is_the_same_whether_its_options_are_given_or_defaults(pipe, tmp_path) -> None:
    job = {"seed": 0, "batch_size": 2}
    generate_folder(pipe, tmp_path / "given", [0, 1], temperature=0.5, **job)
    pipe.sampling = {"temperature": 0.5}
    generate_folder(pipe, tmp_path / "default", [0, 1], **job)
    generate_folder(pipe, tmp_path / "given", [0, 1], **job)  # is continued
    for name in ("generation.json", "000001.png"):
        assert (tmp_path / "given" / name).read_bytes() == (
            tmp_path / "default" / name
        ).read_bytes()
    pipe.sampling = {"temperature": 0.6}
    with pytest.raises(SmaltiError, match="its options differs"):
        generate_folder(pipe, tmp_path / "default", [0, 1], **job)


def test_a_solver_is_named_with_its_options(flow_pipe, tmp_path) -> None:
    wanted = {"num_inference_steps": 2, "solver": {"kind": "ddim", "eta": 0.5}}
    given = latents(flow_pipe, **wanted)
    flow_pipe.sampling = wanted
    loaded = Pipeline.from_pretrained(flow_pipe.save_pretrained(tmp_path / "p"))
    assert torch.equal(latents(loaded), given)
    flags = Sampling(num_inference_steps=3).guided_like(loaded)
    assert flags.options == {"guidance_scale": 2.0, "num_inference_steps": 3} | {
        "solver": {"kind": "ddim", "eta": 0.5}
    }
    loaded.sampling = {"num_inference_steps": 2, "solver": "ddim:eta=0.5"}  # as smalti sweep has it
    save_sampling(tmp_path / "p", loaded.sampling)
    again = Pipeline.from_pretrained(tmp_path / "p")
    assert again.sampling["solver"] == "ddim:eta=0.5" and torch.equal(latents(again), given)
    assert Sampling(num_inference_steps=3).guided_like(again).options == flags.options
    with pytest.raises(SmaltiError, match=r"solver is Euler.* give a number or a text"):
        flow_pipe.sampling = {"solver": Euler()}
    assert flow_pipe.resized(16).sampling == flow_pipe.sampling


def test_another_size_and_other_parts_keep_or_lose_them(pipe) -> None:
    pipe.sampling = {"temperature": 0.5}
    again = Pipeline(**pipe.components)
    assert again.sampling == {"guidance_scale": 2.0}
    assert again.tokenizer is pipe.tokenizer and again.classes == pipe.classes
