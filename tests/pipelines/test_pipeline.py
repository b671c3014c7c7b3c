"""A pipeline accepts models that belong together; image i depends on its own seed alone."""

import base64
import io
import json
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from chance import generators
from conftest import TINY_VQ
from PIL import Image

import smalti
from smalti.data.image_io import to_uint8
from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.pipelines import generation
from smalti.pipelines.generation import generate_folder, picture_generator
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.next_scale.config import NextScaleConfig
from smalti.prior.next_scale.model import NextScalePrior
from smalti.prior.next_token.model import NextTokenPrior
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.vq import VQTokenizer

CLASSES = ("cat", "dog", "emu")


@pytest.fixture
def pipe(tokenizer, prior) -> Pipeline:
    return Pipeline(tokenizer, prior, CLASSES)


def test_labels_by_name_and_number_each_give_their_pictures(pipe) -> None:
    out = pipe(class_labels=["dog", 2], num_images_per_prompt=2)
    assert out.labels == [1, 1, 2, 2]
    assert len(out.images) == 4 and out.images[0].size == (16, 16)
    assert out.latents.shape == (4, 64)
    assert pipe("emu").labels == [2] and pipe(torch.tensor([0, 1])).labels == [0, 1]


def test_classes_may_have_numbers_as_names(tokenizer, prior) -> None:
    pipe = Pipeline(tokenizer, prior, ("0", "10", "2"))
    assert pipe.label_ids(["2", 2, "10", "0"]) == [2, 2, 1, 0]
    with pytest.raises(SmaltiError, match='no class is named "1"'):
        pipe.label_ids("1")


def test_text_is_a_number_where_no_class_has_a_number_as_its_name(pipe) -> None:
    assert pipe.label_ids(["1", "emu"]) == [1, 2]
    for text in ("²", "-1", "1.0", ""):
        with pytest.raises(SmaltiError, match="no class is named"):
            pipe.label_ids(text)


def test_integers_of_any_type_are_labels(pipe) -> None:
    wanted = (np.int64(1), np.array([1]), torch.tensor(1), torch.tensor([1], dtype=torch.int32))
    assert all(pipe.label_ids(label) == [1] for label in wanted)
    assert pipe.label_ids(range(3)) == [0, 1, 2]


def test_output_types_show_the_same_pictures(pipe) -> None:
    def images(kind):
        return pipe([0, 1], output_type=kind, generator=torch.Generator().manual_seed(3))

    array, tensor = images("np").images, images("pt").images
    assert array.shape == (2, 16, 16, 3) and tensor.shape == (2, 3, 16, 16)
    assert array.min() >= 0 and array.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pil = np.stack([np.asarray(image) for image in images("pil").images])
    np.testing.assert_allclose(pil, array * 255, atol=0.51)
    latent = images("latent")
    assert latent.images is None and torch.equal(latent.latents, images("pt").latents)


def test_a_picture_does_not_depend_on_neighbours_or_batch_size(pipe) -> None:
    def run(indices, batch_size):
        generators = [picture_generator(7, i) for i in indices]
        return pipe([i % 3 for i in indices], generator=generators, batch_size=batch_size).latents

    whole = run(range(7), None)
    assert torch.equal(run(range(7), 2), whole)
    assert torch.equal(run([5, 2], 1), whole[[5, 2]])


def test_picture_generators_are_distinct() -> None:
    draws = {
        torch.rand((), generator=picture_generator(s, i)).item()
        for s in range(20)
        for i in range(50)
    }
    assert len(draws) == 1000


def test_save_and_load(pipe, tmp_path) -> None:
    grid = Image.new("RGB", (8, 8))
    folder = pipe.save_pretrained(tmp_path / "p", samples=grid, notes="| a | b |")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["components"] == {"tokenizer": "vq", "prior": "next-token"}
    assert "smalti.Pipeline.from_pretrained" in (folder / "README.md").read_text()
    assert (folder / "samples.png").is_file()
    loaded = smalti.Pipeline.from_pretrained(folder)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    latents = [
        p([0, 1], generator=g).latents for p, g in zip((pipe, loaded), generators, strict=True)
    ]
    assert torch.equal(*latents)
    assert loaded.classes == CLASSES
    pipe.save_pretrained(folder)  # the same kind of folder may be overwritten


