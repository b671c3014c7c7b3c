"""Saving and loading models: exact, strict, and deaf to code."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

from smalti import Pipeline, Prior, Tokenizer
from smalti.errors import SmaltiError
from smalti.hub import Registry
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowPrior
from smalti.repository import resolve_folder


@pytest.fixture
def saved(tokenizer, tmp_path: Path) -> Path:
    return tokenizer.save_pretrained(tmp_path / "model")


def edit_config(folder: Path, **changes) -> None:
    """Set keys of config.json; "a__b" is the key b inside a."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *above, last = key.split("__")
        inner = content
        for name in above:
            inner = inner[name]
        inner[last] = value
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_round_trip_is_exact(tokenizer, saved: Path) -> None:
    loaded = Tokenizer.from_pretrained(saved)
    assert type(loaded) is type(tokenizer) and loaded.config == tokenizer.config
    assert not loaded.training
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert loaded.fingerprint == tokenizer.fingerprint


def test_fingerprint_follows_weights_and_config(tokenizer) -> None:
    before = tokenizer.fingerprint
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias[0] += 1e-3
    changed = tokenizer.fingerprint
    assert changed != before
    tokenizer.config = replace(tokenizer.config, quant_kernel=3)
    assert tokenizer.fingerprint not in (before, changed)


def test_config_json_names_a_registered_type_and_no_module(saved: Path) -> None:
    content = json.loads((saved / "config.json").read_text())
    assert content["type"] == "vq"
    assert "smalti." not in json.dumps(content)


def test_dtype_and_subfolder(tokenizer, saved: Path) -> None:
    loaded = Tokenizer.from_pretrained(saved.parent, subfolder="model", dtype=torch.bfloat16)
    assert loaded.last_layer.dtype == torch.bfloat16


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_copy_in_half_precision_keeps_the_fingerprint(tokenizer, saved: Path, dtype) -> None:
    original = tokenizer.fingerprint
    loaded = Tokenizer.from_pretrained(saved, dtype=dtype)
    assert loaded.fingerprint == original and loaded.checksum != original
    half = loaded.save_pretrained(saved.parent / "half")
    assert load_file(half / "model.safetensors")["quant_conv.bias"].dtype == dtype
    for again in (None, dtype, torch.bfloat16):  # in fp32, as saved, and rounded once more
        copy = Tokenizer.from_pretrained(half, dtype=again)
        assert copy.fingerprint == original
        assert copy.last_layer.dtype == (again or torch.float32)
    plain = Tokenizer.from_pretrained(half)
    assert plain.checksum == loaded.checksum
    assert Tokenizer.from_pretrained(plain.save_pretrained(half)).fingerprint == original


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_precisions_may_be_named(saved: Path, argument: str) -> None:
    for value, expected in (
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float32", torch.float32),
        (torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32),
        (None, torch.float32),
    ):
        loaded = Tokenizer.from_pretrained(saved, **{argument: value})
        assert {p.dtype for p in loaded.parameters()} == {expected}, value


def test_both_names_of_the_precision_must_agree(saved: Path) -> None:
    agreed = Tokenizer.from_pretrained(saved, dtype="bfloat16", torch_dtype=torch.bfloat16)
    assert agreed.last_layer.dtype == torch.bfloat16
    for other in (torch.float16, "float16", "auto"):
        with pytest.raises(SmaltiError, match=r"dtype is bfloat16, torch_dtype is .*give one of"):
            Tokenizer.from_pretrained(saved, dtype="bfloat16", torch_dtype=other)


def test_auto_is_the_precision_of_the_file(tokenizer, prior, tmp_path: Path) -> None:
    for model, base in ((tokenizer, Tokenizer), (prior, Prior)):
        folder = model.cast(torch.float16).save_pretrained(tmp_path / base.__name__)
        loaded = base.from_pretrained(folder, torch_dtype="auto")
        assert {p.dtype for p in loaded.parameters()} == {torch.float16}
        assert loaded.fingerprint == model.fingerprint
        assert {p.dtype for p in base.from_pretrained(folder).parameters()} == {torch.float32}


