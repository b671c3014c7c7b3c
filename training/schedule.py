"""Learning-rate schedule as a pure function of the step: nothing to save, nothing to restore."""

import math


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, final_ratio: float) -> float:
    """Learning rate at a step.

    Rises linearly to `peak` over `warmup` steps, then falls along half a cosine to
    `final_ratio * peak` at `total` (Loshchilov and Hutter, 1608.03983). Constant from there.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return peak * (final_ratio + (1 - final_ratio) * cosine)
