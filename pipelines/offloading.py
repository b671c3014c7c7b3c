"""Models that wait in the memory of the CPU, and are on the accelerator while they run, one at a
time: accelerate's hooks, as in Diffusers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from smalti.errors import ConfigurationError
from smalti.weights import unwrapped

ATTRIBUTE = "offloading"  # of a model that is offloaded


class Offloading:
    """Hooks on models, which move to the device when they are used. The models know it, so that all
    pipelines of the same models share it.

    Args:
        device: of the accelerator; None: the one that the machine has.

    Raises:
        ConfigurationError: there is none.
    """

    def __init__(self, models: Sequence[nn.Module], device: torch.device | str | None) -> None:
        from accelerate import cpu_offload_with_hook

        if device is None:
            found = torch.accelerator.current_accelerator(check_available=True)
            if found is None:
                raise ConfigurationError(
                    "enable_model_cpu_offload moves models to an accelerator, and this machine has "
                    "none: leave it out"
                )
            device = found
        self.device = torch.device(device)
        self._hooks: list[tuple[nn.Module, Any]] = []
        for model in map(unwrapped, models):
            if (before := vars(model).get(ATTRIBUTE)) is not None:
                before.remove()
            model.to("cpu")
            self._hooks.append((model, cpu_offload_with_hook(model, self.device)[1]))
            vars(model)[ATTRIBUTE] = self

    @staticmethod
    def of(models: Sequence[nn.Module]) -> "Offloading | None":
        """That of models; None unless all of them have the same."""
        first, *others = (vars(unwrapped(model)).get(ATTRIBUTE) for model in models)
        return first if all(other is first for other in others) else None

    def use(self, model: nn.Module) -> None:
        """Move a model to the device, and the others off it."""
        for other, hook in self._hooks:
            if other is not unwrapped(model):
                hook.offload()
        for own, hook in self._hooks:
            if own is unwrapped(model):
                hook.hook.pre_forward(own)

    def release(self) -> None:
        """Move all models off the device."""
        for _, hook in self._hooks:
            hook.offload()

    def remove(self) -> None:
        """Take the hooks off the models."""
        for model, hook in self._hooks:
            hook.remove()
            vars(model).pop(ATTRIBUTE, None)
