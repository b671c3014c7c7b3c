"""`smalti evaluate --samples A --reference B`: torch-fidelity as the oracle, every kind of set, and
what is refused."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from jobs import forked
from PIL import Image
from torch import Tensor

from smalti.cli import main as smalti_main
from smalti.data.latents import CodeSpec
from smalti.errors import CheckpointError, ConfigurationError, DataError, GenerationError
from smalti.evaluation import features as features_module
from smalti.evaluation.features import InceptionFeatures, TransformersFeatures, own_extractor
from smalti.evaluation.image_sets import read_statistics
from smalti.evaluation.metrics import Metric, Undefined
from smalti.files import read_hashed_json
from smalti.pipelines.generation import picture_generator
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.scripts import evaluate as evaluate_module
from smalti.scripts.evaluate import EvaluateConfig, evaluate, measured
from smalti.scripts.evaluate_sets import Comparison, names_that_fit
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.vq import VQConfig, VQTokenizer
from tests.backbones import CONFIGS, write_folder, write_inception

COUNT = 10  # as many as the parts of an Inception Score


def write_pictures(root: Path, count: int, seed: int, classes: tuple[str, ...] = ("",)) -> Path:
    """Smooth random pictures of 32 x 32 pixels, `count` in each class."""
    made = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            small = made.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            small[..., number % 3] //= 2
            picture = Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC)
            picture.save(root / name / f"{index:03d}.png")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sets")
    return write_pictures(root / "a", COUNT, 1), write_pictures(root / "b", COUNT, 2)


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    return write_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


def settings(samples: Path | str, reference: Path | str, out: Path, **changes) -> EvaluateConfig:
    sets = {"samples": str(samples), "reference": str(reference)}
    return EvaluateConfig(**{**sets, "output_dir": out, "classifier_epochs": 1, **changes})


def as_npz(folder: Path, file: Path) -> Path:
    rows = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    np.savez(file, np.stack(rows))
    return file


@pytest.mark.slow  # 48 passes through Inception
def test_torch_fidelity_gives_the_same_numbers(folders, inception: Path, tmp_path: Path) -> None:
    from torch_fidelity import calculate_metrics

    expected = calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor_weights_path=str(inception),
        **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
        feature_extractor="inception-v3-compat",  # of all four: that of prc is another
        kid_subset_size=COUNT,
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=COUNT,
    )
    statistics = tmp_path / "a.npz"
    config = settings(*folders, tmp_path / "out", inception=inception, save_statistics=statistics)
    found = evaluate(config)
    name = "inception-like"
    pairs = {
        f"fd_{name}": "frechet_inception_distance",
        f"score_{name}": "inception_score_mean",
        f"kid_{name}": "kernel_inception_distance_mean",
        f"precision_{name}": "precision",
        f"recall_{name}": "recall",
    }
    assert expected["frechet_inception_distance"] > 1
    for ours, theirs in pairs.items():
        assert found[ours].value == pytest.approx(expected[theirs], rel=1e-4, abs=1e-6), ours
    std = found[f"score_{name}"].protocol["std"]
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-4)
    assert f"fd_{name}_spatial" in found and not {"fid", "sfid", "inception_score"} & found.keys()
    # The other way round, with the statistics that were saved: the roots of singular covariances
    # are those of rounding errors.
    back = evaluate(settings(folders[1], statistics, tmp_path / "back", inception=inception))
    for metric in (f"fd_{name}", f"fd_{name}_spatial"):
        assert back[metric].value == pytest.approx(found[metric].value, rel=1e-6)


def test_spatial_features_are_the_first_channels_of_mixed_6(inception: Path) -> None:
    extractor = InceptionFeatures(inception)
    grids: list[Tensor] = []
    branch = extractor.network.Mixed_6d.branch1x1  # mixed_6/conv in TensorFlow
    branch.register_forward_hook(lambda module, inputs, output: grids.append(output))
    outputs = extractor.outputs(torch.rand(1, 1, 20, 24) * 2 - 1)  # grey, of any size
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {
        "features": (1, 2048),
        "spatial": (1, 2023),
        "logits": (1, 1008),
    }
    as_adm = grids[0].permute(0, 2, 3, 1)[..., :7].reshape(1, -1)
    assert torch.equal(outputs["spatial"], as_adm)
    assert extractor.name == "inception-like" and not extractor.published


def test_weights_are_known_by_their_hash(inception: Path, tmp_path: Path, monkeypatch) -> None:
    """With the published hash, the network has the name by which metrics are called FID."""
    import hashlib

    sha256 = hashlib.sha256(inception.read_bytes()).hexdigest()
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", sha256)
    extractor = InceptionFeatures(inception)
    assert (extractor.name, extractor.weights_sha256) == ("inception", sha256)
    broken = tmp_path / "broken.pth"
    torch.save({"fc.weight": torch.zeros(3)}, broken)
    with pytest.raises(DataError, match="not a weight file of torch-fidelity's Inception"):
        InceptionFeatures(broken)
    torch.save({"fc.weight": Path("code")}, broken)  # a pickle that would import a module
    with pytest.raises(DataError, match="not a weight file"):
        InceptionFeatures(broken)


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip", "clip with texts"])
def test_a_vision_model_of_transformers_gives_pooled_features(tmp_path: Path, kind: str) -> None:
    from transformers import BitImageProcessor, CLIPConfig, CLIPModel, CLIPTextConfig

    folder = tmp_path / f"Tiny-{kind}"
    if kind == "clip with texts":  # as published models are saved
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        text = CLIPTextConfig(**sizes, num_hidden_layers=1, vocab_size=8)
        whole = CLIPConfig(
            text_config=text.to_dict(), vision_config=CONFIGS["clip"].to_dict(), projection_dim=10
        )
        CLIPModel(whole).save_pretrained(folder)
    else:
        write_folder(folder, kind)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        TransformersFeatures(str(folder))
    sizes = {"size": {"height": 16, "width": 16}, "do_center_crop": False}
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    BitImageProcessor(**sizes, image_mean=mean, image_std=std).save_pretrained(folder)
    extractor = TransformersFeatures(str(folder))
    assert extractor.name == f"tiny-{kind}" and len(extractor.weights_sha256) == 64
    assert extractor.family.startswith(kind.split()[0]) and extractor.side == 16
    images = torch.randint(256, (3, 3, 16, 16)).float()
    features = extractor(images / 127.5 - 1)
    normal = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    if kind == "clip with texts":
        pooled = extractor.model.vision_model(pixel_values=normal).pooler_output
        expected = extractor.model.visual_projection(pooled)
        assert expected.shape == (3, 10)
    else:
        expected = extractor.model(pixel_values=normal).pooler_output
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


class Mean:
    """The user's own extractor: the mean colour."""

    name, side, weights_sha256 = "mean", 32, "none"

    def __call__(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def test_an_extractor_of_the_user_s_own(folders, tmp_path: Path, monkeypatch) -> None:
    module = ModuleType("my_features")
    vars(module).update(Mean=Mean, ready=Mean(), make=lambda: Mean(), wrong=lambda: object())
    monkeypatch.setitem(sys.modules, "my_features", module)
    for name in ("Mean", "ready", "make"):
        assert own_extractor(f"my_features:{name}").name == "mean"
    found = measured(settings(*folders, tmp_path, features=("my_features:Mean",)))
    assert "fd_mean" in found and "kid_mean" in found and "fd_alexnet" not in found
    with pytest.raises(ConfigurationError, match="has no name"):
        own_extractor("my_features:wrong")
    with pytest.raises(ConfigurationError, match="PYTHONPATH"):
        own_extractor("no_such_module:Mean")
    with pytest.raises(ConfigurationError, match='did you mean "alexnet"'):
        own_extractor("alexnett")


def test_a_folder_and_an_npz_of_its_pictures_are_one_set(folders, tmp_path: Path, caplog) -> None:
    npz = as_npz(folders[0], tmp_path / "a.npz")
    one = evaluate(settings(*folders, tmp_path / "one"))
    other = evaluate(settings(npz, folders[1], tmp_path / "other"))
    assert {n: m.value for n, m in one.items()} == {n: m.value for n, m in other.items()}
    hashes = [x["fd_alexnet"].protocol["samples"]["sha256_of_pixels"] for x in (one, other)]
    assert hashes[0] == hashes[1]
    assert one["fd_alexnet"].protocol["cautions"] == []
    same = evaluate(settings(npz, folders[0], tmp_path / "same"))
    assert same["fd_alexnet"].value == pytest.approx(0, abs=1e-6)
    assert "10 of 10 samples are equal to a pic" in same["fd_alexnet"].protocol["cautions"][0]
    assert "10 of 10 samples are equal" in caplog.text and "covariance is singular" in caplog.text
    assert not (tmp_path / "one/parts").exists()


def test_saved_statistics_are_a_reference(folders, tmp_path: Path) -> None:
    file = tmp_path / "b.npz"
    evaluate(EvaluateConfig(samples=str(folders[1]), save_statistics=file, output_dir=tmp_path))
    found = measured(settings(folders[0], file, tmp_path / "out"))
    expected = evaluate(settings(*folders, tmp_path / "expected"))["fd_alexnet"].value
    metric = found["fd_alexnet"]
    assert isinstance(metric, Metric) and metric.value == pytest.approx(expected, rel=1e-9)
    about = metric.protocol["reference"]["statistics"]
    assert about["pictures"] == COUNT and about["record"]["features"] == "alexnet"
    assert isinstance(found["kid_alexnet"], Undefined)
    with np.load(file) as arrays:
        mu, sigma = arrays["mu"], arrays["sigma"]
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(DataError, match="--features inception"):
        measured(settings(folders[0], tmp_path / "inception.npz", tmp_path / "refused"))
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma)  # without a record
    two = [SimpleNamespace(name=name, side=8, weights_sha256="") for name in ("one", "two")]
    with pytest.raises(DataError, match="may be of one or two: give one of them as --features"):
        names_that_fit(two, {"one": len(mu), "two": len(mu)}, read_statistics(tmp_path / "adm.npz"))
    found = measured(settings(folders[0], tmp_path / "adm.npz", tmp_path / "adm"))
    metric = found["fd_alexnet"]
    assert isinstance(metric, Metric) and metric.value == pytest.approx(expected, rel=1e-9)


