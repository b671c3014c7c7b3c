"""What is refused: damaged files, code in pickles, other models, missing and surplus tensors. Each
in one line, with nothing written."""

import argparse
import datetime
import os
import pickle
import sys
import types
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.pipelines.convert import PUBLISHED_SOURCES
from smalti.pipelines.convert.convert import class_names, convert, export, read_published
from smalti.pipelines.convert.layout import Buffer, Layout, Link, import_tensors, joined, same
from smalti.pipelines.convert.reader import read_checkpoint
from smalti.pipelines.convert.source import Options
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.conditions.image import ImageConfig
from smalti.prior.conditions.text import TextConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowConfig, FlowPrior
from smalti.prior.next_scale.config import NextScaleConfig
from smalti.prior.next_token.config import NextTokenConfig
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.quantizers.nearest import NearestConfig
from smalti.tokenizer.registry import TOKENIZERS
from smalti.tokenizer.vq import VQConfig

CONV = ConvConfig(32, (1, 2), 1, attention_levels=(1,), z_channels=4, norm_groups=32)
VQ = VQConfig(image_size=16, conv=CONV, quantizer=NearestConfig(codebook=CodebookConfig(8, 4)))
PLAIN = VQConfig(
    image_size=16,
    conv=CONV,
    quantizer=NearestConfig(codebook=CodebookConfig(8, 4, l2_normalise=False)),
)
SCALES = VQConfig(
    image_size=16,
    conv=CONV,
    quantizer=MultiScaleConfig(
        codebook=CodebookConfig(8, 4, l2_normalise=False),
        scales=((1, 1), (8, 8)),
        convolutions=2,
    ),
)
MODELS = {
    "llamagen-tokenizer": VQ,
    "var-tokenizer": SCALES,
    "taming-vqgan": PLAIN,
    "diffusers-kl": KLConfig(image_size=16, conv=CONV),
    "diffusers-vq": PLAIN,
    "ldm-kl": KLConfig(image_size=16, conv=CONV),
}
FLAGS = {"var-tokenizer": Options(scales=(1, 8))}


def model_of(source: str) -> Tokenizer:
    return TOKENIZERS.build(MODELS[source])


def state_of(source: str, folder: Path) -> dict[str, Tensor]:
    """A published file of this source, as our own export writes it."""
    export(model_of(source), folder / source, source)
    return dict(read_checkpoint(folder / source).tensors)


@pytest.fixture
def state(tmp_path: Path) -> dict[str, Tensor]:
    return state_of("llamagen-tokenizer", tmp_path)


def refuse(content: object, folder: Path, source: str = "llamagen-tokenizer") -> str:
    """The error message for a file that cannot be converted; checks that it is one line, and that
    nothing was written."""
    file = folder / "published.pt"
    torch.save(content, file)
    return refuse_file(file, folder, source)


def refuse_file(file: Path, folder: Path, source: str = "llamagen-tokenizer") -> str:
    before = sorted(folder.iterdir())
    with pytest.raises(SmaltiError) as error:
        convert(source, file, folder / "out")
    assert "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before
    return str(error.value)


# -- tensors --------------------------------------------------------------------------------------


def test_every_tensor_that_is_missing_is_named(state, tmp_path: Path) -> None:
    for name in list(state)[::5]:
        if name != "quantize.codebook_used":
            rest = {other: tensor for other, tensor in state.items() if other != name}
            said = refuse(rest, tmp_path)
            assert "lacks the tensor" in said or "is a tensor missing?" in said
            assert name in said or "blocks" in said


