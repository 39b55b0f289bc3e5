"""A run that takes a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dptrain.training import TrainConfig


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Configurations of four-step runs of a linear model on digits, differing as asked."""

    def make(**changes) -> TrainConfig:
        settings = {
            "model": "linear",
            "steps": 4,
            "evaluations": 2,
            "logical_batch_size": 200,
            "physical_batch_size": 64,
            "noise_multiplier": 1.0,
            "clip_norm": 1.0,
            "lr": 0.5,
            "weight_average": 0.0,
            "seed": 1,
            "out": tmp_path / "run",
        }
        base = TrainConfig.from_dict(settings).without_rivals_of(changes)
        return replace(base, **changes)

    return make
