"""What a caller sees of sampling, step by step: callbacks as in Diffusers, progress bars, previews.

    def show(pipe, step, progress, kwargs):
        images = pipe.preview(kwargs["latents"])
        pipe.interrupt = step == 9  # the remaining steps are skipped
        return {"latents": kwargs["latents"]}  # may be other latents

    pipe("cat", callback_on_step_end=show)

A step is a code of a next-token prior, a scale of a next-scale prior, an interval of a flow prior's
solver.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from smalti.data.latents import CodeSpec, LatentSpec
from smalti.errors import GenerationError
from smalti.prior.base import Prior
from smalti.prior.sampling import OnStep, StopSampling
from smalti.tokenizer.base import Tokenizer

TENSOR_INPUTS = ("latents",)  # what a callback can be given

# Called with the pipeline, the index of the step from 0, the share of the steps that are done, in
# (0, 1], and the tensors by name; it may return a mapping with other tensors.
Callback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]


@dataclass
class Progress:
    """The state of a pipeline that callbacks, progress bars and `interrupt` share."""

    interrupt: bool = False
    steps: int = 0  # of a batch, in the running or last call
    bar: dict[str, Any] = field(default_factory=lambda: {"disable": True})  # options of tqdm


class Steps:
    """One call of a pipeline, step by step; a context manager that closes the progress bar and
    releases the accelerator.

    Args:
        batches: how many batches the call samples, one after the other.
        shown: whether there is a progress bar; None: as `set_progress_bar_config` says.
    """

    def __init__(
        self,
        pipeline: Any,
        state: Progress,
        batches: int,
        shown: bool | None,
    ) -> None:
        self.pipeline, self.state, self.batches = pipeline, state, batches
        self.on_step: OnStep | None = None
        self.has_steps = "on_step" in inspect.signature(pipeline.prior.sample).parameters
        config = dict(state.bar)
        if shown is not None:
            config["disable"] = not shown
        unit = "step" if self.has_steps else "batch"
        self.bar: tqdm = tqdm(**{"total": batches, "unit": unit, **config})
        state.interrupt = False

    def call(self, on_step: OnStep | None) -> None:
        """Call the `on_step` of the prior's `sample`, if the call has one."""
        self.on_step = on_step

    def call_back(self, callback: Callback | None, inputs: Sequence[str]) -> None:
        """Call a callback after each step, with these tensors.

        Raises:
            GenerationError: it cannot be given them; the prior has no steps; there is an `on_step`.
        """
        if callback is None:
            return
        unknown = [name for name in inputs if name not in TENSOR_INPUTS]
        if unknown:
            raise GenerationError(
                f"callback_on_step_end_tensor_inputs has {unknown[0]!r}; a callback gets "
                f"{' and '.join(TENSOR_INPUTS)}"
            )
        if not self.has_steps:
            kind = Prior.registry.name_of(type(self.pipeline.prior))
            raise GenerationError(
                f"a {kind} prior samples in one step: leave out callback_on_step_end"
            )
        if self.on_step is not None:
            raise GenerationError("give on_step or callback_on_step_end, one of them")

        def on_step(step: int, total: int, latents: Tensor) -> Tensor | None:
            given = dict.fromkeys(inputs, latents)
            returned = callback(self.pipeline, step - 1, step / total, given)
            if returned is not None and not isinstance(returned, Mapping):
                raise GenerationError(
                    f"callback_on_step_end returned a {type(returned).__name__}: it must return "
                    '{"latents": ...}, or None'
                )
            # As in Diffusers, latents that are changed in place and not returned do not count.
            return (returned or {}).get("latents")

        self.on_step = on_step

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        self.pipeline.release()

    @property
    def options(self) -> dict[str, OnStep]:
        """The `on_step` of the prior's `sample`, if anyone wants to know of the steps."""
        wanted = self.on_step is not None or not self.bar.disable
        return {"on_step": self._after} if wanted and self.has_steps else {}

    def batch_is_done(self) -> None:
        """Called after each batch."""
        if not self.has_steps:
            self.bar.update()

    def _after(self, step: int, total: int, latents: Tensor) -> Tensor | None:
        self.state.steps = total
        self.bar.total = self.batches * total
        self.bar.update()
        changed = None if self.on_step is None else self.on_step(step, total, latents)
        if self.state.interrupt:
            raise StopSampling(changed)
        return changed


def preview(tokenizer: Tokenizer, spec: LatentSpec, latents: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] of the codes so far, or of other latents. Positions without a
    code are zero vectors."""
    if not isinstance(spec, CodeSpec):
        return tokenizer.decode(latents).float().clamp(-1, 1)
    missing = latents < 0
    if len(spec.grids) > 1 and hasattr(tokenizer, "preview"):
        sampled = [not part.any() for part in missing.split(spec.lengths, 1)]
        done = sampled.index(False) if False in sampled else len(sampled)
        show: Any = tokenizer.preview  # of tokenizers with several scales
        return show(latents[:, : sum(spec.lengths[:done])], done).float()
    vectors = tokenizer.vectors(latents.clamp(min=0))  # (B, d, h, w)
    mask = missing[:, -vectors[0, 0].numel() :].view(len(latents), 1, *vectors.shape[2:])
    return tokenizer.decode_vectors(vectors.masked_fill(mask, 0)).float().clamp(-1, 1)
