"""Flow and diffusion prior: a network that predicts velocity, noise, score or data on a path from
noise to latents (flow matching, 2210.02747; DDPM, 2006.11239; SiT, 2401.08740).

The parts are independent: paths, predictions, times and weights, solvers, schedules, guidance and
the network each have a file of their own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from smalti.data.latents import ContinuousSpec, LatentSpec
from smalti.errors import SmaltiError
from smalti.prior.base import Loss, Prior
from smalti.prior.flow.config import PRESETS, FlowConfig
from smalti.prior.flow.dit import DiT
from smalti.prior.flow.guidance import Classifier, ClassifierFree, classifier_free, with_classifier
from smalti.prior.flow.likelihood import (
    bits_per_dimension,
    exact_divergence,
    hutchinson_divergence,
    log_likelihood,
    signs,
)
from smalti.prior.flow.path import DDPMPath, expand_like, log_variance, transitions
from smalti.prior.flow.prediction import (
    Dynamics,
    Estimate,
    exact_times,
    of_data_and_noise,
    time_range,
)
from smalti.prior.flow.solvers.base import ODESolver, Solver, make_solver, times_of
from smalti.prior.flow.solvers.schedules import Schedule, make_schedule
from smalti.prior.flow.times import loss_weight
from smalti.randomness import Generators, NormalSource, RandomInputs

# -------------------------------------------------------------------------------------------------
# Training the variances of DDPM's steps (improved DDPM, 2102.09672, section 3.1).
#
# A network with twice the channels of the latents says, beside its prediction, where between
# beta~ and beta the variance of the next step lies. The squared error does not reach these
# channels; a term of the variational bound does: KL(q(x_s | x_t, x_1) || p(x_s | x_t)), where s
# is one step of the chain beyond t. Its gradient is kept from the prediction, which the squared
# error trains alone.

WEIGHT_OF_CHAIN = 1e-3  # lambda of the bound, a sum over the steps of the chain (eq. 16)


def bound_weight(path: DDPMPath) -> float:
    """What the mean bound of a step is multiplied by beside the squared error."""
    return WEIGHT_OF_CHAIN * path.num_train_timesteps


def variance_bound(path: DDPMPath, estimate: Estimate, data: Tensor, noise: Tensor) -> Tensor:
    """The bound on the steps from x_t (B, C, h, w), in bits per number: (B,).

    0 where the step would end beyond index 0 of the chain: that to the data draws nothing.
    """
    t, step = exact_times(estimate.t), 1 / path.num_train_timesteps
    last = 1 - 2 * step  # index 1, which steps to index 0
    start = t.clamp_max(last)
    to = transitions(path, start, start + step)
    log_small, log_large = (expand_like(v.log(), data) for v in (to.small, to.large))
    claimed = log_variance(estimate.surplus.float(), log_small, log_large)
    missed = expand_like(to.alpha, data) * (data - estimate.data.detach())
    missed = missed + expand_like(to.kept, data) * (noise - estimate.noise.detach())
    nats = (claimed - log_small + (log_small - claimed).exp() - 1) / 2
    nats = nats + missed.square() * (-claimed).exp() / 2
    return torch.where(t < last + 1e-9, nats.flatten(1).mean(1) / math.log(2), 0.0)


# -------------------------------------------------------------------------------------------------
# Flow and diffusion prior: a network that predicts velocity, noise, score or data on a path from
# noise to latents (flow matching, 2210.02747; DDPM, 2006.11239; SiT, 2401.08740).

__all__ = ["PRESETS", "FlowConfig", "FlowPrior"]


class FlowPrior(Prior):
    """p(latents | class), as the end of a flow that begins in Gaussian noise."""

    Config: ClassVar[type] = FlowConfig
    PRESETS: ClassVar[Mapping[str, FlowConfig]] = PRESETS
    class_table: ClassVar[str] = "network.y_embedder.embedding_table.weight"
    config: FlowConfig

    @classmethod
    def models(cls, spec: LatentSpec) -> bool:
        """Continuous latents."""
        return isinstance(spec, ContinuousSpec)

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.network = DiT(config.network)
        # The times at which the network is trained and asked.
        self.time_range = time_range(config.path, config.prediction)

    # -- training -----------------------------------------------------------------------------

    def sample_random_inputs(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Numbers in [0, 1) that drop labels, and that become times, (B,); noise (B, C, h, w)."""
        spec, options = self.config.spec, {"generator": generator, "device": generator.device}
        random_inputs = {}
        if self.config.label_dropout:
            random_inputs["label_dropout"] = torch.rand(count, **options)
        random_inputs["times"] = torch.rand(count, **options)
        random_inputs["noise"] = torch.randn(
            count, spec.channels, spec.height, spec.width, **options
        )
        return random_inputs

    def forward(
        self,
        latents: Tensor,
        condition: Tensor,
        noise: Tensor | None = None,
        random_inputs: RandomInputs | None = None,
    ) -> Loss:
        """The weighted squared error of the prediction, averaged over times and numbers; and on a
        DDPM path the bound on the variances, if the network predicts them.

        In eval mode times and noise are the same at every call, so that validation losses can be
        compared.

        Args:
            latents: (B, C, h, w).
            condition: labels (B,).
            noise: the x_0 of each latent, like latents: reflow; None draws it.
            drawn: rows of what `draw` returned, one for each latent; None draws here, from torch's
                global generators.
        """
        self.check_labels(condition)
        self._check_latents(latents, "latents")
        latents = latents.float()
        chance = random_inputs.get("label_dropout") if random_inputs else None
        labels = self.drop_labels(condition, self.config.label_dropout, chance)
        u, x0 = (
            (random_inputs["times"], random_inputs["noise"])
            if random_inputs
            else self._times_and_noise(latents)
        )
        noise = x0 if noise is None else noise.float()
        self._check_latents(noise, "noise")
        path, prediction, within = self.config.path, self.config.prediction, self.time_range
        t = within.start + (within.end - within.start) * self.config.times.quantile(u)
        x = path.mix(latents, noise, t)
        estimate = Estimate(path, prediction, x, t, self._output(x, t, labels))
        target = of_data_and_noise(prediction, path, latents, noise, t)
        error = (estimate.value - target).square().flatten(1).mean(1)
        weight = loss_weight(self.config.loss_weight, path, prediction, t)
        loss = Loss((weight * error).mean(), {"mse": error.detach().mean()})
        if not (self.config.predicts_variance and isinstance(path, DDPMPath)):
            return loss
        bound = variance_bound(path, estimate, latents, noise).mean()
        parts = {**loss.parts, "variance_bound": bound.detach()}
        return Loss(loss.total + bound_weight(path) * bound, parts)

    def _times_and_noise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform numbers (B,) for the times, and noise like latents."""
        if self.training:
            return torch.rand(len(latents), device=latents.device), torch.randn_like(latents)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(latents), generator=generator)  # every part of [0, 1] once
        noise = torch.randn(latents.shape, generator=generator)
        return ((order + 0.5) / len(latents)).to(latents), noise.to(latents)

    def _output(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The network at x (B, C, h, w) and times t (B,) from 0, noise, to 1, data."""
        t = exact_times(t)
        units = self.config.time_shift + self.config.time_scale * t
        return self.network(
            expand_like(self.config.path.input_scale(t), x) * x, units.float(), labels
        )

    def _check_latents(self, latents: Tensor, name: str) -> None:
        spec = self.config.spec
        expected = (spec.channels, spec.height, spec.width)
        if tuple(latents.shape[1:]) != expected or not latents.is_floating_point():
            raise SmaltiError(
                f"{name} have shape {tuple(latents.shape)} and type {latents.dtype}; "
                f"this prior takes (B, {', '.join(map(str, expected))}) of floats"
            )

    # -- the flow -----------------------------------------------------------------------------

    def dynamics(
        self,
        condition: Tensor,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        classifier: Classifier | None = None,
    ) -> Dynamics:
        """The flow of labels (B,), for a solver."""
        self.check_labels(condition)
        config = self.config
        labels = condition.to(next(self.parameters()).device)
        options = ClassifierFree(guidance_scale, guidance_interval, config.guided_channels)
        output = classifier_free(self._output, labels, self.num_classes, options)
        if classifier is not None:
            output = with_classifier(output, labels, classifier, config.path, config.prediction)
        return Dynamics(config.path, config.prediction, output)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """dx/dt at x (B, C, h, w) and times t (B,), like x."""
        return self.dynamics(condition).estimate(x, t).velocity

    def score(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The gradient of log p_t at x (B, C, h, w) and times t (B,), like x."""
        return self.dynamics(condition).estimate(x, t).score

    def time_grid(
        self,
        steps: int,
        solver: Solver,
        schedule: str | Mapping[str, Any] | Schedule | None = None,
    ) -> Tensor:
        """The times (steps + 1,) float64 at which a solver steps, ascending.

        Raises:
            SmaltiError: steps is not a whole number from 1, or the schedule is not known or not
                for this path.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise SmaltiError(f"num_inference_steps is {steps!r}; it must be a whole number from 1")
        within = self.time_range
        if solver.lands_on_data:
            within = replace(within, end=1.0)
        if schedule is None:
            chain = solver.lands_on_data and isinstance(self.config.path, DDPMPath)
            schedule = "ddpm" if chain else "uniform"
        return make_schedule(schedule).times(steps, self.config.path, within)

    # -- sampling -----------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        *,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        num_inference_steps: int = 50,
        solver: str | Mapping[str, Any] | Solver = "heun",
        schedule: str | Mapping[str, Any] | Schedule | None = None,
        noise: Tensor | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        classifier: Classifier | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Draw latents (B, C, h, w), fp32, for labels (B,).

        Args:
            guidance_scale: s in uncond + s (cond - uncond); 1 is off and costs no second pass.
            generator: one, or a list with one per sample: sample i then depends on its own only;
                on any device. None is a new one with a random seed.
            num_inference_steps: intervals of the time grid; a solver of order n evaluates the
                network n times in each. Adaptive solvers choose their own.
            solver: a name in `SOLVERS`, {"kind": name, option: value}, or a solver.
            schedule: a name in `SCHEDULES`, {"kind": name, option: value}, or a schedule; None:
                the steps of the chain, 0, 100, ..., 900 for ten, where a DDPM path is walked by
                ddpm or ddim, and else uniform times.
            noise: standard normal x_0 (B, C, h, w); None draws it.
            guidance_interval: times, from 0, noise, to 1, data, between which s applies.
            classifier: guides as well, where given.
            on_step: called with (intervals done, intervals) after every interval.

        Raises:
            SmaltiError: a label or an option out of its range; the model's output is not finite.
        """
        dynamics = self.dynamics(condition, guidance_scale, guidance_interval, classifier)
        solver = make_solver(solver)
        solver.check(self.config.predicts_variance)
        times = self.time_grid(num_inference_steps, solver, schedule)
        normal = NormalSource(generator, len(condition))
        rows = len(condition)
        x0 = self.initial_noise(rows, normal) if noise is None else self._check_noise(noise, rows)
        x = dynamics.path.marginal_std(times[0]).item() * x0
        if not len(x):
            return x
        with self.evaluating():
            for done, state in enumerate(solver.states(dynamics, x, times, normal), start=1):
                x = state
                if on_step is not None:
                    on_step(done, len(times) - 1)
            if times[-1] < 1:
                x = dynamics.estimate(x, times_of(times[-1].item(), x)).data
        if not x.isfinite().all():
            raise SmaltiError(
                "the model gives NaN or infinity: its weights are damaged or overflow their type, "
                "or guidance_scale is too large"
            )
        return x

    def initial_noise(self, rows: int, normal: NormalSource) -> Tensor:
        """Standard normal x_0 (rows, C, h, w)."""
        spec, device = self.config.spec, next(self.parameters()).device
        return normal(torch.empty(rows, spec.channels, spec.height, spec.width, device=device))

    def _check_noise(self, noise: Tensor, rows: int) -> Tensor:
        spec = self.config.spec
        shape = (rows, spec.channels, spec.height, spec.width)
        if tuple(noise.shape) != shape:
            raise SmaltiError(f"noise has shape {tuple(noise.shape)}; give {shape}")
        return noise.to(next(self.parameters()).device, torch.float32)

    # -- likelihood ---------------------------------------------------------------------------

    @torch.no_grad()
    def bits_per_dimension(
        self,
        latents: Tensor,
        condition: Tensor,
        *,
        num_inference_steps: int = 20,
        solver: str | Mapping[str, Any] | Solver = "heun",
        num_probes: int | None = 1,
        generator: Generators = None,
    ) -> Tensor:
        """-log2 p(latents | labels) per number, (B,); of latents, not of pixels.

        Args:
            latents: (B, C, h, w).
            condition: labels (B,).
            solver: an ODE solver, as for `sample`.
            num_probes: random probes of Hutchinson's trace estimate, which is unbiased; None takes
                the exact trace, with as many backward passes as a latent has numbers.
            generator: of the probes; as for `sample`.

        Raises:
            SmaltiError: latents, solver or num_probes do not fit.
        """
        self._check_latents(latents, "latents")
        solver = make_solver(solver)
        if not isinstance(solver, ODESolver):
            raise SmaltiError(f"{solver} cannot give a likelihood: use an ODE solver, like heun")
        if num_probes is not None and num_probes < 1:
            raise SmaltiError(f"num_probes is {num_probes}; give at least 1, or None for exact")
        dynamics, x = self.dynamics(condition), latents.to(next(self.parameters()).device).float()
        divergence = exact_divergence
        if num_probes is not None:
            normal = NormalSource(generator, len(x))
            divergence = hutchinson_divergence(signs(num_probes, x, normal))
        times = self.time_grid(num_inference_steps, solver)
        with self.evaluating():
            nats = log_likelihood(dynamics, x, times, solver, divergence)
        return bits_per_dimension(nats, x[0].numel() if len(x) else 1)
