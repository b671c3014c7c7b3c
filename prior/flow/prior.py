"""Flow and diffusion prior: a network that predicts velocity, noise, score or data on a path from
noise to latents (flow matching, 2210.02747; DDPM, 2006.11239; SiT, 2401.08740).

Time t runs from 0, noise, to 1, data: x_t = alpha(t) x_1 + sigma(t) x_0 with x_0 ~ N(0, I). The
parts are independent and have a file each: paths, predictions, training times and loss weights,
solvers and their time grids, guidance, likelihood, and the network. `FlowPrior.forward` is the
training objective, `FlowPrior.sample` integrates the dynamics from noise to data.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from smalti.config import plain
from smalti.data.latents import ContinuousSpec, LatentSpec, as_tensor
from smalti.errors import DataError, GenerationError
from smalti.prior.adaln import KeptConditions
from smalti.prior.base import Loss, Prior
from smalti.prior.conditions.base import Condition, count, moved, part_of, vector_kinds
from smalti.prior.conditions.text import CaptionEmbedding
from smalti.prior.flow.classifier import LatentClassifier
from smalti.prior.flow.config import PRESETS, FlowConfig
from smalti.prior.flow.dit import DiT
from smalti.prior.flow.editing import KnownLatents
from smalti.prior.flow.guidance import Classifier, ClassifierFree, classifier_free, with_classifier
from smalti.prior.flow.likelihood import (
    bits_per_dimension,
    exact_divergence,
    hutchinson_divergence,
    log_likelihood,
    rademacher_probes,
)
from smalti.prior.flow.path import DDPMPath, expand_like, interpolated_log_variance, transitions
from smalti.prior.flow.prediction import (
    Dynamics,
    Estimate,
    exact_times,
    prediction_target,
    time_range,
    times_of_samples,
)
from smalti.prior.flow.solvers.base import ODESolver, Solver, make_solver, shared_time
from smalti.prior.flow.solvers.schedules import Schedule, make_schedule
from smalti.prior.flow.times import loss_weight, times_and_noise
from smalti.prior.sampling import OnStep, after_step
from smalti.randomness import Generators, NormalSource, RandomInputs

__all__ = ["PRESETS", "FlowConfig", "FlowPrior"]

# -------------------------------------------------------------------------------------------------
# Learned variances of DDPM steps (improved DDPM, 2102.09672, section 3.1): L_simple + lambda L_vlb
#
# A network with twice the channels of the latents predicts noise or velocity, and also the variance
# of the next step, as a position between beta_tilde and beta (eq. 15). The squared error does not
# depend on these channels; they are trained by a term of the variational bound (eq. 16),
#
#     KL(q(x_s | x_t, x_1) || p(x_s | x_t)),  s one step of the chain after t,
#
# whose gradient does not reach the prediction.

LAMBDA = 1e-3  # weight of L_vlb, a sum over the steps of the chain (eq. 16)


def bound_weight(path: DDPMPath) -> float:
    """Weight of the mean bound of one step beside the squared error: lambda times T steps."""
    return LAMBDA * path.num_train_timesteps


def variance_bound(path: DDPMPath, estimate: Estimate, data: Tensor, noise: Tensor) -> Tensor:
    """The KL divergence of the steps from x_t (B, C, h, w), in bits per element: (B,).

    0 where the step would go beyond index 0 of the chain: the last step, to the data, is not
    stochastic.
    """
    t, step = exact_times(estimate.t), 1 / path.num_train_timesteps
    last = 1 - 2 * step  # time of index 1, from which a step leads to index 0
    start = t.clamp_max(last)
    to = transitions(path, start, start + step)
    log_beta_tilde, log_beta = (expand_like(v.log(), data) for v in (to.beta_tilde, to.beta))
    log_variance = interpolated_log_variance(
        estimate.variance_output.float(), log_beta_tilde, log_beta
    )
    # Difference of the two means; detached, so that only the variance is trained here.
    difference = expand_like(to.alpha, data) * (data - estimate.data.detach())
    difference = difference + expand_like(to.noise_weight, data) * (noise - estimate.noise.detach())
    nats = (log_variance - log_beta_tilde + (log_beta_tilde - log_variance).exp() - 1) / 2
    nats = nats + difference.square() * (-log_variance).exp() / 2
    return torch.where(t < last + 1e-9, nats.flatten(1).mean(1) / math.log(2), 0.0)


# -------------------------------------------------------------------------------------------------
# Sampling


def sampled(
    dynamics: Dynamics,
    solver: Solver,
    times: Tensor,
    noise: Tensor,
    normal: NormalSource,
    kept: KnownLatents | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Samples (B, C, h, w) at t = 1 from noise x_0, along the times (N + 1,); or, if `on_step`
    stops sampling, x_t at the time of that step."""
    x = dynamics.path.marginal_std(times[0]).item() * noise  # x_t at the first time
    states = solver.states
    if kept is not None:
        kept, times = kept.to(x.device), kept.times(times)
        x = kept.start(dynamics.path, x, times[0].item(), noise)
        states = partial(kept.states, solver, noise=noise)
    coming = iter(states(dynamics, x, times, normal))
    for done in range(1, len(times)):
        x = next(coming)
        if on_step is None:
            continue
        with _known_estimate(dynamics, times[done].item()):
            given, goes_on = after_step(on_step, done, len(times) - 1, x.clone())
        if given is not None:
            x, coming = given, iter(states(dynamics, given, times[done:], normal))
        if not goes_on:
            return x
    if times[-1] < 1:  # from the end of the time range to the expected data
        x = dynamics.estimate(x, shared_time(times[-1].item())).data
    return x if kept is None else kept.finished(x)