def test_auto_is_the_precision_of_a_prior_that_keeps_a_part_in_fp32(
    scale_pipe, tmp_path: Path
) -> None:
    """Its copy of the quantizer; before, all of such a prior was loaded in fp32."""
    prior = scale_pipe.prior
    folder = prior.cast(torch.float16).save_pretrained(tmp_path / "prior")
    loaded = Prior.from_pretrained(folder, dtype="auto")
    types = {name: value.dtype for name, value in prior.state_dict().items()}
    assert {torch.float16, torch.float32} <= set(types.values())
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == types


def test_weights_of_several_precisions_are_loaded_in_the_fullest(saved: Path) -> None:
    edit_weights(saved, lambda w: w.update({"quant_conv.bias": w["quant_conv.bias"].half()}))
    loaded = Tokenizer.from_pretrained(saved, dtype="auto", verify=False)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "float15"},
            "dtype is 'float15', not a precision of a model; did you mean \"float16\"",
        ),
        ({"torch_dtype": "torch.float23"}, 'did you mean "float32"'),
        ({"torch_dtype": "int4"}, "torch_dtype is 'int4', not a precision of a model; "),
        ({"dtype": torch.int64}, "dtype is torch.int64, not a precision of a model; "),
        ({"dtype": 16}, "dtype is 16, not a precision of a model; "),
    ],
)
def test_what_is_no_precision_is_refused(saved: Path, options, message: str) -> None:
    with pytest.raises(SmaltiError) as error:
        Tokenizer.from_pretrained(saved, **options)
    assert message in str(error.value)


def test_a_copy_that_is_trained_is_another_model(tokenizer, saved: Path) -> None:
    copy = Tokenizer.from_pretrained(saved, dtype=torch.bfloat16)
    with torch.no_grad():
        copy.last_layer.add_(1)
    assert copy.fingerprint == copy.checksum != tokenizer.fingerprint
    copy.save_pretrained(saved)
    assert "copy_of" not in json.loads((saved / "config.json").read_text())
    assert Tokenizer.from_pretrained(saved).fingerprint == copy.fingerprint


def test_a_cast_that_changes_nothing_makes_no_copy(tokenizer) -> None:
    before = tokenizer.fingerprint
    assert tokenizer.cast(torch.float32).fingerprint == tokenizer.checksum == before


def test_a_copy_whose_weights_were_exchanged_is_refused(tokenizer, saved: Path) -> None:
    tokenizer.cast(torch.bfloat16).save_pretrained(saved)
    edit_weights(saved, lambda weights: weights["quant_conv.bias"].add_(1))
    with pytest.raises(SmaltiError, match=r'not the copy of .*"copy_of"'):
        Tokenizer.from_pretrained(saved, verify=False)
    edit_config(saved, copy_of={"fingerprint": 3})
    with pytest.raises(SmaltiError, match="fingerprint is 3; expected str"):
        Tokenizer.from_pretrained(saved, verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("encoder.conv_in.bias"), "lacks the tensor encoder.conv_in.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "has a tensor extra that the model"),
        (
            lambda w: w.update({"quant_conv.bias": torch.zeros(5)}),
            "quant_conv.bias has shape (5,); the config requires (4,)",
        ),
        (
            lambda w: w.update({"quant_conv.bias": torch.zeros(4, dtype=torch.int64)}),
            "quant_conv.bias has integer values; the model takes float",
        ),
    ],
)
def test_a_wrong_tensor_is_an_error(saved: Path, change, message: str) -> None:
    edit_weights(saved, change)
    with pytest.raises(SmaltiError) as error:
        Tokenizer.from_pretrained(saved)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantizer__codebook__vocab_sise": 3},
            'unknown key "vocab_sise"; did you mean "vocab_size"',
        ),
        ({"type": "vqq"}, 'no tokenizer is called "vqq"; did you mean "vq"'),
        ({"type": "os.system"}, "no tokenizer is called"),
        ({"type": "next-token"}, '"next-token" is a prior, not a tokenizer'),
        ({"format_version": 99}, "has format 99"),
        ({"quantizer__codebook__vocab_size": "many"}, "expected int"),
        ({"quantizer__codebook__vocab_size": 10**12}, "the config requires"),
        ({"quantizer__codebook__vocab_size": 10**30}, "describes an impossible model"),
        ({"quantizer__codebook__code_dim": [4]}, "code_dim is [4]; expected int"),
    ],
)
def test_a_wrong_config_is_an_error(saved: Path, changes, message: str) -> None:
    edit_config(saved, **changes)
    with pytest.raises(SmaltiError) as error:
        Tokenizer.from_pretrained(saved)
    assert message in str(error.value)


