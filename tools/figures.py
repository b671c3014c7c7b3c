"""Draw the figures of docs/methods.

    python tools/figures.py                                           # in two dimensions
    python tools/figures.py --model runs/demo/pipeline --given 0 3 7  # a picture that grows

In two dimensions, the data are a mixture of four narrow Gaussians, two of each class, so that the
expectations that a network would learn are known in closed form: nothing is trained. Paths, solvers
and guidance are those of `smalti.prior.flow`. A pipeline shows how its pictures grow. It needs
pip install 'smalti[docs]'.
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

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

MEANS = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]], dtype=torch.float64)
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
