"""SiT's and DiT's published weights: the original outputs and samples, from the names of their
tensors alone.

The references are plain functions over a dict of tensors, written from the published key layout and
the papers (DiT `models.py`, `diffusion/`; SiT `models.py`, `transport/`).
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import smalti
from smalti.errors import SmaltiError
from smalti.pipelines.convert.convert import convert, export, read_published
from smalti.pipelines.convert.source import Options
from smalti.prior.flow.prior import PRESETS, FlowPrior
from smalti.prior.flow.solvers.ancestral import DDIM
from smalti.randomness import NormalSource
from smalti.tokenizer.conv import ConvConfig
from smalti.tokenizer.kl import KLConfig, KLTokenizer

State = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    width: int = 32
    heads: int = 2
    depth: int = 2
    hidden: int = 128
    channels: int = 4
    outputs: int = 8
    patch: int = 2
    grid: int = 8  # of latents
    classes: int = 5


KINDS = {
    "learned-sigma": Sizes(),
    "narrow-heads": Sizes(24, 4, 1),
    "unlike": Sizes(48, 4, 3, hidden=100, channels=5, outputs=5, patch=1, grid=4, classes=2),
}
PLAIN = KINDS["learned-sigma"]


def positions(width: int, side: int) -> Tensor:
    """(1, side^2, width), as DiT makes them: of column, then row, each sine, then cosine."""
    columns, rows = np.meshgrid(np.arange(side, dtype=np.float64), np.arange(side))
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    parts = []
    for axis in (columns, rows):
        angles = np.einsum("m,d->md", axis.reshape(-1), omega)
        parts += [np.sin(angles), np.cos(angles)]
    return torch.from_numpy(np.concatenate(parts, 1)).float()[None]


def published(s: Sizes) -> State:
    g = torch.Generator().manual_seed(0)
    state: State = {"pos_embed": positions(s.width, s.grid // s.patch)}

    def linear(name: str, out: int, into: int, gain: float = 1.0) -> None:
        state[f"{name}.weight"] = gain * torch.randn(out, into, generator=g) / into**0.5
        state[f"{name}.bias"] = 0.3 * torch.randn(out, generator=g)

    c = s.width
    linear("x_embedder.proj", c, s.channels * s.patch**2)
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].view(
        c, s.channels, s.patch, s.patch
    )
    linear("t_embedder.mlp.0", c, 256)
    linear("t_embedder.mlp.2", c, c)
    state["y_embedder.embedding_table.weight"] = torch.randn(s.classes + 1, c, generator=g)
    for i in range(s.depth):
        linear(f"blocks.{i}.attn.qkv", 3 * c, c, 2.0)
        linear(f"blocks.{i}.attn.proj", c, c)
        linear(f"blocks.{i}.mlp.fc1", s.hidden, c)
        linear(f"blocks.{i}.mlp.fc2", c, s.hidden)
        linear(f"blocks.{i}.adaLN_modulation.1", 6 * c, c, 0.5)
    linear("final_layer.linear", s.patch**2 * s.outputs, c)
    linear("final_layer.adaLN_modulation.1", 2 * c, c, 0.5)
    return state


# -- the original network -------------------------------------------------------------------------


def linear(t: State, name: str, x: Tensor) -> Tensor:
    return x @ t[f"{name}.weight"].flatten(1).T + t[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    normed = (x - mean) / (variance + 1e-6).sqrt()
    return normed * (1 + scale[:, None]) + shift[:, None]


def original(t: State, s: Sizes, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    """(B, outputs, grid, grid), times in the network's own units."""
    b, n, p = len(x), s.grid // s.patch, s.patch
    patches = x.view(b, s.channels, n, p, n, p).permute(0, 2, 4, 1, 3, 5).reshape(b, n * n, -1)
    h = linear(t, "x_embedder.proj", patches) + t["pos_embed"]
    omega = torch.exp(-math.log(10000) * torch.arange(128).float() / 128)
    angles = times[:, None].float() * omega
    waves = torch.cat([angles.cos(), angles.sin()], -1)
    c = linear(t, "t_embedder.mlp.2", silu(linear(t, "t_embedder.mlp.0", waves)))
    c = silu(c + t["y_embedder.embedding_table.weight"][labels])
    for i in range(s.depth):
        block = f"blocks.{i}"
        parts = linear(t, f"{block}.adaLN_modulation.1", c).chunk(6, 1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        qkv = linear(t, f"{block}.attn.qkv", modulated(h, shift1, scale1))
        q, k, v = qkv.view(b, n * n, 3, s.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / (s.width // s.heads) ** 0.5).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(b, n * n, s.width)
        h = h + gate1[:, None] * linear(t, f"{block}.attn.proj", mixed)
        u = linear(t, f"{block}.mlp.fc1", modulated(h, shift2, scale2))
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        h = h + gate2[:, None] * linear(t, f"{block}.mlp.fc2", u)
    shift, scale = linear(t, "final_layer.adaLN_modulation.1", c).chunk(2, 1)
    out = linear(t, "final_layer.linear", modulated(h, shift, scale))
    return torch.einsum("nhwpqc->nchpwq", out.view(b, n, n, p, p, s.outputs)).reshape(
        b, s.outputs, s.grid, s.grid
    )


def guided(t: State, s: Sizes, x: Tensor, times: Tensor, labels: Tensor, scale: float) -> Tensor:
    """`forward_with_cfg`: three channels are guided, the others stay the conditional's."""
    conditional = original(t, s, x, times, labels)
    unconditional = original(t, s, x, times, torch.full_like(labels, s.classes))
    first = unconditional[:, :3] + scale * (conditional[:, :3] - unconditional[:, :3])
    return torch.cat([first, conditional[:, 3:]], 1)


# -- the original samplers ------------------------------------------------------------------------


def spaced(indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """abar of the steps taken, and their betas, of 1000 linear betas (DiT's `respace.py`)."""
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))[indices]
    return abar, 1 - abar / np.append(1.0, abar[:-1])


def ddim(t: State, s: Sizes, x: Tensor, labels: Tensor, indices: list[int], scale: float) -> Tensor:
    abar, _ = spaced(indices)
    for i in reversed(range(len(indices))):
        times = torch.full((len(x),), float(indices[i]))
        noise = guided(t, s, x, times, labels, scale)[:, : s.channels]
        data = (x - math.sqrt(1 - abar[i]) * noise) / math.sqrt(abar[i])
        before = abar[i - 1] if i else 1.0
        x = math.sqrt(before) * data + math.sqrt(1 - before) * noise
    return x


def ddpm(
    t: State, s: Sizes, x: Tensor, labels: Tensor, indices: list[int], normal: NormalSource
) -> Tensor:
    abar, betas = spaced(indices)
    before = np.append(1.0, abar[:-1])
    variance = betas * (1 - before) / (1 - abar)
    smallest = np.log(np.append(variance[1], variance[1:]))
    for i in reversed(range(len(indices))):
        times = torch.full((len(x),), float(indices[i]))
        noise, share = original(t, s, x, times, labels).chunk(2, 1)
        data = (x - math.sqrt(1 - abar[i]) * noise) / math.sqrt(abar[i])
        mean = betas[i] * math.sqrt(before[i]) / (1 - abar[i]) * data
        mean = mean + (1 - before[i]) * math.sqrt(1 - betas[i]) / (1 - abar[i]) * x
        share = (share + 1) / 2
        log_variance = share * math.log(betas[i]) + (1 - share) * smallest[i]
        x = mean + (0.5 * log_variance).exp() * normal(x) if i else mean
    return x


# -- helpers --------------------------------------------------------------------------------------


def close(found: Tensor, expected: Tensor) -> None:
    """Within 2e-4, relative to the largest number."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def read(source: str, content: object, folder: Path, given: Options) -> FlowPrior:
    torch.save(content, folder / "published.pt")
    model, _ = read_published(source, folder / "published.pt", given)
    assert isinstance(model, FlowPrior)
    return model


def refuse(content: object, folder: Path, given: Options, source: str = "dit") -> str:
    """The error message for a file that cannot be converted: one line, and nothing is written."""
    torch.save(content, folder / "published.pt")
    with pytest.raises(SmaltiError) as error:
        convert(source, folder / "published.pt", folder / "out", given)
    assert "\n" not in str(error.value)
    assert [path.name for path in folder.iterdir()] == ["published.pt"]
    return str(error.value)


def noises(s: Sizes, seed: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, s.channels, s.grid, s.grid, generator=g)


def labels_of(s: Sizes) -> Tensor:
    return torch.tensor([0, s.classes - 1, 1])


def kl_tokenizer(side: int = PLAIN.grid, channels: int = PLAIN.channels) -> KLTokenizer:
    conv = ConvConfig(8, (1, 2), num_res_blocks=1, attention_levels=(), z_channels=channels)
    config = KLConfig(image_size=2 * side, conv=conv, latent_mean=(0.1,) * channels)
    return KLTokenizer(config).eval()


# -- the same numbers -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_sit_gives_the_original_velocity(kind: str, tmp_path: Path) -> None:
    s = KINDS[kind]
    state, x, labels = published(s), noises(s), torch.tensor([0, 1, s.classes])
    model = read("sit", state, tmp_path, Options(heads=s.heads))
    t = torch.tensor([0.0, 0.37, 0.9])
    expected = original(state, s, x, t, labels)
    close(model.network(x, t, labels), expected)
    close(model.velocity(x, t, labels), expected[:, : s.channels])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_sit_samples_as_the_original_with_three_guided_channels(kind: str, tmp_path: Path) -> None:
    s = KINDS[kind]
    state, x, labels = published(s), noises(s), labels_of(s)
    model = read("sit", state, tmp_path, Options(heads=s.heads))
    sampled = model.sample(
        labels, noise=x, solver="euler", num_inference_steps=4, guidance_scale=2.0
    )
    for i in range(4):
        times = torch.full((3,), i / 4)
        x = x + 0.25 * guided(state, s, x, times, labels, 2.0)[:, : s.channels]
    close(sampled, x)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_dit_gives_the_original_noise_and_variance(kind: str, tmp_path: Path) -> None:
    s = KINDS[kind]
    state, x, labels = published(s), noises(s), torch.tensor([0, 1, s.classes])
    model = read("dit", state, tmp_path, Options(heads=s.heads))
    index = torch.tensor([0.0, 500.0, 999.0])
    close(model.network(x, index, labels), original(state, s, x, index, labels))


def test_dit_takes_evenly_strided_steps_from_0(tmp_path: Path) -> None:
    model = read("dit", published(PLAIN), tmp_path, Options(heads=PLAIN.heads))
    for steps in (1, 2, 10, 250):
        stride = 1000 // steps
        asked: list[float] = []

        def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            asked.append(t[0].item())  # noqa: B023
            return torch.zeros(len(x), PLAIN.outputs, PLAIN.grid, PLAIN.grid)

        model.network.forward = network  # type: ignore[method-assign]
        label = torch.tensor([0])
        model.sample(label, solver="ddim", schedule="ddpm", num_inference_steps=steps)
        assert asked == [float(k) for k in range(0, 1000, stride)][::-1]


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_dit_samples_by_ddim_as_the_original(kind: str, scale: float, tmp_path: Path) -> None:
    s = KINDS[kind]
    state, x, labels = published(s), noises(s), labels_of(s)
    model = read("dit", state, tmp_path, Options(heads=s.heads))
    sampled = model.sample(
        labels,
        noise=x,
        solver="ddim",
        schedule="ddpm",
        num_inference_steps=10,
        guidance_scale=scale,
    )
    expected = ddim(state, s, x, labels, list(range(0, 1000, 100)), scale)
    assert expected.abs().max() > 10  # which clipping would change
    close(sampled, expected)


@torch.no_grad()
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_dit_samples_by_ddpm_with_the_learned_variance(spacing: str, tmp_path: Path) -> None:
    s = PLAIN
    state, x, labels = published(s), noises(s), labels_of(s)
    model = read("dit", state, tmp_path, Options(heads=s.heads))
    sampled = model.sample(
        labels,
        noise=x,
        solver={"kind": "ddpm", "variance": "learned"},
        schedule={"kind": "ddpm", "spacing": spacing},
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(4),
    )
    normal = NormalSource(torch.Generator().manual_seed(4), 3)
    taken = list(range(0, 1000, 100)) if spacing == "leading" else [111 * i for i in range(10)]
    close(sampled, ddpm(state, s, x, labels, taken, normal))


def test_dit_has_the_noise_schedule_of_ddpm(tmp_path: Path) -> None:
    model = read("dit", published(PLAIN), tmp_path, Options(heads=2))
    betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
    times = model.time_grid(1000, DDIM(), "ddpm")[:-1].flip(0)
    alpha = model.config.path.alpha(times).numpy()
    np.testing.assert_allclose(alpha**2, np.cumprod(1 - betas), rtol=1e-9)
    published_preset = PRESETS["dit-xl/2"]
    for name in ("path", "prediction", "time_scale", "time_shift"):
        assert getattr(model.config, name) == getattr(published_preset, name)


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["sit", "dit"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_holds_exactly_what_was_published(source, kind, tmp_path: Path) -> None:
    s = KINDS[kind]
    state, given = published(s), Options(heads=s.heads)
    model = read(source, state, tmp_path, given)
    export(model, tmp_path / "back.safetensors")  # a file's layout follows from the model
    again, _ = read_published(source, tmp_path / "back.safetensors", given)
    assert isinstance(again, FlowPrior) and again.checksum == model.checksum
    export(model, tmp_path / "back.pt", source)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_class_names_are_reported_for_1000_classes(tmp_path: Path) -> None:
    for classes, tokenizer, words in (
        (1000, None, "convert with --tokenizer to get ImageNet's"),
        (1000, kl_tokenizer(), "class names: ImageNet's"),
        (5, kl_tokenizer(), None),
    ):
        torch.save(published(Sizes(classes=classes)), tmp_path / "dit.pt")
        given = Options(heads=2, tokenizer=tokenizer)
        _, lines = read_published("dit", tmp_path / "dit.pt", given)
        told = [line for line in lines if "class names" in line]
        assert told[0].endswith(words) if words else not told, lines


def test_the_mean_weights_of_a_training_checkpoint_are_taken(tmp_path: Path) -> None:
    state = published(PLAIN)
    last = {name: tensor + 1 for name, tensor in state.items()}
    args = argparse.Namespace(model="DiT-XL/2", lr=1e-4)
    content = {"model": last, "ema": state, "opt": {"state": {}}, "args": args}
    given = Options(heads=2)
    expected = read("sit", state, tmp_path, given).checksum
    assert read("sit", content, tmp_path, given).checksum == expected
    for wrapper in ("model", "module"):
        assert read("sit", {wrapper: state}, tmp_path, given).checksum == expected
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    assert read("sit", {"model": wrapped}, tmp_path, given).checksum == expected


def test_heads_have_the_published_defaults() -> None:
    from smalti.pipelines.convert.dit import PUBLISHED_HEADS
    from smalti.pipelines.convert.source import head_count

    for name in ("sit-s/2", "sit-b/4", "sit-l/2", "dit-xl/2"):
        network = PRESETS[name].network
        assert head_count(Options(), network.width, PUBLISHED_HEADS)[0] == network.num_heads


def test_prior_and_tokenizer_become_a_pipeline(tmp_path: Path) -> None:
    s, tokenizer = Sizes(classes=1000), kl_tokenizer()
    torch.save(published(s), tmp_path / "dit.pt")
    given = Options(heads=2, tokenizer=tokenizer)
    convert("dit", tmp_path / "dit.pt", tmp_path / "out", given)
    pipe = smalti.Pipeline.from_pretrained(tmp_path / "out")
    assert pipe.prior.tokenizer_fingerprint == tokenizer.fingerprint
    images = pipe(["goldfish"], num_inference_steps=2, solver="ddim", output_type="pt").images
    assert images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("tokenizer", [kl_tokenizer(side=4), kl_tokenizer(channels=3)])
def test_other_tokenizers_are_refused(tokenizer: KLTokenizer, tmp_path: Path) -> None:
    given = Options(heads=2, tokenizer=tokenizer)
    assert "they do not belong together" in refuse(published(PLAIN), tmp_path, given)


# -- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (positions(32, 4) + 1e-4, "pos_embed differs from that of a model of this size in 512 of"),
        (positions(32, 4).flip(2), "pos_embed differs from that of a model of this size"),
        (torch.zeros(1, 15, 32), "15 tokens, which is no square"),
        (positions(16, 4), "has shape (1, 16, 16)"),
        (positions(32, 4)[0], "expected 3 dimensions"),
    ],
)
def test_wrong_positions_are_refused(value: Tensor, words: str, tmp_path: Path) -> None:
    assert words in refuse(published(PLAIN) | {"pos_embed": value}, tmp_path, Options(heads=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_in_half_precision_may_be_rounded_and_not_more(dtype, tmp_path: Path) -> None:
    half = {name: tensor.to(dtype) for name, tensor in published(PLAIN).items()}
    model = read("dit", half, tmp_path, Options(heads=2))
    assert torch.equal(model.network.blocks[0].mlp.fc1.bias, half["blocks.0.mlp.fc1.bias"].float())
    half["pos_embed"] += 4 * torch.finfo(dtype).eps
    assert "pos_embed differs from that of a model of this size" in refuse(
        half, tmp_path, Options(heads=2)
    )


def test_every_missing_tensor_is_named(tmp_path: Path) -> None:
    for name in list(state := published(Sizes(depth=1)))[::2]:
        rest = {other: tensor for other, tensor in state.items() if other != name}
        assert f"lacks the tensor {name}" in refuse(rest, tmp_path, Options(heads=2))


@pytest.mark.parametrize("source", ["sit", "dit"])
def test_a_file_without_its_positions_is_refused(source: str, tmp_path: Path) -> None:
    state = published(PLAIN)
    del state["pos_embed"]
    for given in (Options(heads=2), Options(heads=2, scales=(8,))):
        assert "lacks the tensor pos_embed" in refuse(state, tmp_path, given, source)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_tensor_that_is_not_finite_is_named(value: float, tmp_path: Path) -> None:
    state = published(PLAIN)
    state["blocks.1.mlp.fc2.bias"][3] = value
    said = refuse(state, tmp_path, Options(heads=2))
    assert "blocks.1.mlp.fc2.bias holds 1 values that are infinite or NaN" in said
    state["blocks.1.mlp.fc2.bias"] = torch.full((32,), 1e300, dtype=torch.float64)
    assert "holds 32 values that are infinite" in refuse(state, tmp_path, Options(heads=2))


def test_every_misshaped_tensor_is_refused(tmp_path: Path) -> None:
    state = published(Sizes(depth=1))
    for number, (name, tensor) in enumerate(state.items()):
        wrong = (tensor[..., :-1], tensor[None], tensor.long())[number % 3]
        assert refuse(state | {name: wrong}, tmp_path, Options(heads=2))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Options(), "width 32 is no multiple of 64, the published width of a head"),
        (Options(heads=5), "--heads is 5, which does not divide width 32"),
        (Options(heads=2, scales=(16,)), "--scales is 16, but pos_embed in the file is for"),
        (Options(heads=2, scales=(4, 8)), "--scales is 4, 8, but pos_embed in the file is for"),
        (Options(heads=2, image_size=64), "--image_size does not apply to a DiT"),
    ],
)
def test_wrong_flags_are_refused(given: Options, words: str, tmp_path: Path) -> None:
    assert words in refuse(published(PLAIN), tmp_path, given)


def test_surplus_tensors_and_other_models_are_refused(tmp_path: Path) -> None:
    extra = {"blocks.1.attn.q_norm.weight": torch.ones(16)}
    said = refuse(published(PLAIN) | extra, tmp_path, Options(heads=2))
    assert "blocks.1.attn.q_norm.weight that no DiT" in said
    with pytest.raises(SmaltiError, match=r"is no LlamaGen prior: it looks like sit or dit"):
        read_published("llamagen-prior", tmp_path / "published.pt")


def test_a_velocity_prior_is_not_exported_as_dit(tmp_path: Path) -> None:
    model = read("sit", published(PLAIN), tmp_path, Options(heads=2))
    with pytest.raises(SmaltiError, match=r"this model is no DiT"):
        export(model, tmp_path / "out.pt", "dit")