def test_the_grid_and_the_notes_are_carried_along(pipe, tmp_path, monkeypatch) -> None:
    grid = Image.new("RGB", (8, 8), "red")
    first = pipe.save_pretrained(tmp_path / "a", samples=grid, notes="FID 3.5")
    second = Pipeline.from_pretrained(first).save_pretrained(tmp_path / "b")
    pushed = {}

    def upload(save, *args, **kwargs) -> str:
        pushed.update({p.name: p.read_bytes() for p in save(tmp_path / "c").glob("*.*")})
        return "address"

    monkeypatch.setattr("smalti.repository.upload", upload)
    for source in (pipe, Pipeline.from_pretrained(second)):
        source.push_to_hub("me/model")
        assert pushed["samples.png"] == (first / "samples.png").read_bytes()
        assert b"samples.png" in pushed["README.md"] and b"FID 3.5" in pushed["README.md"]
    Pipeline(pipe.tokenizer, pipe.prior, CLASSES).save_pretrained(second)  # another one
    assert not (second / "samples.png").exists()
    assert "FID" not in (second / "README.md").read_text()


@pytest.fixture
def paired(tokenizer, prior) -> Pipeline:
    config = replace(prior.config, tokenizer_fingerprint=tokenizer.fingerprint)
    return Pipeline(tokenizer, NextTokenPrior(config), CLASSES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_folder_keeps_the_pair(paired, tmp_path, dtype) -> None:
    fingerprint = paired.tokenizer.fingerprint
    whole = paired.save_pretrained(tmp_path / "whole")
    half = paired.to(dtype).save_pretrained(tmp_path / "half")
    sizes = [(p / "prior" / "model.safetensors").stat().st_size for p in (half, whole)]
    assert sizes[0] < 0.6 * sizes[1]
    for folder, changed in ((half, None), (half, dtype), (whole, dtype)):
        loaded = Pipeline.from_pretrained(folder, dtype=changed)
        assert loaded.tokenizer.fingerprint == fingerprint
        assert loaded(0, output_type="pt").images.isfinite().all()
    tokenizer = smalti.Tokenizer.from_pretrained(whole / "tokenizer", dtype=dtype)
    Pipeline(tokenizer, smalti.Prior.from_pretrained(whole / "prior"), CLASSES)


def test_a_precision_has_two_names_and_may_be_that_of_the_files(paired, tmp_path) -> None:
    folder = paired.to(torch.bfloat16).save_pretrained(tmp_path / "half")

    def precisions(**options) -> set[torch.dtype]:
        pipe = Pipeline.from_pretrained(folder, **options)
        assert pipe(0, output_type="pt").images.isfinite().all()
        return {p.dtype for model in (pipe.tokenizer, pipe.prior) for p in model.parameters()}

    assert precisions() == {torch.float32}
    assert precisions(torch_dtype="auto") == precisions(dtype="bfloat16") == {torch.bfloat16}
    assert precisions(torch_dtype=torch.float16) == {torch.float16}
    for options, message in (
        ({"dtype": "float32", "torch_dtype": "float16"}, "give one of them"),
        ({"torch_dtype": "bfloat"}, "torch_dtype is 'bfloat', .*did you mean \"bfloat16\""),
    ):
        with pytest.raises(SmaltiError, match=message):
            Pipeline.from_pretrained(folder, **options)


def test_a_changed_tokenizer_is_refused_before_it_is_saved(paired, tmp_path) -> None:
    paired.tokenizer.to(torch.bfloat16)
    with pytest.raises(SmaltiError, match=r"pair it with its own tokenizer.*cast\(\)"):
        paired.save_pretrained(tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_prior_of_another_tokenizer_is_refused(tokenizer, prior) -> None:
    def with_fingerprint(value):
        return NextTokenPrior(replace(prior.config, tokenizer_fingerprint=value))

    Pipeline(tokenizer, with_fingerprint(tokenizer.fingerprint), CLASSES)
    with pytest.raises(SmaltiError, match="pair it with its own tokenizer"):
        Pipeline(tokenizer, with_fingerprint("0" * 64), CLASSES)


def test_a_tokenizer_at_another_size_is_resized_as_the_message_says(paired) -> None:
    large = paired.tokenizer.resized(32)
    with pytest.raises(SmaltiError, match=r"pass tokenizer.resized\(16\)"):
        Pipeline(large, paired.prior, CLASSES)
    Pipeline(large.resized(16), paired.prior, CLASSES)


def test_the_message_names_scales_that_the_size_does_not_determine() -> None:
    scales = ((1, 1), (2, 2), (4, 4), (8, 8))
    codebook = CodebookConfig(16, 4, l2_normalise=False)
    quantizer = MultiScaleConfig(codebook=codebook, scales=scales, convolutions=1)
    tokenizer = VQTokenizer(replace(TINY_VQ, quantizer=quantizer))
    grids = ((1, 1), (3, 3), (7, 7), (16, 16))
    large = tokenizer.resized(32, grids)
    sizes = NextScaleConfig(depth=1, width=32, num_heads=2)
    config = sizes.fitted(large.spec, len(CLASSES), large.fingerprint, large.quantizer.config)
    prior = NextScalePrior(config)
    prior.bind(large.quantizer)
    with pytest.raises(SmaltiError) as error:
        Pipeline(tokenizer, prior, CLASSES)
    assert str(error.value).endswith(f"pass tokenizer.resized(32, {grids})")
    Pipeline(tokenizer.resized(32, grids), prior, CLASSES)


def test_parts_that_do_not_fit_are_refused(tokenizer, prior) -> None:
    other = NextTokenPrior(replace(prior.config, spec=CodeSpec(16, ((4, 4),))))
    with pytest.raises(SmaltiError, match="do not belong together"):
        Pipeline(tokenizer, other, CLASSES)
    with pytest.raises(SmaltiError, match="2 class names were given; the prior has 3"):
        Pipeline(tokenizer, prior, CLASSES[:2])
    with pytest.raises(SmaltiError, match='2 classes are called "cat"'):
        Pipeline(tokenizer, prior, ("cat", "dog", "cat"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 3}, "class label 3 is out of range: use 0 to 2"),
        ({"class_labels": -1}, "class label -1"),
        ({"class_labels": "dgo"}, 'no class is named "dgo".*dog'),
        ({"class_labels": []}, "no images were requested"),
        ({"class_labels": 0, "num_images_per_prompt": 0}, "no images were requested"),
        ({"class_labels": 0, "output_type": "jpeg"}, 'output_type is "jpeg"'),
        ({"class_labels": 0, "batch_size": 0}, "batch_size is 0"),
        ({"class_labels": 0, "batch_size": 1.5}, "batch_size is 1.5; it must be an integer"),
        (
            {"class_labels": 0, "num_images_per_prompt": 1.5},
            "num_images_per_prompt is 1.5; it must be an integer",
        ),
        ({"class_labels": [1.9]}, "class label is 1.9; it must be an integer"),
        ({"class_labels": torch.tensor([0.9])}, "class label is 0.89.*; it must be an integer"),
        ({"class_labels": torch.tensor([True])}, "class label is True; it must be an integer"),
        ({"class_labels": [True]}, "class label is True; it must be an integer"),
        ({"class_labels": None}, "pass class_labels"),
        ({"class_labels": 0, "generator": 0}, "generator contains 0: give a torch.Generator"),
        ({"class_labels": 0, "generator": [0]}, "generator contains 0: give a torch.Generator"),
        (
            {"class_labels": [0, 1], "generator": [torch.Generator()]},
            "1 generators were given for 2",
        ),
    ],
)
def test_errors_are_explained_before_any_work(pipe, monkeypatch, arguments, message) -> None:
    monkeypatch.setattr(pipe.prior, "sample", lambda *a, **k: pytest.fail("it sampled"))
    with pytest.raises(SmaltiError, match=message):
        pipe(**arguments)


