"""A pipeline pairs what belongs together, and image i depends on its own seed alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import smalti
from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.pipelines.generation import generate_folder, picture_generator
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.next_token import NextTokenPrior

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


def test_a_prior_of_another_tokenizer_is_refused(tokenizer, prior) -> None:
    def with_fingerprint(value):
        return NextTokenPrior(replace(prior.config, tokenizer_fingerprint=value))

    Pipeline(tokenizer, with_fingerprint(tokenizer.fingerprint), CLASSES)
    with pytest.raises(SmaltiError, match="pair it with its own tokenizer"):
        Pipeline(tokenizer, with_fingerprint("0" * 64), CLASSES)


def test_parts_that_do_not_fit_are_refused(tokenizer, prior) -> None:
    other = NextTokenPrior(replace(prior.config, spec=CodeSpec(16, ((4, 4),))))
    with pytest.raises(SmaltiError, match="do not belong together"):
        Pipeline(tokenizer, other, CLASSES)
    with pytest.raises(SmaltiError, match="2 class names were given; the prior has 3"):
        Pipeline(tokenizer, prior, CLASSES[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 3}, "class label 3 is out of range: use 0 to 2"),
        ({"class_labels": -1}, "class label -1"),
        ({"class_labels": "dgo"}, 'no class is named "dgo".*dog'),
        ({"class_labels": []}, "no pictures were asked for"),
        ({"class_labels": 0, "num_images_per_prompt": 0}, "no pictures were asked for"),
        ({"class_labels": 0, "output_type": "jpeg"}, 'output_type is "jpeg"'),
        ({"class_labels": 0, "batch_size": 0}, "batch_size is 0"),
        (
            {"class_labels": [0, 1], "generator": [torch.Generator()]},
            "1 generators were given for 2",
        ),
    ],
)
def test_mistakes_are_explained_before_any_work(pipe, monkeypatch, arguments, message) -> None:
    monkeypatch.setattr(pipe.prior, "sample", lambda *a, **k: pytest.fail("it sampled"))
    with pytest.raises(SmaltiError, match=message):
        pipe(**arguments)


def test_an_unknown_option_is_a_type_error(pipe) -> None:
    with pytest.raises(TypeError, match="tempersture"):
        pipe(0, tempersture=1.0)


def test_broken_folders_are_named(pipe, tmp_path) -> None:
    folder = pipe.save_pretrained(tmp_path / "p")
    (tmp_path / "other").mkdir()
    with pytest.raises(SmaltiError, match="not a saved pipeline"):
        Pipeline.from_pretrained(tmp_path / "other")
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(SmaltiError, match="no list of class names"):
        Pipeline.from_pretrained(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(SmaltiError, match="is not a pipeline"):
        pipe.save_pretrained(tmp_path / "full")


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
