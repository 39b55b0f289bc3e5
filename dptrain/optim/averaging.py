"""Exponential moving averages of weights."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` that follows it: call `.update_parameters(model)` after each step.

    Averaging the iterates removes part of the noise at no cost in privacy (De et al. 2022,
    "Unlocking high-accuracy differentially private image classification through scale").
    decay: in (0, 1); about 1 / (1 - decay) steps are averaged.
    """
    if not 0 < decay < 1:
        raise ValueError(
            f"The decay of the weight average is {decay}: give a number between 0 and 1."
        )
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