def test_an_unknown_option_is_a_type_error(pipe) -> None:
    with pytest.raises(TypeError, match='"tempersture"; did you mean "temperature"'):
        pipe(0, tempersture=1.0)


def test_broken_folders_are_named(pipe, tmp_path) -> None:
    folder = pipe.save_pretrained(tmp_path / "p")
    (tmp_path / "other").mkdir()
    with pytest.raises(SmaltiError, match="not a saved pipeline"):
        Pipeline.from_pretrained(tmp_path / "other")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SmaltiError, match="is a file"):
        pipe.save_pretrained(tmp_path / "file")
    good = json.loads((folder / "model_index.json").read_text())
    swapped = {"tokenizer": "vq", "prior": "flow"}
    for content, message in (
        (b"[]", "no list of class names"),
        (b"{", "is damaged"),
        (b'{"classes": ["\xff"]}', "is damaged"),
        ({**good, "format_version": 2}, "has format 2"),
        ({**good, "clases": []}, 'unknown key "clases"; did you mean "classes"'),
        ({**good, "_class_name": "DiTPipeline"}, "choose one of Pipeline"),
        ({**good, "components": swapped}, "put together from different pipelines"),
        ({**good, "classes": ["cat", "cat", "dog"]}, '2 classes are called "cat"'),
    ):
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / "model_index.json").write_bytes(text)
        with pytest.raises(SmaltiError, match=message):
            Pipeline.from_pretrained(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(SmaltiError, match="is not a pipeline"):
        pipe.save_pretrained(tmp_path / "full")


# -- hashes, and values that are infinite or NaN -------------------------------------------------


def test_parts_of_another_pipeline_are_found(pipe, tmp_path) -> None:
    """Both pipelines are whole, and their parts fit each other."""
    folder, other = pipe.save_pretrained(tmp_path / "p"), tmp_path / "other"
    with torch.no_grad():
        pipe.prior.output.weight.add_(1)
    pipe.save_pretrained(other)
    shutil.copytree(other / "prior", folder / "prior", dirs_exist_ok=True)
    with pytest.raises(SmaltiError, match=r"prior/config\.json is damaged, or was changed"):
        Pipeline.from_pretrained(folder)
    Pipeline.from_pretrained(folder, verify=False).save_pretrained(folder)
    assert Pipeline.from_pretrained(folder).prior.fingerprint == pipe.prior.fingerprint


@pytest.mark.parametrize(
    "name", ["model_index.json", "tokenizer/config.json", "prior/model.safetensors"]
)
def test_every_flipped_bit_of_a_pipeline_is_found(pipe, tmp_path, name) -> None:
    path = pipe.save_pretrained(tmp_path / "p") / name
    whole = path.read_bytes()
    for bit in torch.randint(8 * len(whole), (15,)).tolist():
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(content))
        with pytest.raises(SmaltiError):
            Pipeline.from_pretrained(tmp_path / "p")