def test_classes_and_held_out_pictures_are_used(tmp_path: Path) -> None:
    classes = ("blue", "green", "red")
    samples = write_pictures(tmp_path / "samples", 4, 1, classes[:2])
    reference = write_pictures(tmp_path / "reference", 20, 2, classes)
    found = measured(settings(samples, reference, tmp_path / "out", reference_split="train"))
    accuracy = found["classifier_accuracy_samples"]
    assert isinstance(accuracy, Metric) and 0 <= accuracy.value <= 1
    assert accuracy.protocol["pictures"] == 8
    assert accuracy.protocol["reference"]["split"] == "train"
    assert accuracy.protocol["heldout"]["split"] == "heldout"
    assert isinstance(found["fdr_1"], Metric)
    assert "no captions" in getattr(found["retrieval_accuracy_samples"], "reason", "")
    stored = read_hashed_json(tmp_path / "out/summary.json")
    assert "retrieval_accuracy_samples" in stored["undefined"]


def tiny_tokenizer() -> VQTokenizer:
    """Of pictures of 16 x 16 pixels."""
    conv = ConvConfig(
        channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), z_channels=8
    )
    book = NearestConfig(codebook=CodebookConfig(32, 4))
    return VQTokenizer(VQConfig(image_size=16, conv=conv, quantizer=book))


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    sizes = {"depth": 1, "width": 16, "num_heads": 2, "hidden": 32}
    spec = CodeSpec(32, ((8, 8),))
    prior = NextTokenPrior(NextTokenConfig(spec=spec, num_classes=3, **sizes))
    pipe = Pipeline(tiny_tokenizer(), prior, ("blue", "green", "red"))
    return pipe.save_pretrained(tmp_path / "pipe")


