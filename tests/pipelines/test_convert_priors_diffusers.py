"""Folders of Diffusers' DiT, with Diffusers itself as the reference."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smalti.errors import SmaltiError
from smalti.pipelines.convert.convert import convert, export, read_published
from smalti.pipelines.convert.source import Options
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowPrior

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZES = {
    "learned-sigma": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 5,
    },
    "unlike": {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": 2,
        "sample_size": 4,
        "patch_size": 1,
        "num_embeds_ada_norm": 7,
        "norm_eps": 0.01,
    },
}


def randomised(kind: str) -> nn.Module:
    """Weights unlike any initialisation; all blocks have the embedders of the first, as published
    ones do."""
    model = diffusers.DiTTransformer2DModel(**SIZES[kind])
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 0
        parameter.data = noise / fan_in**0.5 if fan_in else 0.3 * noise
    embedders = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(embedders)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    randomised("learned-sigma").save_pretrained(tmp_path / "published")
    return tmp_path / "published"


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change(folder: Path, name: str, tensor: Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[name]
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / WEIGHTS)


def read(folder: Path, given: Options | None = None) -> FlowPrior:
    model, _ = read_published("diffusers-dit", folder, given)
    assert isinstance(model, FlowPrior)
    return model


def refuse(folder: Path, given: Options | None = None) -> str:
    """The error message for a folder that cannot be converted: one line, nothing is written."""
    with pytest.raises(SmaltiError) as error:
        convert("diffusers-dit", folder, folder.parent / "out", given)
    assert "\n" not in str(error.value)
    assert not (folder.parent / "out").exists()
    return str(error.value)


def close(found: Tensor, expected: Tensor) -> None:
    """Within 2e-4, relative to the largest number."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def asked(model: FlowPrior) -> tuple[Tensor, Tensor, Tensor]:
    spec, generator = model.spec, torch.Generator().manual_seed(1)
    x = torch.randn(3, spec.channels, spec.height, spec.width, generator=generator)
    return x, torch.tensor([0, 481, 999]), torch.tensor([0, 1, model.num_classes])


# -- the same numbers -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", SIZES)
def test_the_network_is_that_of_diffusers(kind: str, tmp_path: Path) -> None:
    theirs = randomised(kind)
    theirs.save_pretrained(tmp_path / "published")
    model = read(tmp_path / "published")
    x, index, labels = asked(model)
    expected = theirs(x, timestep=index, class_labels=labels).sample
    close(model.network(x, index.float(), labels), expected)


@torch.no_grad()
def test_samples_are_those_of_diffusers_pipeline(folder: Path) -> None:
    """Its DDIM, on the leading spacing, with all channels guided."""
    model, theirs = read(folder), randomised("learned-sigma")
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(10)
    x, _, _ = asked(model)
    labels, null = torch.tensor([0, 1, 4]), torch.full((3,), 5)
    sampled = model.sample(
        labels,
        noise=x,
        solver="ddim",
        schedule="ddpm",
        num_inference_steps=10,
        guidance_scale=3.0,
    )
    for k in scheduler.timesteps:
        both = theirs(torch.cat([x, x]), k.expand(6), torch.cat([labels, null])).sample[:, :4]
        conditional, unconditional = both.chunk(2)
        noise = unconditional + 3.0 * (conditional - unconditional)
        x = scheduler.step(noise, k, x).prev_sample
    close(sampled, x)


@torch.no_grad()
@pytest.mark.parametrize("kind", SIZES)
def test_an_export_is_what_diffusers_reads(kind: str, tmp_path: Path) -> None:
    theirs = randomised(kind)
    theirs.save_pretrained(tmp_path / "published")
    model = read(tmp_path / "published")
    export(model, tmp_path / "back")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("published", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "back").eval()
    x, index, labels = asked(model)
    expected = theirs(x, timestep=index, class_labels=labels).sample
    assert torch.equal(loaded(x, timestep=index, class_labels=labels).sample, expected)
    assert read(tmp_path / "back").checksum == model.checksum


