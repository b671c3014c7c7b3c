"""The DiT network: published sizes and weights, zero initialisation, options, precision."""

import copy
import math
from dataclasses import replace

import diffusers
import pytest
import torch
from chance import randomised
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn

from smalti.config import config_from_dict, config_to_dict
from smalti.data.latents import ContinuousSpec
from smalti.errors import SmaltiError
from smalti.prior.attention import FixedTable, rotate, sin_cos_table
from smalti.prior.flow.dit import PRESETS, DiT, DiTConfig, PatchEmbedder, sinusoids, unpatchify

TINY = DiTConfig(
    in_channels=3,
    out_channels=5,
    grid=(4, 6),
    patch_size=2,
    width=16,
    depth=2,
    num_heads=2,
    num_classes=3,
    frequency_size=8,
)
MODERN = replace(TINY, positions="both", feed_forward="swiglu", norm="rms", qk_norm=True)
OPTIONS = [
    TINY,
    replace(TINY, positions="rotary"),
    replace(TINY, positions="both"),
    replace(TINY, feed_forward="swiglu"),
    replace(TINY, norm="rms"),
    replace(TINY, qk_norm=True),
    replace(TINY, patch_size=1),
    MODERN,
]
TIMES = torch.tensor([0.0, 0.37, 1.0, 612.0])
LABELS = torch.tensor([0, 1, 2, 3])  # 3 is the null label


def latents(config: DiTConfig = TINY) -> Tensor:
    shape = (4, config.in_channels, *config.grid)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def make_network(config: DiTConfig) -> DiT:
    return randomised(DiT(config), vector_mean=0.3)


# -- against the papers and diffusers -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),
    [("dit-s/2", 33), ("dit-b/2", 130), ("dit-l/2", 458), ("dit-xl/2", 675)],
)
def test_the_sizes_are_those_of_the_paper(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = DiT(PRESETS[name])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("dit-s/2", 32_963_360),
        ("dit-b/4", 130_475_648),
        ("dit-l/8", 458_594_816),
        ("dit-xl/1", 675_972_872),
        ("dit-xl/2", 675_129_632),
    ],
)
def test_published_files_hold_the_parameters_and_the_position_table(name: str, count: int) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        model = DiT(config)
    rows, columns = config.token_grid
    table = rows * columns * config.width
    assert sum(p.numel() for p in model.parameters()) + table == count