def test_a_surplus_tensor_is_named(state, tmp_path: Path) -> None:
    assert "encoder.extra that no" in refuse(state | {"encoder.extra": torch.ones(2)}, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder.conv_out.weight", torch.ones(3, 16, 3, 3)),
        ("decoder.conv_in.bias", torch.ones(())),
        ("encoder.conv_blocks.1.attn.0.q.weight", torch.ones(64, 64)),
        ("quant_conv.weight", torch.ones(4)),
        ("quantize.embedding.weight", torch.ones(8)),
        ("encoder.conv_in.weight", torch.ones(32)),
        ("encoder.conv_in.weight", torch.ones(32, 1, 3, 3)),
        ("encoder.conv_in.weight", torch.ones(33, 3, 3, 3)),
        ("encoder.conv_in.weight", torch.ones(0, 3, 3, 3)),
        ("decoder.norm_out.weight", torch.ones(32, dtype=torch.int64)),
    ],
)
def test_a_tensor_of_another_shape_or_kind_is_named(name, value, state, tmp_path: Path) -> None:
    said = refuse(state | {name: value}, tmp_path)
    assert name in said or "channels" in said


def test_impossible_part_numbers_are_refused(state, tmp_path: Path) -> None:
    for number in ("99999999", "9" * 5000, "4000"):
        name = f"encoder.conv_blocks.{number}.res.0.conv1.weight"
        assert "no part before it" in refuse(state | {name: torch.ones(1)}, tmp_path)


@pytest.mark.parametrize("source", MODELS)
def test_a_file_of_another_source_is_recognised(source: str, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    state = state_of(source, tmp_path / "theirs")
    for other in MODELS:
        if other != source:
            said = refuse(state, tmp_path, other)
            assert "it looks like" in said and source in said.partition("it looks like")[2]


def test_a_file_of_no_known_source_is_refused(tmp_path: Path) -> None:
    said = refuse({"layer.weight": torch.ones(2)}, tmp_path)
    assert "it looks like no known source (it holds layer.weight" in said


@pytest.mark.parametrize("source", MODELS)
def test_exported_models_are_imported_unchanged(source: str, tmp_path: Path) -> None:
    model = model_of(source)
    export(model, tmp_path / "there", source)
    back, _ = read_published(source, tmp_path / "there", FLAGS.get(source))
    ours, theirs = model.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    same = [torch.equal(ours[n], theirs[n]) for n in ours if not n.endswith("idle_steps")]
    assert all(same)


def test_links_join_and_split_and_buffers_are_checked(tmp_path: Path) -> None:
    save_file({"qkv": torch.arange(6.0), "b": torch.ones(1)}, tmp_path / "a.safetensors")
    file = read_checkpoint(tmp_path / "a.safetensors")
    blank = {name: torch.empty(2) for name in "qkv"}
    links = [joined(["q", "k", "v"], "qkv")]
    found = import_tensors(Layout(links, {"b": Buffer(torch.ones(1))}), file, blank, "thing")
    assert found.tensors["k"].tolist() == [2.0, 3.0] and found.checked == ["b"]
    for value, message in ((torch.zeros(1), "1 of 1 values"), (torch.ones(2), "shape")):
        with pytest.raises(SmaltiError, match=message):
            import_tensors(Layout(links, {"b": Buffer(value)}), file, blank, "thing")
    with pytest.raises(SmaltiError, match="qkv has shape"):
        layout = Layout([same("q", "qkv")], surplus=["b"])
        import_tensors(layout, file, {"q": torch.empty(2)}, "thing")


def test_integer_tensors_among_floats_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1).long()}, tmp_path / "a.safetensors")
    file = read_checkpoint(tmp_path / "a.safetensors")
    link = Link(("x",), ("a", "b"), to_ours=lambda parts: [torch.cat(list(parts))])
    with pytest.raises(SmaltiError, match=r"a, b holds torch.float32, torch.int64 values"):
        import_tensors(Layout([link]), file, {"x": torch.empty(2)}, "thing")


def test_tensors_that_are_not_plain_are_named(state, tmp_path: Path) -> None:
    bias = state["encoder.conv_in.bias"]
    for other in (bias.to_sparse(), bias.to("meta")):
        said = refuse(state | {"encoder.conv_in.bias": other}, tmp_path)
        assert "encoder.conv_in.bias is sparse, quantized or on the meta device" in said


def test_a_name_that_wrappers_give_twice_is_refused(state, tmp_path: Path) -> None:
    said = refuse(state | {"module.encoder.conv_in.bias": torch.ones(8)}, tmp_path)
    assert "has encoder.conv_in.bias twice, once as module.encoder.conv_in.bias" in said


