"""A kind of condition of one's own, from the latent cache to a call: `tests/colour.py`."""

import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from colour import ColourKind, ColourSource

import smalti
from smalti.data.image_io import to_pil
from smalti.data.latent_cache.cache import LatentCache
from smalti.errors import SmaltiError
from smalti.pipelines.conditions import CONDITION_SOURCES
from smalti.pipelines.finetune import load_initial_weights
from smalti.pipelines.generation import generate_folder
from smalti.pipelines.info import of_pipeline
from smalti.pipelines.picture_files import PictureFormat
from smalti.pipelines.serving import Batcher
from smalti.prior.conditions.base import Combination
from smalti.prior.conditions.registry import CONDITIONS
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowPrior
from smalti.scripts.encode import EncodeConfig, encode
from smalti.scripts.train_prior import TrainPriorConfig, open_latents, train
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer

COMMAND = Path(__file__).parents[1] / "colour.py"
CONV = ConvConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=2
)
FLOW = FlowConfig(network=DiTConfig(patch_size=2, depth=1, width=16, num_heads=1))
RED, BLUE = [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]
OPTIONS = {"num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module", autouse=True)
def registered():
    """As `CONDITION_SOURCES.register` does, for the tests of this file alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONDITION_SOURCES._entries, "colour", ColourSource)
        patch.setitem(CONDITIONS._entries, "colour", ColourKind)
        yield


def settings(root: Path, **changes) -> TrainPriorConfig:
    base = TrainPriorConfig(
        latents=root / "latents",
        tokenizer=root / "tokenizer",
        prior=FLOW,
        condition="class+colour",
        max_train_steps=3,
        train_batch_size=4,
        mixed_precision="no",
        preview=replace(TrainPriorConfig().preview, num_inference_steps=2),
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures of two classes, their latents with colours, and a trained pipeline."""
    root = tmp_path_factory.mktemp("colours")
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        (root / "pictures" / name).mkdir(parents=True)
        for number, picture in enumerate(to_pil(torch.rand(6, 3, 16, 16, generator=generator))):
            picture.save(root / "pictures" / name / f"{number}.png")
    torch.manual_seed(0)
    KLTokenizer(KLConfig(image_size=16, conv=CONV)).save_pretrained(root / "tokenizer")
    cached = EncodeConfig(
        data=str(root / "pictures"),
        tokenizer=root / "tokenizer",
        output_dir=root / "latents",
        condition="class+colour",
    )
    encode(cached)
    encode(replace(cached, output_dir=root / "plain", condition="class"))
    train(settings(root, output_dir=root / "run"))
    return root


@pytest.fixture(scope="module")
def pipe(root: Path) -> smalti.Pipeline:
    pipe = smalti.Pipeline.from_pretrained(root / "run" / "pipeline")
    for parameter in pipe.prior.parameters():  # a new flow is zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return pipe


def test_every_kind_has_one_source() -> None:
    kinds = {name: CONDITIONS.resolve(name) for name in CONDITIONS}
    assert kinds == {name: source.Kind for name, source in CONDITION_SOURCES.classes.items()}


def test_the_cache_holds_it_for_each_view(root: Path) -> None:
    latents = LatentCache(root / "latents" / "train")
    (stored,) = latents.info.conditions
    assert (stored.name, stored.rows, latents.info.views) == (
        "colour",
        "view",
        ("identity", "flip"),
    )
    colours = latents.first_view([0, 1]).conditions["colour"]
    assert colours.shape == (2, 3) and colours.min() > 0 and colours.max() < 1


def test_a_pipeline_takes_it_and_says_so(pipe: smalti.Pipeline, root: Path) -> None:
    def images(colour, **options):
        generator = torch.Generator().manual_seed(0)
        return pipe("a", colour=colour, generator=generator, **OPTIONS, **options).images

    red, blue = images([RED]), images([BLUE])
    assert not torch.equal(red, blue) and torch.equal(red, images(torch.tensor([RED])))
    assert not torch.equal(red, images([RED], guidance_scale=1.0))  # 2 by default
    both = pipe("b", colour=[RED, BLUE], num_images_per_prompt=2, **OPTIONS)
    assert both.images.shape == (4, 3, 16, 16) and both.labels == [1] * 4
    card = (root / "run" / "pipeline" / "README.md").read_text()
    assert "colour=[[1, 0, 0]], num_images_per_prompt=4)" in card
    assert "Classes: a, b. They have a mean colour." in card
    assert (root / "run" / "pipeline" / "samples.png").is_file()