def test_every_number_of_a_pipeline_has_its_protocol(pipeline: Path, tmp_path: Path) -> None:
    reference = write_pictures(tmp_path / "reference", 6, 2, ("red", "green", "blue"))
    config = settings(
        pipeline, reference, tmp_path / "out", num_samples=16, image_size=16, temperature=0.5
    )
    found = measured(config)
    values = [metric for metric in found.values() if isinstance(metric, Metric)]
    assert len(values) >= 6
    for metric in values:
        samples, real = metric.protocol["samples"], metric.protocol["reference"]
        assert samples["kind"] == "pipeline" and samples["pictures"] == 16
        sampling = samples["sampling"]
        assert sampling["temperature"] == 0.5 and sampling["top_p"] == 1.0
        assert sampling["guidance_scale"] == 2.0 and sampling["dtype"] == "fp32"
        assert sampling["seed"] == 0 and sampling["labels"] == "as in the reference"
        assert real["pictures"] == 18 and real["crop"].startswith("centre, to 16 x 16")
        for one in (samples, real):
            assert len(one["sha256_of_pixels"]) == 64 and one["size"] == "16 x 16"
        for name in ("weights_sha256", "resize", "rounding", "seed", "features", "arithmetic"):
            assert name in metric.protocol
    stored = read_hashed_json(tmp_path / "out/summary.json")
    assert stored["metrics"]["fd_alexnet"]["value"] == getattr(found["fd_alexnet"], "value", None)
    assert stored["versions"]["torch"]
    # Samples do not depend on how many are drawn at once.
    again = evaluate(
        settings(
            pipeline,
            reference,
            tmp_path / "again",
            num_samples=16,
            image_size=16,
            temperature=0.5,
            batch_size=5,
        )
    )
    hashes = [
        json.dumps(m.protocol["samples"]["sha256_of_pixels"])
        for m in (values[0], again["fd_alexnet"])
    ]
    assert hashes[0] == hashes[1]