def test_values_that_a_file_only_repeats_are_not_allocated(state, tmp_path: Path) -> None:
    """A tensor of 400 GB whose strides are 0 takes four bytes of its file."""
    huge = torch.zeros(1).expand(10**5, 10**6)
    said = refuse(state | {"encoder.conv_in.bias": huge}, tmp_path)
    assert "its tensors would take 400,0" in said and "encoder.conv_in.bias has shape" in said


def test_a_compressed_file_is_not_unpacked(tmp_path: Path) -> None:
    file = tmp_path / "published.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(8):
            archive.writestr(f"archive/data/{number}", bytes(10**7))
    assert "its parts would take 80.0 MB" in refuse_file(file, tmp_path)


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(suffix: str, share: float, state, tmp_path: Path) -> None:
    file = tmp_path / f"published.{suffix}"
    torch.save(state, file) if suffix == "pt" else save_file(state, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    assert "damaged" in refuse_file(file, tmp_path)


def test_the_old_checkpoint_format_is_read_and_its_truncation_refused(
    state, tmp_path: Path
) -> None:
    file = tmp_path / "published.pth"
    torch.save({"model": state}, file, _use_new_zipfile_serialization=False)
    convert("llamagen-tokenizer", file, tmp_path / "out", Options(image_size=16))
    file.write_bytes(file.read_bytes()[:-5000])
    (tmp_path / "other").mkdir()
    assert "damaged" in refuse_file(file, tmp_path / "other")


OTHER_FILES = [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(50), pickle.dumps({"a": 1})]


@pytest.mark.parametrize("content", OTHER_FILES)
def test_files_that_are_no_checkpoints_are_refused(content: bytes, tmp_path: Path, recwarn) -> None:
    file = tmp_path / "published.pt"
    file.write_bytes(content)
    said = refuse_file(file, tmp_path)
    assert "no checkpoint of PyTorch" in said and "weights_only" not in said
    assert not recwarn.list  # it would be a second line


def test_of_weights_in_two_precisions_the_full_one_is_read(state, tmp_path: Path) -> None:
    save_file(state, tmp_path / "model.safetensors")
    save_file({n: t.half() for n, t in state.items()}, tmp_path / "model.fp16.safetensors")
    assert read_checkpoint(tmp_path).path.name == "model.safetensors"


def test_sharded_weights_are_refused(state, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    for i, name in enumerate(list(state)[:2], start=1):
        save_file({name: state[name]}, folder / f"model-0000{i}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    for place in (folder, folder / "model.safetensors.index.json"):
        assert "is split into shards: join them" in refuse_file(place, tmp_path)


def test_files_and_folders_without_weights_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refuse_file(tmp_path / "none.pt", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no weights file" in refuse_file(tmp_path / "empty", tmp_path)
    for name in ("a.pt", "b.ckpt"):
        (tmp_path / "empty" / name).touch()
    assert "holds 2 weights files (a.pt, b.ckpt)" in refuse_file(tmp_path / "empty", tmp_path)
    assert "holds no tensors" in refuse({"model": {"epoch": 3}}, tmp_path)
    assert "holds no tensors" in refuse([1, 2], tmp_path)


class Attack:
    """A pickle of it writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch {self.path}",)


class NamespaceAttack(argparse.Namespace):
    """Hides among the arguments of a run."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return eval, ("__import__('pathlib').Path(self).touch()",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["alone", "beside", "inside"])
def test_code_in_a_pickle_is_refused_and_never_runs(where, legacy, state, tmp_path: Path) -> None:
    attack = Attack(tmp_path / "ran")
    content = {
        "alone": attack,
        "beside": {"model": state, "args": attack},
        "inside": {"model": state, "args": argparse.Namespace(steps=attack)},
    }[where]
    file = tmp_path / "published.pt"
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    said = refuse_file(file, tmp_path)
    assert "never run" in said or "damaged" in said
    assert not (tmp_path / "ran").exists()
    torch.save({"model": state, "args": NamespaceAttack()}, file)
    assert "calls builtins.eval" in refuse_file(file, tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_arguments_of_a_run_beside_the_weights_stay_inert(legacy, state, tmp_path: Path) -> None:
    file = tmp_path / "published.pt"
    args = argparse.Namespace(lr=1e-4, sizes=[1, 2], nested=argparse.Namespace(a=1))
    if not legacy:
        args.notes = defaultdict(dict), datetime.date(2024, 1, 1), int
    content = {"model": state, "args": args, "steps": 5, "optimizer": {"state": {}}}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    model, lines = read_published("llamagen-tokenizer", file, Options(image_size=16))
    assert model.image_size == 16 and '(its "model")' in lines[0]
    with pytest.raises(Exception, match="argparse"):  # torch itself refuses still
        torch.load(file, weights_only=True)


def test_classes_of_trainers_beside_the_weights_are_never_imported(state, tmp_path) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    parts = ["pytorch_lightning", "pytorch_lightning.callbacks", name]
    modules = {part: types.ModuleType(part) for part in parts}
    callback = type("ModelCheckpoint", (), {"__module__": name})
    modules[name].ModelCheckpoint = callback  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        content = {"state_dict": state, "callbacks": {callback: {"best": callback()}}}
        torch.save(content, tmp_path / "last.ckpt")
    finally:
        for part in parts:
            del sys.modules[part]
    model, _ = read_published("llamagen-tokenizer", tmp_path / "last.ckpt")
    assert model.image_size == 256 and name not in sys.modules


COUNT = torch.tensor(3)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s, o: s,
        lambda s, o: {"module": s},
        lambda s, o: {"model": o, "ema": s, "steps": torch.tensor(3)},
        lambda s, o: {"model": s, "ema": {}, "a": torch.ones(1), "b": torch.ones(1)},
        lambda s, o: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s, o: {f"module._orig_mod.{k}": v for k, v in s.items()},
        lambda s, o: {"model": {"state_dict": s}},
        lambda s, o: {"ema": {f"module.{k}": v for k, v in s.items()} | {"n_averaged": COUNT}},
        lambda s, o: {f"net.{k}": v for k, v in s.items()} | {"n_averaged": COUNT},
        lambda s, o: {f"module.net._orig_mod.{k}": v for k, v in s.items()},
        lambda s, o: {k.replace(".conv_in.", "._orig_mod.conv_in.module."): s[k] for k in s},
    ],
)
def test_state_dicts_are_found_inside_wrappers(wrap, state, tmp_path: Path) -> None:
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save(wrap(state, other), tmp_path / "file.pt")
    found = read_checkpoint(tmp_path / "file.pt").tensors
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_wrapped_model_is_exported_as_it_is_inside(tmp_path: Path) -> None:
    model = model_of("llamagen-tokenizer")
    export(model, tmp_path / "plain.pt")
    model.decoder = torch.nn.DataParallel(model.decoder)
    export(model, tmp_path / "wrapped.pt")
    plain, wrapped = (read_checkpoint(tmp_path / f"{n}.pt").tensors for n in ("plain", "wrapped"))
    assert plain.keys() == wrapped.keys()
    assert all(torch.equal(wrapped[name], tensor) for name, tensor in plain.items())
    model.quant_conv.bias.data[0] = torch.nan
    with pytest.raises(SmaltiError, match="has 1 values that are infinite or NaN"):
        export(model, tmp_path / "other.pt")
    assert not (tmp_path / "other.pt").exists()


def test_half_precision_weights_are_widened(state, tmp_path: Path) -> None:
    half = {n: t.half() if n.startswith(("enc", "dec", "quant_")) else t for n, t in state.items()}
    torch.save(half, tmp_path / "half.pt")
    model, _ = read_published("llamagen-tokenizer", tmp_path / "half.pt")
    weight = model.encoder.conv_in.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, half["encoder.conv_in.weight"].float())


# -- places and options ---------------------------------------------------------------------------


def test_nothing_is_overwritten(state, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "file.pt")
    out = tmp_path / "out"
    out.mkdir()
    convert("llamagen-tokenizer", tmp_path / "file.pt", out)  # an empty folder will do
    before = {path: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in (out, tmp_path / "file.pt", tmp_path / "link"):
        with pytest.raises(SmaltiError, match="nothing is overwritten"):
            convert("llamagen-tokenizer", tmp_path / "file.pt", place)
    with pytest.raises(SmaltiError, match="nothing is overwritten"):
        export(model_of("llamagen-tokenizer"), tmp_path / "file.pt")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["file.pt", "link", "llamagen-tokenizer", "out"]


def test_a_write_that_fails_leaves_nothing(state, tmp_path: Path, monkeypatch) -> None:
    torch.save(state, tmp_path / "file.pt")

    def fail(self, folder: Path) -> None:
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        convert("llamagen-tokenizer", tmp_path / "file.pt", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.pt", "llamagen-tokenizer"]


def test_options_that_do_not_apply_are_refused(state, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "file.pt")
    for options in (Options(heads=2), Options(scales=(4,)), Options(scaling_factor=1.0)):
        with pytest.raises(SmaltiError, match="leave it out"):
            convert("llamagen-tokenizer", tmp_path / "file.pt", tmp_path / "out", options)
    for wrong in ({"heads": 0}, {"image_size": -1}, {"scales": ()}, {"scaling_factor": 0.0}):
        with pytest.raises(SmaltiError):
            Options(**wrong)
    with pytest.raises(SmaltiError, match="not a multiple"):
        convert("llamagen-tokenizer", tmp_path / "file.pt", tmp_path / "o", Options(image_size=15))


def test_smalti_models_are_refused(tmp_path: Path) -> None:
    tokenizer = model_of("diffusers-kl")
    tokenizer.save_pretrained(tmp_path / "kl")
    prior = FlowPrior(FlowConfig(network=DiTConfig(4, 4, (8, 8), 2, 32, 1, 2, num_classes=2)))
    prior.save_pretrained(tmp_path / "prior")
    Pipeline(tokenizer, prior, ("a", "b")).save_pretrained(tmp_path / "pipe")
    for place in ("kl", "kl/model.safetensors", "prior", "pipe", "pipe/tokenizer"):
        for source in ("diffusers-kl", "sit"):
            said = refuse_file(tmp_path / place, tmp_path, source)
            assert f"{tmp_path / place} is a smalti model already" in said
    export(tokenizer, tmp_path / "kl" / "theirs.ckpt", "ldm-kl")  # which stands beside it
    read_published("ldm-kl", tmp_path / "kl" / "theirs.ckpt")


def test_a_misspelt_source_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(SmaltiError, match='did you mean "taming-vqgan"'):
        convert("taming-vgan", tmp_path, tmp_path / "out")


def test_every_source_resolves_and_has_a_title() -> None:
    for name in PUBLISHED_SOURCES:
        assert PUBLISHED_SOURCES.resolve(name).title


def test_imagenet_names_are_1000_different_ones() -> None:
    names = class_names(1000)
    assert len(set(names)) == len(names) == 1000
    assert (
        names[0] == "tench" and names[207] == "golden retriever" and names[999] == "toilet tissue"
    )
    assert class_names(3) == ("0", "1", "2")


@pytest.mark.parametrize("condition", ["text", "class+text", "image"])
@pytest.mark.parametrize("name", ["sit", "var-prior", "llamagen-prior"])
def test_conditions_that_a_layout_lacks_are_not_exported(name: str, condition: str) -> None:
    """The file would have tensors that the original code does not know."""
    kinds = {"var-prior": NextScaleConfig, "llamagen-prior": NextTokenConfig}
    source = PUBLISHED_SOURCES.resolve(name)()
    config = source.example(kinds.get(name, FlowConfig))
    assert source.fits(config)
    if condition in config.CONDITIONS or condition == "class+text":
        text = TextConfig(8, 16, "bytes", "")
        assert not source.fits(config.conditioned(condition, text, ImageConfig(4, "inpainting")))