def test_a_prior_is_not_loaded_as_a_tokenizer(prior, tmp_path: Path) -> None:
    prior.save_pretrained(tmp_path / "p")
    with pytest.raises(SmaltiError, match='"next-token" is a prior, not a tokenizer'):
        Tokenizer.from_pretrained(tmp_path / "p")


def test_truncated_weights_are_an_error(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SmaltiError, match="is damaged"):
        Tokenizer.from_pretrained(saved)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_is_never_opened(saved: Path, tmp_path: Path) -> None:
    fuse = tmp_path / "exploded"
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(fuse)))
    with pytest.raises(SmaltiError, match="is a pickle"):
        Tokenizer.from_pretrained(saved)
    (saved / "model.safetensors").write_bytes(pickle.dumps(Bomb(fuse)))
    with pytest.raises(SmaltiError, match="is damaged"):
        Tokenizer.from_pretrained(saved)
    assert not fuse.exists()


@pytest.mark.parametrize("missing", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_missing_folder_is_not_looked_up_on_the_hub(missing: str, monkeypatch) -> None:
    import huggingface_hub

    def fail(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SmaltiError, match="folder not found"):
        Prior.from_pretrained(missing)


def test_a_hub_id_is_downloaded_without_pickles(saved: Path, monkeypatch) -> None:
    import huggingface_hub

    asked = {}

    def download(repo_id: str, **kwargs) -> str:
        asked.update(kwargs, repo_id=repo_id)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = Tokenizer.from_pretrained("someone/model", revision="main")
    assert loaded.spec.vocab_size == 16
    assert asked["repo_id"] == "someone/model" and asked["revision"] == "main"
    assert not any(name.endswith((".bin", ".pt", "*")) for name in asked["allow_patterns"])


def test_an_unreachable_hub_is_one_clear_line(monkeypatch) -> None:
    with pytest.raises(SmaltiError, match="cannot be downloaded from the Hub"):
        resolve_folder("someone/model", local_files_only=True)


def test_push_to_hub_uploads_one_folder(tokenizer, monkeypatch) -> None:
    import huggingface_hub

    uploaded = {}

    class Api:
        def __init__(self, token=None) -> None:
            self.token = token

        def create_repo(self, repo_id, private, exist_ok):
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def create_branch(self, repo_id, branch, exist_ok):
            uploaded.update(branch=f"{repo_id}@{branch}")

        def upload_folder(self, *, folder_path, **kwargs):
            uploaded.update(kwargs, files=sorted(p.name for p in Path(folder_path).iterdir()))
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert tokenizer.push_to_hub("tok", private=True) == "address"
    assert uploaded["files"] == ["config.json", "model.safetensors"]
    assert uploaded["repo_id"] == "me/tok"
    assert uploaded["revision"] is None and "branch" not in uploaded
    tokenizer.push_to_hub("tok", revision="half")
    assert uploaded["revision"] == "half" and uploaded["branch"] == "me/tok@half"


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_a_push_without_network_is_one_line(tokenizer, monkeypatch, step: str) -> None:
    """huggingface_hub is set to offline, or the Hub cannot be reached."""
    import huggingface_hub

    if step == "upload_folder":
        url = type("Url", (), {"repo_id": "me/tok"})
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: url)

        def fail(*_, **__):
            raise ConnectionError("[Errno -3] Temporary failure in name resolution")

        monkeypatch.setattr(huggingface_hub.HfApi, step, fail)
    with pytest.raises(SmaltiError, match=r'"me/tok" cannot be uploaded.*save_pretrained') as error:
        tokenizer.push_to_hub("me/tok")
    assert "\n" not in str(error.value)


def test_a_subfolder_of_the_hub_is_all_that_is_downloaded(
    tokenizer, tmp_path: Path, monkeypatch
) -> None:
    import huggingface_hub

    asked = {}

    def download(repo_id: str, **kwargs) -> str:
        asked.update(kwargs)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    tokenizer.save_pretrained(tmp_path / "deep" / "tokenizer")
    loaded = Tokenizer.from_pretrained(
        "someone/model", subfolder="deep/tokenizer", cache_dir=tmp_path / "cache"
    )
    assert loaded.fingerprint == tokenizer.fingerprint
    assert all(pattern.startswith("deep/tokenizer/") for pattern in asked["allow_patterns"])
    assert asked["cache_dir"] == tmp_path / "cache"


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json"])
def test_a_half_downloaded_copy_is_named(saved: Path, monkeypatch, lost: str) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(saved))
    (saved / lost).unlink()
    message = f'the copy of "someone/model" .* has no {lost}: its download was not finished'
    with pytest.raises(SmaltiError, match=message):
        Tokenizer.from_pretrained("someone/model", local_files_only=True)