def test_a_pipeline_of_captions_is_given_those_of_the_reference(tmp_path: Path) -> None:
    spec = CodeSpec(32, ((8, 8),))
    sizes = {"depth": 1, "width": 16, "num_heads": 2, "hidden": 32}
    text = {"condition": "text", "text_encoder": "bytes", "text_length": 16, "text_dim": 8}
    prior = NextTokenPrior(NextTokenConfig(spec=spec, num_classes=0, **sizes, **text))
    torch.nn.init.normal_(prior.output.weight, std=0.5)
    pipe = Pipeline(tiny_tokenizer(), prior, ())
    folder = pipe.save_pretrained(tmp_path / "pipe")
    reference = write_pictures(tmp_path / "reference", 20, 2)
    config = settings(
        folder, reference, tmp_path / "out", num_samples=16, image_size=16, reference_split="train"
    )
    with pytest.raises(GenerationError, match="give a --reference with captions"):
        measured(config)
    for number, file in enumerate(sorted(reference.glob("*.png"))):
        file.with_suffix(".txt").write_text(f"a picture {number}")
    found = measured(config)
    metric = found["fd_alexnet"]
    assert isinstance(metric, Metric)
    asked = metric.protocol["samples"]["sampling"]
    assert asked["prompts"] == "captions of the reference, evenly spaced"
    accuracy = found["retrieval_accuracy_samples"]
    assert isinstance(accuracy, Metric) and 0 <= accuracy.value <= 1
    opened = Comparison.open(config)
    samples, real = opened.samples.pictures, opened.reference and opened.reference.pictures
    assert samples is not None and real is not None
    assert samples.captions[0] == real.captions[0] and samples.captions[15] == real.captions[-1]
    alone = pipe(prompt=samples.captions[7], generator=[picture_generator(0, 7)], output_type="np")
    pixels = torch.from_numpy((alone.images * 255).round()).byte().permute(0, 3, 1, 2)
    assert torch.equal(samples.levels([7]), pixels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": ""}, "give one, or --save_statistics"),
        ({"samples": ""}, "add --samples"),
        ({"data": "fashion"}, "leave one out"),
        ({"model": "somewhere"}, "leave one out"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        EvaluateConfig(**{"samples": "a", "reference": "b", **changes})


def test_sets_that_cannot_be_measured_are_refused_before_any_work(folders, tmp_path: Path) -> None:
    for samples, message in ((tmp_path / "none", "none"), (tmp_path / "none.npz", "none.npz")):
        with pytest.raises(DataError, match=message):
            measured(settings(samples, folders[1], tmp_path / "out"))
    with pytest.raises(ConfigurationError, match="check --inception"):
        measured(settings(*folders, tmp_path / "out", inception=tmp_path / "none.pth"))
    assert not (tmp_path / "out/evaluation.json").exists()
    measured(settings(*folders, tmp_path / "out"))
    with pytest.raises(ConfigurationError, match="choose another --output_dir"):
        measured(settings(folders[1], folders[0], tmp_path / "out"))


@pytest.mark.parametrize(
    "flag", [("--temperature", "0.5"), ("--num_samples", "64"), ("--dtype", "bf16")]
)
def test_flags_of_sampling_are_for_pipelines(folders, tmp_path: Path, capsys, flag) -> None:
    sets = ["--samples", str(folders[0]), "--reference", str(folders[1])]
    assert smalti_main(["evaluate", *sets, "--output_dir", str(tmp_path / "out"), *flag]) == 2
    assert f"is a pipeline to sample: leave out {flag[0]}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_prints_what_is_not_defined(folders, tmp_path: Path, capsys) -> None:
    flags = ["--samples", str(folders[0]), "--reference", str(folders[1])]
    assert evaluate_module.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "fd_alexnet" in printed and "not defined: the samples have no classes" in printed


@pytest.mark.slow
def test_two_processes_write_the_summary_of_one(folders, tmp_path: Path) -> None:
    flags = ["--samples", str(folders[0]), "--reference", str(folders[1])]
    values = []
    for count in (1, 2):
        command = ["evaluate", *flags, "--output_dir", str(tmp_path / str(count))]
        done = forked(lambda command=command: sys.exit(smalti_main(command)), count)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("summary:") == 1
        stored = read_hashed_json(tmp_path / str(count) / "summary.json")["metrics"]
        values.append({name: metric["value"] for name, metric in stored.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-9)