# E[x_1 | x_t] of x_t at the time of the step after which an `on_step` is being called.
_ESTIMATE: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("estimate", default=None)


@contextmanager
def _known_estimate(dynamics: Dynamics, time: float) -> Iterator[None]:
    """Let `FlowPrior.estimated` use these dynamics at this time."""

    def estimate(x: Tensor) -> Tensor:
        return x if time >= 1 else dynamics.estimate(x, shared_time(time)).data

    token = _ESTIMATE.set(estimate)
    try:
        yield
    finally:
        _ESTIMATE.reset(token)


# -------------------------------------------------------------------------------------------------
# The prior


class FlowPrior(Prior):
    """p(latents | condition): the distribution at t = 1 of a flow from Gaussian noise."""

    Config: ClassVar[type] = FlowConfig
    PRESETS: ClassVar[Mapping[str, FlowConfig]] = PRESETS
    class_table: str = "network.y_embedder.embedding_table.weight"
    compiled_parts: ClassVar[tuple[str, ...]] = ("network",)
    row_options: ClassVar[tuple[str, ...]] = ("noise", "known", "known_mask", "classifier_labels")
    config: FlowConfig

    @classmethod
    def supports(cls, spec: LatentSpec) -> bool:
        """Continuous latents."""
        return isinstance(spec, ContinuousSpec)

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.network = DiT(
            config.network,
            config.text,
            config.image_channels,
            vector_kinds(config.conditions, config.network.width),
            config.label_dropout > 0,
            config.grids[1:],
        )
        # The times at which the network is trained and evaluated
        self.time_range = time_range(config.path, config.prediction)

    def adapt_positions(self, weights: dict[str, Tensor], source: Any) -> str:
        """Positions are computed, not learned: there is nothing to change."""
        del weights, source
        kind = {"both": "sine-cosine and rotary"}.get(self.config.network.positions)
        rows, columns = self.config.network.token_grid
        return (
            f"its {kind or self.config.network.positions} positions are extended to "
            f"{rows} x {columns} tokens"
        )

    @property
    def positions_are_computed(self) -> bool:
        """Sine-cosine and rotary positions are."""
        return True

    def adapt_conditions(self, weights: dict[str, Tensor], source: Any) -> str:
        """As in other priors. The input weights of new pictures are zero: samples are those of
        `source` at first."""
        name = "network.x_embedder.proj.weight"
        if self.config.image != source.config.image:
            channels, ours = self.config.spec.channels, self.state_dict()[name].clone()
            theirs = weights[name][:, :channels]
            if theirs.shape == ours[:, :channels].shape:
                ours[:, :channels] = theirs
                weights[name] = ours
        return super().adapt_conditions(weights, source)

    @property
    def captions(self) -> CaptionEmbedding | None:
        """The embedding of captions, if there are any."""
        return self.network.caption_embedder

    @property
    def vectors(self) -> torch.nn.ModuleDict:
        """The embeddings of other conditions, see `vector_kinds`."""
        return self.network.vectors

    # -- training -----------------------------------------------------------------------------

    def sample_random_inputs(
        self,
        count: int,
        generator: torch.Generator,
        grid: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """Uniforms in [0, 1) for label dropout and for times, (B,), and noise (B, C, h, w).

        Args:
            grid: (h, w) of the latents; None: that of `spec`.
        """
        spec, options = self.config.spec, {"generator": generator, "device": generator.device}
        random_inputs = {}
        if self.config.label_dropout:
            random_inputs["label_dropout"] = torch.rand(count, **options)
        random_inputs["times"] = torch.rand(count, **options)
        shape = (count, spec.channels, *(grid or (spec.height, spec.width)))
        random_inputs["noise"] = torch.randn(shape, **options)
        return random_inputs

    def forward(
        self, latents: Tensor, condition: Condition, random_inputs: RandomInputs | None = None
    ) -> Loss:
        """The weighted squared error of the prediction (conditional flow matching, 2210.02747,
        eq. 9; DDPM, 2006.11239, eq. 14), averaged over times and elements. On a DDPM path the bound
        on the variances is added if the network predicts them.

        In eval mode times and noise are the same at every call, so that validation losses are
        comparable.

        Args:
            latents: x_1, (B, C, h, w).
            condition: one for each latent; classes and captions are dropped at random in training.
            random_inputs: rows of what `sample_random_inputs` returns, one per latent. A missing
                key is sampled here, from torch's global generators. For reflow, "noise" is the
                x_0 that belongs to each latent.
        """
        latents, condition = as_tensor(latents), as_tensor(condition)
        self._check_latents(latents, "latents")
        self.check_condition(condition, len(latents))
        latents, inputs = latents.float(), dict(random_inputs or {})
        kept = self.drop(condition, self.config.label_dropout, inputs.get("label_dropout"))
        if "times" not in inputs or "noise" not in inputs:
            inputs = {**times_and_noise(latents, fixed=not self.training), **inputs}
        self._check_latents(inputs["noise"], "noise", len(latents))
        noise = inputs["noise"].float()
        path, prediction, within = self.config.path, self.config.prediction, self.time_range
        # Uniforms (B,) become times (B,) of the configured distribution.
        t = within.start + (within.end - within.start) * self.config.times.quantile(inputs["times"])
        x = path.mix(latents, noise, t)
        estimate = Estimate(path, prediction, x, t, self._network_at(x, t, kept))
        target = prediction_target(prediction, path, latents, noise, t)
        error = (estimate.value - target).square().flatten(1).mean(1)  # (B,)
        weight = loss_weight(self.config.loss_weight, path, prediction, t)
        loss = Loss((weight * error).mean(), {"mse": error.detach().mean()})
        if not (self.config.predicts_variance and isinstance(path, DDPMPath)):
            return loss
        bound = variance_bound(path, estimate, latents, noise).mean()
        parts = {**loss.parts, "variance_bound": bound.detach()}
        return Loss(loss.total + bound_weight(path) * bound, parts)

    def _network_at(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network at x_t (B, C, h, w) and times t (B,), or (1,), in [0, 1]: (B, C_out, h, w).

        Args:
            condition: of the samples, or `KeptConditions`.
        """
        t = exact_times(t)
        network_times = self._network_times(t)
        scaled = expand_like(self.config.path.input_scale(t), x) * x
        if isinstance(condition, KeptConditions):
            condition = condition.at(network_times)
        return self.network(scaled, times_of_samples(network_times, x).float(), condition)

    def _network_times(self, t: Tensor) -> Tensor:
        """Times t in [0, 1] in the units of the network."""
        return self.config.time_shift + self.config.time_scale * t

    def _check_latents(self, latents: Tensor, name: str, rows: int | None = None) -> None:
        """Raise `DataError` unless latents are floats (B, C, h, w); B = rows where given."""
        channels = self.config.spec.channels
        shapes = [(channels, *grid) for grid in self.config.grids]
        batch = latents.shape[:1] if rows is None else (rows,)
        fits = any(tuple(latents.shape) == (*batch, *shape) for shape in shapes)
        if not fits or not latents.is_floating_point():
            count = "B" if rows is None else rows
            taken = (f"({count}, {', '.join(map(str, shape))})" for shape in shapes)
            raise DataError(
                f"{name} of shape {tuple(latents.shape)} and type {latents.dtype} do not fit; "
                f"this prior takes {' or '.join(taken)} of floats"
            )

    # -- dynamics -----------------------------------------------------------------------------

    def dynamics(
        self,
        condition: Condition,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        classifier: Classifier | LatentClassifier | None = None,
        negative_condition: Condition | None = None,
        classifier_labels: Tensor | None = None,
        times: Sequence[float] | None = None,
    ) -> Dynamics:
        """The dynamics of conditions (B,) under guidance, for a solver.

        Args:
            times: without gradients: those at which the dynamics will be evaluated, as far as they
                are known. What does not depend on x_t is computed once, and for several of these
                times together. None keeps nothing.
        """
        condition, negative = as_tensor(condition), as_tensor(negative_condition)
        self.check_condition(condition)
        self.check_guidance(guidance_scale)
        config, device = self.config, next(self.parameters()).device
        negative = moved(self.unconditional(condition, negative), device)
        condition = moved(condition, device)
        options = ClassifierFree(guidance_scale, guidance_interval, config.guided_channels)
        kept = partial(self._kept, times) if times is not None else lambda condition: condition
        output = classifier_free(self._network_at, condition, negative, options, kept)
        if classifier is not None:
            labels = self._labels(condition) if classifier_labels is None else classifier_labels
            labels = as_tensor(labels).to(device)
            if isinstance(classifier, LatentClassifier):
                classifier = Classifier.of(classifier)
            if classifier.model is not None:
                classifier.model.check_prior(config)
                classifier.model.check_labels(labels)
            output = with_classifier(output, labels, classifier, config.path, config.prediction)
        return Dynamics(config.path, config.prediction, output)

    def _kept(self, times: Sequence[float], condition: Condition) -> KeptConditions:
        network_times = self._network_times(torch.tensor(times, dtype=torch.float64))
        return KeptConditions(self.network, condition, network_times.tolist())

    def _labels(self, condition: Condition) -> Tensor:
        """The class labels (B,) of a condition.

        Raises:
            GenerationError: it has none.
        """
        if "class" not in self.condition_kinds:
            raise GenerationError(
                "a classifier guides towards classes, and this prior has the condition "
                f"{self.config.condition}: give classifier_labels, or leave the classifier out"
            )
        return part_of(condition, "class")

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """dx/dt at x (B, C, h, w) and times t (B,), like x."""
        return self.dynamics(condition).estimate(x, t).velocity

    def score(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
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
            SmaltiError: steps is not an integer from 1, or the schedule is unknown or does not
                apply to this path.
        """
        steps = plain(steps)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise GenerationError(
                f"num_inference_steps is {steps!r}; it must be a whole number from 1"
            )
        within = self.time_range
        if solver.lands_on_data:  # it does not evaluate the network at the end
            within = replace(within, end=1.0)
        if schedule is None:
            steps_on_chain = solver.lands_on_data and isinstance(self.config.path, DDPMPath)
            schedule = "ddpm" if steps_on_chain else "uniform"
        return make_schedule(schedule).times(steps, self.config.path, within)

    # -- sampling -----------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        *,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        num_inference_steps: int = 50,
        solver: str | Mapping[str, Any] | Solver = "heun",
        schedule: str | Mapping[str, Any] | Schedule | None = None,
        noise: Tensor | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_condition: Condition | None = None,
        classifier: Classifier | LatentClassifier | None = None,
        classifier_labels: Tensor | None = None,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        strength: float = 1.0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Samples of the latents, (B, C, h, w) fp32, for conditions (B,).

        Args:
            guidance_scale: s in uncond + s (cond - uncond); 1 is off and costs no second pass.
            generator: one, or a list with one per sample, on any device. With a list, sample i
                depends on generator i alone. None is a new one with a random seed.
            num_inference_steps: intervals of the time grid; a solver of order n evaluates the
                network n times in each. Adaptive solvers choose their own.
            solver: a name in `SOLVERS`, "name:option=value,...", {"kind": name, option: value}, or
                a solver.
            schedule: a name in `SCHEDULES`, "name:option=value,...", {"kind": name, option: value},
                or a schedule. None is "ddpm" (ten steps of 1000 are the indices 900, 800, ..., 0)
                for a DDPM path and a solver that is not an ODE solver, and otherwise "uniform".
            noise: standard normal x_0 (B, C, h, w), on any grid that the prior was trained on;
                None samples it on that of `spec`.
            guidance_interval: the times, from 0, noise, to 1, data, between which s applies.
            negative_condition: what guidance leads away from, one for each sample; None: the null
                condition.
            classifier: adds classifier guidance; a trained model has the scale 1.
            classifier_labels: to which the classifier guides, (B,); None: the classes of the
                condition.
            known: latents (B, C, h, w) of given images, which are edited.
            known_mask: (B, 1, h, w) bool, True where the latents of `known` are kept.
            strength: of the noise that `known` gets where it is not kept: sampling starts at time
                1 - strength, and takes the later times of the grid; 1 starts from noise alone.
            on_step: called after every interval with the number of intervals done, their number,
                and x_t (B, C, h, w); what it returns replaces x_t. Inside it, `estimated` gives
                E[x_1 | x_t], by one evaluation of the network.

        Raises:
            SmaltiError: a label or an option is out of its range; the network's output is not
                finite.
        """
        condition, noise = as_tensor(condition), as_tensor(noise)
        guidance = (guidance_scale, guidance_interval, classifier, negative_condition)
        solver = make_solver(solver)
        solver.check(self.config.predicts_variance)
        times = self.time_grid(num_inference_steps, solver, schedule)
        evaluated = [*solver.evaluation_times(times), times[-1].item()]
        dynamics = self.dynamics(condition, *guidance, classifier_labels, evaluated)
        known = as_tensor(known)
        if known is not None:
            self._check_latents(known, "known", count(condition))
        kept = KnownLatents.checked(known, known_mask, strength, solver)
        normal = NormalSource(generator, count(condition))
        noise = self._starting_noise(
            noise, count(condition), normal, self._grid_of(condition, known)
        )
        if known is not None and noise.shape != known.shape:
            raise DataError(
                f"noise has shape {tuple(noise.shape)} and known {tuple(known.shape)}: give both "
                "on the same grid"
            )
        if not len(noise):
            return noise
        with self.evaluating():
            x = sampled(dynamics, solver, times, noise, normal, kept, on_step)
        return _finite(x)

    @torch.no_grad()
    def estimated(self, latents: Tensor) -> Tensor:
        """E[x_1 | x_t] of the latents x_t (B, C, h, w) that an `on_step` gets; outside it there is
        no time t, and they are returned as they are."""
        estimate = _ESTIMATE.get()
        return latents if estimate is None else estimate(latents)

    def _grid_of(self, condition: Condition, known: Tensor | None) -> tuple[int, int]:
        """(h, w) of new samples: that of latents or pictures which are given, or that of `spec`."""
        if known is None and "image" in self.condition_kinds:
            known = part_of(condition, "image").latents
        return self.config.network.grid if known is None else (known.shape[2], known.shape[3])

    def _starting_noise(
        self, given: Tensor | None, rows: int, normal: NormalSource, grid: tuple[int, int]
    ) -> Tensor:
        """The x_0 that was given, or new noise on a grid, (rows, C, h, w) fp32."""
        noise = self.initial_noise(rows, normal, grid) if given is None else given
        self._check_latents(noise, "noise", rows)
        return noise.to(next(self.parameters()).device, torch.float32)

    def initial_noise(
        self, rows: int, normal: NormalSource, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Standard normal x_0 (rows, C, h, w) on a grid; None: that of `spec`."""
        spec, device = self.config.spec, next(self.parameters()).device
        sides = grid or (spec.height, spec.width)
        return normal(torch.empty(rows, spec.channels, *sides, device=device))

    # -- likelihood ---------------------------------------------------------------------------

    @torch.no_grad()
    def bits_per_dimension(
        self,
        latents: Tensor,
        condition: Condition,
        *,
        num_inference_steps: int = 20,
        solver: str | Mapping[str, Any] | Solver = "heun",
        num_probes: int | None = 1,
        generator: Generators = None,
    ) -> Tensor:
        """-log2 p(latents | condition) per element of the latents (not per pixel): (B,).

        Args:
            latents: (B, C, h, w).
            condition: one for each of the latents.
            solver: an ODE solver, as for `sample`.
            num_probes: number of random probes of Hutchinson's unbiased trace estimate; None
                computes the exact trace, with one backward pass for each element of a latent.
            generator: of the probes; as for `sample`.

        Raises:
            SmaltiError: the latents have another shape, the solver is not an ODE solver, or
                num_probes is less than 1.
        """
        latents, num_probes = as_tensor(latents), plain(num_probes)
        self._check_latents(latents, "latents")
        solver = make_solver(solver)
        if not isinstance(solver, ODESolver):
            raise GenerationError(
                f"{solver} cannot compute a likelihood: use an ODE solver, like heun"
            )
        if num_probes is not None and num_probes < 1:
            raise GenerationError(
                f"num_probes is {num_probes}; give at least 1, or None for the exact trace"
            )
        dynamics, x = self.dynamics(condition), latents.to(next(self.parameters()).device).float()
        divergence = exact_divergence
        if num_probes is not None:
            normal = NormalSource(generator, len(x))
            divergence = hutchinson_divergence(rademacher_probes(num_probes, x, normal))
        times = self.time_grid(num_inference_steps, solver)
        with self.evaluating():
            nats = log_likelihood(dynamics, x, times, solver, divergence)
        return bits_per_dimension(nats, x[0].numel() if len(x) else 1)


def _finite(x: Tensor) -> Tensor:
    """The samples.

    Raises:
        GenerationError: one is not finite.
    """
    if not x.isfinite().all():
        raise GenerationError(
            "the model gives NaN or infinity: its weights are damaged or overflow their type, or "
            "guidance_scale is too large"
        )
    return x
