"""Draw the figures of docs/methods.

    python tools/figures.py                                           # all others
    python tools/figures.py --model runs/demo/pipeline --given 0 3 7  # a picture that grows

In two dimensions, the data are a mixture of four narrow Gaussians, two of each class, so that the
expectations that a network would learn are known in closed form: nothing is trained. Paths, solvers
and guidance are those of `smalti.prior.flow`, quantizers and losses those of `smalti.tokenizer`.
The scales of a picture are decoded by a tokenizer that ships with smalti. A pipeline shows how its
pictures grow. It needs pip install 'smalti[docs]'.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

import smalti
from smalti.data.dataset import DataOptions
from smalti.data.image_io import image_grid
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.flow.path import (
    GaussianPath,
    LinearPath,
    TrigonometricPath,
    VPLinearPath,
)
from smalti.prior.flow.prediction import Dynamics, time_range
from smalti.prior.flow.solvers.base import make_solver
from smalti.prior.next_token.model import random_order_probability, sample_orders
from smalti.prior.registry import PRIORS
from smalti.randomness import NormalSource
from smalti.tokenizer.kl import DiagonalGaussian
from smalti.tokenizer.losses.perceptual import LPIPS
from smalti.tokenizer.quantizers.base import Quantizer
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.fsq import FSQConfig, FSQuantizer
from smalti.tokenizer.quantizers.lookup_free import LookupFreeConfig, LookupFreeQuantizer
from smalti.tokenizer.quantizers.nearest import NearestConfig, NearestQuantizer

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse

MEANS = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]], dtype=torch.float64)
MULTI_SCALE = "smalti/fashion-next-scale"
EMOJI = ("emoji/video_game-Fluent",)
FASHION = ("fashion/10000", "fashion/10001", "fashion/10002", "fashion/10018")
CLASSES = torch.tensor([0, 1, 0, 1])  # of the four Gaussians
STD = 0.15  # of each
COLOURS = ("tab:blue", "tab:orange")
PATHS: dict[str, GaussianPath] = {
    "linear": LinearPath(),
    "trigonometric": TrigonometricPath(),
    "vp-linear": VPLinearPath(),
}
SOLVERS = ("euler", "midpoint", "heun", "rk4")
STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}  # evaluations in a step


def expected_data(path: GaussianPath, x: Tensor, t: Tensor, label: int | None = None) -> Tensor:
    """E[data | x_t] for x (B, 2) and times t (B,): of all data, or of a class."""
    means = MEANS if label is None else MEANS[label == CLASSES]
    t = t.expand(len(x))  # a solver gives one time for all
    alpha = path.alpha(t)[:, None, None]  # (B, 1, 1)
    variance = alpha**2 * STD**2 + path.sigma(t)[:, None, None] ** 2
    offset = x[:, None] - alpha * means  # (B, K, 2)
    weights = (-(offset**2).sum(-1, keepdim=True) / (2 * variance)).softmax(1)  # p(k | x_t)
    return (weights * (means + alpha * STD**2 / variance * offset)).sum(1)


def guided(path: GaussianPath, label: int, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """uncond + s (cond - uncond), of the expected data."""

    def output(x: Tensor, t: Tensor) -> Tensor:
        whole = expected_data(path, x, t)
        return whole + scale * (expected_data(path, x, t, label) - whole)

    return output


def trajectories(
    path: GaussianPath, x: Tensor, *, solver: str = "heun", steps: int = 100, output: object = None
) -> Tensor:
    """States (steps + 1, B, 2) from noise x (B, 2) to data."""
    field = output if callable(output) else lambda x, t: expected_data(path, x, t)
    dynamics = Dynamics(path, "data", field)
    within = time_range(path, "data")
    times = torch.linspace(within.start, within.end, steps + 1, dtype=torch.float64)
    normal = NormalSource(torch.Generator().manual_seed(1), len(x))
    return torch.stack([x, *make_solver(solver).states(dynamics, x, times, normal)])


def noise(count: int) -> Tensor:
    """Noise (count, 2)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def plane(axes: Axes, title: str) -> None:
    """An empty plane with a title."""
    axes.set(title=title, xlim=(-3.2, 3.2), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")


def lines(axes: Axes, states: Tensor) -> None:
    """The trajectories of states (N, B, 2), from noise (black) to data (blue)."""
    axes.plot(states[:, :, 0], states[:, :, 1], color="grey", linewidth=0.6)
    axes.scatter(*states[0].T, s=6, color="black", zorder=2)
    axes.scatter(*states[-1].T, s=10, color=COLOURS[0], zorder=2)


def draw_paths(folder: Path) -> None:
    """The same noise on three paths."""
    figure, row = plt.subplots(1, len(PATHS), figsize=(9, 2.9))
    for axes, (name, path) in zip(row, PATHS.items(), strict=True):
        plane(axes, name)
        lines(axes, trajectories(path, noise(40)))
    save(figure, folder / "paths.png")


def solver_errors(evaluations: tuple[int, ...]) -> dict[str, list[float]]:
    """Of each solver, the mean distance from the exact end of the ODE, by network evaluations."""
    path, start = PATHS["linear"], noise(200)
    exact = trajectories(path, start, solver="rk4", steps=1000)[-1]
    errors: dict[str, list[float]] = {}
    for solver in SOLVERS:
        ends = (
            trajectories(path, start, solver=solver, steps=count // STAGES[solver])[-1]
            for count in evaluations
        )
        errors[solver] = [float((end - exact).norm(dim=1).mean()) for end in ends]
    return errors


def draw_solvers(folder: Path) -> None:
    """Accuracy of the solvers, by what they cost."""
    evaluations = (4, 8, 16, 32, 64, 128)
    figure, axes = plt.subplots(figsize=(5, 3.2))
    for solver, errors in solver_errors(evaluations).items():
        axes.loglog(evaluations, errors, marker="o", markersize=3, label=solver)
    axes.set(xlabel="evaluations of the network", ylabel="mean distance from the exact sample")
    axes.set_xticks(evaluations, [str(count) for count in evaluations])
    axes.legend()
    save(figure, folder / "solvers.png")


def draw_guidance(folder: Path) -> None:
    """Samples of two classes, from no guidance to much."""
    scales = (1.0, 2.0, 4.0)
    figure, row = plt.subplots(1, len(scales), figsize=(9, 2.9))
    path = PATHS["linear"]
    for axes, scale in zip(row, scales, strict=True):
        plane(axes, f"guidance_scale {scale:g}")
        for label, colour in enumerate(COLOURS):
            end = trajectories(path, noise(300), output=guided(path, label, scale))[-1]
            axes.scatter(*end.T, s=3, color=colour)
    save(figure, folder / "guidance.png")


def draw_stochastic(folder: Path) -> None:
    """One start, many ends: an ODE beside SDEs."""
    solvers = {
        "heun": "ODE",
        "euler-maruyama": "SDE (euler-maruyama)",
        "ddpm": "ancestral (ddpm)",
    }
    figure, row = plt.subplots(1, len(solvers), figsize=(9, 2.9))
    start = torch.tensor([[0.4, 0.6]], dtype=torch.float64).expand(12, 2)
    for axes, (solver, title) in zip(row, solvers.items(), strict=True):
        plane(axes, title)
        lines(axes, trajectories(PATHS["vp-linear"], start, solver=solver, steps=200))
    save(figure, folder / "stochastic.png")


def straightness(states: Tensor) -> float:
    """Mean length of the trajectories over the distance between their ends: 1 is straight."""
    length = (states[1:] - states[:-1]).norm(dim=-1).sum(0)
    return float((length / (states[-1] - states[0]).norm(dim=-1)).mean())


def rectified(path: GaussianPath, pairs: int = 20_000) -> Callable[[Tensor, Tensor], Tensor]:
    """E[data | x_t] over pairs of noise and the data to which the ODE maps it: what reflow learns.

    The expectation is a mean over pairs, weighted by a narrow Gaussian of the distance from x_t.
    """
    ends = trajectories(path, start := noise(pairs), steps=40)[-1]

    def output(x: Tensor, t: Tensor) -> Tensor:
        mixed = path.mix(ends, start, t[:1].expand(pairs))  # one time for all
        weights = (-(torch.cdist(x, mixed) ** 2) / (2 * 0.05**2)).softmax(1)
        return weights @ ends

    return output


def draw_reflow(folder: Path) -> None:
    """The trajectories of a flow, and of the flow that is trained on its pairs."""
    figure, row = plt.subplots(1, 2, figsize=(6.4, 2.9))
    path = PATHS["linear"]
    outputs = {"flow": None, "after reflow": rectified(path)}
    for axes, (title, output) in zip(row, outputs.items(), strict=True):
        states = trajectories(path, noise(60), output=output)
        plane(axes, f"{title}: length / distance {straightness(states):.2f}")
        lines(axes, states)
    save(figure, folder / "reflow.png")


def draw_coefficients(folder: Path) -> None:
    """alpha and sigma of the paths."""
    figure, row = plt.subplots(1, len(PATHS), figsize=(9, 2.4), sharey=True)
    t = torch.linspace(0, 1, 200, dtype=torch.float64)
    for axes, (name, path) in zip(row, PATHS.items(), strict=True):
        axes.plot(t, path.alpha(t), label="alpha (data)")
        axes.plot(t, path.sigma(t), label="sigma (noise)")
        axes.set(title=name, xlabel="t")
    row[0].legend()
    save(figure, folder / "coefficients.png")


ANNEALING = (0.5, 0.75)  # of random orders, as in RAR


def ranks(progress: float, rows: int, side: int = 6) -> Tensor:
    """When each code of a grid is predicted, (rows, side, side), from 0, at a share of the
    training: the orders of the first samples of a batch."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        probability = torch.tensor(random_order_probability(progress, ANNEALING))
        orders = sample_orders(rows, side * side, probability)
    return orders.argsort(1).reshape(rows, side, side)


def draw_orders(folder: Path) -> None:
    """The probability of a random order during training, and orders of two samples at three times.

    The darkest code is the first that is predicted.
    """
    times, samples = (0.25, 0.6, 0.9), 2
    figure, row = plt.subplots(
        1, 1 + len(times) * samples, figsize=(9, 2), width_ratios=[2] + [1] * 6
    )
    t = torch.linspace(0, 1, 201).tolist()
    row[0].plot(t, [random_order_probability(share, ANNEALING) for share in t])
    row[0].set(title="P(random order)", xlabel="share of the training")
    shown = [(time, grid) for time in times for grid in ranks(time, samples)]
    for axes, (time, grid) in zip(row[1:], shown, strict=True):
        axes.imshow(grid)
        axes.set(title=f"at {time}", xticks=[], yticks=[])
    save(figure, folder / "orders.png")


# -------------------------------------------------------------------------------------------------
# Tokenizers


def learned_codebook(features: Tensor, vocab_size: int = 25, steps: int = 300) -> NearestQuantizer:
    """A codebook of running means of features (N, 2)."""
    codebook = CodebookConfig(
        vocab_size, 2, l2_normalise=False, learning="ema", ema_decay=0.9, revive_after=5
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        quantizer = NearestQuantizer(NearestConfig(codebook=codebook))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        quantizer(features.float()[..., None, None])
        quantizer.after_step(generator)
    return quantizer.eval()


def cells(quantizer: Quantizer, reach: float, side: int = 400) -> Tensor:
    """The code of each point of the plane, (side, side), x and y from -reach to reach."""
    line = torch.linspace(-reach, reach, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return quantizer.search(torch.stack([x, y])[None]).view(side, side)


def features_of_two_numbers() -> Tensor:
    """Features (600, 2) of four kinds."""
    return 0.6 * MEANS.repeat(150, 1) + 0.25 * noise(600)


def quantizers(features: Tensor) -> dict[str, Quantizer]:
    """A codebook that is learned from features (N, 2), and two without a codebook."""
    return {
        "codebook of 25": learned_codebook(features),
        "FSQ, levels 5 5": FSQuantizer(FSQConfig(levels=(5, 5))),
        "LFQ, 2 bits": LookupFreeQuantizer(LookupFreeConfig(bits=2)),
    }


def code_vectors(quantizer: Quantizer) -> Tensor:
    """What the decoder sees of each code, (V, d)."""
    codes = torch.arange(quantizer.vocab_size)[None]
    return rearrange(quantizer.lookup(codes, 1, codes.shape[1]).detach(), "1 d 1 v -> v d")


def draw_cells(folder: Path) -> None:
    """The cells of a learned codebook, of FSQ and of LFQ, over the same features."""
    reach, features = 2.2, features_of_two_numbers()
    figure, row = plt.subplots(1, 3, figsize=(9, 3.3))
    for axes, (name, quantizer) in zip(row, quantizers(features).items(), strict=True):
        codes = cells(quantizer, reach)
        edges = torch.zeros_like(codes, dtype=torch.bool)
        edges[:, 1:] |= codes[:, 1:] != codes[:, :-1]
        edges[1:] |= codes[1:] != codes[:-1]
        axes.imshow(edges, cmap="Greys", extent=(-reach, reach) * 2, origin="lower")
        axes.scatter(*features.T, s=2, color=COLOURS[0], alpha=0.4, linewidths=0)
        axes.scatter(*code_vectors(quantizer).T, s=14, color="black")
        used = len(quantizer.search(features[..., None, None]).unique())
        title = f"{name}: {used} of {quantizer.vocab_size} codes used"
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[])
    save(figure, folder / "cells.png")


def linear_vae(std: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """The VAE z = gain x + tau noise, x' = back z of numbers x ~ N(0, std^2), each of its own std
    (C,), that minimises the mean of (x' - x)^2 + weight KL: gain, tau and back, each (C,).

    A number with 2 std^2 < weight is given up: its latent is N(0, 1) whatever x is.
    """
    variance = (weight / (2 * std**2)).clamp(max=1)
    gain = (1 - variance).sqrt() / std
    return gain, variance.sqrt(), gain * std**2


def rate_and_error(std: Tensor, weight: float) -> tuple[float, float]:
    """The mean KL in nats, and the mean of |x' - x|^2, of `linear_vae`."""
    gain, tau, back = linear_vae(std, weight)
    mean = (gain * std)[None, :, None, None]  # x = std: its square is the mean square of x
    kl = DiagonalGaussian(mean, 2 * tau.log()[None, :, None, None]).kl()
    return kl.item(), (((back * gain - 1) * std) ** 2 + (back * tau) ** 2).sum().item()


def draw_kl(folder: Path) -> None:
    """The posteriors of 40 data at three weights of the KL term, and what the weight trades."""
    std, weights = torch.tensor([1.0, 0.3], dtype=torch.float64), (0.004, 0.06, 0.4)
    figure, row = plt.subplots(1, 1 + len(weights), figsize=(9, 2.6))
    for axes, weight in zip(row, weights, strict=False):
        gain, tau, _ = linear_vae(std, weight)
        axes.add_patch(Ellipse((0, 0), 2, 2, fill=False, linestyle="dashed"))  # the prior
        for centre in gain * std * noise(40):
            axes.add_patch(Ellipse(centre.tolist(), *(2 * tau).tolist(), alpha=0.3))
        axes.set(title=f"w = {weight:g}", aspect="equal", xticks=[], yticks=[])
        axes.set(xlim=(-3.4, 3.4), ylim=(-3.4, 3.4))
    curve = [rate_and_error(std, weight) for weight in torch.logspace(-3.3, 0.31, 100).tolist()]
    row[-1].semilogy(*zip(*curve, strict=True), color="grey")
    for weight in weights:
        rate, error = rate_and_error(std, weight)
        row[-1].scatter(rate, error, color=COLOURS[0], zorder=2)
        row[-1].annotate(f"w = {weight:g}", (rate + 0.4, error))
    row[-1].set(xlabel="KL (nats)", ylabel="squared error", xlim=(-0.3, 11))
    save(figure, folder / "kl.png")


def heldout(data: str, names: tuple[str, ...], size: int, channels: int) -> Tensor:
    """Held-out pictures (B, C, size, size) of an embedded set, by their names."""
    pictures = DataOptions(data=data).dataset("heldout", size, channels=channels)
    indices = [i for i in range(len(pictures)) if pictures.name(i) in names]
    (batch,) = pictures.batches_of(indices, len(names))
    return batch.images


def with_error(change: Callable[[float], Tensor], images: Tensor, error: float) -> Tensor:
    """The change of images whose strength, 0 to 8, makes the mean squared error what is asked."""
    low, high = 0.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        if (change(middle) - images).square().mean() < error:
            low = middle
        else:
            high = middle
    return change(high)


def changed(images: Tensor) -> dict[str, Tensor]:
    """Images (B, C, H, W), and changes of them with the squared error of a shift by two pixels."""
    shifted, normal = images.roll(2, -1), torch.Generator().manual_seed(0)
    disturbance = torch.randn(images.shape, generator=normal)
    changes: dict[str, Callable[[float], Tensor]] = {
        "darker": lambda strength: (images - strength).clamp(min=-1),
        "noise": lambda strength: (images + strength * disturbance).clamp(-1, 1),
        "blur": lambda strength: gaussian_blur(images, [25, 25], [strength + 0.01] * 2),
    }
    error = (shifted - images).square().mean().item()
    equal = {name: with_error(change, images, error) for name, change in changes.items()}
    return {"picture": images, "shift": shifted, **equal}


def draw_losses(folder: Path) -> None:
    """A picture, and changes of it that are equal to L2 and not to LPIPS."""
    images = heldout("emoji", EMOJI, 64, 3)
    versions = changed(images)
    lpips = LPIPS.from_embedded()
    labels = [f"{name}: {lpips(x, images).item():.3f}" for name, x in versions.items()]
    file = folder / "losses.png"
    row = torch.cat([*versions.values()])
    image_grid(row, len(row), column_labels=labels, scale=2).save(file, optimize=True)
    print(file)


def scales_of(images: Tensor) -> list[Tensor]:
    """Images (B, 1, 32, 32), decoded from their first scale, the first two and so on; and as they
    are."""
    tokenizer = smalti.Tokenizer.from_pretrained(MULTI_SCALE)
    codes = tokenizer.store(images)
    return [tokenizer.preview(codes, 1 + k) for k in range(len(tokenizer.grids))] + [images]


def draw_scales(folder: Path) -> None:
    """Held-out pictures, decoded from their first scales."""
    columns = torch.stack(scales_of(heldout("fashion", FASHION, 32, 1)), 1)  # (B, k, 1, H, W)
    grids = smalti.Tokenizer.from_pretrained(MULTI_SCALE).grids
    labels = [f"{'+ ' * (h > 1)}{h} x {w}" for h, w in grids] + ["picture"]
    file = folder / "scales.png"
    grid = image_grid(columns.flatten(0, 1), len(labels), column_labels=labels, scale=3)
    grid.save(file, optimize=True)
    print(file)


def save(figure: matplotlib.figure.Figure, file: Path) -> None:
    """Write a figure without a date, so that equal figures are equal files."""
    figure.tight_layout()
    figure.savefig(file, dpi=100, metadata={"Software": None})
    plt.close(figure)
    print(file)


# -------------------------------------------------------------------------------------------------
# Pictures that grow: previews of pipelines after some of their steps


def previews(pipe: Pipeline, given: list[Any], columns: int) -> list[Tensor]:
    """Images (B, C, H, W) in [0, 1] of classes or captions after steps that are evenly apart, the
    last one included."""
    seen: list[Tensor] = []

    def watch(pipe: Pipeline, step: int, share: float, kwargs: dict[str, Tensor]) -> None:
        if int(share * columns) > len(seen):
            seen.append(pipe.preview(kwargs["latents"]))

    generators = [torch.Generator().manual_seed(row) for row in range(len(given))]
    name = "prompt" if "text" in pipe.prior.condition_kinds else "class_labels"
    pipe(**{name: given}, generator=generators, callback_on_step_end=watch)
    return seen


def draw_growth(folder: Path, model: str, given: list[Any], columns: int = 6) -> None:
    """A row for each class or caption: the picture after each sixth of the steps."""
    pipe = Pipeline.from_pretrained(model)
    images = torch.stack(previews(pipe, given, columns))  # (columns, B, C, H, W)
    rows = rearrange(images, "k b c h w -> (b h) (k w) c").repeat_interleave(2, 0)
    pixels = (rows.repeat_interleave(2, 1).clamp(0, 1) * 255).round().to(torch.uint8)
    file = folder / f"growth-{PRIORS.name_of(type(pipe.prior))}.png"
    Image.fromarray(pixels.numpy()).save(file, optimize=True)
    print(file)


FIGURES = (
    draw_coefficients,
    draw_paths,
    draw_solvers,
    draw_stochastic,
    draw_guidance,
    draw_reflow,
    draw_orders,
    draw_cells,
    draw_kl,
    draw_losses,
    draw_scales,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("docs/methods"))
    parser.add_argument("--model", help="a pipeline: draw the growth of its pictures instead")
    parser.add_argument("--given", nargs="+", help="classes, or captions, of these pictures")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.model:
        given = [int(text) if text.isdigit() else text for text in args.given]
        draw_growth(args.output_dir, args.model, given)
        return
    for draw in FIGURES:
        draw(args.output_dir)


if __name__ == "__main__":
    main()