@pytest.mark.parametrize("lost", ["prior/model.safetensors", "tokenizer/config.json"])
def test_a_half_downloaded_pipeline_is_named(pipe, tmp_path, monkeypatch, lost) -> None:
    import huggingface_hub

    folder = pipe.save_pretrained(tmp_path / "p")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert Pipeline.from_pretrained("someone/pipeline", local_files_only=True)
    (folder / lost).unlink()
    with pytest.raises(SmaltiError, match=f"has no {lost}: its download was not finished"):
        Pipeline.from_pretrained("someone/pipeline", local_files_only=True)


def test_the_grid_of_the_card_outlives_the_folders_it_was_saved_in(
    pipe, tmp_path, monkeypatch
) -> None:
    """An upload saves into a temporary folder."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", MagicMock())
    folder = pipe.save_pretrained(tmp_path / "p", samples=Image.new("RGB", (3, 3), "red"))
    grid = (folder / "samples.png").read_bytes()
    pipe.push_to_hub("someone/pipeline")
    pipe.save_pretrained(folder)
    assert (folder / "samples.png").read_bytes() == grid
    assert "samples.png" in (folder / "README.md").read_text()


def test_names_of_classes_that_were_edited_are_found(pipe, tmp_path) -> None:
    index = pipe.save_pretrained(tmp_path / "p") / "model_index.json"
    index.write_text(index.read_text().replace("cat", "cow"))
    with pytest.raises(SmaltiError, match=r"model_index\.json is damaged, or was changed"):
        Pipeline.from_pretrained(tmp_path / "p")
    assert Pipeline.from_pretrained(tmp_path / "p", verify=False).classes[0] == "cow"


def test_a_failed_save_leaves_the_old_pipeline(pipe, tmp_path) -> None:
    folder = pipe.save_pretrained(tmp_path / "p", notes="old")
    fingerprint = pipe.prior.fingerprint
    with torch.no_grad():
        pipe.tokenizer.decoder.conv_out.bias.add_(1)
        pipe.prior.output.weight[0] = torch.nan
    with pytest.raises(SmaltiError, match="16 values that are infinite or NaN"):
        pipe.save_pretrained(folder, notes="new")
    assert pipe.notes == "old"
    assert Pipeline.from_pretrained(folder).prior.fingerprint == fingerprint


def test_a_compiled_prior_is_saved(pipe, tmp_path) -> None:
    fingerprint = pipe.prior.fingerprint
    pipe.prior.layers[0] = torch.compile(pipe.prior.layers[0])
    pipe.tokenizer.decoder = torch.nn.DataParallel(pipe.tokenizer.decoder)
    pipe.prior = torch.compile(pipe.prior)
    loaded = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "p"))
    assert loaded.prior.fingerprint == fingerprint
    assert loaded.tokenizer.fingerprint == pipe.tokenizer.fingerprint


def test_pictures_that_are_not_finite_are_refused(pipe) -> None:
    with torch.no_grad():
        pipe.tokenizer.decoder.conv_out.bias[0] = torch.inf
    with pytest.raises(SmaltiError, match="the decoder gives values that are infinite or NaN"):
        pipe([0, 1])
    with pytest.raises(SmaltiError, match=r"1 of 1 images have values.*infinite or NaN"):
        to_uint8(torch.full((1, 3, 4, 4), torch.nan))


def test_the_guidance_of_a_call_is_stored_with_the_pipeline(pipe, tmp_path, monkeypatch) -> None:
    assert pipe.guidance_scale == 2.0

    def images(pipe: Pipeline, **options) -> torch.Tensor:
        return pipe([0, 1], generator=generators(0, 1), output_type="pt", **options).images

    assert torch.equal(images(pipe), images(pipe, guidance_scale=2.0))
    assert not torch.equal(images(pipe), images(pipe, guidance_scale=1.0))
    pipe.guidance_scale = 3.5
    folder = pipe.save_pretrained(tmp_path / "p")
    loaded = Pipeline.from_pretrained(folder)
    assert loaded.guidance_scale == 3.5
    assert torch.equal(images(loaded), images(pipe, guidance_scale=3.5))
    job = {"seed": 0, "batch_size": 2}
    generate_folder(loaded, tmp_path / "a", [0, 1], **job)
    generate_folder(loaded, tmp_path / "b", [0, 1], guidance_scale=3.5, **job)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_prior_without_a_null_class_is_not_guided(tokenizer, prior) -> None:
    plain = NextTokenPrior(replace(prior.config, label_dropout=0.0))
    torch.nn.init.zeros_(plain.cls_embedding.weight[-1])
    pipe = Pipeline(tokenizer, plain, CLASSES)
    assert pipe.guidance_scale == 1.0
    assert len(pipe("cat").images) == 1


def test_a_pipeline_says_what_it_is(pipe) -> None:
    text = repr(pipe)
    for part in ("VQTokenizer", "16 x 16 pixels", "NextTokenPrior", "3 classes: cat, dog, emu"):
        assert part in text
    assert "guidance_scale 2.0, float32 on cpu" in text


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_notebook_shows_the_pictures_of_a_result(tokenizer, prior, output_type: str) -> None:
    pipe = Pipeline(tokenizer, prior, ("<cat>", "dog", "emu"))
    out = pipe([0, 2], generator=generators(0, 1), output_type=output_type)
    page = out._repr_html_()
    assert page.count("<img ") == 2 and "&lt;cat&gt;" in page and "emu" in page
    encoded = re.findall(r"base64,([^\"]+)", page)
    expected = pipe([0, 2], generator=generators(0, 1)).images
    for text, picture in zip(encoded, expected, strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(text)))
        assert np.array_equal(np.asarray(shown), np.asarray(picture))
    grid = Image.open(io.BytesIO(out._repr_png_()))
    assert grid.size == (2 * 16 + 6, 16 + 4)  # with a margin of 2 pixels
    assert repr(out) == "PipelineOutput(2 images of <cat>, emu)"


def test_a_result_of_latents_shows_nothing(pipe) -> None:
    out = pipe([0, 0], output_type="latent")
    assert out._repr_html_() is None and out._repr_png_() is None
    assert repr(out) == "PipelineOutput(2 latents of cat)"


# -- batch generation -------------------------------------------------------------------------

LABELS = [0, 1, 2, 0, 1]


def generate(pipe, folder, **changes):
    options = {"seed": 1, "guidance_scale": 1.0, "batch_size": 2, "temperature": 0.9, **changes}
    return generate_folder(pipe, folder, LABELS, **options)


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.png"))}


def test_batch_size_workers_and_restarts_do_not_change_a_picture(pipe, tmp_path) -> None:
    generate(pipe, tmp_path / "a")
    generate(pipe, tmp_path / "b", batch_size=5)
    for rank in (1, 0):
        generate(pipe, tmp_path / "c", rank=rank, world_size=2)
    assert len(contents(tmp_path / "a")) == 5
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    (tmp_path / "b" / "000003.png").unlink()
    (tmp_path / "b" / "000001.png").write_bytes(b"cut")
    kept = (tmp_path / "b" / "000000.png").stat().st_mtime_ns
    generate(pipe, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert (tmp_path / "b" / "000000.png").stat().st_mtime_ns == kept


def test_another_job_may_not_write_into_the_folder(pipe, tmp_path) -> None:
    generate(pipe, tmp_path / "a")
    before = contents(tmp_path / "a")
    with pytest.raises(SmaltiError, match="its seed differs"):
        generate(pipe, tmp_path / "a", seed=2)
    with pytest.raises(SmaltiError, match="its options differs"):
        generate(pipe, tmp_path / "a", temperature=0.5)
    assert contents(tmp_path / "a") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.png").write_bytes(b"x")
    with pytest.raises(SmaltiError, match="not empty"):
        generate(pipe, tmp_path / "mine")


def test_any_number_of_processes_may_begin_at_once(pipe, tmp_path, monkeypatch) -> None:
    """Rank 0 writes the settings while the others wait; here it is slow."""
    together = threading.Barrier(3)
    written = generation.write_hashed_json

    def slowly(*arguments) -> None:
        time.sleep(0.1)
        written(*arguments)

    monkeypatch.setattr(generation, "write_hashed_json", slowly)
    with ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(generate, pipe, tmp_path / "a", rank=r, world_size=3, barrier=together.wait)
            for r in range(3)
        ]
        assert all(len(run.result(timeout=60)) == 5 for run in runs)
    assert len(contents(tmp_path / "a")) == 5


def test_a_refusal_reaches_every_process(pipe, tmp_path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"x")
    waited = []
    for rank in range(2):
        with pytest.raises(SmaltiError, match="not empty"):
            generate(pipe, tmp_path, rank=rank, world_size=2, barrier=lambda: waited.append(1))
    assert len(waited) == 2


def test_temporary_files_of_other_processes_are_accepted(pipe, tmp_path) -> None:
    (tmp_path / ".tmp-generation.json-1").write_text("{")
    assert len(generate(pipe, tmp_path)) == 5


def test_settings_that_cannot_be_read_are_named(pipe, tmp_path) -> None:
    folder = tmp_path / "a"
    generate(pipe, folder)
    for content, message in (
        (b"{", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[]", "does not contain settings"),
    ):
        (folder / "generation.json").write_bytes(content)
        with pytest.raises(SmaltiError, match=rf"generation\.json.*{message}"):
            generate(pipe, folder)
    with pytest.raises(SmaltiError, match=r"a/000000\.png is a file: choose a folder"):
        generate(pipe, folder / "000000.png")


def test_a_job_is_not_continued_in_another_precision(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path / "p")
    generate(pipe, tmp_path / "a")
    for other in (pipe.to(torch.bfloat16), pipe.to(torch.float32)):
        with pytest.raises(SmaltiError, match="its model differs"):
            generate(other, tmp_path / "a")
    generate(Pipeline.from_pretrained(tmp_path / "p"), tmp_path / "a")