def test_the_time_has_other_frequencies_than_the_authors_dit(folder: Path, tmp_path: Path) -> None:
    model = read(folder)
    assert model.config.network.frequency_shift == 1
    for layout in ("dit", "sit"):
        with pytest.raises(SmaltiError, match="choose another layout, or none"):
            export(model, tmp_path / "out", layout)


def test_the_authors_dit_is_written_for_diffusers_with_a_note(folder: Path, tmp_path: Path) -> None:
    theirs = read(folder)
    network = replace(theirs.config.network, frequency_shift=0, mlp_norm_eps=1e-6)
    model = FlowPrior(replace(theirs.config, network=network, guided_channels=3)).eval()
    model.load_state_dict(theirs.state_dict())
    lines = export(model, tmp_path / "exact.pt")  # a file is the authors' own
    assert "layout of a DiT" in lines[0] and len(lines) == 2
    lines = export(model, tmp_path / "copy")  # a folder is Diffusers'
    assert "the images that Diffusers generates with it will differ" in lines[-1]
    loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "copy")
    weights = randomised("learned-sigma").state_dict()
    assert all(torch.equal(weights[name], t) for name, t in loaded.state_dict().items())
    again = read(tmp_path / "copy")  # which we read as it was
    assert again.checksum == model.checksum and again.config == model.config
    edit(tmp_path / "copy", frequency_shift=2)
    assert "frequency_shift is 2; expected 0 or 1" in refuse(tmp_path / "copy")


@torch.no_grad()
def test_the_frequencies_are_all_that_diffusers_does_otherwise(folder: Path, tmp_path) -> None:
    theirs = read(folder)
    network = replace(theirs.config.network, frequency_shift=0, mlp_norm_eps=1e-6)
    model = FlowPrior(replace(theirs.config, network=network)).eval()
    model.load_state_dict(theirs.state_dict())
    export(model, tmp_path / "copy")
    loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "copy").eval()
    x, index, labels = asked(model)
    ours = model.network(x, index.float(), labels)
    found = loaded(x, timestep=index, class_labels=labels).sample
    assert (found - ours).abs().max() > 2e-4 * ours.abs().max()
    for block in loaded.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    close(loaded(x, timestep=index, class_labels=labels).sample, ours)


def test_one_class_and_no_null_class(folder: Path, tmp_path: Path) -> None:
    """Diffusers always has a row for the null class: a prior without it is written with zeros."""
    name, table = "network.y_embedder.embedding_table.weight", read(folder).state_dict()
    model = read(folder)
    for classes, null in ((1, 1.0), (4, 0.0)):
        network = replace(model.config.network, num_classes=classes)
        rows = torch.cat([table[name][:classes], torch.full((1, 32), null)])
        dropout = {} if null else {"label_dropout": 0.0}
        made = FlowPrior(replace(model.config, network=network, **dropout))
        made.load_state_dict({**table, name: rows})
        export(made, tmp_path / f"{classes}", "diffusers-dit")
        again = read(tmp_path / f"{classes}")
        assert again.num_classes == classes and again.checksum == made.checksum
        assert again.has_null_class == bool(null)
        read(tmp_path / f"{classes}", Options(num_classes=classes))
    with pytest.raises(SmaltiError, match=r"--num_classes is 9, but .* has 5 rows"):
        read(tmp_path / "4", Options(num_classes=9))


def test_a_model_of_diffusers_is_no_file_of_the_authors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SmaltiError, match="diffusers-dit is written as a folder"):
        export(read(folder), tmp_path / "out.pt")


# -- config.json ----------------------------------------------------------------------------------


def test_the_older_name_of_the_class_is_read(folder: Path) -> None:
    expected = read(folder).checksum
    older = {"cross_attention_dim": None, "num_vector_embeds": None, "only_cross_attention": False}
    edit(folder, _class_name="Transformer2DModel", **older)
    assert read(folder).checksum == expected