def test_saving_and_loading_keep_it(pipe: smalti.Pipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    again = smalti.Pipeline.from_pretrained(tmp_path / "saved")
    assert again.prior.config.condition == "class+colour"
    images = [
        model("b", colour=[RED], generator=torch.Generator().manual_seed(1), **OPTIONS).images
        for model in (pipe, again)
    ]
    assert torch.equal(*images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "conditional on class and colour: pass class_labels and colour"),
        ({"colour": [RED], "prompt": "a"}, "pass class_labels and colour, and no prompt"),
        ({"colour": [RED[:2]]}, r"give \(B, 3\)"),
        ({"colour": [RED] * 3}, "2 of class_labels were given for 3 images"),
        ({"colour": [RED], "color": 1}, 'no sampling option "color"'),
    ],
)
def test_a_wrong_call_is_refused(pipe: smalti.Pipeline, arguments, message) -> None:
    with pytest.raises(SmaltiError, match=message):
        pipe(["a", "b"], **arguments, **OPTIONS)


def test_a_class_conditional_prior_is_the_start(pipe: smalti.Pipeline, tmp_path: Path) -> None:
    """Before the first step, the null colour leaves its outputs as they are."""
    config = pipe.prior.config
    source = FlowPrior(config.conditioned("class").fitted(config.spec, 2, None)).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    prior = FlowPrior(config).eval()
    load_initial_weights(prior, str(source.save_pretrained(tmp_path / "class")))
    x, t, labels = torch.randn(3, 2, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])
    given = Combination({"class": labels, "colour": torch.full((3, 3), torch.nan)})
    assert torch.equal(prior.network(x, t, given), source.network(x, t, labels))


def test_latents_without_it_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SmaltiError, match=r"no colour beside them: encode with --condition class"):
        train(settings(root, latents=root / "plain", output_dir=tmp_path / "run"))


def test_without_a_cache_it_is_made_of_the_pictures_of_each_step(root: Path) -> None:
    config = settings(root, data=str(root / "pictures"), latents=TrainPriorConfig().latents)
    _, made, _ = open_latents(replace(config, flip=False), torch.device("cpu"))
    stored = LatentCache(root / "latents" / "train")
    keys = [(2, 1), (3, 0)]
    assert made.info.conditions == stored.info.conditions
    colours = made.__getitems__(keys).conditions["colour"]
    torch.testing.assert_close(colours, stored.first_view([1, 0]).conditions["colour"])


def test_each_picture_of_a_shard_is_described_with_it(pipe, tmp_path: Path) -> None:
    kind, options = PictureFormat("webdataset"), {"batch_size": 4, "num_inference_steps": 1}
    given = {"colour": [RED, BLUE]}
    generate_folder(pipe, tmp_path, [0, 1, 0], seed=0, given=given, picture_format=kind, **options)
    with tarfile.open(tmp_path / "shard-000000.tar") as shard:
        rows = [json.load(shard.extractfile(name)) for name in shard.getnames()[1::2]]
    assert [(row["class"], row["colour"]) for row in rows] == [("a", RED), ("b", BLUE), ("a", RED)]
    assert [*rows[0]] == ["index", "class", "label", "seed", "colour"]


def test_a_flag_that_cannot_be_read_is_one_line(pipe: smalti.Pipeline) -> None:
    options = SimpleNamespace(model="m", colour=["1,0,red"])
    with pytest.raises(SmaltiError, match=r"--colour is 1,0,red \(.*\): give mean colours of the"):
        ColourSource(pipe.prior.config).chosen(options)


def test_what_a_request_cannot_hold_is_not_served(pipe: smalti.Pipeline) -> None:
    with pytest.raises(SmaltiError, match="needs colour, which a request does not have"):
        Batcher(pipe)


def test_it_is_named_by_repr_and_info(pipe: smalti.Pipeline, root: Path) -> None:
    assert "2 classes: a, b, colour" in repr(pipe)
    assert "--colour VALUE" in dict(of_pipeline(root / "run" / "pipeline").lines)["next"]


@pytest.mark.slow
def test_the_command_has_a_flag_for_it(root: Path, tmp_path: Path) -> None:
    """In a process of its own, where it is registered before the commands are imported."""
    argv = ["generate", "--model", root / "run" / "pipeline", "--num_images", "3"]
    argv += ["--colour", "1,0,0", "0,0,1", "--output_dir", tmp_path / "out"]
    argv += ["--num_inference_steps", "2"]
    done = subprocess.run(
        [sys.executable, COMMAND, *map(str, argv)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["colour"] for line in lines] == [RED, BLUE, RED]
