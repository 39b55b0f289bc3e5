"""Two kinds of momentum of an early study of private training, for torch.

They are those of ``naive_momentum.py`` in the repository yc7z/ml-privacy-exp. ``g_t`` is the private gradient
of step t = 1, 2, ..., to which weight decay has been added. Both read private gradients only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

PERIOD = 10
"""Steps over which momentum is accumulated, as in the study."""


class Directed(Optimizer):
    """p <- p - lr d, where a subclass says what d is. What it remembers lies in ``state``, as tensors."""

    def __init__(self, parameters: Iterable[Any], lr: float, weight_decay: float = 0.0, **options: Any):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, **options})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)
        return loss

    def _move(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            # On the host and in float32, as torch's optimizers have it.
            state["step"] = torch.zeros((), dtype=torch.float32)
        state["step"] += 1
        gradient = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
        p.add_(self.direction(gradient, state, int(state["step"]), group), alpha=-group["lr"])

    @abstractmethod
    def direction(self, gradient: Tensor, state: dict[str, Any], step: int, group: dict[str, Any]) -> Tensor:
        """d_t, like the gradient, which is not changed; step: t, from 1."""


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