def published_shapes(c: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes in DiT-XL-2-256x256.pt and SiT-XL-2-256x256.pt, without `pos_embed`."""
    d, h = c.width, 4 * c.width
    block = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (h, d), "mlp.fc2": (d, h)}
    block["adaLN_modulation.1"] = (6 * d, d)
    weights: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (d, c.in_channels, c.patch_size, c.patch_size),
        "t_embedder.mlp.0": (d, c.frequency_size),
        "t_embedder.mlp.2": (d, d),
        "final_layer.linear": (c.patch_size**2 * c.out_channels, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for i in range(c.depth):
        weights |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes = {f"{name}.weight": shape for name, shape in weights.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    return shapes | {"y_embedder.embedding_table.weight": (c.num_classes + 1, d)}


def test_names_and_shapes_are_those_of_the_published_weights() -> None:
    state = DiT(TINY).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == published_shapes(TINY)


def plain_dit(model: DiT, x: Tensor, t: float, label: int) -> Tensor:
    """The forward pass of the paper for one latent (C, h, w), written out: (C_out, h, w)."""
    config, weights = model.config, model.state_dict()
    p, heads, width = config.patch_size, config.num_heads, config.width
    rows, columns = config.grid[0] // p, config.grid[1] // p

    def linear(x: Tensor, name: str) -> Tensor:
        product = x @ weights[f"{name}.weight"].flatten(1).T
        return product + weights.get(f"{name}.bias", torch.tensor(0.0))

    def silu(x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    def rms(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def norm(x: Tensor) -> Tensor:
        if config.norm == "rms":
            return rms(x)
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def position(token: int) -> Tensor:
        row, column = divmod(token, columns)
        angles = [
            [at * 10000 ** (-i / (width / 4)) for i in range(width // 4)] for at in (column, row)
        ]
        return torch.tensor([f(a) for axis in angles for f in (math.sin, math.cos) for a in axis])

    def turn(x: Tensor) -> Tensor:  # (N, heads, head_dim)
        turned, head_dim = x.clone(), x.shape[-1]
        for token in range(len(x)):
            for pair in range(head_dim // 2):
                axis, i = divmod(pair, head_dim // 4)
                angle = divmod(token, columns)[axis] * 10000 ** (-2 * i / (head_dim / 2))
                a, b = x[token, :, 2 * pair], x[token, :, 2 * pair + 1]
                turned[token, :, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                turned[token, :, 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    def attention(x: Tensor, at: str) -> Tensor:  # (N, width)
        query, key, value = linear(x, f"{at}.qkv").view(len(x), 3, heads, -1).unbind(1)
        if config.qk_norm:
            query, key = (
                rms(part) * weights[f"{at}.{name}_norm.weight"]
                for name, part in (("q", query), ("k", key))
            )
        if config.positions != "sin-cos":
            query, key = turn(query), turn(key)
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(width / heads)
        return linear(
            torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1), f"{at}.proj"
        )

    def mlp(x: Tensor, at: str) -> Tensor:
        if config.feed_forward == "swiglu":
            return linear(silu(linear(x, f"{at}.w1")) * linear(x, f"{at}.w3"), f"{at}.w2")
        h = linear(x, f"{at}.fc1")
        gelu = 0.5 * h * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh())
        return linear(gelu, f"{at}.fc2")

    patches = [
        x[:, r * p : r * p + p, c * p : c * p + p].flatten()
        for r in range(rows)
        for c in range(columns)
    ]
    tokens = linear(torch.stack(patches), "x_embedder.proj")
    if config.positions != "rotary":
        tokens = tokens + torch.stack([position(n) for n in range(len(tokens))])
    half = config.frequency_size // 2
    angles = [t * 10000 ** (-i / half) for i in range(half)]
    waves = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    time = linear(silu(linear(waves, "t_embedder.mlp.0")), "t_embedder.mlp.2")
    condition = silu(time + weights["y_embedder.embedding_table.weight"][label])
    for i in range(config.depth):
        at = f"blocks.{i}"
        parts = linear(condition, f"{at}.adaLN_modulation.1").view(6, width)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        h = norm(tokens) * (1 + scale_msa) + shift_msa
        tokens = tokens + gate_msa * attention(h, f"{at}.attn")
        h = norm(tokens) * (1 + scale_mlp) + shift_mlp
        tokens = tokens + gate_mlp * mlp(h, f"{at}.mlp")
    shift, scale = linear(condition, "final_layer.adaLN_modulation.1").view(2, width)
    patches = linear(norm(tokens) * (1 + scale) + shift, "final_layer.linear")
    out = torch.empty(config.out_channels, *config.grid)
    for n, patch in enumerate(patches):
        r, c = divmod(n, columns)
        out[:, r * p : r * p + p, c * p : c * p + p] = patch.view(p, p, -1).permute(2, 0, 1)
    return out


@pytest.mark.parametrize("config", OPTIONS)
def test_the_output_is_that_of_a_plain_dit(config: DiTConfig) -> None:
    model, x = make_network(config), latents()
    with torch.no_grad():
        out = model(x, TIMES, LABELS)
        for row in range(4):
            expected = plain_dit(model, x[row], float(TIMES[row]), int(LABELS[row]))
            torch.testing.assert_close(out[row], expected, rtol=2e-4, atol=2e-4)


def diffusers_state(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Our weights under diffusers' names; it keeps the embedders once per block."""
    renamed = {"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2"}
    renamed["final_layer.adaLN_modulation.1"] = "proj_out_1"
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        renamed[f"{ours}.attn.proj"] = f"{theirs}.attn1.to_out.0"
        renamed[f"{ours}.mlp.fc1"] = f"{theirs}.ff.net.0.proj"
        renamed[f"{ours}.mlp.fc2"] = f"{theirs}.ff.net.2"
        renamed[f"{ours}.adaLN_modulation.1"] = f"{theirs}.norm1.linear"
    result = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        if module in renamed:
            result[f"{renamed[module]}.{kind}"] = value
        for i in range(depth):
            theirs = f"transformer_blocks.{i}"
            if module == f"blocks.{i}.attn.qkv":
                for part, rows in zip("qkv", value.chunk(3), strict=True):
                    result[f"{theirs}.attn1.to_{part}.{kind}"] = rows
            for ours, layer in (
                ("t_embedder.mlp.0", "timestep_embedder.linear_1"),
                ("t_embedder.mlp.2", "timestep_embedder.linear_2"),
                ("y_embedder.embedding_table", "class_embedder.embedding_table"),
            ):
                if module == ours:
                    result[f"{theirs}.norm1.emb.{layer}.{kind}"] = value
    return result


def test_the_output_is_that_of_diffusers() -> None:
    config = replace(TINY, grid=(6, 6), frequency_size=256)
    model = make_network(config)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.grid[0],
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    ).eval()
    theirs.load_state_dict(diffusers_state(model.state_dict(), config.depth))
    for block in theirs.transformer_blocks:
        # diffusers divides the exponents by 127 in place of 128, unlike DiT (and unlike its own
        # other embeddings): mended here, because the published weights were not trained so.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, steps = latents(config), torch.tensor([0, 7, 500, 999])
    with torch.no_grad():
        expected = theirs(x, timestep=steps, class_labels=LABELS).sample
        torch.testing.assert_close(model(x, steps, LABELS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("side", "dim"), [(4, 16), (16, 72)])
def test_the_position_table_is_the_published_one(side: int, dim: int) -> None:
    """MAE's function of a square grid, which DiT and diffusers took over."""
    expected = get_2d_sincos_pos_embed(dim, side, base_size=side)
    torch.testing.assert_close(sin_cos_table((side, side), dim), expected.float())


@pytest.mark.parametrize("grid", [(3, 5), (1, 7)])
def test_the_position_table_encodes_column_and_row_on_any_grid(grid: tuple[int, int]) -> None:
    table = sin_cos_table(grid, 16).view(*grid, 4, 4)  # column sin, cos, row sin, cos
    for row in range(grid[0]):
        for column in range(grid[1]):
            for i in range(4):
                angles = column * 10**-i, row * 10**-i
                waves = [f(a) for a in angles for f in (math.sin, math.cos)]
                assert table[row, column, :, i].tolist() == pytest.approx(waves, abs=1e-6)


def test_sinusoids_are_cosines_then_sines() -> None:
    waves = sinusoids(torch.tensor([0, 3]), 4)
    expected = [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]
    assert waves[0].tolist() == [1, 1, 0, 0] and waves.dtype == torch.float32
    assert waves[1].tolist() == pytest.approx(expected, abs=1e-6)


# -- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [1, 2])
def test_patches_are_a_strided_convolution_and_its_inverse(patch_size: int) -> None:
    embedder, x = PatchEmbedder(3, patch_size, 3 * patch_size**2), latents()
    expected = embedder.proj(x).flatten(2).mT
    torch.testing.assert_close(embedder(x), expected)
    token_grid = (4 // patch_size, 6 // patch_size)
    with torch.no_grad():  # the weights that put each number of a patch where unpatchify reads it
        places = torch.arange(3 * patch_size**2).view(3, -1).T.flatten()
        embedder.proj.weight.copy_(torch.eye(len(places))[places].view_as(embedder.proj.weight))
        embedder.proj.bias.zero_()
    torch.testing.assert_close(unpatchify(embedder(x), token_grid, patch_size), x)


def test_rotary_scores_depend_on_the_offset_alone() -> None:
    table = torch.view_as_complex(FixedTable.rotary((5, 7), 16).table).view(5, 7, 8)
    query, key = torch.randn(2, 16)

    def score(a: tuple[int, int], b: tuple[int, int]) -> float:
        turned = [
            rotate(x.view(1, 1, 1, 16), table[p].view(1, 8)) for x, p in ((query, a), (key, b))
        ]
        return (turned[0].flatten() @ turned[1].flatten()).item()

    assert score((1, 2), (3, 5)) == pytest.approx(score((2, 0), (4, 3)), rel=1e-4)
    assert score((1, 2), (3, 5)) != pytest.approx(score((1, 2), (4, 4)), rel=1e-2)


def test_attention_with_rotary_positions_follows_a_shift_of_the_latent() -> None:
    """With rotary positions the output of attention between two neighbouring tokens is the same
    wherever they lie on the grid; with added positions it is not."""
    x = torch.randn(1, 2, 16)  # two neighbouring tokens
    for positions, same in (("rotary", True), ("sin-cos", False)):
        model = make_network(replace(TINY, grid=(2, 6), patch_size=1, positions=positions))
        outputs = []
        for column in (0, 4):
            table = model.rope_freqs if positions == "rotary" else model.pos_embed
            pair = table.table[column : column + 2]
            freqs = torch.view_as_complex(pair) if positions == "rotary" else None
            tokens = x if positions == "rotary" else x + pair
            outputs.append(model.blocks[0].attn(tokens, freqs))
        assert torch.allclose(*outputs, atol=1e-5) == same


def test_rms_norm_keeps_the_mean_and_layer_norm_removes_it() -> None:
    layer, rms = DiT(TINY), DiT(replace(TINY, norm="rms"))
    x = torch.randn(2, 6, 16) + 3
    assert layer.blocks[0].norm1(x).mean(-1).abs().max() < 1e-5
    assert rms.blocks[0].norm1(x).mean(-1).min() > 0.5
    torch.testing.assert_close(rms.blocks[0].norm1(x).square().mean(-1), torch.ones(2, 6))


def test_normalised_queries_bound_the_scores() -> None:
    """With q/k norm, growing queries and keys leave the attention as it was."""
    for qk_norm in (True, False):
        attention = make_network(replace(TINY, qk_norm=qk_norm)).blocks[0].attn
        x = torch.randn(1, 6, 16)
        before = attention(x, None)
        with torch.no_grad():
            attention.qkv.weight[:32] *= 10
            attention.qkv.bias[:32] *= 10
        assert torch.allclose(attention(x, None), before, atol=1e-4) == qk_norm


# -- initialisation and training ------------------------------------------------------------------


@pytest.mark.parametrize("config", OPTIONS)
def test_a_new_network_gives_zero_and_its_blocks_are_the_identity(config: DiTConfig) -> None:
    model, tokens, c = DiT(config), torch.randn(2, 6, 16), torch.randn(2, 16)
    assert not model(latents(), TIMES, LABELS).any()
    for block in model.blocks:
        assert torch.equal(block(tokens, c, None), tokens)


def test_the_rest_is_initialised_as_published() -> None:
    model = DiT(replace(TINY, width=256, num_heads=4, num_classes=99))
    xavier = [("x_embedder.proj", 12, 256), ("blocks.1.attn.qkv", 256, 768)]
    for name, inputs, outputs in xavier:
        weight = model.get_submodule(name).weight
        bound = math.sqrt(6 / (inputs + outputs))
        assert 0.97 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"):
        assert model.get_submodule(name).weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("config", [TINY, MODERN])
def test_every_parameter_has_a_gradient(config: DiTConfig) -> None:
    model = DiT(config)
    for layer in model.zero_layers():
        nn.init.normal_(layer.weight, std=0.1)
    model(latents(), TIMES, LABELS).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_a_small_network_learns() -> None:
    """From zero output to fitting one batch, at any rate far below the variance of the target."""
    config, other = (
        replace(PRESETS[name], depth=2, width=64, num_heads=2) for name in ("dit-nano", "dit-micro")
    )
    assert config == other
    model, x = DiT(config), torch.randn(8, 8, 8, 8)
    t, labels = torch.rand(8), torch.arange(8)
    target = x.flip(-1)  # needs attention and positions
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = (model(x, t, labels) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(target.square().mean().item()) and losses[-1] < 0.5


# -- precision and compilation --------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, MODERN])
def test_autocast_and_bf16_weights_change_little(config: DiTConfig) -> None:
    model, x, times = DiT(config).eval(), latents(), torch.tensor([0.0, 0.3, 0.6, 1.0])
    for layer in model.zero_layers():
        nn.init.normal_(layer.weight, std=0.1)
    with torch.no_grad():
        exact = model(x, times, LABELS)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x, times, LABELS)
        half = copy.deepcopy(model).to(torch.bfloat16)
        rougher = half(x, times, LABELS)
        assert half(x.bfloat16(), times, LABELS).dtype == torch.bfloat16
    for out, tolerance in ((rough, 0.03), (rougher, 0.06)):
        assert out.dtype == torch.float32
        assert (out - exact).norm() < tolerance * exact.norm()


def test_the_time_is_embedded_in_fp32_under_autocast() -> None:
    embedder = DiT(TINY).t_embedder
    times = torch.tensor([0.5, 0.5005])  # equal in bf16
    exact = embedder(times)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedder(times), exact)
    assert not torch.equal(exact[0], exact[1])


def test_the_tables_keep_their_precision_and_are_not_saved() -> None:
    model = DiT(MODERN)
    before = model.pos_embed.table.clone(), model.rope_freqs.table.clone()
    model.to(torch.bfloat16).float()
    assert torch.equal(model.pos_embed.table, before[0])
    assert torch.equal(model.rope_freqs.table, before[1])
    assert not any("table" in key and "embedding" not in key for key in model.state_dict())


def test_a_network_built_on_meta_has_its_tables_once_it_is_given_memory() -> None:
    with torch.device("meta"):
        empty = DiT(MODERN)
    model = make_network(MODERN)
    empty = empty.to_empty(device="cpu").eval()
    empty.load_state_dict(model.state_dict())
    x = latents()
    assert torch.equal(empty(x, TIMES, LABELS), model(x, TIMES, LABELS))


@pytest.mark.parametrize("config", [TINY, MODERN])
def test_the_network_compiles_into_one_graph(config: DiTConfig) -> None:
    model, x = make_network(config), latents()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, TIMES, LABELS), model(x, TIMES, LABELS))
    with torch.autocast("cpu", torch.bfloat16):
        rough = compiled(x, TIMES, LABELS)
        torch.testing.assert_close(rough, model(x, TIMES, LABELS))


