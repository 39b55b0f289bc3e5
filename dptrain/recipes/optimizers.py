"""Optimizers side by side, over several seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dptrain.bench import Case
from dptrain.recipes.study import Scale

AVERAGE = 0.95
SEEDS = 5

#: by what is compared. Learning rates are the best of factors of two to four apart, for the last weights, on
#: a fifth of the training digits that was held out; the test digits were not read.
WAYS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 2.0},
    "momentum": {"optimizer": "momentum", "lr": 0.25},
    "adam": {"optimizer": "adam", "lr": 0.03},
    "adam-bc": {"optimizer": "adam-bc", "lr": 0.01},
    "sgd, DiSK": {"optimizer": "sgd", "denoise": 0.5, "lr": 4.0},
}

_SHARED: dict[str, Any] = {
    "data": "digits",
    "epsilon": 2.0,
    "delta": 1e-4,
    "logical_batch_size": 256,
    "clip_norm": 0.5,
}
_STEPS: dict[Scale, int] = {"small": 100, "paper": 400}


def optimizers(scale: Scale) -> list[Case]:
    """Each of `WAYS`, with the last weights and with their average, by a small network on digits."""
    base = Case("accuracy", model="mlp", image_size=8, num_classes=10, accumulate=1, batch_size=256)
    base = replace(base, seeds=SEEDS, device="cpu" if scale == "small" else "cuda")
    shared = _SHARED | {"steps": _STEPS[scale], "epochs": None}
    return [
        replace(base, settings=tuple((shared | way | {"weight_average": average}).items()))
        for way in WAYS.values()
        for average in (0.0, AVERAGE)
    ]