def test_an_option_does_something_or_is_refused(saved: Path) -> None:
    assert Tokenizer.from_pretrained(saved, variant=None, low_cpu_mem_usage=True)
    with pytest.raises(SmaltiError, match=r"has no model\.fp16\.safetensors.*leave variant out"):
        Tokenizer.from_pretrained(saved, variant="fp16")
    with pytest.raises(SmaltiError, match=r"low_cpu_mem_usage is False.*leave it out"):
        Tokenizer.from_pretrained(saved, low_cpu_mem_usage=False)
    with pytest.raises(SmaltiError, match=r'weights is "raw", but .* is no checkpoint'):
        Tokenizer.from_pretrained(saved, weights="raw")
    with pytest.raises(SmaltiError, match="weights is 'mean'; choose one of ema, raw"):
        Tokenizer.from_pretrained(saved, weights="mean")


def test_saving_refuses_a_folder_of_something_else(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SmaltiError, match="not a saved tokenizer"):
        tokenizer.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_saving_refuses_a_folder_of_another_kind_of_model(tokenizer, prior, tmp_path: Path) -> None:
    folder = prior.save_pretrained(tmp_path / "p")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(SmaltiError, match="not a saved tokenizer"):
        tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_saving_again_replaces_the_model(tokenizer, saved: Path) -> None:
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias += 1
    tokenizer.save_pretrained(saved)
    assert Tokenizer.from_pretrained(saved).fingerprint == tokenizer.fingerprint
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_write_leaves_the_old_model(tokenizer, saved: Path, monkeypatch) -> None:
    before = tokenizer.fingerprint

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        tokenizer.decoder.conv_out.bias += 1
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save_pretrained(saved)
    assert Tokenizer.from_pretrained(saved).fingerprint == before
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_saved_files_can_be_read_by_whoever_may_read_the_folder(saved: Path) -> None:
    plain = saved / "plain"
    plain.touch()
    assert (saved / "model.safetensors").stat().st_mode == plain.stat().st_mode


def test_a_billion_layers_are_refused_before_they_are_built(prior, tmp_path: Path) -> None:
    folder = prior.save_pretrained(tmp_path / "p")
    edit_config(folder, depth=10**9)
    with pytest.raises(SmaltiError, match="far fewer tensors"):
        Prior.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv__num_res_blocks": 10**9}, "num_res_blocks is 1000000000; it must be at most 64"),
        ({"conv__channel_mult": [1] * 10_000}, "number of levels is 10000; it must be at most 12"),
        ({"conv__channels": 2**40}, "width of a level is 2199023255552; it must be at most"),
        ({"conv__channels": -32}, "channels is -32"),
        ({"conv__z_channels": 10**9}, "z_channels is 1000000000"),
        ({"conv__patch_size": 10**6}, "patch_size is 1000000"),
        ({"image_size": 2**33}, "image_size is 8589934592; it must be at most 16384"),
    ],
)
def test_a_tokenizer_of_any_size_is_not_built(saved: Path, changes, message: str) -> None:
    edit_config(saved, **changes)
    with pytest.raises(SmaltiError) as error:
        Tokenizer.from_pretrained(saved)
    assert message in str(error.value)


def test_a_config_that_is_no_json_is_damaged(saved: Path) -> None:
    for content in (b"[" * 100_000, b'{"type": "\xff"}'):  # the second is no UTF-8
        (saved / "config.json").write_bytes(content)
        with pytest.raises(SmaltiError, match="is damaged"):
            Tokenizer.from_pretrained(saved)


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    before = torch.get_rng_state()
    Tokenizer.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_registry_names_and_resolves() -> None:
    registry = Registry("thing", {"path": "pathlib:Path", "part": "fractions:Fraction"})
    assert registry.names() == list(registry) == ["path", "part"] and len(registry) == 2
    assert registry.resolve("path") is Path
    with pytest.raises(SmaltiError, match='no thing is called "pth"; did you mean "path"'):
        registry.resolve("pth")
    with pytest.raises(SmaltiError, match="dict is not registered as a thing"):
        registry.name_of(dict)


