"""Exponential moving averages of weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` that follows it: call `.update_parameters(model)` after each step.

    Averaging the iterates removes part of the noise at no cost in privacy (De et al. 2022,
    "Unlocking high-accuracy differentially private image classification through scale").

    decay: in (0, 1); about 1 / (1 - decay) steps are averaged. After n steps it is at most
    (1 + n) / (10 + n), so that the average of a short run is not held back by its first weights.
    """
    if not 0 < decay < 1:
        raise ValueError(f"The decay of the weight average is {decay}: give a number between 0 and 1.")

    def towards(average: torch.Tensor, current: torch.Tensor, steps: torch.Tensor | int) -> torch.Tensor:
        return average + (1 - warmed_decay(decay, int(steps))) * (current - average)

    return AveragedModel(model, avg_fn=towards)


def warmed_decay(decay: float, steps: int) -> float:
    """The decay after so many steps: less in the beginning."""
    return min(decay, (1 + steps) / (10 + steps))