# -- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit-s/8", "dit-xl/1", "dit-nano", "dit-micro"])
def test_presets_survive_a_file(name: str) -> None:
    config = PRESETS[name]
    assert config_from_dict(DiTConfig, config_to_dict(config), name) == config


def test_there_is_a_preset_for_every_size_and_patch() -> None:
    published = [name for name in PRESETS if "/" in name]
    assert published == [f"dit-{s}/{p}" for s in ("s", "b", "l", "xl") for p in (1, 2, 4, 8)]
    assert DiTConfig() == PRESETS["dit-b/2"]
    for name, low, high in (("dit-nano", 3e6, 5e6), ("dit-micro", 5e6, 8e6)):
        count = sum(p.numel() for p in DiT(PRESETS[name]).parameters())
        assert low < count < high


def test_fitting_a_preset_to_latents() -> None:
    fitted = PRESETS["dit-s/2"].fitted(ContinuousSpec(16, 12, 8), 7)
    assert (fitted.in_channels, fitted.out_channels) == (16, 32)  # a variance, as before
    nano = PRESETS["dit-nano"].fitted(ContinuousSpec(16, 12, 8), 7)
    assert (nano.in_channels, nano.out_channels) == (16, 16)
    assert (fitted.grid, fitted.token_grid, fitted.num_classes) == ((12, 8), (6, 4), 7)
    assert fitted.width == PRESETS["dit-s/2"].width
    with pytest.raises(SmaltiError, match="choose a patch_size that divides both"):
        PRESETS["dit-s/2"].fitted(ContinuousSpec(4, 7, 8), 7)