# -- hashes ---------------------------------------------------------------------------------------


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_every_flipped_bit_is_found(saved: Path, name: str) -> None:
    path = saved / name
    whole = path.read_bytes()
    bits = torch.randint(8 * len(whole), (60,)).tolist()
    header = [8 * position + 2 for position in range(0, 200, 20)]  # of model.safetensors
    for bit in [*bits, *header, 8 * len(whole) - 1]:
        flip(path, bit)
        with pytest.raises(SmaltiError):
            Tokenizer.from_pretrained(saved)
        path.write_bytes(whole)
    assert Tokenizer.from_pretrained(saved)


def test_an_edited_config_is_found_and_may_be_meant(prior, tmp_path: Path) -> None:
    folder = prior.save_pretrained(tmp_path / "p")
    edit_config(folder, num_heads=1)  # no shape depends on it
    with pytest.raises(SmaltiError, match=r"config\.json is damaged, or was changed.*verify=False"):
        Prior.from_pretrained(folder)
    meant = Prior.from_pretrained(folder, verify=False)
    assert meant.config.num_heads == 1
    meant.save_pretrained(folder)
    assert Prior.from_pretrained(folder).config.num_heads == 1


def test_hashes_do_not_depend_on_the_layout_of_the_json(saved: Path) -> None:
    content = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(dict(reversed(content.items()))))
    assert Tokenizer.from_pretrained(saved)


def test_a_model_without_hashes_is_loaded(saved: Path) -> None:
    content = json.loads((saved / "config.json").read_text())
    assert content.pop("sha256").keys() == {"config.json", "model.safetensors"}
    (saved / "config.json").write_text(json.dumps(content))
    assert Tokenizer.from_pretrained(saved)


def test_hashes_that_are_incomplete_are_damage(saved: Path) -> None:
    good = json.loads((saved / "config.json").read_text())["sha256"]
    for broken in ({"config.json": good["config.json"]}, {"model.safetensors": "x"}, []):
        edit_config(saved, sha256=broken)
        with pytest.raises(SmaltiError, match="is damaged"):
            Tokenizer.from_pretrained(saved)


# -- models that were wrapped or changed before they are saved ------------------------------------


def compiled(model: Prior) -> None:
    model.layers[0] = torch.compile(model.layers[0])
    model.layers[1].attention = torch.compile(model.layers[1].attention)


def parallel(model: Prior) -> None:
    model.layers[1] = torch.nn.DataParallel(torch.compile(model.layers[1]))


WRAPPED = {"torch.compile": compiled, "DataParallel": parallel}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_layers_are_saved_as_they_are_inside(prior, tmp_path: Path, how: str) -> None:
    before, fingerprint = {k: v.clone() for k, v in prior.state_dict().items()}, prior.fingerprint
    WRAPPED[how](prior)
    assert prior.state_dict().keys() != before.keys()
    assert prior.fingerprint == fingerprint
    loaded = Prior.from_pretrained(prior.save_pretrained(tmp_path / "p"))
    assert loaded.state_dict().keys() == before.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_pruned_weights_are_saved_as_they_act(prior, tmp_path: Path) -> None:
    prune.random_unstructured(prior.output, "weight", amount=0.5)
    loaded = Prior.from_pretrained(prior.save_pretrained(tmp_path / "p"))
    assert torch.equal(loaded.output.weight, prior.output.weight)
    assert (loaded.output.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)


def reparametrised(model: Prior) -> None:
    torch.nn.utils.parametrizations.spectral_norm(model.output)


def with_a_new_layer(model: Prior) -> None:
    model.extra = torch.nn.Linear(2, 2)


def of_another_size(model: Prior) -> None:
    model.output = torch.nn.Linear(16, 5, bias=False)


def diverged(model: Prior) -> None:
    model.output.weight.data[3, 4] = torch.nan


def out_of_range(model: Prior) -> None:
    model.output.weight.data[3, 4] = 1e6
    model.to(torch.float16)


UNFIT = {
    "parametrisation": (reparametrised, r"lacks the tensor output.weight; it has output.param"),
    "new layer": (with_a_new_layer, "has a tensor extra.bias that the model does not have"),
    "other size": (of_another_size, r"output.weight has shape \(5, 16\); the config requires"),
    "NaN": (diverged, "output.weight has 1 values that are infinite or NaN.*earlier checkpoint"),
    "range of fp16": (out_of_range, "infinite or NaN.*bfloat16"),
}


