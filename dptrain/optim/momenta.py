"""Two kinds of momentum of an early study of private training, for torch.

They are those of ``naive_momentum.py`` in the repository yc7z/ml-privacy-exp. ``g_t`` is the private gradient
of step t = 1, 2, ..., to which weight decay has been added. Both read private gradients only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dptrain.optim.directed import Directed

PERIOD = 10
"""Steps over which momentum is accumulated, as in the study."""


class AccumulatedMomentum(Directed):
    """Periodically accumulated momentum: d_t = g_t, and at the end of each period

        d_t = g_t + (g_(t-P+1) + ... + g_t) / P        for t = P, 2 P, 3 P, ...

    so that every P-th step also takes the mean of the last P gradients. (The study's script empties its
    sum just before that step, which leaves g_t / P of the mean; this is what it describes.)
    """

    def __init__(self, parameters: Iterable[Any], lr: float, weight_decay: float = 0.0, period: int = PERIOD):
        super().__init__(parameters, lr, weight_decay, period=period)

    def direction(self, gradient: Tensor, state: dict[str, Any], step: int, group: dict[str, Any]) -> Tensor:
        if "sum" not in state:
            state["sum"] = torch.zeros_like(gradient)
        total = state["sum"].add_(gradient)
        if step % group["period"]:
            return gradient
        mean = total / group["period"]
        total.zero_()
        return gradient + mean


class RunningMomentum(Directed):
    """Running-average momentum: half the gradient, and half the mean of all gradients, which fades:

        d_t = g_t / 2 + a_t / (2 t),        a_t = (g_1 + ... + g_t) / t

    (The study's script begins t anew with each epoch; under Poisson sampling there are none.)
    """

    def direction(self, gradient: Tensor, state: dict[str, Any], step: int, group: dict[str, Any]) -> Tensor:
        if "mean" not in state:
            state["mean"] = torch.zeros_like(gradient)
        mean = state["mean"].lerp_(gradient, 1 / step)
        return gradient / 2 + mean / (2 * step)