def test_swiglu_costs_about_what_gelu_does() -> None:
    counts = [
        sum(p.numel() for p in DiT(replace(PRESETS["dit-nano"], feed_forward=kind)).parameters())
        for kind in ("gelu", "swiglu")
    ]
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "learned"}, 'positions is "learned"; choose one of sin-cos, rotary, both'),
        ({"feed_forward": "relu"}, 'feed_forward is "relu"; choose one of gelu, swiglu'),
        ({"norm": "batch"}, 'norm is "batch"; choose one of layer, rms'),
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"patch_size": 3}, "a grid of 4 x 6 cannot be cut into patches of side 3"),
        ({"patch_size": 0}, "patches of side 0"),
        ({"grid": (0, 6)}, "a grid of 0 x 6"),
        ({"num_heads": 3}, "width 16 with 3 heads: the width must be a multiple of both 4 and"),
        ({"width": 6, "num_heads": 1}, "width 6 with 1 heads: the width must be a multiple"),
        ({"num_heads": 8, "positions": "both"}, "with rotary positions each head needs"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ({"mlp_ratio": math.nan}, "mlp_ratio is nan"),
        ({"frequency_size": 7}, "frequency_size is 7; it must be even"),
    ],
)
def test_a_bad_config_is_one_clear_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SmaltiError) as caught:
        replace(TINY, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(4, 3, 6, 4), TIMES, LABELS), r"this network takes \(B, 3, 4, 6\)"),
        ((torch.zeros(3, 4, 6), TIMES, LABELS), "latents have shape"),
        ((torch.zeros(4, 3, 4, 6), TIMES[:1], LABELS), "times have shape"),
        ((torch.zeros(4, 3, 4, 6), TIMES, LABELS[:, None]), "labels have shape"),
    ],
)
def test_wrong_inputs_are_one_clear_line(inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        DiT(TINY)(*inputs)


def test_no_latents_at_all() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert DiT(TINY)(latents()[:0], TIMES[:0], empty).shape == (0, 5, 4, 6)


def test_a_grid_that_no_latents_have_is_refused_before_its_table_is_made() -> None:
    with pytest.raises(SmaltiError, match="use at most"):
        replace(TINY, grid=(10_000_000, 2))