@pytest.mark.parametrize("how", UNFIT)
def test_what_could_not_be_loaded_is_not_saved(prior, tmp_path: Path, how: str) -> None:
    folder, fingerprint = prior.save_pretrained(tmp_path / "p"), prior.fingerprint
    change, message = UNFIT[how]
    change(prior)
    with pytest.raises(SmaltiError, match=message):
        prior.save_pretrained(folder)
    assert Prior.from_pretrained(folder).fingerprint == fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "net.", "module._orig_mod.", "_orig_mod.net.module."]
)
def test_prefixes_of_wrappers_are_understood(prior, tmp_path: Path, prefix: str) -> None:
    folder = prior.save_pretrained(tmp_path / "p")
    weights = {f"{prefix}{name}": value for name, value in prior.state_dict().items()}
    save_file(weights | {"n_averaged": torch.tensor(7)}, folder / "model.safetensors")
    loaded = Prior.from_pretrained(folder, verify=False)
    assert loaded.fingerprint == prior.fingerprint


def test_wrappers_are_understood_inside_names(prior, tmp_path: Path) -> None:
    folder = prior.save_pretrained(tmp_path / "p")
    compiled(prior)
    save_file(dict(prior.state_dict()), folder / "model.safetensors")
    assert Prior.from_pretrained(folder, verify=False).fingerprint == prior.fingerprint
    twice = dict(prior.state_dict()) | {"module.output.weight": torch.zeros(16, 16)}
    save_file(twice | {"output.weight": torch.ones(16, 16)}, folder / "model.safetensors")
    with pytest.raises(SmaltiError, match=r"has a tensor module\.output\.weight"):
        Prior.from_pretrained(folder, verify=False)


# -- memory ---------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
import smalti

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])

small, large = sys.argv[1:]
for dtype in ("float32", "bfloat16"):
    smalti.Pipeline.from_pretrained(small, dtype=dtype)  # imports and buffers that any load needs
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    pipe = smalti.Pipeline.from_pretrained(large, dtype=dtype)
    size = sum(p.nbytes for model in (pipe.tokenizer, pipe.prior) for p in model.parameters())
    print((kilobytes("VmHWM") - before) * 1024 / size)
    del pipe
print(*{"torchvision", "transformers", "accelerate", "tyro"} & sys.modules.keys())
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_loading_takes_at_most_a_fifth_more_memory_than_the_model(
    tokenizer, prior, tmp_path: Path
) -> None:
    """The largest tensors of the prior in fp32 take 0.3 of its size in bfloat16."""
    names = ["a", "b", "c"]
    small = Pipeline(tokenizer, prior, names).save_pretrained(tmp_path / "small")
    config = replace(prior.config, depth=2, width=1024, hidden=8192, num_heads=16)
    pipe = Pipeline(tokenizer, type(prior)(config), names)
    large = pipe.save_pretrained(tmp_path / "large")  # 235 MB
    command = [sys.executable, "-c", PEAK, small, large]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    exact, half, imported = done.stdout.splitlines()
    assert 0.9 < float(exact) < 1.2 and 0.9 < float(half) < 1.2
    assert imported == ""  # of libraries that take seconds and a hundred megabytes


def test_tables_for_a_grid_of_a_million_positions_are_not_built(tmp_path: Path) -> None:
    network = DiTConfig(grid=(4, 4), width=128, depth=1, num_heads=2, num_classes=3)
    folder = FlowPrior(FlowConfig(network=network)).save_pretrained(tmp_path / "p")
    edit_config(folder, network__grid=[1000, 1000])
    with pytest.raises(SmaltiError, match=r"tables of the model.*128 MB.*far more than its wei"):
        Prior.from_pretrained(folder)
    edit_config(folder, network__grid=[4000, 2500])
    with pytest.raises(SmaltiError, match="10000000 positions; use at most"):
        Prior.from_pretrained(folder)


def test_a_config_of_any_length_is_not_read(saved: Path) -> None:
    edit_config(saved, image_size="9" * 2**24)
    with pytest.raises(SmaltiError, match=r"config\.json takes 17 MB; .*at most 17 MB"):
        Tokenizer.from_pretrained(saved)