def test_without_config_json_flags_and_defaults_give_heads_and_grid(folder: Path) -> None:
    expected = read(folder).checksum
    (folder / "config.json").unlink()
    assert read(folder, Options(heads=2, scales=(8,))).checksum == expected
    assert read(folder, Options(heads=2)).config.network.grid == (32, 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "_class_name is 'PixArtTransformer2DModel'"),
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu'; expected 'gelu-approximate'"),
        ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single'"),
        ({"num_attention_heads": 2.5}, "num_attention_heads is 2.5; expected a positive integer"),
        ({"num_attention_heads": 5}, "width 32 with 5 heads"),
        ({"sample_size": "8"}, "sample_size is '8'; expected a positive integer"),
        ({"sample_size": 9}, "cannot be cut into patches of side 2"),
        ({"norm_eps": 1}, "norm_eps is 1; expected a number from 0 to 1"),
        ({"norm_eps": "tiny"}, "norm_eps is 'tiny'; expected a number"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, words: str, folder: Path) -> None:
    edit(folder, **changes)
    assert words in refuse(folder)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("num_layers", 4),
        ("attention_head_dim", 8),
        ("patch_size", 1),
        ("num_embeds_ada_norm", 1000),
        ("in_channels", 8),
        ("out_channels", 4),
    ],
)
def test_sizes_other_than_those_of_the_tensors_are_refused(key, said, folder: Path) -> None:
    told = SIZES["learned-sigma"][key]
    edit(folder, **{key: said})
    words = (
        f"{key} is {said}, but the tensors of {WEIGHTS} give {told}: the weights file is incomplete"
    )
    assert words in refuse(folder)
    edit(folder, **{key: None})
    assert read(folder).config.network.depth == 3


def test_a_file_that_lacks_its_last_blocks_is_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    kept = {n: t for n, t in tensors.items() if not n.startswith("transformer_blocks.2.")}
    save_file(kept, folder / WEIGHTS)
    assert "num_layers is 3, but the tensors" in refuse(folder)


def test_flags_that_contradict_config_json_are_refused(folder: Path) -> None:
    assert "--heads is 4, but the file has 2" in refuse(folder, Options(heads=4))
    said = refuse(folder, Options(scales=(16,)))
    assert "--scales is 16, but config.json has sample_size 8" in said


# -- tensors --------------------------------------------------------------------------------------


def test_embedders_that_differ_between_blocks_are_refused(folder: Path) -> None:
    name = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    tensor = load_file(folder / WEIGHTS)[name].clone()
    tensor[3, 1] += 1e-6
    change(folder, name, tensor)
    assert f"{name} differs from that of block 0" in refuse(folder)


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.1.attn1.to_k.bias",
        "transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.weight",
        "pos_embed.proj.weight",
        "proj_out_1.bias",
        "transformer_blocks.0.ff.net.0.proj.weight",
    ],
)
def test_missing_and_misshaped_tensors_are_named(name: str, folder: Path) -> None:
    tensor = load_file(folder / WEIGHTS)[name]
    change(folder, name, tensor[..., :-1].contiguous())
    assert name in refuse(folder) or "attn.qkv" in refuse(folder)
    change(folder, name, None)
    assert f"lacks the tensor {name}" in refuse(folder)


def test_parts_of_unequal_size_are_not_taken_for_queries_and_keys(folder: Path) -> None:
    parts = {"q": 16, "k": 32, "v": 48}
    for part, rows in parts.items():
        change(folder, f"transformer_blocks.0.attn1.to_{part}.weight", torch.ones(rows, 32))
    assert "attn1.to_q.weight" in refuse(folder)


def test_other_models_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SmaltiError, match=r"is no DiT: it looks like diffusers-dit"):
        read_published("dit", folder)
    torch.save({"encoder.down_blocks.0.x": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(SmaltiError, match=r"is no Diffusers DiT: it looks like diffusers-kl"):
        read_published("diffusers-dit", tmp_path / "other.pt")


def test_our_own_parts_are_not_exported(tmp_path: Path) -> None:
    from smalti.pipelines.convert.diffusers_dit import DiffusersDiT
    from smalti.prior.flow.prior import PRESETS

    assert not DiffusersDiT().fits(PRESETS["sit-b/2"])
    assert not DiffusersDiT().fits(PRESETS["flow-nano"])
    with pytest.raises(ValueError, match="frequency_shift is -1"):
        DiTConfig(frequency_shift=-1)
    with pytest.raises(ValueError, match="mlp_norm_eps is nan"):
        DiTConfig(mlp_norm_eps=float("nan"))
