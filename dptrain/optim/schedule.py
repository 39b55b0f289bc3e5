"""Learning rates over steps."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""The factor on the learning rate, given the part of the run that is done, in [0, 1)."""


def build_schedule(name: str, optimizer: Optimizer, steps: int) -> LambdaLR:
    """A scheduler that is stepped once per logical step, `steps` times in all."""
    if name not in SCHEDULES:
        raise ValueError(f"There is no schedule {name!r}; choose from {', '.join(SCHEDULES)}.")
    factor = SCHEDULES[name]
    return LambdaLR(optimizer, lambda step: factor(min(step, steps) / steps))
